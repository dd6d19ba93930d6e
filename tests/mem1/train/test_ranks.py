"""A whole run on several processes, as torchrun starts them, that goes on with another number of them."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from mem1.checks import InputError
from mem1.config import AlgorithmConfig
from mem1.models.build import build_critic
from mem1.train import checkpoint
from mem1.train.learner import Learner

FEW = "--warmstart-steps 20 --batch-size 8 --objectives 1 --max-turns 4 --max-action-tokens 24 --threads 1"
LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]


def train(processes: int, out: Path, updates: int, *more: str) -> str:
    command = ["-m", "mem1", "train", *FEW.split(), "--save-every", "1", "--max-updates", str(updates)]
    launch = [sys.executable] if processes == 1 else [*LAUNCH, str(processes)]
    done = subprocess.run(
        [*launch, *command, "--out", str(out), *more], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def records(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", [(), ("--algorithm", "grpo", "--group-size", "4")], ids=["ppo", "grpo"])
def test_a_run_on_2_then_3_then_1_processes_is_that_of_1(tmp_path, algorithm):
    train(1, tmp_path / "one", 4, *algorithm)
    said = train(2, tmp_path / "some", 2, *algorithm)
    assert "2 processes" in said and said.count("update 2/2") == 1, "one speaks"
    train(3, tmp_path / "some", 3, *algorithm, "--resume")
    assert "goes on from policy-000003" in train(1, tmp_path / "some", 4, *algorithm, "--resume")
    one, some = records(tmp_path / "one"), records(tmp_path / "some")
    assert [(r["phase"], r["step"]) for r in some] == [(r["phase"], r["step"]) for r in one]
    for expected, found in zip(one, some, strict=True):
        assert expected.keys() == found.keys()
        for name in {name for name in expected if "second" not in name} - {"explained_variance"}:
            number = isinstance(expected[name], int | float | list)
            # Differences of log-probs that should be equal are rounding, and moments amplify it.
            close = pytest.approx(expected[name], rel=2e-3, abs=1e-5) if number else expected[name]
            assert found[name] == close, f"{expected['phase']} {expected['step']}: {name}"
    one_state, some_state = (checkpoint.load(tmp_path / name) for name in ("one", "some"))
    for name, weight in one_state.model.state_dict().items():
        torch.testing.assert_close(some_state.model.state_dict()[name], weight, atol=2e-4, rtol=1e-3)
    assert one_state.trainer.names == some_state.trainer.names


def test_a_state_that_lacks_what_the_run_has_is_refused(tmp_path, make_model, tokenizer):
    def learner(name: str) -> Learner:
        critic = build_critic(make_model()) if name == "ppo" else None
        return Learner(make_model(), critic, None, AlgorithmConfig(name=name, kl_coef=0.0), "carry")

    grpo = learner("grpo")
    path = checkpoint.save(tmp_path / "a", grpo.actor, tokenizer, grpo.values(), grpo.tensors())
    saved = checkpoint.load(path).trainer
    learner("grpo").restore(saved.values, saved)
    with pytest.raises(InputError, match="path: expected a state of this run's models, got 'none of critic."):
        learner("ppo").restore(saved.values, saved)


KILLS = 4


def killed(command: list[str], seconds: float, draw: random.Random) -> int | None:
    """Its status, or None where it was killed: all its processes at once, or one rank."""
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    try:
        return process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        ranks = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        if ranks and draw.random() < 0.5:
            os.kill(int(draw.choice(ranks)), signal.SIGKILL)
            process.wait(timeout=120)  # torchrun ends the others
        else:
            for pid in (process.pid, *map(int, ranks)):  # which are no group
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            process.wait()
        return None


@pytest.mark.slow
def test_two_processes_that_are_killed_come_to_the_same_bits(tmp_path):
    settings = [
        "--save-every",
        "1",
        "--max-updates",
        "8",
        "--rollout.synchronous=true",
        "--warmstart.save_every=4",
    ]
    command = [*LAUNCH, "2", "-m", "mem1", "train", *FEW.split(), *settings, "--out"]
    began = time.monotonic()
    assert killed([*command, str(tmp_path / "whole")], 300, random.Random(0)) == 0
    whole = time.monotonic() - began
    draw, kills, status = random.Random(3), 0, None
    while status is None:
        resume = ["--resume"] if (tmp_path / "parts" / "train.json").is_file() else []
        limit = draw.uniform(0.3, 1.0) * whole if kills < KILLS else 300.0
        out = [str(tmp_path / "parts"), "--scale.background_saves=true"]
        status = killed([*command, *out, *resume], limit, draw)
        kills += status is None
    assert status == 0 and kills >= 2
    one, other = (
        [{k: v for k, v in r.items() if "second" not in k} for r in records(tmp_path / name)]
        for name in ("whole", "parts")
    )
    assert one == other and [r["step"] for r in one if r["phase"] == "policy"] == list(range(1, 9))
    models = [checkpoint.load(tmp_path / name).model.state_dict() for name in ("whole", "parts")]
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])
    assert not list((tmp_path / "parts").rglob(".*")), "no leftovers"


SLOW_WORLD = '''
import time
from mem1.envs.toy.multihop import MultiHopEnv

class Slow(MultiHopEnv):
    """One of its episodes takes far longer than the others."""

    run_inline = False

    def step(self, action):
        if self.number == 3:
            time.sleep(25.0)
        return super().step(action)

    def reset(self, seed, task=None):
        self.number = 0 if task is None else task["id"]
        return super().reset(seed)
'''


@pytest.mark.slow
def test_the_slowest_rank_is_waited_for_at_most_so_long(tmp_path, make_model, tokenizer, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("slow_world.py").write_text(SLOW_WORLD)
    Path("tasks.jsonl").write_text("".join(json.dumps({"id": n}) + "\n" for n in range(4)))
    init = checkpoint.save(tmp_path / "init", make_model(), tokenizer)
    own = ["--environment", "slow_world:Slow", "--tasks", "tasks.jsonl", "--init", str(init)]
    few = "--batch-size 4 --max-turns 40 --max-action-tokens 8 --threads 1 --max-updates 2 --num-slots 4"
    command = ["-m", "mem1", "train", *own, *few.split(), "--out", "run", "--scale.max_wait=1"]
    done = subprocess.run([*LAUNCH, "2", *command], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    found = records(tmp_path / "run")
    assert [record["late_episodes"] for record in found] == [1, 1]
    assert all(record["rollout_seconds"] < 12 for record in found), "nobody waits for one answer of 25 s"
    assert all(record["turns"] > 1 and record["errors"] == {} for record in found)
