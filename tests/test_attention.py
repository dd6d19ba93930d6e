"""trajectory_attention: one body of tests for every backend and device of the machine."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from mem1_core import reference
from mem1_core.layout import TrajectoryLayout
from mem1_core.mask import TrajectoryMask
from mem1_core.ops import trajectory_attention
from mem1_core.sample_inputs import (
    EVICT_TABLES,
    LAYOUTS,
    adversarial_evict,
    attention_inputs,
    mem1_segments,
    random_evict,
)
from mem1_core.testing import assert_accurate, attention_backends, eager_attention, gradients, poisoned_memory

BACKENDS = [
    pytest.param(*pair, id="-".join(pair), marks=[pytest.mark.gpu] if pair[1] == "cuda" else [])
    for pair in attention_backends()
]
every_backend = pytest.mark.parametrize(("backend", "device"), BACKENDS)
both_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
# The interpreter widens bfloat16 before it computes: there it is tested where both dtypes are asked for.
CASES = [
    pytest.param(*backend.values, dtype, id=f"{backend.id}-{name}", marks=backend.marks)
    for backend in BACKENDS
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16))
    if not (backend.id == "triton-cpu" and name == "bf16")
]
every_case = pytest.mark.parametrize(("backend", "device", "dtype"), CASES)
NAMES = ("out", "lse", "dq", "dk", "dv")


def mask_of(evict: Tensor) -> TrajectoryMask:
    return TrajectoryMask.from_evict(evict)


def results(function: Any, q: Tensor, k: Tensor, v: Tensor, *args: Any, **options: Any) -> list[Tensor]:
    """out, lse, dq, dk and dv, for a random gradient of both out and lse."""
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    out, lse = function(q, k, v, *args, return_lse=True, **options)
    return [out, lse, *gradients([out, lse], [q, k, v])]


def eager(
    q: Tensor, k: Tensor, v: Tensor, mask: TrajectoryMask, scale: float | None, return_lse: bool
) -> tuple[Tensor, Tensor]:
    """Every step in the dtype of the inputs: the error that the dtype excuses."""
    visible = mask.dense()
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    keys = k.repeat_interleave(q.shape[2] // k.shape[2], dim=2)
    scores = torch.einsum("bihd,bjhd->bhij", q * scale, keys).masked_fill(~visible[:, None], -torch.inf)
    lse = scores.logsumexp(-1).to(torch.promote_types(q.dtype, torch.float32))
    return eager_attention(q, k, v, visible, scale), lse


def check(
    inputs: tuple[Tensor, Tensor, Tensor],
    evict: Tensor,
    backend: str,
    scale: float | None = None,
    factor: float = 2.0,
) -> list[Tensor]:
    """Forward, LSE and all gradients against the fp64 reference; returns what was checked."""
    mask = mask_of(evict.to(inputs[0].device))
    got = results(trajectory_attention, *inputs, mask, scale=scale, backend=backend)
    plain = results(eager, *inputs, mask, scale=scale)
    wide = [x.double() for x in inputs]
    exact = results(reference.trajectory_attention, *wide, mask, scale=scale)
    for name, ours, theirs, want in zip(NAMES, got, plain, exact, strict=True):
        assert_accurate(ours, theirs, want, factor, name=name)
    return got


def equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


# ------------------------------------------------------------------------------------------- the function


@every_case
@pytest.mark.parametrize("table", EVICT_TABLES)
def test_evict_tables(backend: str, device: str, dtype: torch.dtype, table: str) -> None:
    evict = torch.stack([EVICT_TABLES[table](200, seed) for seed in range(2)])
    check(attention_inputs(2, 200, 4, 2, 64, dtype=dtype, device=device), evict, backend)


@every_backend
@both_dtypes
@pytest.mark.parametrize("prune", ["action", "state", "never"])
def test_mem1_trajectory(backend: str, device: str, dtype: torch.dtype, prune: Any) -> None:
    segments = mem1_segments(6, prompt=97, internal_state=21, query=9, info=95)
    evict = TrajectoryLayout.from_segments(segments, prune=prune).mask.evict_at
    check(attention_inputs(1, evict.shape[1], 2, 1, 32, dtype=dtype, device=device), evict, backend)


@every_backend
@both_dtypes
@pytest.mark.parametrize("n", [0, 1, 2, 63, 64, 65, 127, 131, 200, 509])
def test_lengths(backend: str, device: str, dtype: torch.dtype, n: int) -> None:
    check(attention_inputs(1, n, 2, 1, 32, dtype=dtype, device=device), adversarial_evict(n), backend)


@every_case
@pytest.mark.parametrize("heads", [(2, 2), (3, 1), (4, 2)], ids=["MHA", "MQA", "GQA"])
@pytest.mark.parametrize("dim", [16, 40, 64, 96, 128, 256])
def test_heads(backend: str, device: str, dtype: torch.dtype, heads: tuple[int, int], dim: int) -> None:
    check(attention_inputs(1, 131, *heads, dim, dtype=dtype, device=device), random_evict(131), backend)


@every_backend
@pytest.mark.parametrize("batch", [0, 1, 3])
@pytest.mark.parametrize("shared", [False, True], ids=["own masks", "one mask"])
def test_batch(backend: str, device: str, batch: int, shared: bool) -> None:
    rows = 1 if shared else batch
    evict = torch.empty(rows, 70, dtype=torch.int32)
    for row in range(rows):
        evict[row] = adversarial_evict(70, row)
    check(attention_inputs(batch, 70, 4, 2, 16, device=device), evict, backend)


@every_case
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides_do_not_matter(backend: str, device: str, dtype: torch.dtype, layout: str) -> None:
    inputs = attention_inputs(2, 131, 4, 2, 40, dtype=dtype, device=device, layout=layout)
    got = check(inputs, random_evict(131).expand(2, -1), backend)
    mask = mask_of(random_evict(131).expand(2, -1).to(device))
    packed = [x.contiguous() for x in inputs]
    assert equal(got, results(trajectory_attention, *packed, mask, backend=backend))


@every_backend
def test_broadcast_inputs_and_gradients(backend: str, device: str) -> None:
    """Strides of 0: keys shared by the batch, and the gradient that `out.sum()` sends back."""
    q, k, v = attention_inputs(3, 70, 4, 2, 16, device=device)
    k, v = (x[:1].clone().requires_grad_() for x in (k, v))
    mask = mask_of(random_evict(70).to(device))
    wide = q, k.expand(3, -1, -1, -1), v.expand(3, -1, -1, -1)
    got = trajectory_attention(*wide, mask, backend=backend)
    want = eager_attention(*wide, mask.dense())
    torch.testing.assert_close(got, want)
    for ours, theirs in zip(
        torch.autograd.grad(got.sum(), (k, v)), torch.autograd.grad(want.sum(), (k, v)), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@every_backend
@pytest.mark.parametrize("scale", [0.0, 0.3, -1.0, 10.0])
def test_scale(backend: str, device: str, scale: float) -> None:
    """10 makes scores of several hundred: exp overflows unless the row's maximum is taken out first."""
    # There the rounding of the scores is all of the error, and where it is largest is chance. Triton makes
    # weights of scores in log2 and a rounded log-sum-exp: three roundings, where eager code has one.
    factor = 2 if scale <= 1 else 8 if backend == "triton" else 4
    check(attention_inputs(1, 131, 2, 1, 32, device=device), random_evict(131), backend, scale, factor)


@every_case
def test_lse_changes_nothing_else(backend: str, device: str, dtype: torch.dtype) -> None:
    mask = mask_of(random_evict(131).to(device))
    q, k, v = attention_inputs(1, 131, 4, 2, 32, dtype=dtype, device=device, requires_grad=True)
    alone = trajectory_attention(q, k, v, mask, backend=backend)
    out, lse = trajectory_attention(q, k, v, mask, return_lse=True, backend=backend)
    assert torch.equal(out, alone)
    assert lse.shape == (1, 4, 131) and lse.dtype == torch.float32
    assert equal(list(gradients(alone, [q, k, v])), list(gradients(out, [q, k, v])))


@every_backend
@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (1, 2)], ids=str)
def test_gradients_of_some_inputs(backend: str, device: str, wanted: tuple[int, ...]) -> None:
    mask = mask_of(random_evict(70).to(device))
    inputs = attention_inputs(1, 70, 4, 2, 16, device=device)
    q, k, v = every = [x.clone().requires_grad_() for x in inputs]
    want = gradients(trajectory_attention(q, k, v, mask, backend=backend), every)
    for n in wanted:
        inputs[n].requires_grad_()
    got = gradients(trajectory_attention(*inputs, mask, backend=backend), [inputs[n] for n in wanted])
    assert equal(list(got), [want[n] for n in wanted])


@every_backend
@pytest.mark.parametrize("shape", [(0, 3), (1, 0), (0, 0)], ids=str)
def test_expanded_gradient_of_nothing(backend: str, device: str, shape: tuple[int, int]) -> None:
    mask = TrajectoryMask(torch.empty(*shape, dtype=torch.int32, device=device).fill_(3))
    q, k, v = attention_inputs(*shape, 2, 1, 16, device=device, requires_grad=True)
    trajectory_attention(q, k, v, mask, backend=backend).sum().backward()
    assert q.grad is not None and q.grad.shape == q.shape


def test_no_graph_without_gradients() -> None:
    mask = mask_of(random_evict(70))
    q, k, v = attention_inputs(1, 70, 4, 2, 16, requires_grad=True)
    with torch.no_grad():
        assert not trajectory_attention(q, k, v, mask).requires_grad
    with torch.inference_mode():
        assert not trajectory_attention(q, k, v, mask).requires_grad


@pytest.mark.parametrize(("n", "fast"), [(5, False), (70, True)], ids=["every entry", "across tiles"])
def test_gradcheck(n: int, fast: bool) -> None:
    mask = mask_of(random_evict(n, seed=4))
    inputs = attention_inputs(2, n, 4, 2, 16, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda q, k, v: trajectory_attention(q, k, v, mask, scale=0.4, return_lse=True),
        inputs,
        fast_mode=fast,
    )


# ------------------------------------------------------------------------------------- what must not leak


@cache
def without_bad_keys(backend: str, device: str, dtype: torch.dtype, table: str) -> tuple[Any, ...]:
    """A mask, the rows that will be bad, inputs without them, and what these give."""
    if table == "adversarial":
        evict = adversarial_evict(260)[None]
        bad = torch.tensor([3, 64, 70, 127, 130, 200])
    else:
        segments = mem1_segments(5, prompt=40, internal_state=9, query=5, info=36)
        evict = TrajectoryLayout.from_segments(segments).mask.evict_at
        bad = torch.tensor([45, 80, 150, 199])  # of turns 1, 1, 3 and 4
    mask = mask_of(evict.to(device))
    n = evict.shape[1]
    clean = attention_inputs(1, n, 2, 1, 32, dtype=dtype, device=device)
    return mask, bad, clean, results(trajectory_attention, *clean, mask, backend=backend)


@every_case
@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize("where", ["k", "v", "kv"])
@pytest.mark.parametrize("table", ["MEM1 turns", "adversarial"])
def test_bad_keys_stay_with_those_who_see_them(
    backend: str, device: str, dtype: torch.dtype, poison: float, where: str, table: str
) -> None:
    """A query that does not see a non-finite row is as if the row were finite, bit for bit, whether the row
    was evicted or comes later; so are gradients that no query which sees it has part in."""
    mask, bad, clean, want = without_bad_keys(backend, device, dtype, table)
    dirty = tuple(x.clone() for x in clean)
    for name, x in zip("kv", dirty[1:], strict=True):
        if name in where:
            x[:, bad] = poison
    got = results(trajectory_attention, *dirty, mask, backend=backend)

    visible = mask.dense()[0]
    n = len(visible)
    pure_query = ~visible[:, bad].any(1)
    pure_key = ~visible[~pure_query].any(0)  # seen by pure queries alone
    assert pure_query.sum() > n // 8 and pure_key.sum() > 0
    for name, ours, expected in zip(NAMES, got, want, strict=True):
        along = {"lse": 2}.get(name, 1)
        rows = (pure_key if name in ("dk", "dv") else pure_query).nonzero()[:, 0]
        pair = ours.index_select(along, rows), expected.index_select(along, rows)
        assert torch.equal(*pair), f"{name} is not what it is without the bad rows"
    exposed = got[0][:, ~pure_query]
    assert not exposed.isfinite().any(), "a query that sees a bad row must show it"


@every_case
def test_uninitialised_memory_is_never_read(backend: str, device: str, dtype: torch.dtype) -> None:
    mask = mask_of(adversarial_evict(200).to(device))
    inputs = attention_inputs(2, 200, 4, 2, 40, dtype=dtype, device=device)
    before = [x.clone() for x in inputs]
    want = results(trajectory_attention, *inputs, mask, backend=backend)
    with poisoned_memory():
        assert torch.empty(3).isnan().all()  # the poison works
        got = results(trajectory_attention, *inputs, mask, backend=backend)
    assert equal(got, want)
    assert equal(list(inputs), before)


@every_case
@pytest.mark.parametrize("deterministic", [False, True])
def test_bitwise_repeatable(backend: str, device: str, dtype: torch.dtype, deterministic: bool) -> None:
    mask = mask_of(random_evict(300).to(device))
    inputs = attention_inputs(1, 300, 4, 2, 32, dtype=dtype, device=device)
    options: dict[str, Any] = {"deterministic": deterministic, "backend": backend}
    first = results(trajectory_attention, *inputs, mask, **options)
    for _ in range(2):
        assert equal(results(trajectory_attention, *inputs, mask, **options), first)
