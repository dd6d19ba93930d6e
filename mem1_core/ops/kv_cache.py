"""prune_kv_cache_ and prune_paged_kv_cache_: forget tokens of a KV cache in place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from mem1_core import _library, reference
from mem1_core.backend import check_whole, choose_backend
from mem1_core.reference import Positions

KVCache = Tensor | Sequence[tuple[Tensor, Tensor]] | Sequence[Tensor]
Keep = Tensor | Sequence[Sequence[tuple[int, int]]]
Gaps = Literal["close", "leave"]

_AVAILABLE = ("cpu", *(["cuda"] if _library.cuda_architectures() else []), "reference")
_MAX = 2**31 - 1


class PagedPrune(NamedTuple):
    """What `prune_paged_kv_cache_` leaves."""

    lengths: Tensor  # [B] as `lengths`: tokens of each sequence
    page_lengths: Tensor  # int32 [B, P]: tokens in each page of the new block table, 0 past its end
    freed: Tensor  # bool [pages]: pages that a sequence has dropped and none of these uses any more


def prune_kv_cache_(
    kv: KVCache,
    keep: Keep,
    lengths: Tensor,
    *,
    positions: Positions = "keep",
    inv_freq: Tensor | None = None,
    base_keys: Tensor | Sequence[Tensor] | None = None,
    base_positions: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    r"""Remove entries from a KV cache in place, in all layers, and close the gaps.

    The survivors move to the front in their order, a stable left compaction: no entry moves back, so one pass
    needs no scratch memory. On CUDA all layers, keys and values, and the whole ragged batch are one launch
    and the host does not wait. Entries before the first that leaves are not touched.

    Args:
        kv: [L, 2, B, S, Hkv, D], keys and values of each layer; any strides but a contiguous last dimension
            and no two entries at one address. Or a sequence of L pairs (key, value) of [B, S, Hkv, D], all of
            one shape, dtype and set of strides (a tensor [2, B, S, Hkv, D] is such a pair). float32,
            bfloat16, float16, float64; types of one byte with `positions="keep"`.
        keep: which entries stay. bool [B, S], where what it says past the length does not count; or ranges
            [begin, end) of slots, sorted and without overlap, end <= length: an integer tensor [B, R, 2] or a
            list of pairs for each sequence. Empty ranges are fine.
        lengths: integer [B], the entries in use; int32 needs no conversion.
        positions: "keep" leaves keys as they were encoded, which a query at its own position then sees as
            before. "compact" gives each key the position of its new slot.
        inv_freq: float32 [D / 2], RoPE's angular frequencies (rotate-half), for "compact": as
            `model.rotary_emb.inv_freq` has them, YaRN's too (its attention factor stays on the key).
        base_keys: [L, B, S, Hkv, D] or a sequence of L tensors: the keys as they were first encoded.
        base_positions: int32 [B, S]: where that was. With both, each key is made from its base again: one
            rounding however often it moves. Without, the key in the cache is rotated on from the position of
            its old slot, and rounding adds up (bfloat16: rms 2.7e-2 after 50 prunes). Both are pruned with
            the cache, in place.
        backend: see `mem1_core.backend`.

    Returns:
        The new lengths [B], in the dtype of `lengths`. Entries past them are undefined.

    Raises:
        TypeError, ValueError: an argument that is not as above; the message names it, and nothing has been
            touched. Values on a CUDA device are not known to the host, nor those of ranges on the host in a
            compiled graph: then a sequence whose length or ranges are wrong is left as it is, with new
            length -1.
        NotImplementedError: no such backend for this device.

    The formula for a key of angle `a_d = (new - old) * inv_freq_d` (Su et al., RoFormer, arXiv 2104.09864),
    in float32 (float64 for float64):

    .. math:: k_d' = k_d \cos a_d - k_{d + D/2} \sin a_d, \quad
              k_{d + D/2}' = k_{d + D/2} \cos a_d + k_d \sin a_d

    Equivalent to:
        >>> for b in range(B):
        ...     alive = keep[b, : lengths[b]].nonzero()[:, 0]
        ...     kv[:, :, b, : len(alive)] = kv[:, :, b, alive]
    """
    check_whole(kv=kv, lengths=lengths, base_keys=base_keys, base_positions=base_positions)
    keys, values = _layers(kv, "kv")
    batch, slots = keys[0].shape[1:3]
    lengths_32 = _integers("lengths", lengths, keys[0])
    if lengths.shape != (batch,):
        raise ValueError(f"lengths: expected one per sequence, shape [{batch}], got {list(lengths.shape)}")
    mask, ranges = _keep(keep, batch, slots, keys[0])
    inv_freq = _frequencies(positions, inv_freq, keys[0])
    bases = [] if base_keys is None else _unsqueezed(base_keys)
    if bases and positions != "compact":
        raise ValueError(f"base_keys: expected None for positions={positions!r}, got keys")
    if (len(bases) > 0) != (base_positions is not None):
        raise ValueError("base_keys, base_positions: expected both or neither, got one of them")
    chosen = choose_backend("prune_kv_cache_", keys[0], backend, _AVAILABLE)
    if chosen == "reference":
        mask = _reference_mask(mask, ranges, lengths_32, slots)
        stacked = torch.stack([torch.cat(keys), torch.cat(values)], dim=1)
        base = torch.cat(bases) if bases else None
        new_lengths = reference.prune_kv_cache_(
            stacked,
            mask,
            lengths,
            positions=positions,
            inv_freq=inv_freq,
            base_keys=base,
            base_positions=base_positions,
        )
        _copy_back(keys, stacked[:, 0])
        _copy_back(values, stacked[:, 1])
        if base is not None:
            _copy_back(bases, base)
        return new_lengths
    new_lengths = _library.ops.prune_kv_cache_(
        keys, values, mask, ranges, lengths_32, inv_freq, bases, base_positions, None, None, False
    )
    return new_lengths.to(lengths.dtype)


def prune_paged_kv_cache_(
    kv: KVCache,
    keep: Keep,
    block_table: Tensor,
    lengths: Tensor,
    *,
    gaps: Gaps,
    positions: Positions = "keep",
    inv_freq: Tensor | None = None,
    backend: str = "auto",
) -> PagedPrune:
    """The same for a paged cache with block tables, as vLLM and FlashInfer have it.

    Pages in which nothing survives are freed by an edit of the table; no key or value of theirs is read.

    Args:
        kv: [L, 2, pages, page, Hkv, D] or a sequence of L pairs (key, value) of [pages, page, Hkv, D]; else
            as `prune_kv_cache_` takes it. vLLM's layer [2, pages, page, Hkv, D] is such a pair; FlashInfer's
            [pages, 2, page, Hkv, D] is `(t[:, 0], t[:, 1])`.
        keep: bool [B, P * page], or ranges as in `prune_kv_cache_`.
        block_table: int32 [B, P], contiguous: the pages of each sequence in order. Entries past its length
            are not read. Changed in place: -1 stands after the pages that are left.
        lengths: integer [B].
        gaps: "close": survivors fill the pages that are left, in order, so that `(block_table, lengths)` is
            what any paged attention reads; at most what stands after the first gap moves. "leave": survivors
            move within their page at most, hardly a byte; the attention must then take a length for each
            page, `page_lengths`. With pages of one token the two are the same, and nothing moves.
        positions, inv_freq: as in `prune_kv_cache_`; "compact" goes with `gaps="close"`.

    Returns:
        PagedPrune(lengths, page_lengths, freed).

    Raises:
        As `prune_kv_cache_`. A page that several of these sequences use must be dropped, or kept whole and in
        its place, by each of them; the CPU checks that (ValueError), CUDA does not. On CUDA a refused
        sequence keeps its table and has new length -1.

    Equivalent, for `gaps="close"`, to:
        >>> for b in range(B):
        ...     slots = (block_table[b].long()[:, None] * page + torch.arange(page)).flatten()  # in the pool
        ...     alive = keep[b, : lengths[b]].nonzero()[:, 0]
        ...     left = block_table[b].long()[(alive // page).unique()]
        ...     target = (left[:, None] * page + torch.arange(page)).flatten()[: len(alive)]
        ...     pool = kv.view(L, 2, pages * page, Hkv, D)
        ...     pool[:, :, target] = pool[:, :, slots[alive]]
        ...     block_table[b] = -1
        ...     block_table[b, : -(-len(alive) // page)] = left[: -(-len(alive) // page)]
    """
    check_whole(kv=kv, lengths=lengths, block_table=block_table)
    keys, values = _layers(kv, "kv")
    pages, page = keys[0].shape[1:3]
    if gaps not in get_args(Gaps):
        raise ValueError(f"gaps: expected 'close' or 'leave', got {gaps!r}")
    if gaps == "leave" and positions != "keep":
        raise ValueError(f"positions: expected 'keep' for gaps='leave', got {positions!r}")
    lengths_32 = _integers("lengths", lengths, keys[0])
    if not isinstance(block_table, Tensor) or block_table.dtype != torch.int32 or block_table.dim() != 2:
        raise TypeError(f"block_table: expected an int32 tensor [sequences, pages], got {_told(block_table)}")
    if block_table.device != keys[0].device or not block_table.is_contiguous():
        raise ValueError(
            f"block_table: expected contiguous and on {keys[0].device}, got {_told(block_table)}"
        )
    batch, width = block_table.shape
    if lengths.shape != (batch,):
        raise ValueError(f"lengths: expected one per sequence, shape [{batch}], got {list(lengths.shape)}")
    mask, ranges = _keep(keep, batch, width * page, keys[0])
    inv_freq = _frequencies(positions, inv_freq, keys[0])
    within = gaps == "leave"
    chosen = choose_backend("prune_paged_kv_cache_", keys[0], backend, _AVAILABLE)
    if chosen == "reference":
        mask = _reference_mask(mask, ranges, lengths_32, width * page)
        stacked = torch.stack([torch.cat(keys), torch.cat(values)], dim=1)
        result = reference.prune_paged_kv_cache_(
            stacked, mask, block_table, lengths, gaps=gaps, positions=positions, inv_freq=inv_freq
        )
        _copy_back(keys, stacked[:, 0])
        _copy_back(values, stacked[:, 1])
        return PagedPrune(*result)
    table, page_lengths, new_lengths, uses = _library.ops.prune_pages(
        block_table, lengths_32, mask, ranges, page, pages, within, positions == "compact"
    )
    _library.ops.prune_kv_cache_(
        keys,
        values,
        mask,
        ranges,
        lengths_32,
        inv_freq,
        [],
        None,
        block_table,
        None if within else table,
        within,
    )
    block_table.copy_(table)
    return PagedPrune(new_lengths.to(lengths.dtype), page_lengths, uses == 1)


def _layers(kv: KVCache, name: str) -> tuple[list[Tensor], list[Tensor]]:
    """Keys and values as lists of [layers, rows, slots, heads, dim]."""
    if isinstance(kv, Tensor):
        if kv.dim() != 6 or kv.shape[1] != 2:
            raise ValueError(f"{name}: expected [layers, 2, rows, slots, heads, dim], got {_told(kv)}")
        keys, values = [kv[:, 0]], [kv[:, 1]]
    else:
        if not isinstance(kv, Sequence):
            raise TypeError(f"{name}: expected a tensor or a sequence of layers, got {_told(kv)}")
        layers: list[Any] = list(kv)
        if not layers:
            raise ValueError(f"{name}: expected at least one layer, got none")
        for n, pair in enumerate(layers):
            if not isinstance(pair, Tensor | Sequence) or not all(isinstance(x, Tensor) for x in pair):
                raise TypeError(f"{name}[{n}]: expected a pair of tensors, got {_told(pair)}")
            if len(pair) != 2 or not all(x.dim() == 4 for x in pair):
                got = [list(x.shape) for x in pair]
                raise ValueError(f"{name}[{n}]: expected two of [rows, slots, heads, dim], got {got}")
        keys, values = ([pair[which][None] for pair in layers] for which in (0, 1))
    for tensor in (*keys, *values):
        if torch.is_grad_enabled() and tensor.requires_grad:
            raise ValueError(f"{name}: expected a cache without gradients, got one that requires them")
    if keys[0].element_size() == 1:  # which of the types of one byte does not matter to who moves them
        keys, values = ([x.view(torch.uint8) for x in tensors] for tensors in (keys, values))
    return keys, values


def _unsqueezed(keys: Tensor | Sequence[Tensor]) -> list[Tensor]:
    tensors = [keys] if isinstance(keys, Tensor) else [key[None] for key in keys]
    for tensor in tensors:
        if tensor.dim() != 5:
            raise ValueError(f"base_keys: expected [layers, rows, slots, heads, dim], got {_told(tensor)}")
    return tensors


def _integers(name: str, values: Tensor, like: Tensor) -> Tensor:
    """int32; a value that does not fit stays one that is refused."""
    if (
        not isinstance(values, Tensor)
        or values.is_floating_point()
        or values.is_complex()
        or values.dtype == torch.bool
    ):
        raise TypeError(f"{name}: expected an integer tensor, got {_told(values)}")
    if values.device != like.device:
        raise ValueError(f"{name}: expected the device of kv, {like.device}, got {values.device}")
    return values if values.dtype == torch.int32 else values.long().clamp(-1, _MAX).int()


def _keep(keep: Keep, batch: int, slots: int, like: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """`keep` as a mask or as int32 ranges [B, R, 2], on the device of the cache."""
    if isinstance(keep, Tensor) and keep.dtype == torch.bool:
        if keep.shape != (batch, slots):
            raise ValueError(f"keep: expected a mask of shape [{batch}, {slots}], got {list(keep.shape)}")
        if keep.device != like.device:
            raise ValueError(f"keep: expected the device of kv, {like.device}, got {keep.device}")
        return (keep if keep.stride(1) == 1 else keep.contiguous()), None
    ranges = keep if isinstance(keep, Tensor) else _padded(keep)
    if ranges.dim() != 3 or ranges.shape[0] != batch or ranges.shape[2] != 2:
        raise ValueError(
            f"keep: expected bool [{batch}, {slots}] or ranges [{batch}, count, 2], got {_told(ranges)}"
        )
    if ranges.device.type == "cpu":
        ranges = _integers("keep", ranges, ranges)
        # While they can be read without a wait; in a graph they have no values yet.
        if like.device.type != "cpu" and not torch.compiler.is_compiling():
            _check_ranges(ranges, slots)
    return None, _integers("keep", ranges.to(like.device, non_blocking=True), like).contiguous()


def _padded(keep: Sequence[Sequence[tuple[int, int]]]) -> Tensor:
    if not isinstance(keep, Sequence):
        raise TypeError(f"keep: expected a mask or ranges, got {_told(keep)}")
    rows: list[list[Any]] = []
    for n, row in enumerate(keep):
        sound = isinstance(row, Sequence) and all(isinstance(pair, Sequence) for pair in row)
        if not sound or any(len(pair) != 2 or not all(isinstance(x, int) for x in pair) for pair in row):
            raise TypeError(f"keep[{n}]: expected pairs (begin, end) of integers, got {row!r}")
        rows.append([tuple(pair) for pair in row])
    count = max([0, *map(len, rows)])
    ends = [row[-1][1] if row else 0 for row in rows]  # padding is empty ranges after the last
    filled = [[*row, *[(end, end)] * (count - len(row))] for row, end in zip(rows, ends, strict=True)]
    return torch.tensor(filled, dtype=torch.int64, device="cpu").reshape(len(rows), count, 2)


def _check_ranges(ranges: Tensor, limit: int | Tensor) -> None:
    """ValueError unless the ranges of each sequence ascend from 0 to its `limit`."""
    bounds = ranges.flatten(1).long()
    limits = torch.as_tensor(limit, device=bounds.device).expand(bounds.shape[0])[:, None]
    walk = torch.cat([torch.zeros_like(limits), bounds, limits], dim=1)
    bad = (walk.diff(dim=1) < 0).any(1).nonzero()
    if len(bad):
        b = int(bad[0])
        raise ValueError(
            f"keep[{b}]: expected ranges [begin, end) in order, not overlapping, up to {int(limits[b])}, got "
            f"{ranges[b].tolist()}"
        )


def _reference_mask(mask: Tensor | None, ranges: Tensor | None, lengths: Tensor, slots: int) -> Tensor:
    """bool [B, slots], after the checks of values that the reference itself does not make."""
    bad = ((lengths < 0) | (lengths > slots)).nonzero()
    if len(bad):
        b = int(bad[0])
        raise ValueError(f"lengths[{b}]: expected 0 to {slots}, got {int(lengths[b])}")
    if mask is not None:
        return mask
    assert ranges is not None
    _check_ranges(ranges, lengths)
    slot = torch.arange(slots, device=ranges.device)[:, None]
    return ((ranges[:, None, :, 0] <= slot) & (slot < ranges[:, None, :, 1])).any(-1)


def _frequencies(positions: str, inv_freq: Tensor | None, like: Tensor) -> Tensor | None:
    if positions not in get_args(Positions):
        raise ValueError(f"positions: expected 'keep' or 'compact', got {positions!r}")
    if positions == "keep":
        if inv_freq is not None:
            raise ValueError("inv_freq: expected None for positions='keep', got a tensor")
        return None
    if not isinstance(inv_freq, Tensor):
        raise ValueError("inv_freq: expected RoPE's frequencies [D / 2] for positions='compact', got None")
    if not like.is_floating_point() or like.element_size() == 1:
        raise TypeError(
            f"kv: expected a floating point type of 2 bytes or more to rotate keys, got {like.dtype}"
        )
    dim = like.shape[-1]
    if dim % 2 or inv_freq.shape != (dim // 2,) or inv_freq.device != like.device:
        raise ValueError(
            f"inv_freq: expected [D / 2] for an even D = {dim}, on {like.device}, got {_told(inv_freq)}"
        )
    return inv_freq.float().contiguous()


def _copy_back(targets: list[Tensor], stacked: Tensor) -> None:
    for target, source in zip(targets, stacked.split([t.shape[0] for t in targets]), strict=True):
        target.copy_(source)


def _told(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype} {list(value.shape)} on {value.device}"
    return type(value).__name__
