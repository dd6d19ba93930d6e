from __future__ import annotations

import importlib
import sys

import pytest
import web_server  # noqa: F401  skips where packages are missing

from mem1.checks import InputError


@pytest.mark.parametrize("package", ["aiohttp", "trafilatura"])
def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    monkeypatch.delitem(sys.modules, "mem1.envs.web.web_packages", raising=False)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(InputError, match=rf"{package}.*pip install 'mem1_core\[web\]'"):
        importlib.import_module("mem1.envs.web.web_packages")
