"""How threads wait: the loop alone on the machine and beside a busy process, as OpenMP comes and as the
project's commands have it (`mem1.runtime.waiting`). In a process of its own, as this one shares its CPUs
already.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from measure import Result, speedup
from waiting_task import BUSY, IDLE, OURS, PLAIN, WORK, row

from mem1.runtime.waiting import SETTINGS

TASK = Path(__file__).with_name("waiting_task.py")


@pytest.fixture(scope="module")
def measured(bench: Any) -> dict[str, dict[str, list[float]]]:
    """Seconds of each kind of work under each policy, without what the user says about threads that wait."""
    rounds, steps, episodes = (5, 20, 32) if bench.measuring else (1, 1, 1)
    variables = {name: value for name, value in os.environ.items() if name not in SETTINGS}
    command = [sys.executable, str(TASK), *map(str, (rounds, steps, episodes))]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=True)
    found: dict[str, dict[str, list[float]]] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("work", WORK)
def test_waiting(bench: Any, measured: dict[str, dict[str, list[float]]], work: str) -> None:
    results = {name: Result(name, seconds) for name, seconds in measured[work].items()}
    assert all(seconds > 0 for result in results.values() for seconds in result.seconds)
    if not bench.measuring:
        return
    bench.table(f"{work} of the small model, {os.cpu_count()} cores", list(results.values()))
    idle, busy = results[row(OURS, IDLE)], results[row(OURS, BUSY)]
    bench.goal(f"{work}, idle, of the speed as OpenMP comes", speedup(idle, results[row(PLAIN, IDLE)]), 0.9)
    bench.goal(f"{work}, beside a busy process, of the idle speed", speedup(busy, idle), 0.5)
