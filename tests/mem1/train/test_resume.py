"""A run that stops and goes on is the run that never stopped, to the bit."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from mem1.checks import InputError
from mem1.config import AlgorithmConfig, ModelConfig, RolloutConfig, TrainConfig, WarmStartConfig
from mem1.envs.toy.training import toy_training
from mem1.runtime.interrupts import Interrupted
from mem1.runtime.progress import Progress
from mem1.train import checkpoint, run_folder
from mem1.train import train_loop as train
from mem1.train.learner import Learner
from mem1.train.optim import AdamW
from mem1.train.run_folder import METRICS

CONFIG = TrainConfig(
    max_updates=4,
    batch_size=4,
    environment={"objectives": (1, 2)},
    model=ModelConfig(
        num_hidden_layers=1,
        hidden_size=32,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=64,
    ),
    rollout=RolloutConfig(num_slots=4, max_action_tokens=16, max_turns=3),
    warmstart=WarmStartConfig(steps=5, batch_tokens=256, save_every=2),
    # Large steps and a KL that weighs: whatever is not restored shows in the weights. The warm-up is still
    # under way at the stop.
    algorithm=AlgorithmConfig(
        kl_coef=0.5,
        mini_batch_size=3,
        actor_lr=0.01,
        critic_lr=0.01,
        actor_lr_warmup_steps=9,
        critic_lr_warmup_steps=9,
        critic_only_updates=1,
    ),
)


def run(config: TrainConfig, out: Path, **how: Any) -> None:
    train.train(config, out, **toy_training(config) | {"progress": Progress(log=lambda line: None)} | how)


def state(out: Path) -> dict[str, Any]:
    """All that the newest checkpoint of a run holds, by its path in the nested dicts and lists."""
    saved = checkpoint.load(out)
    weights, trainer = dict(saved.model.state_dict()), saved.trainer
    return flat({"actor": weights, "values": trainer.values, "tensors": trainer.tensors()})


def flat(tree: Any, path: str = "") -> dict[str, Any]:
    if not isinstance(tree, (dict, list, tuple)):
        return {path: tree}
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    return {name: leaf for key, part in items for name, leaf in flat(part, f"{path}/{key}").items()}


def records(out: Path) -> list[dict[str, Any]]:
    """What a run measured, but for its times."""
    lines = [json.loads(line) for line in (out / METRICS).read_text().splitlines()]
    return [{name: value for name, value in line.items() if "second" not in name} for line in lines]


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


def untagged_tokenizer() -> PreTrainedTokenizerFast:
    core = Tokenizer(models.WordLevel(vocab={"<unk>": 0, "a": 1}, unk_token="<unk>"))
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>")


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
    run(replace(CONFIG, max_updates=2), tmp_path)
    stopped = state(tmp_path)
    run(CONFIG, tmp_path, resume=True)
    resumed = state(tmp_path)
    assert_same(tmp_path, unbroken)

    def moved(part: str) -> float:
        """How far the second half of the run took the weights of `part`."""
        return max(
            float((resumed[name] - stopped[name]).abs().max()) for name in resumed if name.startswith(part)
        )

    assert moved("/actor") > 0.01 and moved("/tensors/critic") > 0.01
    assert moved("/tensors/reference") == 0


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(
    ("owner", "name", "when", "updates"),
    [
        (train, "append_json", 2, None),  # in step 3 of the warm start
        (train, "rollout", 2, 2),  # of update 3
        (Learner, "prepare", 2, 2),
        (Learner, "step", 4, 3),  # in the middle of update 3, which is finished
        (checkpoint, "write", 1, None),
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
        assert checkpoint.load(tmp_path).trainer["learner"]["updates"] == updates
    run(CONFIG, tmp_path, resume=True)
    assert_same(tmp_path, unbroken)


@pytest.mark.parametrize("updates", [2, 1])
def test_a_finished_run_is_resumed_to_no_more(tmp_path, updates):
    config = replace(CONFIG, max_updates=2)
    run(config, tmp_path)
    before = records(tmp_path)
    run(replace(config, max_updates=updates), tmp_path, resume=True)
    run(replace(config, max_updates=updates), tmp_path, resume=True)
    assert records(tmp_path) == before
    assert checkpoint.load(tmp_path).trainer["learner"]["updates"] == 2


def test_a_signal_in_the_first_rollout_after_a_resume(tmp_path, unbroken, monkeypatch):
    run(replace(CONFIG, max_updates=2), tmp_path)
    for _ in range(2):
        with monkeypatch.context() as patch:
            interrupt(patch, train, "rollout", 0, signal.SIGTERM)
            with pytest.raises(Interrupted):
                run(CONFIG, tmp_path, resume=True)
    with monkeypatch.context() as patch:
        patch.setattr(train, "rollout", lambda *a, **s: (_ for _ in ()).throw(OSError("no engine")))
        with pytest.raises(OSError, match="no engine"):
            run(CONFIG, tmp_path, resume=True)
    run(CONFIG, tmp_path, resume=True)
    assert_same(tmp_path, unbroken)


def test_two_signals_in_a_step_of_the_warm_start_save_no_half_of_it(tmp_path, unbroken, monkeypatch):
    with monkeypatch.context() as patch:
        interrupt(patch, AdamW, "step", 3, signal.SIGTERM, times=1)
        step = AdamW.step

        def again(self, rate):
            norm = step(self, rate)
            if self.steps == 4:
                os.kill(os.getpid(), signal.SIGTERM)
            return norm

        patch.setattr(AdamW, "step", again)
        with pytest.raises(Interrupted):
            run(CONFIG, tmp_path)
    assert [path.name for path in checkpoint.numbered(tmp_path)] == ["warmstart-000002"]
    run(CONFIG, tmp_path, resume=True)
    assert_same(tmp_path, unbroken)


def test_a_signal_in_the_last_save_is_not_swallowed(tmp_path, monkeypatch):
    config = replace(CONFIG, max_updates=1)
    with monkeypatch.context() as patch:
        save = checkpoint.write

        def signalled(path, *arguments, **how):
            if path.name.startswith("policy"):
                os.kill(os.getpid(), signal.SIGTERM)
            return save(path, *arguments, **how)

        patch.setattr(checkpoint, "write", signalled)
        with pytest.raises(Interrupted):
            run(config, tmp_path)
    assert checkpoint.load(tmp_path).trainer["learner"]["updates"] == 1


@pytest.mark.parametrize("when", [3, 6])  # in the warm start, after update 2
def test_a_disk_that_is_full_loses_no_record(tmp_path, unbroken, monkeypatch, when):
    append, calls = train.append_json, []

    def full(path, record):
        calls.append(1)
        if len(calls) == when:
            raise OSError(28, "No space left on device")
        append(path, record)

    with monkeypatch.context() as patch:
        patch.setattr(train, "append_json", full)
        with pytest.raises(OSError, match="No space left"):
            run(CONFIG, tmp_path)
    run(CONFIG, tmp_path, resume=True)
    assert_same(tmp_path, unbroken)


def test_interruptions_do_not_decide_which_checkpoint_is_the_best(tmp_path, monkeypatch):
    def rewarded(trajectories, original=train.describe):
        rewards = iter_rewards[len(rewarded_so_far)]
        rewarded_so_far.append(rewards)
        return original(trajectories) | {"reward": rewards}

    config = replace(CONFIG, max_updates=6, save_every=3, keep=9)
    iter_rewards, best = [0.2, 0.3, 0.1, 0.9, 0.0, 0.0], []
    for name, stops in (("whole", []), ("stopped", [4])):
        rewarded_so_far: list[float] = []
        with monkeypatch.context() as patch:
            patch.setattr(train, "describe", rewarded)
            for stop in stops:
                with monkeypatch.context() as other:
                    interrupt(other, Learner, "prepare", stop, signal.SIGTERM)
                    with pytest.raises(Interrupted):
                        run(config, tmp_path / name)
                assert checkpoint.load(tmp_path / name).trainer["rewards"] == [0.9]
            run(config, tmp_path / name, resume=bool(stops))
        best.append((os.readlink(tmp_path / name / "best"), checkpoint.score_of(tmp_path / name / "best")))
    assert best[0] == best[1] == ("checkpoints/policy-000006", pytest.approx(0.3))


def test_a_run_killed_before_its_first_checkpoint_goes_on_with_what_it_began_with(
    tmp_path, unbroken, monkeypatch
):
    config = replace(CONFIG, max_updates=1, init=str(unbroken), warmstart=WarmStartConfig())
    run(config, tmp_path / "whole")

    class Killed(BaseException):
        pass

    with monkeypatch.context() as patch:
        patch.setattr(train, "sharded_learner", lambda *arguments: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            run(config, tmp_path / "killed")
    run(replace(config, init=None), tmp_path / "killed", resume=True)
    assert_same(tmp_path / "killed", tmp_path / "whole")


def test_numbers_of_numpy_become_python_s(tmp_path):
    config = replace(
        CONFIG,
        max_updates=1,
        seed=np.int64(3),
        algorithm=replace(CONFIG.algorithm, actor_lr=np.float64(1e-3)),
    )
    config = replace(config, environment={"objectives": (np.int64(1), 2)})
    config = replace(config, rollout=replace(config.rollout, regime=np.str_("carry")))
    run(config, tmp_path)
    run(replace(config, max_updates=2, seed=3), tmp_path, resume=True)
    assert json.loads((tmp_path / "train.json").read_text())["seed"] == 3


def test_a_run_that_cannot_be_deletes_nothing(tmp_path, unbroken, make_model):
    run(replace(CONFIG, max_updates=1), tmp_path)
    before = state(tmp_path)
    other = checkpoint.save(tmp_path / "untagged", make_model(), untagged_tokenizer())
    for config, how, message in (
        (replace(CONFIG, environment={"hops": 9}), {}, "hops: expected"),
        (
            CONFIG,
            {"make_environment": dict, "draw_example": None},
            "expected one with expert_action",
        ),
        (CONFIG, {"tokenizer": None}, "tokenizer: expected one for a model with random weights, got none"),
        (
            replace(CONFIG, init=str(other), model=ModelConfig()),
            {},
            "tokenizer: expected one that can write <IS>",
        ),
        (replace(CONFIG, init=str(tmp_path / "nothing")), {}, "model: expected a model folder"),
    ):
        with pytest.raises(InputError, match=message):
            run(config, tmp_path, overwrite=True, **how)
    assert state(tmp_path).keys() == before.keys()


@pytest.mark.parametrize("fails", ["link", "_remove"])
def test_a_save_that_fails_shows_why(tmp_path, monkeypatch, fails):
    config = replace(CONFIG, max_updates=2, save_every=1, keep=1)
    run(replace(config, max_updates=1), tmp_path)
    with monkeypatch.context() as patch:
        error = PermissionError(1, "not permitted")
        original, calls = getattr(run_folder, fails), []

        def failing(*arguments):
            calls.append(1)
            if len(calls) > (2 if fails == "link" else 0):  # not those of the resume itself
                raise error
            return original(*arguments)

        patch.setattr(run_folder, fails, failing)
        with pytest.raises(PermissionError, match="not permitted"):
            run(config, tmp_path, resume=True)
    run(config, tmp_path, resume=True)
    assert [record["step"] for record in records(tmp_path) if record["phase"] == "policy"] == [1, 2]


def test_a_second_signal_stops_at_once_with_the_checkpoint_before(tmp_path, unbroken, monkeypatch):
    with monkeypatch.context() as patch:
        interrupt(patch, Learner, "step", 4, signal.SIGINT, times=2)
        with pytest.raises(Interrupted):
            run(replace(CONFIG, save_every=1), tmp_path)
    assert checkpoint.load(tmp_path).trainer["learner"]["updates"] == 2
    run(CONFIG, tmp_path, resume=True)
    assert records(tmp_path) == records(unbroken)


def test_an_error_in_the_middle_of_an_update_leaves_the_checkpoint_before(tmp_path, unbroken, monkeypatch):
    step, calls = Learner.step, []

    def breaks(self, *arguments):
        calls.append(1)
        if len(calls) == 6:
            raise MemoryError("out of memory")
        return step(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Learner, "step", breaks)
        with pytest.raises(MemoryError):
            run(replace(CONFIG, save_every=1), tmp_path)
    assert checkpoint.load(tmp_path).trainer["learner"]["updates"] == 2
    run(CONFIG, tmp_path, resume=True)
    assert records(tmp_path) == records(unbroken)


def test_settings_that_make_another_run_are_refused(tmp_path, unbroken):
    before = state(unbroken)
    for other, told in (
        (replace(CONFIG, batch_size=8), "batch_size 4 -> 8"),
        (replace(CONFIG, seed=7), "seed 0 -> 7"),
        (replace(CONFIG, environment={"objectives": (4, 4)}), "environment.objectives [1, 2] -> [4, 4]"),
        (replace(CONFIG, rollout=replace(CONFIG.rollout, temperature=0.5)), "rollout.temperature 1.0 -> 0.5"),
        (replace(CONFIG, rollout=replace(CONFIG.rollout, regime="reencode")), "rollout.regime carry -> reen"),
        (replace(CONFIG, algorithm=replace(CONFIG.algorithm, kl_coef=0.0)), "algorithm.kl_coef 0.5 -> 0.0"),
    ):
        with pytest.raises(InputError, match="resume: expected the settings of the run, got ") as error:
            run(other, unbroken, resume=True)
        assert told in str(error.value)
    with pytest.raises(InputError, match="out: expected a folder without a run"):
        run(CONFIG, unbroken)
    with pytest.raises(InputError, match="resume: expected the init of the run, None, got "):
        run(replace(CONFIG, init=str(tmp_path)), unbroken, resume=True)
    assert state(unbroken).keys() == before.keys() and len(records(unbroken)) == 9


def test_settings_that_change_nothing_learned_are_told(tmp_path):
    run(replace(CONFIG, max_updates=1), tmp_path)
    said = []
    more = replace(CONFIG, max_updates=2, keep=5, rollout=replace(CONFIG.rollout, num_slots=2))
    run(more, tmp_path, resume=True, progress=Progress(log=said.append))
    assert "resumed with other settings: keep 2 -> 5, max_updates 1 -> 2, rollout.num_slots 4 -> 2" in said
    assert json.loads((tmp_path / "train.json").read_text())["keep"] == 5
    assert [record["step"] for record in records(tmp_path) if record["phase"] == "policy"] == [1, 2]


def test_the_free_settings_are_settings():
    from mem1.train.run_folder import FREE
    from mem1.train.run_folder import flat as dotted

    assert dotted(asdict(CONFIG)).keys() > FREE


def test_a_run_from_a_checkpoint_and_one_without_updates(tmp_path, unbroken):
    one = replace(CONFIG, max_updates=1, init=str(unbroken), warmstart=WarmStartConfig())
    run(replace(one, max_updates=0), tmp_path / "none")
    assert checkpoint.load(tmp_path / "none").trainer["learner"]["updates"] == 0
    run(one, tmp_path / "one")
    assert [record["phase"] for record in records(tmp_path / "one")] == ["policy"]
    run(one, tmp_path / "one", overwrite=True)
    assert [record["step"] for record in records(tmp_path / "one")] == [1]
