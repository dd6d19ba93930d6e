"""The lifetime of every token of a trajectory: one int32 per token, and all that follows from it.

Token `j` is visible to the queries `j <= i < evict[j]`. This is exactly what a KV cache from which entries
are removed between two steps realises, so the same table drives the training mask, the pruning of the
rollout's cache, peak tokens, dependency length and the picture of a trajectory.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from os import PathLike
from typing import TYPE_CHECKING, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from mem1_core import _library

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Kind = Literal["prompt", "is", "query", "answer", "info"]
Prune = Literal["action", "is", "never"] | int  # a number of tokens: see evict_from_turns
Regime = Literal["carry", "reencode", "paper"]

POLICY_KINDS = ("is", "query", "answer")  # written by the policy; the rest comes from the environment

# The place of a kind in its turn: an action is `is` then `query` or `answer`; `info` is the environment's.
_ORDER = {"prompt": 0, "is": 0, "query": 1, "answer": 1, "info": 2}

# (block_q, block_k) of the plan that the attention backend of a device reads.
DEFAULT_BLOCKS = {"cpu": (64, 64), "cuda": (128, 128)}


class Segment(NamedTuple):
    """A run of `length` tokens of one kind. The prompt has turn 0, the first action turn 1."""

    kind: Kind
    turn: int
    length: int


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

    Build one per batch with `from_evict`, `from_turns` or `packed` and hand it to every layer, head, forward
    and backward. It is immutable, and a plain object whose attributes are tensors, so it can be an argument
    of a function under `torch.compile(fullgraph=True)`: the plan of the device's default tile sizes is made
    here, eagerly, never while tracing.

    The constructor trusts its argument, an `evict` as below with `j < evict[b, j] <= N`, and keeps it. It is
    the way without a wait: on CUDA the plan is made on the device and the host does not synchronise, so that
    a CUDA graph can capture it.

    Attributes: `evict` int32 [B, N], contiguous; `plan` TilePlan; `segments`, what the stream consists of,
    where known (batch of one built from turns): the picture and `peak_tokens(prompt=False)` need it, nothing
    else does.
    """

    evict: Tensor
    plan: TilePlan
    segments: tuple[Segment, ...]

    def __init__(self, evict: Tensor, segments: Iterable[Segment] = ()) -> None:
        self.evict = evict
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
            raise TypeError(f"evict: wanted an integer tensor [N] or [B, N], got {type(evict).__name__}")
        if evict.is_floating_point() or evict.is_complex() or evict.dtype == torch.bool:
            raise TypeError(f"evict: wanted an integer tensor, got {evict.dtype}")
        if evict.dim() not in (1, 2):
            raise ValueError(f"evict: wanted shape [N] or [B, N], got {list(evict.shape)}")
        rows = evict if evict.dim() == 2 else evict[None]
        tokens = rows.shape[1]
        wrong = (rows <= torch.arange(tokens, device=rows.device)) | (rows > tokens)
        if wrong.any():
            b, j = (int(i) for i in wrong.nonzero()[0])
            where = f"evict[{j}]" if evict.dim() == 1 else f"evict[{b}, {j}]"
            raise ValueError(
                f"{where}: wanted a value past its own index and at most N, in [{j + 1}, {tokens}], "
                f"got {int(rows[b, j])}"
            )
        return cls(rows.to(torch.int32, copy=True, memory_format=torch.contiguous_format))

    @classmethod
    def from_turns(
        cls, segments: Iterable[Segment], *, regime: Regime = "carry", prune: Prune = "action"
    ) -> TrajectoryMask:
        """The mask [1, N] that a trajectory is trained with; see `evict_from_turns` and `TrajectoryLayout`.

        `regime="reencode"` gives the mask of the layout's blocks, which is longer than the trajectory.
        """
        from mem1_core.layout import TrajectoryLayout  # layout is built on this module

        return TrajectoryLayout.from_turns(segments, regime=regime, prune=prune).mask

    @classmethod
    def packed(cls, masks: Sequence[TrajectoryMask]) -> TrajectoryMask:
        """Many trajectories, each a batch of one, in one stream [1, sum of N]. They do not see each other.

        Raises ValueError when a mask has B != 1 or the devices differ.
        """
        if not masks:
            return cls(torch.empty(1, 0, dtype=torch.int32))
        for i, mask in enumerate(masks):
            if mask.evict.shape[0] != 1:
                raise ValueError(
                    f"masks[{i}]: wanted a batch of one, got evict of shape {list(mask.evict.shape)}"
                )
            if mask.device != masks[0].device:
                raise ValueError(
                    f"masks[{i}]: wanted device {masks[0].device} like masks[0], got {mask.device}"
                )
        total = sum(mask.evict.shape[1] for mask in masks)
        if total > torch.iinfo(torch.int32).max:
            raise ValueError(f"masks: wanted at most 2^31 - 1 tokens in one stream, got {total}")
        parts, start = [], 0
        for mask in masks:
            parts.append(mask.evict + start)
            start += mask.evict.shape[1]
        # A stream of which only a part is described would be drawn wrongly: describe all of it or nothing.
        known = all(mask.segments or mask.evict.shape[1] == 0 for mask in masks)
        return cls(torch.cat(parts, dim=1), (s for mask in masks for s in mask.segments) if known else ())

    @property
    def shape(self) -> torch.Size:
        """[B, N]."""
        return self.evict.shape

    @property
    def device(self) -> torch.device:
        return self.evict.device

    def to(self, device: torch.device | str) -> TrajectoryMask:
        """The same mask on another device, with the plan that device's backend wants.

        The host does not wait for a copy to the device; it does for one from it.
        """
        evict = self.evict.to(device, non_blocking=self.device.type == "cpu")
        return self if evict is self.evict else TrajectoryMask(evict, self.segments)

    def tile_plan(self, block_q: int, block_k: int) -> TilePlan:
        """The plan for tiles of `block_q` x `block_k` tokens, made on first use and kept.

        O(N + live tiles) on the CPU; on CUDA, where the device makes it, O(N + tiles up to the diagonal).
        Raises ValueError for a size below 1, or for lists that int32 offsets do not reach.
        """
        plan = self._plans.get((block_q, block_k))
        if plan is None:
            if block_q < 1 or block_k < 1:
                raise ValueError(f"block_q, block_k: wanted positive sizes, got {block_q} and {block_k}")
            parts = _library.ops.tile_plan(self.evict, block_q, block_k)
            key_ranges, full_offsets, _, partial_offsets, _ = parts
            query_order = _longest_first(full_offsets.diff() + partial_offsets.diff())
            key_order = _longest_first((key_ranges[..., 3] - key_ranges[..., 0]).flatten())
            plan = TilePlan(block_q, block_k, *(*parts, query_order, key_order))
            self._plans[block_q, block_k] = plan
        return plan

    def dense(self) -> Tensor:
        """bool [B, N, N], True where query `i` (dim 1) sees key `j` (dim 2). O(N^2): references and tests."""
        i = torch.arange(self.evict.shape[1], device=self.device)[:, None]
        return (i.T <= i) & (i < self.evict[:, None, :])

    def live(self, counted: Tensor | None = None) -> Tensor:
        """int32 [B, N], how many keys each query sees, itself included, in O(N).

        `counted` bool [B, N] limits the count to some keys.
        Equivalent to `(dense() & counted[:, None]).sum(-1)`.
        """
        return _live(self.evict, counted)

    def visible_pairs(self) -> int:
        """The number of True entries of `dense()`: the (query, key) pairs that attention must compute."""
        return int((self.evict - torch.arange(self.evict.shape[1], device=self.device)).sum())

    def peak_tokens(self, *, prompt: bool = True) -> Tensor:
        """int64 [B], the most tokens that are live at once; `prompt=False` leaves out the prompt's own.

        Raises ValueError for `prompt=False` when the mask does not know its segments.
        """
        counted = None
        if not prompt and self.evict.numel():
            if not self.segments:
                raise ValueError("prompt: wanted True, as this mask was not built from turns, got False")
            counted = ~_is_kind(self.segments, ("prompt",)).to(self.device).expand_as(self.evict)
        live = self.live(counted).long()
        return live.amax(1) if live.shape[1] else live.new_zeros(live.shape[0])

    def plot(
        self,
        path: str | PathLike[str] | None = None,
        *,
        ax: Axes | None = None,
        title: str | None = None,
        row: int = 0,
    ) -> Figure:
        """Draw who sees whom: query rows against key columns, with turns and prune events marked.

        The colours are the kinds of the segments. `path` saves the figure (the suffix decides the format),
        `ax` draws into an existing plot, `row` picks the row of the batch. Long trajectories are sampled,
        never made N x N. Raises ImportError without matplotlib (`pip install 'mem1_core[plot]'`).
        """
        from mem1_core.plot import plot_mask  # matplotlib is an extra

        return plot_mask(self, path, ax=ax, title=title, row=row)

    def __repr__(self) -> str:
        live = f"{self.plan.live_tiles}/{self.plan.tiles}"
        return f"TrajectoryMask(shape={list(self.shape)}, device={self.device}, live_tiles={live})"


def evict_from_turns(segments: Iterable[Segment], prune: Prune = "action") -> Tensor:
    """int32 [N], the lifetimes of a trajectory's tokens; the tokens are those of `segments`, in order.

    `prune` says which turns are dropped when, always whole ones and the oldest first; the prompt stays:

    - `"action"`: all before turn `t` when the action of `t` is complete. Its *last* token still sees them.
    - `"is"`: likewise at `</IS>`, the end of turn `t`'s `is` segment; if missing or empty, as `"action"`.
    - `"never"`: none, the full-context agent.
    - a number `W >= 1`, the truncating agent, which forgets by age alone: as `"action"`, but only until the
      turns that stay, `t` (up to its action) among them, have at most `W` tokens. `t` itself always stays.

    A turn without an action prunes nothing; what is never pruned has `evict = N`. Raises ValueError for
    another `prune`, or naming the segment that breaks the order prompt, then turns 1, 2, ... each of `is`,
    `query` or `answer`, `info` (any of them may be missing).
    """
    segments = check_segments(segments)
    check_prune(prune)
    window = prune if isinstance(prune, int) else 0
    turns: dict[int, tuple[int, int]] = {}  # turn -> its first token, and the one behind its last
    events: dict[int, int] = {}  # turn -> the index from which on older turns may not be seen any more
    total = 0
    for kind, turn, length in segments:
        begin, _ = turns.get(turn, (total, total))
        total += length
        turns[turn] = begin, total
        if kind in POLICY_KINDS and length and prune != "never":
            if prune != "is" or turn not in events:
                events[turn] = total
    # A turn leaves at the first event behind its end, a later turn's, that finds more than `window` tokens
    # from its begin on: what stays is always a run of the newest turns.
    ascending, lifetimes = list(events.values()), []
    for turn, (begin, end) in turns.items():
        n = bisect_right(ascending, max(end, begin + window))
        lifetimes.append(ascending[n] if turn and n < len(ascending) else total)
    lengths = torch.tensor([end - begin for begin, end in turns.values()], dtype=torch.int64)
    return torch.tensor(lifetimes, dtype=torch.int32).repeat_interleave(lengths)


def dependency_length(segments: Iterable[Segment], prune: Prune = "action", *, prompt: bool = True) -> float:
    """The paper's measure of attention work, in token pairs: sum of `(context + length / 2) * length`.

    The sum runs over the segments that the policy wrote; `context` is the number of tokens live when one
    begins. (Where no prune falls between an action's `is` and its `query` or `answer`, their two terms are
    the one of the whole action.) `prompt=False` leaves the prompt's tokens out of the context, which is
    the official definition. It does not depend on the regime: `reencode` holds the same tokens as `carry`.

    Equivalent: half a token less than what each policy token sees, itself included, summed up.
    """
    segments = check_segments(segments)
    evict, written = evict_from_turns(segments, prune), policy_tokens(segments)
    live = _live(evict[None], None if prompt else ~_is_kind(segments, ("prompt",))[None])[0]
    return int(live[written].sum()) - int(written.sum()) / 2


def check_prune(prune: Prune) -> None:
    """Raises ValueError unless `prune` is a rule of `evict_from_turns`."""
    number = isinstance(prune, int) and not isinstance(prune, bool) and prune >= 1
    if not number and prune not in ("action", "is", "never"):
        raise ValueError(f"prune: wanted 'action', 'is', 'never' or a number of tokens >= 1, got {prune!r}")


def check_segments(segments: Iterable[Segment]) -> tuple[Segment, ...]:
    """`segments` as a tuple of Segment; TypeError or ValueError for a wrong kind, length or order."""
    checked: list[Segment] = []
    for n, item in enumerate(segments):
        if not isinstance(item, tuple) or len(item) != 3:
            raise TypeError(f"segments[{n}]: wanted a Segment(kind, turn, length), got {item!r}")
        segment = Segment(*item)
        kind, turn, length = segment
        if kind not in get_args(Kind):
            raise ValueError(f"segments[{n}].kind: wanted one of {get_args(Kind)}, got {kind!r}")
        if not isinstance(turn, int) or not isinstance(length, int):
            raise TypeError(f"segments[{n}]: wanted int turn and length, got {turn!r} and {length!r}")
        if length < 0:
            raise ValueError(f"segments[{n}].length: wanted 0 or more, got {length}")
        before = checked[-1] if checked else Segment("prompt", 0, 0)
        if kind == "prompt":
            if n > 0 or turn != 0:
                raise ValueError(
                    f"segments[{n}]: wanted the prompt first and with turn 0, got position {n}, turn {turn}"
                )
        elif turn == before.turn and turn > 0:
            if _ORDER[kind] <= _ORDER[before.kind]:
                raise ValueError(
                    f"segments[{n}].kind: wanted the order is, query or answer, info within turn {turn}, "
                    f"got {kind!r} after {before.kind!r}"
                )
        elif turn != before.turn + 1:
            same = f"{before.turn} or " if before.turn else ""
            raise ValueError(f"segments[{n}].turn: wanted {same}{before.turn + 1}, got {turn}")
        checked.append(segment)
    return tuple(checked)


def policy_tokens(segments: Iterable[Segment]) -> Tensor:
    """bool [N], True where a token was written by the policy."""
    return _is_kind(check_segments(segments), POLICY_KINDS)


def _is_kind(segments: Sequence[Segment], kinds: tuple[str, ...]) -> Tensor:
    flags = torch.tensor([segment.kind in kinds for segment in segments], dtype=torch.bool)
    return flags.repeat_interleave(torch.tensor([segment.length for segment in segments], dtype=torch.int64))


def _longest_first(tiles: Tensor) -> Tensor:
    # Equal ones stay in index order: a plan repeats bit for bit.
    return tiles.argsort(descending=True, stable=True).to(torch.int32)


def _live(evict: Tensor, counted: Tensor | None = None) -> Tensor:
    # A counted key adds one at its own index and takes it back at `evict`; the running sum is what is live.
    born = torch.ones_like(evict) if counted is None else counted.to(torch.int32)
    change = torch.nn.functional.pad(born, (0, 1)).scatter_add_(1, evict.long(), -born)
    return change.cumsum(1, dtype=torch.int32)[:, :-1].contiguous()
