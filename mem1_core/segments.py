"""What a trajectory consists of: runs of tokens of one kind, in the order of the turns."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

Kind = Literal["prompt", "state", "query", "answer", "info"]

POLICY_KINDS = ("state", "query", "answer")  # written by the policy; the rest comes from the environment

# The place of a kind in its turn: an action is `state` then `query` or `answer`; `info` is the environment's.
_ORDER = {"prompt": 0, "state": 0, "query": 1, "answer": 1, "info": 2}


class Segment(NamedTuple):
    """A run of `length` tokens of one kind. The prompt has turn 0, the first action turn 1."""

    kind: Kind
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
        if kind not in get_args(Kind):
            raise ValueError(f"segments[{n}].kind: expected one of {get_args(Kind)}, got {kind!r}")
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
            if _ORDER[kind] <= _ORDER[before.kind]:
                raise ValueError(
                    f"segments[{n}].kind: expected the order state, query or answer, info in turn {turn}, "
                    f"got {kind!r} after {before.kind!r}"
                )
        elif turn != before.turn + 1:
            same = f"{before.turn} or " if before.turn else ""
            raise ValueError(f"segments[{n}].turn: expected {same}{before.turn + 1}, got {turn}")
        checked.append(segment)
    return tuple(checked)


def policy_tokens(segments: Iterable[Segment]) -> Tensor:
    """bool [N], True where a token was written by the policy."""
    return is_kind(check_segments(segments), POLICY_KINDS)


def is_kind(segments: Sequence[Segment], kinds: tuple[str, ...]) -> Tensor:
    """bool [N], True where a token is of one of `kinds`; `segments` have been checked."""
    flags = torch.tensor([segment.kind in kinds for segment in segments], dtype=torch.bool)
    return flags.repeat_interleave(torch.tensor([segment.length for segment in segments], dtype=torch.int64))
