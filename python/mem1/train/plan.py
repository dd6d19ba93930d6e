"""What a run needs, before there is one: memory of each GPU, tokens and time of an update.

Models are built on torch's meta device, sharded as the run would have them, and asked for their sizes; what a
forward keeps for its backward is watched on a few tokens there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, UntypedStorage, distributed, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import AutoConfig, AutoModelForCausalLM, Qwen2ForCausalLM

from mem1.checks import InputError, require
from mem1.config import RolloutConfig, TrainConfig
from mem1.envs.toy.tokenizer import build_tokenizer
from mem1.models.build import architecture, check_shape, to_dtype
from mem1.models.memory_plan import size, slot_bytes, weights_bytes
from mem1.runtime.ranks import Ranks
from mem1.train.checkpoint import newest
from mem1.train.flops import Work
from mem1.train.learner import Learner
from mem1.train.optim import local
from mem1.train.sharding import companions, layers_of, sharded_learner
from mem1.trajectory import Trajectory
from mem1_core.eviction_policies import EvictionPolicy
from mem1_core.integrations.scores import Scores
from mem1_core.integrations.transformers import NAME, register
from mem1_core.layout import TrajectoryLayout
from mem1_core.ops.ppo_loss import WORKSPACE_BYTES
from mem1_core.segments import Segment, by_policy

_TFLOPS = 989.0  # dense products of bf16 on an H100 or H200
_PROBE = 16  # tokens: what is kept grows with them


class Tokens(NamedTuple):
    """That go through the model once for a batch, by how its trajectories are laid out."""

    one_copy: int
    blocks: int  # of contexts that are encoded again
    per_turn_rows: int  # a row for each turn: all that it saw, and what it wrote


@dataclass(frozen=True)
class Plan:
    """`str` is what a command prints. Bytes are those of one rank."""

    name: str
    parameters: int
    ranks: int
    gpu_bytes: int
    memory: dict[str, int]  # bytes by what they are for
    host: dict[str, int]  # of these, what waits in the host's memory
    slots: int  # episodes side by side on a rank; 0: not even one fits
    tokens: Tokens  # of an update, with all ranks
    flops: float  # of an update, without its rollouts
    seconds: float  # of an update, without its rollouts, at the given share of the peak
    mfu: float

    @property
    def total_bytes(self) -> int:
        return sum(self.memory.values()) - sum(self.host.values())

    @property
    def fits(self) -> bool:
        return self.slots > 0 and self.total_bytes <= self.gpu_bytes

    def to_dict(self) -> dict[str, Any]:
        plain = asdict(self) | {"tokens": self.tokens._asdict()}
        return plain | {"total_bytes": self.total_bytes, "fits": self.fits}

    def __str__(self) -> str:
        fits = "fits" if self.fits else "does not fit"
        lines = [f"{self.name}: {self.parameters:,} parameters, {self.ranks} GPU{'s' * (self.ranks > 1)}", ""]
        there = {name: "  in the host's memory" for name in self.host}
        lines += [
            f"  {name:<20}{size(count):>10}{there.get(name, '')}" for name, count in self.memory.items()
        ]
        lines += [f"  {'in all':<20}{size(self.total_bytes):>10}  {fits} in {size(self.gpu_bytes)}", ""]
        lines += [
            f"{self.slots} episodes side by side on each",
            "tokens of an update through the model, once:",
        ]
        lines += [
            f"  {name.replace('_', ' '):<20}{count:>14,}" for name, count in self.tokens._asdict().items()
        ]
        time = f"{self.seconds:,.1f} s at {100 * self.mfu:.0f} % of the peak, without rollouts"
        return "\n".join([*lines, f"an update: {self.flops / 1e15:,.2f} PFLOP, {time}"])


def plan(
    config: TrainConfig,
    trajectories: Sequence[Trajectory] | None = None,
    *,
    mfu: float = 0.4,
) -> Plan:
    """What a run of these settings needs. Loads no weights and takes hardly any memory.

    trajectories: like those of the run; None: the longest that the settings allow. mfu: the share of a GPU's
    peak (`config.scale.tflops`, by default an H100's) that forwards and backwards reach. InputError for a
    model that is neither on this machine nor said in `config.model`.
    """
    require(0 < mfu <= 1, "mfu", "a number > 0 and <= 1", mfu)
    gpu_bytes, tflops = round(config.scale.gpu_memory * 1e9), config.scale.tflops or _TFLOPS
    ranks, device = config.scale.ranks or 1, torch.device("cpu" if config.device == "cpu" else "cuda")
    name, model = _model(config)
    parameters = model.num_parameters()
    slot = slot_bytes(model, config.rollout.peak_tokens(), device)
    with _as_if(ranks):
        critic, reference = companions(model, config)
        copied, gathered = (weights_bytes(model), _gathered_bytes(model)) if ranks > 1 else (0, 0)
        kept = Kept(model)
        learner = sharded_learner(model, critic, reference, config, Ranks(0, ranks))

    episodes = [(t.segments, t.prune) for t in trajectories or ()] or [_longest(config.rollout)]
    layouts = {
        regime: [TrajectoryLayout.from_segments(s, regime=regime, prune=prune) for s, prune in episodes]
        for regime in ("carry", "reencode")
    }
    times = config.batch_size / len(episodes)
    own = layouts["reencode" if config.rollout.regime == "reencode" else "carry"]
    work = Work(*(round(times * count) for count in Work.of(own)))
    rows = max(layout.token_index.numel() for layout in own)  # of the largest forward
    rows = max(rows, min(config.algorithm.max_tokens_per_micro_batch, -(-work.rows // ranks)))
    memory = _states(learner)
    host = dict(memory) if config.scale.cpu_offload else {}
    memory |= {
        "gathered layers": gathered,
        "rollout copy": copied,
        "activations": kept.bytes(rows, config.scale.activation_checkpointing),
        "loss": _loss_bytes(model, rows * work.labels // work.rows, device),
    }
    held = sum(memory[part] for part in ("weights", "optimizer states", "gradients", "rollout copy"))
    held -= sum(host.values())
    share = config.rollout.kv_memory
    share = share * max(0, gpu_bytes - held) if share <= 1 else share
    slots = min(config.rollout.num_slots, -(-config.batch_size // ranks), int(share // slot))
    memory = {part: count for part, count in (memory | {"KV cache": slots * slot}).items() if count}
    tokens = Tokens(
        one_copy=round(times * Work.of(layouts["carry"]).rows),
        blocks=round(times * Work.of(layouts["reencode"]).rows),
        per_turn_rows=round(times * sum(map(_per_turn_rows, layouts["carry"], [s for s, _ in episodes]))),
    )
    flops = learner.update_flops(work)
    seconds = flops / (ranks * tflops * 1e12 * mfu)
    return Plan(name, parameters, ranks, gpu_bytes, memory, host, slots, tokens, flops, seconds, mfu)


def _model(config: TrainConfig) -> tuple[str, Any]:
    """On the meta device, with its name."""
    register()
    found = None if config.init is None else _known(config.init)
    with torch.device("meta"):
        if found is not None:
            model = AutoModelForCausalLM.from_config(found, attn_implementation=NAME)
            check_shape(model, config.model)
        else:
            rows = config.model.vocab_size
            if config.init is not None:
                expected = "a model on this machine, or its shape, vocab_size too, in the section model"
                require(rows is not None, "init", expected, config.init)
            model = Qwen2ForCausalLM(architecture(config.model, rows or len(build_tokenizer())))
    saved = found and getattr(found, "dtype", None)
    dtype = config.model.dtype
    to_dtype(model, (saved or torch.float32) if dtype == "auto" else getattr(torch, dtype))
    return config.init or "a new model", model


def _known(init: str) -> Any | None:
    """The config of a model that is here, as a folder or in the cache of the hub."""
    try:
        return AutoConfig.from_pretrained(newest(init), local_files_only=True)
    except (OSError, ValueError):
        return None


@contextmanager
def _as_if(ranks: int) -> Iterator[None]:
    """As if this were the first of so many processes, which exchange nothing."""
    if ranks == 1:
        yield
        return
    if distributed.is_initialized():
        raise InputError("plan: expected a process that is in no group of others, got one that is")
    distributed.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
    try:
        yield
    finally:
        distributed.destroy_process_group()


def _longest(rollout: RolloutConfig) -> tuple[list[Segment], EvictionPolicy]:
    """The longest episode that the settings allow, and what is forgotten of it."""
    written = rollout.max_action_tokens
    state = min(rollout.max_state_tokens or written // 2, written - 1) if rollout.format.state else 0
    segments = [Segment("prompt", 0, rollout.max_prompt_tokens)]
    for turn in range(1, rollout.max_turns + 1):
        parts = (
            ("state", state),
            (rollout.format.rest_kind, written - state),
            ("info", rollout.max_info_tokens),
        )
        segments += [Segment(kind, turn, length) for kind, length in parts if length]
    return segments[:-1], rollout.prune  # nothing is answered to the last action


def _per_turn_rows(layout: TrajectoryLayout, segments: Sequence[Segment]) -> int:
    """Tokens of rows that each have what a turn's last token saw."""
    ends, end = dict[int, int](), 0
    for segment in segments:
        end += segment.length
        if by_policy(segment.kind):
            ends[segment.turn] = end - 1
    return int(layout.mask.visible_counts()[0, list(ends.values())].sum())


def _states(learner: Learner) -> dict[str, int]:
    """Bytes of a rank, by what they are for."""
    models = [learner.policy, learner.critic, learner.reference]
    held = {id(p): p for model in models if isinstance(model, nn.Module) for p in model.parameters()}
    masters = [m for optimizer in learner.optimizers.values() for m in optimizer.masters]
    moments = sum(2 * local(master).nbytes for master in masters)
    return {
        "weights": sum(local(p).nbytes for p in held.values()),
        "optimizer states": moments + sum(local(m).nbytes for m in masters if id(m) not in held),
        "gradients": learner.bytes_to_come - moments,
    }


def _gathered_bytes(model: Any) -> int:
    """What a rank has whole for a while, with its gradients: what is in no layer, and two layers, one of
    which is on its way.
    """
    layers = layers_of(model, model)
    largest = max((weights_bytes(layer) for layer in layers), default=0)
    return 2 * (weights_bytes(model) - sum(map(weights_bytes, layers)) + 2 * largest)


def _loss_bytes(model: Any, labels: int, device: torch.device) -> int:
    """Of the fused loss: logits, the gradients of hidden states and output layer in float32."""
    weight = model.get_output_embeddings().weight
    logits = min(WORKSPACE_BYTES[device.type], labels * weight.shape[0] * 4)
    return int(logits + 4 * (weight.numel() + labels * weight.shape[1]))


class Kept:
    """What the trunk of `model` keeps of a forward for its backward, watched over a few tokens."""

    def __init__(self, model: Any) -> None:
        trunk, self._weights = model.get_decoder(), {p.untyped_storage()._cdata for p in model.parameters()}
        device = next(trunk.parameters()).device
        ids = torch.zeros(1, _PROBE, dtype=torch.int64, device=device)
        nothing = ids.new_empty(1, 1, 0, 0, dtype=torch.bool)  # goes to the layers, which do not look at it
        settings = {"position_ids": torch.arange(_PROBE, device=device)[None], "use_cache": False}
        self._of: dict[int, tuple[UntypedStorage, int]] = {}
        with torch.enable_grad(), saved_tensors_hooks(self._count, lambda kept: kept):
            out = trunk(input_ids=ids, attention_mask=nothing, mem1_cache=_Attention(), **settings)
        self._all = sum(count for _, count in self._of.values())
        self._layers, self._input = len(layers_of(model, model)), out.last_hidden_state.nbytes
        self._of.clear()

    def _count(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._weights:
            self._of[storage._cdata] = storage, storage.nbytes()  # held: no other has its address meanwhile
        return tensor

    def bytes(self, tokens: int, checkpointing: bool = False) -> int:
        """For a forward of so many tokens; with checkpointing the inputs of the layers, and all of one."""
        kept = self._all
        if checkpointing and self._layers:
            kept = self._input * self._layers + self._all // self._layers
        return kept * tokens // _PROBE


class _Attention:
    """A LayerCache in the place of the attention of training, with what that keeps."""

    def attend(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, scores: Scores) -> Tensor:
        return cast(Tensor, _Keeping.apply(query, key, value))


class _Keeping(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = value.transpose(1, 2).repeat_interleave(query.shape[1] // value.shape[1], dim=2)
        ctx.save_for_backward(query, key, value, out, query.new_empty(query.shape[:3], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> None:
        raise NotImplementedError("never called: nothing is learned here")
