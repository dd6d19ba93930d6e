"""cached_attention: one body of tests for the CPU kernels and the reference, against a plain loop in fp64.

Whatever a call must not read, past the lengths, in unused slots and around a view, is NaN in every test.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from mem1_core.ops import cached_attention
from mem1_core.testing import assert_accurate, poisoned_memory

every_backend = pytest.mark.parametrize("backend", ["cpu", "reference"])
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
LENGTHS = (200, 1, 63, 64, 65, 131)
NAN, INF = torch.nan, torch.inf
Case = dict[str, Any]  # the arguments of a call


def run(it: Case, backend: str = "cpu", function: Any = cached_attention, **options: Any) -> Tensor:
    return function(**it | {"backend": backend} | options)


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
    value_dim: int | None = None,
    fill: float = NAN,
) -> Case:
    """Random numbers for ragged rows in permuted slots, one in three unused; counts as large as can be."""
    generator, batch, (hq, hkv) = torch.Generator().manual_seed(0), len(lengths), heads
    slots, capacity = batch + 1 + batch // 2, max(lengths) + 5
    rows = torch.randperm(slots, generator=generator)[:batch]
    q = torch.randn(batch, queries, hq, dim, generator=generator)
    fresh = torch.randn(2, batch, capacity, hkv, dim, generator=generator)
    fresh.masked_fill_((torch.arange(capacity) >= torch.tensor(lengths)[:, None])[..., None, None], fill)
    cache = fresh.new_full((2, slots, capacity, hkv, dim), fill)
    keys, values = cache.index_copy_(1, rows, fresh).to(dtype)
    if value_dim is not None:
        values = values.repeat(1, 1, 1, -(-value_dim // dim))[..., :value_dim]
    counts = counts or tuple(min(queries, n) for n in lengths)
    tables = dict(cache_seqlens=int32(*lengths), cache_batch_idx=rows.int(), query_lens=int32(*counts))
    return dict(q=q.to(dtype), k_cache=keys, v_cache=values, **tables)


def looped(it: Case, dtype: torch.dtype, scale: float | None) -> Tensor:
    """Query after query, every step in `dtype`."""
    q, group, queries = it["q"].to(dtype), it["q"].shape[2] // it["k_cache"].shape[2], it["q"].shape[1]
    scale, out = (
        q.shape[3] ** -0.5 if scale is None else scale,
        q.new_zeros(*q.shape[:3], it["v_cache"].shape[3]),
    )
    window, cap, sinks = (it.get(name) for name in ("window", "softcap", "sinks"))
    places = it.get("positions", torch.arange(it["k_cache"].shape[1]).expand(len(q), -1))
    tables = (it[name].tolist() for name in ("cache_batch_idx", "cache_seqlens", "query_lens"))
    for b, (row, length, count) in enumerate(zip(*tables, strict=True)):
        of_row = (x[row, :length].to(dtype).transpose(0, 1) for x in (it["k_cache"], it["v_cache"]))
        k, v = (x.repeat_interleave(group, 0) for x in of_row)  # [Hq, length, D]
        for t in range(queries - count, queries):
            seen = length - queries + t + 1
            first = 0
            if window is not None:
                first = int((places[b, seen - 1] - places[b, :seen] >= window).sum())
            score = (k[:, first:seen] @ (q[b, t] * scale)[..., None]).mT
            score = score if cap is None else cap * (score / cap).tanh()
            if sinks is not None:
                score = torch.cat([score, sinks.to(dtype)[:, None, None]], dim=-1)
            out[b, t] = (score.softmax(-1)[..., : seen - first] @ v[:, first:seen])[:, 0]
    return out


def in_lanes(it: Case, lanes: int, scale: float) -> Tensor:
    """The CPU's kernel for registers of so many floats, which need not be this machine's widest."""
    names = ("q", "k_cache", "v_cache", "cache_batch_idx", "cache_seqlens", "query_lens")
    return torch.ops.mem1_core.cached_attention(*(it[name] for name in names), scale, lanes)


def check(it: Case, backend: str, scale: float | None = None, got: Tensor | None = None) -> Tensor:
    if got is None:
        with poisoned_memory():
            got = run(it, backend, scale=scale)
    exact, plain = looped(it, torch.float64, scale), looped(it, it["q"].dtype, scale)
    assert_accurate(got, plain, exact, atol=1e-13 if plain.dtype == exact.dtype else None)
    for b, count in enumerate(it["query_lens"].tolist()):
        assert not got[b, : it["q"].shape[1] - count].any(), f"row {b}: padding is not 0"
    return got


@every_backend
@every_dtype
@pytest.mark.parametrize("group", [1, 2, 7, 12])  # pairs share a pass over the keys, an odd one has its own
@pytest.mark.parametrize("dim", [1, 3, 8, 20, 32, 64, 80, 128, 256, 300])
def test_heads(backend: str, dtype: torch.dtype, group: int, dim: int) -> None:
    for queries, scale in ((1, None), (1, 0.3), (3, 0.3)):
        check(case(dtype, queries, (70, 3, 65), heads=(2 * group, 2), dim=dim), backend, scale)


@pytest.mark.parametrize("lanes", [4, 8, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_width_of_a_register(dtype: torch.dtype, lanes: int) -> None:
    try:
        in_lanes(case(dtype, 1), lanes, 0.3)
    except ValueError as error:
        assert "lanes: expected at most" in str(error)
        pytest.skip(f"no registers of {lanes} floats on this machine")
    for group in (1, 2, 7):
        for dim in (1, 3, 8, 20, 64, 80):
            it = case(dtype, 1, (*LENGTHS, 0), heads=(2 * group, 2), dim=dim)
            check(it, "cpu", 0.3, got=in_lanes(it, lanes, 0.3))


def test_no_other_width_of_a_register() -> None:
    for lanes in (0, 5, 32):
        with pytest.raises(ValueError, match=f"lanes: expected 4, 8 or 16, got {lanes}"):
            in_lanes(case(torch.float32, 1), lanes, 0.3)


@every_backend
@every_dtype
@pytest.mark.parametrize("queries", [1, 2, 3, 63, 64, 65, 130])
def test_lengths_and_counts(backend: str, dtype: torch.dtype, queries: int) -> None:
    lengths = (*LENGTHS, queries, 0, 5, 197)
    counts = (*(min(queries, n) for n in LENGTHS), queries, 0, 0, queries // 2)
    check(case(dtype, queries, lengths, counts=counts, dim=32), backend)


@every_backend
@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (2, 3, 0)], ids=str)
def test_nothing_to_do(backend: str, shape: tuple[int, ...]) -> None:
    cache, lengths = torch.zeros(2, 9, 2, 16), torch.full(shape[:1], 9).int()
    got = cached_attention(torch.ones(*shape, 16), cache, cache, lengths, backend=backend)
    assert got.shape == (*shape, 16)


def layouts(it: Case) -> Iterator[tuple[str, Tensor, Tensor]]:
    """The same numbers as a model's caches keep them."""
    slots, capacity, heads, dim = it["k_cache"].shape
    larger = it["k_cache"].new_full((slots + 1, capacity + 9, heads + 1, 2, dim), NAN)
    keys, values = larger[1:, 2 : capacity + 2, 1:].unbind(3)
    yield "slices of a larger cache", keys.copy_(it["k_cache"]), values.copy_(it["v_cache"])
    kv = it["k_cache"].new_full((3, 2, *it["k_cache"].shape), NAN)
    yield "one layer of all", kv[1, 0].copy_(it["k_cache"]), kv[1, 1].copy_(it["v_cache"])
    keys, values = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (it["k_cache"], it["v_cache"]))
    yield "heads first", keys, values
    yield "keys and values unlike", it["k_cache"], values


@every_backend
@every_dtype
@pytest.mark.parametrize("queries", [1, 5])
def test_strides_of_the_cache_do_not_matter(backend: str, dtype: torch.dtype, queries: int) -> None:
    it = case(dtype, queries, (70, 5, 65), dim=40)
    want = run(it, backend)
    for name, keys, values in layouts(it):
        got = check(it | {"k_cache": keys, "v_cache": values}, backend)
        assert torch.equal(got, want) or name == "keys and values unlike", name  # a path of its own


@every_backend
@pytest.mark.parametrize("name", ["q", "cache_seqlens", "cache_batch_idx", "query_lens"])
def test_strides_of_the_rest_do_not_matter(backend: str, name: str) -> None:
    for queries in (1, 5):
        it = case(torch.float32, queries, (70, 5, 65), dim=40)
        x = it[name]
        spread = torch.stack([x, torch.full_like(x, -1)], dim=1)[:, 0]
        assert torch.equal(run(it, backend, **{name: spread}), run(it, backend))


@every_backend
@every_dtype
@pytest.mark.parametrize("fill", [INF, -INF, 1e30], ids=str)  # NaN: everywhere else
def test_nothing_past_a_length_is_read(backend: str, dtype: torch.dtype, fill: float) -> None:
    for queries in (1, 5):
        want = run(case(dtype, queries), backend)
        assert want.isfinite().all() and torch.equal(run(case(dtype, queries, fill=fill), backend), want)


@every_backend
@every_dtype
@pytest.mark.parametrize("where", ["k_cache", "v_cache"])
def test_nan_shows_where_it_is_seen_only(backend: str, dtype: torch.dtype, where: str) -> None:
    """Entry 67 of row 0, KV head 1: of its last 5 queries two come before it."""
    for queries in (1, 5):
        it = case(dtype, queries, (70, 68, 9))
        want = run(it, backend)
        it[where][it["cache_batch_idx"][0], 67, 1] = NAN
        got, hit = run(it, backend), torch.zeros(want.shape, dtype=torch.bool)
        hit[0, -3:, 2:] = True
        assert torch.equal(got.isnan(), hit), f"{queries} queries, NaN at {got.isnan().any(-1).nonzero()}"
        assert torch.equal(got[~hit], want[~hit])


@every_backend
@every_dtype
@pytest.mark.parametrize("where", ["k_cache", "v_cache"])
@pytest.mark.parametrize("sign", [1, -1])
def test_infinities_show_where_they_are_seen_only(
    backend: str, dtype: torch.dtype, where: str, sign: int
) -> None:
    """One channel of entry 67 of row 0, KV head 1. A score of -inf leaves its key out in a step."""
    for queries in (1, 5):
        it = case(dtype, queries, (70, 68, 9))
        it["q"][0, :, :, 3] = 1.0
        clean = run(it, backend)
        it[where][it["cache_batch_idx"][0], 67, 1, 3] = sign * INF
        got, exact, hit = run(it, backend), looped(it, torch.float64, None), torch.zeros(clean.shape).bool()
        hit[0, -3:, 2:] = True
        assert torch.equal(got[~hit], clean[~hit])
        if where == "v_cache":
            assert not got[exact.isinf()].isfinite().any()
            assert torch.equal((~got.isfinite()).any(-1), hit.any(-1))
        elif sign > 0:
            assert got[hit].isnan().all()
        else:
            near = torch.isclose(got[hit].double(), exact[hit], rtol=0.02, atol=0.02)
            own_kernel = queries == 1 and dtype != torch.float64
            assert near.all() or not own_kernel and got[hit].isnan().all()


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
        it["q"].fill_(level)
        it["k_cache"][it["cache_batch_idx"][0], :200] = 0.0 if bits > 0 else -2 * level
        it["k_cache"][it["cache_batch_idx"][0], best] = level if bits > 0 else -level
        check(it, backend)


@every_backend
@every_dtype
@pytest.mark.parametrize("queries", [1, 70])
def test_repeats_bit_for_bit_and_changes_nothing(backend: str, dtype: torch.dtype, queries: int) -> None:
    it = case(dtype, queries)
    before, first = [x.clone() for x in it.values()], run(it, backend)
    assert all(torch.equal(run(it, backend), first) for _ in range(2))
    for now, then in zip(it.values(), before, strict=True):
        torch.testing.assert_close(now, then, rtol=0, atol=0, equal_nan=True)


@every_dtype
@pytest.mark.parametrize("lengths", [LENGTHS, (197,)], ids=["many rows", "one row"])
def test_threads_do_not_matter(dtype: torch.dtype, lengths: tuple[int, ...]) -> None:
    cases = [case(dtype, queries, lengths, heads=(24, 2)) for queries in (1, 70)]
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        want = [run(it) for it in cases]
        torch.set_num_threads(2)
        assert all(torch.equal(run(it), one) for it, one in zip(cases, want, strict=True))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("queries", [1, 5])
def test_opcheck_compile_and_defaults(queries: int) -> None:
    it = case(torch.float32, queries, (70, 9), dim=16, fill=0)
    in_order = [it[x] for x in ("q", "k_cache", "v_cache", "cache_batch_idx", "cache_seqlens", "query_lens")]
    torch.library.opcheck(torch.ops.mem1_core.cached_attention.default, (*in_order, 0.25))
    compiled = torch.compile(cached_attention, backend="aot_eager", fullgraph=True)
    assert torch.equal(run(it, function=compiled), run(it))
    it["cache_batch_idx"], it["query_lens"] = int32(0, 1), it["query_lens"].fill_(queries)
    want = run(it)
    for function in (cached_attention, compiled):
        assert torch.equal(run(it, function=function, cache_batch_idx=None, query_lens=None), want)


def of(*shape: int, grad: bool = False) -> Tensor:
    return torch.zeros(shape, requires_grad=grad)


Q, KEYS, CACHE = of(2, 3, 4, 16), of(5, 9, 2, 16), ("k_cache", "v_cache")
PLACES = torch.arange(9).expand(2, 9)
GOOD = dict(
    q=Q,
    k_cache=KEYS,
    v_cache=KEYS,
    cache_seqlens=int32(9, 4),
    cache_batch_idx=int32(1, 0),
    query_lens=int32(3, 3),
)
BAD: dict[str, list[Any]] = {  # values of an argument, or a dict of several
    "q": [[1.0], of(2, 4, 16), Q.int(), of(2, 3, 4, 32)[..., ::2], of(2, 3, 3, 16), of(2, 3, 4, 0)]
    + [of(2, 3, 4, 16, grad=True), {"q": Q.half(), "k_cache": KEYS.half(), "v_cache": KEYS.half()}]
    + [dict.fromkeys(CACHE, of(5, 9, heads, 16)) for heads in (0, 3)],
    "k_cache": [
        None,
        of(9, 2, 16),
        KEYS.bfloat16(),
        KEYS.to("meta"),
        of(5, 9, 2, 8),
        of(5, 9, 2, 32)[..., ::2],
    ]
    + [of(5, 9, 2, 16, grad=True), dict.fromkeys(CACHE, of(5, 9, 2, 8))],
    "v_cache": [of(9, 2, 16), KEYS.double(), of(4, 9, 2, 16), of(5, 8, 2, 16), of(5, 9, 1, 16)]
    + [of(5, 9, 2, 0), of(5, 9, 16, 2).mT, of(5, 9, 2, 16, grad=True)],
    "cache_seqlens": [[9, 4], torch.tensor([9, 4]), int32(9, 4, 4), int32(9, 4).to("meta"), int32(9, 10)]
    + [{"cache_seqlens": int32(9, -1), "query_lens": int32(3, 0)}],
    "cache_batch_idx": [torch.tensor([1, 0]), int32(1), int32(1, 5), int32(1, -1), int32(1, 0).to("meta")]
    + [dict.fromkeys(CACHE, of(1, 9, 2, 16)) | {"cache_batch_idx": None}],
    "query_lens": [torch.tensor([True, True]), int32(3), int32(3, 3)[:, None], int32(4, 3), int32(3, -1)]
    + [{"cache_seqlens": int32(9, 2)}, {"cache_seqlens": int32(9, 2), "query_lens": None}],
    "scale": [0.0, -1.0, NAN, INF, "3", True],
    "window": [0, -1, 2.0, True],
    "positions": [
        {"positions": PLACES},
        {"positions": PLACES[:, :8], "window": 3},
        {"positions": PLACES.repeat(2, 1)[:3], "window": 3},
        {"positions": PLACES.flip(1), "window": 3},
        {"positions": PLACES.float(), "window": 3},
        {"positions": PLACES.to(torch.complex64), "window": 3},
    ],
    "evict": [PLACES, {"evict": PLACES.int(), "window": 3}, PLACES.int()[:, :8], PLACES.int().to("meta")],
    "sinks": [[0.0] * 4, of(3), of(4, grad=True), torch.zeros(4, dtype=torch.int32), of(4).to("meta")],
    "softcap": [0.0, -1.0, NAN, INF, "3", True, 1e39],
    "backend": ["fast", "cuda"],
}


@pytest.mark.parametrize(("name", "wrong"), [(name, wrong) for name in BAD for wrong in BAD[name]])
def test_bad_input(name: str, wrong: Any) -> None:
    assert not run(GOOD).any()
    before = "(q, k_cache, |q, |cached_attention: the 'cuda' )?"  # arguments told together; a missing backend
    with pytest.raises((TypeError, ValueError, NotImplementedError), match=rf"^{before}{name}\b"):
        run(GOOD, **wrong if isinstance(wrong, dict) else {name: wrong})
