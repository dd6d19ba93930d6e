"""A whole run on several processes, as torchrun starts them, that goes on with another number of them."""

from __future__ import annotations

import json
import subprocess
import sys
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
