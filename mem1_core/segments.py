"""What a trajectory consists of: runs of tokens of one kind, in the order of the turns."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

ENVIRONMENT_KINDS = ("prompt", "info")  # written by the environment; everything else by the policy


class Segment(NamedTuple):
    """A run of `length` tokens of one kind. The prompt has turn 0, the first action turn 1.

    kind: "prompt"; "state", the policy's notes; "info", what the environment says; anything else is an action
    of the policy: "query", "answer", or what a format of tags calls it.
    """

    kind: str
    turn: int
    length: int


def check_segments(segments: Iterable[Segment]) -> tuple[Segment, ...]:
    """`segments` as a tuple of Segment; TypeError or ValueError for a wrong kind, length or order."""
    checked: list[Segment] = []
    for n, item in enumerate(segments):
        if not isinstance(item, tuple) or len(item) != 3:
            raise TypeError(f"segments[{n}]: expected a Segment(kind, turn, length), got {item!r}")
        segment = Segment(*item)
        kind, turn, length = segment
        if not isinstance(kind, str) or not kind.isidentifier() or kind != kind.lower():
            raise ValueError(f"segments[{n}].kind: expected a lower-case word, got {kind!r}")
        if not isinstance(turn, int) or not isinstance(length, int):
            raise TypeError(f"segments[{n}]: expected int turn and length, got {turn!r} and {length!r}")
        if length < 0:
            raise ValueError(f"segments[{n}].length: expected 0 or more, got {length}")
        before = checked[-1] if checked else Segment("prompt", 0, 0)
        if kind == "prompt":
            if n > 0 or turn != 0:
                raise ValueError(
                    f"segments[{n}]: expected the prompt first and with turn 0, got position {n}, turn {turn}"
                )
        elif turn == before.turn and turn > 0:
            if _place(kind) <= _place(before.kind):
                raise ValueError(
                    f"segments[{n}].kind: expected the order state, an action, info in turn {turn}, "
                    f"got {kind!r} after {before.kind!r}"
                )
        elif turn != before.turn + 1:
            same = f"{before.turn} or " if before.turn else ""
            raise ValueError(f"segments[{n}].turn: expected {same}{before.turn + 1}, got {turn}")
        checked.append(segment)
    return tuple(checked)


def _place(kind: str) -> int:
    """Of a kind in its turn."""
    return {"prompt": 0, "state": 0, "info": 2}.get(kind, 1)


def by_policy(kind: str) -> bool:
    """Whether segments of this kind are written by the policy."""
    return kind not in ENVIRONMENT_KINDS


def is_action(kind: str) -> bool:
    """Whether segments of this kind are actions: what a turn of the policy ends with."""
    return by_policy(kind) and kind != "state"


def policy_tokens(segments: Iterable[Segment]) -> Tensor:
    """bool [N], True where a token was written by the policy."""
    return ~is_kind(check_segments(segments), ENVIRONMENT_KINDS)


def is_kind(segments: Sequence[Segment], kinds: tuple[str, ...]) -> Tensor:
    """bool [N], True where a token is of one of `kinds`; `segments` have been checked."""
    flags = torch.tensor([segment.kind in kinds for segment in segments], dtype=torch.bool)
    return flags.repeat_interleave(torch.tensor([segment.length for segment in segments], dtype=torch.int64))
