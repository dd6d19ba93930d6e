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

from measure import Result, speedup, table

from mem1.runtime.waiting import SETTINGS

TASK = Path(__file__).with_name("waiting_task.py")
WORK = ("warm start", "PPO update", "evaluation")


def measured(rounds: int, steps: int, episodes: int) -> dict[str, dict[str, list[float]]]:
    """Seconds of each kind of work under each policy, without what the user says about threads that wait."""
    variables = {name: value for name, value in os.environ.items() if name not in SETTINGS}
    command = [sys.executable, str(TASK), *map(str, (rounds, steps, episodes))]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=True)
    found: dict[str, dict[str, list[float]]] = json.loads(done.stdout)
    return found


def test_waiting(bench: Any) -> None:
    if not bench.measuring:
        found = measured(rounds=1, steps=1, episodes=1)
        assert set(found) == set(WORK)
        assert all(s > 0 for rows in found.values() for seconds in rows.values() for s in seconds)
        return
    found = measured(rounds=5, steps=20, episodes=32)
    for work, rows in found.items():
        results = {name: Result(name, seconds) for name, seconds in rows.items()}
        title = f"{work} of the small model, {os.cpu_count()} cores"
        text, lines = table(title, list(results.values()))
        bench.tables.append({"title": title, "roofline TFLOP/s": None, "rows": lines})
        bench.print("\n" + text)
        idle, busy = results["mem1, idle"], results["mem1, beside a busy process"]
        share = speedup(idle, results["as OpenMP comes, idle"])
        bench.goal(f"{work}, idle, of the speed as OpenMP comes", share, 0.9)
        bench.goal(f"{work}, beside a busy process, of the idle speed", speedup(busy, idle), 0.5)
