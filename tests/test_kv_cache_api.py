"""prune_kv_cache_ and prune_paged_kv_cache_: what is refused, inference mode, autograd, torch.compile."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from kv_cache_cases import (
    BACKENDS,
    DIM,
    GOOD,
    KEY,
    SLOTS,
    based,
    call,
    compact,
    copied,
    memory,
    padded,
    paged,
    plain,
    same,
    tensors_of,
)
from torch import Tensor

from mem1_core import _library
from mem1_core.sample_inputs import kv_cache, ranges_of

every_backend = pytest.mark.parametrize(("backend", "device"), BACKENDS)


@every_backend
@pytest.mark.parametrize("good", GOOD)
def test_good_input(backend: str, device: str, good: Callable[[], dict[str, Any]]) -> None:
    """What the bad calls below differ from; a CPU list of ranges serves any device."""
    for keep in (good()["keep"], [[(0, 2), (5, 6)], [], [(1, 10)]]):
        arguments = copied(good() | {"backend": backend, "keep": keep}, device)
        before = memory(arguments)
        call(arguments)
        assert not same(memory(arguments), before)


# ----------------------------------------------------------------------------------------------- bad calls


def third_layer(key: Tensor, value: Tensor) -> list[tuple[Tensor, Tensor]]:
    first, second = torch.ones(2, 2, *KEY)
    return [(first[0].clone(), first[1].clone()), (second[0].clone(), second[1].clone()), (key, value)]


def range_tensor(*row: tuple[int, int]) -> Tensor:
    others = [(0, 0)] * (len(row) - 1)
    return torch.tensor([[*others, (0, 2)], list(row), [*others, (0, 10)]])


def elsewhere(*shape: int) -> Tensor:
    return torch.ones(shape, device="meta").int()


Case = tuple[Callable[[], dict[str, Any]], str, Callable[[], Any]]

# What is wrong: (the good call, the argument that is another and that the message must name, that argument).
ARGUMENTS: dict[str, Case] = {
    "kv None": (plain, "kv", lambda: None),
    "kv of rank 5": (plain, "kv", lambda: torch.zeros(2, *KEY)),
    "kv of keys alone": (plain, "kv", lambda: torch.zeros(2, 1, *KEY)),
    "kv without layers": (plain, "kv", list),
    "kv a list of keys": (plain, "kv", lambda: [torch.zeros(KEY), torch.zeros(KEY)]),
    "kv a list of None": (plain, "kv", lambda: [None, None]),
    "kv of pairs of rank 3": (plain, "kv", lambda: [(torch.zeros(KEY[1:]),) * 2]),
    "keep None": (plain, "keep", lambda: None),
    "keep of bytes": (plain, "keep", lambda: torch.ones(3, SLOTS, dtype=torch.uint8)),
    "keep of floats": (plain, "keep", lambda: torch.zeros(3, 1, 2)),
    "keep of another batch": (plain, "keep", lambda: torch.ones(2, SLOTS).bool()),
    "keep too narrow": (plain, "keep", lambda: torch.ones(3, SLOTS - 1).bool()),
    "keep of one sequence": (plain, "keep", lambda: torch.ones(SLOTS).bool()),
    "keep elsewhere": (plain, "keep", lambda: elsewhere(3, SLOTS).bool()),
    "ranges of another batch": (plain, "keep", lambda: torch.zeros(2, 1, 2).int()),
    "ranges of three": (plain, "keep", lambda: torch.zeros(3, 1, 3).int()),
    "lists for fewer sequences": (plain, "keep", lambda: [[(0, 1)], []]),
    "lists of three": (plain, "keep", lambda: [[(0, 1, 2)], [], []]),
    "lists of floats": (plain, "keep", lambda: [[(0.0, 1.0)], [], []]),
    "lists of booleans": (plain, "keep", lambda: [[True] * SLOTS] * 3),
    "lengths a list": (plain, "lengths", lambda: [1, 2, 3]),
    "lengths of floats": (plain, "lengths", lambda: torch.ones(3)),
    "lengths of booleans": (plain, "lengths", lambda: torch.ones(3).bool()),
    "lengths of another batch": (plain, "lengths", lambda: torch.ones(2).int()),
    "lengths of rank 2": (plain, "lengths", lambda: torch.ones(3, 1).int()),
    "lengths of rank 0": (plain, "lengths", lambda: torch.tensor(3)),
    "lengths elsewhere": (plain, "lengths", lambda: elsewhere(3)),
    "positions unknown": (plain, "positions", lambda: "drop"),
    "backend unknown": (plain, "backend", lambda: "fast"),
    "inv_freq to keep": (plain, "inv_freq", lambda: torch.rand(DIM // 2)),
    "inv_freq missing": (compact, "inv_freq", lambda: None),
    "inv_freq of wrong size": (compact, "inv_freq", lambda: torch.rand(DIM)),
    "inv_freq of rank 2": (compact, "inv_freq", lambda: torch.rand(1, DIM // 2)),
    "inv_freq elsewhere": (compact, "inv_freq", lambda: elsewhere(DIM // 2).float()),
    "inv_freq for an odd dim": (
        lambda: compact() | {"kv": torch.ones(2, 2, 3, SLOTS, 2, 7)},
        "inv_freq",
        lambda: torch.rand(3),
    ),
    "bytes to turn": (compact, "kv", lambda: kv_cache(2, 3, SLOTS, 2, DIM, dtype=torch.uint8)),
    "base to keep": (lambda: based() | {"inv_freq": None}, "positions", lambda: "keep"),
    "base without positions": (based, "base_positions", lambda: None),
    "positions without base": (based, "base_keys", lambda: None),
    "base of rank 4": (based, "base_keys", lambda: torch.zeros(KEY)),
    "gaps unknown": (paged, "gaps", lambda: "fill"),
    "compact and gaps left": (
        lambda: compact() | paged() | {"gaps": "leave"},
        "positions",
        lambda: "compact",
    ),
    "table of int64": (paged, "block_table", lambda: paged()["block_table"].long()),
    "table a list": (paged, "block_table", lambda: [[0, 1, 2]] * 3),
    "table of rank 1": (paged, "block_table", lambda: torch.ones(3).int()),
    "table elsewhere": (paged, "block_table", lambda: elsewhere(3, 3)),
    "table strided": (paged, "block_table", lambda: paged()["block_table"].T.contiguous().T),
    "paged: keep too wide": (paged, "keep", lambda: torch.ones(3, SLOTS + 1).bool()),
    "paged: lengths of floats": (paged, "lengths", lambda: torch.ones(3)),
    "paged: lengths for fewer sequences": (paged, "lengths", lambda: torch.ones(2).int()),
    "paged: kv of rank 5": (paged, "kv", lambda: torch.zeros(2, 10, 4, 2, DIM)),
    "paged: inv_freq missing": (lambda: compact() | paged(), "inv_freq", lambda: None),
}
# What PyTorch copes with, and with it the reference; a kernel does not.
MEMORY: dict[str, Case] = {
    "kv of integers": (plain, "kv", lambda: torch.zeros(2, 2, *KEY).int()),
    "kv complex": (plain, "kv", lambda: torch.zeros(2, 2, *KEY).cfloat()),
    "kv strided in D": (plain, "kv", lambda: torch.zeros(2, 2, *KEY[:3], 2 * DIM)[..., ::2]),
    "kv transposed": (plain, "kv", lambda: torch.zeros(2, 2, *KEY).mT.contiguous().mT),
    "kv of overlapping windows": (
        plain,
        "kv",
        lambda: torch.zeros(4_000).as_strided((2, 2, *KEY), (1_200, 600, 40, 16, 8, 1)),
    ),
    "a value that is the key": (plain, "kv", lambda: [(key, key) for key in torch.ones(2, *KEY)]),
    "a value that overlaps the key": (
        plain,
        "kv",
        lambda: torch.zeros(2_000).as_strided((2, 2, *KEY), (1_000, 96, 192, 16, 8, 1)),
    ),
    "a layer twice": (plain, "kv", lambda: third_layer(*torch.ones(2, *KEY))[:1] * 2),
    "another dtype": (plain, "kv", lambda: third_layer(*torch.ones(2, *KEY).half())),
    "another shape": (plain, "kv", lambda: third_layer(*torch.ones(2, *KEY[:3], DIM + 1))),
    "fewer slots": (plain, "kv", lambda: third_layer(*torch.ones(2, 3, SLOTS - 1, 2, DIM))),
    "other strides": (plain, "kv", lambda: third_layer(*torch.ones(2, 3, 2, SLOTS, DIM).transpose(2, 3))),
    "values of another shape": (
        plain,
        "kv",
        lambda: third_layer(torch.ones(KEY), torch.ones(3, SLOTS, 1, DIM)),
    ),
    "values of other strides": (
        plain,
        "kv",
        lambda: third_layer(torch.ones(KEY), torch.ones(3, 2, SLOTS, DIM).transpose(1, 2)),
    ),
    "base of fewer layers": (based, "base_keys", lambda: torch.zeros(1, *KEY)),
    "base of another shape": (based, "base_keys", lambda: torch.zeros(2, 3, SLOTS, 1, DIM)),
    "base of another dtype": (based, "base_keys", lambda: torch.zeros(2, *KEY).half()),
    "base strided in D": (based, "base_keys", lambda: torch.zeros(2, *KEY[:3], 2 * DIM)[..., ::2]),
    "base expanded": (based, "base_keys", lambda: torch.zeros(2, 1, *KEY[1:]).expand(2, *KEY)),
    "base_positions int64": (based, "base_positions", lambda: torch.zeros(3, SLOTS).long()),
    "base_positions too few": (based, "base_positions", lambda: torch.zeros(3, 1).int()),
    "base_positions strided": (based, "base_positions", lambda: torch.zeros(SLOTS, 3).int().T),
    "paged: kv strided in D": (paged, "kv", lambda: torch.zeros(2, 2, 10, 4, 2, 2 * DIM)[..., ::2]),
    "paged: kv expanded": (paged, "kv", lambda: torch.zeros(2, 2, 1, 4, 2, DIM).expand(2, 2, 10, 4, 2, DIM)),
}
for _dim in range(6):
    MEMORY[f"kv expanded in dimension {_dim}"] = (
        plain,
        "kv",
        lambda d=_dim: torch.zeros(2, 2, *KEY).narrow(d, 0, 1).expand(2, 2, *KEY),
    )

# Of the second sequence, which has 9 entries.
WRONG_RANGES: dict[str, list[tuple[int, int]]] = {
    "unsorted": [(4, 6), (1, 2)],
    "overlapping": [(1, 5), (4, 6)],
    "the same twice": [(1, 5), (1, 5)],
    "backwards": [(5, 3)],
    "negative": [(-1, 3)],
    "both negative": [(-5, -3)],
    "beyond the length": [(3, 10)],
    "beyond the slots": [(3, SLOTS + 1)],
    "empty past the length": [(0, 3), (10, 10)],
    "wrong after empty ones": [(0, 0), (4, 4), (3, 5)],
    "end of 2^32 + 3": [(2, 2**32 + 3)],
    "begin of 3 - 2^32": [(3 - 2**32, 4)],
}
# On a CUDA device not known to the host.
VALUES: dict[str, Case] = {
    "base: ranges": (based, "keep", lambda: [[], [(1, 5), (4, 6)], []]),
    "base: length": (based, "lengths", lambda: torch.tensor([3, 3, 13])),
    "paged: ranges": (paged, "keep", lambda: [[(0, 2), (5, 6)], [(1, 5), (4, 6)], []]),
    "paged: ranges beyond the length": (paged, "keep", lambda: range_tensor((1, 5), (8, 10))),
    "paged: length negative": (paged, "lengths", lambda: torch.tensor([3, 12, -1])),
    "paged: length beyond the table": (paged, "lengths", lambda: torch.tensor([3, 13, 1])),
}
for _name, _row in WRONG_RANGES.items():
    VALUES[f"ranges {_name}"] = (plain, "keep", lambda row=_row: [[(0, 2), (5, 6)], row, []])
    VALUES[f"range tensor {_name}"] = (plain, "keep", lambda row=_row: range_tensor(*row))
for _length in (-1, SLOTS + 1, 2**31, 2**32 + 3, 3 - 2**32):
    VALUES[f"length {_length}"] = (plain, "lengths", lambda n=_length: torch.tensor([3, n, 3]))
TABLES: dict[str, Case] = {}  # the reference looks at no table
for _page in (-1, 10, 2**31 - 1, -(2**31)):
    TABLES[f"page {_page}"] = (
        paged,
        "block_table",
        lambda page=_page: torch.tensor([[7, 2, 4], [0, 1, 5], [3, 6, page]], dtype=torch.int32),
    )
CHECKED = {
    ("cpu", "cpu"): ARGUMENTS | MEMORY | VALUES | TABLES,
    ("reference", "cpu"): ARGUMENTS | VALUES,
    ("cuda", "cuda"): ARGUMENTS | MEMORY,
    ("reference", "cuda"): ARGUMENTS,
}


@pytest.mark.parametrize(
    ("backend", "device", "wrong"),
    [
        pytest.param(*pair.values, wrong, id=f"{pair.id}-{wrong}", marks=pair.marks)
        for pair in BACKENDS
        for wrong in CHECKED[pair.values]
    ],
)
def test_bad_input(backend: str, device: str, wrong: str) -> None:
    good, name, value = (ARGUMENTS | MEMORY | VALUES | TABLES)[wrong]
    arguments = copied({"backend": backend} | good() | {name: value()}, device)
    before = memory(arguments)
    with pytest.raises((TypeError, ValueError), match=rf"\b{name}\b"):
        call(arguments)
    assert same(memory(arguments), before)


@every_backend
def test_gaps_have_no_default(backend: str, device: str) -> None:
    arguments = copied(paged() | {"backend": backend}, device)
    del arguments["gaps"]
    with pytest.raises(TypeError, match="gaps"):
        call(arguments)


# ------------------------------------------------------------------------------------------------ autograd


@every_backend
@pytest.mark.parametrize("good", GOOD)
def test_in_inference_mode_and_without_gradients(
    backend: str, device: str, good: Callable[[], dict[str, Any]]
) -> None:
    want = copied(good() | {"backend": backend}, device)
    call(want)
    with torch.inference_mode():
        arguments = copied(good() | {"backend": backend}, device)
        call(arguments)
    assert same(memory(arguments), memory(want))
    arguments = copied(good() | {"backend": backend}, device)
    arguments["kv"].requires_grad_()
    with pytest.raises(ValueError, match="^kv: expected a cache without gradients"):
        call(arguments)
    with torch.no_grad():
        call(arguments)
    assert same(memory(arguments), memory(want))


@every_backend
@pytest.mark.parametrize("good", GOOD)
def test_autograd_notices_the_change(backend: str, device: str, good: Callable[[], dict[str, Any]]) -> None:
    """A backward pass that needs what stood in the cache is refused instead of wrong."""
    arguments = copied(good() | {"backend": backend}, device)
    weight = torch.ones(DIM, device=device, requires_grad=True)
    loss = (arguments["kv"] * weight).sum()
    call(arguments)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# ------------------------------------------------------------------------------------------- torch.compile


@pytest.mark.parametrize(("backend", "device"), [x for x in BACKENDS if x.values[0] != "reference"])
@pytest.mark.parametrize("good", GOOD)
@pytest.mark.parametrize(
    ("keep", "dynamic"), [("mask", False), ("mask", True), ("ranges", True), ("lists", False)]
)
def test_compile(
    backend: str, device: str, good: Callable[[], dict[str, Any]], keep: str, dynamic: bool
) -> None:
    torch.compiler.reset()

    def step(arguments: dict[str, Any]) -> tuple[Any, Tensor]:
        arguments["kv"].mul_(2)
        result = call(arguments)
        return result, arguments["kv"].square() + 1

    arguments = good() | {"backend": backend}
    if keep != "mask":
        lists = ranges_of(arguments["keep"], arguments["lengths"].tolist())
        arguments["keep"] = padded(lists) if keep == "ranges" else lists
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    eager, graph = copied(arguments, device), copied(arguments, device)
    (want, want_after), (got, got_after) = step(eager), compiled(graph)
    for ours, theirs in zip(tensors_of([got, got_after]), tensors_of([want, want_after]), strict=True):
        assert torch.equal(ours, theirs)
    assert same(memory(graph), memory(eager))


@pytest.mark.parametrize("based", [False, True])
def test_opcheck_prune_kv_cache(based: bool) -> None:
    cache, length = torch.randn(3, 2, 2, 8, 2, 4), torch.tensor([8, 3], dtype=torch.int32)
    keep = torch.rand(2, 8, generator=torch.Generator().manual_seed(0)) < 0.5
    base = [torch.randn(2, 2, 8, 2, 4)] if based else []
    encoded = torch.arange(16, dtype=torch.int32).view(2, 8) if based else None
    inv_freq = torch.tensor([1.0, 0.1]) if based else None
    keys, values = [cache[:2, 0].clone()], [cache[:2, 1].clone()]
    arguments = keys, values, keep, None, length, inv_freq, base, encoded, None, None, False
    torch.library.opcheck(_library.ops.prune_kv_cache_.default, arguments)


@pytest.mark.parametrize("within", [False, True])
def test_opcheck_prune_pages(within: bool) -> None:
    table, length = torch.arange(6, dtype=torch.int32).view(2, 3), torch.tensor([11, 2], dtype=torch.int32)
    ranges = torch.tensor([[[0, 2], [8, 11]], [[0, 0], [1, 2]]], dtype=torch.int32)
    arguments = table, length, None, ranges, 4, 9, within, False
    torch.library.opcheck(_library.ops.prune_pages.default, arguments)
