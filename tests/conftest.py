"""What all tests share: the GPU skip and the path of the data."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from mem1.runtime.waiting import share_cpus

if not torch.cuda.is_available():  # before anything imports Triton: its kernels are then tested on the CPU
    os.environ["TRITON_INTERPRET"] = "1"

ROOT = Path(__file__).resolve().parent.parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device, and torch sees none"))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """What tests have recorded as "report" is shown once, whichever process they ran in."""
    ran = [report for of_a_kind in terminalreporter.stats.values() for report in of_a_kind]
    # Warnings are among them, which have none.
    recorded = [pair for report in ran for pair in getattr(report, "user_properties", ())]
    shown = dict.fromkeys(text for name, text in recorded if name == "report")
    for text in shown:
        terminalreporter.write_line(f"\n{text}")


@pytest.fixture(scope="session", autouse=True)
def shared_cpus() -> Iterator[None]:
    """CPUs for this process beside other work, of which the other workers of pytest-xdist are some."""
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))
    if workers > 1:  # two threads at least, for what only several can get wrong
        torch.set_num_threads(max(2, torch.get_num_threads() // workers))
    with share_cpus():
        yield


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of the public question sets, qa/qa.jsonl and qa/corpus.jsonl among them: MEM1_DATA, by
    default ../shared/data beside the checkout.
    """
    path = Path(os.environ.get("MEM1_DATA", ROOT.parent / "shared" / "data"))
    missing = [file for file in ("qa/qa.jsonl", "qa/corpus.jsonl") if not (path / file).is_file()]
    if missing:
        pytest.skip(f"no data: {path} has no {missing[0]} (MEM1_DATA names another folder)")
    return path
