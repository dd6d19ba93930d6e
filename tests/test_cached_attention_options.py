"""Windows, sinks, soft caps, other sizes of values over a KV cache, by the rules of test_cached_attention."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from test_cached_attention import LENGTHS, Case, case, check, every_backend, every_dtype, run

from mem1_core.eviction import window_evict
from mem1_core.ops import cached_attention
from mem1_core.testing import poisoned_memory

WINDOWS = [1, 7, 64, 512]


def placed(it: Case, seed: int = 1) -> torch.Tensor:
    """Ascending positions of the entries of each row, with gaps where entries have left."""
    generator, shape = torch.Generator().manual_seed(seed), (len(it["q"]), it["k_cache"].shape[1])
    steps = 1 + torch.randint(0, 12, shape, generator=generator).sub(8).clamp(min=0)
    return steps.cumsum(1)


def with_options(it: Case, window: int | None, sinks: bool, softcap: float | None, gaps: bool) -> Case:
    given: dict[str, Any] = {"window": window, "softcap": softcap}
    if sinks:
        given["sinks"] = torch.randn(it["q"].shape[2], generator=torch.Generator().manual_seed(2)).to(it["q"])
    if gaps and window is not None:
        given["positions"] = placed(it)
    return it | given


@every_backend
@every_dtype
@pytest.mark.parametrize("queries", [1, 3, 65, 130])
def test_every_option(backend: str, dtype: torch.dtype, queries: int) -> None:
    options = list(itertools.product([7], (False, True), (None, 3.0), (False, True)))
    options += [
        (window, both, 3.0 if both else None, True) for window in (None, 1, 64, 512) for both in (0, 1)
    ]
    for option in options:
        check(with_options(case(dtype, queries, dim=32), *option), backend)


@every_backend
@every_dtype
@pytest.mark.parametrize("dims", [(192, 128), (16, 40), (20, 3), (64, 96), (3, 300)], ids=str)
@pytest.mark.parametrize("group", [1, 2, 7])
def test_values_of_another_size(backend: str, dtype: torch.dtype, dims: tuple[int, int], group: int) -> None:
    for queries in (1, 3):
        it = case(dtype, queries, (70, 3, 65), heads=(2 * group, 2), dim=dims[0], value_dim=dims[1])
        check(it, backend)
        check(with_options(it, 7, True, 3.0, True), backend)


@every_backend
def test_rows_without_entries_and_padding(backend: str) -> None:
    for queries in (1, 5):
        lengths, counts = (9, 0, 40, queries), (queries, 0, 0, 0)
        check(with_options(case(torch.float32, queries, lengths, counts=counts), 7, True, 3.0, True), backend)


@pytest.mark.parametrize("lanes", [4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_width_of_a_register(dtype: torch.dtype, lanes: int) -> None:
    names = ("q", "k_cache", "v_cache", "cache_batch_idx", "cache_seqlens", "query_lens")
    for group, dim, window in itertools.product((1, 2, 7), (3, 20, 64), WINDOWS):
        it = with_options(case(dtype, 1, heads=(2 * group, 2), dim=dim), window, True, 3.0, True)
        evict = window_evict(it["positions"], window, it["cache_seqlens"])
        arguments = [*(it[name] for name in names), 0.3, lanes, evict, it["sinks"].float(), 3.0]
        check(it, "cpu", 0.3, got=torch.ops.mem1_core.cached_attention(*arguments))


@every_backend
def test_lifetimes_may_be_made_once_for_many_layers(backend: str) -> None:
    it = with_options(case(torch.float32, 5), 20, False, None, True)
    evict = window_evict(it["positions"], 20, it["cache_seqlens"])
    plain = {name: x for name, x in it.items() if name not in ("window", "positions")}
    assert torch.equal(run(it, backend), run(plain | {"evict": evict}, backend))
    assert not torch.equal(run(it, backend), run(plain, backend))


def test_what_a_window_hides_is_not_read() -> None:
    """A NaN outside of it is nobody's."""
    it = with_options(case(torch.float32, 1, (300,)), 64, False, None, False)
    for x in (it["k_cache"], it["v_cache"]):
        x[it["cache_batch_idx"][0], :200] = torch.nan
    assert run(it).isfinite().all()


@every_backend
@pytest.mark.parametrize("window", [10**6, 2**63 - 1, 2**70])
def test_a_wide_window_changes_no_bit(backend: str, window: int) -> None:
    it = case(torch.float32, 3)
    with poisoned_memory():
        assert torch.equal(run(it, backend), run(it, backend, window=window))
        expanded = torch.full((1, 1), 300, dtype=torch.int32).expand(len(LENGTHS), 205)
        assert torch.equal(run(it, backend), run(it, backend, evict=expanded))


@every_backend
def test_nothing_in_a_window(backend: str) -> None:
    cache = torch.zeros(2, 9, 2, 16)
    for batch in (0, 2):
        q, lengths = torch.ones(batch, 3, 4, 16), torch.zeros(batch, dtype=torch.int32)
        got = run(
            {},
            backend,
            q=q,
            k_cache=cache,
            v_cache=cache,
            cache_seqlens=lengths,
            query_lens=lengths,
            window=5,
        )
        assert got.shape == q.shape and not got.any()
    with pytest.raises(ValueError, match="cache_seqlens"):
        run(case(torch.float32, 3, (9,)) | {"cache_seqlens": torch.tensor([-3]).int()}, "cpu", window=5)


def test_lifetimes_of_a_window() -> None:
    positions = torch.tensor([[0, 1, 5, 6, 7, 20], [3, 4, 9, 0, 0, 0]])
    evict = window_evict(positions, 5, torch.tensor([6, 3]))
    assert evict.tolist()[0] == [2, 3, 5, 5, 5, 6] and evict.tolist()[1][:3] == [2, 2, 3]
    for row, length in enumerate((6, 3)):
        for j in range(length):
            hidden = [i for i in range(j, length) if positions[row, i] - positions[row, j] >= 5]
            assert min(evict[row, j], length) == (hidden[0] if hidden else length)


def test_positions_of_all_rows() -> None:
    q, (k, v) = torch.randn(2, 1, 4, 16), torch.randn(2, 2, 9, 2, 16)
    lengths, positions = torch.tensor([9, 5], dtype=torch.int32), torch.arange(9)[None] * 2
    got, want = (
        cached_attention(q, k, v, lengths, window=5, positions=x) for x in (positions, positions.repeat(2, 1))
    )
    assert torch.equal(got, want)
    positions[0, 4] = 6
    with pytest.raises(ValueError, match=r"positions\[0, 4\]: expected more than the 6 before it, got 6"):
        cached_attention(q, k, v, lengths, window=5, positions=positions)
