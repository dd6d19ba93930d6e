"""cached_attention: the newest tokens of each row attend to its slot of a KV cache."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mem1_core import _library, reference
from mem1_core.backend import check_sinks, check_softcap, check_whole, choose_backend, describe, is_number
from mem1_core.eviction import window_evict
from mem1_core.mask import check_window

_AVAILABLE = ("cpu", "reference")


def cached_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Tensor,
    *,
    cache_batch_idx: Tensor | None = None,
    query_lens: Tensor | None = None,
    scale: float | None = None,
    window: int | None = None,
    positions: Tensor | None = None,
    evict: Tensor | None = None,
    sinks: Tensor | None = None,
    softcap: float | None = None,
    backend: str = "auto",
) -> Tensor:
    r"""Softmax attention of the last tokens of ragged sequences over what a KV cache holds of them.

    Row `b` of q stands for the last `query_lens[b]` of the `cache_seqlens[b]` tokens in slot
    `cache_batch_idx[b]`, padded on the left: query `t` sees the entries before `cache_seqlens[b] - T + t +
    1`. Nothing after a length is read, so whatever lies there (NaN too) does no harm. Without gradients. The
    names are those of flash-attn's `flash_attn_with_kvcache`.

    .. math:: o_t = \sum_{s \le n_t} \operatorname{softmax}_s(\text{scale} \cdot q_t \cdot k_s) v_s, \quad
              n_t = \text{length} - T + t

    Args:
        q: [B, T, Hq, D], last dimension contiguous. On the CPU float32, bfloat16 or float64.
        k_cache, v_cache: [slots, capacity, Hkv, D] of the same dtype, last dimension contiguous, any other
            strides; Hq a multiple of Hkv. What q's tokens themselves bring must be in it. Values may have
            another D.
        cache_seqlens: int32 [B], entries of each row's slot, q's tokens among them.
        cache_batch_idx: int32 [B], the slot of each row; 0 .. B-1 when None.
        query_lens: int32 [B], how many of a row's T queries are real; T when None.
        scale: a number > 0; 1 / sqrt(D) when None.
        window, sinks, softcap: as in `trajectory_attention`.
        positions: integer [B, entries] or [1, entries] for all rows, of the entries of each row's slot, each
            greater than the one before it; their places when None.
        evict: in place of the two, int32 [B, entries], what `mem1_core.eviction.window_evict` makes of them:
            the first entry whose query does not see each entry, ascending. Once for many layers.
        backend: see `mem1_core.backend`. There is none for CUDA, where flash-attn's `flash_attn_with_kvcache`
            and SDPA do this.

    Returns:
        [B, T, Hq, D of the values] in the dtype of q; 0 for padding. A NaN or an infinity in an entry shows
        in the queries that see it and in no others; in which of their channels is not defined. (In a step of
        one token, but for float64, an infinity that makes a score -inf has weight 0, as in the code below.)

    Raises:
        TypeError, ValueError: an argument that is not as above; the message names it.
        NotImplementedError: no such backend for this device.

    Equivalent to:
        >>> for b in range(B):
        ...     n, slot = cache_seqlens[b], cache_batch_idx[b]
        ...     k, v = (x[slot, :n].repeat_interleave(Hq // Hkv, 1) for x in (k_cache, v_cache))
        ...     i = (n - T + torch.arange(T))[:, None]
        ...     visible = (torch.arange(n) <= i) & (i < evict[b, :n])
        ...     s = torch.einsum("thd,shd->hts", q[b], k) * scale  # softcap and sinks as there
        ...     p = s.masked_fill(~visible, -torch.inf).softmax(-1)
        ...     out[b] = torch.einsum("hts,shd->thd", p, v)  # the last query_lens[b] of it
    """
    check_whole(
        q=q,
        k_cache=k_cache,
        v_cache=v_cache,
        cache_seqlens=cache_seqlens,
        cache_batch_idx=cache_batch_idx,
        query_lens=query_lens,
        positions=positions,
        evict=evict,
        sinks=sinks,
    )
    for name, tensor in (("q", q), ("k_cache", k_cache), ("v_cache", v_cache)):
        if not isinstance(tensor, Tensor) or tensor.dim() != 4 or not tensor.is_floating_point():
            raise TypeError(
                f"{name}: expected a floating point tensor of 4 dimensions, got {describe(tensor)}"
            )
        if tensor.device != q.device:
            raise ValueError(f"{name}: expected the device of q, {q.device}, got {tensor.device}")
    for name, tensor in (("q", q), ("v_cache", v_cache)):
        if tensor.shape[3] == 0:
            raise ValueError(f"{name}: expected a head dim >= 1, got shape {list(tensor.shape)}")
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k_cache, v_cache)):
        raise ValueError(
            "q, k_cache, v_cache: expected tensors without gradients, got one that requires them"
        )
    if torch.is_grad_enabled() and isinstance(sinks, Tensor) and sinks.requires_grad:
        raise ValueError("sinks: expected a tensor without gradients, got one that requires them")
    batch = q.shape[0]
    if cache_batch_idx is None:
        cache_batch_idx = torch.arange(batch, dtype=torch.int32, device=q.device)
    query_lens = torch.full_like(cache_batch_idx, q.shape[1]) if query_lens is None else query_lens
    for name, tensor in (
        ("cache_batch_idx", cache_batch_idx),
        ("cache_seqlens", cache_seqlens),
        ("query_lens", query_lens),
    ):
        if not isinstance(tensor, Tensor) or tensor.dtype != torch.int32 or tensor.shape != (batch,):
            raise TypeError(f"{name}: expected int32 [{batch}], got {describe(tensor)}")
        if tensor.device != q.device:
            raise ValueError(f"{name}: expected the device of q, {q.device}, got {tensor.device}")
    scale = 1.0 / math.sqrt(q.shape[3]) if scale is None else scale
    if not (is_number(scale) and scale > 0):
        raise ValueError(f"scale: expected a finite number > 0 or None, got {scale!r}")
    evict = _lifetimes(cache_seqlens, window, positions, evict)
    cap, of_sinks = check_softcap(softcap), check_sinks(sinks, q)
    chosen = choose_backend("cached_attention", q, backend, _AVAILABLE)
    arguments = (
        q,
        k_cache,
        v_cache,
        cache_batch_idx.contiguous(),
        cache_seqlens.contiguous(),
        query_lens.contiguous(),
        float(scale),
    )
    if chosen == "reference":
        return reference.cached_attention(*arguments, evict, sinks, softcap)
    return _library.ops.cached_attention(*arguments, None, evict, of_sinks, cap)


def _lifetimes(
    cache_seqlens: Tensor, window: int | None, positions: Tensor | None, evict: Tensor | None
) -> Tensor | None:
    if window is None:
        if positions is not None:
            raise ValueError("positions: expected None without a window, got a tensor")
        if evict is not None:
            _check_entries("evict", evict, cache_seqlens)
            if evict.dtype != torch.int32:
                raise TypeError(f"evict: expected int32, got {evict.dtype}")
            evict = evict.contiguous()
        return evict
    if evict is not None:
        raise ValueError("evict: expected None beside a window, got a tensor")
    check_window(window)
    if positions is None:
        batch, entries = len(cache_seqlens), _entries(cache_seqlens)
        positions = torch.arange(entries, device=cache_seqlens.device).expand(batch, entries).contiguous()
    if isinstance(positions, Tensor) and positions.dim() == 2 and positions.shape[0] == 1:
        positions = positions.expand(len(cache_seqlens), -1).contiguous()
    _check_entries("positions", positions, cache_seqlens)
    past = torch.arange(1, max(positions.shape[1], 1), device=positions.device) >= cache_seqlens[:, None]
    follows = past | (positions.diff(dim=1) > 0)
    if not bool(follows.all()):
        row, at = (int(x) for x in (~follows).nonzero()[0])
        before, got = positions[row, at : at + 2].tolist()
        raise ValueError(f"positions[{row}, {at + 1}]: expected more than the {before} before it, got {got}")
    return window_evict(positions, window, cache_seqlens)


def _check_entries(name: str, x: Tensor, cache_seqlens: Tensor) -> None:
    """TypeError or ValueError unless x is an integer tensor that has a number for each entry of each row."""
    if not isinstance(x, Tensor) or x.is_floating_point() or x.is_complex() or x.dtype == torch.bool:
        raise TypeError(f"{name}: expected an integer tensor, got {describe(x)}")
    if x.device != cache_seqlens.device:
        raise ValueError(f"{name}: expected the device of q, {cache_seqlens.device}, got {x.device}")
    batch, entries = len(cache_seqlens), _entries(cache_seqlens)
    if x.dim() != 2 or x.shape[0] != batch or x.shape[1] < entries:
        raise ValueError(f"{name}: expected shape [{batch}, {entries} or more], got {describe(x)}")


def _entries(cache_seqlens: Tensor) -> int:
    """Of the longest row."""
    return max(0, int(cache_seqlens.max())) if cache_seqlens.numel() else 0
