"""The KV cache of a rollout: one preallocated slot per trajectory, and attention over it.

A slot holds the tokens that its trajectory can still see, in order, without holes: pruning moves the
survivors to the left. What is live is bounded, so a slot is too, and nothing is allocated from token to
token.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from mem1_core.ops import cached_attention, prune_kv_cache_

_FIRST_CAPACITY = 128  # tokens


class Slots:
    """kv: [layers, 2 (K, V), slots, capacity, Hkv, D]; it grows when a trajectory needs more.

    lengths: int64 [slots] on the host, the tokens in each slot.
    """

    def __init__(
        self, layers: int, slots: int, kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.kv = torch.zeros((layers, 2, slots, 0, kv_heads, head_dim), dtype=dtype, device=device)
        self.lengths = torch.zeros(slots, dtype=torch.int64)
        self.flash = flash_attention(self.kv)

    @property
    def capacity(self) -> int:
        """Tokens that a slot has room for."""
        return self.kv.shape[3]

    def reserve(self, tokens: int) -> bool:
        """Make room for `tokens` in each slot. True if the cache has moved to other memory."""
        if tokens <= self.capacity:
            return False
        capacity = max(tokens, 2 * self.capacity, _FIRST_CAPACITY)
        grown = self.kv.new_zeros((*self.kv.shape[:3], capacity, *self.kv.shape[4:]))
        grown[:, :, :, : self.capacity] = self.kv
        self.kv = grown
        return True

    def prune(self, keeps: Mapping[int, Tensor]) -> None:
        """Drop the entries of slots where their mask (bool [length of the slot], on the host) is False: all
        slots, layers, keys and values in one call, in place.
        """
        for slot, keep in keeps.items():
            if keep.shape != (int(self.lengths[slot]),):
                raise ValueError(
                    f"keep: wanted shape [{int(self.lengths[slot])}], the length of slot {slot}, got "
                    f"{list(keep.shape)}"
                )
        if not keeps:
            return
        used = int(self.lengths.max())
        mask = torch.ones(len(self.lengths), used, dtype=torch.bool)
        for slot, keep in keeps.items():
            mask[slot, : len(keep)] = keep
        lengths, device = self.lengths.to(torch.int32), self.kv.device
        prune_kv_cache_(
            self.kv[:, :, :, :used],
            mask.to(device, non_blocking=True),
            lengths.to(device, non_blocking=True),
        )
        for slot, keep in keeps.items():
            self.lengths[slot] = keep.sum()

    def clear(self, slot: int) -> None:
        """Forget a slot and what it held, numbers that are not finite among it."""
        self.kv[:, :, slot].zero_()
        self.lengths[slot] = 0

    def truncate(self, slot: int, length: int) -> None:
        """Forget all but the first `length` tokens of a slot."""
        self.lengths[slot] = min(length, int(self.lengths[slot]))

    def move(self, source: int, target: int) -> None:
        """Let slot `target` hold what slot `source` holds."""
        length = int(self.lengths[source])
        self.kv[:, :, target, :length] = self.kv[:, :, source, :length]
        self.lengths[target] = length


@dataclass(frozen=True)
class Step:
    """One forward over some of the slots: `mem1_cache` of `mem1_core.integrations.transformers`.

    Rows are padded on the left, so that the last query of each is its last token. Every tensor is on the
    device of the cache.
    """

    kv: Tensor  # [layers, 2, slots, capacity, Hkv, D]
    flash: Callable[..., Tensor] | None  # flash-attn's function, where it is to be used
    rows: Tensor  # int32 [b]: the slots that take part, in batch order
    neighbours: slice | None  # the same, if these are neighbours
    counts: Tensor  # int32 [b]: tokens of each row that are not padding
    real: Tensor | None  # bool [b, T]: not padding; None: all are
    slots: Tensor  # int64 [real tokens]: where each of them is stored
    columns: Tensor  # int64 [real tokens]
    ends: Tensor  # int32 [b]: length of each slot after this forward
    used: int  # no end is behind it
    width: int  # T

    def attend(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Store key and value [b, Hkv, T, D] and attend to all that their slots hold.

        query [b, Hq, T, D] -> [b, T, Hq, D]. Query t of a row sees the entries before `ends - T + t + 1`.
        """
        layer: Any = module.layer_idx
        for which, new in enumerate((key.transpose(1, 2), value.transpose(1, 2))):
            flat = new.flatten(0, 1) if self.real is None else new[self.real]
            self.kv[layer, which][self.slots, self.columns] = flat
        keys, values = self.kv[layer]
        if self.kv.device.type == "cpu":
            return cached_attention(
                query.transpose(1, 2),
                keys,
                values,
                self.ends,
                rows=self.rows,
                counts=self.counts,
                scale=scale,
            )
        if self.flash is not None:
            return self._flash(keys, values, query, scale)
        return self._sdpa(keys, values, query, scale)

    @cached_property
    def _visible(self) -> Tensor:
        """bool [b, 1, T, used], which entries each query sees; the same in every layer."""
        device = self.ends.device
        last = self.ends[:, None] + torch.arange(-self.width, 0, device=device)
        # Padding sees the first entry, as a row without any would be NaN.
        return (torch.arange(self.used, device=device) <= last.clamp(min=0)[..., None])[:, None]

    def _sdpa(self, keys: Tensor, values: Tensor, query: Tensor, scale: float) -> Tensor:
        b, heads, new, dim = query.shape
        rows = self.rows if self.neighbours is None else self.neighbours
        keys, values = (x[rows, : self.used].transpose(1, 2) for x in (keys, values))
        group = heads // keys.shape[1]
        if new == 1:  # the query heads of a KV head stand as so many queries: nothing is repeated
            query = query.reshape(b, heads // group, group, dim)
        elif group > 1:
            keys, values = (x.repeat_interleave(group, dim=1) for x in (keys, values))
        out = scaled_dot_product_attention(query, keys, values, attn_mask=self._visible, scale=scale)
        return out.reshape(b, heads, new, dim).transpose(1, 2)

    def _flash(self, keys: Tensor, values: Tensor, query: Tensor, scale: float) -> Tensor:
        assert self.flash is not None
        rows: Tensor | None = self.rows
        if self.neighbours is not None:
            keys, values, rows = keys[self.neighbours], values[self.neighbours], None
        # Bottom-right causal masks: the last query sees all of its slot, as it must with padding on the left.
        return self.flash(
            query.transpose(1, 2),
            keys[:, : self.used],
            values[:, : self.used],
            cache_seqlens=self.ends,
            cache_batch_idx=rows,
            softmax_scale=scale,
            causal=True,
        )


def flash_attention(kv: Tensor) -> Callable[..., Tensor] | None:
    """flash-attn's KV-cache function, if it is installed and takes this cache."""
    if kv.device.type != "cuda" or kv.dtype not in (torch.bfloat16, torch.float16) or kv.shape[-1] > 256:
        return None
    if importlib.util.find_spec("flash_attn") is None:
        return None
    # Its fourth generation alone brings a package of that name without this function.
    return getattr(importlib.import_module("flash_attn"), "flash_attn_with_kvcache", None)
