"""One table of versions: requirements follow from it, constraints.txt keeps to it, imports warn by it."""

from __future__ import annotations

import importlib.metadata
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
from checkout import ROOT

from mem1_core import versions


def warned(name: str, version: str, recwarn: pytest.WarningsRecorder) -> list[str]:
    versions.warn_if_untested(SimpleNamespace(__name__=name, __version__=version))
    return [str(warning.message) for warning in recwarn]


@pytest.mark.parametrize(
    "version", ["5.17", "5.17.0", "5.18.2", "5.24.0", "5.24.7", "5.24.0.dev0", "5.20.0+cpu"]
)
def test_a_tested_version_is_silent(
    version: str, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    monkeypatch.setitem(versions.TESTED, "other", ("5.17", "5.24"))
    assert not warned("other", version, recwarn)


@pytest.mark.parametrize("version", ["5.16.9", "4.57", "5.25.0", "5.25.0.dev0", "6.0", "5.100"])
def test_another_gives_one_warning_that_names_it(
    version: str, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    monkeypatch.setitem(versions.TESTED, "other", ("5.17", "5.24"))
    assert warned("other", version, recwarn) == [
        f"other: expected 5.17 to 5.24, the versions tested, got {version}"
    ]


def test_the_newest_has_the_parts_that_count(
    monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    monkeypatch.setitem(versions.TESTED, "other", ("1.26.3", "2"))
    assert not warned("other", "1.26.3", recwarn) and not warned("other", "2.99.1", recwarn)
    assert warned("other", "1.26.2", recwarn) and len(warned("other", "3.0", recwarn)) == 2


@pytest.mark.parametrize(
    ("package", "modules"),
    [
        ("torch", "mem1_core, mem1_core.ops"),
        ("transformers", "mem1_core.integrations.transformers_generate, mem1.models.build"),
        ("triton", "mem1_core.triton.attention_launch"),
    ],
)
def test_an_import_warns_once(package: str, modules: str) -> None:
    pytest.importorskip(package)
    code = f"import {package}; {package}.__version__ = '99.0'; import {modules}"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert re.findall(r"(\w+): expected \S+ to \S+, the versions tested, got 99.0", done.stderr) == [package]


# ------------------------------------------------------------------------------- requirements, constraints


def listed(lines: list[str]) -> dict[str, str]:
    """The first requirement for each package, without extras and markers."""
    pairs = (re.match(r"([\w-]+)\s*([^;]*)", line).groups() for line in lines)  # type: ignore[union-attr]
    return {name.lower().replace("_", "-"): wanted.strip() for name, wanted in reversed([*pairs])}


CONSTRAINTS = listed(
    [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and line[0] != "#"]
)


def pins(name: str) -> str:
    return CONSTRAINTS[name].rpartition("=")[2]


def test_constraints_are_within_what_is_tested(recwarn: pytest.WarningsRecorder) -> None:
    for name in versions.TESTED.keys() - {"torch"}:
        assert not warned(name, pins(name), recwarn)
    newest = versions.TESTED["transformers"][1]
    assert pins("transformers").startswith(f"{newest}.")  # that is how it came to be tested


def test_the_torch_that_make_installs_is_tested(recwarn: pytest.WarningsRecorder) -> None:
    default = re.search(r"^TORCH \?= torch==(\S+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert default is not None and "torch" not in CONSTRAINTS
    assert not warned("torch", default[1], recwarn)


def test_every_requirement_is_constrained() -> None:
    """But for torch, and what only benches want."""
    try:
        requires = importlib.metadata.requires("mem1_core") or []
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("mem1_core is not installed here, only on the path")
    wanted = listed([line for line in requires if "peers" not in line])
    assert {"transformers", "rich", "pytest", "ruff", "torch"} <= wanted.keys()
    assert wanted.keys() - CONSTRAINTS.keys() == {"torch"}
    for name, (oldest, _) in versions.TESTED.items():
        assert name == "torch" or wanted[name] == f">={oldest}"
