"""prune_paged_kv_cache_: tables, pages and what is in them, against a gather; every backend and device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kv_cache_cases import BACKENDS, DTYPES, copied, layers_of, memory, padded, same
from torch import Tensor

from mem1_core.ops import prune_kv_cache_, prune_paged_kv_cache_
from mem1_core.ops.kv_cache import PagedPrune
from mem1_core.sample_inputs import KEEP_PATTERNS, KV_LAYOUTS, keep_mask, kv_cache, ranges_of
from mem1_core.testing import poisoned_memory

every_backend = pytest.mark.parametrize(("backend", "device"), BACKENDS)
both_gaps = pytest.mark.parametrize("gaps", ["close", "leave"])
page_sizes = pytest.mark.parametrize("page", [1, 5, 16, 256])


def tables(
    lengths: list[int], page: int, *, spare_columns: int = 0, spare_pages: int = 3
) -> tuple[Tensor, int]:
    """int32 [B, P] with the pages of each sequence in any order, then -1; and the pages of the cache."""
    used = [-(-n // page) for n in lengths]
    pages = sum(used) + spare_pages
    order = torch.randperm(pages, generator=torch.Generator().manual_seed(0)).int()
    table = torch.full((len(lengths), max(used, default=0) + spare_columns), -1, dtype=torch.int32)
    for row, part in zip(table, order[: sum(used)].split(used), strict=True):
        row[: len(part)] = part
    return table, pages


def survivors(keep: Tensor, lengths: list[int]) -> list[list[int]]:
    return [[s for s in range(n) if row[s]] for row, n in zip(keep.tolist(), lengths, strict=True)]


class Expected:
    """Where each survivor goes, the new tables, and which slots of the pool anything may stand in."""

    def __init__(
        self, table: list[list[int]], alive: list[list[int]], lengths: list[int], page: int, gaps: str
    ):
        self.sources: list[tuple[int, int]] = []  # (page, slot in it)
        self.targets: list[tuple[int, int]] = []
        self.table, self.page_lengths = [], []
        before: list[int] = []
        for row, slots, n in zip(table, alive, lengths, strict=True):
            used = row[: -(-n // page)]
            left = sorted({s // page for s in slots})
            in_page = [[s for s in slots if s // page == p] for p in left]
            if gaps == "close":
                in_page = [slots[at : at + page] for at in range(0, len(slots), page)]
            for p, group in zip(left, in_page, strict=False):
                self.sources += [(used[s // page], s % page) for s in group]
                self.targets += [(used[p], slot) for slot in range(len(group))]
            rest = len(row) - len(in_page)
            self.table.append([used[p] for p in left[: len(in_page)]] + [-1] * rest)
            self.page_lengths.append([len(group) for group in in_page] + [0] * rest)
            before += used
        after = {p for row in self.table for p in row}
        self.freed = {p for p in before if p not in after}
        touched = {
            p for p, _ in self.sources if before.count(p) == 1
        }  # pages shared or dropped whole are not
        self.undefined = sorted({(p, s) for p in touched for s in range(page)} - set(self.targets))

    def apply(self, kv: Any, read: Any) -> None:
        """Survivors of `read` into `kv`."""
        if not self.sources:
            return
        (pages, slots), (to, at) = (zip(*places, strict=True) for places in (self.sources, self.targets))
        for layer, old in zip(layers_of(kv), layers_of(read), strict=True):
            for x, y in zip(layer, old, strict=True):
                x[list(to), list(at)] = y[list(pages), list(slots)]

    def forget(self, kv: Any) -> None:
        for layer in layers_of(kv):
            for x in layer:
                for place in self.undefined:
                    x[place] = 0


def check(
    kv: Any,
    keep: Any,
    table: Tensor,
    lengths: list[int],
    alive: list[list[int]],
    page: int,
    backend: str,
    device: str,
    gaps: Any,
    *,
    dtype: torch.dtype = torch.int32,
    view: Any = lambda kv: kv,
) -> PagedPrune:
    """Every byte of the pool, the table, and all that is returned."""
    before, want = copied(kv), copied(kv)
    table, n = table.to(device), torch.tensor(lengths, dtype=dtype, device=device)
    expected = Expected(table.tolist(), alive, lengths, page, gaps)
    others = memory([keep, n])
    with poisoned_memory():
        result = prune_paged_kv_cache_(view(kv), keep, table, n, gaps=gaps, backend=backend)
    assert isinstance(result, PagedPrune)
    assert table.tolist() == expected.table, "in place"
    assert result.lengths.dtype == dtype and result.lengths.tolist() == [len(slots) for slots in alive]
    assert result.page_lengths.dtype == torch.int32
    assert result.page_lengths.tolist() == expected.page_lengths
    assert result.freed.dtype == torch.bool
    assert set(result.freed.nonzero()[:, 0].tolist()) == expected.freed
    expected.apply(view(want), view(before))
    for cache in (kv, want):
        expected.forget(view(cache))
    assert same(memory(kv), memory(want))
    assert same(memory([keep, n]), others), "what says what stays is not written"
    return result


def check_mask(
    lengths: list[int], pattern: str, page: int, backend: str, device: str, gaps: str, **options: Any
) -> PagedPrune:
    table, pages = tables(lengths, page, spare_columns=options.pop("spare_columns", 1))
    kv = options.pop("kv", None)
    if kv is None:
        kv = kv_cache(2, pages, page, 2, options.pop("dim", 16), device=device)
    keep = keep_mask(pattern, lengths, table.shape[1] * page)
    result = check(
        kv, keep.to(device), table, lengths, survivors(keep, lengths), page, backend, device, gaps, **options
    )
    assert result.freed.shape == (pages,)
    return result


# -------------------------------------------------------------------------------------------------- moving


@every_backend
@both_gaps
@page_sizes
@pytest.mark.parametrize("pattern", KEEP_PATTERNS)
def test_patterns(backend: str, device: str, gaps: str, page: int, pattern: str) -> None:
    lengths = [0, 1, 3 * page, 2 * page + page // 2, 5 * page - 1]
    check_mask(lengths, pattern, page, backend, device, gaps)


@every_backend
@both_gaps
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [1, 64, 80, 96, 128, 256])
def test_head_dims(backend: str, device: str, gaps: str, dtype: torch.dtype, dim: int) -> None:
    lengths = [50, 64, 9]
    kv = kv_cache(2, tables(lengths, 16)[1], 16, 2, dim, dtype=dtype, device=device)
    check_mask(lengths, "random", 16, backend, device, gaps, kv=kv)


@every_backend
@both_gaps
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8], ids=str)
@pytest.mark.parametrize("layout", KV_LAYOUTS)
def test_layouts(backend: str, device: str, gaps: str, dtype: torch.dtype, layout: str) -> None:
    lengths = [50, 64, 9]
    kv = kv_cache(3, tables(lengths, 16)[1], 16, 2, 40, dtype=dtype, device=device, layout=layout)
    check_mask(lengths, "mem1", 16, backend, device, gaps, kv=kv)


@every_backend
@both_gaps
@pytest.mark.parametrize("engine", ["vLLM", "FlashInfer NHD", "FlashInfer HND"])
def test_caches_of_engines(backend: str, device: str, gaps: str, engine: str) -> None:
    lengths = [50, 64, 9]
    pages = tables(lengths, 16)[1]
    kv: Any = kv_cache(3, pages, 16, 2, 32, dtype=torch.bfloat16, device=device)
    options: dict[str, Any] = {}
    if engine == "vLLM":  # [2, pages, page, H, D]
        kv = [layer.clone() for layer in kv]
    elif engine == "FlashInfer NHD":  # [pages, 2, page, H, D]
        kv = [layer.transpose(0, 1).contiguous() for layer in kv]
        options["view"] = lambda kv: [(layer[:, 0], layer[:, 1]) for layer in kv]
    else:  # [pages, 2, H, page, D]
        kv = [layer.permute(1, 0, 3, 2, 4).contiguous() for layer in kv]
        options["view"] = lambda kv: [(x[:, 0].transpose(1, 2), x[:, 1].transpose(1, 2)) for x in kv]
    check_mask(lengths, "random", 16, backend, device, gaps, kv=kv, **options)


@every_backend
@both_gaps
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("lengths", [[], [0], [1], [0, 0], [48], [48, 17, 16, 15, 1]], ids=str)
def test_lengths(backend: str, device: str, gaps: str, dtype: torch.dtype, lengths: list[int]) -> None:
    for spare_columns in (0, 2):
        check_mask(lengths, "random", 16, backend, device, gaps, dtype=dtype, spare_columns=spare_columns)


@every_backend
@both_gaps
@pytest.mark.parametrize("shape", [(0, 7, 4, 1, 8), (2, 7, 4, 0, 8), (128, 7, 4, 1, 8)], ids=str)
def test_sizes(backend: str, device: str, gaps: str, shape: tuple[int, ...]) -> None:
    check_mask([7, 8], "random", 4, backend, device, gaps, kv=kv_cache(*shape, device=device))


@every_backend
@both_gaps
def test_ranges(backend: str, device: str, gaps: str) -> None:
    lengths, page = [37, 0, 48, 16], 16
    table, pages = tables(lengths, page)
    for pattern in KEEP_PATTERNS:
        ranges = ranges_of(keep_mask(pattern, lengths, 48), lengths)
        alive = [[s for begin, end in row for s in range(begin, end)] for row in ranges]
        for keep in (ranges, padded(ranges).to(device), padded(ranges, front=True).int().to(device)):
            kv = kv_cache(1, pages, page, 2, 16, device=device)
            check(kv, keep, table.clone(), lengths, alive, page, backend, device, gaps)


@every_backend
@both_gaps
@pytest.mark.parametrize("beyond", [-1, 10**6, -(10**6), 0])
def test_the_table_past_a_length_is_not_read(backend: str, device: str, gaps: str, beyond: int) -> None:
    lengths = [17, 0, 40]
    table, pages = tables(lengths, 8, spare_columns=2)
    table[table < 0] = beyond
    keep = keep_mask("random", lengths, table.shape[1] * 8)
    kv = kv_cache(1, pages, 8, 1, 16, device=device)
    check(kv, keep.to(device), table, lengths, survivors(keep, lengths), 8, backend, device, gaps)


@every_backend
def test_pages_of_one_token_move_nothing(backend: str, device: str) -> None:
    lengths = [9, 20]
    table, pages = tables(lengths, 1)
    keep = keep_mask("random", lengths, 20).to(device)
    results = []
    for gaps in ("close", "leave"):
        kv = kv_cache(2, pages, 1, 2, 8, device=device)
        before, new_table = kv.clone(), table.clone().to(device)
        n = torch.tensor(lengths, device=device)
        results.append(
            [*prune_paged_kv_cache_(kv, keep, new_table, n, gaps=gaps, backend=backend), new_table]
        )
        assert torch.equal(kv, before)
    assert same(*results)


@every_backend
def test_prunes_in_a_row_are_one(backend: str, device: str) -> None:
    """As a turn is: prune, pages come back, the sequence grows into new ones."""
    page, pages, columns = 4, 12, 8
    kv = kv_cache(2, pages, page, 1, 8, device=device)
    table = torch.full((1, columns), -1, dtype=torch.int32, device=device)
    free, tokens = list(range(pages)), []  # what the sequence should hold, [L, 2, H, D] each
    generator = torch.Generator().manual_seed(0)
    for turn in range(6):
        for _ in range(13):
            slot = len(tokens)
            if slot % page == 0:
                table[0, slot // page] = free.pop()
            token = torch.randn(2, 2, 1, 8, generator=generator).to(device)
            kv[:, :, int(table[0, slot // page]), slot % page] = token
            tokens.append(token)
        keep = keep_mask("mem1", [len(tokens)], columns * page, turn).to(device)
        n = torch.tensor([len(tokens)], device=device)
        tokens = [token for token, stays in zip(tokens, keep[0].tolist(), strict=False) if stays]
        result = prune_paged_kv_cache_(kv, keep, table, n, gaps="close", backend=backend)
        free += result.freed.nonzero()[:, 0].tolist()
        held = table[0][table[0] >= 0].tolist()
        assert sorted(free + held) == list(range(pages)), "no page is lost, none is held twice"
        read = kv[:, :, held].flatten(2, 3)[:, :, : len(tokens)]
        assert torch.equal(read, torch.stack(tokens, 2)) and result.lengths.tolist() == [len(tokens)]


# ------------------------------------------------------------------------------------------------- turning


@every_backend
@pytest.mark.parametrize("dtype", DTYPES[:4], ids=str)
@pytest.mark.parametrize("page", [1, 16, 256])
def test_compact_positions(backend: str, device: str, dtype: torch.dtype, page: int) -> None:
    """Bit for bit what the plain cache of the same sequences becomes."""
    lengths, dim = [520, 0, 77], 64
    table, pages = tables(lengths, page, spare_columns=1)
    slots = table.shape[1] * page
    flat = kv_cache(2, 3, slots, 2, dim, dtype=dtype, device=device)
    kv = kv_cache(2, pages, page, 2, dim, dtype=dtype, device=device)
    for b, n in enumerate(lengths):
        for at, number in enumerate(table[b, : -(-n // page)].tolist()):
            kv[:, :, number] = flat[:, :, b, at * page : (at + 1) * page]
    keep, n = keep_mask("random", lengths, slots).to(device), torch.tensor(lengths, device=device)
    inv_freq = 10_000.0 ** -(torch.arange(dim // 2, device=device) / (dim / 2))
    options: dict[str, Any] = {"positions": "compact", "inv_freq": inv_freq, "backend": backend}
    table = table.to(device)
    result = prune_paged_kv_cache_(kv, keep, table, n, gaps="close", **options)
    want = flat.clone()
    assert torch.equal(prune_kv_cache_(want, keep, n, **options), result.lengths)
    for b, count in enumerate(result.lengths.tolist()):
        read = kv[:, :, table[b, : -(-count // page)].long()].flatten(2, 3)[:, :, :count]
        assert torch.equal(read, want[:, :, b, :count])


# -------------------------------------------------------------------------------------------------- sharing


def check_shared(
    table: list[list[int]], ranges: Any, lengths: list[int], backend: str, device: str, gaps: str
) -> PagedPrune:
    alive = [[s for begin, end in row for s in range(begin, end)] for row in ranges]
    kv = kv_cache(2, 8, 4, 2, 8, device=device)
    return check(kv, ranges, torch.tensor(table, dtype=torch.int32), lengths, alive, 4, backend, device, gaps)


@every_backend
@both_gaps
def test_shared_pages(backend: str, device: str, gaps: str) -> None:
    """Pages 5 and 2 are a prompt that all share, page 1 belongs to the first two."""
    table, lengths = [[5, 2, 1, 0], [5, 2, 1, -1], [5, 2, 7, -1]], [14, 12, 10]
    # All keep the prompt; the first keeps page 1 whole, the second drops it.
    rows = [[(0, 12)], [(0, 8)], [(0, 8), (9, 10)]]
    freed = check_shared(table, rows, lengths, backend, device, gaps).freed
    assert freed.nonzero()[:, 0].tolist() == [0]
    # The second of its users drops page 1 as well: now it is free. The prompt is held by the last alone.
    freed = check_shared(table, [[], [], [(0, 8)]], lengths, backend, device, gaps).freed
    assert freed.nonzero()[:, 0].tolist() == [0, 1, 7]
    # A whole page before a shared one goes: the table moves up, the shared page stays as it is.
    freed = check_shared(table, [[(4, 12)], [(4, 12)], [(4, 9)]], lengths, backend, device, gaps).freed
    assert freed.nonzero()[:, 0].tolist() == [0, 5]
    # Nobody keeps anything.
    freed = check_shared(table, [[], [], []], lengths, backend, device, gaps).freed
    assert freed.nonzero()[:, 0].tolist() == [0, 1, 2, 5, 7]


@every_backend
@both_gaps
def test_a_shared_page_that_is_not_full(backend: str, device: str, gaps: str) -> None:
    """Kept as far as each of its users has filled it."""
    rows = [[(0, 4), (4, 6)], [(0, 6)]]
    assert not check_shared([[3, 6], [3, 6]], rows, [6, 6], backend, device, gaps).freed.any()


SHARING = [[5, 2, 0], [5, 2, 1]]


@pytest.mark.parametrize("form", ["mask", "ranges"])
@pytest.mark.parametrize(
    ("gaps", "positions", "pages", "first"),
    [
        ("close", "keep", SHARING, [(1, 8)]),  # a shared page loses its begin
        ("leave", "keep", SHARING, [(1, 8)]),
        ("leave", "keep", SHARING, [(0, 2), (3, 8)]),
        ("close", "keep", SHARING, [(0, 3), (4, 8)]),
        ("close", "keep", [[5, 0], [5, 1]], [(0, 3), (4, 8)]),  # the next page moves up into it
        ("close", "keep", [[0, 5], [1, 5]], [(0, 3), (4, 8)]),  # it moves up into the page before it
        ("close", "compact", SHARING, [(4, 8)]),  # it stays, but its keys would get other positions
    ],
    ids=str,
)
def test_a_shared_page_that_would_change_is_refused(
    gaps: Any, positions: Any, pages: list[list[int]], first: list[tuple[int, int]], form: str
) -> None:
    kv, table = kv_cache(1, 8, 4, 1, 8), torch.tensor(pages, dtype=torch.int32)
    width = 4 * table.shape[1]
    ranges = [first, [(0, width)]]
    keep: Any = ranges
    if form == "mask":
        keep = torch.zeros(2, width, dtype=torch.bool)
        for row, pairs in zip(keep, ranges, strict=True):
            for begin, end in pairs:
                row[begin:end] = True
    options: dict[str, Any] = {"gaps": gaps, "positions": positions}
    if positions == "compact":
        options["inv_freq"] = torch.ones(4)
    arguments = [kv, keep, table, torch.tensor([8, width])]
    before = memory(arguments)
    with pytest.raises(ValueError, match="keep: expected page [25], which several sequences use"):
        prune_paged_kv_cache_(*arguments, **options)
    assert same(memory(arguments), before)
    table[1] = torch.tensor([6, 7, 4])[: len(table[1])]  # the same call with pages of its own
    prune_paged_kv_cache_(*arguments, **options)


def test_a_shared_page_keeps_its_positions() -> None:
    """Compact positions after a shared prompt are fine."""
    kv, table = kv_cache(1, 8, 4, 1, 8), torch.tensor(SHARING, dtype=torch.int32)
    before, rows = kv.clone(), [[(0, 8), (9, 11)], [(0, 8), (10, 12)]]
    n = torch.tensor([11, 12])
    prune_paged_kv_cache_(kv, rows, table, n, gaps="close", positions="compact", inv_freq=torch.ones(4))
    assert table.tolist() == SHARING
    assert torch.equal(kv[:, :, [5, 2]], before[:, :, [5, 2]])
    assert torch.equal(kv[:, 1, 1, :2], before[:, 1, 1, 2:])
    assert not torch.equal(kv[:, 0, 1, :2], before[:, 0, 1, 2:])
