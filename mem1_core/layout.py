"""A trajectory laid out for one training forward: which tokens, at which positions, where the labels are."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from mem1_core.eviction import evict_from_segments
from mem1_core.eviction_policies import EvictionPolicy
from mem1_core.mask import TrajectoryMask
from mem1_core.segments import Segment, check_segments, policy_tokens

Regime = Literal["carry", "reencode", "paper"]


@dataclass(frozen=True, eq=False)  # tensors have no single truth value to compare by
class TrajectoryLayout:
    """A stream of `N` rows for one forward, and how its logits map to the policy's tokens.

    ```
    ids = tokens[layout.token_index][None]
    hidden = trunk(ids, layout.position_ids[None], layout.mask)[0]  # [N, H]
    logprob, entropy = linear_logprob(hidden[layout.logit_rows], weight, tokens[layout.targets])  # [M]
    per_trajectory = layout.split_by_trajectory(logprob)  # tensors [length]
    ```
    where `tokens` are the trajectories' own tokens, concatenated. The three regimes (see `from_segments`)
    differ in nothing but the contents of these tensors. For what is kept per token of the trajectories
    (advantages, sampled log-probs), `torch.cat(per_trajectory)[layout.targets]` is the way in.
    """

    mask: TrajectoryMask  # [1, N]
    token_index: Tensor  # int64 [N]: row n holds token token_index[n] of the concatenated trajectories
    position_ids: Tensor  # int64 [N]
    logit_rows: Tensor  # int64 [M]: the row whose logits predict ...
    targets: Tensor  # int64 [M]: ... this token (likewise); one per policy token, ascending
    lengths: tuple[int, ...]  # tokens of each trajectory

    @property
    def loss_mask(self) -> Tensor:
        """bool [N], the rows that carry a label."""
        return torch.zeros_like(self.token_index, dtype=torch.bool).index_fill_(0, self.logit_rows, True)

    @classmethod
    def from_segments(
        cls, segments: Iterable[Segment], *, regime: Regime = "carry", prune: EvictionPolicy = "action"
    ) -> TrajectoryLayout:
        """The layout of one trajectory.

        - `"carry"`: one copy, positions 0 .. N-1, the mask is `evict`. Exact for a rollout that prunes its
          cache in place.
        - `"reencode"`: exact for a rollout that re-encodes the pruned context. Each prune event starts a
          block: copies of the survivors behind the first token that has left, then the new tokens up to the
          next event. A block sees what stands before that token (MEM1: the prompt) and itself; positions are
          places in the context; a token is trained where it is new.
        - `"paper"`: the layout of `"carry"`, to be used with a rollout that re-encodes. Approximate, as
          published.

        Raises ValueError for an unknown regime, for segments out of order, or when the policy's first token
        has no predecessor to predict it (no prompt).
        """
        if regime not in get_args(Regime):
            raise ValueError(f"regime: expected one of {get_args(Regime)}, got {regime!r}")
        segments = check_segments(segments)
        evict = evict_from_segments(segments, prune)
        targets = policy_tokens(segments).nonzero()[:, 0]
        if targets.numel() and int(targets[0]) == 0:
            raise ValueError(
                "segments: expected a prompt of at least one token to predict the first action from, got none"
            )
        if regime == "reencode":
            return _reencode(segments, evict, targets)
        tokens = torch.arange(evict.shape[0])
        return cls(
            TrajectoryMask(evict[None], segments), tokens, tokens, targets - 1, targets, (evict.shape[0],)
        )

    @classmethod
    def pack(cls, layouts: Sequence[TrajectoryLayout]) -> TrajectoryLayout:
        """Many layouts one after another in one stream; their trajectories concatenate in the same order."""
        mask = TrajectoryMask.pack([layout.mask for layout in layouts])
        none = torch.empty(0, dtype=torch.int64, device=mask.device)
        source, positions, rows, targets = [none], [none], [none], [none]
        row = token = 0
        for layout in layouts:
            source.append(layout.token_index + token)
            positions.append(layout.position_ids)
            rows.append(layout.logit_rows + row)
            targets.append(layout.targets + token)
            row += layout.token_index.shape[0]
            token += sum(layout.lengths)
        lengths = tuple(n for layout in layouts for n in layout.lengths)
        tensors = torch.cat(source), torch.cat(positions), torch.cat(rows), torch.cat(targets)
        return cls(mask, *tensors, lengths)

    def to(self, device: torch.device | str) -> TrajectoryLayout:
        return TrajectoryLayout(
            self.mask.to(device),
            self.token_index.to(device),
            self.position_ids.to(device),
            self.logit_rows.to(device),
            self.targets.to(device),
            self.lengths,
        )

    def split_by_trajectory(self, values: Tensor) -> list[Tensor]:
        """`values` [M] as one tensor [length] per trajectory, 0 where no policy token. Differentiable."""
        if values.shape != self.targets.shape:
            expected = f"one per policy token, shape {list(self.targets.shape)}"
            raise ValueError(f"values: expected {expected}, got {list(values.shape)}")
        everything = values.new_zeros(sum(self.lengths)).index_copy(0, self.targets, values)
        return list(everything.split(self.lengths))


def _reencode(segments: tuple[Segment, ...], evict: Tensor, targets: Tensor) -> TrajectoryLayout:
    total = evict.shape[0]
    events = [event for event in evict.unique().tolist() if event < total]
    context = rows = source = positions = torch.empty(0, dtype=torch.int64)  # tokens seen, and their rows
    lifetimes = torch.empty(0, dtype=torch.int64)  # of rows; those without an end yet have 0
    predecessor = torch.zeros(total, dtype=torch.int64)  # the row before the one in which each token is new
    for begin, end in zip([0, *events], [*events, total], strict=True):
        stays = evict[context] > begin
        kept = int(stays.long().cumprod(0).sum())  # up to the first that has left, all is as it was
        survivors, new = context[kept:][stays[kept:]], torch.arange(begin, end)
        lifetimes[rows[kept:]] = source.shape[0]
        again = torch.cat([survivors, new])
        rows = torch.cat([rows[:kept], torch.arange(source.shape[0], source.shape[0] + again.shape[0])])
        context = torch.cat([context[:kept], again])
        first = kept + survivors.shape[0]  # place of the first new token
        predecessor[begin:end] = rows[max(first - 1, 0) : -1] if first else rows.roll(1)
        source = torch.cat([source, again])
        positions = torch.cat([positions, torch.arange(kept, context.shape[0])])
        lifetimes = torch.cat([lifetimes, torch.zeros_like(again)])
    lifetimes[lifetimes == 0] = source.shape[0]
    places = positions[None].to(torch.int32)
    mask = TrajectoryMask(lifetimes[None].to(torch.int32), _runs(segments, source), places)
    return TrajectoryLayout(mask, source, positions, predecessor[targets], targets, (total,))


def _runs(segments: tuple[Segment, ...], source: Tensor) -> list[Segment]:
    """The segments of the stream, copies included, for the picture."""
    if source.numel() == 0:
        return []
    lengths = torch.tensor([segment.length for segment in segments])
    owner = torch.arange(len(segments)).repeat_interleave(lengths)[source]
    # A jump within one segment is a new run too: a segment cut by a prune, copied to the next block.
    breaks = (owner.diff() != 0) | (source.diff() != 1)
    bounds = [0, *(breaks.nonzero()[:, 0] + 1).tolist(), source.shape[0]]
    return [
        segments[int(owner[a])]._replace(length=b - a) for a, b in zip(bounds[:-1], bounds[1:], strict=True)
    ]
