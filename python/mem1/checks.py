"""What settings are checked with, and the error for a user's own mistakes."""

from __future__ import annotations

import math
import sys
from collections.abc import Collection, Iterable, Sequence
from numbers import Integral, Real
from types import UnionType
from typing import Annotated, Any, Literal, Union, cast, get_args, get_origin


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


def has_type(value: object, hint: Any) -> bool:
    """Whether a value as JSON has it is of a type as annotations have it: of a class, Literal, a union, list,
    dict, Sequence or tuple of such. An integer is a float, True and False are no numbers; a list is a tuple
    and a sequence, too.
    """
    kind, parts = get_origin(hint) or hint, get_args(hint)
    if kind is Any:
        return True
    if kind is Annotated:
        return has_type(value, parts[0])
    if kind in (Union, UnionType):
        return any(has_type(value, part) for part in parts)
    if kind is Literal:
        return any(type(value) is type(part) and value == part for part in parts)
    if kind is None:
        return value is None
    if kind in (int, bool, float):
        return type(value) is kind or (kind is float and type(value) is int)
    if kind is tuple and parts and ... not in parts:
        fits = isinstance(value, (list, tuple)) and len(value) == len(parts)
        return fits and all(map(has_type, cast(Sequence[Any], value), parts))
    if kind in (tuple, Sequence):
        kind = (list, tuple)
    if not isinstance(value, kind):
        return False
    inner = value.values() if isinstance(value, dict) else value
    return not parts or all(
        has_type(one, parts[-1 if kind is dict else 0]) for one in cast(Iterable[Any], inner)
    )


def require_flags(settings: Any, names: str) -> None:
    """Every field in `names` is True or False."""
    for name in names.split():
        require(isinstance(getattr(settings, name), bool), name, "True or False", getattr(settings, name))


def require_choice(settings: Any, name: str, choices: Collection[str]) -> None:
    """The field `name` is one of `choices`."""
    value = getattr(settings, name)
    require(isinstance(value, str) and value in choices, name, f"one of {', '.join(choices)}", value)
    object.__setattr__(settings, name, str(getattr(settings, name)))
