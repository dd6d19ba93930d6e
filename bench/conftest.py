"""`pytest bench/ --benchmark` measures, prints and saves; without the flag the same files are quick
correctness tests. `-k gpu` picks the tables of a CUDA device, `-k "not gpu"` those of the CPU."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import ledger
import pytest
import torch
from measure import (
    COPY,
    Candidate,
    Clock,
    DeviceClock,
    HostClock,
    Result,
    compare,
    matmuls,
    plain_copy,
    speedup,
    table,
)

from mem1.runtime.waiting import share_cpus
from mem1_core import testing

# Sides of the square products that make the roofline.
ROOFLINE_SIZES = {"cpu": (1024, 2048), "cuda": (8192,)}


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
    """Runs the candidates of one task, prints their table and saves it."""

    def __init__(self, config: pytest.Config) -> None:
        self.measuring: bool = config.getoption("--benchmark")
        stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
        self.out = Path(
            config.getoption("--benchmark-out") or ledger.ROOT / "bench" / "results" / f"{stamp}.json"
        )
        self.tables: list[dict[str, Any]] = []
        self.goals: list[dict[str, Any]] = []
        self.record: dict[str, Any] = {
            "time": stamp,
            "commit": ledger.commit(),
            "machine": testing.machine(),
            "versions": ledger.versions(),
            "sources": ledger.sources(),
            "tables": self.tables,
            "goals": self.goals,
        }
        self._clocks: dict[tuple[str, bool], Clock] = {}
        self._capture = config.pluginmanager.getplugin("capturemanager")

    def compare(
        self,
        title: str,
        candidates: Sequence[Candidate],
        *,
        flops: float | None = None,
        dtype: Any = None,
        moved_bytes: int = 0,
        device: str = "cpu",
        idle: bool = False,
        budget_s: float = 10.0,
        min_rounds: int = 3,
    ) -> dict[str, Result]:
        """Check and, when measuring, time the candidates (ours first); returns the results by name.

        flops with dtype adds TFLOP/s and the ratio to the best matrix product of that dtype, timed in the
        same rounds; moved_bytes (read and written) adds GB/s and a copy of as many bytes as the last row.
        idle: see `DeviceClock`.
        """
        if moved_bytes:
            candidates = [*candidates, plain_copy(moved_bytes, device)]
        products = {}
        if flops is not None:
            products = matmuls(dtype, ROOFLINE_SIZES[device] if self.measuring else (64,), device)
        every = [*candidates, *(product for product, _ in products.values())]
        clock = self._clock(device, idle) if self.measuring else None
        measured = compare(every, budget_s if self.measuring else 0, min_rounds, clock)
        results, timed = measured[: len(candidates)], measured[len(candidates) :]
        if self.measuring:
            peak = None
            if flops is not None:
                rates = {r.name: products[r.name][1] / min(r.seconds) for r in timed}
                best = max(rates, key=rates.__getitem__)
                peak = rates[best]
                title += f"; roofline {peak / 1e12:.3f} TFLOP/s ({best})"
            self.table(title, results, flops=flops, peak=peak, moved_bytes=moved_bytes)
        return {result.name: result for result in results}

    def table(self, title: str, results: Sequence[Result], *, peak: float | None = None, **work: Any) -> None:
        """Print and save what was measured; `work` as `measure.table` takes it."""
        text, rows = table(title, results, peak=peak, **work)
        self.tables.append({"title": title, "roofline TFLOP/s": peak and peak / 1e12, "rows": rows})
        self.print("\n" + text)
        self.save()  # a run that is cut short keeps what it has

    def _clock(self, device: str, idle: bool) -> Clock:
        if (device, idle) not in self._clocks:
            self._clocks[device, idle] = HostClock() if device == "cpu" else DeviceClock(idle)
        return self._clocks[device, idle]

    def goal(
        self, text: str, measured: float | None, target: float, *, at_most: bool = False, unit: str = "x"
    ) -> None:
        """Record a goal as met or not met; None is not met. Never fails the run: a busy machine is no bug."""
        met = measured is not None and (measured <= target if at_most else measured >= target)
        where = self.tables[-1]["title"]
        goal = {"goal": text, "table": where, "target": target, "measured": measured, "met": met}
        self.goals.append(goal)
        sign = "<=" if at_most else ">="
        figure = "no figure" if measured is None else f"{measured:.2f}{unit}"
        self.print(f"  goal: {text} {sign} {target:g}{unit}: {figure}, {'met' if met else 'NOT MET'}")

    def goal_speedup(self, results: dict[str, Result], ours: str, peer: str, target: float) -> None:
        if self.measuring:
            self.goal(f"{ours} against {peer}", speedup(results[ours], results[peer]), target)

    def goal_of_copy(self, results: dict[str, Result], ours: str, target: float) -> None:
        if self.measuring:
            share = speedup(results[ours], results[COPY])
            self.goal(f"{ours}, of a copy's speed", share and 100 * share, target, unit=" %")

    def fact(self, text: str, value: float, unit: str = "") -> None:
        """One more figure of the last table."""
        self.tables[-1][text] = value
        self.print(f"  {text}: {value:.3g}{unit}")

    def save(self) -> None:
        self.out.parent.mkdir(parents=True, exist_ok=True)
        self.out.write_text(json.dumps(self.record, indent=1) + "\n")

    def print(self, text: str) -> None:
        with self._capture.global_and_fixture_disabled():
            print(text, flush=True)


@pytest.fixture(scope="session", autouse=True)
def shared_cpus() -> Iterator[None]:
    with share_cpus():
        yield


@pytest.fixture(scope="session")
def bench(request: pytest.FixtureRequest) -> Iterator[Bench]:
    bench = Bench(request.config)
    facts = bench.record["machine"] | bench.record["versions"]
    if bench.measuring:
        bench.print("\n" + ", ".join(f"{key} {value}" for key, value in facts.items()))
    yield bench
    if not bench.measuring:
        return
    bench.save()
    met = sum(goal["met"] for goal in bench.goals)
    bench.print(f"\n{met} of {len(bench.goals)} goals met; figures in {bench.out}")
    for goal in bench.goals:
        if not goal["met"]:
            bench.print(f"  NOT MET: {goal['goal']} ({goal['table'].split(', N ')[0]})")


@pytest.fixture(scope="session")
def device(bench: Bench) -> str:
    """Where the GPU tables run: on the CUDA device; as a quick test on the CPU, on any machine."""
    if not bench.measuring:
        return "cpu"
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device, and torch sees none")
    return "cuda"
