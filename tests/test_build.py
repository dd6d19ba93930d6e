"""The build's options: a wrong one stops the configuration and says what was expected. The set-up's steps:
each says what it does, and how long it took or why it failed.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from checkout import ROOT

# Beside this interpreter first: the virtual environment need not be activated.
CMAKE = shutil.which("cmake", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["-DMEM1_CUDA=maybe"], "MEM1_CUDA: expected AUTO, ON or OFF, got maybe"),
        (["-DMEM1_CUDA=ON", "-DCMAKE_CUDA_COMPILER=NOTFOUND"], "MEM1_CUDA=ON, but no nvcc was found"),
    ],
)
def test_wrong_option_is_refused(options: list[str], message: str, tmp_path: Path) -> None:
    assert CMAKE is not None, "the build needs cmake"
    done = subprocess.run([CMAKE, "-S", ROOT, "-B", tmp_path, *options], capture_output=True, text=True)
    assert done.returncode != 0
    assert message in done.stderr


def step(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([ROOT / ".ci" / "step", "[1/2] a step", *command], capture_output=True, text=True)


def test_a_step_says_what_it_does_and_how_long_it_took() -> None:
    done = step("echo", "much")
    assert done.returncode == 0 and done.stderr == ""
    assert re.fullmatch(r"\[1/2\] a step \.\.\.\n\[1/2\] a step: \d+ s\n", done.stdout)


def test_a_step_that_fails_shows_why_and_fails() -> None:
    done = step("sh", "-c", "echo to stdout; echo to stderr >&2; exit 3")
    assert done.returncode == 3
    assert "to stdout\nto stderr\n[1/2] a step: failed after" in done.stdout


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_a_set_up_that_fails_leaves_nothing_that_looks_ready(tmp_path: Path) -> None:
    """A Python that cannot make an environment; then one that made it and cannot install into it."""
    venv = tmp_path / "venv"
    (venv / "bin").mkdir(parents=True)
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\necho no room >&2\nexit 1\n")
    broken.chmod(0o755)
    command = ["make", "ext", f"VENV={venv}", f"PYTHON={broken}"]
    for made in (False, True):
        if made:
            shutil.copy2(broken, venv / "bin" / "python")
            (venv / "torch.txt").write_text("torch==2.13.0\n")
            (venv / "ready").touch()
            os.utime(venv / "ready", (0, 0))  # older than what it follows from
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode != 0 and "no room" in done.stdout, done.stderr
        assert (venv / "torch.txt").exists() == made and not [*venv.glob("ready*")]
