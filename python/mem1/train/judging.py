"""Rewards of a model or a judge beside those of the environment."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Sequence
from inspect import isawaitable
from statistics import fmean

from mem1.runtime.event_loop import EVENT_LOOP
from mem1.runtime.ranks import Ranks
from mem1.trajectory import TokenReward, Trajectory

Judge = Callable[[Sequence[Trajectory]], Sequence[float] | Awaitable[Sequence[float]]]


def judged(trajectories: Sequence[Trajectory], judge: Judge, ranks: Ranks) -> dict[str, float]:
    """Add a reward behind the last token of each episode that did not fail: what `judge` says of all of them,
    asked once, by the first rank. Returns its mean, `judge_reward`.

    ValueError for anything but a finite number for each.
    """
    sound = [trajectory for trajectory in trajectories if not trajectory.error_kind]
    scores: list[float] = []
    if ranks.first:
        given = judge(sound)
        scores = [float(score) for score in (EVENT_LOOP.run(given) if isawaitable(given) else given)]
    scores = ranks.broadcast(scores)
    if len(scores) != len(sound) or not all(map(math.isfinite, scores)):
        raise ValueError(f"judge: expected a finite number for each of {len(sound)} episodes, got {scores}")
    for trajectory, score in zip(sound, scores, strict=True):
        if score:
            trajectory.rewards.append(TokenReward(trajectory.tokens.numel() - 1, score))
    return {"judge_reward": fmean(scores)}
