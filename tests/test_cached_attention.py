"""cached_attention: one body of tests for the CPU kernels and the reference, against a plain loop in fp64.

Whatever a call must not read, behind the lengths, in unused slots and around a view, is NaN in every test.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from mem1_core.ops import cached_attention
from mem1_core.testing import assert_accurate, poisoned_memory

every_backend = pytest.mark.parametrize("backend", ["cpu", "reference"])
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}
every_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
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
        return cached_attention(**self._asdict() | {"backend": backend} | options)


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
    slots, capacity = batch + 1 + batch // 2, max(lengths) + 5
    rows = torch.randperm(slots, generator=generator)[:batch]
    q = torch.randn(batch, queries, hq, dim, generator=generator)
    fresh = torch.randn(2, batch, capacity, hkv, dim, generator=generator)
    fresh.masked_fill_((torch.arange(capacity) >= torch.tensor(lengths)[:, None])[..., None, None], fill)
    keys, values = torch.full((2, slots, capacity, hkv, dim), fill).index_copy_(1, rows, fresh).to(dtype)
    counts = counts or tuple(min(queries, n) for n in lengths)
    return Case(q.to(dtype), keys, values, int32(*lengths), rows.int(), int32(*counts))


def looped(it: Case, dtype: torch.dtype, scale: float | None) -> Tensor:
    """Query after query, every step in `dtype`."""
    q, group, queries = it.q.to(dtype), it.q.shape[2] // it.keys.shape[2], it.q.shape[1]
    scale, out = q.shape[3] ** -0.5 if scale is None else scale, torch.zeros_like(q)
    for b, (row, length, count) in enumerate(torch.stack(it[4:5] + it[3:4] + it[5:], 1).tolist()):
        of_row = (x[row, :length].to(dtype).transpose(0, 1) for x in (it.keys, it.values))
        k, v = (x.repeat_interleave(group, 0) for x in of_row)  # [Hq, length, D]
        for t in range(queries - count, queries):
            seen = length - queries + t + 1
            score = k[:, :seen] @ (q[b, t] * scale)[..., None]
            out[b, t] = (score.mT.softmax(-1) @ v[:, :seen])[:, 0]
    return out


def check(it: Case, backend: str, scale: float | None = None) -> Tensor:
    with poisoned_memory():
        got = it.run(backend, scale=scale)
    assert_accurate(got, looped(it, it.q.dtype, scale), looped(it, torch.float64, scale))
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
    counts = (*(min(queries, n) for n in LENGTHS), queries, 0, (queries + 1) // 2, min(queries, 64))
    check(case(dtype, queries, lengths, counts=counts, dim=32), backend)


@every_backend
@pytest.mark.parametrize("queries", [1, 2])
def test_count_0_of_a_row_with_entries(backend: str, queries: int) -> None:
    check(case(torch.float32, queries, (70, 5, 9), counts=(1, 0, 1)), backend)


@every_backend
@every_dtype
@pytest.mark.parametrize("scale", [0.02, 3.0])
def test_scale(backend: str, dtype: torch.dtype, scale: float) -> None:
    for queries in (1, 5):
        check(case(dtype, queries, (70, 9), dim=16), backend, scale)


@every_backend
@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (2, 3, 0)], ids=["rows", "queries", "heads"])
def test_nothing_to_do(backend: str, shape: tuple[int, ...]) -> None:
    cache, lengths = torch.zeros(2, 9, 2, 16), torch.full(shape[:1], 9).int()
    got = cached_attention(torch.ones(*shape, 16), cache, cache, lengths, backend=backend)
    assert got.shape == (*shape, 16)


# ---------------------------------------------------------------------------------------------- the memory


def layouts(it: Case) -> Iterator[tuple[str, Tensor, Tensor]]:
    """The same numbers as a model's caches keep them."""
    slots, capacity, heads, dim = it.keys.shape
    larger = it.keys.new_full((slots + 1, capacity + 9, heads + 1, 2, dim), NAN)
    keys, values = larger[1:, 2 : capacity + 2, 1:].unbind(3)
    yield "slices of a larger cache", keys.copy_(it.keys), values.copy_(it.values)
    kv = it.keys.new_full((3, 2, *it.keys.shape), NAN)
    yield "one layer of all", kv[1, 0].copy_(it.keys), kv[1, 1].copy_(it.values)
    keys, values = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (it.keys, it.values))
    yield "heads first", keys, values
    yield "keys and values unlike", it.keys, values


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
@pytest.mark.parametrize("name", ["q", "lengths", "rows", "counts"])
def test_strides_of_the_rest_do_not_matter(backend: str, name: str) -> None:
    for queries in (1, 5):
        it = case(torch.float32, queries, (70, 5, 65), dim=40)
        x = getattr(it, name)
        spread = torch.stack([x, torch.full_like(x, -1)], dim=1)[:, 0]
        assert torch.equal(it._replace(**{name: spread}).run(backend), it.run(backend))


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
        got, hit = it.run(backend), torch.zeros(want.shape, dtype=torch.bool)
        hit[0, -3:, 2:] = True
        assert torch.equal(got.isnan(), hit), f"{queries} queries, NaN at {got.isnan().any(-1).nonzero()}"
        assert torch.equal(got[~hit], want[~hit])


@every_backend
@every_dtype
@pytest.mark.parametrize("best", [(3, 60), (70, 190), (5, 199)], ids=str)
@pytest.mark.parametrize("bits", [10, -10, 100, -100])
def test_huge_scores(backend: str, dtype: torch.dtype, bits: int, best: tuple[int, int]) -> None:
    """Scores of 8 * 2^10 or 8 * 2^100, or below 0 all; two keys share the largest, far above the rest, so
    that a query which sees both has the mean of two values."""
    level = 2.0 ** (abs(bits) / 2)
    for queries in (1, 5):
        it = case(dtype, queries, (200,), heads=(2, 1))
        it.q.fill_(level)
        it.keys[it.rows[0], :200] = 0.0 if bits > 0 else -2 * level
        it.keys[it.rows[0], best] = level if bits > 0 else -level
        check(it, backend)


# ------------------------------------------------------------------------------------------ ways of calling


@every_backend
@every_dtype
@pytest.mark.parametrize("queries", [1, 70])
def test_repeats_bit_for_bit_and_changes_nothing(backend: str, dtype: torch.dtype, queries: int) -> None:
    it = case(dtype, queries)
    before, first = [x.clone() for x in it], it.run(backend)
    assert all(torch.equal(it.run(backend), first) for _ in range(2))
    for now, then in zip(it, before, strict=True):
        torch.testing.assert_close(now, then, rtol=0, atol=0, equal_nan=True)


@every_dtype
@pytest.mark.parametrize("lengths", [LENGTHS, (197,)], ids=["many rows", "one row"])
def test_threads_do_not_matter(dtype: torch.dtype, lengths: tuple[int, ...]) -> None:
    cases = [case(dtype, queries, lengths, heads=(24, 2)) for queries in (1, 70)]
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        want = [it.run() for it in cases]
        torch.set_num_threads(2)
        assert all(torch.equal(it.run(), one) for it, one in zip(cases, want, strict=True))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("queries", [1, 5])
def test_opcheck_compile_and_defaults(queries: int) -> None:
    it = case(torch.float32, queries, (70, 9), dim=16, fill=0)
    arguments = it.q, it.keys, it.values, it.rows, it.lengths, it.counts, 0.25
    torch.library.opcheck(torch.ops.mem1_core.cached_attention.default, arguments)
    compiled = torch.compile(cached_attention, backend="aot_eager", fullgraph=True)
    for more in ({"rows": it.rows, "counts": it.counts}, {}):
        want = (it if more else it._replace(rows=int32(0, 1))).run()
        assert torch.equal(cached_attention(*it[:4], **more), want)
        assert torch.equal(compiled(*it[:4], **more), want)


# --------------------------------------------------------------------------------------------- bad inputs


def of(*shape: int, dtype: torch.dtype = torch.float32, grad: bool = False) -> Tensor:
    return torch.zeros(shape, dtype=dtype, requires_grad=grad)


Q, KEYS, CACHE = of(2, 3, 4, 16), of(5, 9, 2, 16), ("keys", "values")
GOOD = {
    "q": Q,
    "keys": KEYS,
    "values": KEYS,
    "lengths": int32(9, 4),
    "rows": int32(1, 0),
    "counts": int32(3, 3),
}
BAD: dict[str, list[Any]] = {  # arguments; a dict changes others too
    "q": [[1.0], of(2, 4, 16), Q.int(), of(2, 3, 4, 32)[..., ::2], of(2, 3, 3, 16), of(2, 3, 4, 16, grad=True)]
    + [of(2, 3, 4, 0), {"q": Q.half(), "keys": KEYS.half(), "values": KEYS.half()}]
    + [dict.fromkeys(CACHE, of(5, 9, heads, 16)) for heads in (0, 3)],
    "keys": [None, of(9, 2, 16), KEYS.bfloat16(), KEYS.to("meta"), of(5, 9, 2, 8), of(5, 9, 2, 32)[..., ::2]]
    + [of(5, 9, 2, 16, grad=True), dict.fromkeys(CACHE, of(5, 9, 2, 8))],
    "values": [of(9, 2, 16), KEYS.double(), of(4, 9, 2, 16), of(5, 8, 2, 16), of(5, 9, 1, 16), of(5, 9, 2, 8)]
    + [of(5, 9, 16, 2).mT, of(5, 9, 2, 16, grad=True)],
    "lengths": [[9, 4], torch.tensor([9, 4]), int32(9, 4, 4), int32(9, 4).to("meta"), int32(9, 10)]
    + [{"lengths": int32(9, -1), "counts": int32(3, 0)}],
    "rows": [torch.tensor([1, 0]), int32(1), int32(1, 5), int32(1, -1), int32(1, 0).to("meta")]
    + [dict.fromkeys(CACHE, of(1, 9, 2, 16)) | {"rows": None}],
    "counts": [torch.tensor([True, True]), int32(3), int32(3, 3)[:, None], int32(4, 3), int32(3, -1)]
    + [{"lengths": int32(9, 2)}, {"lengths": int32(9, 2), "counts": None}],
    "scale": [0.0, -1.0, NAN, INF],
    "backend": ["fast", "cuda"],
}  # fmt: skip


@pytest.mark.parametrize(("name", "wrong"), [(name, wrong) for name in BAD for wrong in BAD[name]])
def test_bad_input(name: str, wrong: Any) -> None:
    assert not cached_attention(**GOOD).any()
    before = (
        "(q, keys, |q, |cached_attention: the 'cuda' )?"  # of a message for several, of one for no backend
    )
    with pytest.raises((TypeError, ValueError, NotImplementedError), match=rf"^{before}{name}\b"):
        cached_attention(**GOOD | (wrong if isinstance(wrong, dict) else {name: wrong}))
