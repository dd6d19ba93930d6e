"""A training run: what it learns from, what stops it, and what it says of both."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mem1.checks import InputError
from mem1.config import AlgorithmConfig, ModelConfig, RolloutConfig, ScaleConfig, TrainConfig, WarmStartConfig
from mem1.engine.engine import Engine
from mem1.envs.toy.multihop import MultiHopEnv
from mem1.envs.toy.training import toy_training
from mem1.runtime.progress import Progress
from mem1.seeds import derive_seed
from mem1.train import checkpoint
from mem1.train import train_loop as train
from mem1.train.learner import Learner
from mem1.train.optim import Diverged
from mem1.train.run_folder import METRICS
from mem1.train.training_episodes import EpisodesFailed
from mem1.trajectory import Trajectory

TINY = TrainConfig(
    max_updates=2,
    batch_size=4,
    environment={"objectives": (1, 2)},
    model=ModelConfig(
        num_hidden_layers=1,
        hidden_size=32,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=64,
    ),
    rollout=RolloutConfig(num_slots=4, max_action_tokens=12, max_turns=2, env_retries=0, episode_retries=0),
    warmstart=WarmStartConfig(steps=0),
    algorithm=AlgorithmConfig(critic_only_updates=0, mini_batch_size=2),
)


def records(run: Path, phase: str = "policy") -> list[dict]:
    lines = [json.loads(line) for line in (run / METRICS).read_text().splitlines()]
    return [line for line in lines if line["phase"] == phase]


def quiet() -> Progress:
    return Progress(log=lambda line: None)


def run(config: TrainConfig, out: Path, **how: Any) -> checkpoint.Checkpoint:
    return train.train(config, out, **toy_training(config) | how)


def place(config: TrainConfig, seed: int) -> tuple[int, int]:
    """Update and index of an episode's seed."""
    return next(
        (update, i)
        for update in range(config.max_updates)
        for i in range(config.batch_size)
        if derive_seed(config.seed, "training", update, i) == seed
    )


class Watched:
    """The seeds of the trajectories that an update learns from."""

    def __init__(self, monkeypatch) -> None:
        self.learned: list[list[int]] = []
        prepare = Learner.prepare

        def watching(learner, trajectories):
            batch, metrics = prepare(learner, trajectories)
            self.learned.append([experience.trajectory.seed for experience in batch])
            return batch, metrics

        monkeypatch.setattr(Learner, "prepare", watching)


def failing(config: TrainConfig, bad: set[tuple[int, int]], times: int = 10**9):
    """A make whose steps raise in the episodes at `bad`, so many times each."""
    failed: dict[tuple[int, int], int] = {}

    class Failing(MultiHopEnv):
        def reset(self, seed: int, task=None) -> str:
            self.place = place(config, seed)
            return super().reset(seed)

        def step(self, action):
            if self.place in bad and failed.get(self.place, 0) < times:
                failed[self.place] = failed.get(self.place, 0) + 1
                raise LookupError("the make is down")
            return super().step(action)

    return lambda: Failing((1, 2))


def test_failed_episodes_are_not_learned_from(tmp_path, monkeypatch):
    watched, said = Watched(monkeypatch), []
    make = failing(TINY, {(0, 1), (0, 2), (1, 3)})
    run(TINY, tmp_path, make_environment=make, progress=Progress(log=said.append))
    assert [[place(TINY, seed) for seed in seeds] for seeds in watched.learned] == [
        [(0, 0), (0, 3)],
        [(1, 0), (1, 1), (1, 2)],
    ]
    first, second = records(tmp_path)
    assert first["errors"] == {"LookupError": 2} and second["errors"] == {"LookupError": 1}
    assert first["replays"] == 0 and first["dropped_turns"] == 1.0
    assert any("failed: LookupError 2" in line for line in said)
    assert checkpoint.load(tmp_path).trainer["learner"]["updates"] == 2


def test_episodes_are_played_again_and_the_failures_told(tmp_path, monkeypatch):
    watched = Watched(monkeypatch)
    config = replace(TINY, rollout=replace(TINY.rollout, episode_retries=2))
    run(config, tmp_path, make_environment=failing(config, {(0, 1)}, times=2), progress=quiet())
    assert [len(seeds) for seeds in watched.learned] == [4, 4]
    first, second = records(tmp_path)
    assert first["errors"] == {} and first["replays"] == 2 and second["replays"] == 0
    assert first["dropped_turns"] == 1.0 and second["dropped_turns"] is None
    assert 0 < first["dropped_tokens"] < first["tokens"] / 4


def test_a_world_that_is_down_for_good_stops_the_run(tmp_path):
    make = failing(TINY, {(1, 0), (1, 1), (1, 3)})
    with pytest.raises(EpisodesFailed, match="3 of 4 episodes failed .LookupError 3.*the make is down"):
        run(TINY, tmp_path, make_environment=make, progress=quiet())
    assert checkpoint.load(tmp_path).trainer["learner"]["updates"] == 1, "what was learned before is kept"
    patient = replace(TINY, max_failed=1.0)
    run(patient, tmp_path, make_environment=make, resume=True, progress=quiet())
    assert checkpoint.load(tmp_path).trainer["learner"]["updates"] == 2
    everything = failing(TINY, {(0, i) for i in range(4)})
    with pytest.raises(EpisodesFailed, match="4 of 4"):
        run(patient, tmp_path / "all", make_environment=everything, progress=quiet())


def poisoned(monkeypatch, calls: set[int]) -> None:
    """Logits of one row are NaN in those calls of the engine."""
    count, logits = 0, Engine.logits

    def bad(self, hidden):
        nonlocal count
        count += 1
        made = logits(self, hidden).clone()
        if count in calls:
            made[0] = torch.nan
        return made

    monkeypatch.setattr(Engine, "logits", bad)


def test_policy_errors_are_counted_and_not_learned_from(tmp_path, monkeypatch):
    poisoned(monkeypatch, {5})
    watched = Watched(monkeypatch)
    run(TINY, tmp_path, progress=quiet())
    assert [len(seeds) for seeds in watched.learned] == [3, 4]
    assert [record["errors"] for record in records(tmp_path)] == [{"policy": 1}, {}]
    model = checkpoint.load(tmp_path).model
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_an_update_follows_the_seeds_and_not_the_clock(tmp_path, monkeypatch):
    watched = Watched(monkeypatch)
    rollout = train.rollout
    monkeypatch.setattr(train, "rollout", lambda *a, **s: reversed(list(rollout(*a, **s))))
    run(TINY, tmp_path, progress=quiet())
    assert [[place(TINY, seed) for seed in seeds] for seeds in watched.learned] == [
        [(update, i) for i in range(4)] for update in range(2)
    ]


@pytest.mark.parametrize("which", ["actor", "critic"])
def test_a_gradient_that_is_not_finite_is_not_stepped_on(tmp_path, monkeypatch, which):
    step, calls = Learner.step, []

    def poison(self, batch, train_actor=True, normalizer=None):
        calls.append(1)
        if len(calls) == 2:
            # As an overflow in one kernel does; the backward adds to it.
            model = getattr(self, which)
            parameter = next(p for p in model.parameters())
            handle = parameter.register_hook(lambda grad: torch.full_like(grad, torch.inf))
            try:
                return step(self, batch, train_actor, normalizer)
            finally:
                handle.remove()
        return step(self, batch, train_actor, normalizer)

    monkeypatch.setattr(Learner, "step", poison)
    said = []
    run(TINY, tmp_path, progress=Progress(log=said.append))
    assert [record["skipped_steps"] for record in records(tmp_path)] == [1, 0]
    assert any("skipped steps: 1" in line for line in said)
    saved = checkpoint.load(tmp_path)
    assert all(parameter.isfinite().all() for parameter in saved.model.parameters())
    assert saved.trainer["learner"]["optimizers"][which]["steps"] == 3
    tensors = saved.trainer.tensors()
    assert any(name.startswith("critic.") for name in tensors)
    assert all(value.isfinite().all() for value in tensors.values())


def test_three_in_a_row_stop_the_run_with_the_last_good_weights(tmp_path, monkeypatch):
    step = Learner.step

    def poison(self, batch, train_actor=True, normalizer=None):
        if self.updates == 1:
            for experience in batch:
                experience.returns.fill_(torch.nan)
        return step(self, batch, train_actor, normalizer)

    monkeypatch.setattr(Learner, "step", poison)
    config = replace(TINY, max_updates=9, save_every=1, algorithm=replace(TINY.algorithm, mini_batch_size=1))
    with pytest.raises(Diverged, match="3 steps in a row"):
        run(config, tmp_path, progress=quiet())
    assert checkpoint.load(tmp_path).trainer["learner"]["updates"] == 1
    assert len(records(tmp_path)) == 1
    lines = (tmp_path / "diverged.jsonl").read_text().splitlines()  # for whoever looks into it
    assert len([Trajectory.from_dict(json.loads(line)) for line in lines]) == TINY.batch_size


def test_a_reward_beyond_fp32_ends_its_episode_only(tmp_path):
    class Generous(MultiHopEnv):
        def reset(self, seed: int, task=None) -> str:
            self.place = place(TINY, seed)
            return super().reset(seed)

        def step(self, action):
            step = super().step(action)
            return step._replace(reward=1e39) if self.place == (0, 1) else step

    run(TINY, tmp_path, make_environment=lambda: Generous((1, 2)), progress=quiet())
    assert records(tmp_path)[0]["errors"] == {"ValueError": 1}


def test_seeds_make_independent_runs(tmp_path, monkeypatch):
    played: dict[int, list] = {}
    rollout = train.rollout

    def watching(*arguments, **settings):
        for trajectory in rollout(*arguments, **settings):
            played[seed].append(trajectory)
            yield trajectory

    monkeypatch.setattr(train, "rollout", watching)
    weights = {}
    for seed in (0, 1):
        played[seed] = []
        config = replace(TINY, seed=seed, max_updates=1, batch_size=16, warmstart=WarmStartConfig(steps=1))
        model = run(config, tmp_path / str(seed), progress=quiet()).model
        weights[seed] = torch.cat([p.detach().flatten() for p in model.parameters() if p.dim() > 1])
    tokens = [{tuple(t.tokens.tolist()) for t in played[seed]} for seed in (0, 1)]
    assert not tokens[0] & tokens[1]
    correlation = torch.corrcoef(torch.stack([weights[0], weights[1]]))[0, 1]
    assert abs(float(correlation)) < 0.1
    first = [record["loss"] for run in "01" for record in records(tmp_path / run, "warmstart")]
    assert first[0] != first[1]


def test_the_first_line_says_where_it_runs(tmp_path):
    said = []
    run(replace(TINY, max_updates=0), tmp_path, progress=Progress(log=said.append))
    assert said[0].startswith(f"device {'cuda' if torch.cuda.is_available() else 'cpu'}")
    with pytest.raises(InputError, match="device: expected one of auto, cpu"):
        run(replace(TINY, device="tpu"), tmp_path / "other", progress=quiet())
    assert not (tmp_path / "other").exists()


def test_dropout_is_off_and_said_once(tmp_path, make_model, tokenizer):
    from transformers import PhiConfig, PhiForCausalLM

    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    shape["max_position_embeddings"] = 8192
    phi = PhiForCausalLM(PhiConfig(vocab_size=len(tokenizer), resid_pdrop=0.1, embd_pdrop=0.1, **shape))
    with torch.no_grad():
        phi.lm_head.weight.mul_(5)
        phi.lm_head.bias.normal_()
    init = checkpoint.save(tmp_path / "init", phi, tokenizer)
    said = []
    one_step = replace(
        TINY, max_updates=1, algorithm=replace(TINY.algorithm, mini_batch_size=TINY.batch_size)
    )
    one_step = replace(one_step, init=str(init), model=ModelConfig())
    run(one_step, tmp_path / "run", progress=Progress(log=said.append))
    assert sum("dropout is off" in line for line in said) == 1
    (record,) = records(tmp_path / "run")
    assert record["dlogp_max"] < 5e-5 and record["ratio_max"] < 1.0001


def test_bf16_is_trained_through_fp32_masters(tmp_path):
    config = replace(TINY, model=replace(TINY.model, dtype="bfloat16"), max_updates=2)
    config = replace(config, warmstart=WarmStartConfig(steps=2, batch_tokens=256))
    run(config, tmp_path, progress=quiet())
    saved = checkpoint.load(tmp_path)
    assert saved.model.dtype == torch.bfloat16
    saved_tensors = saved.trainer.tensors().items()
    masters = [value for name, value in saved_tensors if re.fullmatch(r"actor\..*\.master", name)]
    assert masters and all(master.dtype == torch.float32 for master in masters)
    resumed = replace(config, max_updates=3)
    run(resumed, tmp_path, resume=True, progress=quiet())
    run(resumed, tmp_path / "unbroken", progress=quiet())
    one, other = (checkpoint.load(tmp_path / name).model.state_dict() for name in ("last", "unbroken"))
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"algorithm": {"clip_low": -1.0}}, "clip_low: expected a finite number > 0 and <= 1, got -1.0"),
        ({"algorithm": {"value_clip": -1.0}}, "value_clip: expected a finite number > 0"),
        ({"algorithm": {"max_grad_norm": 0.0}}, "max_grad_norm: expected a finite number > 0"),
        ({"algorithm": {"epochs": 1.5}}, "epochs: expected an integer >= 1, got 1.5"),
        ({"algorithm": {"gamma": float("nan")}}, "gamma: expected a finite number"),
        ({"algorithm": {"lam": 2.0}}, "lam: expected a finite number >= 0 and <= 1, got 2.0"),
        ({"algorithm": {"entropy_coef": float("nan")}}, "entropy_coef: expected a finite number"),
        ({"algorithm": {"critic_only_updates": -1}}, "critic_only_updates: expected an integer >= 0"),
        ({"algorithm": {"mini_batch_size": True}}, "mini_batch_size: expected an integer >= 1, got True"),
        ({"algorithm": {"rollout_is_cap": 0.0}}, "rollout_is_cap: expected a finite number > 0"),
        ({"algorithm": {"kl_placement": "both"}}, "kl_placement: expected one of reward, loss, got 'both'"),
        ({"warmstart": {"batch_tokens": 0}}, "batch_tokens: expected an integer >= 1, got 0"),
        ({"warmstart": {"warmup_steps": -1}}, "warmup_steps: expected an integer >= 0"),
        ({"warmstart": {"weight_decay": -1.0}}, "weight_decay: expected a finite number >= 0"),
        ({"rollout": {"regime": "x"}}, "regime: expected one of carry, reencode, paper, got 'x'"),
        ({"rollout": {"greedy": True}}, "greedy: expected False in training"),
        ({"rollout": {"greedy": 1}}, "greedy: expected True or False, got 1"),
        ({"rollout": {"temperature": float("inf")}}, "temperature: expected a finite number >= 0.0001"),
        ({"rollout": {"max_turns": 2.5}}, "max_turns: expected an integer >= 1, got 2.5"),
        (
            {"model": {"dtype": "float8"}},
            "dtype: expected one of auto, float32, bfloat16, float16, got 'float8'",
        ),
        ({"model": {"initializer_range": 0.0}}, "initializer_range: expected a finite number > 0"),
        ({"algorithm": {"gamma": 10**400}}, "gamma: expected a finite number >= 0 and <= 1, got 1000"),
        ({"algorithm": {"critic_lr": 1e38}}, "critic_lr: expected a finite number > 0 and <= 1, got 1e+38"),
        (
            {"model": {"hidden_size": 6, "num_attention_heads": 2, "num_key_value_heads": 2}},
            "hidden_size: expected a multiple of 2 * num_attention_heads=2, got 6",
        ),
        ({"threads": 10**10}, "threads: expected an integer from 1 to 4096"),
        ({"seed": -1}, "seed: expected an integer from 0 to"),
        ({"keep": 0}, "keep: expected an integer >= 1, got 0"),
        ({"max_failed": 1.5}, "max_failed: expected a finite number >= 0 and <= 1, got 1.5"),
        ({"environment": (2, 1)}, "environment: expected a dict of arguments, got (2, 1)"),
    ],
)
def test_every_setting_is_checked_when_it_is_made(change, message):
    with pytest.raises(InputError) as error:
        settings = {
            name: replace(getattr(TINY, name), **value) if isinstance(value, dict) else value
            for name, value in change.items()
        }
        replace(TINY, **settings)
    assert message in str(error.value)


@pytest.mark.parametrize("value", [{1}, float("nan"), Path("x"), len])
def test_an_environment_can_be_kept_on_record(value):
    with pytest.raises(InputError, match="environment: expected arguments that JSON has, got {'a': "):
        replace(TINY, environment={"a": value})


def test_every_step_is_tracked_and_has_the_figures_of_a_lab(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    lessons = WarmStartConfig(steps=2, batch_tokens=256)
    run(replace(TINY, trackers=("tensorboard",), warmstart=lessons), tmp_path, progress=quiet())
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    for phase in ("warmstart", "policy"):
        steps = [record["step"] for record in records(tmp_path, phase)]
        assert steps and [event.step for event in events.Scalars(f"{phase}/step")] == steps
    for record in records(tmp_path):
        turns = record["dlogp_turns"]
        assert 0.0 <= min(turns) <= record["dlogp_mean"] <= max(turns) <= record["dlogp_max"] < 5e-5
        assert record["rollout_tokens_per_second"] > 0 and record["update_tokens_per_second"] > 0
        assert 0.0 <= record["invalid_actions"] <= record["turns"]
    last = records(tmp_path)[-1]
    assert 0.0 < last["ratio_min"] <= 1.0 <= last["ratio_max"]


def test_layouts_in_memory_change_nothing_and_are_checked(tmp_path):
    run(TINY, tmp_path / "plain", progress=quiet())
    recomputed = ScaleConfig(activation_checkpointing=True)
    run(replace(TINY, scale=recomputed), tmp_path / "recomputed", progress=quiet())
    for one, other in zip(records(tmp_path / "plain"), records(tmp_path / "recomputed"), strict=True):
        assert {n: v for n, v in one.items() if "second" not in n} == {
            n: v for n, v in other.items() if "second" not in n
        }
    for scale, message in (
        (ScaleConfig(replicas=2), "replicas: expected a divisor of the 1 processes, got 2"),
        (
            ScaleConfig(cpu_offload=True),
            "cpu_offload: expected several processes with a GPU each, got '1 process'",
        ),
    ):
        with pytest.raises(InputError, match=message):
            run(replace(TINY, scale=scale), tmp_path / "refused", overwrite=True, progress=quiet())


@pytest.mark.parametrize("later", [False, True])
def test_a_judge_pays_beside_the_environment(tmp_path, later):
    asked = []

    def judge(trajectories):
        asked.append(len(trajectories))
        return [0.5 * (n % 2) for n in range(len(trajectories))]

    async def later_judge(trajectories):
        return judge(trajectories)

    run(TINY, tmp_path / "plain", progress=quiet())
    run(TINY, tmp_path / "judged", judge=later_judge if later else judge, progress=quiet())
    assert asked == [TINY.batch_size] * TINY.max_updates
    for one, other in zip(records(tmp_path / "plain"), records(tmp_path / "judged"), strict=True):
        assert other["judge_reward"] == 0.25 and "judge_reward" not in one
    first, judged = (records(tmp_path / name)[0]["reward"] for name in ("plain", "judged"))
    assert judged == pytest.approx(first + 0.25)
    for wrong in (lambda t: [1.0], lambda t: [float("nan")] * len(t)):
        with pytest.raises(ValueError, match="judge: expected a finite number for each of 4 episodes, got"):
            run(TINY, tmp_path / "wrong", judge=wrong, overwrite=True, progress=quiet())
