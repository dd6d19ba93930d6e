"""cached_attention: one body of tests for the CPU kernels and the reference, against a plain loop in fp64.

Whatever a call must not read, behind the lengths, in unused slots and around a view, is NaN in every test.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from mem1_core.ops import cached_attention
from mem1_core.testing import assert_accurate, poisoned_memory

DTYPES = [torch.float32, torch.bfloat16, torch.float64]
every_backend = pytest.mark.parametrize("backend", ["cpu", "reference"])
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16", "fp64"])
LENGTHS = (200, 1, 63, 64, 65, 131)
NAN, INF = torch.nan, torch.inf


class Case(NamedTuple):
    """The arguments of a call."""

    q: Tensor
    keys: Tensor
    values: Tensor
    lengths: Tensor
    rows: Tensor
    counts: Tensor

    def run(self, backend: str = "cpu", **options: Any) -> Tensor:
        q, keys, values, lengths, *_ = self
        named = {"rows": self.rows, "counts": self.counts, "backend": backend}
        return cached_attention(q, keys, values, lengths, **named | options)


def int32(*numbers: int) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int32)


def case(
    dtype: torch.dtype,
    queries: int,
    lengths: tuple[int, ...] = LENGTHS,
    *,
    counts: tuple[int, ...] | None = None,
    heads: tuple[int, int] = (4, 2),
    dim: int = 64,
    fill: float = NAN,
) -> Case:
    """Random numbers for ragged rows in permuted slots, one in three unused; counts as large as can be."""
    generator, batch, (hq, hkv) = torch.Generator().manual_seed(0), len(lengths), heads
    slots = batch + 1 + batch // 2
    rows = torch.randperm(slots, generator=generator)[:batch]
    capacity = max(lengths) + 5
    q = torch.randn(batch, queries, hq, dim, generator=generator)
    fresh = torch.randn(2, batch, capacity, hkv, dim, generator=generator)
    fresh.masked_fill_((torch.arange(capacity) >= torch.tensor(lengths)[:, None])[..., None, None], fill)
    cache = torch.full((2, slots, capacity, hkv, dim), fill)
    cache[:, rows] = fresh
    counts = counts or tuple(min(queries, n) for n in lengths)
    return Case(q.to(dtype), *cache.to(dtype), int32(*lengths), rows.int(), int32(*counts))


def looped(it: Case, dtype: torch.dtype, scale: float | None = None) -> Tensor:
    """Query after query, every step in `dtype`."""
    q, keys, values, group = it.q, it.keys, it.values, it.q.shape[2] // it.keys.shape[2]
    scale = q.shape[3] ** -0.5 if scale is None else scale
    queries, out = q.shape[1], torch.zeros(q.shape, dtype=dtype)
    ragged = it.rows.tolist(), it.lengths.tolist(), it.counts.tolist()
    for b, (row, length, count) in enumerate(zip(*ragged, strict=True)):
        k, v = (x[row, :length].to(dtype).repeat_interleave(group, 1) for x in (keys, values))
        for t in range(queries - count, queries):
            seen = length - queries + t + 1
            score = torch.einsum("hd,shd->hs", q[b, t].to(dtype) * scale, k[:seen])
            out[b, t] = torch.einsum("hs,shd->hd", score.softmax(-1), v[:seen])
    return out


def check(it: Case, backend: str, scale: float | None = None) -> Tensor:
    with poisoned_memory():
        got = it.run(backend, scale=scale)
    exact = looped(it, torch.float64, scale)
    eager = exact if it.q.dtype == torch.float64 else looped(it, it.q.dtype, scale)
    assert_accurate(got, eager, exact)
    for b, count in enumerate(it.counts.tolist()):
        assert not got[b, : it.q.shape[1] - count].any(), f"row {b}: padding is not 0"
    return got


# ------------------------------------------------------------------------------------------- the function


@every_backend
@every_dtype
@pytest.mark.parametrize("group", [1, 2, 7, 12])  # more than 8 do not share a pass over the keys
@pytest.mark.parametrize("dim", [1, 20, 32, 64, 80, 128, 256, 300])
def test_heads(backend: str, dtype: torch.dtype, group: int, dim: int) -> None:
    for queries in (1, 3):
        check(case(dtype, queries, (70, 3, 65), heads=(2 * group, 2), dim=dim), backend)


@every_backend
@every_dtype
@pytest.mark.parametrize("queries", [1, 2, 3, 63, 64, 65, 130])
def test_lengths_and_counts(backend: str, dtype: torch.dtype, queries: int) -> None:
    lengths = (*LENGTHS, queries, 0, 197, 130)
    counts = (*(min(queries, n) for n in LENGTHS), queries, 0, queries // 2, min(queries, 64))
    check(case(dtype, queries, lengths, counts=counts, dim=32), backend)


@every_backend
@pytest.mark.parametrize("queries", [1, 2])
def test_count_0_with_entries(backend: str, queries: int) -> None:
    check(case(torch.float32, queries, (70, 5, 9), counts=(1, 0, 1)), backend)


@every_backend
@pytest.mark.parametrize("queries", [1, 5])
def test_defaults(backend: str, queries: int) -> None:
    it = case(torch.float32, queries, (70, 5, 65))
    it = it._replace(keys=it.keys[it.rows], values=it.values[it.rows], rows=torch.arange(3).int())
    assert torch.equal(check(it, backend), it.run(backend, rows=None, counts=None))


@every_backend
@every_dtype
@pytest.mark.parametrize("scale", [0.02, 3.0])
def test_scale(backend: str, dtype: torch.dtype, scale: float) -> None:
    for queries in (1, 5):
        check(case(dtype, queries, (70, 9), dim=16), backend, scale)


@every_backend
@pytest.mark.parametrize("empty", ["batch", "queries", "capacity", "heads"])
def test_nothing_to_do(backend: str, empty: str) -> None:
    shape = [0 if empty == name else 2 for name in ("batch", "queries", "heads")]
    cache = torch.zeros(2, 0 if empty == "capacity" else 9, 2, 16)
    lengths = torch.full(shape[:1], 0 if empty == "capacity" else 9, dtype=torch.int32)
    counts = lengths.clamp(max=shape[1])
    got = cached_attention(torch.ones(*shape, 16), cache, cache, lengths, counts=counts, backend=backend)
    assert got.shape == (*shape, 16) and not got.any()


# ---------------------------------------------------------------------------------------------- the memory


def layouts(it: Case) -> Iterator[tuple[str, Tensor, Tensor]]:
    """The same numbers as a model's caches keep them."""
    slots, capacity, heads, dim = it.keys.shape
    larger = torch.full((slots + 1, capacity + 9, heads + 1, 2, dim), NAN, dtype=it.q.dtype)
    part = larger[1:, 2 : capacity + 2, 1:]
    part[..., 0, :], part[..., 1, :] = it.keys, it.values
    yield "slices of larger caches", part[..., 0, :], part[..., 1, :]
    kv = torch.full((3, 2, *it.keys.shape), NAN, dtype=it.q.dtype)
    kv[1, 0], kv[1, 1] = it.keys, it.values
    yield "a layer of all", kv[1, 0], kv[1, 1]
    first = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (it.keys, it.values)]
    yield "heads first", first[0], first[1]
    yield "keys and values unlike", it.keys, first[1]


@every_backend
@every_dtype
@pytest.mark.parametrize("queries", [1, 5])
def test_strides_of_the_cache_do_not_matter(backend: str, dtype: torch.dtype, queries: int) -> None:
    it = case(dtype, queries, (70, 5, 65), dim=40)
    want = it.run(backend)
    for name, keys, values in layouts(it):
        got = check(it._replace(keys=keys, values=values), backend)
        assert torch.equal(got, want) or name == "keys and values unlike", name  # a path of its own


@every_backend
@pytest.mark.parametrize("queries", [1, 5])
def test_strides_of_the_rest_do_not_matter(backend: str, queries: int) -> None:
    it = case(torch.float32, queries, (70, 5, 65), dim=40)
    fused = torch.cat([it.q, torch.full_like(it.q, NAN)], dim=2)[:, :, :4]
    assert torch.equal(it._replace(q=fused).run(backend), it.run(backend))
    for name in ("lengths", "rows", "counts"):
        spread = torch.stack([getattr(it, name), int32(-1, -1, -1)], dim=1)[:, 0]
        assert torch.equal(it._replace(**{name: spread}).run(backend), it.run(backend)), name


# ------------------------------------------------------------------------------------- numbers out of line


@every_backend
@every_dtype
@pytest.mark.parametrize("fill", [INF, -INF, 1e30], ids=str)  # NaN: everywhere else
def test_nothing_behind_a_length_is_read(backend: str, dtype: torch.dtype, fill: float) -> None:
    for queries in (1, 5):
        want = case(dtype, queries).run(backend)
        assert want.isfinite().all() and torch.equal(case(dtype, queries, fill=fill).run(backend), want)


@every_backend
@every_dtype
@pytest.mark.parametrize("where", ["keys", "values"])
def test_nan_shows_where_it_is_seen_only(backend: str, dtype: torch.dtype, where: str) -> None:
    """Entry 67 of row 0, KV head 1: of its last 5 queries two come before it."""
    for queries in (1, 5):
        it = case(dtype, queries, (70, 68, 9))
        want = it.run(backend)
        getattr(it, where)[it.rows[0], 67, 1] = NAN
        hit = torch.zeros(want.shape, dtype=torch.bool)
        hit[0, -3:, 2:] = True
        assert torch.equal(it.run(backend), want.masked_fill(hit, NAN)) or _told(it.run(backend), want, hit)


def _told(got: Tensor, want: Tensor, hit: Tensor) -> bool:
    assert torch.equal(got.isnan(), hit), f"NaN at {got.isnan().any(-1).nonzero().tolist()}"
    assert torch.equal(got[~hit], want[~hit])
    return True


@every_backend
@every_dtype
@pytest.mark.parametrize("best", [(3, 60), (70, 190), (5, 199)], ids=str)
@pytest.mark.parametrize("score", [1e3, -1e3, 1e30, -1e30], ids=str)
def test_huge_scores(
    backend: str, dtype: torch.dtype, score: float, best: tuple[int, int]
) -> None:
    """Two keys share the largest score, hundreds above the rest, so that out is the mean of two values."""
    it = case(dtype, 1, (200,), heads=(2, 1))
    it.q.fill_(abs(score) ** 0.5)
    row, level = it.keys[it.rows[0]], abs(score) ** 0.5
    row[:200] = 0.0 if score > 0 else -2.0 * level
    row[list(best)] = level if score > 0 else -level
    check(it, backend)


# ------------------------------------------------------------------------------------------ ways of calling


@every_backend
@every_dtype
@pytest.mark.parametrize("queries", [1, 70])
def test_repeats_bit_for_bit_and_changes_nothing(backend: str, dtype: torch.dtype, queries: int) -> None:
    it = case(dtype, queries)
    before = [x.clone() for x in it]
    first = it.run(backend)
    assert all(torch.equal(it.run(backend), first) for _ in range(2))
    for now, then in zip(it, before, strict=True):
        assert torch.equal(now.nan_to_num(7.0), then.nan_to_num(7.0))


@every_dtype
@pytest.mark.parametrize("queries", [1, 70])
def test_several_threads(dtype: torch.dtype, queries: int) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        check(case(dtype, queries), "cpu")
        check(case(dtype, queries, (197,), heads=(24, 2)), "cpu")  # one row: its heads are shared out
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("queries", [1, 5])
def test_opcheck_and_compile(queries: int) -> None:
    it = case(torch.float32, queries, (70, 9), dim=16)
    arguments = it.q, it.keys, it.values, it.rows, it.lengths, it.counts, 0.25
    torch.library.opcheck(torch.ops.mem1_core.cached_attention.default, arguments)
    compiled = torch.compile(cached_attention, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(*it[:4], rows=it.rows, counts=it.counts), it.run())
    want = it.run(lengths := None or "cpu", rows=None, counts=None) if queries == 0 else None
    assert want is None and lengths == "cpu"


def zeros(*shape: int, **options: Any) -> Tensor:
    return torch.zeros(shape, **options)
