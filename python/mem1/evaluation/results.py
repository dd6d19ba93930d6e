"""What an evaluation yields: a row for each agent and number of objectives, and the table of them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from statistics import fmean
from typing import Any

from mem1.trajectory import FinishReason, Trajectory


@dataclass(frozen=True)
class Result:
    """Means over the sound episodes of one agent at one number of objectives; NaN if there is none. Lengths
    in tokens, time per episode.
    """

    agent: str
    objectives: int
    episodes: int  # with those that went wrong
    errors: dict[str, int]  # episodes that went wrong, by kind: they are in none of the means
    replays: int  # attempts that the environment ended, and that were played again
    reward: float  # share of objectives answered right
    exact_match: float  # objectives answered right, as the paper sums them
    f1: float
    answered: float  # share of episodes that ended with an answer
    turns: float
    tokens: float
    peak_tokens: float  # most tokens live at once
    peak_tokens_without_prompt: float
    dependency_length: float  # token pairs
    dependency_length_without_prompt: float  # as the paper counts them
    seconds: float  # wall time of all episodes, over the sound ones


def error_counts(trajectories: Sequence[Trajectory]) -> dict[str, int]:
    """How many of them went wrong, by `Trajectory.error_kind`, the most frequent kind first."""
    counts = Counter(t.error_kind for t in trajectories if t.error_kind)
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def summarize(agent: str, objectives: int, trajectories: Sequence[Trajectory], seconds: float) -> Result:
    """One row of the table; `seconds` is the wall time of all `trajectories` together."""
    if not trajectories:
        raise ValueError(
            f"trajectories: expected at least one for {agent} at {objectives} objectives, got none"
        )
    sound = [t for t in trajectories if not t.error_kind]

    def mean(value: Callable[[Trajectory], float]) -> float:
        return fmean(map(value, sound)) if sound else math.nan

    return Result(
        agent=agent,
        objectives=objectives,
        episodes=len(trajectories),
        errors=error_counts(trajectories),
        replays=sum(len(t.failures) for t in trajectories),
        reward=mean(lambda t: t.reward),
        exact_match=mean(lambda t: t.score.get("exact_match", 0.0)),
        f1=mean(lambda t: t.score.get("f1", 0.0)),
        answered=mean(lambda t: t.finish_reason == FinishReason.ANSWERED),
        turns=mean(lambda t: t.turns),
        tokens=mean(lambda t: t.tokens.numel()),
        peak_tokens=mean(lambda t: t.peak_tokens()),
        peak_tokens_without_prompt=mean(lambda t: t.peak_tokens(prompt=False)),
        dependency_length=mean(lambda t: t.dependency_length()),
        dependency_length_without_prompt=mean(lambda t: t.dependency_length(prompt=False)),
        seconds=seconds / len(sound) if sound else math.nan,
    )


def table(rows: Sequence[Any], columns: Sequence[str] | None = None) -> str:
    """Dataclass instances as a Markdown table, one line each; `columns` picks and orders the fields."""
    if not rows:
        return "(no rows)"
    names = list(columns or (field.name for field in fields(rows[0])))
    cells = [[_cell(getattr(row, name)) for name in names] for row in rows]
    widths = [max(len(line[i]) for line in [names, *cells]) for i in range(len(names))]
    rule = "|".join("-" * (width + 2) for width in widths)
    body = [
        " | ".join(value.rjust(width) for value, width in zip(line, widths, strict=True))
        for line in [names, *cells]
    ]
    return "\n".join([f"| {body[0]} |", f"|{rule}|", *(f"| {line} |" for line in body[1:])])


def _cell(value: object) -> str:
    """A dict of counts as "3: TimeoutError 2, policy 1"; what there is no number for as "-"."""
    if isinstance(value, dict):
        kinds = ", ".join(f"{name} {count}" for name, count in value.items())
        return f"{sum(value.values())}" + (f": {kinds}" if kinds else "")
    if not isinstance(value, float):
        return str(value)
    if math.isnan(value):
        return "-"
    if value != 0 and abs(value) < 1e-3:
        return f"{value:.1e}"
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.0f}"
