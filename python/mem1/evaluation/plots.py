"""The pictures of a run. Needs matplotlib (`pip install mem1_core[plot]`), which only these functions
import.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mem1.evaluation.results import Result
from mem1.trajectory import Trajectory
from mem1_core.plot import plot_mask

_MARKERS = "os^Dv<>P*"
_PANELS = {
    "exact_match": "exact matches (sum)",
    "peak_tokens": "peak tokens, prompt included",
    "dependency_length_without_prompt": "dependency length (token pairs), without the prompt",
    "seconds": "seconds an episode, beside the others of its batch",
}


def plot_results(
    results: Sequence[Result], path: str | os.PathLike[str], panels: Mapping[str, str] = _PANELS
) -> None:
    """Four metrics against the number of objectives, a line per agent with 95 % intervals. panels: their
    titles.
    """
    figure, axes = _figure(2, 2)
    for ax, (name, title) in zip(axes.flat, panels.items(), strict=True):
        agents = list(dict.fromkeys(result.agent for result in results))
        for place, agent in enumerate(agents):
            known = [(r.objectives, r.means[name]) for r in results if r.agent == agent and name in r.means]
            points = sorted((n, mean) for n, mean in known if mean.count)
            values = [mean.value for _, mean in points]
            ends = [[m.value - m.low for _, m in points], [m.high - m.value for _, m in points]]
            # A little beside one another: agents that are equally good hide none.
            beside = 1.04 ** (place - (len(agents) - 1) / 2)
            ax.errorbar(
                [n * beside for n, _ in points],
                values,
                ends,
                marker=_MARKERS[place % len(_MARKERS)],
                fillstyle="none",
                capsize=2,
                label=agent,
            )
        ax.set(title=title)
        _against_objectives(ax, results)
        shown = [r.means[name].value for r in results if name in r.means and r.means[name].count]
        _scale(ax, shown)
    figure.legend(*axes.flat[1].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    figure.savefig(path)


def plot_learning(metrics: str | os.PathLike[str], path: str | os.PathLike[str]) -> None:
    """The learning curve of a `metrics.jsonl`: the loss of the warm start and the reward of updates, where
    there are any.

    Where there is no number (null, NaN, or nothing at all) the curve has a gap.
    """
    records: list[dict[str, Any]] = [json.loads(line) for line in Path(metrics).read_text().splitlines()]
    lines = {
        "warmstart": ("warm start", "step", {"loss": "loss"}),
        "policy": (
            "episodes of the policy",
            "update",
            {"reward": "reward", "answered": "share that ends with an answer"},
        ),
    }
    found = [phase for phase in lines if any(record["phase"] == phase for record in records)]
    figure, axes = _figure(1, max(1, len(found)), squeeze=False)
    for ax, phase in zip(axes[0], found, strict=False):
        title, counted, names = lines[phase]
        rows = [record for record in records if record["phase"] == phase]
        for name, label in names.items():
            ax.plot(
                [r["step"] for r in rows],
                [_number(r.get(name)) for r in rows],
                label=label,
                marker="." if len(rows) < 50 else "",
            )
        ax.set(xlabel=counted, title=title)
        if phase == "warmstart":
            ax.set_yscale("log")
        else:
            ax.set_ylim(0.0, 1.02)  # shares: a scale of its own would blow noise up into a trend
        ax.grid(alpha=0.3)
        ax.legend()
    figure.savefig(path)


def plot_live(trajectories: Mapping[str, Trajectory], path: str | os.PathLike[str]) -> None:
    """How many tokens are live at each token of an episode, a line per agent."""
    figure, ax = _figure(1, 1)
    for agent, trajectory in trajectories.items():
        ax.plot(trajectory.mask.visible_counts()[0].tolist(), label=f"{agent}, {trajectory.turns} turns")
    objectives = " and ".join(dict.fromkeys(str(t.objectives) for t in trajectories.values()))
    ax.set(xlabel="token of the episode", title=f"live tokens, {objectives} objectives", ylim=(0, None))
    ax.grid(alpha=0.3)
    ax.legend()
    figure.savefig(path)


def plot_trajectory(trajectory: Trajectory, path: str | os.PathLike[str]) -> None:
    """Who sees whom in one trajectory, with its turns and prunes."""
    plot_mask(trajectory.mask, path, title=f"{trajectory.objectives} objectives, {trajectory.turns} turns")


def _scale(ax: Any, values: Sequence[float]) -> None:
    """Logarithmic where it takes more than a decade or two; ticks without powers of ten in between."""
    from matplotlib.ticker import EngFormatter

    if values and min(values) > 0 and max(values) > 30 * min(values):
        ax.set_yscale("log")
        ax.yaxis.minorticks_off()
    else:
        ax.set_ylim(bottom=min([0.0, *values]))
    if max(values, default=0.0) >= 10:
        ax.yaxis.set_major_formatter(EngFormatter(sep=""))


def _against_objectives(ax: Any, results: Sequence[Result]) -> None:
    ticks = sorted({r.objectives for r in results})
    ax.set(xscale="log", xlabel="objectives")
    ax.set_xticks(ticks, [str(tick) for tick in ticks])
    ax.minorticks_off()
    ax.grid(alpha=0.3)


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def _figure(rows: int, columns: int, **how: Any) -> tuple[Any, Any]:
    # The object interface: no window system, no global state, works the same in a thread or a test.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.5 * columns, 4.0 * rows), layout="constrained", dpi=120)
    return figure, figure.subplots(rows, columns, **how)
