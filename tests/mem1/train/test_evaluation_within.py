"""Evaluations within a run: of other episodes, without a trace in what is learned."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from mem1.config import AlgorithmConfig, ModelConfig, RolloutConfig, TrainConfig, WarmStartConfig
from mem1.envs.toy.multihop import MultiHopEnv
from mem1.envs.toy.training import toy_training
from mem1.runtime.progress import Progress
from mem1.train import checkpoint
from mem1.train.train_loop import train
from mem1.train.training_episodes import EpisodesFailed

TINY = TrainConfig(
    max_updates=2,
    batch_size=4,
    environment={"objectives": (1, 2)},
    model=ModelConfig(num_hidden_layers=1, hidden_size=32, num_attention_heads=2, num_key_value_heads=1),
    rollout=RolloutConfig(num_slots=4, max_action_tokens=12, max_turns=2, episode_retries=0),
    warmstart=WarmStartConfig(steps=0),
    algorithm=AlgorithmConfig(mini_batch_size=2, critic_only_updates=0),
)


def run(config, out, **how):
    train(config, out, **(toy_training(config) | {"progress": Progress(log=lambda line: None)} | how))


def records(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


class FailsLater(MultiHopEnv):
    """From its fifth episode on."""

    made = 0

    def reset(self, seed, task=None):
        FailsLater.made += 1
        if FailsLater.made > TINY.batch_size:
            raise LookupError("the make is down")
        return super().reset(seed)


def test_evaluations_are_of_other_episodes_and_change_nothing(tmp_path):
    run(TINY, tmp_path / "plain")
    run(replace(TINY, evaluate_every=2, evaluation_episodes=3), tmp_path / "evaluated")
    plain, evaluated = (records(tmp_path / name) for name in ("plain", "evaluated"))
    for one, other in zip(plain, evaluated, strict=True):
        extra = {name for name in other if name.startswith("evaluation_")}
        assert bool(extra) == (other["step"] % 2 == 0)
        assert {n: v for n, v in other.items() if n not in extra and "second" not in n} == {
            n: v for n, v in one.items() if "second" not in n
        }
    found = [record["evaluation_reward"] for record in evaluated if record["step"] % 2 == 0]
    best = next(path for path in checkpoint.numbered(tmp_path / "evaluated") if path.name == "policy-000002")
    assert checkpoint.score_of(best) == pytest.approx(found[0])


def test_an_evaluation_that_fails_loses_no_update(tmp_path):
    FailsLater.made = 0
    config = replace(TINY, evaluate_every=1)
    with pytest.raises(EpisodesFailed, match="64 of 64 episodes failed .LookupError 64"):
        run(config, tmp_path, make_environment=lambda: FailsLater((1, 2)))
    assert [record["step"] for record in records(tmp_path)] == [1]
    assert checkpoint.load(tmp_path).trainer["learner"]["updates"] == 1
