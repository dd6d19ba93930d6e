"""How a bench measures: every contender in turn, round after round, so that drift of the machine hits all
alike.

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
from pathlib import Path
from statistics import median
from typing import Any

import torch

SLOW_CALL_S = 10.0  # a contender slower than this is timed once


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

    budget_s 0 only checks. Nothing runs fewer than `min_rounds` times unless one call takes over 10 s.
    """
    warmup = []
    for contender in contenders:
        start = time.perf_counter()
        result = contender.run()
        warmup.append(time.perf_counter() - start)
        if contender.check is not None:
            contender.check(result)
        del result
    results = [Result(c.name, note=c.note) for c in contenders]
    if budget_s == 0:
        return results
    rounds = max(min_rounds, min(50, int(budget_s / sum(warmup))))
    for turn in range(rounds):
        for contender, result, estimate in zip(contenders, results, warmup, strict=True):
            if turn > 0 and estimate > SLOW_CALL_S:
                continue
            resident = _reset_peak() if turn == 0 else None
            start = time.perf_counter()
            output = contender.run()
            result.seconds.append(time.perf_counter() - start)
            if resident is not None:
                result.peak_bytes = max(0, _status_bytes("VmHWM") - resident) + contender.held_bytes
            del output
    return results


def speedup(ours: Result, peer: Result) -> float:
    """How many times longer the peer takes: median of the ratios within a round."""
    return median(p / o for o, p in zip(ours.seconds, peer.seconds, strict=False))


def matmul_contender(dtype: torch.dtype, size: int = 2048) -> tuple[Contender, float]:
    """A square matrix product and its FLOPs: the roofline, measured in the same rounds with the same
    threads."""
    a, b = (torch.randn(size, size).to(dtype) for _ in range(2))
    out = torch.empty(size, size, dtype=dtype)
    return Contender(f"matmul {size}^3", lambda: torch.mm(a, b, out=out), note="the roofline"), 2.0 * size**3


def table(
    title: str,
    results: Sequence[Result],
    *,
    flops: float | None = None,
    roofline: tuple[Result, float] | None = None,
) -> tuple[str, list[dict[str, Any]]]:
    """Lay out one table, our row first; also its rows as dictionaries for JSON.

    flops: the work that the task needs (visible pairs only), the same for every row, whatever a row really
    computes. roofline: the matmul's result and its FLOPs; its best round counts as the peak.
    """
    peak = roofline[1] / min(roofline[0].seconds) if roofline else None
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
    if peak is not None:
        title += f"; matmul peak {peak / 1e12:.3f} TFLOP/s"
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
