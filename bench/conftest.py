"""`pytest bench/ --benchmark` measures, prints and saves; without the flag the same files are quick
correctness tests."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from measure import Contender, Result, compare, matmuls, speedup, table

from mem1_core import testing

ROOT = Path(__file__).resolve().parent.parent


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("mem1_core benches")
    group.addoption(
        "--benchmark", action="store_true", help="measure at full size instead of checking at small shapes"
    )
    group.addoption(
        "--benchmark-out", metavar="FILE", help="where the figures go (default: bench/results/<time>.json)"
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("python_files", "bench_*.py")


class Bench:
    """Runs the contenders of one task, prints their table and remembers it for the JSON file."""

    def __init__(self, config: pytest.Config) -> None:
        self.measuring: bool = config.getoption("--benchmark")
        self.tables: list[dict[str, Any]] = []
        self.goals: list[dict[str, Any]] = []
        self._capture = config.pluginmanager.getplugin("capturemanager")

    def compare(
        self,
        title: str,
        contenders: Sequence[Contender],
        *,
        flops: float | None = None,
        dtype: Any = None,
        budget_s: float = 10.0,
        min_rounds: int = 3,
    ) -> dict[str, Result]:
        """Check and, when measuring, time the contenders (ours first); returns the results by name.

        flops with dtype adds TFLOP/s and the ratio to the best matrix product of that dtype, timed in the
        same rounds.
        """
        products = {}
        if flops is not None:
            products = matmuls(dtype) if self.measuring else matmuls(dtype, sizes=(64,))
        every = [*contenders, *(product for product, _ in products.values())]
        measured = compare(every, budget_s if self.measuring else 0, min_rounds)
        results, timed = measured[: len(contenders)], measured[len(contenders) :]
        if self.measuring:
            peak = None
            if flops is not None:
                rates = {r.name: products[r.name][1] / min(r.seconds) for r in timed}
                best = max(rates, key=rates.__getitem__)
                peak = rates[best]
                title += f"; roofline {peak / 1e12:.3f} TFLOP/s ({best})"
            text, rows = table(title, results, flops=flops, peak=peak)
            self.tables.append({"title": title, "rows": rows})
            self.print("\n" + text)
        return {result.name: result for result in results}

    def goal(
        self, text: str, measured: float, wanted: float, *, at_most: bool = False, unit: str = "x"
    ) -> None:
        """Record a goal as met or not met. Never fails the run: a busy machine is not a bug."""
        met = measured <= wanted if at_most else measured >= wanted
        where = self.tables[-1]["title"]
        goal = {"goal": text, "table": where, "wanted": wanted, "measured": measured, "met": met}
        self.goals.append(goal)
        sign = "<=" if at_most else ">="
        self.print(
            f"  goal: {text} {sign} {wanted:g}{unit}: {measured:.2f}{unit}, {'met' if met else 'NOT MET'}"
        )

    def goal_speedup(self, results: dict[str, Result], ours: str, peer: str, wanted: float) -> None:
        if self.measuring:
            self.goal(f"{ours} against {peer}", speedup(results[ours], results[peer]), wanted)

    def print(self, text: str) -> None:
        with self._capture.global_and_fixture_disabled():
            print(text, flush=True)


def _commit() -> str:
    """The commit of the sources, with a + when the tree differs from it; "unknown" outside a git checkout."""
    git = ["git", "-C", str(ROOT)]
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    if head.returncode != 0:
        return "unknown"
    changes = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=False)
    return head.stdout.strip() + ("+" if changes.stdout.strip() else "")


@pytest.fixture(scope="session")
def bench(request: pytest.FixtureRequest) -> Iterator[Bench]:
    bench = Bench(request.config)
    machine = testing.machine()
    if bench.measuring:
        bench.print("\n" + ", ".join(f"{key} {value}" for key, value in machine.items()))
    yield bench
    if not bench.measuring:
        return
    stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
    out = Path(request.config.getoption("--benchmark-out") or ROOT / "bench" / "results" / f"{stamp}.json")
    out.parent.mkdir(parents=True, exist_ok=True)
    record = {
        "time": stamp,
        "commit": _commit(),
        "machine": machine,
        "tables": bench.tables,
        "goals": bench.goals,
    }
    out.write_text(json.dumps(record, indent=1) + "\n")
    met = sum(goal["met"] for goal in bench.goals)
    bench.print(f"\n{met} of {len(bench.goals)} goals met; figures in {out}")
