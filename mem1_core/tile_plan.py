"""The tiles that attention under a mask has to compute."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class KeyLists(NamedTuple):
    """For each key tile its live query tiles, as `TilePlan` has the live key tiles of a query tile."""

    full_offsets: Tensor  # int32 [B * KT + 1]
    full_tiles: Tensor  # int32 [full tiles, or more]: query tiles, ascending within a key tile
    partial_offsets: Tensor  # int32 [B * KT + 1]
    partial_tiles: Tensor  # int32 [partial tiles, or more]


class TilePlan(NamedTuple):
    """Which (query tile, key tile) pairs attention has to compute, seen from both sides.

    Key tile `k` covers the keys `[k * block_k, min((k + 1) * block_k, N))`, query tiles likewise; there are
    `QT = ceil(N / block_q)` and `KT = ceil(N / block_k)` per row of the batch. A tile is *full* when it has
    `block_k` keys and each of its pairs is visible (no mask needed), *dead* when none is (skipped), else
    *partial*. For one key tile, the live query tiles are one contiguous range from the diagonal on, and the
    full ones one inside it.

    With a window over positions (`TrajectoryMask.windowed`) live query tiles need not be one range: then
    `key_lists` has them, `key_ranges` is what holds without the window, and a tile of which the window hides
    every pair may count as partial.

    On CUDA both lists are allocated at their upper bound, as nothing waits for their lengths: only the part
    below the last offset is filled.
    """

    block_q: int
    block_k: int
    key_ranges: Tensor  # int32 [B, KT, 4]: query tiles (begin, full_begin, full_end, end)
    full_offsets: Tensor  # int32 [B * QT + 1]: where each query tile's full_tiles begin, and the end
    full_tiles: Tensor  # int32 [full tiles, or more]: key tiles, ascending within a query tile
    partial_offsets: Tensor  # int32 [B * QT + 1]
    partial_tiles: Tensor  # int32 [partial tiles, or more]
    query_order: Tensor  # int32 [B * QT]: query tiles, those with the most live key tiles first
    key_order: Tensor  # int32 [B * KT]: key tiles, those with the most live query tiles first
    key_lists: KeyLists | None = None

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """From `key_ranges` to `key_order`, as attention takes them."""
        return self[2:9]

    @property
    def tiles(self) -> int:
        """All tiles of the `B` squares, those above the diagonal included."""
        return (self.full_offsets.shape[0] - 1) * self.key_ranges.shape[1]

    @property
    def live_tiles(self) -> int:
        """Full and partial tiles, read from the offsets: on CUDA this waits for the device, as do the two
        properties made of it."""
        return int(self.full_offsets[-1].long() + self.partial_offsets[-1])

    @property
    def dead_tiles(self) -> int:
        return self.tiles - self.live_tiles

    @property
    def live_ratio(self) -> float:
        """Live tiles over all tiles; 0.0 when there are none. Causal attention approaches 0.5."""
        return self.live_tiles / self.tiles if self.tiles else 0.0


def windowed_plan(plan: TilePlan, positions: Tensor, window: int) -> TilePlan:
    """`plan`, a mask's without a window, less what `pos[i] - pos[j] < window` hides.

    positions: int32 [B, N]. O(B * QT * KT), on the device of the plan and without a wait for it. Told by the
    extremes of a tile's positions: a full one is full, but a partial one may hold no visible pair.
    """
    window = min(window, 2**31 - 1)  # as far as positions go
    low, high = (_of_tiles(positions, plan.block_q, extreme)[:, None] for extreme in ("amin", "amax"))
    first, last = (_of_tiles(positions, plan.block_k, extreme)[..., None] for extreme in ("amin", "amax"))
    tile = torch.arange(low.shape[-1], device=positions.device)
    begin, full_begin, full_end, end = plan.key_ranges[..., None].unbind(2)
    # [B, KT, QT]
    live = (begin <= tile) & (tile < end) & (low - last < window)
    full = (full_begin <= tile) & (tile < full_end) & (high - first < window)
    flags = full, live & ~full
    full_by_query, partial_by_query = (_lists(kind.transpose(1, 2)) for kind in flags)
    full_by_key, partial_by_key = (_lists(kind) for kind in flags)
    query_order, key_order = (longest_first(live.sum(dim).flatten()) for dim in (1, 2))
    return TilePlan(
        plan.block_q,
        plan.block_k,
        plan.key_ranges,
        *full_by_query,
        *partial_by_query,
        query_order,
        key_order,
        KeyLists(*full_by_key, *partial_by_key),
    )


def longest_first(tiles: Tensor) -> Tensor:
    """The order of rows by their number of tiles. Equal ones stay in index order: a plan repeats bit for
    bit.
    """
    return tiles.argsort(descending=True, stable=True).to(torch.int32)


def _of_tiles(positions: Tensor, block: int, extreme: str) -> Tensor:
    """[B, tiles], the least or largest position of each tile."""
    length = positions.shape[1]
    tiles = (length + block - 1) // block
    index = torch.arange(tiles * block, device=positions.device).clamp(max=length - 1)
    return getattr(torch, extreme)(positions[:, index].unflatten(1, (tiles, block)), dim=2)


def _lists(flags: Tensor) -> tuple[Tensor, Tensor]:
    """CSR of bool [B, rows, columns]: offsets [B * rows + 1] and the columns that are set, row by row."""
    rows = flags.flatten(0, 1)
    offsets = torch.nn.functional.pad(rows.sum(1).cumsum(0), (1, 0)).to(torch.int32)
    if flags.is_cuda:  # how many there are is not known here: all columns, the set ones first
        order = rows.flatten().to(torch.int8).argsort(descending=True, stable=True)
        return offsets, (order % max(rows.shape[1], 1)).to(torch.int32)
    return offsets, rows.nonzero()[:, 1].to(torch.int32)
