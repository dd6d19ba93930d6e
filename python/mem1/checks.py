"""What settings are checked with, and the error for a user's own mistakes."""

from __future__ import annotations

import math
import sys
from collections.abc import Collection
from numbers import Integral, Real
from typing import Any


class InputError(ValueError):
    """What the user gave cannot be used. The command line shows it as one line, all else with a traceback."""


def require(condition: bool, name: str, expected: str, value: object) -> None:
    """InputError "name: expected ..., got ..." unless `condition`."""
    if not condition:
        raise InputError(f"{name}: expected {expected}, got {value!r}")


def require_integers(settings: Any, names: str, low: int, high: float = math.inf) -> None:
    """Every field of `settings` in `names` (separated by blanks) is an integer from `low` to `high`.

    Numpy's numbers become Python's, here as below: settings are saved.
    """
    span = f">= {low}" if high == math.inf else f"from {low} to {high}"
    for name in names.split():
        value = getattr(settings, name)
        fits = isinstance(value, Integral) and not isinstance(value, bool) and low <= value <= high
        require(fits, name, f"an integer {span}", value)
        object.__setattr__(settings, name, int(value))


def require_numbers(
    settings: Any, names: str, low: float = 0.0, high: float = math.inf, *, above: bool = False
) -> None:
    """Every field in `names` is a finite number from `low` to `high`; greater than `low` with `above`."""
    span = f"{'>' if above else '>='} {low:g}" + ("" if high == math.inf else f" and <= {high:g}")
    for name in names.split():
        value = getattr(settings, name)
        fits = isinstance(value, Real) and not isinstance(value, bool)
        # Compared first: an integer beyond float64 cannot be converted.
        fits = fits and low <= value <= min(high, sys.float_info.max) and not (above and value == low)
        require(fits, name, f"a finite number {span}", value)
        object.__setattr__(settings, name, float(value))


def require_flags(settings: Any, names: str) -> None:
    """Every field in `names` is True or False."""
    for name in names.split():
        require(isinstance(getattr(settings, name), bool), name, "True or False", getattr(settings, name))


def require_choice(settings: Any, name: str, choices: Collection[str]) -> None:
    """The field `name` is one of `choices`."""
    value = getattr(settings, name)
    require(isinstance(value, str) and value in choices, name, f"one of {', '.join(choices)}", value)
    object.__setattr__(settings, name, str(getattr(settings, name)))
