"""The picture of a TrajectoryMask."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from test_mask import TURNS

from mem1_core.layout import TrajectoryLayout
from mem1_core.mask import TrajectoryMask
from mem1_core.plot import plot_mask


def test_plot_writes_a_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    mask = TrajectoryLayout.from_segments(TURNS).mask
    figure = plot_mask(mask, tmp_path / "mask.png", title="three turns")
    assert (tmp_path / "mask.png").stat().st_size > 10_000
    (axes,) = figure.axes
    assert (
        axes.get_title() == "three turns\n16 tokens, at most 11 live at once, 74.3% of causal pairs visible"
    )
    legend = [text.get_text() for text in axes.get_legend().get_texts()]
    assert legend == ["prompt", "<IS>", "<query>", "<info>", "<answer>", "evicted", "prune event"]
    (side,) = axes.child_axes
    assert [text.get_text() for text in side.get_yticklabels()] == ["prompt", "turn 1", "turn 2", "turn 3"]
    picture = axes.images[0].get_array()
    assert (picture[0, 1] == 1.0).all(), "above the diagonal is white"
    assert (
        len({tuple(picture[i, j]) for i, j in [(15, 0), (15, 12), (15, 8), (15, 9), (15, 15), (15, 2)]}) == 6
    )


def test_plot_of_other_masks(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    batch = TrajectoryMask.from_evict(torch.tensor([[1, 3, 3], [3, 3, 3]]))
    figure = Figure()
    assert plot_mask(batch, ax=figure.add_subplot(), row=1) is figure
    with pytest.raises(ValueError, match="row: expected one of the 2 rows of the batch, got 2"):
        plot_mask(batch, row=2)
    plot_mask(TrajectoryLayout.from_segments([]).mask, tmp_path / "empty.svg")
    assert (tmp_path / "empty.svg").exists()
    long = plot_mask(TrajectoryMask.from_evict(torch.full((65_536,), 65_536)))
    assert max(long.axes[0].images[0].get_array().shape) <= 1024, "never N x N"


def test_plot_without_matplotlib_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.colors", None)
    with pytest.raises(ImportError, match=r"mem1_core\[plot\]"):
        plot_mask(TrajectoryLayout.from_segments(TURNS).mask)
