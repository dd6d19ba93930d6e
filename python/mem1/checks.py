"""What settings are checked with, and the error that a user's own mistakes are told by."""

from __future__ import annotations

import math
import sys
from collections.abc import Collection
from numbers import Integral, Real
from typing import Any


class InputError(ValueError):
    """What the user gave cannot be used. The command line shows it as one line, all else with a traceback."""


def require(condition: bool, name: str, wanted: str, value: object) -> None:
    """InputError "name: expected ..., got ..." unless `condition`."""
    if not condition:
        raise InputError(f"{name}: expected {wanted}, got {value!r}")


def require_integers(settings: Any, names: str, least: int, most: float = math.inf) -> None:
    """Every field of `settings` in `names` (separated by blanks) is an integer from `least` to `most`.

    Numpy's numbers become Python's, here as below: settings are saved.
    """
    span = f">= {least}" if most == math.inf else f"from {least} to {most}"
    for name in names.split():
        value = getattr(settings, name)
        fits = isinstance(value, Integral) and not isinstance(value, bool) and least <= value <= most
        require(fits, name, f"an integer {span}", value)
        object.__setattr__(settings, name, int(value))


def require_numbers(
    settings: Any, names: str, least: float = 0.0, most: float = math.inf, *, above: bool = False
) -> None:
    """Every field in `names` is a finite number from `least` to `most`; greater than `least` with `above`."""
    span = f"{'>' if above else '>='} {least:g}" + ("" if most == math.inf else f" and <= {most:g}")
    for name in names.split():
        value = getattr(settings, name)
        fits = isinstance(value, Real) and not isinstance(value, bool)
        # Compared first: an integer beyond float64 cannot be converted.
        fits = fits and least <= value <= min(most, sys.float_info.max) and not (above and value == least)
        require(fits, name, f"a finite number {span}", value)
        object.__setattr__(settings, name, float(value))


def require_flags(settings: Any, names: str) -> None:
    """Every field in `names` is True or False."""
    for name in names.split():
        require(isinstance(getattr(settings, name), bool), name, "True or False", getattr(settings, name))


def require_choice(settings: Any, name: str, choices: Collection[str]) -> None:
    """The field `name` is one of `choices`."""
    require(getattr(settings, name) in choices, name, f"one of {', '.join(choices)}", getattr(settings, name))
    object.__setattr__(settings, name, str(getattr(settings, name)))
