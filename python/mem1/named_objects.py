"""What a user names as MODULE:NAME."""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any

from mem1.checks import InputError


def imported(text: str) -> Any:
    """The object, of an installed module or one in the current folder. InputError if there is none."""
    module, _, name = text.partition(":")
    sys.path.insert(0, os.getcwd())
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise InputError(f"expected MODULE:NAME, got {text!r}: {error}") from None
    finally:
        sys.path.remove(os.getcwd())
