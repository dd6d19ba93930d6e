"""trajectory_attention on CUDA tensors: three launches, each with its blocks and its tensor descriptors.

Nothing here synchronises, and all memory comes from torch: a CUDA graph can capture both directions once
the kernels are compiled, which their first call does. Under Triton's interpreter (TRITON_INTERPRET=1 before
Triton is imported) the same code runs on CPU tensors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from mem1_core.triton import attention_backward, attention_forward, attention_tiles
from mem1_core.triton.attention_blocks import HEAD_DIMS, blocks, padded_dim

INTERPRETED: bool = triton.knobs.runtime.interpret
TILE: int = attention_tiles.TILE.value
DTYPES = (torch.bfloat16, torch.float16, torch.float32)

# A program of backward_dk_dv sums over as many query heads of a KV head as leave this many programs, some 16
# for each multiprocessor of an H100; torch adds up the rest. With fewer, the program of a key tile that all
# later queries see (a prompt's) is the last to finish by far.
MIN_PROGRAMS = 2048
# Nor over several heads of more tokens than these together: tensor cores cut off a sum where others round it.
# Over 17 heads of a million tokens dV was 7 % off on an H200, as a sum is that is cut off to fp32 at every 16
# of them; over 2^21 tokens that is 0.3 %, no more than to store it in bfloat16.
MAX_SUMMED = 2**21


class Plan(NamedTuple):
    """The mask as the op gets it: evict, then the fields of `TilePlan`; in a window over positions these, the
    limits of the keys and the lists of the key tiles.
    """

    evict: Tensor
    key_ranges: Tensor
    full_offsets: Tensor
    full_tiles: Tensor
    partial_offsets: Tensor
    partial_tiles: Tensor
    query_order: Tensor
    key_order: Tensor
    block_q: int
    block_k: int
    positions: Tensor | None = None
    limits: Tensor | None = None
    key_full_offsets: Tensor | None = None
    key_full_tiles: Tensor | None = None
    key_partial_offsets: Tensor | None = None
    key_partial_tiles: Tensor | None = None

    def lists(self) -> dict[str, Tensor]:
        """What a kernel that walks the lists of key tiles takes."""
        return {
            "full_offsets": self.full_offsets,
            "full_tiles": self.full_tiles,
            "partial_offsets": self.partial_offsets,
            "partial_tiles": self.partial_tiles,
            "order": self.query_order,
        }

    def key_lists(self) -> dict[str, Tensor | None]:
        names = "key_full_offsets key_full_tiles key_partial_offsets key_partial_tiles".split()
        return {name: getattr(self, name) for name in names}


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: Plan,
    scale: float,
    sinks: Tensor | None = None,
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """out [B, N, Hq, Dv] in the dtype of q and lse float32 [B, Hq, N]. A softcap of 0 is none."""
    _check(q, k, v, plan, scale, softcap)
    if sinks is not None:
        _check_tensor("sinks", sinks, (q.shape[2],), torch.float32, q.device)
    dtype = q.dtype
    q, k, v = (_readable(x) for x in (q, k, v))
    batch, tokens, heads, _ = q.shape
    out, lse = _writable(v, heads), q.new_empty(batch, heads, tokens, dtype=torch.float32)
    if out.numel():
        launch = _Launch("forward", dtype, q, k, v, plan, scale, softcap)
        launch(
            attention_forward.forward,
            writers=heads,
            **launch.query_descriptors(q=q),
            **launch.key_descriptors(k=k, v=v),
            **launch.mask(),
            sinks=None if sinks is None else sinks.contiguous(),
            out=out,
            lse=lse,
            **plan.lists(),
        )
    return _trimmed(out, v.shape[3], dtype), lse


def backward(
    d_out: Tensor,
    d_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    plan: Plan,
    scale: float,
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk and dv, contiguous, in the shapes and dtype of q, k and v. No atomics: bitwise repeatable."""
    _check(q, k, v, plan, scale, softcap)
    for name, x in (("d_out", d_out), ("out", out)):
        _check_tensor(name, x, (*q.shape[:3], v.shape[3]), q.dtype, q.device)
    per_row = q.shape[0], q.shape[2], q.shape[1]
    _check_tensor("lse", lse, per_row, torch.float32, q.device)
    if d_lse is not None:
        _check_tensor("d_lse", d_lse, per_row, torch.float32, q.device)
    dtype = q.dtype
    d_out, q, k, v, out = (_readable(x) for x in (d_out, q, k, v, out))
    batch, tokens, heads, dim = q.shape
    kv_heads = k.shape[2]
    if q.numel() == 0:
        dq, dk, dv = (x.new_zeros(x.shape, dtype=dtype) for x in (q, k, v))
        return dq, dk, dv
    dq = _writable(q, heads)
    row_lse, row_delta = q.new_empty(2, batch * heads, _cdiv(tokens, TILE) * TILE, dtype=torch.float32)
    launch = _Launch("backward_dq", dtype, q, k, v, plan, scale, softcap)
    launch(
        attention_backward.backward_dq,
        writers=heads,
        **launch.query_descriptors(q=q, out=out, d_out=d_out),
        **launch.key_descriptors(k=k, v=v),
        **launch.mask(),
        lse=lse.contiguous(),
        d_lse=None if d_lse is None else d_lse.contiguous(),
        row_lse=row_lse,
        row_delta=row_delta,
        dq=dq,
        **plan.lists(),
    )
    launch = _Launch("backward_dk_dv", dtype, q, k, v, plan, scale, softcap)
    programs = plan.key_order.numel() * launch.copies * heads
    group = heads // kv_heads
    heads_per_program = max(
        s
        for s in range(1, group + 1)
        if s == 1 or group % s == 0 and programs >= MIN_PROGRAMS * s and tokens * s <= MAX_SUMMED
    )
    dk, dv = (_writable(x, heads // heads_per_program) for x in (k, v))
    launch(
        attention_backward.backward_dk_dv,
        writers=heads // heads_per_program,
        **launch.query_descriptors(q=q, d_out=d_out),
        **launch.key_descriptors(k=k, v=v),
        row_lse_desc=TensorDescriptor.from_tensor(row_lse, [1, launch.blocks.q]),
        row_delta_desc=TensorDescriptor.from_tensor(row_delta, [1, launch.blocks.q]),
        evict=plan.evict,
        positions_desc=launch.of_tokens(plan.positions, launch.blocks.q),
        limits=plan.limits,
        dk=dk,
        dv=dv,
        ranges=plan.key_ranges,
        **plan.key_lists(),
        order=plan.key_order,
        heads_per_program=heads_per_program,
        SEVERAL_HEADS=heads_per_program > 1,
    )
    if heads_per_program < group:
        dk, dv = (x.unflatten(2, (kv_heads, -1)).sum(3) for x in (dk, dv))
    dq, dk, dv = (_trimmed(x, like.shape[3], dtype) for x, like in ((dq, q), (dk, k), (dv, v)))
    return dq, dk, dv


class _Launch:
    """One kernel on one problem: its blocks, the arguments that follow from the shapes, its grid."""

    def __init__(
        self,
        kernel: str,
        dtype: torch.dtype,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        plan: Plan,
        scale: float,
        softcap: float,
    ) -> None:
        self.q, self.plan = q, plan
        self.batch, self.tokens, self.heads, self.dim = q.shape
        self.value_dim = v.shape[3]
        self.group = self.heads // k.shape[2]
        self.copies = self.batch // plan.evict.shape[0]  # batches that share a row of the plan
        widest = max(self.dim, self.value_dim)
        hopper, plain = _capability(q.device)[0] == 9, not softcap and plan.positions is None
        self.blocks = blocks(kernel, widest, dtype, hopper, plain)
        self.load_on_use = dtype == torch.float32
        # With a cap scores are cap * tanh(cap_scale * q k).
        self.scale = (softcap or scale) * math.log2(math.e)
        self.cap_scale = scale / softcap if softcap else None
        # Of the rows that a kernel writes; both where they differ.
        units, v_units = (_cdiv(dim, _step(q)) for dim in (self.dim, self.value_dim))
        self.units: dict[str, int | None] = {"units": v_units if kernel == "forward" else units}
        if kernel == "backward_dk_dv":
            self.units["v_units"] = None if v_units == units else v_units
        # Of the tokens that a program writes.
        self.block = self.blocks.k if kernel == "backward_dk_dv" else self.blocks.q

    def __call__(self, kernel: Any, *, writers: int, order: Tensor, **arguments: Any) -> None:
        """`writers`: programs for each block of tokens."""
        programs = order.numel() * self.copies * (TILE // self.block) * writers
        with torch.cuda.device_of(self.q):
            kernel[(programs,)](
                **arguments,
                order=order,
                copies=self.copies,
                tokens=self.tokens,
                **self.units,
                scale=self.scale,
                cap_scale=self.cap_scale,
                heads=self.heads,
                group=self.group,
                CHUNK=self.blocks.chunk,
                CHUNKS=_cdiv(padded_dim(self.dim), self.blocks.chunk),
                V_CHUNKS=_cdiv(padded_dim(self.value_dim), self.blocks.chunk),
                LOAD_ON_USE=self.load_on_use,
                BLOCK_Q=self.blocks.q,
                BLOCK_K=self.blocks.k,
                num_warps=self.blocks.warps,
                num_stages=self.blocks.stages,
                enable_fp_fusion=True,
            )

    def query_descriptors(self, **tensors: Tensor) -> dict[str, TensorDescriptor]:
        """`<name>_desc` for [B, N, H, D] tensors that are read by query blocks."""
        return {
            f"{name}_desc": _descriptor(x, self.blocks.q, self.blocks.chunk) for name, x in tensors.items()
        }

    def key_descriptors(self, **tensors: Tensor) -> dict[str, TensorDescriptor]:
        return {
            f"{name}_desc": _descriptor(x, self.blocks.k, self.blocks.chunk) for name, x in tensors.items()
        }

    def mask(self) -> dict[str, Any]:
        """What a kernel that walks key tiles takes of the mask beside the lists."""
        plan = self.plan
        return {
            "evict_desc": self.of_tokens(plan.evict, self.blocks.k),
            "positions": plan.positions,
            "limit_desc": self.of_tokens(plan.limits, self.blocks.k),
        }

    def of_tokens(self, table: Tensor | None, block: int) -> TensorDescriptor | None:
        """A descriptor of an int32 [rows, N] that reads a block of a row."""
        if table is None:
            return None
        table = _readable(table)
        return TensorDescriptor(table, list(table.shape), [*_strides(table), 1], [1, block])


def _descriptor(x: Tensor, rows: int, chunk: int) -> TensorDescriptor:
    """A descriptor of x [B, N, H, D] as [B, H, N, D] that reads [rows, chunk] of a head at a time."""
    batch, tokens, heads, dim = x.shape
    by_batch, by_token, by_head = _strides(x)
    return TensorDescriptor(
        x, [batch, heads, tokens, dim], [by_batch, by_head, by_token, 1], [1, 1, rows, chunk]
    )


def _strides(x: Tensor) -> list[int]:
    """Of all dimensions but the last. That of a dimension of size 1 says nothing: it becomes 16 bytes."""
    return [s if n > 1 else _step(x) for n, s in zip(x.shape[:-1], x.stride()[:-1], strict=True)]


def _cdiv(a: int, b: int) -> int:
    """Rounded up. Triton's own, which a kernel may call too, takes the host 3 us."""
    return -(-a // b)


def _step(x: Tensor) -> int:
    """The elements in 16 bytes, the unit in which the copy engine wants every address and stride."""
    return 16 // x.element_size()


def _readable(x: Tensor) -> Tensor:
    """x where a descriptor can read it, else a copy.

    Under the interpreter, which computes garbage with bfloat16, that becomes float32.
    """
    if INTERPRETED and x.dtype == torch.bfloat16:
        x = x.float()
    if x.data_ptr() % 16 or x.stride(-1) != 1 or any(s == 0 or s % _step(x) for s in _strides(x)):
        padded = x.new_empty(*x.shape[:-1], _cdiv(x.shape[-1], _step(x)) * _step(x))
        padded[..., : x.shape[-1]] = x
        x = padded[..., : x.shape[-1]]
    return x


def _writable(x: Tensor, heads: int) -> Tensor:
    """[B, N, heads, D] for a kernel to write, D that of x rounded up to a multiple of 16 bytes."""
    batch, tokens, _, dim = x.shape
    return x.new_empty(batch, tokens, heads, _cdiv(dim, _step(x)) * _step(x))


def _trimmed(x: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    """The first `dim` channels of what a kernel wrote, contiguous."""
    return x[..., :dim].to(dtype).contiguous()


@cache
def _capability(device: torch.device) -> tuple[int, int]:
    """The device's compute capability; that of Hopper under the interpreter."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)


def _check(q: Tensor, k: Tensor, v: Tensor, plan: Plan, scale: float, softcap: float) -> None:
    """What a direct call of the op may get wrong, short of reading values, which would synchronise."""
    if not (q.is_cuda or INTERPRETED):
        raise ValueError(f"backend: 'triton': expected cuda tensors, got one on {q.device.type}")
    major, minor = _capability(q.device)
    if major < 8:
        raise NotImplementedError(
            f"trajectory_attention: expected a GPU of compute capability 8.0 or later, got {major}.{minor}"
        )
    if q.dtype not in DTYPES:
        raise TypeError(f"q: expected bfloat16, float16 or float32 on CUDA, got {q.dtype}")
    batch, tokens, heads, dim = q.shape
    for name, x in (("q", q), ("v", v)):
        if x.shape[3] > HEAD_DIMS[-1]:
            raise ValueError(f"{name}: expected dim <= {HEAD_DIMS[-1]} on CUDA, got {x.shape[3]}")
    kv_heads = k.shape[2]
    _check_tensor("k", k, (batch, tokens, kv_heads, dim), q.dtype, q.device)
    _check_tensor("v", v, (*k.shape[:3], v.shape[3]), q.dtype, q.device)
    if kv_heads == 0 or heads % kv_heads:
        raise ValueError(f"q: expected a multiple of the {kv_heads} heads of k, got {heads}")
    if (plan.block_q, plan.block_k) != (TILE, TILE):
        raise ValueError(
            f"mask: expected a plan of {TILE} x {TILE} tiles, got {plan.block_q} x {plan.block_k}"
        )
    rows = plan.evict.shape[0]
    if rows not in (1, batch):
        raise ValueError(f"mask: expected evict of batch 1 or {batch}, got {rows}")
    tiles = _cdiv(tokens, TILE)
    shapes: dict[str, Sequence[int]] = {
        "evict": (rows, tokens),
        "key_ranges": (rows, tiles, 4),
        "full_offsets": (rows * tiles + 1,),
        "partial_offsets": (rows * tiles + 1,),
        "query_order": (rows * tiles,),
        "key_order": (rows * tiles,),
        "full_tiles": plan.full_tiles.shape,
        "partial_tiles": plan.partial_tiles.shape,
    }
    if plan.positions is not None:
        for name in ("positions", "limits"):
            shapes[name] = (rows, tokens)
        for name in ("key_full_offsets", "key_partial_offsets"):
            shapes[name] = (rows * tiles + 1,)
    for name, shape in shapes.items():
        x = getattr(plan, name)
        _check_tensor(name, x, shape, torch.int32, q.device)
        if not x.is_contiguous():
            raise ValueError(f"{name}: expected a contiguous tensor, got strides {list(x.stride())}")
    if scale <= 0:
        raise ValueError(f"scale: expected > 0 here (mem1_core.ops takes any), got {scale}")
    if softcap < 0:
        raise ValueError(f"softcap: expected > 0, or 0 for none, got {softcap}")


def _check_tensor(
    name: str, x: Tensor, shape: Sequence[int], dtype: torch.dtype, device: torch.device
) -> None:
    if x.shape != tuple(shape):
        raise ValueError(f"{name}: expected shape {list(shape)}, got {list(x.shape)}")
    if x.dtype != dtype:
        raise TypeError(f"{name}: expected {dtype}, got {x.dtype}")
    if x.device != device:
        raise ValueError(f"{name}: expected a tensor on {device}, got one on {x.device}")
