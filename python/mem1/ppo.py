"""Proximal policy optimisation on whole trajectories: actor, critic, KL to a frozen reference, GAE over
policy tokens.

A batch is packed into streams (`pack`) on which `mem1_core` computes exactly the log-probs the rollout
sampled with. All per-token quantities below have one entry per policy token, M in a stream; the environment's
tokens have none.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from mem1.config import PPOConfig, Regime
from mem1.trajectory import Trajectory
from mem1_core.layout import TrajectoryLayout
from mem1_core.ops import clipped_value_loss, fused_linear_ppo_loss, gae, linear_logprob, masked_whiten
from mem1_core.reference import kl_estimate


@dataclass(frozen=True)
class Stream:
    """Trajectories packed for one forward: `layout` [N rows, M labels] over the concatenated `tokens`
    int64.
    """

    tokens: Tensor
    layout: TrajectoryLayout

    @property
    def counts(self) -> tuple[int, ...]:
        """Policy tokens of each trajectory; they sum to M."""
        return tuple(int(part.sum()) for part in self.layout.per_trajectory(torch.ones_like(self.targets)))

    @property
    def targets(self) -> Tensor:
        """int64 [M], the policy's tokens."""
        return self.tokens[self.layout.targets]

    def inputs(self) -> dict[str, Any]:
        """Keyword arguments of a decoder (or critic) whose attention is "mem1"."""
        return {
            "input_ids": self.tokens[self.layout.source][None],
            "position_ids": self.layout.position_ids[None],
            "mem1_mask": self.layout.mask,
        }


def pack(trajectories: list[Trajectory], regime: Regime, device: torch.device | str = "cpu") -> Stream:
    """One stream of all `trajectories`, laid out for `regime`."""
    return Stream(
        tokens=torch.cat([t.tokens for t in trajectories]).to(device),
        layout=TrajectoryLayout.packed([t.layout(regime) for t in trajectories]).to(device),
    )


def split(trajectories: list[Trajectory], micro_tokens: int, regime: Regime = "carry") -> Iterator[list[int]]:
    """Indices of the trajectories in groups of at most `micro_tokens` rows of the layout of `regime`, which
    are the tokens of a forward; a longer trajectory is a group of its own. Never an empty group, none left
    out.
    """
    group: list[int] = []
    tokens = 0
    for i, trajectory in enumerate(trajectories):
        n = trajectory.layout(regime).source.numel()
        if group and tokens + n > micro_tokens:
            yield group
            group, tokens = [], 0
        group.append(i)
        tokens += n
    if group:
        yield group


def label_hidden(model: Any, stream: Stream) -> Tensor:
    """The hidden states [M, H] from which the policy's tokens are predicted."""
    hidden = model.get_decoder()(**stream.inputs(), use_cache=False).last_hidden_state[0]
    return hidden[stream.layout.logit_rows]


@torch.no_grad()
def recompute_logprobs(model: Any, stream: Stream, temperature: float = 1.0) -> Tensor:
    """Log-probs fp32 [M] of the policy's tokens under `model`, by one forward over the stream."""
    weight = model.get_output_embeddings().weight
    return linear_logprob(label_hidden(model, stream), weight, stream.targets, temperature)[0]


@dataclass
class Experience:
    """One trajectory with what the losses need; all tensors fp32 [policy tokens of the trajectory]."""

    trajectory: Trajectory
    old_logprob: Tensor  # recomputed by the trainer before the update
    ref_logprob: Tensor
    old_value: Tensor
    advantage: Tensor
    returns: Tensor


class PPO:
    """The state of a training run: two optimisers and a frozen reference.

    actor and reference: causal language models with attention "mem1". critic: module with
    `forward(input_ids, position_ids, mem1_mask) -> values [B, N]`. `reference` may be None only if
    `config.kl` is 0.
    """

    def __init__(
        self,
        actor: Any,
        critic: nn.Module,
        reference: Any | None,
        config: PPOConfig,
        regime: Regime,
        temperature: float = 1.0,
    ) -> None:
        if reference is None and config.kl:
            raise ValueError(f"reference: wanted a frozen model for kl = {config.kl}, got None")
        self.actor, self.critic, self.reference = actor, critic, reference
        self.config, self.regime, self.temperature = config, regime, temperature
        self.device = next(actor.parameters()).device
        self.optimizers = {
            "actor": torch.optim.AdamW(
                actor.parameters(), config.actor_lr, betas=(0.9, 0.95), weight_decay=0.0
            ),
            "critic": torch.optim.AdamW(
                critic.parameters(), config.critic_lr, betas=(0.9, 0.95), weight_decay=0.0
            ),
        }
        self.steps = {"actor": 0, "critic": 0}
        self.updates = 0

    def update(
        self, trajectories: list[Trajectory], generator: torch.Generator | None = None
    ) -> dict[str, float]:
        """Learn from one batch. Trajectories in which the policy wrote nothing are left out.

        Raises ValueError if none is left. `generator` shuffles the minibatches. Returns, as means over policy
        tokens:

        - before the update: `dlogp_max`, `dlogp_mean`, the |difference| between the sampled log-probs and the
          trainer's; `kl_reference`, the k3 estimate of KL(policy | reference); `advantage_mean` before
          whitening; `value_mean`; `explained_variance`, the share of the returns' variance that the critic
          foresaw;
        - of the steps, averaged over these: `value_loss`, `value_clip_fraction`, `critic_grad_norm` (before
          clipping), and, once the actor learns too, `policy_loss`, `kl` (as kl_reference, at each step),
          `entropy`, `clip_fraction`, `actor_grad_norm`, and `ratio_max`, the largest probability ratio of
          all.
        """
        trajectories = [t for t in trajectories if t.policy_mask.any()]
        if not trajectories:
            raise ValueError("trajectories: wanted at least one in which the policy wrote a token, got none")
        batch, metrics = self.prepare(trajectories)
        train_actor = self.updates >= self.config.critic_only
        totals: dict[str, list[float]] = {}
        for _ in range(self.config.epochs):
            order = torch.randperm(len(batch), generator=generator).tolist()
            for start in range(0, len(order), self.config.minibatch):
                step = self.step(
                    [batch[i] for i in order[start : start + self.config.minibatch]], train_actor
                )
                for name, value in step.items():
                    totals.setdefault(name, []).append(value)
        self.updates += 1
        for name, values in totals.items():
            metrics[name] = max(values) if name == "ratio_max" else sum(values) / len(values)
        return metrics

    @torch.no_grad()
    def prepare(self, trajectories: list[Trajectory]) -> tuple[list[Experience], dict[str, float]]:
        """Old log-probs, reference log-probs, values, rewards and advantages of a batch, with their
        metrics.
        """
        self._training(False)
        parts: list[tuple[Tensor, Tensor, Tensor]] = []
        for group in split(trajectories, self.config.micro_tokens, self.regime):
            stream = pack([trajectories[i] for i in group], self.regime, self.device)
            old = recompute_logprobs(self.actor, stream, self.temperature)
            ref = (
                old
                if self.reference is None
                else recompute_logprobs(self.reference, stream, self.temperature)
            )
            value = self.critic(**stream.inputs())[0, stream.layout.logit_rows].float()
            parts += zip(*(x.split(stream.counts) for x in (old, ref, value)), strict=True)
        old, ref, value = (pad_sequence(list(x), batch_first=True) for x in zip(*parts, strict=True))
        counts = torch.tensor([len(part[0]) for part in parts], device=self.device)
        mask = torch.arange(old.shape[1], device=self.device) < counts[:, None]  # [B, T]
        score = torch.tensor([t.reward for t in trajectories], device=self.device)
        reward = torch.zeros_like(old).scatter_(1, counts[:, None] - 1, score[:, None])
        kl = kl_estimate(old, ref, "k1")
        if self.config.kl_in == "reward":
            reward = reward - self.config.kl * kl.clamp(min=0) * mask
        advantage, returns = gae(reward, value, mask, self.config.gamma, self.config.lam)
        whitened = masked_whiten(advantage, mask)
        rows = zip(trajectories, parts, whitened, returns, strict=True)
        batch = [Experience(t, *part, a[: len(part[0])], r[: len(part[0])]) for t, part, a, r in rows]
        sampled = torch.cat([t.logprobs[t.policy_mask] for t in trajectories]).to(self.device)
        error = (old[mask] - sampled).abs()
        spread = returns[mask].var(unbiased=False)
        return batch, {
            "dlogp_max": float(error.max()),
            "dlogp_mean": float(error.mean()),
            "kl_reference": float(kl_estimate(old, ref, "k3")[mask].mean()),
            "advantage_mean": float(advantage[mask].mean()),
            "value_mean": float(value[mask].mean()),
            "explained_variance": float(
                1 - (returns - value)[mask].var(unbiased=False) / spread.clamp(min=1e-8)
            ),
        }

    def step(self, batch: list[Experience], train_actor: bool = True) -> dict[str, float]:
        """One optimiser step on a minibatch, accumulated over streams of at most `micro_tokens` tokens.

        Every loss is divided by the tokens of the whole minibatch, so how it is split changes nothing.
        """
        self._training(True)
        config, weight = self.config, self.actor.get_output_embeddings().weight
        for optimizer in self.optimizers.values():
            optimizer.zero_grad(set_to_none=True)
        total = sum(len(e.old_logprob) for e in batch)
        sums = dict.fromkeys(
            ("policy_loss", "value_loss", "kl", "entropy", "clip_fraction", "value_clip_fraction"), 0.0
        )
        ratio_max = 0.0
        for group in split([e.trajectory for e in batch], config.micro_tokens, self.regime):
            part = [batch[i] for i in group]
            stream = pack([e.trajectory for e in part], self.regime, self.device)
            share = sum(stream.counts) / total
            everything = torch.ones_like(stream.targets, dtype=torch.bool)
            old_value, returns = (
                torch.cat([getattr(e, name) for e in part]) for name in ("old_value", "returns")
            )
            value = self.critic(**stream.inputs())[0, stream.layout.logit_rows].float()
            value_loss, clipped = clipped_value_loss(
                value, old_value, returns, everything, config.value_clip, normalizer=total
            )
            value_loss.backward()
            sums["value_loss"] += float(value_loss.detach())
            sums["value_clip_fraction"] += float(clipped) * share
            if not train_actor:
                continue
            loss, metrics = fused_linear_ppo_loss(
                label_hidden(self.actor, stream),
                weight,
                stream.targets,
                torch.cat([e.old_logprob for e in part]),
                torch.cat([e.advantage for e in part]),
                everything,
                ref_logprob=torch.cat([e.ref_logprob for e in part]),
                temperature=self.temperature,
                clip_low=config.clip,
                clip_high=config.clip,
                kl_coef=config.kl if config.kl_in == "loss" else 0.0,
                entropy_coef=config.entropy,
                normalizer=total,
            )
            loss.backward()
            sums["policy_loss"] += float(loss.detach())
            for name in ("kl", "entropy", "clip_fraction"):
                sums[name] += float(metrics[name]) * share
            ratio_max = max(ratio_max, float(metrics["ratio_max"]))
        learners = {"critic": self.critic, "actor": self.actor} if train_actor else {"critic": self.critic}
        result = {f"{which}_grad_norm": self._learn(which, model) for which, model in learners.items()}
        if not train_actor:
            return result | {name: sums[name] for name in ("value_loss", "value_clip_fraction")}
        return result | sums | {"ratio_max": ratio_max}

    def _training(self, mode: bool) -> None:
        # For gradient checkpointing, which transformers does in training mode only; nothing here has dropout.
        self.actor.train(mode)
        self.critic.train(mode)

    def _learn(self, which: str, model: nn.Module) -> float:
        """Clip the gradients and take an optimiser step at the learning rate of the warm-up; returns the norm
        before.
        """
        norm = float(nn.utils.clip_grad_norm_(model.parameters(), self.config.max_grad_norm))
        self.steps[which] += 1
        warmup = max(getattr(self.config, f"{which}_warmup"), 1)
        rate = getattr(self.config, f"{which}_lr") * min(1.0, self.steps[which] / warmup)
        for group in self.optimizers[which].param_groups:
            group["lr"] = rate
        self.optimizers[which].step()
        return norm

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs besides the models."""
        return {
            "optimizers": {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()},
            "steps": dict(self.steps),
            "updates": self.updates,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(state["optimizers"][name])
        self.steps = dict(state["steps"])
        self.updates = state["updates"]
