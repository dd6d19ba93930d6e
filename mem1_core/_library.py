"""Loads the compiled part: afterwards `ops` has the registered ops, with fakes and gradients.

Nothing else imports `_C`.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch  # first: _C must find torch's OpenMP runtime already loaded, or there are two
from torch import Tensor

from mem1_core.versions import warn_if_untested

warn_if_untested(torch)
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


def _tile_plan_cuda(evict: Tensor, block_q: int, block_k: int) -> tuple[Tensor, ...]:
    """The plan of a CUDA mask, made on its device: the host does not synchronise.

    Both lists are allocated at their upper bound, every tile on or below the diagonal, and filled as far as
    their offsets say. A C library built without nvcc has no CUDA code: there the host plans and the result is
    the same; the only difference is a copy and a synchronisation. Raises TypeError for anything but int32
    [batch, length], ValueError for a block size out of range or a bound that int32 offsets do not reach.
    """
    if evict.dtype != torch.int32 or evict.dim() != 2:
        raise TypeError(f"evict: expected int32 [batch, length], got {evict.dtype} {list(evict.shape)}")
    if not (0 < block_q <= 2**20 and 0 < block_k <= 2**20):
        raise ValueError(f"block_q, block_k: expected 1 to 2^20, got {block_q}, {block_k}")
    batch, length = evict.shape
    ends = torch.arange(block_q, length + block_q, block_q, device="cpu").clamp(max=length)
    bound = batch * int(((ends + block_k - 1) // block_k).sum())
    if bound >= 2**31:
        raise ValueError(
            f"block_q, block_k: expected fewer than 2^31 tiles up to the diagonal, got {bound} for evict "
            f"of shape {list(evict.shape)}: take larger blocks"
        )
    evict = evict.contiguous()  # a copy dies with this call: its memory goes to later work of the same stream
    key_ranges = evict.new_empty(batch, (length + block_k - 1) // block_k, 4)
    offsets = batch * len(ends) + 1
    plan = key_ranges, *(evict.new_empty(size) for size in (offsets, bound, offsets, bound))
    if cuda_architectures():
        with torch.cuda.device(evict.device):
            stream = torch.cuda.current_stream(evict.device).cuda_stream
            addresses = (part.data_ptr() for part in (evict, *plan))
            _C.tile_plan_cuda(stream, batch, length, block_q, block_k, *addresses)
    else:
        for part, planned in zip(plan, ops.tile_plan(evict.cpu(), block_q, block_k), strict=True):
            part.view(-1)[: planned.numel()] = planned.view(-1)
    return plan


torch.library.impl("mem1_core::tile_plan", "cuda", _tile_plan_cuda)


@torch.library.register_fake("mem1_core::cached_attention")
def _(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_batch_idx: Tensor,
    cache_seqlens: Tensor,
    query_lens: Tensor,
    scale: float,
    lanes: int | None = None,
    evict: Tensor | None = None,
    sinks: Tensor | None = None,
    softcap: float = 0.0,
) -> Tensor:
    return q.new_empty(*q.shape[:3], v_cache.shape[3])


@torch.library.register_fake("mem1_core::prune_kv_cache_")
def _(
    keys: list[Tensor],
    values: list[Tensor],
    mask: Tensor | None,
    ranges: Tensor | None,
    lengths: Tensor,
    inv_freq: Tensor | None,
    base_keys: list[Tensor],
    base_positions: Tensor | None,
    source_rows: Tensor | None,
    target_rows: Tensor | None,
    within_rows: bool,
) -> Tensor:
    rows = source_rows.shape[1] if within_rows and source_rows is not None else 1
    return lengths.new_empty(lengths.shape[0] * rows)


@torch.library.register_fake("mem1_core::prune_pages")
def _(
    block_table: Tensor,
    lengths: Tensor,
    mask: Tensor | None,
    ranges: Tensor | None,
    page_size: int,
    pages: int,
    within_pages: bool,
    compact: bool,
) -> tuple[Tensor, ...]:
    new = torch.empty_like(block_table), torch.empty_like(block_table), torch.empty_like(lengths)
    return *new, block_table.new_empty(pages)


def on_current_stream(op: Any, device: torch.device, *arguments: Any) -> Any:
    """`op`, whose last argument is the CUDA stream that is current on `device`; 0 on the CPU, which has
    none.
    """
    if device.type == "cpu":
        return op(*arguments, 0)
    with torch.cuda.device(device):
        return op(*arguments, torch.cuda.current_stream(device).cuda_stream)


def _launched(op: Any, lengths_at: int, *arguments: Any) -> Any:
    return on_current_stream(op, arguments[lengths_at].device, *arguments)


# Their lengths are the fifth and the second argument.
torch.library.impl("mem1_core::prune_kv_cache_", "cuda", partial(_launched, ops._launch_prune_kv_cache_, 4))
torch.library.impl("mem1_core::prune_pages", "cuda", partial(_launched, ops._launch_prune_pages, 1))


def _fake_attention(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    batch, length, heads, _ = q.shape
    return q.new_empty(batch, length, heads, v.shape[3]), q.new_empty(
        batch, heads, length, dtype=_lse_dtype(q)
    )


def _fake_attention_backward(
    d_out: Tensor, d_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, *saved: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


_SCALE_AT = 3 + 8 + 3  # inputs up to the scale: q, k, v; evict and the plan; two block sizes and the scale
_WINDOW = 6  # then: positions, limits and the lists of key tiles


def _setup_attention(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.block_q, ctx.block_k, ctx.scale = inputs[:_SCALE_AT]
    *window, sinks, ctx.softcap = inputs[_SCALE_AT:]
    ctx.save_for_backward(*tensors, *output, *window, sinks)
    ctx.set_materialize_grads(False)


def _backward_attention(
    backward: Any, ctx: Any, d_out: Tensor | None, d_lse: Tensor | None
) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors  # read once, as gradient checkpointing wants it
    q, k, v, *plan, out, lse = saved[: _SCALE_AT - 1]
    *window, sinks = saved[_SCALE_AT - 1 :]
    if d_out is None:
        d_out = torch.zeros_like(out)
    elif d_out.stride(-1) != 1:
        d_out = d_out.clone(
            memory_format=torch.contiguous_format
        )  # contiguous() leaves an empty one as it is
    sizes = ctx.block_q, ctx.block_k, ctx.scale
    gradients = backward(d_out, d_lse, q, k, v, out, lse, *plan, *sizes, *window, ctx.softcap)
    d_sinks = None
    if sinks is not None and ctx.needs_input_grad[_SCALE_AT + _WINDOW]:
        # A sink is a key whose value is 0: of dS = P (dP - delta) only - P delta is left.
        delta = (d_out.to(lse.dtype) * out).sum(-1).transpose(1, 2)
        delta = delta if d_lse is None else delta - d_lse
        d_sinks = -((sinks[:, None] - lse).exp() * delta).sum((0, 2))
    return *gradients, *[None] * (len(plan) + 3 + len(window)), d_sinks, None


def _no_second_derivative(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
    raise NotImplementedError(
        "trajectory_attention: has no second derivative; backend='reference' is differentiable twice"
    )


def _differentiable(op: Any, backward: Any) -> Any:
    """The kernel of `op` for the Autograd key.

    torch's register_autograd makes the same, but asks the schema for its list of arguments twice for each of
    them: with 22 that took 150 us of a call.
    """

    class Attention(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
            with torch._C._AutoDispatchBelowAutograd():
                output = op(*inputs)
            _setup_attention(ctx, inputs, output)
            return output

        @staticmethod
        def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
            return _backward_attention(backward, ctx, *gradients)

    def kernel(*inputs: Any) -> tuple[Tensor, Tensor]:
        inputs = _with_defaults(inputs, _SCALE_AT + _WINDOW + 2)
        if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in inputs):
            return Attention.apply(*inputs)
        with torch._C._AutoDispatchBelowAutograd():
            return op(*inputs)

    return kernel


for _name in ("trajectory_attention", "trajectory_attention_triton"):
    _forward, _backward = f"mem1_core::{_name}", f"mem1_core::{_name}_backward"
    torch.library.register_fake(_forward, _fake_attention)
    torch.library.register_fake(_backward, _fake_attention_backward)
    torch.library.register_autograd(_backward, _no_second_derivative)
    _op, _op_backward = getattr(ops, _name), getattr(ops, f"{_name}_backward")
    torch.library.impl(_forward, "Autograd", _differentiable(_op, _op_backward))


def _with_defaults(given: tuple[Any, ...], count: int) -> tuple[Any, ...]:
    """The optional arguments of an op, `softcap` the last: the dispatcher leaves out trailing defaults."""
    missing = count - len(given)
    return (*given, *[None] * (missing - 1), 0.0) if missing else given


# Triton is loaded by the first call that needs it. Interpreted, its kernels take CPU tensors as well.
@torch.library.impl("mem1_core::trajectory_attention_triton", ("cpu", "cuda"))
def _(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    from mem1_core.triton import attention_launch

    *plan, scale = rest[: _SCALE_AT - 3]
    *window, sinks, softcap = _with_defaults(rest[_SCALE_AT - 3 :], _WINDOW + 2)
    return attention_launch.forward(q, k, v, attention_launch.Plan(*plan, *window), scale, sinks, softcap)


@torch.library.impl("mem1_core::trajectory_attention_triton_backward", ("cpu", "cuda"))
def _(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    from mem1_core.triton import attention_launch

    d_out, d_lse, q, k, v, out, lse = arguments[:7]
    *plan, scale = arguments[7 : _SCALE_AT + 4]
    *window, softcap = _with_defaults(arguments[_SCALE_AT + 4 :], _WINDOW + 1)
    of_mask = attention_launch.Plan(*plan, *window)
    return attention_launch.backward(d_out, d_lse, q, k, v, out, lse, of_mask, scale, softcap)
