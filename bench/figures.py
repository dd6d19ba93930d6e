"""Draws a run: python bench/figures.py RUN.json [--out FOLDER]

RUN.json is what `pytest bench/ --benchmark` wrote, or what pytest-benchmark saved. A picture of each table
shows the time of every candidate; `roofline` shows for all tables how near they come to the best matrix
product and to a copy, measured in the same rounds. Each as PNG and as SVG, by default in the folder
RUN-figures beside it. Needs matplotlib.
"""

from __future__ import annotations

import argparse
import re
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from runs import COPY, Table, tables

try:
    from matplotlib.figure import Figure
except ImportError as error:
    raise SystemExit("bench/figures.py needs matplotlib: pip install matplotlib") from error

# Okabe and Ito's palette, which colour-blind readers can tell apart; shapes say the same once more.
OURS, OTHER, CEILING = "#0072b2", "#b0b0b0", "#d55e00"
UNITS = ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs"))
SHARES = (("of peak", "of the speed of the best matrix product"), ("of copy", "of the speed of a copy"))
WIDTH = 10.0  # inches


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Draw the tables of a bench run, as PNG and SVG.")
    parser.add_argument("run", type=Path, metavar="RUN.json")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="default: RUN-figures, beside it")
    given = parser.parse_args(arguments)
    try:
        measured = [table for table in tables(given.run) if any(row.stats for row in table.rows)]
    except (OSError, ValueError) as error:
        sys.exit(str(error))
    if not measured:
        sys.exit(f"{given.run}: expected rows with times, got none")
    out = given.out or given.run.with_name(f"{given.run.stem}-figures")
    pictures = {f"{n:02} {table.title}": peers(table) for n, table in enumerate(measured, start=1)}
    if any(_has(table, key) for key, _ in SHARES for table in measured):
        pictures["roofline"] = roofline(measured)
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name, figure in pictures.items():
            for suffix in ("png", "svg"):
                figure.savefig(out / f"{_file_name(name)}.{suffix}", dpi=150)
    except OSError as error:
        sys.exit(f"--out: expected a folder to write to, got {str(out)!r}: {error.strerror}")
    print(f"{len(pictures)} figures in {out}, each as PNG and SVG")


def peers(table: Table) -> Figure:
    """The time of every candidate, ours on top."""
    rows, times = table.rows, [row.stats for row in table.rows if row.stats]
    longest = max(time["median"] for time in times)
    scale, unit = next((pair for pair in UNITS if longest >= pair[0]), UNITS[-1])
    title = textwrap.fill(table.title, 95)
    figure = Figure(figsize=(WIDTH, 1.3 + 0.2 * title.count("\n") + 0.36 * len(rows)), layout="constrained")
    ax = figure.add_subplot()
    for n, row in enumerate(rows):
        if row.stats is None:
            ax.text(0, n, f"  {_short(row.columns['note'], 70)}", va="center", style="italic", color="0.4")
            continue
        median, low, high = (row.stats[key] / scale for key in ("median", "q1", "q3"))
        spread = [[median - low], [high - median]]
        ax.barh(n, median, 0.65, color=OTHER if n else OURS, xerr=spread, error_kw={"capsize": 3, "lw": 1})
        label = f"  {_digits(median)} {unit}"
        if n and row.columns.get("x ours") is not None:
            label += f", {_digits(row.columns['x ours'])}x ours"
        ax.text(max(median, high), n, label, va="center", weight="normal" if n else "bold")
    ax.set_yticks(range(len(rows)), [_short(row.name, 45) for row in rows])
    ax.get_yticklabels()[0].set_weight("bold")
    ax.set(ylim=(len(rows) - 0.5, -0.5), xlim=(0, 1.4 * max(time["q3"] for time in times) / scale))
    ax.set_xlabel(
        f"{unit} per call, median of the rounds; lines are their middle half, ratios medians within rounds"
    )
    _plain(ax, title)
    return figure


def _digits(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:#.3g}"


def roofline(measured: Sequence[Table]) -> Figure:
    """How near each candidate of each table comes to what the machine can do: a panel for each ceiling."""
    panels = []
    for key, words in SHARES:
        shown = [table for table in measured if _has(table, key)]
        if shown:
            panels.append((key, words, shown))
    heights = [0.3 + 0.5 * len(shown) for _, _, shown in panels]
    figure = Figure(figsize=(WIDTH, 0.5 + 0.6 * len(panels) + sum(heights)), layout="constrained")
    figure.get_layout_engine().set(h_pad=0.1)
    axes = figure.subplots(len(panels), squeeze=False, height_ratios=heights)[:, 0]
    for ax, (key, words, shown) in zip(axes, panels, strict=True):
        for n, table in enumerate(shown):
            ours, others = [], []
            for place, row in enumerate(table.rows):
                if row.columns.get(key) is not None and row.name != COPY:
                    (others if place else ours).append(100 * row.columns[key])
            for label, shares, style in (
                ("ours", ours, {"marker": "o", "ms": 10, "color": OURS, "zorder": 3}),
                ("others", others, {"marker": "D", "ms": 6, "mfc": "none", "mec": "0.35"}),
            ):
                ax.plot(shares, [n] * len(shares), ls="none", clip_on=False, label=label, **style)
            text = {"textcoords": "offset points", "ha": "center", "color": OURS}
            for share in ours:
                ax.annotate(f"{share:.0f} %", (share, n), (0, 8), **text)
        ax.axvline(100, color=CEILING, lw=1.5, zorder=1, label=words.removeprefix("of "))
        ax.set_yticks(range(len(shown)), [_label(table, key) for table in shown], fontsize=8)
        ax.set(ylim=(len(shown) - 0.4, -0.7), xlim=(0, max(110, ax.get_xlim()[1])))
        ax.set_xlabel(f"% {words}, in the same rounds; further right is better")
        _plain(ax, "")
        handles = dict(zip(*reversed(ax.get_legend_handles_labels()), strict=True))  # one of each name
        place = {"loc": "lower left", "bbox_to_anchor": (0, 1), "ncols": 3, "frameon": False}
        ax.legend(handles.values(), handles.keys(), **place)
    return figure


def _has(table: Table, key: str) -> bool:
    return any(row.columns.get(key) is not None for row in table.rows)


def _label(table: Table, key: str) -> str:
    peak = table.facts.get("roofline TFLOP/s")
    ceiling = f" (100 % = {peak:.3g} TFLOP/s)" if key == "of peak" and peak else ""
    return textwrap.fill(table.title + ceiling, 60)


def _plain(ax: Any, title: str) -> None:
    ax.set_title(title, loc="left", fontsize=10)
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(axis="x", color="0.9")
    ax.set_axisbelow(True)


def _short(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 3] + "..."


def _file_name(title: str) -> str:
    return re.sub(r"\W+", "-", title.lower()).strip("-")[:70].rstrip("-")


if __name__ == "__main__":
    main()
