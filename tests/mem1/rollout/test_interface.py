"""What the loop does with an environment: tasks, rewards at any step, coroutines, what is left open."""

from __future__ import annotations

import asyncio
import json
import threading
import time
import warnings
from dataclasses import replace

import pytest
import torch

from mem1.checks import InputError
from mem1.config import AlgorithmConfig, RolloutConfig
from mem1.envs.base import Action, ExpertAction, Step
from mem1.envs.toy.multihop import MultiHopEnv
from mem1.models.build import build_critic
from mem1.rollout.rollout_loop import play_expert, rollout
from mem1.train.batches import pack
from mem1.train.learner import Learner
from mem1.trajectory import TokenReward, Trajectory

CONFIG = RolloutConfig(num_slots=4, max_action_tokens=12, max_turns=6, env_timeout=20.0, env_retries=0)


class Paying:
    """Pays `rewards` in turn; over with the last, terminated or truncated."""

    run_inline = True

    def __init__(self, rewards=(0.5, 0.0, -0.25), truncated=False) -> None:
        self.rewards, self.truncated, self.turn = rewards, truncated, 0

    def reset(self, seed: int, task=None) -> str:
        self.task = task
        return "ada boss ?"

    def step(self, action: Action) -> Step:
        self.turn += 1
        over = self.turn == len(self.rewards)
        info = {"turns so far": self.turn, "said": action.kind, "invalid_action": self.turn == 1}
        how = (False, over) if self.truncated else (over, False)
        return Step("found anna " * self.turn, self.rewards[self.turn - 1], *how, info)

    def expert_action(self) -> ExpertAction:
        return ExpertAction("ada", Action("query", "ada boss"))


def test_each_reward_counts_for_the_last_token_written_before_it(tokenizer):
    (played,) = play_expert(tokenizer, Paying, [3], CONFIG)
    ends, at = [], 0
    for kind, _, length in played.segments:
        at += length
        ends += [at - 1] if kind == "query" else []
    assert played.rewards == [(ends[0], 0.5), (ends[2], -0.25)] and played.reward == 0.25
    rewards = played.policy_rewards()
    written = played.policy_mask.nonzero()[:, 0].tolist()
    assert rewards.dtype == torch.float32 and len(rewards) == len(written)
    assert {written[i]: float(r) for i, r in enumerate(rewards) if r} == {ends[0]: 0.5, ends[2]: -0.25}
    assert played.finish_reason == "environment"
    assert played.score == {"turns so far": 3.0} and played.notes == {"said": "query"}
    assert played.invalid_actions == len(played.invalid_turns) == 1 and played.turns == 3
    again = Trajectory.from_dict(json.loads(played.to_json()))
    assert again.rewards == played.rewards and again.to_json() == played.to_json()


def test_a_reward_behind_environment_text_counts_for_the_policy_token_before(tokenizer):
    (played,) = play_expert(tokenizer, Paying, [3], CONFIG)
    last_info = max(i for i, s in enumerate(played.segments) if s.kind == "info")
    end = sum(s.length for s in played.segments[: last_info + 1]) - 1
    later = replace(played, rewards=[TokenReward(end, 2.0), TokenReward(end - 1, 1.0)])
    rewards, written = later.policy_rewards(), played.policy_mask.nonzero()[:, 0]
    before = int((written < end).sum()) - 1
    assert float(rewards[before]) == 3.0 and float(rewards.sum()) == 3.0
    with pytest.raises(
        ValueError, match="rewards: expected none before the policy's first token, got token 0"
    ):
        replace(played, rewards=[TokenReward(0, 1.0)]).policy_rewards()
    n = played.tokens.numel()
    with pytest.raises(ValueError, match=f"rewards: expected tokens from 0 to {n - 1}, got {n}"):
        replace(played, rewards=[TokenReward(n, 1.0)])


def test_an_environment_that_stops_early_is_truncated(tokenizer):
    (played,) = play_expert(tokenizer, lambda: Paying(truncated=True), [3], CONFIG)
    assert played.finish_reason == "truncated" and played.reward == 0.25 and played.error_kind == ""


def test_a_plain_tuple_is_a_step(tokenizer):
    class Plain(Paying):
        def step(self, action):
            return tuple(super().step(action))

    (plain,) = play_expert(tokenizer, Plain, [3], CONFIG)
    (named,) = play_expert(tokenizer, Paying, [3], CONFIG)
    assert plain.to_dict() | {"seconds": 0} == named.to_dict() | {"seconds": 0}


@pytest.mark.parametrize("bootstrap", [False, True])
def test_ppo_learns_from_rewards_where_they_came(make_model, tokenizer, bootstrap):
    """With gamma = lam = 1 and no KL, the return of a token is the sum of the rewards from it on."""
    model = make_model()
    played = list(rollout(model, tokenizer, lambda: Paying(truncated=True), range(3), CONFIG, expert=True))
    config = AlgorithmConfig(kl_coef=0.0, bootstrap_turn_limit=bootstrap)
    critic = build_critic(model)
    with torch.no_grad():
        critic.head.weight.normal_(std=0.1)
    learner = Learner(model, critic, None, config, "carry")
    batch, _ = learner.prepare(played)
    for experience in batch:
        rewards = experience.trajectory.policy_rewards()
        expected = rewards.flip(0).cumsum(0).flip(0)
        stream = pack([experience.trajectory], "carry", torch.device("cpu"))
        extra = critic(**stream.inputs())[0, -1].item() if bootstrap else 0.0
        torch.testing.assert_close(experience.returns, expected + extra, atol=1e-5, rtol=0)


class Told(MultiHopEnv):
    """Answers as coroutines; says which task it was given."""

    run_inline = False

    async def reset(self, seed: int, task=None) -> str:
        await asyncio.sleep(0.01)
        self.task = task
        return MultiHopEnv.reset(self, seed)

    async def step(self, action: Action) -> Step:
        await asyncio.sleep(0.01)
        step = MultiHopEnv.step(self, action)
        return step._replace(info={**step.info, "loop": threading.current_thread().name, "task": self.task})


TASKS = [{"id": f"row {i}", "payload": i} for i in range(4)]


def test_coroutines_run_on_one_loop_and_play_the_same_episodes(make_model, tokenizer):
    config = replace(CONFIG, max_action_tokens=64, max_turns=9)
    model = make_model()
    told = rollout(model, tokenizer, lambda: Told(2), range(4), config, tasks=TASKS, expert=True)
    played = {t.seed: t for t in told}
    plain = {
        t.seed: t for t in rollout(model, tokenizer, lambda: MultiHopEnv(2), range(4), config, expert=True)
    }
    for seed, trajectory in played.items():
        assert torch.equal(trajectory.tokens, plain[seed].tokens) and trajectory.reward == 1.0
        assert trajectory.notes == {"loop": "mem1 event loop", "task": TASKS[seed]}
        assert trajectory.task == f"row {seed}" and plain[seed].task == ""


class Row:
    id = 7


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        (TASKS[:3], "tasks: expected one for each of 4 seeds, got 3"),
        ([*TASKS[:3], {"name": "x"}], "task: expected a row with an id, a text or a number"),
        ([*TASKS[:3], None], "task: expected a row with an id"),
        ([*TASKS[:3], {"id": ""}], "task: expected a row with an id"),
    ],
)
def test_tasks_that_do_not_fit_are_refused_before_anything_runs(make_model, tokenizer, tasks, message):
    with pytest.raises(InputError, match=message):
        rollout(make_model(), tokenizer, lambda: Told(2), range(4), CONFIG, tasks=tasks)
    (played,) = rollout(make_model(), tokenizer, lambda: MultiHopEnv(1), [0], CONFIG, tasks=[Row()])
    assert played.task == "7"


def test_a_task_comes_back_with_the_next_attempt(make_model, tokenizer):
    seen: list[tuple[int, object]] = []

    class Breaks(Told):
        async def step(self, action):
            seen.append((self.seed, self.task["id"]))
            if sum(seed == self.seed for seed, _ in seen) == 1:
                raise ConnectionError("down")
            return await super().step(action)

        async def reset(self, seed, task=None):
            self.seed = seed
            return await super().reset(seed, task)

    played = list(rollout(make_model(), tokenizer, lambda: Breaks(1), range(4), CONFIG, tasks=TASKS))
    assert {t.task for t in played} == {task["id"] for task in TASKS}
    assert all(len(t.failures) == 1 and t.error_kind == "" for t in played)
    assert {name for seed, name in seen if seed == 2} == {"row 2"}


def test_a_coroutine_that_hangs_is_cancelled(make_model, tokenizer):
    cancelled = threading.Event()

    class Hangs(Told):
        async def step(self, action):
            try:
                await asyncio.sleep(3600)
            except asyncio.CancelledError:
                cancelled.set()
                raise

    config = replace(CONFIG, env_timeout=0.5, episode_retries=0)
    began = time.monotonic()
    (played,) = rollout(make_model(), tokenizer, lambda: Hangs(1), [0], config)
    assert played.error_kind == "TimeoutError" and time.monotonic() - began < 15
    assert cancelled.wait(10), "it holds nothing any more"


class Closing(MultiHopEnv):
    closed: list[int] = []

    def reset(self, seed: int, task=None) -> str:
        self.seed = seed
        if seed == 1:
            raise KeyError("x")
        return super().reset(seed)

    def close(self) -> None:
        self.closed.append(self.seed)


class ClosingLater(Closing):
    async def close(self) -> None:
        await asyncio.sleep(0.05)
        self.closed.append(self.seed)


@pytest.mark.parametrize("world", [Closing, ClosingLater])
@pytest.mark.parametrize("given_up", [False, True])
def test_every_environment_is_closed_once(make_model, tokenizer, monkeypatch, world, given_up):
    monkeypatch.setattr(Closing, "closed", [])
    config = replace(CONFIG, episode_retries=1)
    played = rollout(make_model(), tokenizer, lambda: world(1), range(3), config)
    if given_up:
        next(played)
        played.close()
        # Those that were open, once each; which had failed once by then depends on timing.
        assert {0, 2} <= {*Closing.closed} and all(Closing.closed.count(seed) == 1 for seed in (0, 2))
    else:
        assert len(list(played)) == 3
        assert sorted(Closing.closed) == [0, 1, 1, 2], "the failed attempts, too"


def test_a_close_that_fails_is_a_warning(make_model, tokenizer):
    class Stuck(MultiHopEnv):
        def close(self):
            raise OSError("in use")

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        (played,) = rollout(make_model(), tokenizer, lambda: Stuck(1), [0], CONFIG)
    assert played.error_kind == ""
    name = Stuck.__qualname__
    assert [f"close of {name}: OSError: in use"] == [
        str(w.message) for w in caught if w.category is RuntimeWarning
    ]


def test_what_went_through_the_model_is_counted(make_model, tokenizer):
    """Carried, each token is read once; encoded again, what stays after a prune is read again."""
    model, counts = make_model(), {}
    for regime in ("carry", "reencode"):
        config = replace(CONFIG, regime=regime, max_action_tokens=64, max_turns=9)
        (t,) = rollout(model, tokenizer, lambda: MultiHopEnv(2), [5], config, expert=True)
        counts[regime] = t.model_tokens
        (scripted,) = play_expert(tokenizer, lambda: MultiHopEnv(2), [5], config)
        last = t.segments[-1].length + t.segments[-2].length
        assert t.tokens.numel() - last <= scripted.model_tokens or regime == "reencode"
        assert abs(scripted.model_tokens - t.model_tokens) <= last
        if regime == "carry":
            assert t.tokens.numel() - last <= t.model_tokens <= t.tokens.numel()
    assert counts["reencode"] > 1.2 * counts["carry"]
