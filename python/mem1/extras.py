"""Packages that are installed by name alone, as in `pip install 'mem1_core[web]'`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from mem1.checks import InputError


@contextmanager
def extra(name: str, what: str) -> Iterator[None]:
    """Around imports of the extra `name`: InputError, for `what` needs it, where a package is missing."""
    try:
        yield
    except ImportError as error:
        raise InputError(
            f"{what}: expected the package {error.name}, got none ({error}): pip install 'mem1_core[{name}]'"
        ) from None
