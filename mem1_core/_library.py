"""Loads the compiled part: afterwards `ops` has the registered ops, with fakes and gradients.

Nothing else imports `_C`.
"""

from __future__ import annotations

from typing import Any

import torch  # first: _C must find torch's OpenMP runtime already loaded, or there are two
from torch import Tensor

try:
    from mem1_core import _C
except ImportError as error:
    raise ImportError(
        f"mem1_core: its compiled part does not load into torch {torch.__version__}; build it for this torch "
        f"with `pip install .` ({error})"
    ) from error

ops = torch.ops.mem1_core

version: str = _C.version()
cuda_architectures = _C.cuda_architectures


def _lse_dtype(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


@torch.library.register_fake("mem1_core::tile_plan")
def _(evict: Tensor, block_q: int, block_k: int) -> tuple[Tensor, ...]:
    context = torch.library.get_ctx()
    batch, length = evict.shape
    offsets = batch * ((length + block_q - 1) // block_q) + 1
    sizes = offsets, context.new_dynamic_size(), offsets, context.new_dynamic_size()
    key_ranges = evict.new_empty(batch, (length + block_k - 1) // block_k, 4)
    return key_ranges, *(evict.new_empty(size) for size in sizes)


@torch.library.register_fake("mem1_core::trajectory_attention")
def _(q: Tensor, k: Tensor, v: Tensor, *plan_and_scale: Any) -> tuple[Tensor, Tensor]:
    batch, length, heads, _ = q.shape
    return q.new_empty(q.shape), q.new_empty(batch, heads, length, dtype=_lse_dtype(q))


@torch.library.register_fake("mem1_core::trajectory_attention_backward")
def _(
    d_out: Tensor, d_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, *saved: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup_attention(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.block_q, ctx.block_k, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.set_materialize_grads(False)


def _backward_attention(ctx: Any, d_out: Tensor | None, d_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, *plan, out, lse = ctx.saved_tensors
    if d_out is None:
        d_out = torch.zeros_like(out)
    elif d_out.stride(-1) != 1:
        d_out = d_out.contiguous()
    gradients = ops.trajectory_attention_backward(
        d_out, d_lse, q, k, v, out, lse, *plan, ctx.block_q, ctx.block_k, ctx.scale
    )
    return *gradients, *[None] * (len(plan) + 3)


def _no_second_derivative(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
    raise NotImplementedError(
        "trajectory_attention: has no second derivative; backend='reference' is differentiable twice"
    )


torch.library.register_autograd("mem1_core::trajectory_attention_backward", _no_second_derivative)
torch.library.register_autograd(
    "mem1_core::trajectory_attention", _backward_attention, setup_context=_setup_attention
)
