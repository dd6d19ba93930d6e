"""What the warm start learns from: sequences of tokens of which some are to be written by the policy."""

from __future__ import annotations

from typing import NamedTuple

from mem1_core.eviction import EvictionPolicy
from mem1_core.segments import Segment


class Example(NamedTuple):
    """One sequence: its token ids, who writes which of them, and by which rule it is pruned.

    The lengths of the segments sum to the number of ids.
    """

    tokens: list[int]
    segments: list[Segment]
    prune: EvictionPolicy


__all__ = ["Example"]
