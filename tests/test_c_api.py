"""The C library as a downstream project sees it: found by CMake, linked, run."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import mem1_core

ROOT = Path(__file__).resolve().parents[1]
# Beside this interpreter first: the virtual environment need not be activated.
CMAKE = shutil.which("cmake", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))


def run(*command: object) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def build_and_run_consumer(prefix: Path, build: Path) -> str:
    run(CMAKE, "-S", ROOT / "tests/c_api", "-B", build, f"-DCMAKE_PREFIX_PATH={prefix}")
    run(CMAKE, "--build", build)
    return run(build / "consumer")


def test_consumer_of_the_python_package(tmp_path: Path) -> None:
    said = build_and_run_consumer(Path(mem1_core.cmake_prefix_path), tmp_path)
    assert said == f"mem1_core {mem1_core.__version__}, CUDA code for [{mem1_core.cuda_architectures()}]\n"


@pytest.mark.slow
def test_consumer_of_a_plain_cmake_install(tmp_path: Path) -> None:
    """No Python, no torch: the C library alone, installed to a prefix of its own."""
    build, prefix = tmp_path / "build", tmp_path / "prefix"
    run(CMAKE, "-S", ROOT, "-B", build, "-DMEM1_CUDA=OFF", f"-DCMAKE_INSTALL_PREFIX={prefix}")
    run(CMAKE, "--build", build)
    run(CMAKE, "--install", build)
    assert (prefix / "include/mem1/mem1.h").is_file()
    assert build_and_run_consumer(prefix, tmp_path / "consumer").endswith("CUDA code for []\n")
