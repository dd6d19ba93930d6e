"""trajectory_attention: attention in which every key has a lifetime."""

from __future__ import annotations

import importlib.util
import math
from typing import Literal, overload

from torch import Tensor

from mem1_core import _library, reference
from mem1_core.backend import check_sinks, check_softcap, check_whole, choose_backend, is_number
from mem1_core.mask import DEFAULT_BLOCKS, TrajectoryMask

_AVAILABLE = ("cpu", *(["triton"] if importlib.util.find_spec("triton") else []), "reference")


@overload
def trajectory_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: TrajectoryMask,
    scale: float | None = ...,
    return_lse: Literal[False] = ...,
    deterministic: bool = ...,
    backend: str = ...,
    *,
    window: int | None = ...,
    positions: Tensor | None = ...,
    sinks: Tensor | None = ...,
    softcap: float | None = ...,
) -> Tensor: ...
@overload
def trajectory_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: TrajectoryMask,
    scale: float | None = ...,
    *,
    return_lse: Literal[True],
    deterministic: bool = ...,
    backend: str = ...,
    window: int | None = ...,
    positions: Tensor | None = ...,
    sinks: Tensor | None = ...,
    softcap: float | None = ...,
) -> tuple[Tensor, Tensor]: ...
def trajectory_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: TrajectoryMask,
    scale: float | None = None,
    return_lse: bool = False,
    deterministic: bool = False,
    backend: str = "auto",
    *,
    window: int | None = None,
    positions: Tensor | None = None,
    sinks: Tensor | None = None,
    softcap: float | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Softmax attention where query `i` sees the keys `j <= i < evict[j]`. Differentiable in q, k, v, sinks.

    .. math:: o_i = \sum_{j \le i < e_j} \exp(s_{ij} - \ell_i) v_j, \quad
              s_{ij} = \text{scale} \cdot q_i \cdot k_j, \quad
              \ell_i = \log \Big(\exp \text{sink} + \sum_{j \le i < e_j} \exp s_{ij}\Big)

    With `window` only keys with `pos_i - pos_j < window` count, as in Mistral (arXiv 2310.06825); with
    `softcap` scores are `softcap * tanh(s / softcap)` (Gemma 2, arXiv 2408.00118); `sinks` stand for one more
    key per head whose value is 0 (gpt-oss, arXiv 2508.10925; no term where None).

    Memory is O(N): no N x N tensor exists, tiles in which nothing is visible are skipped (Dao et al.,
    FlashAttention, arXiv 2205.14135, with the mask's tile plan).

    Args:
        q: [B, N, Hq, D], last dimension contiguous, any other strides. On the CPU float32, bfloat16 or
            float64; on CUDA bfloat16, float16 or float32 with D <= 256.
        k: [B, N, Hkv, D] of the same dtype; Hq a multiple of Hkv (query head h reads KV head
            h // (Hq / Hkv)).
        v: [B, N, Hkv, Dv], likewise; Dv may be another dim than D (latent attention, expanded).
        mask: its `evict_at` is [B, N] or [1, N]; made once, used by every layer.
        scale: of the scores; 1 / sqrt(D) when None.
        return_lse: also return the log-sum-exp of each row's visible scores, natural logarithm. It has a
            gradient.
        deterministic: bitwise repeatable gradients. Every backend there is so far always is (the CPU's for a
            given number of threads).
        backend: see `mem1_core.backend`; "auto" is "cpu" for CPU tensors and "triton" (compute capability 8.0
            and later) for CUDA tensors, where nothing synchronises and a CUDA graph can capture both
            directions once a first call has compiled the kernels.
        window: how many positions a query sees at most, its own included. The tile plan of each window is
            made once and kept by the mask (`TrajectoryMask.windowed` makes it ahead of time).
        positions: integer [B, N] or [1, N], for a window; None: those of the mask, which a layout knows, else
            places in the stream.
        sinks: [Hq], floating point, on the device of q.
        softcap: a number > 0.

    Returns:
        out [B, N, Hq, Dv] in the dtype of q; with `return_lse` also lse [B, Hq, N], float32 (float64 for
        float64). A row that sees no key is 0 with lse -inf. A query that sees a NaN or infinite key or value
        becomes NaN; such keys do not touch the queries that do not see them. (On CUDA a score of -inf that an
        infinite key makes is no NaN: it leaves the key out, and with a soft cap an infinite score is the
        cap.) There is no second derivative.

    Raises:
        TypeError, ValueError: a dtype, shape, stride or device that is not as above; the message names the
            argument.
        NotImplementedError: no such backend for this device.

    Equivalent to:
        >>> s = torch.einsum("bihd,bjhd->bhij", q, k.repeat_interleave(Hq // Hkv, 2)) * scale
        >>> s = softcap * torch.tanh(s / softcap)  # with a soft cap
        >>> mask = mask.at_positions(positions).windowed(window)  # with a window; with positions
        >>> s = s.masked_fill(~mask.dense()[:, None], -torch.inf)
        >>> s = torch.cat([s, sinks[None, :, None, None].expand(B, Hq, N, 1)], -1)  # with sinks
        >>> p = s.softmax(-1)[..., :N]
        >>> out = torch.einsum("bhij,bjhd->bihd", p, v.repeat_interleave(Hq // Hkv, 2))
    """
    check_whole(q=q, k=k, v=v, positions=positions, sinks=sinks)
    _check_inputs(q, k, v)
    if not isinstance(mask, TrajectoryMask):
        raise TypeError(f"mask: expected a TrajectoryMask, got {type(mask).__name__}")
    if mask.device != q.device:
        raise ValueError(f"mask: expected the device of q, {q.device}, got {mask.device}")
    if mask.evict_at.shape[1] != q.shape[1] or mask.evict_at.shape[0] not in (1, q.shape[0]):
        raise ValueError(
            f"mask: expected evict_at of shape [{q.shape[0]} or 1, {q.shape[1]}], "
            f"got {list(mask.evict_at.shape)}"
        )
    mask = _windowed(mask, window, positions)
    cap, of_sinks = check_softcap(softcap), check_sinks(sinks, q)
    if scale is None:
        scale = 1.0 / math.sqrt(q.shape[-1])
    elif not is_number(scale):
        raise ValueError(f"scale: expected a finite number or None, got {scale!r}")
    scale = float(scale)
    chosen = choose_backend("trajectory_attention", q, backend, _AVAILABLE)
    if chosen == "reference":
        return reference.trajectory_attention(q, k, v, mask, scale, return_lse, sinks, softcap)
    # The kernels mask with -inf before they scale, which wants a scale > 0: any other goes into q.
    if abs(scale) < 1e-30:  # in float32 as good as 0
        q, scale = q * scale, 1.0
    elif scale < 0:
        q, scale = -q, -scale
    if chosen == "triton":
        op, plan = _library.ops.trajectory_attention_triton, mask.tile_plan(*DEFAULT_BLOCKS["cuda"])
    else:
        op, plan = _library.ops.trajectory_attention, mask.plan
    lists = (None,) * 4 if plan.key_lists is None else plan.key_lists
    over_positions = (None, None) if mask.limits is None else (mask.positions, mask.limits)
    out, lse = op(
        q, k, v, mask.evict_at, *plan.tensors, plan.block_q, plan.block_k, scale, *over_positions, *lists,
        of_sinks, cap,
    )  # fmt: skip
    return (out, lse) if return_lse else out


def _windowed(mask: TrajectoryMask, window: int | None, positions: Tensor | None) -> TrajectoryMask:
    if window is None:
        if positions is not None:
            raise ValueError("positions: expected None without a window, got a tensor")
        return mask
    return (mask if positions is None else mask.at_positions(positions)).windowed(window)


def _check_inputs(q: Tensor, k: Tensor, v: Tensor) -> None:
    """What holds for every backend; which dtypes and strides it takes, each says itself."""
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
        if tensor.dim() != 4 or tensor.shape[3] == 0:
            raise ValueError(
                f"{name}: expected [batch, length, heads, dim] with dim >= 1, got shape {list(tensor.shape)}"
            )
        if not tensor.is_floating_point():
            raise TypeError(f"{name}: expected float32 or another floating point dtype, got {tensor.dtype}")
        if tensor.dtype != q.dtype:
            raise TypeError(f"{name}: expected the dtype of q, {q.dtype}, got {tensor.dtype}")
        if tensor.device != q.device:
            raise ValueError(f"{name}: expected the device of q, {q.device}, got {tensor.device}")
        if tensor.shape[:2] != q.shape[:2] or (name == "k" and tensor.shape[3] != q.shape[3]):
            dims = "batch, length and dim" if name == "k" else "batch and length"
            raise ValueError(f"{name}: expected {dims} of q, {list(q.shape)}, got {list(tensor.shape)}")
    if k.shape[2] != v.shape[2]:
        raise ValueError(f"v: expected the heads of k, {k.shape[2]}, got {v.shape[2]}")
    if k.shape[2] == 0 or q.shape[2] % k.shape[2] != 0:
        raise ValueError(f"q: expected a multiple of the {k.shape[2]} heads of k, got {q.shape[2]}")
