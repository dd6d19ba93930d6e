"""The packages of the extra `web`: what needs one takes it from here."""

from __future__ import annotations

from importlib.util import find_spec

from mem1.checks import InputError

INSTALL = "pip install 'mem1_core[web]'"

try:
    import aiohttp
    import aiohttp.abc
    import yarl
except ImportError as error:
    raise InputError(f"mem1.envs.web: expected aiohttp, got {error}: {INSTALL}") from None
if find_spec("trafilatura") is None:  # only html_worker.py loads it
    raise InputError(f"mem1.envs.web: expected trafilatura, got none: {INSTALL}")

__all__ = ["INSTALL", "aiohttp", "yarl"]
