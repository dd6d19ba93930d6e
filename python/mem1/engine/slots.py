"""The KV cache of a rollout: one preallocated slot per trajectory.

A slot holds the tokens that its trajectory can still see, in order, without holes: pruning moves the
survivors to the left. What is live is bounded, so a slot is too, and nothing is allocated from token to
token.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from mem1_core.ops import prune_kv_cache_

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

    @torch.inference_mode()
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

    @torch.inference_mode()
    def clear(self, slot: int) -> None:
        """Forget a slot and what it held, numbers that are not finite among it."""
        self.kv[:, :, slot].zero_()
        self.lengths[slot] = 0

    def truncate(self, slot: int, length: int) -> None:
        """Forget all but the first `length` tokens of a slot."""
        self.lengths[slot] = min(length, self.lengths[slot])

    @torch.inference_mode()
    def move(self, source: int, target: int) -> None:
        """Let slot `target` hold what slot `source` holds."""
        length = self.lengths[source]
        self.kv[:, :, target, :length] = self.kv[:, :, source, :length]
        self.lengths[target] = length
