"""How threads wait: the loop alone on the machine and beside a busy process, as OpenMP comes and as the
project's commands set it (`mem1.waiting`).

A policy is read when torch is loaded, so each run is a process of its own; rounds take turns as in
`measure.compare`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from measure import Result, speedup, table

from mem1.waiting import wait_briefly

TASK = Path(__file__).with_name("waiting_task.py")
ROUNDS = 3
COMES, OURS = "as OpenMP comes", "mem1"
POLICIES = {COMES: False, OURS: True}


def measured(briefly: bool, steps: int, episodes: int) -> dict[str, float]:
    """Seconds of each kind of work, in a process with one of the policies."""
    variables = {
        name: value for name, value in os.environ.items() if name not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
    }
    if briefly:
        wait_briefly(variables)
    command = [sys.executable, str(TASK), str(steps), str(episodes)]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout)
    return found


@contextmanager
def company(busy: bool) -> Iterator[None]:
    """With `busy`, beside a process that computes all the time."""
    if not busy:
        yield
        return
    other = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        yield
    finally:
        other.kill()
        other.wait()


def test_waiting(bench: Any) -> None:
    if not bench.measuring:
        found = measured(True, steps=1, episodes=1)
        assert set(found) == {"warm start", "PPO update", "evaluation"} and all(s > 0 for s in found.values())
        return
    rows: dict[tuple[str, bool], dict[str, list[float]]] = {}
    for _ in range(ROUNDS):
        for busy in (False, True):
            for policy, briefly in POLICIES.items():
                with company(busy):
                    for work, seconds in measured(briefly, steps=60, episodes=32).items():
                        rows.setdefault((policy, busy), {}).setdefault(work, []).append(seconds)
    for work in rows[OURS, False]:
        results = {
            place: Result(f"{place[0]}, {'beside a busy process' if place[1] else 'idle'}", seconds[work])
            for place, seconds in sorted(rows.items(), key=lambda row: (row[0][1], row[0][0] != OURS))
        }
        title = f"{work} of the small model, {os.cpu_count()} cores"
        text, lines = table(title, list(results.values()))
        bench.tables.append({"title": title, "roofline TFLOP/s": None, "rows": lines})
        bench.print("\n" + text)
        idle, busy = results[OURS, False], results[OURS, True]
        share = speedup(idle, results[COMES, False])
        bench.goal(f"{work}, idle, of the speed as OpenMP comes", share, 0.9)
        bench.goal(f"{work}, beside a busy process, of the idle speed", speedup(busy, idle), 0.5)
