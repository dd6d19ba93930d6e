"""How threads wait: briefly while other work wants the CPUs, in the project's own programs only, and never
against the user; what they compute does not depend on it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from mem1 import cli, waiting
from mem1.waiting import COME, CROWDED, GO, SETTINGS, SpareTeam, queued_s, share_cpus

WATCH, TEAM = "mem1-share-cpus", "mem1-spare-team"
LINUX = pytest.mark.skipif(
    not waiting.STATISTICS.exists(), reason="the kernel keeps no scheduling statistics"
)


def python(code: str, **settings: str) -> list[str]:
    """The lines that a fresh Python prints which finds `settings` about threads that wait, and no others."""
    there = {name: value for name, value in os.environ.items() if name not in SETTINGS} | settings
    there["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    done = subprocess.run([sys.executable, "-c", code], env=there, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def running(name: str) -> int:
    return sum(thread.name == name for thread in threading.enumerate())


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without settings of the user; the threads of the tests' own `share_cpus` are there."""
    for name in SETTINGS:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("name", ["mem1", "mem1_core", "mem1.agent"])
def test_an_import_changes_nobodys_process(name):
    code = "import json, os, threading; before = dict(os.environ)\n"
    code += f"import {name}; print(json.dumps([before, dict(os.environ), threading.active_count()]))"
    before, after, threads = json.loads(python(code)[-1])
    changed = {variable for variable in before | after if before.get(variable) != after.get(variable)}
    assert not [variable for variable in changed if "OMP" in variable or "MKL" in variable]
    assert threads == 1


@LINUX
def test_a_command_shares_the_cpus(alone, monkeypatch, tmp_path):
    before, during = running(WATCH), []
    monkeypatch.setattr(cli, "_demo", lambda options, progress: during.append(running(WATCH)))
    assert cli.main(["demo", "--out", str(tmp_path / "demo")]) == 0
    assert (during, running(WATCH)) == ([before + 1], before)


@LINUX
@pytest.mark.parametrize("reason", [*SETTINGS, "no statistics"])
def test_it_does_nothing(alone, monkeypatch, reason):
    if reason in SETTINGS:
        monkeypatch.setenv(reason, "7")
    else:
        monkeypatch.setattr(waiting, "STATISTICS", Path("/nowhere"))
    before = running(WATCH)
    with share_cpus():
        assert running(WATCH) == before


class Queue:
    """A machine whose threads queue for so many CPUs in one interval after the other."""

    def __init__(self, *shares: float) -> None:
        self.left = list(shares)
        self.now = self.queued = 0.0
        self.teams: list[bool] = []  # after each interval
        self.team = False

    def wait(self, interval: float) -> bool:
        if self.now:
            self.teams.append(self.team)
        if not self.left:
            return True
        self.now += interval
        self.queued += self.left.pop(0) * interval
        return False


@pytest.mark.parametrize(
    ("shares", "teams"),
    [
        ([CROWDED / 2] * 6, [False] * 6),
        ([1.0] * 4, [False] * (COME - 1) + [True] * (5 - COME)),
        ([1.0, 0.0] * 4, [False] * 8),  # a moment here and there
        ([1.0] * COME + [0.0] * (GO + 1), [False] * (COME - 1) + [True] * GO + [False] * 2),
        ([1.0] * COME + [0.0] * (GO - 1) + [1.0] + [0.0] * (GO - 1), [False] * (COME - 1) + [True] * 2 * GO),
        ([-3.0] * 4, [False] * 4),  # a thread has ended, and its share went with it
    ],
)
def test_the_short_spin_comes_with_the_crowd_and_goes_after_it(monkeypatch, shares, teams):
    queue = Queue(*shares)

    class Team:
        def __init__(self) -> None:
            queue.team = True

        def dismiss(self) -> None:
            queue.team = False

    monkeypatch.setattr(waiting, "SpareTeam", Team)
    monkeypatch.setattr(waiting, "queued_s", lambda: queue.queued)
    monkeypatch.setattr(waiting, "monotonic", lambda: queue.now)
    waiting._watch(queue)  # type: ignore[arg-type]
    assert queue.teams == teams
    assert not queue.team


@LINUX
def test_threads_that_have_no_cpu_queue():
    """More of them than CPUs, and each wants one: together they queue for what is too much."""
    code = "import sys, time\nwhile time.process_time() < 0.5: pass\n"
    others = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(2 * len(os.sched_getaffinity(0)))]
    before = queued_s()
    while any(other.poll() is None for other in others):
        sum(range(10_000))
    assert queued_s() - before > 0.1


# CPU time, in milliseconds, that the threads of a parallel region take after it.
SPUN = """
import statistics, time, torch
from mem1.waiting import SpareTeam
def spun():
    took = []
    for _ in range(20):
        torch.zeros(1 << 20)
        before = time.process_time()
        time.sleep(0.02)
        took.append(1e3 * (time.process_time() - before))
    return statistics.median(took)
torch.set_num_threads(2)
print(spun())
team = SpareTeam()
print(spun())
team.dismiss()
print(spun())
"""


@LINUX
@pytest.mark.skipif("libgomp" not in Path("/proc/self/maps").read_text(), reason="not GNU's OpenMP")
@pytest.mark.skipif(
    len(os.sched_getaffinity(0)) > 2, reason="with two threads this machine has CPUs to spare"
)
def test_a_spare_team_makes_the_spin_short():
    long, short, again = map(float, python(SPUN))
    assert long > 1 and again > 1
    assert short < 0.5


@LINUX
def test_results_do_not_depend_on_it():
    def work() -> list[torch.Tensor]:
        draw = torch.Generator().manual_seed(0)
        model = torch.nn.Sequential(
            torch.nn.Linear(96, 300), torch.nn.LayerNorm(300), torch.nn.Linear(300, 70)
        )
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, generator=draw)
        loss = model(torch.randn(500, 96, generator=draw)).softmax(-1).square().sum()
        return [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))]

    plain = work()
    before, team = running(TEAM), SpareTeam()
    try:
        assert running(TEAM) == before + 1
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(work(), plain, strict=True))
    finally:
        team.dismiss()
    assert running(TEAM) == before


def test_the_package_has_its_names_all_the_same():
    code = "import mem1, sys; print('torch' in sys.modules, sorted(set(mem1.__all__) - set(dir(mem1))))\n"
    code += "from mem1 import *; print(MemoryEfficientAgent.__module__, mem1.Trajectory.__module__)\n"
    code += "print(hasattr(mem1, 'nothing'))"
    assert python(code) == ["False []", "mem1.agent mem1.trajectory", "False"]
