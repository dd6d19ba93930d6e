"""cached_attention on the CPU: decode steps and prefill of a KV cache, as a rollout has them.

All rows are as long as one another, so that the peers need no mask for ragged lengths: SDPA on slices of the
cache, with the query heads of a KV head as rows of queries (K and V are then read once), with grouped heads,
and with K and V repeated for every query head. A decode step reads the cache once, which are the bytes of its
table; the copy of as many, half read and half written, is a scale. The FLOPs of prefill count visible pairs
alone; SDPA is given the dense mask, made beforehand.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from attention_task import FLOPS
from measure import Candidate
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from mem1_core.ops import cached_attention
from mem1_core.testing import assert_accurate, eager_attention

OURS, ROWS, GROUPED, REPEATED = (
    "cached_attention", "SDPA, heads as query rows", "SDPA enable_gqa", "SDPA, K and V repeated",
)  # fmt: skip
SPARE = 64  # entries of the cache after every row
both_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


class Shape(NamedTuple):
    rows: int
    length: int
    queries: int
    heads: int
    kv_heads: int
    dim: int

    def __str__(self) -> str:
        new, past = self.queries, self.length - self.queries
        what = f"{self.length:,} tokens" if new == 1 else f"{new} new tokens over {past}"
        return f"{self.rows} rows of {what}, Hq {self.heads}, Hkv {self.kv_heads}, D {self.dim}"


DECODE = [Shape(32, 1_000, 1, 14, 2, 64), Shape(16, 900, 1, 4, 2, 32), Shape(8, 1_000, 1, 32, 8, 128)]
PREFILL = Shape(4, 1_300, 400, 14, 2, 64)


class Task:
    def __init__(self, shape: Shape, dtype: torch.dtype) -> None:
        self.shape, generator = shape, torch.Generator().manual_seed(0)
        rows, length, queries, heads, kv_heads, dim = shape
        kv = torch.randn(2, rows, length + SPARE, kv_heads, dim, generator=generator).to(dtype)
        self.q = torch.randn(rows, queries, heads, dim, generator=generator).to(dtype)
        self.keys, self.values = kv
        self.lengths = torch.full((rows,), length, dtype=torch.int32)
        self.visible = torch.arange(length) <= torch.arange(length - queries, length)[:, None]
        self.mask = None if queries == 1 else self.visible
        self.mask_of_group = None if queries == 1 else self.visible.repeat(heads // kv_heads, 1)
        seen = kv[:, :, :length]
        self.eager = eager_attention(self.q, *seen, self.visible[None])
        self.exact = eager_attention(self.q.double(), *seen.double(), self.visible[None])

    def heads_first(self) -> list[Tensor]:
        return [x[:, : self.shape.length].transpose(1, 2) for x in (self.keys, self.values)]

    def ours(self) -> Tensor:
        return cached_attention(self.q, self.keys, self.values, self.lengths)

    def query_rows(self) -> Tensor:
        rows, _, queries, heads, kv_heads, dim = self.shape
        q = self.q.view(rows, queries, kv_heads, -1, dim).permute(0, 2, 3, 1, 4).flatten(2, 3)
        out = scaled_dot_product_attention(q, *self.heads_first(), attn_mask=self.mask_of_group)
        return out.unflatten(2, (heads // kv_heads, queries)).permute(0, 3, 1, 2, 4).flatten(2, 3)

    def grouped(self) -> Tensor:
        q, (k, v) = self.q.transpose(1, 2), self.heads_first()
        return scaled_dot_product_attention(q, k, v, attn_mask=self.mask, enable_gqa=True).transpose(1, 2)

    def repeated(self) -> Tensor:
        group = self.shape.heads // self.shape.kv_heads
        k, v = (x.repeat_interleave(group, 1) for x in self.heads_first())
        return scaled_dot_product_attention(self.q.transpose(1, 2), k, v, attn_mask=self.mask).transpose(1, 2)

    def candidates(self) -> list[Candidate]:
        def check(factor: float, out: Tensor) -> None:
            assert_accurate(out, self.eager, self.exact, factor)

        peers: dict[str, Callable[[], Tensor]]
        peers = {ROWS: self.query_rows, GROUPED: self.grouped, REPEATED: self.repeated}
        ours = Candidate(OURS, self.ours, partial(check, 2))
        return [ours, *(Candidate(name, run, partial(check, 4), peer=True) for name, run in peers.items())]


@both_dtypes
@pytest.mark.parametrize("shape", DECODE, ids=["Qwen2.5-0.5B", "mem1 train", "Qwen3-8B"])
def test_decode(bench: Any, shape: Shape, dtype: torch.dtype) -> None:
    shape = shape if bench.measuring else shape._replace(rows=2, length=70)
    task, (rows, length, _, _, kv_heads, dim) = Task(shape, dtype), shape
    read = 2 * rows * length * kv_heads * dim * dtype.itemsize
    title = f"decode, {str(dtype).removeprefix('torch.')}, {shape}"
    bench.compare(title, task.candidates(), moved_bytes=read, budget_s=3.0)


@both_dtypes
def test_prefill(bench: Any, dtype: torch.dtype) -> None:
    shape = PREFILL if bench.measuring else PREFILL._replace(rows=2, length=130, queries=40)
    task, title = Task(shape, dtype), f"prefill, {str(dtype).removeprefix('torch.')}, {shape}"
    flops = float(FLOPS["forward"] * shape.rows * int(task.visible.sum()) * shape.heads * shape.dim)
    bench.compare(title, task.candidates(), flops=flops, dtype=dtype, budget_s=5.0)
