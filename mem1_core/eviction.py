"""Rules of forgetting: from the segments of a trajectory to the lifetime of each token, and what follows."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor

from mem1_core.segments import POLICY_KINDS, Segment, check_segments, is_kind, policy_tokens

EvictionPolicy = Literal["action", "state", "never"] | int  # a number of tokens: see evict_from_segments


def evict_from_segments(segments: Iterable[Segment], prune: EvictionPolicy = "action") -> Tensor:
    """int32 [N], the lifetimes of a trajectory's tokens; the tokens are those of `segments`, in order.

    `prune` says which turns are dropped when, always whole ones and the oldest first; the prompt stays:

    - `"action"`: all before turn `t` when the action of `t` is complete. Its *last* token still sees them.
    - `"state"`: likewise at `</IS>`, the end of turn `t`'s `state` segment; if missing or empty, as
      `"action"`.
    - `"never"`: none, the full-context agent.
    - a number `W >= 1`, the truncating agent, which forgets by age alone: as `"action"`, but only until the
      turns that stay, `t` (up to its action) among them, have at most `W` tokens. `t` itself always stays.

    A turn without an action prunes nothing; what is never pruned has `evict = N`. Raises ValueError for
    another `prune`, or naming the segment that breaks the order prompt, then turns 1, 2, ... each of `state`,
    `query` or `answer`, `info` (any of them may be missing).
    """
    segments = check_segments(segments)
    check_prune(prune)
    window = prune if isinstance(prune, int) else 0
    turns: dict[int, tuple[int, int]] = {}  # turn -> its first token, and the one after its last
    events: dict[int, int] = {}  # turn -> the index from which on older turns may not be seen any more
    total = 0
    for kind, turn, length in segments:
        begin, _ = turns.get(turn, (total, total))
        total += length
        turns[turn] = begin, total
        if kind in POLICY_KINDS and length and prune != "never":
            if prune != "state" or turn not in events:
                events[turn] = total
    # A turn leaves at the first event after its end, a later turn's, that finds more than `window` tokens
    # from its begin on: what stays is always a run of the newest turns.
    ascending, lifetimes = list(events.values()), []
    for turn, (begin, end) in turns.items():
        n = bisect_right(ascending, max(end, begin + window))
        lifetimes.append(ascending[n] if turn and n < len(ascending) else total)
    lengths = torch.tensor([end - begin for begin, end in turns.values()], dtype=torch.int64)
    return torch.tensor(lifetimes, dtype=torch.int32).repeat_interleave(lengths)


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


def check_prune(prune: EvictionPolicy) -> None:
    """Raises ValueError unless `prune` is a rule of `evict_from_segments`."""
    number = isinstance(prune, int) and not isinstance(prune, bool) and prune >= 1
    if not number and prune not in ("action", "state", "never"):
        raise ValueError(
            f"prune: expected 'action', 'state', 'never' or a number of tokens >= 1, got {prune!r}"
        )


def live_counts(evict: Tensor, counted: Tensor | None = None) -> Tensor:
    """int32 [B, N], how many keys each query sees, itself included, in O(N); see
    `TrajectoryMask.visible_counts`."""
    # A counted key adds one at its own index and takes it back at `evict`; the running sum is what is live.
    born = torch.ones_like(evict) if counted is None else counted.to(torch.int32)
    change = torch.nn.functional.pad(born, (0, 1)).scatter_add_(1, evict.long(), -born)
    return change.cumsum(1, dtype=torch.int32)[:, :-1].contiguous()
