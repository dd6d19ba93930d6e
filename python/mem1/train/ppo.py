"""Proximal policy optimisation on whole trajectories: actor, critic, KL to a frozen reference, GAE over
policy tokens.

A batch is packed into streams (`batches.pack`) on which `mem1_core` computes exactly the log-probs the
rollout sampled with. All per-token quantities below have one entry per policy token, M in a stream; the
environment's tokens have none.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from mem1.config import PPOConfig, Regime
from mem1.engine.output_layer import output_layer
from mem1.models.build import without_dropout
from mem1.train.batches import label_hidden, pack, recompute_logprobs, split
from mem1.train.optim import AdamW
from mem1.trajectory import CUT_OFF, Trajectory
from mem1_core.ops import clipped_value_loss, fused_linear_ppo_loss, gae, masked_whiten
from mem1_core.reference import kl_estimate


@dataclass
class Experience:
    """One trajectory with what the losses need; all tensors fp32 [policy tokens of the trajectory]."""

    trajectory: Trajectory
    old_logprob: Tensor  # recomputed by the trainer before the update
    ref_logprob: Tensor
    old_value: Tensor
    advantage: Tensor
    returns: Tensor

    def rollout_logprob(self) -> Tensor:
        """With which the sampler drew the tokens."""
        t = self.trajectory
        drawn = t.logprobs if t.rollout_logprobs is None else t.rollout_logprobs
        return drawn[t.policy_mask].to(self.old_logprob.device)


class PPO:
    """The state of a training run: two optimisers and a frozen reference.

    actor and reference: causal language models with attention "mem1". critic: module with
    `forward(input_ids, position_ids, mem1_mask) -> values [B, N]`. `reference` may be None only if
    `config.kl_coef` is 0.
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
        if reference is None and config.kl_coef:
            raise ValueError(f"reference: expected a frozen model for kl_coef = {config.kl_coef}, got None")
        self.actor, self.critic, self.reference = actor, critic, reference
        self.config, self.regime, self.temperature = config, regime, temperature
        self.device = next(actor.parameters()).device
        self.optimizers = {
            name: AdamW(model.parameters(), betas=(0.9, 0.95), max_grad_norm=config.max_grad_norm)
            for name, model in (("actor", actor), ("critic", critic))
        }
        self.updates = 0

    def update(
        self, trajectories: list[Trajectory], generator: torch.Generator | None = None
    ) -> dict[str, float]:
        """Learn from one batch: `prepare`, then `learn`."""
        batch, metrics = self.prepare(trajectories)
        return metrics | self.learn(batch, generator)

    def learn(
        self,
        batch: list[Experience],
        generator: torch.Generator | None = None,
        stepped: Callable[[], None] = lambda: None,
    ) -> dict[str, float]:
        """The optimiser steps of one update. `generator` shuffles the minibatches; `stepped` is called after
        each step.

        Every minibatch is divided by the tokens that one has on average: what a token weighs does not depend
        on who shares its minibatch, nor on whether it falls into a last, smaller one.

        Returns, as means over policy tokens: `value_loss`, `value_clip_fraction`, and, once the actor learns
        too, `policy_loss`, `kl` (as kl_reference, at each step), `entropy`, `clip_fraction`; `ratio_max`, the
        largest probability ratio of all; `critic_grad_norm` and `actor_grad_norm`, means over the steps,
        before clipping; `skipped_steps`, those that were not taken as their gradients had no finite norm.
        Raises Diverged when these do not end.
        """
        config, train_actor = self.config, self.updates >= self.config.critic_only_updates
        tokens = sum(len(e.old_logprob) for e in batch)
        normalizer = tokens * min(config.mini_batch_size / len(batch), 1.0)
        steps: list[dict[str, float]] = []
        for _ in range(config.epochs):
            order = torch.randperm(len(batch), generator=generator).tolist()
            for start in range(0, len(order), config.mini_batch_size):
                part = [batch[i] for i in order[start : start + config.mini_batch_size]]
                steps.append(self.step(part, train_actor, normalizer))
                stepped()
        self.updates += 1
        return _summary(steps, tokens * config.epochs)

    @torch.no_grad()
    def prepare(self, trajectories: list[Trajectory]) -> tuple[list[Experience], dict[str, float]]:
        """Old log-probs, reference log-probs, values, rewards and advantages of a batch, with their metrics.
        Changes nothing.

        Trajectories that failed or in which the policy wrote nothing are left out; raises ValueError if none
        is left, or for rewards whose squares are not finite in fp32. A reward belongs to the last token that
        the policy wrote before it.

        The metrics, as means over policy tokens: `dlogp_max`, `dlogp_mean`, the |difference| between the
        sampled log-probs and the trainer's; `kl_reference`, the k3 estimate of KL(policy | reference);
        `advantage_mean` before whitening; `value_mean`; `explained_variance`, the share of the returns'
        variance that the critic foresaw, NaN if they have none.
        """
        trajectories = [t for t in trajectories if not t.error_kind and t.policy_mask.any()]
        if not trajectories:
            raise ValueError(
                "trajectories: expected at least one, sound, in which the policy wrote a token, got none"
            )
        self._without_dropout()
        parts: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
        for group in split(trajectories, self.config.max_tokens_per_micro_batch, self.regime):
            stream = pack([trajectories[i] for i in group], self.regime, self.device)
            old = recompute_logprobs(self.actor, stream, self.temperature)
            ref = (
                old
                if self.reference is None
                else recompute_logprobs(self.reference, stream, self.temperature)
            )
            values = self.critic(**stream.inputs())[0].float()
            ends = torch.tensor(
                [trajectories[i].layout(self.regime).token_index.numel() for i in group]
            ).cumsum(0)
            of_tokens = (x.split(stream.counts) for x in (old, ref, values[stream.layout.logit_rows]))
            parts += zip(*of_tokens, values[ends - 1], strict=True)
        columns = list(zip(*parts, strict=True))
        old, ref, value = (pad_sequence(list(x), batch_first=True) for x in columns[:3])
        counts = torch.tensor([len(part[0]) for part in parts], device=self.device)
        mask = torch.arange(old.shape[1], device=self.device) < counts[:, None]  # [B, T]
        reward = pad_sequence(self._rewards(trajectories, torch.stack(columns[3])), batch_first=True)
        kl = kl_estimate(old, ref, "k1")
        if self.config.kl_placement == "reward":
            reward = reward - self.config.kl_coef * kl.clamp(min=0) * mask
        advantage, returns = gae(reward, value, mask, self.config.gamma, self.config.lam)
        whitened = masked_whiten(advantage, mask)
        rows = zip(trajectories, parts, whitened, returns, strict=True)
        batch = [Experience(t, *part[:3], a[: len(part[0])], r[: len(part[0])]) for t, part, a, r in rows]
        sampled = torch.cat([t.logprobs[t.policy_mask] for t in trajectories]).to(self.device)
        error = (old[mask] - sampled).abs()
        return batch, {
            "dlogp_max": float(error.max()),
            "dlogp_mean": float(error.mean()),
            "kl_reference": float(kl_estimate(old, ref, "k3")[mask].mean()),
            "advantage_mean": float(advantage[mask].mean()),
            "value_mean": float(value[mask].mean()),
            "explained_variance": explained_variance(returns[mask], value[mask]),
        }

    def _rewards(self, trajectories: list[Trajectory], last_value: Tensor) -> list[Tensor]:
        """fp32 [policy tokens] of each: its rewards, with what the critic says of its end where one was cut
        off.

        last_value: [B], the critic's value after the policy's last token.
        """
        rewards = [t.policy_rewards().to(self.device) for t in trajectories]
        for trajectory, given in zip(trajectories, rewards, strict=True):
            if not math.isfinite(given.cumsum(0).square().max() + given.flip(0).cumsum(0).square().max()):
                raise ValueError(
                    f"trajectories: expected rewards whose squares are finite in float32, got "
                    f"{trajectory.reward} for seed {trajectory.seed}"
                )
        if self.config.bootstrap_turn_limit:
            for trajectory, given, value in zip(trajectories, rewards, last_value, strict=True):
                if trajectory.finish_reason in CUT_OFF:
                    given[-1] += self.config.gamma * value
        return rewards

    def step(
        self, batch: list[Experience], train_actor: bool = True, normalizer: float | None = None
    ) -> dict[str, float]:
        """One optimiser step on a minibatch, accumulated over streams of at most `max_tokens_per_micro_batch`
        tokens.

        Every loss is divided by `normalizer`, by default the tokens of the minibatch, so how it is split
        changes nothing. The metrics are means over its tokens.
        """
        self._without_dropout()
        config, head = self.config, output_layer(self.actor)
        for optimizer in self.optimizers.values():
            optimizer.zero_grad()
        total = sum(len(e.old_logprob) for e in batch)
        normalizer = normalizer or total
        names = ["value_loss", "value_clip_fraction"]
        if train_actor:
            names += ["policy_loss", "kl", "entropy", "clip_fraction"]
        result, ratios = dict.fromkeys(names, 0.0) | {"tokens": total}, []
        for group in split([e.trajectory for e in batch], config.max_tokens_per_micro_batch, self.regime):
            part = [batch[i] for i in group]
            stream = pack([e.trajectory for e in part], self.regime, self.device)
            share = sum(stream.counts) / total
            everything = torch.ones_like(stream.targets, dtype=torch.bool)
            old_value, returns = (
                torch.cat([getattr(e, name) for e in part]) for name in ("old_value", "returns")
            )
            value = self.critic(**stream.inputs())[0, stream.layout.logit_rows].float()
            value_loss, clipped = clipped_value_loss(
                value, old_value, returns, everything, config.value_clip, normalizer=normalizer
            )
            value_loss.backward()
            self.optimizers["critic"].collect()
            result["value_loss"] += float(value_loss.detach()) * normalizer / total
            result["value_clip_fraction"] += float(clipped) * share
            if not train_actor:
                continue
            drawn = [e.rollout_logprob() for e in part] if config.rollout_is_cap is not None else None
            loss, metrics = fused_linear_ppo_loss(
                label_hidden(self.actor, stream),
                head.weight,
                stream.targets,
                torch.cat([e.old_logprob for e in part]),
                torch.cat([e.advantage for e in part]),
                everything,
                ref_logprob=torch.cat([e.ref_logprob for e in part]),
                rollout_logprob=None if drawn is None else torch.cat(drawn),
                bias=head.bias,
                softcap=head.softcap,
                temperature=head.temperature(self.temperature),
                clip_low=config.clip_ratio,
                clip_high=config.clip_ratio,
                rollout_is_cap=config.rollout_is_cap or 1.0,
                kl_coef=config.kl_coef if config.kl_placement == "loss" else 0.0,
                entropy_coef=config.entropy_coef,
                normalizer=normalizer,
            )
            loss.backward()
            self.optimizers["actor"].collect()
            result["policy_loss"] += float(loss.detach()) * normalizer / total
            for name in ("kl", "entropy", "clip_fraction"):
                result[name] += float(metrics[name]) * share
            ratios.append(float(metrics["ratio_max"]))
        for name, peak, warmup in (
            ("critic", config.critic_lr, config.critic_lr_warmup_steps),
            ("actor", config.actor_lr, config.actor_lr_warmup_steps),
        )[: 1 + train_actor]:
            optimizer = self.optimizers[name]
            rate = peak * min(1.0, (optimizer.steps + 1) / max(warmup, 1))
            result[f"{name}_grad_norm"] = optimizer.step(rate)
        return result | ({"ratio_max": _largest(ratios)} if ratios else {})

    @property
    def bytes_to_come(self) -> int:
        """What gradients and optimisers will take beside what is there; without activations."""
        return sum(optimizer.bytes_to_come for optimizer in self.optimizers.values())

    def _without_dropout(self) -> None:
        for model in (self.actor, self.critic, self.reference):
            if model is not None:
                without_dropout(model)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs besides the models."""
        optimizers = {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()}
        return {"optimizers": optimizers, "updates": self.updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(state["optimizers"][name])
        self.updates = state["updates"]


def explained_variance(returns: Tensor, value: Tensor) -> float:
    """1 - Var(returns - value) / Var(returns), of [n] each; NaN where the returns are all the same."""
    # They are sums of advantages and values: what is the same differs by rounding.
    if returns.std(unbiased=False) <= 1e-6 * returns.abs().max():
        return math.nan
    return float(1 - (returns - value).var(unbiased=False) / returns.var(unbiased=False))


def _largest(values: list[float]) -> float:
    """NaN if there is one, which `max` would forget or keep by the order."""
    return math.nan if any(map(math.isnan, values)) else max(values)


def _summary(steps: list[dict[str, float]], tokens: int) -> dict[str, float]:
    """The metrics of an update from those of its steps, which saw `tokens` policy tokens in all."""
    result: dict[str, float] = {"skipped_steps": 0}
    for name in steps[0]:
        values = [step[name] for step in steps]
        if name == "ratio_max":
            result[name] = _largest(values)
        elif name.endswith("grad_norm"):
            taken = [value for value in values if math.isfinite(value)]
            result["skipped_steps"] += len(values) - len(taken)
            result[name] = fmean(taken) if taken else math.nan
        elif name != "tokens":
            result[name] = sum(step[name] * step["tokens"] for step in steps) / tokens
    return result
