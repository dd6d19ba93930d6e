from __future__ import annotations

from pathlib import Path

import pytest
from small_shop import write_shop

from mem1.envs.webshop.webshop_env import WebShopEnv


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small shop's."""
    return write_shop(tmp_path_factory.mktemp("webshop"))


@pytest.fixture
def environment(folder: Path) -> WebShopEnv:
    return WebShopEnv(folder, "all", instruction="")
