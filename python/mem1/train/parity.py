"""Parity of log-probs: sampled by a rollout against recomputed by the trainer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mem1.config import Regime
from mem1.train.batches import micro_batches, pack, recompute_logprobs, rows
from mem1.trajectory import Trajectory
from mem1_core.eviction_policies import rule_name


@dataclass(frozen=True)
class Parity:
    """How far the log-probs that the trainer recomputes are from those that the rollout sampled with."""

    regime: str
    prune: str | int
    dtype: str
    trajectories: int
    turns: int  # of the longest trajectory
    tokens: int  # policy tokens compared
    max_dlogp: float
    mean_dlogp: float
    kl: float  # k3 estimate of KL(rollout | trainer) per token


def parity(
    model: Any,
    trajectories: Sequence[Trajectory],
    regime: Regime,
    temperature: float = 1.0,
    max_tokens_per_micro_batch: int = 16384,
) -> Parity:
    """Recompute the log-probs of `trajectories` as a trainer of `regime` does and compare.

    The trajectories must come from this very model, at `temperature`, and from a rollout of the same regime.
    Those in which the policy wrote nothing are left out; NaN if there is no other.
    """
    if not trajectories:
        raise ValueError("trajectories: expected at least one, got none")
    chosen = [t for t in trajectories if t.policy_mask.any()]
    weight = model.get_output_embeddings().weight
    difference = [torch.empty(0)]
    lengths = [rows(trajectory, regime) for trajectory in chosen]
    for group in micro_batches(lengths, max_tokens_per_micro_batch)[0] if chosen else ():
        part = [chosen[i] for i in group]
        new = recompute_logprobs(model, pack(part, regime, weight.device), temperature).cpu()
        difference.append(new - torch.cat([t.logprobs[t.policy_mask] for t in part]))
    d = torch.cat(difference).double()
    return Parity(
        regime=regime,
        prune=rule_name(trajectories[0].prune),
        dtype=str(weight.dtype).removeprefix("torch."),
        trajectories=len(chosen),
        turns=max((t.turns for t in chosen), default=0),
        tokens=d.numel(),
        max_dlogp=float(d.abs().max()) if chosen else math.nan,
        mean_dlogp=float(d.abs().mean()),
        kl=float((d.expm1() - d).mean()),
    )
