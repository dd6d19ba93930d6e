"""What the warm start learns from: sequences of tokens of which some are to be written by the policy."""

from __future__ import annotations

from typing import NamedTuple

from mem1_core.trajectory import Prune, Segment


class Example(NamedTuple):
    """One sequence: its token ids, who writes them (lengths sum to the number of ids), and how it is pruned."""

    tokens: list[int]
    segments: list[Segment]
    prune: Prune


__all__ = ["Example"]
