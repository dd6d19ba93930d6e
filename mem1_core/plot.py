"""The picture of a `TrajectoryMask`. Needs matplotlib, the extra `mem1_core[plot]`."""

from __future__ import annotations

from os import PathLike
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from mem1_core.mask import TrajectoryMask
from mem1_core.segments import Segment

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# kind -> (name in the legend, colour): Okabe and Ito's palette, which colour-blind readers can tell apart
_STYLE = {
    "prompt": ("prompt", "#999999"),
    "state": ("<IS>", "#0072b2"),
    "query": ("<query>", "#e69f00"),
    "answer": ("<answer>", "#cc79a7"),
    "info": ("<info>", "#009e73"),
}
_ACTIONS = ("#d55e00", "#56b4e9", "#f0e442")  # actions of other kinds, in turn
_UNKNOWN = ("visible", "#0072b2")  # a mask that was not built from turns
_EVICTED = "#ececec"
_PRUNE = "#d62728"
_PIXELS = 1024  # a side of the picture at most: longer trajectories are sampled
_LABELS = 40  # turn labels at most: of more, every n-th is drawn
_EVENTS = 200  # prune events at most: more are a texture, not lines


def plot_mask(
    mask: TrajectoryMask,
    path: str | PathLike[str] | None = None,
    *,
    ax: Axes | None = None,
    title: str | None = None,
    row: int = 0,
) -> Figure:
    """Draw who sees whom in row `row` of the batch: query rows against key columns.

    A cell has its key's colour, that of the segment's kind, where the query (vertical) sees the key
    (horizontal) and is grey where the key is evicted. Dotted lines: a turn begins. Red lines: a prune event,
    from there on fewer keys are seen. Returns the figure, saved to `path` if given (the suffix decides the
    format); `ax` draws into an existing plot. Long trajectories are sampled, never made N x N. Raises
    ImportError without matplotlib (`pip install 'mem1_core[plot]'`).
    """
    try:
        from matplotlib.colors import to_rgb
        from matplotlib.figure import Figure
        from matplotlib.lines import Line2D
        from matplotlib.patches import Patch
    except ImportError as error:
        raise ImportError("plot needs matplotlib: pip install 'mem1_core[plot]'") from error
    batch, tokens = mask.shape
    if not 0 <= row < batch:
        raise ValueError(f"row: expected one of the {batch} rows of the batch, got {row}")
    evict = mask.evict_at[row].cpu().long()
    styles = _styles(mask.segments) or [_UNKNOWN]
    lengths = torch.tensor([segment.length for segment in mask.segments] or [tokens])
    colours = torch.tensor([to_rgb(colour) for _, colour in styles]).repeat_interleave(lengths, dim=0)
    if ax is None:
        ax = Figure(figsize=(8.5, 8), dpi=150, layout="constrained").add_subplot()
    if tokens:
        ax.imshow(_picture(evict, colours).numpy(), extent=(0, tokens, tokens, 0), interpolation="nearest")

    begins, names = _turns(mask.segments)
    for begin in begins[1:]:
        ax.axhline(begin, color="black", linewidth=0.5, linestyle=":", alpha=0.6)
        ax.axvline(begin, color="black", linewidth=0.5, linestyle=":", alpha=0.6)
    events = [event for event in evict.unique().tolist() if event < tokens]
    for event in events if len(events) <= _EVENTS else ():
        ax.plot([0, event], [event, event], color=_PRUNE, linewidth=1.0)
    if names:
        middles = [(a + b) / 2 for a, b in zip(begins, [*begins[1:], tokens], strict=True)]
        every = len(names) // _LABELS + 1
        ax.secondary_yaxis("right").set_yticks(middles[::every], names[::every], fontsize=8)

    legend: list[Patch | Line2D] = [Patch(color=colour, label=name) for name, colour in dict.fromkeys(styles)]
    legend.append(Patch(facecolor=_EVICTED, edgecolor="black", linewidth=0.3, label="evicted"))
    if events:
        legend.append(Line2D([], [], color=_PRUNE, linewidth=1.0, label="prune event"))
    ax.legend(handles=legend, loc="upper right", framealpha=1.0)
    ax.set_xlabel("key: the token that is seen")
    ax.set_ylabel("query: the token that sees")
    causal = tokens * (tokens + 1) // 2
    seen = int((evict - torch.arange(tokens)).sum()) / max(causal, 1)
    peak = int(mask.peak_tokens()[row])
    summary = f"{tokens:,} tokens, at most {peak:,} live at once, {seen:.1%} of causal pairs visible"
    ax.set_title(f"{title}\n{summary}" if title else summary)
    figure = cast("Figure", ax.figure)
    if path is not None:
        figure.savefig(path)
    return figure


def _styles(segments: tuple[Segment, ...]) -> list[tuple[str, str]]:
    others = [kind for kind in dict.fromkeys(segment.kind for segment in segments) if kind not in _STYLE]
    more = {kind: (f"<{kind}>", _ACTIONS[n % len(_ACTIONS)]) for n, kind in enumerate(others)}
    return [(_STYLE | more)[segment.kind] for segment in segments]


def _picture(evict: Tensor, colours: Tensor) -> Tensor:
    """fp32 [P, P, 3] with P = min(N, _PIXELS): each pixel shows the (query, key) pair in its middle."""
    tokens = evict.shape[0]
    pixels = min(tokens, _PIXELS)
    sample = ((torch.arange(pixels) + 0.5) * tokens / max(pixels, 1)).long()
    query, key, last = sample[:, None], sample[None, :], evict[sample][None, :]
    picture = colours[sample].expand(pixels, pixels, 3).clone()
    picture[key > query] = 1.0
    picture[query >= last] = int(_EVICTED[1:3], 16) / 255  # below the diagonal
    return picture


def _turns(segments: tuple[Segment, ...]) -> tuple[list[int], list[str]]:
    """Where each turn of the stream begins, and its name."""
    begins, names, position, before = [], [], 0, None
    for segment in segments:
        if segment.length and segment.turn != before:
            begins.append(position)
            names.append(f"turn {segment.turn}" if segment.turn else "prompt")
            before = segment.turn
        position += segment.length
    return begins, names
