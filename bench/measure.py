"""How a bench measures: every contender in turn, round after round, so that drift of the machine hits all.

    round 1: A B C    round 2: A B C    ...

A figure is the median of its rounds; a ratio is the median of the ratios within a round. A contender is
checked on its warm-up call, before anything is timed. Peak memory is the growth of the resident set while the
contender runs (Linux) plus the bytes of what it needs prepared and held for the call (its mask). CPU only.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

SLOW_CALL_S = 3.0
MAX_ROUNDS = 50


@dataclass(frozen=True)
class Contender:
    name: str
    run: Callable[[], Any]
    check: Callable[[Any], None] | None = None  # gets what `run` returned; asserts
    held_bytes: int = 0  # mask or plan that lives beside the inputs
    note: str = ""


@dataclass
class Result:
    name: str
    seconds: list[float] = field(default_factory=list)  # one per round, first round first
    peak_bytes: int | None = None
    note: str = ""

    @property
    def median(self) -> float:
        return median(self.seconds)


def compare(contenders: Sequence[Contender], budget_s: float, min_rounds: int = 3) -> list[Result]:
    """Check each contender once, then time all of them in turn for about `budget_s` seconds.

    budget_s 0 only checks. A contender whose call takes over `SLOW_CALL_S` runs `min_rounds` times, over
    twice that one time less; the others share what the budget allows.
    """
    results = [Result(c.name, note=c.note) for c in contenders]
    for contender in contenders:  # also the warm-up
        output = contender.run()
        if contender.check is not None:
            contender.check(output)
        del output
    if budget_s == 0:
        return results
    for contender, result in zip(contenders, results, strict=True):
        resident = _reset_peak()
        result.seconds.append(_time(contender))
        if resident is not None:
            result.peak_bytes = max(0, _status_bytes("VmHWM") - resident) + contender.held_bytes
    first = [result.seconds[0] for result in results]
    quick = sum(s for s in first if s <= SLOW_CALL_S)
    many = max(min_rounds, min(MAX_ROUNDS, int(budget_s / max(quick, 1e-9))))
    rounds = [many if s <= SLOW_CALL_S else min_rounds - (s > 2 * SLOW_CALL_S) for s in first]
    for turn in range(1, max(rounds)):
        for contender, result, wanted in zip(contenders, results, rounds, strict=True):
            if turn < wanted:
                result.seconds.append(_time(contender))
    return results


def _time(contender: Contender) -> float:
    start = time.perf_counter()
    output = contender.run()
    seconds = time.perf_counter() - start
    del output  # freeing what it returned is not its work
    return seconds


def speedup(ours: Result, peer: Result) -> float:
    """How many times longer the peer takes: median of the ratios within a round."""
    return median(p / o for o, p in zip(ours.seconds, peer.seconds, strict=False))


def matmuls(dtype: torch.dtype, sizes: Sequence[int] = (1024, 2048)) -> dict[str, tuple[Contender, float]]:
    """Square matrix products and their FLOPs: the best of them is the roofline, timed in the same rounds.

    Which of torch's libraries is fastest depends on the processor (MKL's fp32 product runs at a third of
    oneDNN's on some), so each is asked.
    """
    products: dict[str, tuple[Contender, float]] = {}
    for size in sizes:
        a, b = (torch.randn(size, size).to(dtype) for _ in range(2))
        ways = {"torch.mm": partial(torch.mm, a, b)}
        if torch.backends.mkldnn.is_available():
            ways["oneDNN"] = partial(torch.nn.functional.linear, a.to_mkldnn(), b.to_mkldnn())
        for way, run in ways.items():
            products[f"{way} {size}^3"] = Contender(f"{way} {size}^3", run), 2.0 * size**3
    return products


def table(
    title: str,
    results: Sequence[Result],
    *,
    flops: float | None = None,
    peak: float | None = None,
) -> tuple[str, list[dict[str, Any]]]:
    """Lay out one table, our row first; also its rows as dictionaries for JSON.

    flops: the work that the task needs (visible pairs only), the same for every row, whatever a row really
    computes. peak: FLOP/s of the roofline.
    """
    rows: list[dict[str, Any]] = []
    for result in results:
        row: dict[str, Any] = {"name": result.name, "ms": result.median * 1e3, "rounds": len(result.seconds)}
        row["x ours"] = speedup(results[0], result)
        if flops is not None:
            row["TFLOP/s"] = flops / result.median / 1e12
            if peak is not None:
                row["of peak"] = flops / result.median / peak
        row["peak MiB"] = None if result.peak_bytes is None else result.peak_bytes / 2**20
        row["note"] = result.note
        rows.append(row)
    formats = {"ms": ".2f", "x ours": ".2f", "TFLOP/s": ".3f", "of peak": ".1%", "peak MiB": ".1f"}
    cells = [list(rows[0])]
    for row in rows:
        cells.append(["-" if v is None else format(v, formats.get(key, "")) for key, v in row.items()])
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = []
    for line in cells:
        name, *numbers, note = (cell.rjust(width) for cell, width in zip(line, widths, strict=True))
        lines.append(f"  {name.strip().ljust(widths[0])}  {'  '.join(numbers)}  {note.strip()}".rstrip())
    saved = [row | {"seconds": r.seconds} for row, r in zip(rows, results, strict=True)]
    return "\n".join([title, *lines]), saved


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
