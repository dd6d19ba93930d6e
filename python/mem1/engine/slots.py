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

    lengths: the tokens in each slot.
    """

    def __init__(
        self, layers: int, slots: int, kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.kv = torch.zeros((layers, 2, slots, 0, kv_heads, head_dim), dtype=dtype, device=device)
        self.lengths = [0] * slots
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
            if keep.shape != (self.lengths[slot],):
                raise ValueError(
                    f"keep: expected shape [{self.lengths[slot]}], the length of slot {slot}, got "
                    f"{list(keep.shape)}"
                )
        if not keeps:
            return
        used = max(self.lengths)
        mask = torch.ones(len(self.lengths), used, dtype=torch.bool)
        for slot, keep in keeps.items():
            mask[slot, : len(keep)] = keep
        lengths, device = torch.tensor(self.lengths, dtype=torch.int32), self.kv.device
        prune_kv_cache_(
            self.kv[:, :, :, :used],
            mask.to(device, non_blocking=True),
            lengths.to(device, non_blocking=True),
        )
        for slot, keep in keeps.items():
            self.lengths[slot] = int(keep.sum())

    def clear(self, slot: int) -> None:
        """Forget a slot and what it held, numbers that are not finite among it."""
        self.kv[:, :, slot].zero_()
        self.lengths[slot] = 0

    def truncate(self, slot: int, length: int) -> None:
        """Forget all but the first `length` tokens of a slot."""
        self.lengths[slot] = min(length, self.lengths[slot])

    def move(self, source: int, target: int) -> None:
        """Let slot `target` hold what slot `source` holds."""
        length = self.lengths[source]
        self.kv[:, :, target, :length] = self.kv[:, :, source, :length]
        self.lengths[target] = length


@dataclass(frozen=True)
class Rows:
    """Rows of a forward that attend in one call: their new tokens lie side by side in it.

    For the call they are padded on the left, so that the last query of each is its last token. Every tensor
    is on the device of the cache.
    """

    slots: Tensor  # int32 [b]
    neighbours: slice | None  # the same, if these are neighbours
    counts: Tensor  # int32 [b]: new tokens of each row
    ends: Tensor  # int32 [b]: length of each slot after this forward
    used: int  # no end is behind it
    width: int  # T, the highest count
    real: Tensor | None  # bool [b, T]: not padding; None: all are
    tokens: int  # sum of counts

    @classmethod
    def of(cls, slots: list[int], counts: list[int], ends: list[int], device: torch.device) -> Rows:
        width, together = max(counts), slice(slots[0], slots[0] + len(slots))
        index, count, end = torch.tensor([slots, counts, ends], dtype=torch.int32).to(device)
        padded = min(counts) < width
        return cls(
            slots=index,
            neighbours=together if slots == list(range(together.start, together.stop)) else None,
            counts=count,
            ends=end,
            used=max(ends),
            width=width,
            real=torch.arange(width, device=device) >= width - count[:, None] if padded else None,
            tokens=sum(counts),
        )

    @cached_property
    def visible(self) -> Tensor:
        """bool [b, 1, T, used], which entries each query sees; the same in every layer."""
        device = self.ends.device
        last = self.ends[:, None] + torch.arange(-self.width, 0, device=device)
        # Padding sees the first entry, as a row without any would be NaN.
        return (torch.arange(self.used, device=device) <= last.clamp(min=0)[..., None])[:, None]

    def attend(
        self, query: Tensor, keys: Tensor, values: Tensor, scale: float, flash: Callable[..., Tensor] | None
    ) -> Tensor:
        """query [tokens, Hq, D], keys and values [slots, capacity, Hkv, D] -> [tokens, Hq, D].

        Query t of a row sees the entries of its slot before `ends - count + t + 1`.
        """
        if self.real is None:
            padded = query.unflatten(0, (-1, self.width))
        else:
            padded = query.new_zeros(*self.real.shape, *query.shape[1:])
            padded[self.real] = query
        if query.device.type == "cpu":
            settings = {"cache_batch_idx": self.slots, "query_lens": self.counts, "scale": scale}
            out = cached_attention(padded, keys, values, self.ends, **settings)
        elif flash is not None:
            out = self._flash(flash, padded, keys, values, scale)
        else:
            out = self._sdpa(padded, keys, values, scale)
        return out.flatten(0, 1) if self.real is None else out[self.real]

    def _sdpa(self, query: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
        b, new, heads, dim = query.shape
        rows = self.slots if self.neighbours is None else self.neighbours
        query, keys, values = (x.transpose(1, 2) for x in (query, keys[rows], values[rows]))
        keys, values = keys[:, :, : self.used], values[:, :, : self.used]
        group = heads // keys.shape[1]
        if new == 1:  # the query heads of a KV head stand as so many queries: nothing is repeated
            query = query.reshape(b, heads // group, group, dim)
        elif group > 1:
            keys, values = (x.repeat_interleave(group, dim=1) for x in (keys, values))
        out = scaled_dot_product_attention(query, keys, values, attn_mask=self.visible, scale=scale)
        return out.reshape(b, heads, new, dim).transpose(1, 2)

    def _flash(
        self, flash: Callable[..., Tensor], query: Tensor, keys: Tensor, values: Tensor, scale: float
    ) -> Tensor:
        rows: Tensor | None = self.slots
        if self.neighbours is not None:
            keys, values, rows = keys[self.neighbours], values[self.neighbours], None
        # Bottom-right causal masks: the last query sees all of its slot, as it must with padding on the left.
        return flash(
            query,
            keys[:, : self.used],
            values[:, : self.used],
            cache_seqlens=self.ends,
            cache_batch_idx=rows,
            softmax_scale=scale,
            causal=True,
        )


@dataclass(frozen=True)
class Step:
    """One forward over some of the slots: `mem1_cache` of `mem1_core.integrations.transformers`.

    Its tokens are one sequence to the model, [1, N], row after row: nothing is padded but where rows attend.
    """

    kv: Tensor  # [layers, 2, slots, capacity, Hkv, D]
    flash: Callable[..., Tensor] | None  # flash-attn's function, where it is to be used
    slots: Tensor  # int64 [N]: where each token is stored
    columns: Tensor  # int64 [N]
    parts: list[Rows]  # in the order of the tokens

    def attend(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Store key and value [1, Hkv, N, D] and let each query attend to all that its row's slot holds.

        query [1, Hq, N, D] -> [1, N, Hq, D].
        """
        layer: Any = module.layer_idx
        self.kv[layer][:, self.slots, self.columns] = torch.cat((key, value)).transpose(1, 2)
        (keys, values), out, begin = self.kv[layer], [], 0
        for part in self.parts:
            of_part = query[0, :, begin : begin + part.tokens].transpose(0, 1)
            out.append(part.attend(of_part, keys, values, scale, self.flash))
            begin += part.tokens
        return (out[0] if len(out) == 1 else torch.cat(out))[None]


def flash_attention(kv: Tensor) -> Callable[..., Tensor] | None:
    """flash-attn's KV-cache function, if it is installed and takes this cache."""
    if kv.device.type != "cuda" or kv.dtype not in (torch.bfloat16, torch.float16) or kv.shape[-1] > 256:
        return None
    if importlib.util.find_spec("flash_attn") is None:
        return None
    # Its fourth generation alone brings a package of that name without this function.
    return getattr(importlib.import_module("flash_attn"), "flash_attn_with_kvcache", None)
