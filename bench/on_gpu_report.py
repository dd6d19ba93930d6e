"""A pytest plugin for `bench/on_gpu.sh`: what is known of a test is on disk before the next one begins, and
none runs in a process whose CUDA context is lost.

`results.jsonl` in the folder of `--on-gpu-report` gets a line when a test begins and one when it ends: a test
that has begun and not ended is the one that took its process along.
"""

from __future__ import annotations

import json
import os
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--on-gpu-report", type=Path, metavar="FOLDER", required=True)


def pytest_configure(config: pytest.Config) -> None:
    if hasattr(config, "workerinput"):  # of pytest-xdist: the process that has it is told, and writes
        config.pluginmanager.register(Replaced())
    else:
        config.pluginmanager.register(Results(config.getoption("--on-gpu-report") / "results.jsonl"))


class Results:
    def __init__(self, path: Path) -> None:
        self.path = path
        if path.exists() and not path.read_bytes().endswith(b"\n"):  # a process before this one was killed
            with path.open("a") as file:
                file.write("\n")

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._write({"test": nodeid, "outcome": "begun"})

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            seconds, text = round(report.duration, 3), "" if report.passed else report.longreprtext
            self._write({"test": report.nodeid, "outcome": report.outcome, "seconds": seconds, "text": text})

    def _write(self, line: dict[str, Any]) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())


class Replaced:
    """After an illegal access every call of CUDA fails in that process. pytest-xdist starts another."""

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_protocol(self) -> Generator[None, object, object]:
        result = yield
        if torch.cuda.is_initialized():
            try:
                torch.cuda.synchronize()
            except RuntimeError as error:
                print(f"this process ends: {error}", flush=True)
                os._exit(1)
        return result
