"""The attention mask of trajectories: the lifetime of every token, one int32, and all that follows from it.

Token `j` is visible to the queries `j <= i < evict[j]`. This is exactly what a KV cache from which entries
are removed between two steps realises, so the same table drives the training mask, the pruning of the
rollout's cache, peak tokens, dependency length and the picture of a trajectory.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mem1_core import _library
from mem1_core.eviction import live_counts
from mem1_core.segments import Segment, is_kind

# (block_q, block_k) of the plan that the attention backend of a device reads.
DEFAULT_BLOCKS = {"cpu": (64, 64), "cuda": (128, 128)}


class TilePlan(NamedTuple):
    """Which (query tile, key tile) pairs attention has to compute, seen from both sides.

    Key tile `k` covers the keys `[k * block_k, min((k + 1) * block_k, N))`, query tiles likewise; there are
    `QT = ceil(N / block_q)` and `KT = ceil(N / block_k)` per row of the batch. A tile is *full* when it has
    `block_k` keys and each of its pairs is visible (no mask needed), *dead* when none is (skipped), else
    *partial*. For one key tile, the live query tiles are one contiguous range from the diagonal on, and the
    full ones one inside it.

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


class TrajectoryMask:
    """An attention mask in O(N) memory: `visible[b, i, j] = j <= i < evict[b, j]`, with its tile plan.

    Build one per batch with `from_evict`, `pack` or `TrajectoryLayout` and hand it to every layer, head,
    forward and backward. It is immutable, and a plain object whose attributes are tensors, so it can be an
    argument of a function under `torch.compile(fullgraph=True)`: the plan of the device's default tile sizes
    is made here, eagerly, never while tracing.

    The constructor trusts its argument, an `evict` as below with `j < evict[b, j] <= N`, and keeps it. It is
    the way without a wait: on CUDA the plan is made on the device and the host does not synchronise, so that
    a CUDA graph can capture it.

    Attributes: `evict_at` int32 [B, N], contiguous; `plan` TilePlan; `segments`, what the stream consists of,
    where known (batch of one of a layout): the picture and `peak_tokens(prompt=False)` need it, nothing
    else does.
    """

    evict_at: Tensor
    plan: TilePlan
    segments: tuple[Segment, ...]

    def __init__(self, evict: Tensor, segments: Iterable[Segment] = ()) -> None:
        self.evict_at = evict
        self.segments = tuple(segments)
        self._plans: dict[tuple[int, int], TilePlan] = {}
        self.plan = self.tile_plan(*DEFAULT_BLOCKS.get(evict.device.type, (128, 128)))

    @classmethod
    def from_evict(cls, evict: Tensor) -> TrajectoryMask:
        """The mask of an integer tensor `evict` [N] or [B, N] with `j < evict[.., j] <= N`.

        N = 0 and B = 0 are fine. The tensor is copied: writing to it later does not change the mask. On CUDA
        the check of the values synchronises once; the constructor, which has none, does not. Raises TypeError
        for a dtype that is not an integer, ValueError for a wrong number of dimensions or a value out of
        range.
        """
        if not isinstance(evict, Tensor):
            raise TypeError(f"evict: expected an integer tensor [N] or [B, N], got {type(evict).__name__}")
        if evict.is_floating_point() or evict.is_complex() or evict.dtype == torch.bool:
            raise TypeError(f"evict: expected an integer tensor, got {evict.dtype}")
        if evict.dim() not in (1, 2):
            raise ValueError(f"evict: expected shape [N] or [B, N], got {list(evict.shape)}")
        rows = evict if evict.dim() == 2 else evict[None]
        tokens = rows.shape[1]
        wrong = (rows <= torch.arange(tokens, device=rows.device)) | (rows > tokens)
        if wrong.any():
            b, j = (int(i) for i in wrong.nonzero()[0])
            where = f"evict[{j}]" if evict.dim() == 1 else f"evict[{b}, {j}]"
            raise ValueError(
                f"{where}: expected a value past its own index and at most N, in [{j + 1}, {tokens}], "
                f"got {int(rows[b, j])}"
            )
        return cls(rows.to(torch.int32, copy=True, memory_format=torch.contiguous_format))

    @classmethod
    def pack(cls, masks: Sequence[TrajectoryMask]) -> TrajectoryMask:
        """Many trajectories, each a batch of one, in one stream [1, sum of N]. They do not see each other.

        Raises ValueError when a mask has B != 1 or the devices differ.
        """
        if not masks:
            return cls(torch.empty(1, 0, dtype=torch.int32))
        for i, mask in enumerate(masks):
            if mask.evict_at.shape[0] != 1:
                raise ValueError(
                    f"masks[{i}]: expected a batch of one, got evict of shape {list(mask.evict_at.shape)}"
                )
            if mask.device != masks[0].device:
                raise ValueError(
                    f"masks[{i}]: expected device {masks[0].device} like masks[0], got {mask.device}"
                )
        total = sum(mask.evict_at.shape[1] for mask in masks)
        if total > torch.iinfo(torch.int32).max:
            raise ValueError(f"masks: expected at most 2^31 - 1 tokens in one stream, got {total}")
        parts, start = [], 0
        for mask in masks:
            parts.append(mask.evict_at + start)
            start += mask.evict_at.shape[1]
        # A stream of which only a part is described would be drawn wrongly: describe all of it or nothing.
        known = all(mask.segments or mask.evict_at.shape[1] == 0 for mask in masks)
        return cls(torch.cat(parts, dim=1), (s for mask in masks for s in mask.segments) if known else ())

    @property
    def shape(self) -> torch.Size:
        """[B, N]."""
        return self.evict_at.shape

    @property
    def device(self) -> torch.device:
        return self.evict_at.device

    def to(self, device: torch.device | str) -> TrajectoryMask:
        """The same mask on another device, with the plan that device's backend wants.

        The host does not wait for a copy to the device; it does for one from it.
        """
        evict = self.evict_at.to(device, non_blocking=self.device.type == "cpu")
        return self if evict is self.evict_at else TrajectoryMask(evict, self.segments)

    def tile_plan(self, block_q: int, block_k: int) -> TilePlan:
        """The plan for tiles of `block_q` x `block_k` tokens, made on first use and kept.

        O(N + live tiles) on the CPU; on CUDA, where the device makes it, O(N + tiles up to the diagonal).
        Raises ValueError for a size below 1, or for lists that int32 offsets do not reach.
        """
        plan = self._plans.get((block_q, block_k))
        if plan is None:
            if block_q < 1 or block_k < 1:
                raise ValueError(f"block_q, block_k: expected positive sizes, got {block_q} and {block_k}")
            parts = _library.ops.tile_plan(self.evict_at, block_q, block_k)
            key_ranges, full_offsets, _, partial_offsets, _ = parts
            query_order = _longest_first(full_offsets.diff() + partial_offsets.diff())
            key_order = _longest_first((key_ranges[..., 3] - key_ranges[..., 0]).flatten())
            plan = TilePlan(block_q, block_k, *(*parts, query_order, key_order))
            self._plans[block_q, block_k] = plan
        return plan

    def dense(self) -> Tensor:
        """bool [B, N, N], True where query `i` (dim 1) sees key `j` (dim 2). O(N^2): references and tests."""
        i = torch.arange(self.evict_at.shape[1], device=self.device)[:, None]
        return (i.T <= i) & (i < self.evict_at[:, None, :])

    def visible_counts(self, counted: Tensor | None = None) -> Tensor:
        """int32 [B, N], how many keys each query sees, itself included, in O(N).

        `counted` bool [B, N] limits the count to some keys.
        Equivalent to `(dense() & counted[:, None]).sum(-1)`.
        """
        return live_counts(self.evict_at, counted)

    def visible_pairs(self) -> int:
        """The number of True entries of `dense()`: the (query, key) pairs that attention must compute."""
        return int((self.evict_at - torch.arange(self.evict_at.shape[1], device=self.device)).sum())

    def peak_tokens(self, *, prompt: bool = True) -> Tensor:
        """int64 [B], the most tokens that are live at once; `prompt=False` leaves out the prompt's own.

        Raises ValueError for `prompt=False` when the mask does not know its segments.
        """
        counted = None
        if not prompt and self.evict_at.numel():
            if not self.segments:
                raise ValueError("prompt: expected True, as this mask does not know its segments, got False")
            counted = ~is_kind(self.segments, ("prompt",)).to(self.device).expand_as(self.evict_at)
        live = self.visible_counts(counted).long()
        return live.amax(1) if live.shape[1] else live.new_zeros(live.shape[0])

    def __repr__(self) -> str:
        live = f"{self.plan.live_tiles}/{self.plan.tiles}"
        return f"TrajectoryMask(shape={list(self.shape)}, device={self.device}, live_tiles={live})"


def _longest_first(tiles: Tensor) -> Tensor:
    # Equal ones stay in index order: a plan repeats bit for bit.
    return tiles.argsort(descending=True, stable=True).to(torch.int32)
