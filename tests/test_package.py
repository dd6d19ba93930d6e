"""What is shipped: the sdist and the packages are complete, the versions agree, imports work anywhere."""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from checkout import ROOT, tracked_files

import mem1_core

# Folders that go into the sdist whole, and the packages that go into the wheel with where they are kept.
SHIPPED = {"csrc", "mem1_core", "python", "tests", "bench", ".ci"}
PACKAGES = {"mem1_core/": "mem1_core/", "python/mem1/": "mem1/"}


def python(*arguments: str, cwd: Path) -> str:
    done = subprocess.run([sys.executable, *arguments], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def clean_copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tracked files alone, so that no leftover of a build hides a gap."""
    copy = tmp_path_factory.mktemp("copy")
    for path in tracked_files():
        (copy / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / path, copy / path)
    return copy


def test_sdist_is_complete(clean_copy: Path, tmp_path: Path) -> None:
    build = f"from setuptools.build_meta import build_sdist; build_sdist({str(tmp_path)!r})"
    python("-c", build, cwd=clean_copy)
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        shipped = {name.partition("/")[2] for name in tar.getnames()}
    expected = {path for path in tracked_files() if "/" not in path or path.split("/")[0] in SHIPPED}
    assert {path.split("/")[0] for path in expected if "/" in path} == SHIPPED
    assert not expected - {".gitignore"} - shipped, "tracked, but not in the sdist"


def test_packages_are_complete(clean_copy: Path, tmp_path: Path) -> None:
    """What setuptools puts into a wheel besides the compiled part."""
    python("setup.py", "--quiet", "build_py", "--build-lib", str(tmp_path), cwd=clean_copy)
    expected = {
        target + path.removeprefix(source)
        for source, target in PACKAGES.items()
        for path in tracked_files()
        if path.startswith(source)
    }
    assert {"mem1_core/py.typed", "mem1_core/_C.pyi", "mem1/py.typed", "mem1/cli.py"} <= expected
    packed = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    assert packed == expected


def test_versions_agree() -> None:
    match = re.search(r"project\(mem1_core VERSION (\S+)", (ROOT / "CMakeLists.txt").read_text())
    assert match is not None
    (library,) = (Path(mem1_core.cmake_prefix_path) / "lib").glob("libmem1_core.*")
    c_version = ctypes.CDLL(str(library)).mem1_version
    c_version.restype = ctypes.c_char_p
    assert mem1_core.__version__ == match[1]
    assert c_version().decode() == match[1]


def test_installed_version_agrees() -> None:
    assert installed_version() == mem1_core.__version__


def test_imports_from_any_directory(tmp_path: Path) -> None:
    installed_version()
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    code = "from mem1_core.ops import trajectory_attention; import mem1; print(mem1.__all__)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert "MemoryEfficientAgent" in done.stdout, done.stderr


def installed_version() -> str:
    try:
        return importlib.metadata.version("mem1_core")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("mem1_core is not installed here, only on the path")
