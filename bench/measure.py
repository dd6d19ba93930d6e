"""How a bench measures: every candidate in turn, round after round, so that drift of the machine hits all.

    round 1: A B C    round 2: A B C    ...

A figure is the median of its rounds; a ratio is the median of the ratios within a round. A candidate is
checked on its warm-up call, before anything is timed. A clock says what a time is and what peak memory is:
`HostClock` on the CPU, `DeviceClock` on a CUDA device.
"""

from __future__ import annotations

import ctypes
import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple, Protocol

import torch
from runs import COPY

SLOW_CALL_S = 3.0
MAX_ROUNDS = 50
WINDOW_S = 4e-3  # of calls that are timed as one


@dataclass(frozen=True)
class Candidate:
    """Something that is timed.

    `peer`: its failure is not ours. When measuring, a row says how it failed; in a quick test only a package
    that is not installed is let pass. Without `run` it is a row whose `note` says why there are no figures.
    """

    name: str
    run: Callable[[], Any] | None
    check: Callable[[Any], None] | None = None  # gets what `run` returned; asserts
    held_bytes: int = 0  # mask or plan that lives beside the inputs
    note: str = ""
    peer: bool = False


@dataclass
class Result:
    name: str
    seconds: list[float] = field(default_factory=list)  # one per round, first round first; none: see note
    calls: int = 1  # timed as one
    host_seconds: list[float] = field(default_factory=list)  # of issuing a call, where that is another time
    peak_bytes: int | None = None
    note: str = ""

    @property
    def median(self) -> float:
        return median(self.seconds)


class Timing(NamedTuple):
    seconds: float  # of one call
    host_seconds: float | None = None


class Clock(Protocol):
    def time(self, run: Callable[[], Any], calls: int = 1) -> Timing:
        """`calls` calls after one another, per call."""

    def time_and_peak(self, run: Callable[[], Any]) -> tuple[Timing, int | None]:
        """One call, and by how much memory in use grew at most while it ran."""

    def calls(self, seconds: float) -> int:
        """How many calls of that length are timed as one."""


class HostClock:
    """Wall time; peak memory is the growth of the resident set (Linux).

    Short calls are timed as many after one another as fill some milliseconds: one call alone would be judged
    by what the candidate before it left in the caches.
    """

    def time(self, run: Callable[[], Any], calls: int = 1) -> Timing:
        start = time.perf_counter()
        for _ in range(calls):
            output = run()
        seconds = time.perf_counter() - start
        del output  # freeing what it returned is not its work
        return Timing(seconds / calls)

    def time_and_peak(self, run: Callable[[], Any]) -> tuple[Timing, int | None]:
        resident = _reset_peak()
        timing = self.time(run)
        return timing, None if resident is None else max(0, _status_bytes("VmHWM") - resident)

    def calls(self, seconds: float) -> int:
        return _calls_filling_window(seconds)


class DeviceClock:
    """CUDA events around enough calls to fill some milliseconds; peak memory is the allocator's.

    Before them the L2 cache is overwritten and the device made to wait, which puts the host ahead: what is
    timed is the device, as in a model whose other work hides the launches, also where the host takes longer
    to issue a call. The host's time stands beside it.

    With `idle` the device has nothing to do when the one call of a pair of events begins: the time that a
    caller waits who has nothing else to run, launches included.
    """

    LEAD_S = 4e-4  # per call
    CYCLES_PER_S, FLUSH_BYTES = 2e9, 2**29

    def __init__(self, idle: bool = False) -> None:
        self.idle = idle
        self._flush = torch.empty(self.FLUSH_BYTES, dtype=torch.uint8, device="cuda")

    def time(self, run: Callable[[], Any], calls: int = 1) -> Timing:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._flush.zero_()
        if self.idle:
            torch.cuda.synchronize()
        else:
            torch.cuda._sleep(int(calls * self.LEAD_S * self.CYCLES_PER_S))
        begin.record()
        start = time.perf_counter()
        for _ in range(calls):
            output = run()
        host = time.perf_counter() - start
        end.record()
        end.synchronize()
        del output
        return Timing(begin.elapsed_time(end) * 1e-3 / calls, None if self.idle else host / calls)

    def time_and_peak(self, run: Callable[[], Any]) -> tuple[Timing, int | None]:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        timing = self.time(run)
        return timing, torch.cuda.max_memory_allocated() - before

    def calls(self, seconds: float) -> int:
        return 1 if self.idle else _calls_filling_window(seconds)


def _calls_filling_window(seconds: float) -> int:
    return max(1, min(100, math.ceil(WINDOW_S / max(seconds, 1e-6))))


def compare(
    candidates: Sequence[Candidate],
    budget_s: float,
    min_rounds: int = 3,
    clock: Clock | None = None,
) -> list[Result]:
    """Check each candidate once, then time all of them in turn for about `budget_s` seconds.

    budget_s 0 only checks. A candidate whose call takes over `SLOW_CALL_S` runs `min_rounds` times, over
    twice that one time less, over ten times that once; the others share what the budget allows. One whose
    first call, the check included, takes over twenty times that is not called again. The clock is `HostClock`
    by default.
    """
    clock = clock or HostClock()
    results = [Result(c.name, note=c.note) for c in candidates]
    running: list[tuple[Candidate, Callable[[], Any], Result]] = []
    for candidate, result in zip(candidates, results, strict=True):
        began = time.perf_counter()
        if candidate.run is None or not _warm_up(candidate, candidate.run, result, measuring=budget_s > 0):
            continue
        first_s = time.perf_counter() - began
        if budget_s > 0 and first_s > 20 * SLOW_CALL_S:
            _add(result, Timing(first_s))
            result.note = "; ".join(filter(None, [result.note, "its first call, with the check"]))
        else:
            running.append((candidate, candidate.run, result))
    if budget_s == 0:
        return results
    calls, costs = [], []
    for candidate, run, result in running:
        start = time.perf_counter()
        timing, peak = clock.time_and_peak(run)
        if peak is not None:
            result.peak_bytes = peak + candidate.held_bytes
        calls.append(clock.calls(timing.seconds))
        if calls[-1] > 1:  # a lone call is no measure of many
            start = time.perf_counter()
            timing = clock.time(run, calls[-1])
        result.calls = calls[-1]
        costs.append(time.perf_counter() - start)  # with what the clock does before
        _add(result, timing)
    quick = sum(s for s in costs if s <= SLOW_CALL_S)
    affordable = max(min_rounds, min(MAX_ROUNDS, int(budget_s / max(quick, 1e-9))))
    rounds = [
        affordable if s <= SLOW_CALL_S else 1 if s > 10 * SLOW_CALL_S else min_rounds - (s > 2 * SLOW_CALL_S)
        for s in costs
    ]
    for done in range(1, max(rounds, default=0)):
        for (_, run, result), planned, count in zip(running, rounds, calls, strict=True):
            if done < planned:
                _add(result, clock.time(run, count))
    return results


def _warm_up(candidate: Candidate, run: Callable[[], Any], result: Result, measuring: bool) -> bool:
    """Run and check it once; False if it is a peer that cannot take part, with the reason as its note."""
    try:
        output = run()
        if candidate.check is not None:
            candidate.check(output)
    except ImportError as error:
        if not candidate.peer:
            raise
        result.note = f"not installed: {_one_line(error)}"
    except Exception as error:  # whatever a peer does must not end the run: its row says so
        if not (candidate.peer and measuring):
            raise
        result.note = f"{type(error).__name__}: {_one_line(error)}"
    else:
        return True
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # it may have failed for want of memory
    return False


def _one_line(error: Exception, length: int = 120) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= length else text[: length - 3] + "..."


def _add(result: Result, timing: Timing) -> None:
    result.seconds.append(timing.seconds)
    if timing.host_seconds is not None:
        result.host_seconds.append(timing.host_seconds)


def speedup(ours: Result, peer: Result) -> float | None:
    """How many times longer the peer takes: median of the ratios within a round; None without figures."""
    ratios = [p / o for o, p in zip(ours.seconds, peer.seconds, strict=False)]
    return median(ratios) if ratios else None


def matmuls(
    dtype: torch.dtype, sizes: Sequence[int], device: str = "cpu"
) -> dict[str, tuple[Candidate, float]]:
    """Square matrix products and their FLOPs: the best of them is the roofline, timed in the same rounds.

    Which of torch's libraries is fastest on a CPU depends on the processor (MKL's fp32 product runs at a
    third of oneDNN's on some), so each is asked. Where it has no product of bf16 theirs take a minute, and
    one of fp32 is the most that it can do.
    """
    products: dict[str, tuple[Candidate, float]] = {}
    onednn = device == "cpu" and torch.backends.mkldnn.is_available()
    widened = onednn and not _onednn_multiplies(dtype)
    kind = " of fp32" if widened else ""
    for size in sizes:
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        if widened:
            a, b = a.float(), b.float()
        ways = {f"torch.mm{kind}": partial(torch.mm, a, b)}
        if onednn:
            ways[f"oneDNN{kind}"] = partial(torch.nn.functional.linear, a.to_mkldnn(), b.to_mkldnn())
        for way, run in ways.items():
            products[f"{way} {size}^3"] = Candidate(f"{way} {size}^3", run), 2.0 * size**3
    return products


def _onednn_multiplies(dtype: torch.dtype) -> bool:
    small = torch.zeros(2, 2, dtype=dtype).to_mkldnn()
    try:
        torch.nn.functional.linear(small, small)
    except RuntimeError:  # "bf16 path needs the cpu support avx512bw, ..."
        return False
    return True


def plain_copy(moved_bytes: int, device: str = "cpu") -> Candidate:
    """From one buffer to another, so that as many bytes are read and written: the ceiling of what moves data.

    On the CPU memmove on as many threads as torch has, each with a MiB or more; on a CUDA device `copy_`.
    """
    size = moved_bytes // 2
    source, target = (torch.full((size,), n, dtype=torch.uint8, device=device) for n in (1, 2))

    def check(_: Any) -> None:
        assert torch.equal(source, target)

    if device != "cpu":
        return Candidate(COPY, partial(target.copy_, source), check, note="copy_")
    threads = max(1, min(torch.get_num_threads(), size // 2**20))
    ends = [size * n // threads for n in range(threads + 1)]

    def move(part: int) -> None:  # ctypes lets go of the GIL
        begin, end = ends[part : part + 2]
        ctypes.memmove(target.data_ptr() + begin, source.data_ptr() + begin, end - begin)

    def run() -> None:
        others = [_pool().submit(move, part) for part in range(1, threads)]
        move(0)
        for other in others:
            other.result()

    return Candidate(COPY, run, check, note=f"memmove, {threads} thread{'s' * (threads > 1)}")


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(torch.get_num_threads())


def table(
    results: Sequence[Result],
    *,
    flops: float | None = None,
    peak: float | None = None,
    moved_bytes: int = 0,
) -> tuple[str, list[dict[str, Any]]]:
    """Lay out the rows of a table, ours first; also the columns beside their times, for the run's file.

    flops: the work that the task needs (visible pairs only), the same for every row, whatever a row really
    computes. peak: FLOP/s of the roofline. moved_bytes: what the task has to read and write, likewise; the
    last row is then that of `plain_copy`.
    """
    rows: list[dict[str, Any]] = []
    on_device = any(result.host_seconds for result in results)
    for result in results:
        seconds = result.median if result.seconds else None
        host = median(result.host_seconds) if result.host_seconds else None
        row: dict[str, Any] = {"name": result.name, "ms": seconds and seconds * 1e3}
        if on_device:
            row["host ms"] = host and host * 1e3
        row["rounds"] = len(result.seconds)
        row["x ours"] = speedup(results[0], result)
        if flops and peak:
            row["TFLOP/s"] = seconds and flops / seconds / 1e12
            row["of peak"] = seconds and flops / seconds / peak
        if moved_bytes:
            row["GB/s"] = seconds and moved_bytes / seconds / 1e9
            row["of copy"] = speedup(result, results[-1])
        row["peak MiB"] = None if result.peak_bytes is None else result.peak_bytes / 2**20
        notes = [result.note]
        if host and seconds and host > 0.9 * (seconds + DeviceClock.LEAD_S):
            notes.append("at the host's pace")  # the lead was not enough
        row["note"] = "; ".join(filter(None, notes))
        rows.append(row)
    formats = {
        "host ms": ".3f", "x ours": ".2f", "TFLOP/s": ".3f", "of peak": ".1%",
        "GB/s": ".1f", "of copy": ".1%", "peak MiB": ".1f",
    }  # fmt: skip
    cells = [list(rows[0])]
    for row in rows:
        shown = formats | {"ms": ".3f" if row["ms"] is not None and row["ms"] < 10 else ".2f"}
        cells.append(["-" if v is None else format(v, shown.get(key, "")) for key, v in row.items()])
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = []
    for line in cells:
        name, *numbers, note = (cell.rjust(width) for cell, width in zip(line, widths, strict=True))
        lines.append(f"  {name.strip().ljust(widths[0])}  {'  '.join(numbers)}  {note.strip()}".rstrip())
    columns = []
    for row, result in zip(rows, results, strict=True):
        own = row | {"host seconds": result.host_seconds or None}
        times = "name", "ms", "rounds"
        columns.append({key: x for key, x in own.items() if key not in times and x not in (None, "")})
    return "\n".join(lines), columns


def _status_bytes(key: str) -> int:
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key + ":"))


def _reset_peak() -> int | None:
    """Forget the peak of the resident set and return its present size; None where the system cannot say.

    Memory that was freed but still sits in the C heap is given back first: reused, it would not count as
    growth.
    """
    control = Path("/proc/self/clear_refs")
    if not control.exists():
        return None
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):  # glibc
        libc.malloc_trim(0)
    control.write_text("5")  # proc(5): reset the peak resident set size
    return _status_bytes("VmRSS")
