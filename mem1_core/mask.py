"""The attention mask of trajectories: the lifetime of every token, one int32, and all that follows from it.

Token `j` is visible to the queries `j <= i < evict[j]`. This is exactly what a KV cache from which entries
are removed between two steps realises, so the same table drives the training mask, the pruning of the
rollout's cache, peak tokens, dependency length and the picture of a trajectory.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from numbers import Integral

import torch
from torch import Tensor

from mem1_core import _library
from mem1_core.eviction import live_counts
from mem1_core.segments import Segment, is_kind
from mem1_core.tile_plan import TilePlan, longest_first, windowed_plan

# (block_q, block_k) of the plan that the attention backend of a device reads.
DEFAULT_BLOCKS = {"cpu": (64, 64), "cuda": (128, 128)}

_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
_FAR = 2**30  # positions are nearer than that, and their differences fit int32


def check_window(window: int) -> None:
    """Raise TypeError or ValueError unless it is an integer >= 1."""
    if not isinstance(window, Integral) or isinstance(window, bool):
        raise TypeError(f"window: expected an integer, got {type(window).__name__}")
    if window < 1:
        raise ValueError(f"window: expected an integer >= 1, got {window}")


class TrajectoryMask:
    """An attention mask in O(N) memory: `visible[b, i, j] = j <= i < evict[b, j]`, with its tile plan.

    Build one per batch with `from_evict`, `pack` or `TrajectoryLayout` and hand it to every layer, head,
    forward and backward. It is immutable, and a plain object whose attributes are tensors, so it can be an
    argument of a function under `torch.compile(fullgraph=True)`: the plan of the device's default tile sizes
    is made here, so that no graph makes one which is given its masks.

    The constructor trusts its argument, an `evict` as below with `j < evict[b, j] <= N`, and keeps it. It is
    the way without a wait: on CUDA the plan is made on the device and the host does not synchronise, so that
    a CUDA graph can capture it.

    Attributes: `evict_at` int32 [B, N], contiguous; `positions` int32 [B, N], contiguous, of the tokens where
    these are not their places in the stream, which only windows look at; `window`, None or how many of these
    positions a query sees at most, its own included (a window over places is part of `evict_at`); `limits`,
    in a window over positions int32 [B, N], the first position that does not see each key; `plan` TilePlan;
    `segments`, what the stream consists of, where known (batch of one of a layout): the picture and
    `peak_tokens(prompt=False)` need it, nothing else does.
    """

    evict_at: Tensor
    positions: Tensor | None
    window: int | None
    limits: Tensor | None
    plan: TilePlan
    segments: tuple[Segment, ...]

    def __init__(
        self,
        evict: Tensor,
        segments: Iterable[Segment] = (),
        positions: Tensor | None = None,
        window: int | None = None,
    ) -> None:
        self.evict_at, self.positions, self.window = evict, positions, window
        self.limits = None
        if window is not None and positions is not None:  # in int32, which the kernels compare
            self.limits = (positions.long() + min(window, _FAR)).clamp(max=2**31 - 1).to(torch.int32)
        self.segments = tuple(segments)
        self._plans: dict[tuple[int, int], TilePlan] = {}
        self._windowed: dict[int, TrajectoryMask] = {}
        self._placed: tuple[Tensor, int, TrajectoryMask] | None = None
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

        Raises ValueError when a mask has B != 1 or a window over positions, or the devices differ.
        """
        if not masks:
            return cls(torch.empty(1, 0, dtype=torch.int32))
        for i, mask in enumerate(masks):
            if mask.evict_at.shape[0] != 1:
                raise ValueError(
                    f"masks[{i}]: expected a batch of one, got evict of shape {list(mask.evict_at.shape)}"
                )
            if mask.window is not None:
                raise ValueError(f"masks[{i}]: expected one without a window, got one of {mask.window}")
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
        positions = None
        if any(mask.positions is not None for mask in masks):
            positions = torch.cat([mask._places().expand_as(mask.evict_at) for mask in masks], dim=1)
        segments = (s for mask in masks for s in mask.segments) if known else ()
        return cls(torch.cat(parts, dim=1), segments, positions)

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
        to = partial(Tensor.to, device=device, non_blocking=self.device.type == "cpu")
        evict, positions = to(self.evict_at), None if self.positions is None else to(self.positions)
        if evict is self.evict_at:
            return self
        return TrajectoryMask(evict, self.segments, positions, self.window)

    def windowed(self, window: int) -> TrajectoryMask:
        """This mask with a window, `pos[i] - pos[j] < window`; made on first use and kept, with its plan.

        Where positions are places in the stream, that is a shorter lifetime, `min(evict[j], j + window)`. Of
        two windows the smaller holds. Raises TypeError or ValueError unless the window is an integer >= 1.
        """
        check_window(window)
        window = int(window)
        if self.window is not None and window >= self.window:
            return self
        found = self._windowed.get(window)
        if found is None:
            if self.positions is None:
                reach = self._places() + min(window, self.evict_at.shape[1])
                found = TrajectoryMask(torch.minimum(self.evict_at, reach), self.segments)
            else:
                found = TrajectoryMask(self.evict_at, self.segments, self.positions, window)
            self._windowed[window] = found
        return found

    def at_positions(self, positions: Tensor) -> TrajectoryMask:
        """This mask with other positions of its tokens, integers [B, N] or [1, N] of less than 2^30, which
        is looked at on the CPU alone, and not in a graph; a mask for all batches gets as many rows. The mask
        of the last tensor is kept, until it changes. Raises TypeError or ValueError for a tensor that is not
        as said, ValueError for a mask that has a window over positions (one over places stays in force).
        """
        if self.window is not None:
            raise ValueError(f"mask: expected one without a window, got one of {self.window}")
        if not isinstance(positions, Tensor) or positions.dtype not in _INTEGERS:
            got = positions.dtype if isinstance(positions, Tensor) else type(positions).__name__
            raise TypeError(f"positions: expected an integer tensor, got {got}")
        # In a graph a tensor has no version, nor is it the same from call to call.
        known = not torch.compiler.is_compiling() and not positions.is_inference()
        version = positions._version if known else -1
        kept = self._placed
        if version < 0 or kept is None or kept[0] is not positions or kept[1] != version:
            batch, length = self.evict_at.shape
            rows = len(positions) if positions.dim() == 2 and positions.shape[1] == length else 0
            if rows != batch and (rows < 1 or 1 not in (rows, batch)):
                wanted = "B" if batch == 1 else f"{batch} or 1"
                raise ValueError(
                    f"positions: expected shape [{wanted}, {length}], got {list(positions.shape)}"
                )
            if positions.device != self.device:
                raise ValueError(f"positions: expected device {self.device}, got {positions.device}")
            readable = not positions.is_cuda and not torch.compiler.is_compiling()
            if readable and positions.numel() and int(positions.abs().max()) >= _FAR:
                raise ValueError(f"positions: expected less than 2^30, got {int(positions.abs().max())}")
            rows = max(batch, rows) if batch else 0
            evict = self.evict_at.expand(rows, -1).contiguous()
            places = positions.to(torch.int32, copy=True).expand(rows, -1).contiguous()
            kept = positions, version, TrajectoryMask(evict, self.segments, places)
            if version >= 0:
                self._placed = kept
        return kept[2]

    def _places(self) -> Tensor:
        """int32 [B or 1, N]: positions, or places in the stream."""
        if self.positions is not None:
            return self.positions
        return torch.arange(self.evict_at.shape[1], dtype=torch.int32, device=self.device)[None]

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
            query_order = longest_first(full_offsets.diff() + partial_offsets.diff())
            key_order = longest_first((key_ranges[..., 3] - key_ranges[..., 0]).flatten())
            plan = TilePlan(block_q, block_k, *(*parts, query_order, key_order))
            if self.window is not None and self.positions is not None:
                plan = windowed_plan(plan, self.positions, self.window)
            self._plans[block_q, block_k] = plan
        return plan

    def dense(self) -> Tensor:
        """bool [B, N, N], True where query `i` (dim 1) sees key `j` (dim 2). O(N^2): references and tests."""
        return self.visible(torch.arange(self.evict_at.shape[1], device=self.device))

    def visible(self, i: Tensor) -> Tensor:
        """bool [B, len(i), N], the rows of `dense()` for the queries i, integers [n]."""
        j = torch.arange(self.evict_at.shape[1], device=self.device)
        visible = (j <= i[:, None]) & (i[:, None] < self.evict_at[:, None, :])
        if (limits := self.limits) is not None:
            visible &= self._places()[:, i, None] < limits[:, None, :]
        return visible

    def visible_counts(self, counted: Tensor | None = None) -> Tensor:
        """int32 [B, N], how many keys each query sees, itself included, in O(N).

        `counted` bool [B, N] limits the count to some keys.
        Equivalent to `(dense() & counted[:, None]).sum(-1)`.
        A window over positions makes it O(N^2), in pieces.
        """
        if self.limits is None:
            return live_counts(self.evict_at, counted)
        counted = torch.ones_like(self.evict_at, dtype=torch.bool) if counted is None else counted
        pieces = torch.arange(self.evict_at.shape[1], device=self.device).split(1024)
        seen = [(self.visible(i) & counted[:, None]).sum(-1, dtype=torch.int32) for i in pieces]
        return torch.cat(seen, dim=1) if seen else self.evict_at.clone()

    def visible_pairs(self) -> int:
        """The number of True entries of `dense()`: the (query, key) pairs that attention must compute."""
        if self.limits is not None:
            return int(self.visible_counts().sum())
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
