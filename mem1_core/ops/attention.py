"""trajectory_attention: attention in which every key has a lifetime."""

from __future__ import annotations

import math
from typing import Literal, overload

from torch import Tensor

from mem1_core import _library, reference
from mem1_core.backend import choose_backend
from mem1_core.trajectory import TrajectoryMask


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
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Softmax attention where query `i` sees the keys `j <= i < evict[j]`. Differentiable in q, k, v.

    .. math:: o_i = \sum_{j \le i < e_j} \exp(s_{ij} - \ell_i) v_j, \quad
              s_{ij} = \text{scale} \cdot q_i \cdot k_j, \quad
              \ell_i = \log \sum_{j \le i < e_j} \exp s_{ij}

    Memory is O(N): no N x N tensor exists, tiles in which nothing is visible are skipped (Dao et al.,
    FlashAttention, arXiv 2205.14135, with the mask's tile plan).

    Args:
        q: [B, N, Hq, D], last dimension contiguous, any other strides. On the CPU float32, bfloat16 or
            float64.
        k, v: [B, N, Hkv, D] of the same dtype; Hq a multiple of Hkv (query head h reads KV head
            h // (Hq / Hkv)).
        mask: its `evict` is [B, N] or [1, N]; made once, used by every layer.
        scale: of the scores; 1 / sqrt(D) when None.
        return_lse: also return the log-sum-exp of each row's visible scores, natural logarithm. It has a
            gradient.
        deterministic: bitwise repeatable gradients. The CPU backend always is, for a given number of threads.
        backend: see `mem1_core.backend`.

    Returns:
        out [B, N, Hq, D] in the dtype of q; with `return_lse` also lse [B, Hq, N], float32 (float64 for
        float64). A row that sees no key is 0 with lse -inf. A query that sees a NaN or infinite key or value
        becomes NaN; such keys do not touch the queries that do not see them.

    Raises:
        TypeError, ValueError: a dtype, shape, stride or device that is not as above; the message names the
            argument.
        NotImplementedError: no such backend for this device.

    Equivalent to:
        >>> s = torch.einsum("bihd,bjhd->bhij", q, k.repeat_interleave(Hq // Hkv, 2)) * scale
        >>> s = s.masked_fill(~mask.dense()[:, None], -torch.inf)
        >>> out = torch.einsum("bhij,bjhd->bihd", s.softmax(-1), v.repeat_interleave(Hq // Hkv, 2))
    """
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: wanted a tensor, got {type(tensor).__name__}")
        if tensor.dim() != 4:
            raise ValueError(f"{name}: wanted [batch, length, heads, dim], got shape {list(tensor.shape)}")
    if not isinstance(mask, TrajectoryMask):
        raise TypeError(f"mask: wanted a TrajectoryMask, got {type(mask).__name__}")
    for name, device in (("k", k.device), ("v", v.device), ("mask", mask.device)):
        if device != q.device:
            raise ValueError(f"{name}: wanted the device of q, {q.device}, got {device}")
    if mask.evict.shape[1] != q.shape[1] or mask.evict.shape[0] not in (1, q.shape[0]):
        raise ValueError(
            f"mask: wanted evict of shape [{q.shape[0]} or 1, {q.shape[1]}], got {list(mask.evict.shape)}"
        )
    if scale is None:
        scale = 1.0 / math.sqrt(max(q.shape[-1], 1))
    elif not isinstance(scale, (int, float)):
        raise TypeError(f"scale: wanted a number or None, got {type(scale).__name__}")
    elif not math.isfinite(scale):
        raise ValueError(f"scale: wanted a finite number, got {scale}")
    if choose_backend("trajectory_attention", q, backend, ("cpu", "reference")) == "reference":
        return reference.trajectory_attention(q, k, v, mask, scale, return_lse)
    if not scale > 0:  # the kernels mask with -inf before they scale; the sign (or the zero) goes into q
        q, scale = (q * -1.0, -scale) if scale < 0 else (q * 0.0, 1.0)
    plan = mask.plan
    out, lse = _library.ops.trajectory_attention(
        q, k, v, mask.evict, *plan[2:], plan.block_q, plan.block_k, scale
    )
    return (out, lse) if return_lse else out
