"""The models of the package: they are found, have learned, and their runs can be repeated."""

from __future__ import annotations

import json
import os
from argparse import Namespace
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from checkout import ROOT

from mem1 import MemoryEfficientAgent
from mem1.checks import InputError
from mem1.commands.demo_command import STAGES
from mem1.commands.loading import log_other_settings
from mem1.commands.train_command import stages_of
from mem1.config import RolloutConfig
from mem1.config_files import made, read, typed
from mem1.demo import Agents, limits, trained_with
from mem1.envs.toy.multihop import MultiHopEnv
from mem1.evaluation.evaluation_loop import evaluate
from mem1.models.load import load_tokenizer
from mem1.models.shipped import MADE_BY, RUNS, shipped
from mem1.runtime.progress import Progress
from mem1.train import checkpoint
from mem1.train.run_folder import settings_path

RECIPES = sorted((ROOT / "recipes" / "mem1-tiny").glob("*.yaml"))
NO_OPTIONS = Namespace(settings={})


@pytest.mark.parametrize("name", MADE_BY)
def test_a_model_of_the_package_is_loaded_by_its_name(name):
    model, tokenizer, trainer = checkpoint.load(name)
    assert model.dtype == torch.float32, "stored in half precision alone"
    assert len(tokenizer) == model.config.vocab_size
    assert trainer is None
    assert load_tokenizer(name).get_vocab() == tokenizer.get_vocab()


def test_a_model_s_folder_comes_before_one_of_the_package(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mem1-tiny").mkdir()
    assert checkpoint.newest("mem1-tiny") == shipped("mem1-tiny"), "a folder without a model is none"
    (tmp_path / "mem1-tiny" / "train.json").write_text("{}")
    with pytest.raises(
        InputError, match="model: expected a model folder with a config.json, got 'mem1-tiny'"
    ):
        checkpoint.load("mem1-tiny")  # a run without a checkpoint is not the package's model
    (tmp_path / "mem1-tiny" / "train.json").unlink()
    (tmp_path / "mem1-tiny" / "config.json").write_text("{}")
    assert trained_with(Agents().mem1).max_updates == 45, "the demo's are the package's"
    assert checkpoint.newest("mem1-tiny") == "mem1-tiny"
    assert shipped("mem1-huge") is None and shipped("runs") is None
    with pytest.raises(InputError, match="model: expected one with a train.json"):
        trained_with("mem1-tiny")


def test_a_line_tells_of_rules_that_a_model_of_the_package_was_not_trained_with():
    said = []
    rules = trained_with("mem1-tiny").rollout
    log_other_settings("mem1-tiny", rules, Progress(log=said.append))
    assert said == []
    log_other_settings("mem1-tiny-full-context", rules, Progress(log=said.append))
    assert "weights trained with prune never, now action" in said
    relative = os.path.relpath(shipped("mem1-tiny"))
    assert settings_path(relative) == settings_path("mem1-tiny")


def test_the_agent_answers_most_of_sixteen_questions_with_little_memory():
    agent = MemoryEfficientAgent("mem1-tiny", config=RolloutConfig(greedy=True))
    played = [agent.run(MultiHopEnv(16, facts=4), seed=seed) for seed in range(3)]
    assert sum(trajectory.reward for trajectory in played) / 3 >= 0.75
    assert all(trajectory.peak_tokens() < 0.2 * trajectory.tokens.numel() for trajectory in played)


def test_reinforcement_on_two_questions_has_carried_to_eight():
    def share(name: str, objectives: int) -> float:
        model, tokenizer, _ = checkpoint.load(name)
        config = trained_with(name)
        make = partial(MultiHopEnv, **config.environment | {"objectives": objectives, "hops": 2})
        row, _ = evaluate(
            *(model, tokenizer, limits(config, objectives), make),
            agent=name,
            objectives=objectives,
            episodes=24,
            seed=3,
        )
        return row["reward"]

    for objectives in (2, 8):
        assert share("mem1-tiny", objectives) > share("mem1-tiny-start", objectives) + 0.2
    assert share("mem1-tiny", 2) >= 0.95


def test_the_models_are_small():
    assert sum(path.stat().st_size for path in RUNS.parent.rglob("*") if path.is_file()) <= 6e6


def test_the_runs_were_those_of_the_recipes(tmp_path):
    """All settings, but how many checkpoints were kept."""
    recipes = {stage.out.name: stage.config for stage in stages_of(RECIPES, tmp_path, NO_OPTIONS)}
    runs = {path.stem: made(typed(read(path))) for path in RUNS.glob("*.json")}
    assert set(runs) == set(recipes)
    for name, ran in runs.items():
        recipe = recipes[name]
        assert replace(ran, init=ran.init and str(tmp_path / ran.init), keep=recipe.keep) == recipe


def test_every_run_has_its_log():
    for path in RUNS.glob("*.json"):
        config = made(typed(read(path)))
        steps = [json.loads(line) for line in path.with_suffix(".jsonl").read_text().splitlines()]
        total = max(config.warmstart.steps, config.max_updates)
        assert steps[0]["step"] <= 0.02 * total + 1 and steps[-1]["step"] == total


def test_the_demo_can_make_them_again(tmp_path):
    stages = stages_of([RUNS / f"{stage}.json" for stage in STAGES], tmp_path, NO_OPTIONS)
    outs = [stage.out for stage in stages]
    assert {out.name for out in outs} >= set(MADE_BY.values())
    for number, stage in enumerate(stages):
        assert stage.config.init is None or Path(stage.config.init) in outs[:number]
