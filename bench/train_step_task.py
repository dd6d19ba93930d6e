"""The task of `bench_train_step.py`: one optimiser step of PPO on folded trajectories, in several layouts.

Ours feeds each trajectory once, or once for each of its contexts ("blocks"). The peers feed a row for each
turn, as verl, SkyRL, slime and MemAgent do: all that the turn saw, then what it wrote; its tokens alone are
trained. Rows come packed, one behind another with attention that ends at each, or padded to the longest of a
micro-batch. Of a context that is encoded again the rows and our blocks are the same function, so loss and
gradients are compared; one copy is another one, exact for a rollout that prunes its cache.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any, NamedTuple

import torch
from rollout_task import Workload
from torch import Tensor
from torch.nn.functional import log_softmax, scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface

from mem1.config import AlgorithmConfig, ModelConfig, Regime
from mem1.engine.output_layer import output_layer
from mem1.envs.toy.tokenizer import build_tokenizer
from mem1.models.build import build_model
from mem1.train.advantages import Experience
from mem1.train.batches import micro_batches
from mem1.train.learner import Learner
from mem1.train.optim import AdamW
from mem1.trajectory import Trajectory
from mem1_core.ops import fused_linear_ppo_loss
from mem1_core.segments import Segment, by_policy

PACKED = "sdpa by rows"  # the name of an attention
MODEL = ModelConfig(
    vocab_size=8192,
    num_hidden_layers=4,
    hidden_size=256,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=768,
    initializer_range=0.02,
)
BUDGET = 8192  # tokens of a micro-batch, for all
ENTROPY, CLIP = 0.001, 0.2
LAYOUTS: dict[str, Regime] = {"one copy": "carry", "blocks": "reencode"}


class Row(NamedTuple):
    """A turn: what it saw and wrote, and of its last tokens, which it wrote, what the loss wants."""

    tokens: Tensor
    written: int
    old_logprob: Tensor
    advantage: Tensor


@dataclass(frozen=True)
class Task:
    experiences: list[Experience]
    rows: list[Row]
    model: Any

    @classmethod
    def draw(cls, workload: Workload, model: Any) -> Task:
        """Old log-probs are such that some ratios are clipped; advantages are an episode's."""
        generator = torch.Generator().manual_seed(0)
        experiences, rows = [], []
        for lengths in workload.all_lengths():
            segments = [Segment("prompt", 0, lengths.prompt)]
            for turn, (action, info) in enumerate(zip(lengths.actions, lengths.infos, strict=True), 1):
                state = 3 * action // 4
                segments += [Segment("state", turn, state), Segment("query", turn, action - state)]
                segments += [Segment("info", turn, info)]
            segments.pop()  # nothing is answered to the last action
            count = sum(segment.length for segment in segments)
            vocabulary = model.config.vocab_size
            tokens = torch.randint(vocabulary, (count,), generator=generator)
            trajectory = Trajectory(tokens, segments, torch.zeros(count), prune="action")
            labels = int(trajectory.policy_mask.sum())
            old = torch.randn(labels, generator=generator) * 0.2 - math.log(vocabulary)
            advantage = torch.randn(1, generator=generator).expand(labels).contiguous()
            length = trajectory.layout().token_index.numel()
            experiences.append(
                Experience(trajectory, old, old, None, None, advantage, advantage, rows=length)
            )
            rows += turn_rows(experiences[-1])
        return cls(experiences, rows, model)

    @property
    def labels(self) -> int:
        return sum(row.written for row in self.rows)

    def fed(self) -> dict[str, int]:
        """Tokens of a forward over all, by layout."""
        ours = {
            name: sum(e.trajectory.layout(regime).token_index.numel() for e in self.experiences)
            for name, regime in LAYOUTS.items()
        }
        return ours | {"per-turn rows": sum(len(row.tokens) for row in self.rows)}


def turn_rows(experience: Experience) -> Iterator[Row]:
    """The tokens that the last one of a turn saw are those of its row."""
    trajectory, start, done = experience.trajectory, 0, 0
    ends = dict[int, int]()
    counts = dict[int, int]()
    for segment in trajectory.segments:
        start += segment.length
        if by_policy(segment.kind):
            ends[segment.turn] = start
            counts[segment.turn] = counts.get(segment.turn, 0) + segment.length
    for turn, end in ends.items():
        seen = trajectory.mask.visible(torch.tensor([end - 1]))[0, 0]
        mine = slice(done, done + counts[turn])
        done += counts[turn]
        yield Row(
            trajectory.tokens[seen], counts[turn], experience.old_logprob[mine], experience.advantage[mine]
        )


def policy(config: ModelConfig = MODEL, device: str = "cpu") -> Any:
    return build_model(build_tokenizer(), config).to(device).eval()


# ----------------------------------------------------------------------------------------------------- ours


def learner(task: Task, regime: Regime) -> Callable[[], dict[str, float]]:
    """`Learner.step`, what a training run calls."""
    config = AlgorithmConfig(
        name="grpo",
        kl_coef=0.0,
        entropy_coef=ENTROPY,
        clip_low=CLIP,
        clip_high=CLIP,
        max_tokens_per_micro_batch=BUDGET,
    )
    trained = Learner(copy.deepcopy(task.model), None, None, config, regime)
    names = "old_logprob", "ref_logprob", "advantage"
    batch = [
        replace(
            e,
            rows=e.trajectory.layout(regime).token_index.numel(),
            **{name: getattr(e, name).to(trained.device) for name in names},
        )
        for e in task.experiences
    ]

    def step() -> dict[str, float]:
        found = trained.step(batch)
        return {"loss": found["policy_loss"], "norm": found["actor_grad_norm"]}

    return step


# ---------------------------------------------------------------------------------------------------- peers

Loss = Callable[[Any, Tensor, Tensor, Tensor, Tensor], Tensor]  # model, hidden, targets, old, advantage


def per_turn_rows(task: Task, loss: Loss, *, packed: bool) -> Callable[[], dict[str, float]]:
    """One step on rows, with the same optimiser and the same budget of tokens."""
    register()
    model = copy.deepcopy(task.model)
    model.set_attn_implementation(PACKED if packed else "sdpa")
    optimizer = AdamW(model.parameters(), betas=(0.9, 0.95))
    device = next(model.parameters()).device
    lengths = [len(row.tokens) for row in task.rows]
    (groups,) = micro_batches(lengths, BUDGET) if packed else ([*_padded_groups(lengths)],)

    def step() -> dict[str, float]:
        total = 0.0
        for group in groups:
            rows = [task.rows[n] for n in group]
            hidden = (_packed if packed else _padded)(model, rows, device)
            targets = torch.cat([row.tokens[-row.written :] for row in rows]).to(device)
            old, advantage = (
                torch.cat([getattr(row, name) for row in rows]).to(device)
                for name in ("old_logprob", "advantage")
            )
            part = loss(model, hidden, targets, old, advantage) / task.labels
            part.backward()
            total += float(part.detach())
        return {"loss": total, "norm": optimizer.step(AlgorithmConfig.actor_lr)}

    return step


def _padded_groups(lengths: list[int]) -> Iterator[list[int]]:
    """Of like lengths, as many as fit the budget once padded."""
    group: list[int] = []
    for place in sorted(range(len(lengths)), key=lambda n: -lengths[n]):
        if group and (len(group) + 1) * lengths[group[0]] > BUDGET:
            yield group
            group = []
        group.append(place)
    yield group


def _packed(model: Any, rows: list[Row], device: torch.device) -> Tensor:
    """Hidden states [M, H] of one stream of rows, from which what they wrote is predicted."""
    lengths = [len(row.tokens) for row in rows]
    ids = torch.cat([row.tokens for row in rows])[None].to(device)
    positions = torch.cat([torch.arange(n) for n in lengths])[None].to(device)
    out = model.get_decoder()(ids, position_ids=positions, row_lengths=lengths, use_cache=False)
    parts = out.last_hidden_state[0].split(lengths)
    return torch.cat([part[-row.written - 1 : -1] for part, row in zip(parts, rows, strict=True)])


def _padded(model: Any, rows: list[Row], device: torch.device) -> Tensor:
    most = max(len(row.tokens) for row in rows)
    ids = torch.zeros(len(rows), most, dtype=torch.int64)
    for place, row in enumerate(rows):
        ids[place, : len(row.tokens)] = row.tokens  # padding is on the right: what is causal never sees it
    out = model.get_decoder()(ids.to(device), use_cache=False).last_hidden_state
    ends = [len(row.tokens) for row in rows]
    return torch.cat(
        [out[n, end - row.written - 1 : end - 1] for n, (end, row) in enumerate(zip(ends, rows, strict=True))]
    )


def register() -> None:
    """Attention of packed rows by SDPA's causal kernel, row by row: the fastest that torch has for them on a
    CPU, where FlexAttention has no backward; on a GPU FlashAttention for sequences of any length.
    """
    AttentionInterface.register(PACKED, _attention_by_rows)
    AttentionMaskInterface.register(PACKED, lambda *args, **kwargs: None)


def _attention_by_rows(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, row_lengths: list[int], **rest: Any
) -> tuple[Tensor, None]:
    if query.is_cuda:
        from torch.nn.attention.varlen import varlen_attn

        ends = torch.tensor([0, *row_lengths], device=query.device).cumsum(0).int()
        group, most = query.shape[1] // key.shape[1], max(row_lengths)
        q, k, v = (
            x.repeat_interleave(times, 1)[0].transpose(0, 1)
            for x, times in ((query, 1), (key, group), (value, group))
        )
        return varlen_attn(q, k, v, ends, ends, most, most, is_causal=True)[None], None
    parts = (x.split(row_lengths, dim=2) for x in (query, key, value))
    outs = [
        scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        for q, k, v in zip(*parts, strict=True)
    ]
    return torch.cat(outs, dim=2).transpose(1, 2), None


def fused_loss(model: Any, hidden: Tensor, targets: Tensor, old: Tensor, advantage: Tensor) -> Tensor:
    """Ours: of these rows the layout is then all that differs."""
    head = output_layer(model)
    mask = torch.ones_like(targets, dtype=torch.bool)
    return fused_linear_ppo_loss(
        *(hidden, head.weight, targets, old, advantage, mask),
        clip_low=CLIP,
        clip_high=CLIP,
        entropy_coef=ENTROPY,
        normalizer=1,
    )[0]


def _clipped(logprob: Tensor, entropy: Tensor, old: Tensor, advantage: Tensor) -> Tensor:
    ratio = (logprob - old).clamp(-20, 20).exp()
    policy = torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - CLIP, 1 + CLIP))
    return (policy - ENTROPY * entropy).sum()


def eager_loss(model: Any, hidden: Tensor, targets: Tensor, old: Tensor, advantage: Tensor) -> Tensor:
    logp = log_softmax(model.lm_head(hidden).float(), -1)
    return _clipped(logp.gather(-1, targets[:, None])[:, 0], -(logp.exp() * logp).sum(-1), old, advantage)


def verl_loss(model: Any, hidden: Tensor, targets: Tensor, old: Tensor, advantage: Tensor) -> Tensor:
    verl = import_module("verl.utils.torch_functional")
    logits = model.lm_head(hidden).float()
    return _clipped(
        verl.logprobs_from_logits(logits, targets), verl.entropy_from_logits(logits), old, advantage
    )


def trl_loss(model: Any, hidden: Tensor, targets: Tensor, old: Tensor, advantage: Tensor) -> Tensor:
    trl = import_module("trl.trainer.utils")
    logprob, entropy = trl.selective_log_softmax_and_entropy(model.lm_head(hidden).float(), targets)
    return _clipped(logprob, entropy, old, advantage)
