"""A run that stops and goes on is the run that never stopped, to the bit."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mem1 import checkpoint, train
from mem1.checks import InputError
from mem1.config import ModelConfig, PPOConfig, RolloutConfig, TrainConfig, WarmStartConfig
from mem1.interrupts import Interrupted
from mem1.ppo import PPO
from mem1.progress import Progress
from mem1.run_folder import METRICS

CONFIG = TrainConfig(
    updates=4,
    batch=4,
    objectives=(1, 2),
    model=ModelConfig(layers=1, width=32, heads=2, kv_heads=1, mlp_width=64),
    rollout=RolloutConfig(slots=4, max_action=16, max_turns=3),
    warmstart=WarmStartConfig(steps=5, batch_tokens=256, save_every=2),
    # Large steps and a KL that weighs: whatever is not restored shows in the weights. The warm-up is still
    # under way at the stop.
    ppo=PPOConfig(
        kl=0.5, minibatch=3, actor_lr=0.01, critic_lr=0.01, actor_warmup=9, critic_warmup=9, critic_only=1
    ),
)


def run(config: TrainConfig, out: Path, **how: Any) -> None:
    train.train(config, out, progress=Progress(log=lambda line: None), **how)


def state(out: Path) -> dict[str, Any]:
    """All that the newest checkpoint of a run holds, by its path in the nested dicts and lists."""
    saved = checkpoint.load(out)
    return flat({"actor": dict(saved.model.state_dict()), "trainer": saved.trainer})


def flat(tree: Any, path: str = "") -> dict[str, Any]:
    if not isinstance(tree, (dict, list, tuple)):
        return {path: tree}
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    return {name: leaf for key, part in items for name, leaf in flat(part, f"{path}/{key}").items()}


def records(out: Path) -> list[dict[str, Any]]:
    """What a run measured, but for its times."""
    lines = [json.loads(line) for line in (out / METRICS).read_text().splitlines()]
    return [{name: value for name, value in line.items() if "seconds" not in name} for line in lines]


def assert_same(out: Path, unbroken: Path) -> None:
    found, wanted = state(out), state(unbroken)
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        same = torch.equal(found[name], value) if isinstance(value, torch.Tensor) else found[name] == value
        assert same, name
    assert records(out) == records(unbroken)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("unbroken")
    run(CONFIG, out)
    return out


def interrupt(monkeypatch, owner: Any, name: str, when: int, signum: int, times: int = 1) -> None:
    """Send a signal to this process in the call of that number, which then goes on."""
    original, calls = getattr(owner, name), []

    def wrapped(*arguments, **settings):
        calls.append(1)
        if when < len(calls) <= when + times:
            os.kill(os.getpid(), signum)
        return original(*arguments, **settings)

    monkeypatch.setattr(owner, name, wrapped)


def test_the_second_half_goes_on_from_the_first(tmp_path, unbroken):
    run(replace(CONFIG, updates=2), tmp_path)
    stopped = state(tmp_path)
    run(CONFIG, tmp_path, resume=True)
    resumed = state(tmp_path)
    assert_same(tmp_path, unbroken)

    def moved(part: str) -> float:
        """How far the second half of the run took the weights of `part`."""
        return max(
            float((resumed[name] - stopped[name]).abs().max()) for name in resumed if name.startswith(part)
        )

    assert moved("/actor") > 0.01 and moved("/trainer/critic") > 0.01
    assert moved("/trainer/reference") == 0


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(
    ("owner", "name", "when", "updates"),
    [
        (train, "append_json", 2, None),  # in step 3 of the warm start
        (train, "rollout", 2, 2),  # of update 3
        (PPO, "prepare", 2, 2),
        (PPO, "step", 4, 3),  # in the middle of update 3, which is finished
        (checkpoint, "save", 1, None),
    ],
)
def test_an_interrupted_run_loses_nothing(
    tmp_path, unbroken, monkeypatch, owner, name, when, updates, signum
):
    with monkeypatch.context() as patch:
        interrupt(patch, owner, name, when, signum)
        with pytest.raises(Interrupted) as error:
            run(CONFIG, tmp_path)
    assert error.value.signum == signum
    if updates is not None:
        assert checkpoint.load(tmp_path).trainer["ppo"]["updates"] == updates
    run(CONFIG, tmp_path, resume=True)
    assert_same(tmp_path, unbroken)


def test_a_second_signal_stops_at_once_with_the_checkpoint_before(tmp_path, unbroken, monkeypatch):
    with monkeypatch.context() as patch:
        interrupt(patch, PPO, "step", 4, signal.SIGINT, times=2)
        with pytest.raises(Interrupted):
            run(replace(CONFIG, save_every=1), tmp_path)
    assert checkpoint.load(tmp_path).trainer["ppo"]["updates"] == 2
    run(CONFIG, tmp_path, resume=True)
    assert records(tmp_path) == records(unbroken)


def test_an_error_in_the_middle_of_an_update_leaves_the_checkpoint_before(tmp_path, unbroken, monkeypatch):
    step, calls = PPO.step, []

    def breaks(self, *arguments):
        calls.append(1)
        if len(calls) == 6:
            raise MemoryError("out of memory")
        return step(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(PPO, "step", breaks)
        with pytest.raises(MemoryError):
            run(replace(CONFIG, save_every=1), tmp_path)
    assert checkpoint.load(tmp_path).trainer["ppo"]["updates"] == 2
    run(CONFIG, tmp_path, resume=True)
    assert records(tmp_path) == records(unbroken)


def test_settings_that_make_another_run_are_refused(tmp_path, unbroken):
    before = state(unbroken)
    for other, told in (
        (replace(CONFIG, batch=8), "batch 4 -> 8"),
        (replace(CONFIG, seed=7), "seed 0 -> 7"),
        (replace(CONFIG, objectives=(4, 4)), "objectives (1, 2) -> (4, 4)"),
        (replace(CONFIG, rollout=replace(CONFIG.rollout, temperature=0.5)), "rollout.temperature 1.0 -> 0.5"),
        (replace(CONFIG, rollout=replace(CONFIG.rollout, regime="reencode")), "rollout.regime carry -> reen"),
        (replace(CONFIG, ppo=replace(CONFIG.ppo, kl=0.0)), "ppo.kl 0.5 -> 0.0"),
    ):
        with pytest.raises(InputError, match="resume: wanted the settings of the run, got ") as error:
            run(other, unbroken, resume=True)
        assert told in str(error.value)
    with pytest.raises(InputError, match="out: wanted a folder without a run"):
        run(CONFIG, unbroken)
    with pytest.raises(InputError, match="resume: wanted it without init"):
        run(CONFIG, unbroken, resume=True, init=tmp_path)
    assert state(unbroken).keys() == before.keys() and len(records(unbroken)) == 9


def test_settings_that_change_nothing_learned_are_told(tmp_path):
    run(replace(CONFIG, updates=1), tmp_path)
    said = []
    more = replace(CONFIG, updates=2, keep=5, rollout=replace(CONFIG.rollout, slots=2))
    train.train(more, tmp_path, resume=True, progress=Progress(log=said.append))
    assert "resumed with other settings: keep 2 -> 5, rollout.slots 4 -> 2, updates 1 -> 2" in said
    assert json.loads((tmp_path / "train.json").read_text())["keep"] == 5
    assert [record["step"] for record in records(tmp_path) if record["phase"] == "ppo"] == [1, 2]


def test_the_free_settings_are_settings():
    from mem1.run_folder import FREE
    from mem1.run_folder import flat as dotted

    assert dotted(asdict(CONFIG)).keys() > FREE


def test_a_run_from_a_checkpoint_and_one_without_updates(tmp_path, unbroken):
    run(replace(CONFIG, updates=0), tmp_path / "none", init=unbroken)
    assert checkpoint.load(tmp_path / "none").trainer["ppo"]["updates"] == 0
    run(replace(CONFIG, updates=1), tmp_path / "one", init=unbroken)
    assert [record["phase"] for record in records(tmp_path / "one")] == ["ppo"]
    run(replace(CONFIG, updates=1), tmp_path / "one", init=unbroken, overwrite=True)
    assert [record["step"] for record in records(tmp_path / "one")] == [1]
