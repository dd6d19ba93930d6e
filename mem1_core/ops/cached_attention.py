"""cached_attention: the newest tokens of each row attend to its slot of a KV cache."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mem1_core import _library, reference
from mem1_core.backend import check_whole, choose_backend, told

_AVAILABLE = ("cpu", "reference")


def cached_attention(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    lengths: Tensor,
    *,
    rows: Tensor | None = None,
    counts: Tensor | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    r"""Softmax attention of the last tokens of ragged sequences over what a KV cache holds of them.

    Row `b` of q stands for the last `counts[b]` of the `lengths[b]` tokens in slot `rows[b]`, padded on the
    left: query `t` sees the entries before `lengths[b] - T + t + 1`. Nothing behind a length is read, so
    whatever lies there (NaN too) does no harm. Without gradients.

    .. math:: o_t = \sum_{s \le n_t} \operatorname{softmax}_s(\text{scale} \cdot q_t \cdot k_s) v_s, \quad
              n_t = \text{length} - T + t

    Args:
        q: [B, T, Hq, D], last dimension contiguous. On the CPU float32, bfloat16 or float64.
        keys, values: the cache, [slots, capacity, Hkv, D] of the same dtype, last dimension contiguous, any
            other strides; Hq a multiple of Hkv. What q's tokens themselves bring must be in it.
        lengths: int32 [B], entries of each row's slot, q's tokens among them.
        rows: int32 [B], the slot of each row; 0 .. B-1 when None.
        counts: int32 [B], how many of a row's T queries are real; T when None.
        scale: 1 / sqrt(D) when None.
        backend: see `mem1_core.backend`. There is none for CUDA, where flash-attn's `flash_attn_with_kvcache`
            and SDPA do this.

    Returns:
        [B, T, Hq, D] in the dtype of q; 0 for padding. A NaN or an infinity in an entry shows in the queries
        that see it and in no others; in which of their channels is not defined.

    Raises:
        TypeError, ValueError: an argument that is not as above; the message names it.
        NotImplementedError: no such backend for this device.

    Equivalent to:
        >>> for b in range(B):
        ...     k, v = (x[rows[b], : lengths[b]].repeat_interleave(Hq // Hkv, 1) for x in (keys, values))
        ...     visible = torch.arange(lengths[b]) <= (lengths[b] - T + torch.arange(T))[:, None]
        ...     s = torch.einsum("thd,shd->hts", q[b], k) * scale
        ...     p = s.masked_fill(~visible, -torch.inf).softmax(-1)
        ...     out[b] = torch.einsum("hts,shd->thd", p, v)  # the last counts[b] of it
    """
    check_whole(q=q, keys=keys, values=values, lengths=lengths, rows=rows, counts=counts)
    for name, tensor in (("q", q), ("keys", keys), ("values", values)):
        if not isinstance(tensor, Tensor) or tensor.dim() != 4 or not tensor.is_floating_point():
            raise TypeError(f"{name}: wanted a floating point tensor of 4 dimensions, got {told(tensor)}")
        if tensor.device != q.device:
            raise ValueError(f"{name}: wanted the device of q, {q.device}, got {tensor.device}")
    if q.shape[3] == 0:
        raise ValueError(f"q: wanted a head dim >= 1, got shape {list(q.shape)}")
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, keys, values)):
        raise ValueError("q, keys, values: wanted tensors without gradients, got one that requires them")
    batch = q.shape[0]
    rows = torch.arange(batch, dtype=torch.int32, device=q.device) if rows is None else rows
    counts = torch.full_like(rows, q.shape[1]) if counts is None else counts
    for name, tensor in (("rows", rows), ("lengths", lengths), ("counts", counts)):
        if not isinstance(tensor, Tensor) or tensor.dtype != torch.int32 or tensor.shape != (batch,):
            raise TypeError(f"{name}: wanted int32 [{batch}], got {told(tensor)}")
        if tensor.device != q.device:
            raise ValueError(f"{name}: wanted the device of q, {q.device}, got {tensor.device}")
    scale = 1.0 / math.sqrt(q.shape[3]) if scale is None else float(scale)
    if not scale > 0 or not math.isfinite(scale):
        raise ValueError(f"scale: wanted a finite number > 0, got {scale}")
    chosen = choose_backend("cached_attention", q, backend, _AVAILABLE)
    arguments = q, keys, values, rows.contiguous(), lengths.contiguous(), counts.contiguous(), scale
    if chosen == "reference":
        return reference.cached_attention(*arguments)
    return _library.ops.cached_attention(*arguments)
