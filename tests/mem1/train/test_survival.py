"""Everything that goes wrong at once: the run ends, with the numbers of one that was left in peace."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from mem1.train import checkpoint

SCRIPT = Path(__file__).with_name("survival_run.py")
UPDATES = 50
KILLS = 12


def start(out: Path) -> subprocess.Popen[bytes]:
    with (out.parent / f"{out.name}.log").open("ab") as log:
        return subprocess.Popen([sys.executable, str(SCRIPT), str(out), str(UPDATES)], stdout=log, stderr=log)


def records(out: Path) -> list[dict]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if "second" not in name} for line in lines]


@pytest.mark.slow
def test_fifty_updates_beside_everything_that_goes_wrong(tmp_path):
    began = time.monotonic()
    unbroken, broken = tmp_path / "unbroken", tmp_path / "broken"
    assert start(unbroken).wait() == 0
    seconds = time.monotonic() - began
    draw, statuses = random.Random(5), []
    while len(statuses) < KILLS:
        process = start(broken)
        try:
            status = process.wait(timeout=draw.uniform(0.1, 0.35) * seconds)
        except subprocess.TimeoutExpired:
            process.send_signal(draw.choice((signal.SIGKILL, signal.SIGTERM, signal.SIGINT)))
            status = process.wait()
        statuses.append(status)
        if status == 0:
            break
    while status != 0:
        status = start(broken).wait()
        assert status == 0, (tmp_path / "broken.log").read_text()[-3000:]
    stopped = {status for status in statuses if status}
    assert stopped <= {
        -signal.SIGKILL,
        128 + signal.SIGTERM,
        128 + signal.SIGINT,
        -signal.SIGTERM,
        -signal.SIGINT,
    }
    assert len(stopped) >= 2, statuses

    found, wanted = records(broken), records(unbroken)
    assert [r["step"] for r in wanted if r["phase"] == "policy"] == list(range(1, UPDATES + 1))
    for one, other in zip(found, wanted, strict=True):
        assert one == other
    models = [checkpoint.load(out).model.state_dict() for out in (broken, unbroken)]
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])
    assert not list(broken.rglob(".*")), "no leftovers"

    ppo = [r for r in wanted if r["phase"] == "policy"]
    assert [r["step"] for r in ppo if r["skipped_steps"]] == [9]
    assert [r["step"] for r in ppo if "policy" in r["errors"]] == [21]
    assert sum(r["replays"] for r in ppo) > 10
    assert {*os.listdir(broken)} == {*("best", "checkpoints", "last", "metrics.jsonl", "train.json")}
