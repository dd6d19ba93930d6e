"""Every Triton kernel compiled for the GPUs it is for, without one: tensor cores, copy engine, what spills.

The compiler runs in a child: where torch sees no GPU, this process interprets.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import pytest
from checkout import ROOT
from filelock import FileLock  # which torch requires

from mem1_core.triton.attention_blocks import HEAD_DIMS, HOPPER_HALF

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("triton") is None,
        reason="needs Triton, which is not installed (there is none but for Linux)",
    ),
]

every_kernel = pytest.mark.parametrize("kernel", HOPPER_HALF)
every_dim = pytest.mark.parametrize("dim", HEAD_DIMS)
Rows = list[dict[str, Any]]


OPTIONS = ("window", "softcap", "all")
reports: list[str] = []  # that are still to be shown, by the summary at the end (conftest)


Compiled = Callable[[str, str], Rows]


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    """The rows of the report for an architecture and a dtype, compiled once, by the process of pytest-xdist
    that first needs them.
    """
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent

    @cache
    def rows(arch: str, dtype: str) -> Rows:
        file = folder / f"{arch}-{dtype}.json"
        with FileLock(f"{file}.lock"):
            if not file.exists():
                # Options are compiled for one architecture and the halves: all would take minutes more.
                command = [sys.executable, "tests/triton_report.py", arch, "--dtypes", dtype, "--json", file]
                done = subprocess.run(
                    command + ["--no-options"] * (arch == "sm_80" or dtype == "fp32"),
                    cwd=ROOT,
                    env={name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"},
                    capture_output=True,
                    text=True,
                    timeout=900,
                    check=False,
                )
                reports.append(done.stdout)
                assert done.returncode == 0, done.stderr
        return json.loads(file.read_text())

    return rows


@pytest.fixture(autouse=True)
def shown(record_property: Callable[[str, object], None]) -> Iterator[None]:
    yield
    while reports:
        record_property("report", reports.pop())


def of(rows: Rows, kernel: str, dim: int) -> Rows:
    return [row for row in rows if (row["kernel"], row["D"]) == (kernel, dim)]


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
@every_dim
@every_kernel
def test_hopper(compiled: Compiled, kernel: str, dim: int, dtype: str) -> None:
    rows = of(compiled("sm_90a", dtype), kernel, dim)
    assert len(rows) == (1 if dtype == "fp32" else 2), "the plain kernel and one with options"
    for row in rows:
        assert row["wgmma"] > 0 and row["mma"] == 0, "every product on the tensor cores of a warpgroup"
        assert row["TMA"] > 0, "tiles come through the copy engine"
        # Of 256 channels more is spilled: blocks that spill less were slower on an H200.
        limit = 128 if row["variant"] in OPTIONS else 344 if dim == 256 else 136
        assert row["spilled"] <= limit, "bytes a thread"
        assert row["shared"] <= 227 * 1024, "bytes a block"
        assert row["scratch"] == 0, "bytes of global memory, which nobody allocates"


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@every_dim
@every_kernel
def test_other_gpus(compiled: Compiled, kernel: str, dim: int, dtype: str) -> None:
    """Without float16, which runs the instructions of bfloat16."""
    (row,) = of(compiled("sm_80", dtype), kernel, dim)
    assert row["mma"] > 0, "products on tensor cores"
    assert row["spilled"] <= 576, "bytes a thread"
    assert row["shared"] <= 99 * 1024, "bytes a block: the least of these GPUs"
    assert row["scratch"] == 0, "bytes of global memory, which nobody allocates"
