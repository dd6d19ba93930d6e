"""How threads that compute wait for each other while other work wants the same CPUs.

GNU's OpenMP, which runs torch's threads on Linux, lets a thread without work spin for milliseconds before it
sleeps. On an idle machine nothing is faster; beside a busy process the spinning takes the CPU from the very
thread that is waited for. libgomp itself knows a short spin, for processes with more OpenMP threads than CPUs
("GOMP_SPINCOUNT" in its manual: 100 turns instead of 300,000). `share_cpus` makes it take that one while, and
only while, this process's threads have to queue for a CPU.

Results do not depend on it: it changes how threads wait, never how many compute or what each of them does.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from time import monotonic

import torch

INTERVAL_S = 0.1  # between two looks
CROWDED = 0.2  # CPUs queued for: 0.4 and more beside one busy process, below 0.1 on an idle machine
COME, GO = 2, 5  # crowded intervals in a row before the short spin is taken; others before it is left
SETTINGS = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")  # with these a user says how threads wait
STATISTICS = Path("/proc/self/schedstat")
PARALLEL = 1 << 16  # elements for each thread, more than torch leaves to a single one


def queued_s() -> float:
    """Seconds that the threads of this process have been ready to run without a CPU to run on.

    The second figure of Linux's `/proc/<pid>/task/<tid>/schedstat`; a thread that ends takes its share along.
    """
    total = 0
    for task in Path("/proc/self/task").iterdir():
        try:
            total += int((task / "schedstat").read_text().split()[1])
        except (FileNotFoundError, ProcessLookupError):  # it ended just now
            continue
    return total / 1e9


class SpareTeam:
    """A second team of OpenMP threads, asleep: with it the process has more of them than CPUs, if torch's own
    are more than half as many. Nothing else runs on it.
    """

    def __init__(self) -> None:
        self._over = threading.Event()
        self._ready = threading.Event()
        self._leader = threading.Thread(target=self._lead, name="mem1-spare-team", daemon=True)
        self._leader.start()
        self._ready.wait()

    def _lead(self) -> None:
        torch.zeros(torch.get_num_threads() * PARALLEL)  # in parallel: libgomp gives this thread a team
        self._ready.set()
        self._over.wait()

    def dismiss(self) -> None:
        """End its threads."""
        self._over.set()
        self._leader.join()


def _watch(over: threading.Event) -> None:
    team: SpareTeam | None = None
    in_a_row = 0  # intervals that spoke for a change
    queued, then = queued_s(), monotonic()
    while not over.wait(INTERVAL_S):
        before, since = queued, then
        queued, then = queued_s(), monotonic()
        crowded = queued - before > CROWDED * (then - since)
        in_a_row = in_a_row + 1 if crowded == (team is None) else 0
        if team is None and in_a_row == COME:
            team, in_a_row = SpareTeam(), 0
        elif team is not None and in_a_row == GO:
            team.dismiss()
            team, in_a_row = None, 0
    if team is not None:
        team.dismiss()


@contextmanager
def share_cpus() -> Iterator[None]:
    """Inside, torch's threads wait with a short spin while other work wants the CPUs, else as they come.

    For programs; the commands, tests and benches of this project run in it. It does nothing where the user
    has set OMP_WAIT_POLICY or GOMP_SPINCOUNT and where the kernel keeps no scheduling statistics (anything
    but Linux), and has no effect on an OpenMP other than GNU's and on torch's threads where they are at most
    half as many as the CPUs.
    """
    if not STATISTICS.exists() or any(name in os.environ for name in SETTINGS):
        yield
        return
    over = threading.Event()
    watch = threading.Thread(target=_watch, args=(over,), name="mem1-share-cpus", daemon=True)
    watch.start()
    try:
        yield
    finally:
        over.set()
        watch.join()
