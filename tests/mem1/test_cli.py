"""The command line, end to end with budgets of seconds."""

from __future__ import annotations

import json

import pytest

from mem1 import checkpoint
from mem1.cli import main
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
    assert "temperature: wanted a number > 0" in capsys.readouterr().err
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

    model = str(tmp_path / "run" / "last")
    capsys.readouterr()
    sizes = ["--objectives", "1", "2", "--episodes", "2", "--max-turns", "3", "--max-action", "24"]
    assert main(["eval", model, *sizes]) == 0
    out = capsys.readouterr().out
    assert out.count("full context") >= 3
    assert "peak_without_prompt" in out and "max_dlogp" in out

    assert main(["rollout", model, "--episodes", "1", "--max-turns", "40", "--scripted"]) == 0
    assert "answered, reward 1.000" in capsys.readouterr().out
    saved = tmp_path / "t.jsonl"
    assert main(["rollout", model, "--episodes", "3", "--max-turns", "2", "--out", str(saved)]) == 0
    played = [Trajectory.from_dict(json.loads(line)) for line in saved.read_text().splitlines()]
    assert sorted(t.seed for t in played) == [0, 1, 2]


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
