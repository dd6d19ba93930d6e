"""The KV cache of a rollout: one preallocated slot per trajectory.

A slot holds the tokens that its trajectory can still see, in order, without holes: pruning moves the
survivors to the left. What is live is bounded, so a slot is too, and nothing is allocated from token to
token.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Mapping

import torch
from torch import Tensor

from mem1_core.ops import prune_kv_cache_

_FIRST_CAPACITY = 128  # tokens


class Slots:
    """kv: [layers, 2 (K, V), slots, capacity, Hkv, D]; it grows when a trajectory needs more, unless a
    capacity is given.

    lengths: the tokens in each slot. positions: int32 [slots, capacity], at which each was encoded, where
    they are looked at (`keep_positions`: a model with windows), else None.
    """

    def __init__(
        self,
        layers: int,
        slots: int,
        kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
        capacity: int | None = None,
        keep_positions: bool = False,
    ) -> None:
        self._fixed = capacity is not None
        self.kv = _zeros((layers, 2, slots, capacity or 0, kv_heads, head_dim), dtype, device)
        self.positions = (
            torch.zeros(slots, capacity or 0, dtype=torch.int32, device=device) if keep_positions else None
        )
        self.lengths = [0] * slots
        self._used = 0  # tokens; behind them nothing was ever written, in any slot

    @property
    def capacity(self) -> int:
        """Tokens that a slot has room for."""
        return self.kv.shape[3]

    def reserve(self, tokens: int) -> bool:
        """Make room for `tokens` in each slot. True if the cache has moved to other memory; ValueError if it
        may not grow.
        """
        grows = tokens > self.capacity
        if grows and self._fixed:
            raise ValueError(f"tokens: expected at most {self.capacity} in a slot, got {tokens}")
        self._used = max(self._used, tokens)
        if not grows:
            return False
        capacity = max(tokens, 2 * self.capacity, _FIRST_CAPACITY)
        shape = (*self.kv.shape[:3], capacity, *self.kv.shape[4:])
        grown = _zeros(shape, self.kv.dtype, self.kv.device)
        for slot, length in enumerate(self.lengths):
            grown[:, :, slot, :length] = self.kv[:, :, slot, :length]
        self.kv = grown
        if self.positions is not None:
            self.positions = torch.nn.functional.pad(self.positions, (0, capacity - self.positions.shape[1]))
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
            length = int(keep.sum())
            if self.positions is not None:
                self.positions[slot, :length] = self.positions[slot, : self.lengths[slot]][keep.to(device)]
            self.lengths[slot] = length

    @torch.inference_mode()
    def clear(self, slot: int) -> None:
        """Forget a slot and what it held, numbers that are not finite among it."""
        self.kv[:, :, slot, : self._used].zero_()
        self.lengths[slot] = 0

    def truncate(self, slot: int, length: int) -> None:
        """Forget all but the first `length` tokens of a slot."""
        self.lengths[slot] = min(length, self.lengths[slot])

    def move(self, source: int, target: int) -> None:
        """Let slot `target` hold what slot `source` holds."""
        self.copy(source, target, self.lengths[source])

    @torch.inference_mode()
    def copy(self, source: int, target: int, length: int) -> None:
        """Let slot `target` hold the first `length` tokens of slot `source`, and nothing else. ValueError if
        there are fewer.
        """
        if not 0 <= length <= self.lengths[source]:
            held = self.lengths[source]
            raise ValueError(f"length: expected 0 to {held}, what slot {source} holds, got {length}")
        self.kv[:, :, target, :length] = self.kv[:, :, source, :length]
        if self.positions is not None:
            self.positions[target, :length] = self.positions[source, :length]
        self.lengths[target] = length


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros; on the CPU, memory that is not used before it is written."""
    size = math.prod(shape) * dtype.itemsize
    if device.type != "cpu" or size == 0:
        return torch.zeros(shape, dtype=dtype, device=device)
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(pages, dtype=torch.uint8).view(dtype).view(shape)
