"""`pytest bench/ --benchmark` measures, prints and saves; without the flag the same files are quick
correctness tests. `-k gpu` picks the tables of a CUDA device, `-k "not gpu"` those of the CPU.

Where pytest-benchmark is installed it is given what was measured: its options that save, compare and show do
what they do elsewhere. How to measure is ours to say (`measure.py`): its options for that have no effect."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import ledger
import pytest
import runs
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
    if not config.getoption("--benchmark"):
        return
    if hasattr(config, "workerinput") or config.getoption("numprocesses", None):
        raise pytest.UsageError("--benchmark: expected one process, got several (-n), which slow each other")
    out = config.getoption("--benchmark-out")
    if out is not None:  # known now, not after the first table
        try:
            Path(out).parent.mkdir(parents=True, exist_ok=True)
            Path(f"{out}.part").touch()
        except OSError as error:
            raise pytest.UsageError(
                f"--benchmark-out: expected a file to write, got {out!r}: {error}"
            ) from None


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config) -> None:
    """Everything here is a benchmark: --benchmark-only leaves nothing out."""
    session = config.pluginmanager.get_plugin("pytest-benchmark")
    if session is not None and config.getoption("--benchmark"):
        session.only = False


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_machine_info(machine_info: dict[str, Any]) -> None:
    machine_info[runs.OWN] = testing.machine()


def listener(config: pytest.Config) -> Any:
    """pytest-benchmark's session, which keeps to its own table where that was asked for; None without one."""
    session = config.pluginmanager.get_plugin("pytest-benchmark")
    if session is None or session.disabled:
        return None
    asked = ("compare", "columns", "histogram", "time_unit", "verbose")
    shown = any(config.getoption(f"benchmark_{name}", None) for name in asked)
    session.quiet = session.quiet or not (shown or session.sort != "min" or session.group_by != "group")
    return session


class Bench:
    """Runs the candidates of one task, prints their table and saves it."""

    def __init__(self, config: pytest.Config) -> None:
        self.measuring: bool = config.getoption("--benchmark")
        self.test: pytest.Item  # that runs now
        self._out = config.getoption("--benchmark-out")
        self._session = listener(config) if self.measuring else None
        self._clocks: dict[tuple[str, bool], Clock] = {}
        self._capture = config.pluginmanager.getplugin("capturemanager")

    @cached_property
    def run(self) -> runs.Run:
        stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
        machine = self._session.get_machine_info() if self._session else runs.machine_info(testing.machine())
        return runs.Run(
            Path(self._out or ledger.ROOT / "bench" / "results" / f"{stamp}.json"),
            machine,
            runs.commit_info(ledger.commit(), ledger.ROOT),
            versions=ledger.versions(),
            sources=ledger.sources(),
        )

    @pytest.hookimpl(optionalhook=True)
    def pytest_benchmark_update_json(self, output_json: dict[str, Any]) -> None:
        output_json[runs.OWN] = self.run.own

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
            peak, facts = None, {}
            if flops is not None:
                rates = {r.name: products[r.name][1] / min(r.seconds) for r in timed}
                best = max(rates, key=rates.__getitem__)
                peak = rates[best]
                facts = {"roofline TFLOP/s": peak / 1e12, "roofline": best}
            options = {"timer": type(clock).__name__, "max_time": budget_s, "min_rounds": min_rounds}
            self.table(title, results, facts, options, flops=flops, peak=peak, moved_bytes=moved_bytes)
        return {result.name: result for result in results}

    def table(
        self,
        title: str,
        results: Sequence[Result],
        facts: Mapping[str, Any] | None = None,
        options: Mapping[str, Any] | None = None,
        **work: Any,
    ) -> None:
        """Print and save what was measured; `work` as `measure.table` takes it."""
        facts = dict(facts or {})
        own = self.run.add_table(title, facts, first=results[0].name)
        text, every_columns = table(results, **work)
        call = getattr(self.test, "callspec", None)
        for columns, result in zip(every_columns, results, strict=True):
            if not result.seconds:
                own["without figures"].append({"name": result.name, "note": result.note})
                continue
            entry = runs.entry(
                self.test.nodeid,
                title,
                result.name,
                result.seconds,
                calls=result.calls,
                params=call and call.params,
                options=options,
                columns=columns,
            )
            self.run.add(entry)
            if self._session:
                runs.hand_over(entry, self._session)
        roofline = "; roofline {roofline TFLOP/s:.3f} TFLOP/s ({roofline})".format_map(facts) if facts else ""
        self.print(f"\n{title}{roofline}\n{text}")
        self.run.save()  # a run that is cut short keeps what it has

    def columns(self, name: str) -> dict[str, Any]:
        """What the file has of a row of the present test beside its times: to be added to."""
        found: dict[str, Any] = self.run.benchmarks[runs.full_name(self.test.nodeid, name)]["extra_info"]
        return found

    def _clock(self, device: str, idle: bool) -> Clock:
        if (device, idle) not in self._clocks:
            self._clocks[device, idle] = HostClock() if device == "cpu" else DeviceClock(idle)
        return self._clocks[device, idle]

    def goal(
        self, text: str, measured: float | None, target: float, *, at_most: bool = False, unit: str = "x"
    ) -> None:
        """Record a goal as met or not met; None is not met. Never fails the run: a busy machine is no bug."""
        met = measured is not None and (measured <= target if at_most else measured >= target)
        where = self.run.tables[-1]["title"]
        goal = {"goal": text, "table": where, "target": target, "measured": measured, "met": met}
        self.run.goals.append(goal)
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
        self.run.tables[-1]["facts"][text] = value
        self.print(f"  {text}: {value:.3g}{unit}")

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
    if not bench.measuring:
        yield bench
        return
    request.config.pluginmanager.register(bench)  # for its hook
    facts = testing.machine() | bench.run.own["versions"]
    bench.print("\n" + ", ".join(f"{key} {value}" for key, value in facts.items()))
    yield bench
    bench.run.save()
    goals = bench.run.goals
    met = sum(goal["met"] for goal in goals)
    bench.print(f"\n{met} of {len(goals)} goals met; figures in {bench.run.path}")
    for goal in goals:
        if not goal["met"]:
            bench.print(f"  NOT MET: {goal['goal']} ({goal['table'].split(', N ')[0]})")


@pytest.fixture(autouse=True)
def current_test(request: pytest.FixtureRequest, bench: Bench) -> None:
    bench.test = request.node


@pytest.fixture(scope="session")
def device(bench: Bench) -> str:
    """Where the GPU tables run: on the CUDA device; as a quick test on the CPU, on any machine."""
    if not bench.measuring:
        return "cpu"
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device, and torch sees none")
    return "cuda"
