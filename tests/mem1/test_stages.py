"""Several runs in one call, each of a file of its own, and files that are based on others."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path

import pytest
import yaml
from checkout import ROOT

from mem1.checks import InputError
from mem1.cli import main
from mem1.commands.train_command import stages_of
from mem1.config_files import read
from mem1.train import checkpoint
from mem1.train.run_folder import METRICS

SMALL = """
model: {num_hidden_layers: 1, hidden_size: 32, num_attention_heads: 2, intermediate_size: 48}
environment: {objectives: 1, hops: 1}
rollout: {max_turns: 3, max_action_tokens: 16, num_slots: 4}
warmstart: {steps: 4, batch_tokens: 64, save_every: 2}
max_updates: 0
threads: 1
keep: 9
"""
PPO = """
base: 1-start.yaml
init: 1-start/checkpoints/warmstart-000002
warmstart: {steps: 0}
max_updates: 2
batch_size: 4
"""


@pytest.fixture
def recipes(tmp_path, monkeypatch):
    """Two stages; the second begins in the middle of the first. Files are given relative to the folder."""
    folder = tmp_path / "recipes" / "small"
    folder.mkdir(parents=True)
    (folder / "1-start.yaml").write_text(SMALL)
    (folder / "2-ppo.yaml").write_text(PPO)
    monkeypatch.chdir(tmp_path)
    return sorted(map(str, folder.glob("*.yaml")))


def steps(run: Path) -> list[tuple[str, int]]:
    return [(r["phase"], r["step"]) for r in map(json.loads, (run / METRICS).read_text().splitlines())]


def test_stages_run_one_after_the_other_and_are_resumed_together(recipes, tmp_path, capsys):
    assert main(["train", *recipes]) == 0
    start, ppo = (tmp_path / "runs" / "small" / name for name in ("1-start", "2-ppo"))
    assert steps(start) == [("warmstart", n) for n in (1, 2, 3, 4)]
    assert steps(ppo) == [("policy", 1), ("policy", 2)]
    begun = json.loads((ppo / "train.json").read_text())["init"]
    assert begun == "runs/small/1-start/checkpoints/warmstart-000002"
    said = capsys.readouterr().out
    assert said.index("[1/2] runs/small/1-start") < said.index("[2/2] runs/small/2-ppo")
    assert main(["train", *recipes]) == 2, "what is there stays"
    assert "resume" in capsys.readouterr().err
    weights = (ppo / "last" / "model.safetensors").read_bytes()
    assert main(["train", *recipes, "--resume"]) == 0
    assert (ppo / "last" / "model.safetensors").read_bytes() == weights and len(steps(ppo)) == 2


def test_of_several_runs_those_that_have_not_begun_begin(recipes, tmp_path):
    assert main(["train", recipes[0], "--out", "some/1-start"]) == 0
    assert main(["train", *recipes, "--out", "some", "--resume"]) == 0
    assert steps(tmp_path / "some" / "2-ppo") == [("policy", 1), ("policy", 2)]
    # A stage by itself finds the one before beside it.
    assert main(["train", recipes[1], "--out", "some/again", "--seed", "3"]) == 0
    begun = json.loads((tmp_path / "some" / "again" / "train.json").read_text())["init"]
    assert begun == "some/1-start/checkpoints/warmstart-000002"


def test_a_fault_in_a_later_stage_is_told_before_the_first_begins(recipes, tmp_path, capsys):
    (tmp_path / "3.yaml").write_text("max_updaets: 1\n")
    assert main(["train", *recipes, "3.yaml"]) == 2
    assert "the nearest is max_updates" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()
    (tmp_path / "1-start.yaml").write_text(SMALL)
    assert main(["train", *recipes, "1-start.yaml", "--out", "x"]) == 2
    assert "config: expected files of different names, got '1-start.yaml'" in capsys.readouterr().err


def test_several_runs_and_their_settings_can_be_shown(recipes, capsys):
    assert main(["train", *recipes, "--print-config"]) == 0
    first, second = yaml.safe_load_all(capsys.readouterr().out)
    assert first["init"] is None and second["init"].endswith("1-start/checkpoints/warmstart-000002")
    assert second["environment"] == first["environment"] and second["batch_size"] == 4
    assert main(["train", *recipes, "--dry-run"]) == 0
    assert capsys.readouterr().out.count("in all") == 2


def test_a_stage_whose_beginning_is_not_there_is_planned_and_not_run(recipes, tmp_path, capsys):
    assert main(["plan", recipes[1]]) == 0 and "in all" in capsys.readouterr().out
    assert main(["train", recipes[1]]) == 2
    said = capsys.readouterr().err
    place = "runs/small/1-start/checkpoints/warmstart-000002"
    assert f"init: expected a run that another recipe makes: run that one first, got '{place}'" in said
    assert main(["train", recipes[0]]) == 0 and main(["train", recipes[1]]) == 0
    assert main(["plan", recipes[1]]) == 0


def test_a_folder_of_runs_is_no_model(tmp_path, monkeypatch):
    """runs/mem1-tiny has the stages of mem1-tiny; a model beside a run, or one that will be there, is one."""
    (tmp_path / "mem1-tiny" / "3-ppo").mkdir(parents=True)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    for init, place in (("mem1-tiny", "mem1-tiny"), ("model", str(tmp_path / "model"))):
        (tmp_path / "ppo.yaml").write_text(f"init: {init}")
        (stage,) = stages_of([tmp_path / "ppo.yaml"], tmp_path / "run", Namespace(settings={}))
        assert stage.config.init == place


def test_torchrun_trains_one_at_a_time(recipes, capsys, monkeypatch):
    monkeypatch.setattr("mem1.commands.train_command.is_torchelastic_launched", lambda: True)
    assert main(["train", *recipes]) == 2
    assert "config: expected one file a torchrun, got 2" in capsys.readouterr().err


def test_a_file_says_what_is_other_than_in_its_base(tmp_path):
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "a.yaml").write_text("seed: 1\nrollout: {max_turns: 7, greedy: true}\n")
    (tmp_path / "b.yaml").write_text("base: below/a.yaml\nrollout.max_turns: 9\n")
    (tmp_path / "c.yaml").write_text("base: b.yaml\nseed: 3\n")
    assert read(tmp_path / "c.yaml") == {"seed": 3, "rollout": {"max_turns": 9, "greedy": True}}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("base: a.yaml", "a.yaml: base: expected a file that is not based on this one, got 'a.yaml'"),
        ("base: b.yaml", "b.yaml: base: expected a file that is not based on this one, got 'a.yaml'"),
        ("base: none.yaml", "none.yaml: expected a file of settings, got none"),
        ("base: 3", "a.yaml: base: expected the name of a file, got 3"),
        ("base: []", "a.yaml: base: expected the name of a file"),
    ],
)
def test_a_base_that_cannot_be_one(tmp_path, text, message):
    (tmp_path / "b.yaml").write_text("base: a.yaml")
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(InputError) as raised:
        read(tmp_path / "a.yaml")
    assert message in str(raised.value)


def test_the_stages_of_the_package_fit_together(tmp_path):
    """Each begins with what an earlier one will have kept, and plays by its rules."""
    recipes = sorted((ROOT / "recipes" / "mem1-tiny").glob("*.yaml"))
    stages = {stage.out.name: stage.config for stage in stages_of(recipes, tmp_path, Namespace(settings={}))}
    seeds = {name: config.seed for name, config in stages.items() if name.startswith("3-ppo")}
    assert sorted(seeds.values()) == [0, 0, 1, 2]
    for name, config in stages.items():
        world = dict(config.environment)
        reinforced = "ppo" in name
        assert world.pop("objectives") == (2 if reinforced else (1, 4) if "few" in name else (1, 16)), name
        assert ("hasty" in world) == ("hasty" in name)
        world.pop("hasty", None)
        assert world == {"hops": [1, 3], "facts": [0, 4], "passage_tokens": 0}
        assert bool(config.max_updates) == reinforced and bool(config.warmstart.steps) != reinforced
        if config.init is None:
            continue
        run, *place = Path(config.init).relative_to(tmp_path).parts
        before = stages[run]
        assert list(stages).index(run) < list(stages).index(name)
        assert before.rollout.prune == config.rollout.prune
        for folder in place[1:]:
            kept = checkpoint.Place.of(folder)
            assert kept is not None and kept.phase == 0 and kept.step % before.warmstart.save_every == 0
            assert before.warmstart.steps / before.warmstart.save_every <= before.keep
