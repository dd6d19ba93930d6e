"""masked_whiten: against Python's numbers and across data-parallel ranks."""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
from loss_cases import draw, ragged
from torch import Tensor, distributed, multiprocessing

from mem1_core.ops import masked_whiten


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shift_mean", [True, False])
def test_whiten_against_numbers(dtype: torch.dtype, shift_mean: bool) -> None:
    values, mask = (3 * draw(7, 20) + 5).to(dtype), ragged(7, 20)
    got = masked_whiten(values, mask, shift_mean=shift_mean, eps=0.01)
    chosen = values[mask].tolist()
    mean, scale = statistics.fmean(chosen), (statistics.variance(chosen) + 0.01) ** -0.5
    expected = [(x - mean) * scale + (0 if shift_mean else mean) for x in chosen]
    torch.testing.assert_close(got[mask], torch.tensor(expected, dtype=dtype))
    assert got.dtype == dtype and got.shape == values.shape and (got[~mask] == 0).all()


def test_whitened_has_mean_0_and_variance_1() -> None:
    values, mask = 3 * draw(7, 20) + 5, ragged(7, 20)
    chosen = masked_whiten(values, mask)[mask]
    assert float(chosen.mean()) == pytest.approx(0, abs=1e-12) and float(chosen.var()) == pytest.approx(1)
    kept = masked_whiten(values, mask, shift_mean=False)[mask]
    assert float(kept.mean()) == pytest.approx(float(values[mask].mean())) and float(
        kept.var()
    ) == pytest.approx(1)


def test_whiten_edges() -> None:
    values = torch.tensor([5.0, math.nan, 5.0])
    nothing, one = torch.tensor([False] * 3), torch.tensor([True, False, False])
    assert masked_whiten(values, nothing).tolist() == [0, 0, 0]
    assert masked_whiten(values, one).tolist() == [0, 0, 0]
    assert masked_whiten(values, one, shift_mean=False).tolist() == [5, 0, 0]
    assert masked_whiten(values, torch.tensor([True, False, True])).tolist() == [0, 0, 0]  # no variance
    assert masked_whiten(torch.empty(0, 4), torch.empty(0, 4, dtype=torch.bool)).shape == (0, 4)
    scalar = masked_whiten(torch.tensor(2.0), torch.tensor(True))
    assert scalar.shape == () and scalar == 0
    low = masked_whiten(draw(30).bfloat16(), torch.ones(30, dtype=torch.bool))
    assert low.dtype == torch.float32 and float(low.var()) == pytest.approx(1, rel=1e-5)
    strided = draw(6, 5).T
    mask = ragged(5, 6)
    assert torch.equal(masked_whiten(strided, mask), masked_whiten(strided.contiguous(), mask))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("constant", [1 / 3, 0.1, 1.0, 0.0, -1e6 / 3, 1e-30])
def test_whitened_constants_are_zero(constant: float, dtype: torch.dtype) -> None:
    """Not the rounding of their mean, divided by sqrt(eps)."""
    values, mask = torch.full((64, 700), constant, dtype=dtype), draw(64, 700) < 0.8
    assert not masked_whiten(values, mask).any()
    kept = masked_whiten(values, mask, shift_mean=False)
    assert torch.equal(kept, values.to(kept.dtype) * mask)


RANKS = 2
SPLITS = {"ragged": (0, 5, 7), "a rank without rows": (0, 7, 7), "a rank without tokens": (0, 6, 7)}


def whitening_cases(split: str) -> tuple[Tensor, Tensor]:
    values, mask = 3 * draw(7, 20) + 5, ragged(7, 20)
    if split == "a rank without tokens":
        mask[6] = False
    values[~mask] = math.nan
    return values, mask


def whiten_as_a_rank(rank: int, folder: str) -> None:
    """One data-parallel rank of `test_whiten_across_ranks`: saves what it gets for each case."""
    distributed.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=RANKS)
    results: dict[Any, Tensor] = {}
    for split, bounds in SPLITS.items():
        values, mask = (x[bounds[rank] : bounds[rank + 1]] for x in whitening_cases(split))
        for dtype in (torch.float32, torch.float64):
            for shift in (True, False):
                given = values.to(dtype).requires_grad_()
                results[split, dtype, shift] = masked_whiten(
                    given, mask, shift_mean=shift, group=distributed.group.WORLD
                )
    none = torch.zeros(2, 3, dtype=torch.bool)
    results["nothing"] = masked_whiten(draw(2, 3), none, group=distributed.group.WORLD)
    values = torch.full((3 + rank, 100), 1 / 3)
    results["constant"] = masked_whiten(values, values > 0, group=distributed.group.WORLD)
    distributed.destroy_process_group()
    torch.save(results, f"{folder}/{rank}.pt")


@pytest.mark.slow  # two processes start
@pytest.mark.skipif(not distributed.is_available(), reason="this torch has no torch.distributed")
def test_whiten_across_ranks(tmp_path: Path) -> None:
    multiprocessing.spawn(whiten_as_a_rank, (str(tmp_path),), nprocs=RANKS)
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in range(RANKS)]
    for rank in ranks:
        assert torch.equal(rank.pop("nothing"), torch.zeros(2, 3, dtype=torch.float64))
        assert not rank.pop("constant").any()
    assert len(ranks[0]) == 4 * len(SPLITS)
    for split, dtype, shift in ranks[0]:
        values, mask = whitening_cases(split)
        whole = masked_whiten(values.to(dtype), mask, shift_mean=shift)
        parts = [rank[split, dtype, shift] for rank in ranks]
        torch.testing.assert_close(torch.cat(parts), whole)
        assert not any(part.requires_grad for part in parts)
