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
from pathlib import Path
from typing import Any

import pytest
from checkout import ROOT

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
Rows = dict[tuple[str, int, str], dict[str, Any]]


reports: list[str] = []  # that are still to be shown, by the summary at the end (conftest)


def compiled(arch: str, dtypes: tuple[str, ...], folder: Path) -> Rows:
    """Compiles the kernels for `arch` and returns the rows of the report."""
    done = subprocess.run(
        [sys.executable, "tests/triton_report.py", arch, "--dtypes", *dtypes, "--json", folder / "rows.json"],
        cwd=ROOT,
        env={name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    reports.append(done.stdout)
    assert done.returncode == 0, done.stderr
    rows = json.loads((folder / "rows.json").read_text())
    return {(row["kernel"], row["D"], row["dtype"]): row for row in rows}


@pytest.fixture(scope="session")
def hopper(tmp_path_factory: pytest.TempPathFactory) -> Rows:
    return compiled("sm_90a", ("bf16", "fp16", "fp32"), tmp_path_factory.mktemp("sm_90a"))


@pytest.fixture(scope="session")
def ampere(tmp_path_factory: pytest.TempPathFactory) -> Rows:
    """Without float16, which runs the instructions of bfloat16."""
    return compiled("sm_80", ("bf16", "fp32"), tmp_path_factory.mktemp("sm_80"))


@pytest.fixture(autouse=True)
def shown(record_property: Callable[[str, object], None]) -> Iterator[None]:
    yield
    while reports:
        record_property("report", reports.pop())


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
@every_dim
@every_kernel
def test_hopper(hopper: Rows, kernel: str, dim: int, dtype: str) -> None:
    row = hopper[kernel, dim, dtype]
    assert row["wgmma"] > 0 and row["mma"] == 0, "every product on the tensor cores of a warpgroup"
    assert row["TMA"] > 0, "tiles come through the copy engine"
    assert row["spilled"] <= 128, "bytes a thread"
    assert row["shared"] <= 227 * 1024, "bytes a block"


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@every_dim
@every_kernel
def test_other_gpus(ampere: Rows, kernel: str, dim: int, dtype: str) -> None:
    row = ampere[kernel, dim, dtype]
    assert row["mma"] > 0, "products on tensor cores"
    assert row["spilled"] <= 512, "bytes a thread"
    assert row["shared"] <= 99 * 1024, "bytes a block: the least of these GPUs"
