"""gae: against Python's numbers and the fp64 reference; the errors of gae and masked_whiten."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from loss_cases import draw, ragged
from torch import Tensor

from mem1_core import _library, reference
from mem1_core.ops import gae, masked_whiten
from mem1_core.testing import assert_accurate

BACKENDS = [
    pytest.param("cpu", "cpu", id="cpu"),
    pytest.param("cuda", "cuda", id="cuda", marks=pytest.mark.gpu),
    pytest.param("reference", "cpu", id="reference"),
]
every_backend = pytest.mark.parametrize(("backend", "device"), BACKENDS)
TILE = 1024  # tokens that a block of the CUDA kernel takes at a time


def problem(rows: int, length: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    return draw(rows, length).to(dtype), draw(rows, length, seed=1).to(dtype), ragged(rows, length)


def by_hand(
    reward: Tensor, value: Tensor, mask: Tensor, gamma: float, lam: float
) -> tuple[list[list[float]], list[list[float]]]:
    """As the paper has it, a sum over the steps that follow: rows without their environment tokens."""
    advantages, returns = [], []
    for r, v, kept in zip(reward.tolist(), value.tolist(), mask.tolist(), strict=True):
        steps = [t for t, keep in enumerate(kept) if keep]
        values = [v[t] for t in steps] + [0.0]
        deltas = [r[t] + gamma * values[n + 1] - values[n] for n, t in enumerate(steps)]
        row_a, row_r = [0.0] * len(r), [0.0] * len(r)
        for n, t in enumerate(steps):
            row_a[t] = sum((gamma * lam) ** k * delta for k, delta in enumerate(deltas[n:]))
            row_r[t] = row_a[t] + v[t]
        advantages.append(row_a)
        returns.append(row_r)
    return advantages, returns


# ----------------------------------------------------------------------------------------------- gae: numbers

SETTINGS = [(1.0, 1.0), (0.99, 0.95), (0.9, 0.0), (0.0, 0.7), (1.0, 0.5), (1, 1), (1.2, -0.5)]


@every_backend
@pytest.mark.parametrize(("gamma", "lam"), SETTINGS)
def test_gae_against_numbers(backend: str, device: str, gamma: float, lam: float) -> None:
    given = problem(9, 17)
    got = gae(*(x.to(device) for x in given), gamma, lam, backend=backend)
    for ours, theirs in zip(got, by_hand(*given, gamma, lam), strict=True):
        torch.testing.assert_close(ours.cpu(), torch.tensor(theirs, dtype=torch.float64))


@every_backend
def test_gae_of_one_row_by_eye(backend: str, device: str) -> None:
    """Two steps on either side of what the environment wrote; a reward there is not seen."""
    reward = torch.tensor([[0.0, 9.0, 1.0, 9.0]], device=device)
    value = torch.tensor([[0.5, 9.0, 0.25, 9.0]], device=device)
    mask = torch.tensor([[True, False, True, False]], device=device)
    advantage, returns = gae(reward, value, mask, gamma=0.5, lam=0.5, backend=backend)
    assert advantage.tolist() == [[0.5 * 0.25 - 0.5 + 0.25 * 0.75, 0, 0.75, 0]]
    assert returns.tolist() == [[0.5 * 0.25 + 0.25 * 0.75, 0, 1.0, 0]]


SHAPES = [(0, 5), (3, 0), (0, 0), (1, 1), (7, 1), (1, 6), (6, 40), (7, TILE - 1), (7, TILE), (7, TILE + 1)]


@every_backend
@pytest.mark.parametrize(("rows", "length"), [*SHAPES, (7, 5000)])
def test_gae_in_fp32_against_fp64(backend: str, device: str, rows: int, length: int) -> None:
    given = problem(rows, length, torch.float32)
    exact = reference.gae(*(x.double() for x in given[:2]), given[2], 0.99, 0.95)
    eager = reference.gae(*given, 0.99, 0.95)
    got = gae(*(x.to(device) for x in given), 0.99, 0.95, backend=backend)
    for name, *triple in zip(("advantage", "returns"), got, eager, exact, strict=True):
        ours, plain, wanted = triple
        assert ours.dtype == torch.float32 and ours.shape == (rows, length) and ours.device.type == device
        assert_accurate(ours.cpu(), plain, wanted, name=name)
        assert (ours.cpu()[~given[2]] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("rows", "length"), [*SHAPES, (33, 700)])
def test_gae_on_the_cpu_is_the_reference_to_the_bit(dtype: torch.dtype, rows: int, length: int) -> None:
    given = problem(rows, length, dtype)
    for gamma, lam in SETTINGS:
        for ours, theirs in zip(gae(*given, gamma, lam), reference.gae(*given, gamma, lam), strict=True):
            assert torch.equal(ours, theirs)


@every_backend
@pytest.mark.parametrize("length", [5, TILE, 2 * TILE + 1])
def test_gae_over_a_whole_hole(backend: str, device: str, length: int) -> None:
    """Steps at both ends and nothing between: the value of the last one crosses any number of tiles."""
    mask = torch.zeros(2, length, dtype=torch.bool)
    mask[:, 0] = mask[0, -1] = True
    reward, value = draw(2, length), draw(2, length, seed=1)
    advantage, _ = gae(reward.to(device), value.to(device), mask.to(device), 0.9, 0.8, backend=backend)
    last = float(reward[0, -1] - value[0, -1])
    first = float(reward[0, 0] + 0.9 * value[0, -1] - value[0, 0]) + 0.9 * 0.8 * last
    assert advantage[0, [0, -1]].tolist() == pytest.approx([first, last])
    assert float(advantage[1, 0]) == pytest.approx(float(reward[1, 0] - value[1, 0]))


@every_backend
@pytest.mark.parametrize("rubbish", [math.nan, math.inf, -math.inf])
def test_gae_does_not_read_outside_of_the_mask(backend: str, device: str, rubbish: float) -> None:
    reward, value, mask = (x.to(device) for x in problem(7, 50, torch.float32))
    clean = gae(reward, value, mask, 0.99, 0.95, backend=backend)
    dirty = gae(*(x.masked_fill(~mask, rubbish) for x in (reward, value)), mask, 0.99, 0.95, backend=backend)
    for ours, theirs in zip(dirty, clean, strict=True):
        assert torch.equal(ours, theirs)


@every_backend
def test_a_nan_of_a_step_stays_before_it_in_its_row(backend: str, device: str) -> None:
    reward, value, mask = problem(3, 2 * TILE)
    mask[:] = True
    clean = gae(reward.to(device), value.to(device), mask.to(device), backend=backend)
    reward[1, 1500] = math.nan
    dirty = gae(reward.to(device), value.to(device), mask.to(device), backend=backend)
    for ours, theirs in zip(dirty, clean, strict=True):
        assert ours[1, :1501].isnan().all() and torch.equal(ours[1, 1501:], theirs[1, 1501:])
        assert torch.equal(ours[[0, 2]], theirs[[0, 2]])


DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@every_backend
@pytest.mark.parametrize("value_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reward_dtype", DTYPES, ids=str)
def test_gae_dtypes(backend: str, device: str, reward_dtype: torch.dtype, value_dtype: torch.dtype) -> None:
    reward, value, mask = problem(7, 30)
    reward, value = reward.to(reward_dtype), value.to(value_dtype)
    wide = torch.float64 if torch.float64 in (reward_dtype, value_dtype) else torch.float32
    expected = reference.gae(reward.to(wide), value.to(wide), mask, 0.9, 0.8)
    got = gae(reward.to(device), value.to(device), mask.to(device), 0.9, 0.8, backend=backend)
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours.cpu(), theirs)  # of one dtype as well


@every_backend
def test_gae_strided(backend: str, device: str) -> None:
    reward, value, mask = (x.to(device) for x in problem(7, 30, torch.float32))
    wanted = gae(reward, value, mask, 0.9, 0.8, backend=backend)
    layouts: list[Callable[[Tensor], Tensor]] = [
        lambda x: x.T.contiguous().T,
        lambda x: torch.stack([x, ~x if x.dtype == torch.bool else -x], dim=-1)[..., 0],
        lambda x: torch.cat([x, x], dim=1)[:, : x.shape[1]],
    ]
    for layout in layouts:
        strided = [layout(x) for x in (reward, value, mask)]
        assert not any(x.is_contiguous() for x in strided)
        for ours, theirs in zip(gae(*strided, 0.9, 0.8, backend=backend), wanted, strict=True):
            assert torch.equal(ours, theirs)
    same = mask[:1].expand(7, -1)
    for ours, theirs in zip(
        gae(reward, value, same, backend=backend),
        gae(reward, value, same.clone(), backend=backend),
        strict=True,
    ):
        assert torch.equal(ours, theirs)


@every_backend
def test_a_row_does_not_depend_on_its_batch(backend: str, device: str) -> None:
    given = [x.to(device) for x in problem(40, 300, torch.float32)]
    whole = gae(*given, 0.99, 0.95, backend=backend)
    for row in (0, 17, 39):
        alone = gae(*(x[row : row + 1] for x in given), 0.99, 0.95, backend=backend)
        assert all(torch.equal(a[0], b[row]) for a, b in zip(alone, whole, strict=True))


def test_gae_threads() -> None:
    given = problem(257, 300, torch.float32)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(gae(*given, 0.99, 0.95))
    finally:
        torch.set_num_threads(before)
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)


# ------------------------------------------------------------------------------------- gae: autograd, compile


@every_backend
def test_no_gradient_flows_through_gae(backend: str, device: str) -> None:
    reward, value, mask = (x.to(device) for x in problem(3, 8))
    before = reward.clone(), value.clone(), mask.clone()
    for x in gae(reward.requires_grad_(), value.requires_grad_(), mask, backend=backend):
        assert not x.requires_grad
    assert all(torch.equal(x, y) for x, y in zip(before, (reward, value, mask), strict=True))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize(("rows", "length"), [(3, 10), (0, 4), (2, 0)])
def test_opcheck_gae(device: str, rows: int, length: int) -> None:
    for dtype in (torch.float32, torch.float64):
        given = [x.to(device) for x in problem(rows, length, dtype)]
        torch.library.opcheck(_library.ops.gae.default, (*given, 0.9, 0.8))
        torch.library.opcheck(_library.ops.gae.default, (given[0].T, given[1].T, given[2].T, 0.9, 0.8))


@pytest.mark.parametrize(("backend", "device"), BACKENDS[:2])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_gae(backend: str, device: str, dynamic: bool) -> None:
    torch.compiler.reset()

    def step(reward: Tensor, value: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        advantage, returns = gae(reward * 2, value.T.contiguous().T, mask, 0.9, 0.8, backend=backend)
        return advantage.square() + 1, returns

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for rows, length in ((7, 5), (3, 4)):
        given = [x.to(device) for x in problem(rows, length, torch.float32)]
        for ours, theirs in zip(compiled(*given), step(*given), strict=True):
            assert torch.equal(ours, theirs)


# ----------------------------------------------------------------------- gae: rewards on environment text


@every_backend
def test_a_reward_on_environment_text_is_not_counted(backend: str, device: str) -> None:
    """And what the docstring tells a loop to do with it: to the policy's last token before it, undecayed."""
    mask = torch.tensor([[True, True, False, False, True, False]], device=device)
    value = torch.tensor([[0.5, 0.25, 9.0, 9.0, -0.5, 9.0]], device=device)
    reward = torch.tensor([[0.0, 0.1, 0.0, 1.0, 0.2, 2.0]], device=device)
    nothing = gae(reward.where(mask, 0.0), value, mask, 0.9, 0.8, backend=backend)
    for got, want in zip(gae(reward, value, mask, 0.9, 0.8, backend=backend), nothing, strict=True):
        assert torch.equal(got, want)
    credited = torch.tensor([[0.0, 1.1, 0.0, 0.0, 2.2, 0.0]], device=device)
    advantage, _ = gae(credited, value, mask, 0.9, 0.8, backend=backend)
    # As if the environment had said nothing: three steps, one after another.
    alone, _ = gae(credited[mask][None], value[mask][None], mask[mask][None], 0.9, 0.8, backend=backend)
    assert torch.equal(advantage[mask], alone[0])
    last = 2.2 + 0.5
    assert advantage[0, 4].item() == pytest.approx(last)
    assert advantage[0, 1].item() == pytest.approx(1.1 + 0.9 * -0.5 - 0.25 + 0.9 * 0.8 * last)
    assert "undecayed" in (gae.__doc__ or "")


# ----------------------------------------------------------------------------------------------------- errors

GAE = {"reward": torch.ones(2, 3), "value": torch.ones(2, 3), "mask": torch.ones(2, 3, dtype=torch.bool)}
WHITEN = {"values": torch.ones(2, 3), "mask": torch.ones(2, 3, dtype=torch.bool)}
BAD: list[tuple[Callable[..., Any], dict[str, Any], type[Exception], dict[str, Any], str]] = [
    *(
        (gae, GAE, *bad)
        for bad in (
            (TypeError, {"reward": [[1.0]]}, r"reward: expected a floating point tensor \[B, T\], got list"),
            (TypeError, {"reward": torch.ones(2, 3).long()}, r"reward: .* got torch.int64 \[2, 3\]"),
            (TypeError, {"reward": torch.ones(3)}, r"reward: .* got torch.float32 \[3\]"),
            (TypeError, {"value": None}, "value: expected a floating point tensor .* got NoneType"),
            (TypeError, {"value": torch.ones(2, 3, 1)}, r"value: .* got torch.float32 \[2, 3, 1\]"),
            (
                ValueError,
                {"value": torch.ones(2, 4)},
                r"value: expected \[2, 3\] on cpu, got \[2, 4\] on cpu",
            ),
            (ValueError, {"value": torch.ones(2, 3, device="meta")}, r"value: .* got \[2, 3\] on meta"),
            (TypeError, {"mask": torch.ones(2, 3)}, r"mask: expected a bool tensor .* got torch.float32"),
            (TypeError, {"mask": None}, "mask: expected a bool tensor .* got NoneType"),
            (
                ValueError,
                {"mask": torch.ones(3, 2) > 0},
                r"mask: expected \[2, 3\] on cpu, got \[3, 2\] on cpu",
            ),
            (ValueError, {"gamma": math.nan}, "gamma: expected a finite number, got nan"),
            (ValueError, {"gamma": "1"}, "gamma: expected a finite number, got '1'"),
            (ValueError, {"lam": math.inf}, "lam: expected a finite number, got inf"),
            (ValueError, {"lam": None}, "lam: expected a finite number, got None"),
            (ValueError, {"backend": "gpu"}, "backend: expected .* got 'gpu'"),
            (
                NotImplementedError,
                {"backend": "triton"},
                "gae: the 'triton' backend is not available in this build",
            ),
        )
    ),
    *(
        (masked_whiten, WHITEN, *bad)
        for bad in (
            (TypeError, {"values": 1.0}, "values: expected a floating point tensor, got float"),
            (TypeError, {"values": torch.ones(2, 3).int()}, r"values: .* got torch.int32 \[2, 3\]"),
            (TypeError, {"mask": torch.ones(2, 3).int()}, "mask: expected a bool tensor .* got torch.int32"),
            (ValueError, {"mask": torch.ones(2) > 0}, r"mask: expected \[2, 3\] on cpu, got \[2\] on cpu"),
            (ValueError, {"eps": -1e-3}, "eps: expected a number > 0, got -0.001"),
            (ValueError, {"eps": math.nan}, "eps: expected a number > 0, got nan"),
        )
    ),
]


@pytest.mark.parametrize(("op", "good", "error", "change", "message"), BAD)
def test_errors_name_the_argument(
    op: Callable[..., Any], good: dict[str, Any], error: type[Exception], change: dict[str, Any], message: str
) -> None:
    op(**good)  # what the bad call differs from
    with pytest.raises(error, match=message):
        op(**(good | change))
