"""The KV cache of a rollout: one preallocated slot per trajectory, and attention over it.

A slot holds the tokens that its trajectory can still see, in order, without holes: pruning moves the
survivors to the left. What is live is bounded, so a slot is too, and nothing is allocated from token to
token.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from mem1_core.ops import prune_kv_cache_

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

    def truncate(self, slot: int, length: int) -> None:
        """Forget all but the first `length` tokens of a slot."""
        self.lengths[slot] = min(length, int(self.lengths[slot]))

    def move(self, source: int, target: int) -> None:
        """Let slot `target` hold what slot `source` holds."""
        length = int(self.lengths[source])
        self.kv[:, :, target, :length] = self.kv[:, :, source, :length]
        self.lengths[target] = length


class Step(NamedTuple):
    """One forward over some of the slots: `mem1_cache` of `mem1_core.integrations.transformers`.

    Rows are padded on the left, so that the last query of each is its last token. Every tensor is on the
    device of the cache.
    """

    kv: Tensor  # [layers, 2, slots, capacity, Hkv, D]
    rows: slice | Tensor  # the slots that take part, in batch order: neighbours, or int32 [b]
    real: Tensor | None  # bool [b, T]: not padding; None: all are
    slots: Tensor  # int64 [real tokens]: where each of them is stored
    columns: Tensor  # int64 [real tokens]
    ends: Tensor  # int32 [b]: length of each slot after this forward
    used: int  # no end is behind it

    def attend(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Store key and value [b, Hkv, T, D] and attend to all that their slots hold.

        query [b, Hq, T, D] -> [b, T, Hq, D]. Query t of a row sees the entries before `ends - T + t + 1`.
        """
        layer: Any = module.layer_idx
        for which, new in enumerate((key.transpose(1, 2), value.transpose(1, 2))):
            flat = new.flatten(0, 1) if self.real is None else new[self.real]
            self.kv[layer, which][self.slots, self.columns] = flat
        if use_flash_attention(self.kv):
            return self._flash(self.kv[layer], query, scale)
        return self._sdpa(self.kv[layer], query, scale)

    def _sdpa(self, kv: Tensor, query: Tensor, scale: float) -> Tensor:
        b, heads, new, dim = query.shape
        keys, values = (kv[which, self.rows, : self.used].transpose(1, 2) for which in (0, 1))
        group = heads // keys.shape[1]
        last = self.ends[:, None] + torch.arange(-new, 0, device=query.device)  # [b, T], what each query sees
        # Padding sees the first entry, as a row without any would be NaN.
        visible = torch.arange(self.used, device=query.device) <= last.clamp(min=0)[..., None]
        if new == 1:
            # One token of all query heads of a KV head stands as so many queries: enable_gqa costs 20 ms
            # where this takes 1.5 (bf16 on the CPU, 32 rows of 1,000 tokens, 14 heads over 2).
            query = query.reshape(b, heads // group, group, dim)
        elif group > 1:
            keys, values = (x.repeat_interleave(group, dim=1) for x in (keys, values))
        out = scaled_dot_product_attention(query, keys, values, attn_mask=visible[:, None], scale=scale)
        return out.view(b, heads, new, dim).transpose(1, 2)

    def _flash(self, kv: Tensor, query: Tensor, scale: float) -> Tensor:
        from flash_attn import flash_attn_with_kvcache  # an extra

        # Bottom-right causal masks: the last query sees all of its slot, as it must with padding on the left.
        rows = self.rows
        keys, values = (kv[0, rows], kv[1, rows]) if isinstance(rows, slice) else kv
        return flash_attn_with_kvcache(
            query.transpose(1, 2),
            keys,
            values,
            cache_seqlens=self.ends,
            cache_batch_idx=None if isinstance(rows, slice) else rows,
            softmax_scale=scale,
            causal=True,
        )


def use_flash_attention(kv: Tensor) -> bool:
    """Whether flash-attn is installed and takes this cache."""
    return (
        kv.device.type == "cuda"
        and kv.dtype in (torch.bfloat16, torch.float16)
        and kv.shape[-1] <= 256
        and importlib.util.find_spec("flash_attn") is not None
    )
