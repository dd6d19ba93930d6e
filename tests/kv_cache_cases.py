"""What the tests of pruning share: backends, a small call of each kind, a cache's memory bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import mem1_core
from mem1_core.ops import prune_kv_cache_, prune_paged_kv_cache_
from mem1_core.sample_inputs import keep_mask, kv_cache
from mem1_core.testing import kv_cache_backends

BACKENDS = [
    pytest.param(
        *pair,
        id="-".join(pair),
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(not mem1_core.cuda_architectures(), reason="built without nvcc"),
        ]
        if pair[1] == "cuda"
        else [],
    )
    for pair in kv_cache_backends()
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.uint8]
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits(x: Tensor) -> Tensor:
    """The same memory as integers, which equal themselves whatever they mean."""
    return x.view(_INTEGERS[x.element_size()])


def layers_of(kv: Any) -> list[tuple[Tensor, Tensor]]:
    """Keys and values of each layer, in any form that the ops take, as `bits`."""
    return [(bits(layer[0]), bits(layer[1])) for layer in kv]


def tensors_of(value: Any) -> list[Tensor]:
    """The tensors in a tensor, a sequence or a dict of such; other things have none."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [t for x in value for t in tensors_of(x)] if isinstance(value, (list, tuple)) else []


def copied(value: Any, device: str | None = None, copies: dict[int, Tensor] | None = None) -> Any:
    """A copy in other memory: the same strides, the same bytes between the entries, the same sharing."""
    copies = {} if copies is None else copies
    if isinstance(value, (list, tuple)):
        return type(value)(copied(x, device, copies) for x in value)
    if isinstance(value, dict):
        return {key: copied(x, device, copies) for key, x in value.items()}
    if not isinstance(value, Tensor) or value.is_meta:
        return value
    address = value.untyped_storage().data_ptr()
    if address not in copies:
        (everything,) = memory(value)
        copies[address] = everything.to(device or value.device)
    empty = torch.empty(0, dtype=value.dtype, device=copies[address].device)
    storage = copies[address].untyped_storage()
    return empty.set_(storage, value.storage_offset(), value.shape, value.stride())


def memory(value: Any) -> list[Tensor]:
    """All bytes of the tensors in `value`, copied."""
    return [
        torch.empty(0, dtype=torch.uint8, device=t.device).set_(t.untyped_storage()).clone()
        for t in tensors_of(value)
        if not t.is_meta
    ]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def padded(ranges: list[list[tuple[int, int]]], front: bool = False) -> Tensor:
    """[B, R, 2] with empty ranges after (or before) the real ones."""
    count = max(map(len, ranges), default=0)
    rows = []
    for row in ranges:
        fill = (row[0][0],) * 2 if row and front else (row[-1][1],) * 2 if row else (0, 0)
        more = [fill] * (count - len(row))
        rows.append([*more, *row] if front else [*row, *more])
    return torch.tensor(rows, dtype=torch.int64).reshape(len(ranges), count, 2)


# ------------------------------------------------------------------------------------------------- calls

SLOTS, DIM = 12, 8
KEY = (3, SLOTS, 2, DIM)  # of one layer


def plain() -> dict[str, Any]:
    return {
        "kv": kv_cache(2, 3, SLOTS, 2, DIM),
        "keep": keep_mask("random", [SLOTS] * 3, SLOTS),
        "lengths": torch.tensor([SLOTS, 9, 10]),
    }


def compact() -> dict[str, Any]:
    return {**plain(), "positions": "compact", "inv_freq": 100.0 ** -torch.linspace(0, 1, DIM // 2)}


def based() -> dict[str, Any]:
    base = kv_cache(2, 3, SLOTS, 2, DIM, seed=1)[:, 0]
    return {**compact(), "base_keys": base, "base_positions": torch.arange(SLOTS).int().repeat(3, 1)}


def paged() -> dict[str, Any]:
    """3 sequences of up to 3 pages of 4."""
    table = torch.tensor([[7, 2, 4], [0, 1, 5], [3, 6, 8]], dtype=torch.int32)
    return {**plain(), "kv": kv_cache(2, 10, 4, 2, DIM), "block_table": table, "gaps": "close"}


def call(arguments: dict[str, Any]) -> Any:
    return (prune_paged_kv_cache_ if "block_table" in arguments else prune_kv_cache_)(**arguments)


GOOD = [plain, compact, based, paged]
