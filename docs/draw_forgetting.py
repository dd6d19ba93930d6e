"""Draws forgetting.png: one trajectory under each rule of forgetting.

python docs/draw_forgetting.py
"""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure

from mem1_core import Segment, TrajectoryLayout
from mem1_core.plot import plot_mask

KINDS = ("query", "branch", "query", "return", "summary", "query", "answer")
RULES = ("action", "state", "last_turns=2", 40, "hide_observations=1", "fold", "summary", "never")


def main() -> None:
    segments = [Segment("prompt", 0, 12)]
    for turn, kind in enumerate(KINDS, start=1):
        segments += [Segment("state", turn, 8), Segment(kind, turn, 4), Segment("info", turn, 14)]
    figure = Figure(figsize=(14, 7.4), dpi=80, layout="constrained")
    for place, rule in enumerate(RULES, start=1):
        axes = figure.add_subplot(2, 4, place)
        mask = TrajectoryLayout.from_segments(segments[:-1], prune=rule).mask
        plot_mask(mask, ax=axes)
        axes.set_title(
            f"{rule if isinstance(rule, str) else f'truncate={rule}'}: at most {mask.peak_tokens().item()}"
        )
        axes.set_xlabel("")
        axes.set_ylabel("")
        legend = axes.get_legend()
        handles, labels = legend.legend_handles, [text.get_text() for text in legend.get_texts()]
        legend.remove()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    figure.savefig(Path(__file__).with_name("forgetting.png"))


if __name__ == "__main__":
    main()
