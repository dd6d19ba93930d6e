"""How threads wait: briefly while other work wants the CPUs, in the project's own programs only, and never
against the user; what they compute does not depend on it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading

import pytest
import torch

from mem1 import cli
from mem1.runtime import waiting
from mem1.runtime.waiting import (
    COME,
    CROWDED,
    GO,
    INTERVAL_S,
    SETTINGS,
    SpareTeam,
    gnu_openmp,
    queued_s,
    share_cpus,
)

WATCH, TEAM = "mem1-share-cpus", "mem1-spare-team"
CPUS = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
WATCHED = pytest.mark.skipif(
    gnu_openmp() is None or not queued_s(), reason="not GNU's OpenMP, or no scheduling statistics"
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


@WATCHED
def test_a_command_shares_the_cpus(alone, monkeypatch, tmp_path):
    before, during = running(WATCH), []
    monkeypatch.setitem(cli.RUNS, "demo", lambda options, progress: during.append(running(WATCH)))
    assert cli.main(["demo", "--out", str(tmp_path / "demo")]) == 0
    assert (during, running(WATCH)) == ([before + 1], before)


@WATCHED
@pytest.mark.parametrize("reason", [*SETTINGS, "no statistics", "another OpenMP"])
def test_it_does_nothing(alone, monkeypatch, tmp_path, reason):
    if reason in SETTINGS:
        monkeypatch.setenv(reason, "7")
    elif reason == "no statistics":
        (tmp_path / "1").mkdir()
        (tmp_path / "1" / "schedstat").write_text("0 0 0\n")  # of a kernel that could, and was not asked to
        monkeypatch.setattr(waiting, "THREADS", tmp_path)
    else:
        (tmp_path / "maps").write_text("7f-80 r-xp 0 00:00 0 /usr/lib/libiomp5.so\n")
        monkeypatch.setattr(waiting, "MAPS", tmp_path / "maps")
    before = running(WATCH)
    with share_cpus():
        assert running(WATCH) == before


def test_a_thread_that_cannot_be_read_does_not_count(monkeypatch, tmp_path):
    for name, text in {"1": "5000 2000000000 3\n", "2": "", "3": "5000 0 3\n"}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "schedstat").write_text(text)
    (tmp_path / "4").mkdir()
    monkeypatch.setattr(waiting, "THREADS", tmp_path)
    assert queued_s() == {"1": 2.0, "3": 0.0}
    monkeypatch.setattr(waiting, "THREADS", tmp_path / "none")
    assert queued_s() == {}


class Machine:
    """One of whose threads queues for a share of each interval, as listed; the others never do."""

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

    def queued_s(self) -> dict[str, float]:
        return {"1": self.queued, **{str(thread): 7.0 for thread in range(2, 50)}}


def watched(monkeypatch: pytest.MonkeyPatch, machine: Machine) -> None:
    class Team:
        def __init__(self, openmp: object) -> None:
            machine.team = True

        def dismiss(self) -> None:
            machine.team = False

    monkeypatch.setattr(waiting, "SpareTeam", Team)
    monkeypatch.setattr(waiting, "queued_s", machine.queued_s)
    monkeypatch.setattr(waiting, "monotonic", lambda: machine.now)
    waiting._watch(machine, None)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("shares", "teams"),
    [
        ([CROWDED / 2] * 6, [False] * 6),
        ([1.0] * 4, [False] * (COME - 1) + [True] * (5 - COME)),
        ([1.0, 0.0] * 4, [False] * 8),  # a moment here and there
        ([1.0] * COME + [0.0] * (GO + 1), [False] * (COME - 1) + [True] * GO + [False] * 2),
        ([1.0] * COME + [0.0] * (GO - 1) + [1.0] + [0.0] * (GO - 1), [False] * (COME - 1) + [True] * 2 * GO),
    ],
)
def test_the_short_spin_comes_with_the_crowd_and_goes_after_it(monkeypatch, shares, teams):
    machine = Machine(*shares)
    watched(monkeypatch, machine)
    assert machine.teams == teams
    assert not machine.team


def test_what_goes_wrong_leaves_no_team(monkeypatch):
    class Failing(Machine):
        def queued_s(self) -> dict[str, float]:
            if self.team:
                raise RuntimeError("no more")
            return super().queued_s()

    machine = Failing(*[1.0] * 9)
    with pytest.raises(RuntimeError, match="no more"):
        watched(monkeypatch, machine)
    assert not machine.team


@WATCHED
def test_a_team_that_cannot_be_made_is_not_waited_for(monkeypatch):
    said: list[threading.ExceptHookArgs] = []
    monkeypatch.setattr(threading, "excepthook", said.append)
    team = SpareTeam(None)  # type: ignore[arg-type]
    team.dismiss()
    assert [told.exc_type for told in said] == [AttributeError]
    assert not team._leader.is_alive()


@WATCHED
def test_a_thread_without_a_cpu_queues():
    code = "import time\nwhile time.process_time() < 0.5: pass\n"
    others = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(2 * CPUS)]
    before, me = queued_s(), str(threading.get_native_id())
    while any(other.poll() is None for other in others):
        sum(range(10_000))
    assert queued_s()[me] - before[me] > INTERVAL_S


# CPU time, in milliseconds, that the threads of a parallel region take after it.
SPUN = """
import statistics, time, torch
from mem1.runtime.waiting import SpareTeam, gnu_openmp
def spun():
    took = []
    for _ in range(20):
        torch.zeros(1 << 20)
        before = time.process_time()
        time.sleep(0.02)
        took.append(1e3 * (time.process_time() - before))
    return statistics.median(took)
torch.set_num_threads(THREADS)
print(spun())
team = SpareTeam(gnu_openmp())
print(spun())
team.dismiss()
print(spun())
"""


@WATCHED
@pytest.mark.skipif(CPUS < 2, reason="with one CPU the spin is short as it comes")
@pytest.mark.parametrize("threads", sorted({2, CPUS}))
def test_a_spare_team_makes_the_spin_short(threads):
    long, short, again = map(float, python(SPUN.replace("THREADS", str(threads))))
    assert long > 1 and again > 1
    assert short < 0.5


@WATCHED
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
    team = SpareTeam(gnu_openmp())
    try:
        assert team._leader.is_alive()
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(work(), plain, strict=True))
    finally:
        team.dismiss()
    assert not team._leader.is_alive()


def test_the_package_has_its_names_all_the_same():
    code = "import mem1, sys; print('torch' in sys.modules, sorted(set(mem1.__all__) - set(dir(mem1))))\n"
    code += "from mem1 import *; print(MemoryEfficientAgent.__module__, mem1.Trajectory.__module__)\n"
    code += "print(hasattr(mem1, 'nothing'))"
    assert python(code) == ["False []", "mem1.agent mem1.trajectory", "False"]
