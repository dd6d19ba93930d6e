"""The command line, end to end with budgets of seconds."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from mem1 import checkpoint, train
from mem1.cli import _parser, _rollout_config, main
from mem1.config import PPOConfig, RolloutConfig, TrainConfig, WarmStartConfig
from mem1.episode import ENVIRONMENT_ERROR
from mem1.trajectory import Trajectory

TINY = ["--warmstart-steps", "2", "--batch", "4", "--max-turns", "3", "--max-action", "24", "--slots", "4"]


def test_help_and_errors_name_the_trouble(capsys, tmp_path):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    assert {"train", "eval", "rollout", "demo"} <= set(capsys.readouterr().out.replace(",", " ").split())
    for command in ("train", "eval", "rollout", "demo"):
        with pytest.raises(SystemExit):
            main([command, "--help"])
        assert "--seed" in capsys.readouterr().out
    assert main(["eval", str(tmp_path / "nothing")]) == 2
    assert "wanted a model folder with a config.json" in capsys.readouterr().err
    assert main(["train", "--temperature", "0", "--out", str(tmp_path)]) == 2
    assert "temperature: wanted a finite number >= 1e-4" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["train", "--objectives", "two"])
    assert "wanted a number or an interval such as 1-4, got 'two'" in capsys.readouterr().err


def test_train_resume_eval_and_rollout(capsys, tmp_path):
    run = str(tmp_path / "run")
    assert main(["train", "--out", run, "--updates", "1", *TINY]) == 0
    metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [m["phase"] for m in metrics][-1] == "ppo"
    wanted = {
        "reward",
        "exact_match",
        "tokens",
        "kl_reference",
        "dlogp_max",
        "value_loss",
        "critic_grad_norm",
    }
    assert wanted <= set(metrics[-1])
    assert metrics[-1]["dlogp_max"] < 5e-5

    assert main(["train", "--out", run, "--updates", "3", "--resume", *TINY]) == 0
    resumed = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert resumed[: len(metrics)] == metrics
    assert [m["step"] for m in resumed if m["phase"] == "ppo"] == [1, 2, 3]
    assert {"kl", "entropy", "clip_fraction", "ratio_max", "actor_grad_norm"} <= set(resumed[-1])
    assert checkpoint.load(tmp_path / "run" / "last").trainer["ppo"]["updates"] == 3

    model = run  # stands for its last checkpoint
    capsys.readouterr()
    sizes = ["--objectives", "1", "2", "--episodes", "2", "--max-turns", "3", "--max-action", "24"]
    assert main(["eval", model, *sizes, "--truncate", "30"]) == 0
    out = capsys.readouterr().out
    assert out.count("full context") >= 3
    assert out.count("truncated to 30") == 3, "the title of its parity, and a row for 1 and 2 objectives"
    assert "peak_without_prompt" in out and "max_dlogp" in out

    assert main(["rollout", model, "--episodes", "1", "--max-turns", "40", "--scripted"]) == 0
    assert "answered, reward 1.000" in capsys.readouterr().out
    saved = tmp_path / "t.jsonl"
    few = ["--episodes", "3", "--max-turns", "2", "--prune", "40"]
    assert main(["rollout", model, *few, "--out", str(saved)]) == 0
    played = [Trajectory.from_dict(json.loads(line)) for line in saved.read_text().splitlines()]
    assert sorted(t.seed for t in played) == [0, 1, 2]
    assert {t.prune for t in played} == {40}


def records(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--objectives", "17-20"], "objectives: wanted a number or an interval within 1..16"),
        (["--passage-tokens", "-1"], "passage_tokens: wanted a number >= 0"),
        (["--hops", "9"], "hops: wanted a number or an interval within 1..4"),
        (["--warmstart-seconds", "0"], "seconds: wanted a number > 0"),
        (["--seconds", "-1"], "seconds: wanted a number > 0"),
        (["--actor-lr", "nan"], "actor_lr: wanted a finite number > 0"),
        (["--kl", "-1"], "kl: wanted a finite number >= 0"),
        (["--prune", "0"], "prune: wanted 'action', 'is', 'never' or a number of tokens >= 1, got 0"),
        (["--prune", "-5"], "tokens >= 1, got '-5'"),
        (["--prune", "0.5"], "tokens >= 1, got '0.5'"),
        (["--prune", "sometimes"], "tokens >= 1, got 'sometimes'"),
        (["--resume", "--init", "somewhere"], "init: wanted None together with resume"),
    ],
)
def test_a_setting_out_of_range_fails_before_any_work(capsys, tmp_path, arguments, message):
    out = tmp_path / "run"
    assert main(["train", "--out", str(out), *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize("arguments", [["--objectives", "3-"], ["--seed", "-1"], ["--seed", str(2**32)]])
def test_the_parser_refuses(capsys, arguments):
    with pytest.raises(SystemExit):
        main(["train", *arguments])
    assert f"argument {arguments[0]}: wanted" in capsys.readouterr().err


def test_a_window_of_no_tokens_is_refused(capsys):
    with pytest.raises(SystemExit):
        main(["eval", "somewhere", "--truncate", "0"])
    assert "argument --truncate: wanted an integer >= 1, got 0" in capsys.readouterr().err


def test_configs_refuse_what_would_fail_later():
    for make in (
        lambda: WarmStartConfig(objectives=(3, 2)),
        lambda: WarmStartConfig(learning_rate=0.0),
        lambda: WarmStartConfig(seconds=0.0),
        lambda: PPOConfig(critic_lr=float("inf")),
        lambda: TrainConfig(seed=2**60),
        lambda: RolloutConfig(prune=True),
        lambda: WarmStartConfig(prune=0),
        lambda: TrainConfig(threads=0),
    ):
        with pytest.raises(ValueError, match="wanted"):
            make()


def test_limits_follow_the_world_unless_given():
    def limits(*arguments: str) -> tuple[int, int]:
        options = _parser().parse_args(["rollout", "somewhere", *arguments])
        config = _rollout_config(options, options.objectives[1])
        return config.max_info, config.max_turns

    assert limits() == (512, 40)
    info, turns = limits("--objectives", "16", "--hops", "4", "--passage-tokens", "600")
    assert info == 600 and turns > 16 * 4 + 1
    assert limits("--passage-tokens", "600", "--max-info", "5", "--max-turns", "3") == (5, 3)


def test_the_demo_says_at_once_that_matplotlib_is_missing(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["demo", "--quick", "--out", str(tmp_path / "demo")]) == 2
    assert "pip install 'mem1_core[plot]'" in capsys.readouterr().err
    assert not (tmp_path / "demo").exists()


def test_the_warm_start_gets_the_world_of_the_run(tmp_path, monkeypatch):
    given = []
    monkeypatch.setattr(train, "warm_start", lambda actor, tokenizer, config, *rest: given.append(config))
    world = ["--objectives", "2-6", "--hops", "1", "--passage-tokens", "600", "--prune", "is"]
    arguments = ["--out", str(tmp_path), "--updates", "0", "--regime", "reencode", *world]
    assert main(["train", *arguments]) == 0
    expected = WarmStartConfig(objectives=(2, 6), hops=1, passage_tokens=600, regime="reencode", prune="is")
    assert given == [expected]
    saved = json.loads((tmp_path / "train.json").read_text())
    assert saved["warmstart"]["objectives"] == [2, 6] and saved["warmstart"]["prune"] == "is"
    assert saved["rollout"]["max_info"] == 600


@pytest.fixture
def tiny() -> TrainConfig:
    config = TrainConfig(updates=2, batch=2, objectives=(1, 1), warmstart=WarmStartConfig(steps=0))
    return replace(config, rollout=replace(config.rollout, max_turns=2, max_action=12))


def test_records_after_the_checkpoint_are_dropped_on_resume(tiny, tmp_path):
    tiny = replace(tiny, ppo=PPOConfig(kl=0.0))
    train.train(tiny, tmp_path)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"phase": "ppo", "step": 3, "reward": 9.0}\n{"phase": "ppo", "st')
    with pytest.raises(ValueError, match="kl: wanted 0"):
        train.train(replace(tiny, ppo=PPOConfig(kl=0.001)), tmp_path, resume=True)
    assert json.loads((tmp_path / "train.json").read_text())["ppo"]["kl"] == 0.0
    train.train(replace(tiny, updates=3), tmp_path, resume=True)
    assert [r["step"] for r in records(tmp_path)] == [1, 2, 3]
    assert all(r["reward"] <= 1.0 for r in records(tmp_path))

    again = tmp_path / "again"
    for _ in range(2):  # a run that starts from a checkpoint starts its records too
        train.train(replace(tiny, updates=1), again, init=tmp_path)
        assert [r["step"] for r in records(again)] == [1]


def test_no_update_still_leaves_a_checkpoint(tiny, make_model, tokenizer, tmp_path):
    init = checkpoint.save(tmp_path / "init", make_model(), tokenizer)
    train.train(replace(tiny, updates=0), tmp_path / "run", init=init)
    assert checkpoint.load(tmp_path / "run").trainer["ppo"]["updates"] == 0


def test_an_interrupted_run_keeps_its_complete_updates(tiny, tmp_path, monkeypatch):
    rollout = train.rollout

    def interrupted(actor, tokenizer, make_environment, seeds, config, *, engine):
        if seeds[0] >= 4:
            raise KeyboardInterrupt
        return rollout(actor, tokenizer, make_environment, seeds, config, engine=engine)

    monkeypatch.setattr(train, "rollout", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train.train(replace(tiny, updates=9), tmp_path)
    assert checkpoint.load(tmp_path).trainer["ppo"]["updates"] == 2


def test_an_interrupted_update_is_not_saved(tiny, tmp_path, monkeypatch):
    def interrupted(self, trajectories, generator):
        self.actor.get_input_embeddings().weight.data.zero_()
        raise KeyboardInterrupt

    monkeypatch.setattr(train.PPO, "update", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train.train(tiny, tmp_path)
    assert checkpoint.load(tmp_path).model.get_input_embeddings().weight.any()


def test_episodes_with_an_environment_error_are_not_learned_from(tiny, tmp_path, monkeypatch):
    step, update, learned = train.MultiHopEnv.step, train.PPO.update, []

    def failing(self, action):
        if self.bad:
            raise RuntimeError("the world is down")
        return step(self, action)

    def reset(self, seed, original=train.MultiHopEnv.reset):
        self.bad = seed != 3
        return original(self, seed)

    def watched(self, trajectories, generator):
        learned.append([t.seed for t in trajectories])
        return update(self, trajectories, generator)

    monkeypatch.setattr(train.MultiHopEnv, "step", failing)
    monkeypatch.setattr(train.MultiHopEnv, "reset", reset)
    monkeypatch.setattr(train.PPO, "update", watched)
    said = []
    train.train(tiny, tmp_path, say=said.append)
    assert learned == [[3]]
    assert [r["environment_errors"] for r in records(tmp_path)] == [2, 1]
    assert any(f"skipped: {ENVIRONMENT_ERROR}" in line and "the world is down" in line for line in said)
    assert checkpoint.load(tmp_path).trainer["ppo"]["updates"] == 2


def test_trajectories_are_written_whole_or_not_at_all(capsys, make_model, tokenizer, tmp_path, monkeypatch):
    model = str(checkpoint.save(tmp_path / "model", make_model(), tokenizer))
    saved = tmp_path / "t.jsonl"
    saved.write_text("old")
    assert main(["rollout", model, "--objectives", "17", "--out", str(saved)]) == 2
    assert main(["eval", model, "--objectives", "1", "17"]) == 2
    assert capsys.readouterr().out == ""

    def breaks(*arguments, **settings):
        raise OSError("disk")
        yield

    monkeypatch.setattr("mem1.cli.rollout", breaks)
    assert main(["rollout", model, "--out", str(saved)]) == 2
    assert saved.read_text() == "old"
    assert {entry.name for entry in tmp_path.iterdir()} == {"model", "t.jsonl"}
    assert main(["rollout", model, "--out", str(tmp_path)]) == 2
    assert "wanted the name of a regular file" in capsys.readouterr().err


@pytest.mark.slow
def test_the_quick_demo(capsys, tmp_path):
    pytest.importorskip("matplotlib")
    assert main(["demo", "--quick", "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert f"Plots, tables and trajectories are in {tmp_path}" in out
    made = {path.name for path in tmp_path.iterdir()}
    assert {
        "peak_tokens.png",
        "peak_tokens_trained.png",
        "learning_curve.png",
        "trajectory_mask.png",
        "trajectories.jsonl",
        "results.json",
        "train",
    } <= made
    report = json.loads((tmp_path / "results.json").read_text())
    exact = [row for row in report["parity"] if row["regime"] != "paper" and row["dtype"] == "float32"]
    assert len(exact) == 2
    assert all(row["max_dlogp"] <= 5e-5 for row in exact)
