"""What an evaluation yields: a row for each agent and number of objectives, and tables of them."""

from __future__ import annotations

import csv
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, TextIO

from mem1.metrics import FACTS, Mean, means
from mem1.trajectory import Trajectory


@dataclass(frozen=True)
class Result:
    """The episodes of one agent at one number of objectives. `row["reward"]` is the mean of a metric of
    `mem1.metrics`, NaN if no sound episode has it.
    """

    agent: str
    objectives: int
    episodes: int  # with those that went wrong
    errors: dict[str, int]  # episodes that went wrong, by kind: they are in none of the means
    replays: int  # attempts that the environment ended, and that were played again
    means: dict[str, Mean]

    def __getitem__(self, metric: str) -> float:
        return self.means[metric].value if metric in self.means else math.nan

    def to_dict(self) -> dict[str, Any]:
        """Flat, as JSON has it: a mean under its own name, its interval under `..._interval`; null: NaN."""
        record: dict[str, Any] = {name: getattr(self, name) for name in FACTS}
        for name, mean in self.means.items():
            known = mean.count > 0
            record[name] = mean.value if known else None
            record[f"{name}_interval"] = [mean.low, mean.high] if known else None
        return record


def row_title(agent: str, objectives: int | None) -> str:
    """What a row is called while it is played: "mem1, 2 objectives"; the agent alone where None."""
    return agent if objectives is None else f"{agent}, {objectives} objective" + "s" * (objectives > 1)


def error_counts(trajectories: Sequence[Trajectory]) -> dict[str, int]:
    """How many of them went wrong, by `Trajectory.error_kind`, the most frequent kind first."""
    counts = Counter(t.error_kind for t in trajectories if t.error_kind)
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def summarize(agent: str, objectives: int, trajectories: Sequence[Trajectory]) -> Result:
    """One row of the table."""
    if not trajectories:
        raise ValueError(
            f"trajectories: expected at least one for {agent} at {objectives} objectives, got none"
        )
    return Result(
        agent=agent,
        objectives=objectives,
        episodes=len(trajectories),
        errors=error_counts(trajectories),
        replays=sum(len(t.failures) for t in trajectories),
        means=means(trajectories),
    )


def write_csv(results: Sequence[Result], file: TextIO) -> None:
    """A line per row: its facts, then each metric with the ends of its interval."""
    metrics = list(dict.fromkeys(name for row in results for name in row.means))
    header = [*FACTS, *(column for name in metrics for column in (name, f"{name}_low", f"{name}_high"))]
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(header)
    nothing = Mean.of([])
    for row in results:
        facts = [row.agent, row.objectives, row.episodes, sum(row.errors.values()), row.replays]
        values = [value for name in metrics for value in row.means.get(name, nothing)[:3]]
        writer.writerow([*facts, *("" if math.isnan(value) else value for value in values)])


def table(rows: Sequence[Any], columns: Sequence[str] | None = None) -> str:
    """Dataclass instances as a Markdown table, one line each; `columns` picks and orders the fields, of a
    `Result` its metrics too, which stand with their intervals.
    """
    if not rows:
        return "(no rows)"
    names = list(columns or (field.name for field in fields(rows[0])))
    return markdown(names, [[_cell(_value(row, name)) for name in names] for row in rows])


def markdown(header: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    """A Markdown table with columns of equal width."""
    widths = [max(len(line[i]) for line in [header, *cells]) for i in range(len(header))]
    rule = "|".join("-" * (width + 2) for width in widths)
    body = [
        " | ".join(value.rjust(width) for value, width in zip(line, widths, strict=True))
        for line in [header, *cells]
    ]
    return "\n".join([f"| {body[0]} |", f"|{rule}|", *(f"| {line} |" for line in body[1:])])


def _value(row: Any, name: str) -> Any:
    if isinstance(row, Result) and name not in FACTS:
        return row.means.get(name, Mean.of([]))
    return getattr(row, name)


def _cell(value: object) -> str:
    """A dict of counts as "3: TimeoutError 2, policy 1"; what there is no number for as "-"."""
    if isinstance(value, dict):
        kinds = ", ".join(f"{name} {count}" for name, count in value.items())
        return f"{sum(value.values())}" + (f": {kinds}" if kinds else "")
    if isinstance(value, Mean):
        width = f" [{_cell(value.low)}, {_cell(value.high)}]" if value.low != value.high else ""
        return "-" if not value.count else f"{_cell(value.value)}{width}"
    if not isinstance(value, float):
        return str(value)
    if math.isnan(value):
        return "-"
    if value != 0 and abs(value) < 1e-3:
        return f"{value:.1e}"
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.0f}"
