"""What the extra `webshop` installs, imported where it is used."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from mem1.checks import InputError


@contextmanager
def webshop_extra() -> Iterator[None]:
    """Around imports: raises InputError for a package that is missing, and says how to install it."""
    try:
        yield
    except ImportError as error:
        raise InputError(
            f"webshop: expected the package {error.name}, got none: pip install 'mem1_core[webshop]'"
        ) from None
