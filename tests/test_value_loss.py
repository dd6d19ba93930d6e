"""clipped_value_loss: against Python's numbers, its gradient, parts of a batch, bad input."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from mem1_core.ops import clipped_value_loss


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def values(*shape: int, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    value, old, returns = draw(*shape), draw(*shape, seed=1), draw(*shape, seed=2)
    mask = torch.rand(*shape, generator=torch.Generator().manual_seed(3)) < 0.6
    return {"value": value.to(dtype), "old_value": old.to(dtype), "returns": returns.to(dtype), "mask": mask}


@pytest.mark.parametrize("clip", [0.0, 0.2, 0.5, math.inf])
@pytest.mark.parametrize("normalizer", [None, 7.0, torch.tensor(7.0, dtype=torch.float64)])
def test_value_loss_against_numbers(clip: float, normalizer: float | Tensor | None) -> None:
    given = values(4, 10)
    losses, clipped = [], 0
    for v, old, goal in zip(*(given[n][given["mask"]].tolist() for n in list(given)[:3]), strict=True):
        plain, cut = (v - goal) ** 2, (min(max(v, old - clip), old + clip) - goal) ** 2
        losses.append(max(plain, cut) / 2)
        clipped += cut > plain
    loss, fraction = clipped_value_loss(**given, clip=clip, normalizer=normalizer)
    divisor = len(losses) if normalizer is None else float(normalizer)
    assert loss.dtype == torch.float64 and loss.shape == fraction.shape == ()
    assert float(loss) == pytest.approx(sum(losses) / divisor, rel=1e-12)
    assert float(fraction) == pytest.approx(clipped / len(losses))
    assert clip == math.inf or clipped > 0


def test_value_loss_gradient() -> None:
    given = values(4, 10)
    others = {name: given[name].requires_grad_() for name in ("old_value", "returns")}

    def of(value: Tensor) -> Tensor:
        return clipped_value_loss(value, **others, mask=given["mask"], clip=0.3)[0]

    leaf = given["value"].requires_grad_()
    assert torch.autograd.gradcheck(of, leaf)
    loss, fraction = clipped_value_loss(**given, clip=0.3)
    loss.backward()
    assert not fraction.requires_grad and all(x.grad is None for x in others.values())
    assert (leaf.grad[~given["mask"]] == 0).all() and (leaf.grad != 0).any()


def test_value_loss_of_parts_adds_up() -> None:
    given = values(4, 10)
    leaf = given["value"].requires_grad_()
    whole, _ = clipped_value_loss(**given)
    count = given["mask"].sum()
    parts = [
        clipped_value_loss(**{name: x[rows] for name, x in given.items()}, normalizer=count)[0]
        for rows in (slice(0, 1), slice(1, 4))
    ]
    torch.testing.assert_close(sum(parts), whole)
    (one,), (many,) = (torch.autograd.grad(loss, leaf) for loss in (whole, sum(parts)))
    torch.testing.assert_close(one, many)


def test_value_loss_edges() -> None:
    given = values(4, 10, dtype=torch.bfloat16)
    clean, _ = clipped_value_loss(**given)
    assert clean.dtype == torch.float32
    dirty = {
        name: x if name == "mask" else x.masked_fill(~given["mask"], math.nan) for name, x in given.items()
    }
    leaf = dirty["value"].requires_grad_()
    loss, _ = clipped_value_loss(**dirty)
    loss.backward()
    assert torch.equal(loss, clean) and leaf.grad.isfinite().all()
    given["mask"] = torch.zeros_like(given["mask"])
    leaf = given["value"].requires_grad_()
    for normalizer in (None, 3.0):
        leaf.grad = None
        loss, fraction = clipped_value_loss(**given, normalizer=normalizer)
        loss.backward()
        assert loss == 0 and fraction == 0 and (leaf.grad == 0).all()


ONES = torch.ones(2, 3)
GOOD = {"value": ONES, "old_value": ONES, "returns": ONES, "mask": ONES > 0}
BAD: list[tuple[type[Exception], dict[str, Any], str]] = [
    (TypeError, {"value": 1.0}, "value: expected a floating point tensor, got float"),
    (TypeError, {"old_value": ONES.int()}, r"old_value: expected .* got torch.int32 \[2, 3\]"),
    (ValueError, {"returns": ONES[0]}, r"returns: expected shape and device of value, .* got \[3\] on cpu"),
    (TypeError, {"mask": ONES}, "mask: expected a bool tensor, got torch.float32"),
    (ValueError, {"mask": torch.ones(2, 3, device="meta") > 0}, r"mask: .* got \[2, 3\] on meta"),
    (ValueError, {"clip": -0.1}, "clip: expected a number >= 0, got -0.1"),
    (ValueError, {"clip": math.nan}, "clip: expected a number >= 0, got nan"),
    (ValueError, {"normalizer": 0}, "normalizer: expected .* got 0"),
    (ValueError, {"normalizer": math.nan}, "normalizer: expected .* got nan"),
    (ValueError, {"normalizer": torch.ones(2)}, "normalizer: expected "),
]


@pytest.mark.parametrize(("error", "change", "message"), BAD)
def test_errors_name_the_argument(error: type[Exception], change: dict[str, Any], message: str) -> None:
    clipped_value_loss(**GOOD)  # what the bad call differs from
    with pytest.raises(error, match=message):
        clipped_value_loss(**(GOOD | change))
