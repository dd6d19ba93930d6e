"""How threads that compute wait for each other while other work wants the same CPUs.

GNU's OpenMP, which runs torch's threads on Linux, lets a thread without work spin for milliseconds before it
sleeps. On an idle machine nothing is faster; beside a busy process the spinning takes the CPU from the very
thread that is waited for. libgomp itself knows a short spin, for processes with more OpenMP threads than CPUs
("GOMP_SPINCOUNT" in its manual: 100 turns instead of 300,000). `share_cpus` makes it take that one while, and
only while, a thread of this process has to queue for a CPU.

Results do not depend on it: it changes how threads wait, never how many compute or what each of them does.
"""

from __future__ import annotations

import ctypes
import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from time import monotonic

import torch

INTERVAL_S = 0.1  # between two looks
CROWDED = 0.1  # of the time in a queue: 0.2 and more beside one busy process, below 0.06 on an idle machine
COME, GO = 2, 5  # crowded intervals in a row before the short spin is taken; others before it is left
SETTINGS = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")  # with these a user says how threads wait
THREADS, MAPS = Path("/proc/self/task"), Path("/proc/self/maps")


def queued_s() -> dict[str, float]:
    """Seconds that each thread of this process has been ready to run without a CPU to run on.

    From Linux's `/proc/<pid>/task/<tid>/schedstat`: nanoseconds on a CPU, nanoseconds in the queue. Empty
    where the kernel keeps no such statistics.
    """
    found = {}
    for name in os.listdir(THREADS) if THREADS.is_dir() else ():
        try:
            ran, queued, *_ = (THREADS / name / "schedstat").read_text().split()
        except (OSError, ValueError):  # it has just ended, or is nothing that can be read: it does not count
            continue
        if int(ran):
            found[name] = int(queued) / 1e9
    return found


def gnu_openmp() -> ctypes.CDLL | None:
    """The libgomp that torch has loaded; None if it runs on another OpenMP."""
    mapped = MAPS.read_text() if MAPS.exists() else ""
    paths = sorted(set(re.findall(r"/.*/libgomp\b.*\.so.*", mapped)), key=lambda path: "/torch" not in path)
    return ctypes.CDLL(paths[0]) if paths else None


class SpareTeam:
    """OpenMP threads, asleep, so many that with torch's the process has more of them than CPUs."""

    def __init__(self, openmp: ctypes.CDLL) -> None:
        self._over = threading.Event()
        self._there = threading.Event()
        self._leader = threading.Thread(
            target=self._lead, args=(openmp,), name="mem1-spare-team", daemon=True
        )
        self._leader.start()
        self._there.wait()

    def _lead(self, openmp: ctypes.CDLL) -> None:
        try:
            threads = max(2, openmp.omp_get_num_procs() + 2 - torch.get_num_threads())
            # A parallel region, of a function without effect: libgomp keeps its threads for the next one.
            openmp.GOMP_parallel(openmp.omp_get_level, None, threads, 0)
        finally:
            self._there.set()
        self._over.wait()

    def dismiss(self) -> None:
        """End its threads."""
        self._over.set()
        self._leader.join()


def _watch(over: threading.Event, openmp: ctypes.CDLL) -> None:
    team: SpareTeam | None = None
    in_a_row = 0  # intervals that spoke for a change
    queued, then = queued_s(), monotonic()
    try:
        while not over.wait(INTERVAL_S):
            before, since = queued, then
            queued, then = queued_s(), monotonic()
            longest = max((queued[thread] - before.get(thread, 0.0) for thread in queued), default=0.0)
            crowded = longest > CROWDED * (then - since)
            in_a_row = in_a_row + 1 if crowded == (team is None) else 0
            if team is None and in_a_row == COME:
                team, in_a_row = SpareTeam(openmp), 0
            elif team is not None and in_a_row == GO:
                team.dismiss()
                team, in_a_row = None, 0
    finally:
        if team is not None:
            team.dismiss()


@contextmanager
def share_cpus() -> Iterator[None]:
    """Inside, torch's threads wait with a short spin while other work wants the CPUs, else as they come.

    For programs; the commands, tests and benches of this project run in it. It does nothing where the user
    has set OMP_WAIT_POLICY or GOMP_SPINCOUNT, where the kernel keeps no scheduling statistics (anything but
    Linux), and where torch runs on an OpenMP other than GNU's. While it is crowded the process has some more
    threads, which sleep; libgomp ends a process that may not start them.
    """
    openmp = gnu_openmp()
    if openmp is None or not queued_s() or any(name in os.environ for name in SETTINGS):
        yield
        return
    over = threading.Event()
    watch = threading.Thread(target=_watch, args=(over, openmp), name="mem1-share-cpus", daemon=True)
    watch.start()
    try:
        yield
    finally:
        over.set()
        watch.join()
