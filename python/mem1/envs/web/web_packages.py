"""The packages of the extra `web`: what needs one takes it from here."""

from __future__ import annotations

from importlib.util import find_spec

from mem1.extras import extra

with extra("web", "mem1.envs.web"):
    import aiohttp
    import aiohttp.abc
    import yarl

    if find_spec("trafilatura") is None:  # only html_worker.py loads it
        raise ImportError("No module named 'trafilatura'", name="trafilatura")

__all__ = ["aiohttp", "yarl"]
