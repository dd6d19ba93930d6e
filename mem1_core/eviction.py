"""From the segments of a trajectory and a rule of forgetting to the lifetime of each token, and what follows.

A rule (see `eviction_policies`) is asked whenever a segment is complete. `EvictionTable` asks it, in a
rollout as in training, so that one rule gives the prunes of the cache, the training masks, the metrics and
the pictures.
"""

from __future__ import annotations

import reprlib
from collections.abc import Iterable

import torch
from torch import Tensor

from mem1_core.eviction_policies import EvictionPolicy, Recorded, policy_name, resolve_policy
from mem1_core.segments import Segment, check_segments, is_action, is_kind, policy_tokens


class EvictionError(ValueError):
    """A rule of forgetting has said what no rule may."""


class EvictionTable:
    """The lifetimes of a trajectory's segments while it is written.

    segments: those added that the rule gets to see. lifetimes: of each of them the index of the first token
    that does not see it any more, None while it may be seen. tokens: how many there are.
    """

    def __init__(self, prune: EvictionPolicy = "action") -> None:
        self.segments: list[Segment] = []
        self.lifetimes: list[int | None] = []
        self.tokens = 0
        self._rule, self._name = resolve_policy(prune), policy_name(prune)

    def add(self, segment: Segment) -> bool:
        """A segment is complete: ask the rule. True if something leaves; the segment's last token still sees
        it.

        One without tokens is left out, unless it is the action behind a state: it says that there is no more
        of this turn. Raises EvictionError, with token and turn, for a rule that brings back what has left or
        lets the prompt leave, and for one that does not give a flag for each segment.
        """
        before = self.segments[-1] if self.segments else Segment("prompt", 0, 0)
        closes = is_action(segment.kind) and (before.kind, before.turn) == ("state", segment.turn)
        if not segment.length and not closes:
            return False
        self.segments.append(segment)
        self.lifetimes.append(None)
        self.tokens += segment.length
        stays = self._flags()
        leaves, token = False, 0
        for n, ((kind, turn, length), stay) in enumerate(zip(self.segments, stays, strict=True)):
            if stay == (self.lifetimes[n] is not None):
                if stay or kind == "prompt":
                    expected = "what has left to stay away" if stay else "the prompt to stay"
                    raise EvictionError(
                        f"prune: expected {expected}, but {self._name} {'brings back' if stay else 'drops'} "
                        f"token {token} ({kind} of turn {turn}) at token {self.tokens}"
                    )
                self.lifetimes[n] = self.tokens
                leaves |= length > 0
            token += length
        return leaves

    def _flags(self) -> list[bool]:
        """What the rule says now."""
        answer = self._rule(tuple(self.segments))
        try:
            stays = [bool(flag) for flag in answer]
        except (TypeError, ValueError, RuntimeError):  # nothing to go through, or flags that are arrays
            stays = []
        if len(stays) != len(self.segments):
            raise EvictionError(
                f"prune: expected of {self._name} a flag for each of {len(self.segments)} segments, got "
                f"{reprlib.repr(answer)} at token {self.tokens}, in turn {self.segments[-1].turn}"
            )
        return stays

    def evict(self) -> Tensor:
        """int32 [tokens]: the lifetime of each token; `tokens` where it may be seen."""
        ends = [self.tokens if end is None else end for end in self.lifetimes]
        return self._per_token(torch.tensor(ends, dtype=torch.int32))

    def alive(self) -> Tensor:
        """bool [tokens]: those that the next token may see."""
        return self._per_token(torch.tensor([end is None for end in self.lifetimes], dtype=torch.bool))

    def _per_token(self, of_segments: Tensor) -> Tensor:
        lengths = torch.tensor([segment.length for segment in self.segments], dtype=torch.int64)
        return of_segments.repeat_interleave(lengths)

    def recorded(self) -> Recorded:
        """What the rule has decided, as a rule for this trajectory alone: a file can keep it."""
        return Recorded(tuple(self.lifetimes), self._name)


def eviction_table(segments: Iterable[Segment], prune: EvictionPolicy = "action") -> EvictionTable:
    """The table of a trajectory that has been written; for `segments` and errors see
    `evict_from_segments`.
    """
    table, before = EvictionTable(prune), None
    for segment in check_segments(segments):
        if before is not None and before.kind == "state" and not is_action(segment.kind):
            table.add(Segment("query", before.turn, 0))
        table.add(segment)
        if segment.length or is_action(segment.kind):
            before = segment
    return table


def evict_from_segments(segments: Iterable[Segment], prune: EvictionPolicy = "action") -> Tensor:
    """int32 [N], the lifetimes of a trajectory's tokens; the tokens are those of `segments`, in order.

    `prune` says which segments leave when, always at the end of a segment, whose *last* token still sees
    them; the prompt stays, and what never leaves has `evict = N`:

    - `"action"`: all before turn `t` when the action of `t` is complete. A turn without an action prunes
      nothing.
    - `"state"`: likewise at `</IS>`, the end of turn `t`'s `state` segment; if missing or empty, as
      `"action"`.
    - `"never"`: none, the full-context agent.
    - a number `W >= 1`, the truncating agent: as `"action"`, but only until the turns that stay, `t` (up to
      its action) among them, have at most `W` tokens.
    - another rule of `eviction_policies`, as an object or its short form ("last_turns=3"), or a function of
      your own from the segments so far to a flag for each, True while it may be seen.

    Raises ValueError for another `prune`, and naming the segment that breaks the order prompt, then turns 1,
    2, ... each of `state`, an action, `info` (any of them may be missing); EvictionError, naming token and
    turn, for a function that brings something back.
    """
    return eviction_table(segments, prune).evict()


def dependency_length(
    segments: Iterable[Segment], prune: EvictionPolicy = "action", *, prompt: bool = True
) -> float:
    """The paper's measure of attention work, in token pairs: sum of `(context + length / 2) * length`.

    The sum runs over the segments that the policy wrote; `context` is the number of tokens live when one
    begins. (Where no prune falls between an action's `state` and its `query` or `answer`, their two terms are
    the one of the whole action.) `prompt=False` leaves the prompt's tokens out of the context, which is
    the official definition. It does not depend on the regime: `reencode` holds the same tokens as `carry`.

    Equivalent: half a token less than what each policy token sees, itself included, summed up.
    """
    segments = check_segments(segments)
    evict, written = evict_from_segments(segments, prune), policy_tokens(segments)
    live = live_counts(evict[None], None if prompt else ~is_kind(segments, ("prompt",))[None])[0]
    return int(live[written].sum()) - int(written.sum()) / 2


def window_evict(positions: Tensor, window: int, lengths: Tensor | None = None) -> Tensor:
    """int32 [B, N]: the lifetimes in a window, `pos[i] - pos[j] < window`, of tokens whose positions ascend.

    positions: integer [B, N], ascending in the first `lengths` [B] of each row (all where None).
    """
    places = torch.arange(positions.shape[1], device=positions.device)
    positions = positions.long()
    if lengths is not None:
        positions = positions.masked_fill(places >= lengths[:, None], 2**62)
    return torch.searchsorted(positions, positions + min(window, 2**32)).to(torch.int32)


def live_counts(evict: Tensor, counted: Tensor | None = None) -> Tensor:
    """int32 [B, N], how many keys each query sees, itself included, in O(N); see
    `TrajectoryMask.visible_counts`."""
    # A counted key adds one at its own index and takes it back at `evict`; the running sum is what is live.
    born = torch.ones_like(evict) if counted is None else counted.to(torch.int32)
    change = torch.nn.functional.pad(born, (0, 1)).scatter_add_(1, evict.long(), -born)
    return change.cumsum(1, dtype=torch.int32)[:, :-1].contiguous()
