"""What the worlds of the toy have in common: ranges that each episode draws from, and passages."""

from __future__ import annotations

import math
import random
from numbers import Real

from mem1.checks import require
from mem1.envs.toy.words import FILLER


def interval(name: str, value: int | tuple[int, int], low: int, high: int) -> tuple[int, int]:
    """The ends of a range of whole numbers; one number is a range, too. InputError unless it is within
    `low`..`high`.
    """
    ends = tuple(value) if isinstance(value, (tuple, list)) else (value, value)  # a list: of JSON
    fits = len(ends) == 2 and all(isinstance(end, int) and not isinstance(end, bool) for end in ends)
    fits = fits and low <= ends[0] <= ends[1] <= high
    require(fits, name, f"a number or a rising interval within {low}..{high}", value)
    return ends


def whole_number(name: str, value: int, low: int, high: float = math.inf) -> int:
    """A whole number from `low` to `high`. InputError for any other."""
    fits = isinstance(value, int) and not isinstance(value, bool) and low <= value <= high
    require(fits, name, f"a number >= {low}" if high == math.inf else f"a number within {low}..{high}", value)
    return value


def share(name: str, value: float) -> float:
    """A number from 0 to 1. InputError for any other."""
    fits = isinstance(value, Real) and not isinstance(value, bool) and 0.0 <= value <= 1.0
    require(fits, name, "a number from 0 to 1", value)
    return value


def padded(text: str, length: int, rng: random.Random) -> str:
    """A text with unrelated words after it, which make `length` tokens of it."""
    return " ".join([text, *rng.choices(FILLER, k=max(0, length - len(text.split())))])
