"""What the steps of an update say, put together."""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import fmean

import torch
from torch import Tensor

from mem1.trajectory import Trajectory
from mem1_core.segments import by_policy

LARGEST_LOG = 20.0  # of a ratio, as the loss has it


def explained_variance(returns: Tensor, value: Tensor) -> float:
    """1 - Var(returns - value) / Var(returns), of [n] each; NaN where the returns are all the same."""
    # They are sums of advantages and values: what is the same differs by rounding.
    if returns.std(unbiased=False) <= 1e-6 * returns.abs().max():
        return math.nan
    return float(1 - (returns - value).var(unbiased=False) / returns.var(unbiased=False))


def extreme(which: Callable[[list[float]], float], values: list[float]) -> float:
    """`max` or `min`; NaN if there is one, which these would forget or keep by the order."""
    return math.nan if any(map(math.isnan, values)) else which(values)


def by_turn(values: Tensor, trajectories: list[Trajectory]) -> list[float]:
    """Means over the policy's tokens of each turn, from the first."""
    written = [segment for t in trajectories for segment in t.segments if by_policy(segment.kind)]
    lengths = torch.tensor([segment.length for segment in written])
    turns = torch.tensor([segment.turn - 1 for segment in written]).repeat_interleave(lengths)
    sums = torch.zeros(int(turns.max()) + 1, dtype=torch.float64).index_add_(0, turns, values.double())
    return (sums / torch.bincount(turns).clamp(min=1)).tolist()


def summary(steps: list[dict[str, float]], tokens: int) -> dict[str, float]:
    """The metrics of an update from those of its steps, which saw `tokens` policy tokens in all."""
    result: dict[str, float] = {"skipped_steps": 0}
    for name in steps[0]:
        values = [step[name] for step in steps]
        if name in ("ratio_max", "ratio_min"):
            result[name] = extreme(max if name == "ratio_max" else min, values)
        elif name.endswith("grad_norm"):
            taken = [value for value in values if math.isfinite(value)]
            result["skipped_steps"] += len(values) - len(taken)
            result[name] = fmean(taken) if taken else math.nan
        elif name != "tokens":
            result[name] = sum(step[name] * step["tokens"] for step in steps) / tokens
    return result
