"""A pytest plugin for `bench/on_gpu.sh`: what is known of a test is on disk before the next one begins.

`results.jsonl` in the folder of `--on-gpu-report` gets a line when a test begins and one when it ends: a test
that has begun and not ended is the one that took its process along.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--on-gpu-report", type=Path, metavar="FOLDER")


def pytest_configure(config: pytest.Config) -> None:
    folder = config.getoption("--on-gpu-report")
    if folder is not None and not hasattr(config, "workerinput"):  # workers tell the process that has them
        config.pluginmanager.register(Results(folder / "results.jsonl"))


class Results:
    def __init__(self, path: Path) -> None:
        self.path = path

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._write({"test": nodeid, "outcome": "begun"})

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            text = "" if report.outcome == "passed" else report.longreprtext
            line = {
                "test": report.nodeid,
                "outcome": report.outcome,
                "seconds": report.duration,
                "text": text,
            }
            self._write(line)

    def _write(self, line: dict[str, Any]) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())
