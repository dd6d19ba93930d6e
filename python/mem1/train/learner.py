"""What an update learns from a batch of trajectories: PPO, GRPO, RLOO, REINFORCE, on any number of ranks.

Every rank knows all trajectories and what the algorithm makes of them; forwards and backwards are dealt out.
So groups, whitening and normalisers are those of the whole batch, however it is split.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from mem1.checks import require
from mem1.config import AlgorithmConfig, Regime
from mem1.engine.output_layer import OutputLayer
from mem1.models.adapters import adapted_layers
from mem1.models.build import build_value_head, without_dropout
from mem1.runtime.ranks import Ranks
from mem1.train.advantages import Experience, set_advantages
from mem1.train.batches import (
    PackedBatch,
    Policy,
    WithoutAdapters,
    micro_batches,
    pack,
    recompute_logprobs,
)
from mem1.train.flops import Work, flops
from mem1.train.optim import AdamW
from mem1.train.trainer_state import TrainerState
from mem1.train.update_metrics import LARGEST_LOG, by_turn, explained_variance, extreme, summary
from mem1.trajectory import Trajectory
from mem1_core.ops import clipped_value_loss, fused_linear_ppo_loss
from mem1_core.reference import kl_estimate


class Learner:
    """The state of a training run: its models and their optimisers.

    actor and reference: causal language models with attention "mem1", or a `Policy` of one; the reference of
    an actor with adapters is `WithoutAdapters` of its policy. critic: module with
    `forward(input_ids, position_ids, mem1_mask) -> values [B, N]`, for "ppo" with a critic of its own trunk
    only; one that shares the actor's is the policy's `value_head`. `reference` may be None only if
    `config.kl_coef` is 0. ranks: of several, each has a part of the weights (`sharding.shard`), and all call
    every method, with the same arguments.
    """

    def __init__(
        self,
        actor: Any,
        critic: nn.Module | None,
        reference: Any | None,
        config: AlgorithmConfig,
        regime: Regime,
        temperature: float = 1.0,
        ranks: Ranks | None = None,
    ) -> None:
        if reference is None and config.kl_coef:
            raise ValueError(f"reference: expected a frozen model for kl_coef = {config.kl_coef}, got None")
        own, shared = (config.name == "ppo" and config.critic == kind for kind in ("own", "shared"))
        if (critic is not None) != own:
            kind = f"{config.name} with a shared trunk" if shared else config.name
            expected = "one" if own else "None"
            raise ValueError(f"critic: expected {expected} for {kind}, got {type(critic).__name__}")
        if not isinstance(actor, Policy):
            actor = Policy(actor, build_value_head(actor) if shared else None)
        self.policy, self.critic = actor, critic
        wrapped = reference is None or isinstance(reference, (Policy, WithoutAdapters))
        self.reference = reference if wrapped else Policy(reference)
        self._adapted = bool(adapted_layers(self.policy))
        self.config, self.regime, self.temperature = config, regime, temperature
        self.ranks = ranks or Ranks()
        self.device = next(actor.parameters()).device
        self.optimizers = {
            name: AdamW(model.parameters(), betas=(0.9, 0.95), max_grad_norm=config.max_grad_norm)
            for name, model in (("actor", self.actor), ("critic", critic or actor.value_head))
            if model is not None
        }
        self.updates = 0

    @property
    def actor(self) -> Any:
        """The causal language model that learns."""
        return self.policy.model

    def update(
        self, trajectories: list[Trajectory], generator: torch.Generator | None = None
    ) -> dict[str, Any]:
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

        Returns, as means over policy tokens: with a critic `value_loss`, `value_clip_fraction`; and, once the
        actor learns too, `policy_loss`, `kl` (as kl_reference, at each step), `entropy`, `clip_fraction`;
        `ratio_max` and `ratio_min`, the extreme probability ratios of all; `actor_grad_norm` and
        `critic_grad_norm`, means over the steps, before clipping; `skipped_steps`, those that were not taken
        as their gradients had no finite norm. Raises Diverged when these do not end.
        """
        config = self.config
        train_actor = self._trains_actor
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
        return summary(steps, tokens * config.epochs)

    @torch.no_grad()
    def prepare(self, trajectories: list[Trajectory]) -> tuple[list[Experience], dict[str, Any]]:
        """Old log-probs, reference log-probs, values, rewards and advantages of a batch, with their metrics.
        Changes nothing.

        Trajectories that failed or in which the policy wrote nothing are left out; raises ValueError if none
        is left, or for rewards whose squares are not finite in fp32. A reward belongs to the last token that
        the policy wrote before it.

        The metrics: `update_flops`, of this and of `learn`; as means over policy tokens `dlogp_max`,
        `dlogp_mean`, the |difference| between the sampled log-probs and the trainer's; `dlogp_turns`, its
        mean in each turn; `kl_reference`, the k3 estimate of KL(policy | reference); `advantage_mean` before
        whitening; with a critic `value_mean` and `explained_variance`, the share of the returns' variance
        that it foresaw, NaN if they have none.
        """
        trajectories = [t for t in trajectories if not t.error_kind and t.policy_mask.any()]
        if not trajectories:
            raise ValueError(
                "trajectories: expected at least one, sound, in which the policy wrote a token, got none"
            )
        self._without_dropout()
        measured: dict[int, Experience] = {}
        works = [Work.of([trajectory.layout(self.regime)]) for trajectory in trajectories]
        lengths = [work.rows for work in works]
        for group in self._mine(lengths):
            part = [(trajectories[i], lengths[i]) for i in group]
            measured |= dict(zip(group, self._measured(part), strict=True))
        if self.ranks.size > 1:
            # Not the trajectories: every rank has them.
            bare = {place: replace(e, trajectory=None) for place, e in measured.items()}
            mine = {place: _moved(e, "cpu") for place, e in bare.items()}
            measured = {place: e for theirs in self.ranks.gather(mine) for place, e in theirs.items()}
        batch = [
            replace(_moved(measured[place], self.device), trajectory=trajectory)
            for place, trajectory in enumerate(trajectories)
        ]
        metrics: dict[str, Any] = {"advantage_mean": set_advantages(batch, self.config)}
        metrics["update_flops"] = self.update_flops(Work.sum(works), self._trains_actor)
        old, ref = (torch.cat([getattr(e, name) for e in batch]) for name in ("old_logprob", "ref_logprob"))
        sampled = torch.cat([t.logprobs[t.policy_mask] for t in trajectories]).to(self.device)
        error = (old - sampled).abs()
        metrics |= {
            "dlogp_max": float(error.max()),
            "dlogp_mean": float(error.mean()),
            "dlogp_turns": by_turn(error.cpu(), trajectories),
            "kl_reference": float(kl_estimate(old, ref, "k3").mean()),
        }
        if "critic" in self.optimizers:
            value = torch.cat([e.old_value for e in batch if e.old_value is not None])
            returns = torch.cat([e.returns for e in batch])
            metrics["value_mean"] = float(value.mean())
            metrics["explained_variance"] = explained_variance(returns, value)
        return batch, metrics

    @property
    def _trains_actor(self) -> bool:
        """In the next update."""
        return "critic" not in self.optimizers or self.updates >= self.config.critic_only_updates

    def update_flops(self, work: Work, train_actor: bool = True) -> float:
        """Floating-point operations of an update on that much: of log-probs and values, and of each epoch."""
        trunk, epochs = self.actor.get_decoder(), self.config.epochs
        policy = flops(trunk, work, self.actor.get_output_embeddings())
        total = policy.forward * (1 + (self.reference is not None)) + train_actor * epochs * sum(policy)
        if self.critic is not None:
            value = flops(self.critic.trunk, work)  # type: ignore[arg-type]
            total += value.forward + epochs * sum(value)
        elif self.policy.value_head is not None:
            total += flops(trunk, work).forward * (1 + (not train_actor) * epochs)
        return total

    def _mine(self, lengths: list[int]) -> list[list[int]]:
        """This rank's groups of trajectories of so many rows, as many as any rank has; some may be empty."""
        groups = micro_batches(lengths, self.config.max_tokens_per_micro_batch, self.ranks.size)
        return groups[self.ranks.rank]

    def _measured(self, trajectories: list[tuple[Trajectory, int]]) -> list[Experience]:
        """What the models say of trajectories with their rows; of none they are asked all the same."""
        stream = pack([trajectory for trajectory, _ in trajectories], self.regime, self.device)
        old = recompute_logprobs(self.policy, stream, self.temperature)
        ref = old
        if self.reference is not None:
            ref = recompute_logprobs(self.reference, stream, self.temperature)
        columns, values = [old, ref], self._values(stream)
        if values is not None:
            columns.append(values[stream.layout.logit_rows])
        parts = list(zip(*(column.split(stream.counts) for column in columns), strict=True))
        found, end = [], 0
        for (trajectory, length), part in zip(trajectories, parts[: len(trajectories)], strict=True):
            end += length
            valued = (None, None) if values is None else (part[2], values[end - 1])
            found.append(Experience(trajectory, *part[:2], *valued, part[0], part[0], rows=length))
        return found

    def _values(self, stream: PackedBatch) -> Tensor | None:
        """Of all rows, fp32 [N]; None without a critic."""
        if self.critic is not None:
            return self.critic(**stream.inputs())[0].float()  # type: ignore[no-any-return]
        head = self.policy.value_head
        if head is None:
            return None
        found: Tensor = self.policy(stream, lambda hidden, _: head(hidden)[:, 0].float(), everywhere=True)
        return found

    def step(
        self, batch: list[Experience], train_actor: bool = True, normalizer: float | None = None
    ) -> dict[str, float]:
        """One optimiser step on a minibatch, accumulated over streams of at most `max_tokens_per_micro_batch`
        tokens.

        Every loss is divided by `normalizer`, by default the tokens of the minibatch, so how it is split
        changes nothing. The metrics are means over its tokens.
        """
        self._without_dropout()
        for optimizer in self.optimizers.values():
            optimizer.zero_grad()
        total = sum(len(e.old_logprob) for e in batch)
        normalizer = normalizer or total
        sums: dict[str, float] = {}
        ratios: list[Tensor] = []  # the extremes of logs
        for group in self._mine([e.rows for e in batch]):
            part = [batch[i] for i in group]
            stream = pack([e.trajectory for e in part], self.regime, self.device)
            if self.critic is not None or ("critic" in self.optimizers and not train_actor):
                _add(sums, self._value_step(part, stream, normalizer))
            if train_actor:
                found, log_ratio = self._policy_step(part, stream, normalizer)
                ratios += [log_ratio.max(), log_ratio.min()] if part else []
                _add(sums, found)
        names = list(sums)
        summed = self.ranks.sum(torch.tensor([sums[name] for name in names], dtype=torch.float64))
        result = {"tokens": total} | {
            name: float(value) / total for name, value in zip(names, summed, strict=True)
        }
        config = self.config
        for name, peak, warmup in (
            ("critic", config.critic_lr, config.critic_lr_warmup_steps),
            ("actor", config.actor_lr, config.actor_lr_warmup_steps),
        ):
            if name == "actor" and not train_actor or name not in self.optimizers:
                continue
            optimizer = self.optimizers[name]
            rate = peak * min(1.0, (optimizer.steps + 1) / max(warmup, 1))
            result[f"{name}_grad_norm"] = optimizer.step(rate)
        if train_actor:
            everyone = [ratio for theirs in self.ranks.gather([float(r) for r in ratios]) for ratio in theirs]
            result["ratio_max"] = math.exp(min(extreme(max, everyone), LARGEST_LOG))
            result["ratio_min"] = math.exp(extreme(min, everyone))
        return result

    def _value_step(self, part: list[Experience], stream: PackedBatch, normalizer: float) -> dict[str, float]:
        """The gradients of one stream of a critic, of a shared one those of its head. Metrics are sums over
        its tokens.
        """
        if self.critic is not None:
            value = self.critic(**stream.inputs())[0, stream.layout.logit_rows].float()
            loss, sums = self._value_loss(value, part, normalizer)
        else:
            loss, sums = self.policy(
                stream, lambda hidden, _: self._value_loss(self._shared(hidden.detach()), part, normalizer)
            )
        loss.backward()
        self.optimizers["critic"].collect()
        return sums

    def _shared(self, hidden: Tensor) -> Tensor:
        """Values fp32 [n] of hidden states [n, H] of the policy's trunk."""
        assert self.policy.value_head is not None
        return self.policy.value_head(hidden)[:, 0].float()  # type: ignore[no-any-return]

    def _value_loss(
        self, value: Tensor, part: list[Experience], normalizer: float
    ) -> tuple[Tensor, dict[str, float]]:
        """Of values [M], and sums of metrics over the tokens."""
        empty = torch.empty(0, device=self.device)
        old_value, returns = (
            torch.cat([empty, *(getattr(e, name) for e in part)]) for name in ("old_value", "returns")
        )
        everything = torch.ones_like(value, dtype=torch.bool)
        loss, clipped = clipped_value_loss(
            value, old_value, returns, everything, self.config.value_clip, normalizer=normalizer
        )
        return loss, {
            "value_loss": float(loss.detach()) * normalizer,
            "value_clip_fraction": float(clipped) * len(value),
        }

    def _policy_step(
        self, part: list[Experience], stream: PackedBatch, normalizer: float
    ) -> tuple[dict[str, float], Tensor]:
        """The actor's gradients of one stream; sums of metrics over its tokens, and their log-ratios [M]."""
        config, empty = self.config, torch.empty(0, device=self.device)

        def joined(name: str) -> Tensor:
            return torch.cat([empty, *(getattr(e, name) for e in part)])

        drawn = None
        if config.rollout_is_cap is not None:
            drawn = torch.cat([empty, *(e.rollout_logprob() for e in part)])

        valued: tuple[Tensor, dict[str, float]] = torch.zeros((), device=self.device), {}

        def finish(hidden: Tensor, head: OutputLayer) -> tuple[Tensor, dict[str, Tensor]]:
            nonlocal valued
            if self.policy.value_head is not None:
                valued = self._value_loss(self._shared(hidden), part, normalizer)
            return fused_linear_ppo_loss(
                hidden,
                head.weight,
                stream.targets,
                joined("old_logprob"),
                joined("advantage"),
                torch.ones_like(stream.targets, dtype=torch.bool),
                ref_logprob=joined("ref_logprob"),
                rollout_logprob=drawn,
                bias=head.bias,
                softcap=head.softcap,
                temperature=head.temperature(self.temperature),
                clip_low=config.clip_low,
                clip_high=config.clip_high,
                dual_clip=config.dual_clip,
                rollout_is_cap=config.rollout_is_cap or 1.0,
                kl_coef=config.kl_coef if config.kl_placement == "loss" else 0.0,
                kl_estimator=config.kl_estimator,
                entropy_coef=config.entropy_coef,
                normalizer=normalizer,
            )

        loss, metrics = self.policy(stream, finish)
        value_loss, value_sums = valued
        (loss + config.value_coef * value_loss).backward()
        for optimizer in self.optimizers.values():
            optimizer.collect()
        tokens = sum(stream.counts)
        sums = {name: float(metrics[name]) * tokens for name in ("kl", "entropy", "clip_fraction")}
        if not tokens:  # means of none
            sums = dict.fromkeys(sums, 0.0)
        sums["policy_loss"] = float(loss.detach()) * normalizer
        sums |= value_sums
        return sums, metrics["logprob"] - joined("old_logprob")

    @property
    def bytes_to_come(self) -> int:
        """What gradients and optimisers will take beside what is there; without activations."""
        return sum(optimizer.bytes_to_come for optimizer in self.optimizers.values())

    def _without_dropout(self) -> None:
        for module in (self.policy, self.critic, self.reference):
            if isinstance(module, nn.Module):
                without_dropout(module.model if isinstance(module, Policy) else module)

    def values(self) -> dict[str, Any]:
        """What a resumed run needs besides the actor, as JSON has it; and `tensors`."""
        optimizers = {name: optimizer.values() for name, optimizer in self.optimizers.items()}
        return {"updates": self.updates, "optimizers": optimizers}

    def tensors(self, known: Container[str] = ()) -> dict[str, Tensor]:
        """By name; this rank's parts. Those in `known`, names of a saved state, are made if need be."""
        models = {"actor.model": self.actor, "critic": self.critic or self.policy.value_head}
        found: dict[str, Tensor] = {}
        for (name, optimizer), (prefix, model) in zip(self.optimizers.items(), models.items(), strict=False):
            named = {f"{prefix}.{key}": p for key, p in model.named_parameters()}  # type: ignore[union-attr]
            found |= optimizer.tensors(named, known, alone=name == "critic" or self._adapted)
        if isinstance(self.reference, nn.Module):
            found |= {f"reference.{key}": p.detach() for key, p in self.reference.named_parameters()}
        return found

    def restore(self, values: Mapping[str, Any], saved: TrainerState) -> None:
        """Go on from a saved state; the actor has its weights already. InputError for one that lacks some."""
        tensors = self.tensors(saved.names)
        # An actor in float32 on one rank has no masters: it was saved as it is.
        mine = () if self._adapted else tensors
        own = {name for name in mine if name.startswith("actor.") and name.endswith(".master")}
        missing = tensors.keys() - own - saved.names
        require(not missing, "path", "a state of this run's models", f"none of {min(missing, default='')}")
        saved.fill({name: tensor for name, tensor in tensors.items() if name in saved.names})
        for name, optimizer in self.optimizers.items():
            optimizer.restore(values["optimizers"][name])
        self.updates = values["updates"]


def _moved(experience: Experience, device: torch.device | str) -> Experience:
    """With its tensors there."""
    tensors = {name: value for name, value in vars(experience).items() if isinstance(value, Tensor)}
    return replace(experience, **{name: value.to(device) for name, value in tensors.items()})


def _add(sums: dict[str, float], more: dict[str, float]) -> None:
    for name, value in more.items():
        sums[name] = sums.get(name, 0.0) + value
