"""The memory of a KV cache, bit for bit: what both tests of pruning compare."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import mem1_core
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


def copied(value: Any, device: str | None = None) -> Any:
    """A copy with the same strides, in memory of its own, what lies between the entries included."""
    if isinstance(value, (list, tuple)):
        return type(value)(copied(x, device) for x in value)
    if not isinstance(value, Tensor) or value.is_meta:
        return value
    (everything,) = memory(value)
    place = value.storage_offset(), value.shape, value.stride()
    everything = everything.to(device or value.device)
    empty = torch.empty(0, dtype=value.dtype, device=everything.device)
    return empty.set_(everything.untyped_storage(), *place)


def memory(value: Any) -> list[Tensor]:
    """All bytes behind the tensors in `value`, copied."""
    return [
        torch.empty(0, dtype=torch.uint8, device=t.device).set_(t.untyped_storage()).clone()
        for t in tensors_of(value)
        if not t.is_meta
    ]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
