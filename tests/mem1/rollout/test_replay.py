"""What an environment's errors and delays leave of an episode: it is played again, and it is the same."""

from __future__ import annotations

import gc
import random
import threading
import time
import weakref
from dataclasses import replace

import pytest
import torch

from mem1.agent import MemoryEfficientAgent
from mem1.config import RolloutConfig
from mem1.engine.engine import Engine
from mem1.envs.base import Action, Step
from mem1.envs.toy.multihop import MultiHopEnv
from mem1.rollout.episode import Episode
from mem1.rollout.rollout_loop import rollout
from mem1.trajectory import Failure, Trajectory

CONFIG = RolloutConfig(num_slots=3, max_action_tokens=16, max_turns=4, env_timeout=20.0, env_retries=0)


def play(model, tokenizer, make, seeds=range(6), config=CONFIG, **how) -> dict[int, Trajectory]:
    played = list(rollout(model, tokenizer, make, seeds, config, **how))
    assert sorted(t.seed for t in played) == sorted(seeds), "an episode is lost, or told of twice"
    return {t.seed: t for t in played}


def same(one: Trajectory, two: Trajectory) -> bool:
    return torch.equal(one.tokens, two.tokens) and torch.equal(one.logprobs, two.logprobs)


class Failing(MultiHopEnv):
    """Raises in the second turn of an odd seed's first attempts, in another place each time."""

    worlds: list[Failing] = []  # those that have been reset
    attempts = 2

    def reset(self, seed: int, task=None) -> str:
        self.worlds.append(self)
        self.attempt = sum(world.seed == seed for world in self.worlds if world is not self)
        self.seed, self.steps = seed, 0
        return super().reset(seed)

    def step(self, action: Action) -> Step:
        self.steps += 1
        if self.seed % 2 and self.attempt < self.attempts and self.steps == self.attempt + 1:
            raise (KeyError if self.attempt else TimeoutError)("down")
        return super().step(action)


@pytest.fixture
def failing(monkeypatch):
    monkeypatch.setattr(Failing, "worlds", [])
    return Failing


@pytest.mark.parametrize("expert", [False, True])
def test_an_episode_that_failed_is_played_again_and_is_the_same(make_model, tokenizer, failing, expert):
    model, config = make_model(), replace(CONFIG, max_action_tokens=64)
    played = play(model, tokenizer, lambda: failing(2), config=config, expert=expert)
    sound = play(model, tokenizer, lambda: MultiHopEnv(2), config=config, expert=expert)
    for seed, trajectory in played.items():
        # The batch is another one: its rounding is.
        assert torch.equal(trajectory.tokens, sound[seed].tokens)
        torch.testing.assert_close(trajectory.logprobs, sound[seed].logprobs, atol=5e-5, rtol=0)
        assert trajectory.error_kind == "" and trajectory.score == sound[seed].score
        if seed % 2 == 0:
            assert trajectory.failures == []
            continue
        assert [(f.error_kind, f.turns) for f in trajectory.failures] == [
            ("TimeoutError", 1),
            ("KeyError", 2),
        ]
        lengths = [segment.length for segment in trajectory.segments if segment.turn <= 1]
        first = sum(lengths[:-1])  # without the info that did not come
        assert trajectory.failures[0].tokens == first < trajectory.failures[1].tokens
    assert len(failing.worlds) == 12 == len({id(world) for world in failing.worlds})


def test_the_last_attempt_is_told_of_whatever_came_of_it(make_model, tokenizer, failing, monkeypatch):
    monkeypatch.setattr(failing, "attempts", 9)
    played = play(make_model(), tokenizer, lambda: failing(2), config=replace(CONFIG, episode_retries=1))
    for seed, trajectory in played.items():
        assert len(trajectory.failures) == seed % 2
        assert trajectory.error_kind == ("KeyError" if seed % 2 else "")
    again = Trajectory.from_dict(played[1].to_dict())
    assert again.failures == played[1].failures and isinstance(again.failures[0], Failure)


def test_a_world_that_cannot_be_made_is_made_again(make_model, tokenizer):
    refusals = iter([ConnectionRefusedError("no server"), None, ValueError("still none")])

    def make():
        refusal = next(refusals, None)
        if refusal:
            raise refusal
        return MultiHopEnv(2)

    played = play(make_model(), tokenizer, make)
    assert sorted(f.error_kind for t in played.values() for f in t.failures) == [
        "ConnectionRefusedError",
        "ValueError",
    ]
    assert not any(t.error_kind for t in played.values())


def test_a_policy_error_is_not_played_again(make_model, tokenizer, monkeypatch):
    logits = Engine.logits
    monkeypatch.setattr(Engine, "logits", lambda engine, hidden: logits(engine, hidden) * torch.nan)
    played = play(make_model(), tokenizer, lambda: MultiHopEnv(2))
    assert {t.error_kind for t in played.values()} == {"policy"}
    assert not any(t.failures for t in played.values())


def test_an_agent_plays_nothing_again(make_model, tokenizer, failing):
    world = failing(2)
    trajectory = MemoryEfficientAgent(make_model(), tokenizer, CONFIG).run(world, seed=1)
    assert trajectory.error_kind == "TimeoutError" and trajectory.failures == [] and failing.worlds == [world]


@pytest.mark.parametrize("regime", ["carry", "reencode"])
def test_the_composition_of_a_batch_follows_from_the_seeds_if_it_must(
    make_model, tokenizer, regime, monkeypatch
):
    class Sleepy(MultiHopEnv):
        run_inline = False

        def reset(self, seed: int, task=None) -> str:
            self.sleep()
            return super().reset(seed)

        def step(self, action: Action) -> Step:
            self.sleep()
            return super().step(action)

        def sleep(self) -> None:
            time.sleep(naps.random() * 0.01)

    batches: list[list[tuple[list[int], list[int]]]] = []
    feed = Engine.feed

    def watched(engine, rows, tokens, positions):
        batches[-1].append((rows, [len(t) for t in tokens]))
        return feed(engine, rows, tokens, positions)

    monkeypatch.setattr(Engine, "feed", watched)
    model, played = make_model(), []
    config = replace(CONFIG, num_slots=5, regime=regime, synchronous=True)
    for nap in (1, 2):
        naps = random.Random(nap)
        batches.append([])
        played.append(list(rollout(model, tokenizer, lambda: Sleepy((1, 3)), range(12), config)))
    assert batches[0] == batches[1]
    assert [t.seed for t in played[0]] == [t.seed for t in played[1]]
    assert all(same(one, two) for one, two in zip(*played, strict=True))


def test_a_call_that_hangs_does_not_keep_its_episode(make_model, tokenizer, monkeypatch):
    gate, episodes = threading.Event(), list[weakref.ref[Episode]]()

    class Hangs(MultiHopEnv):
        run_inline = False

        def step(self, action: Action) -> Step:
            gate.wait()
            return super().step(action)

    init = Episode.__init__
    monkeypatch.setattr(
        Episode,
        "__init__",
        lambda self, *a, **k: (episodes.append(weakref.ref(self)), init(self, *a, **k))[1],
    )
    config = replace(CONFIG, env_timeout=0.2, episode_retries=1)
    played = play(make_model(), tokenizer, lambda: Hangs(2), range(3), config)
    assert {t.error_kind for t in played.values()} == {"TimeoutError"}
    assert all(t.failures[0].error_kind == "TimeoutError" for t in played.values())
    gc.collect()
    assert len(episodes) == 6 and not any(episode() for episode in episodes)
    gate.set()


def test_what_is_worth_a_retry_is_the_environments_to_say(make_model, tokenizer, monkeypatch):
    class ReadTimeout(Exception):
        pass

    class Flaky(MultiHopEnv):
        retryable: object = (ReadTimeout,)

        def reset(self, seed: int, task=None) -> str:
            self.calls = 0
            return super().reset(seed)

        def step(self, action: Action) -> Step:
            self.calls += 1
            if self.calls == 1:
                raise ReadTimeout("slow")
            return super().step(action)

    monkeypatch.setattr("mem1.rollout.call_pool._FIRST_PAUSE_S", 0.0)
    config = replace(CONFIG, env_retries=1, episode_retries=0)
    model = make_model()
    played = play(model, tokenizer, lambda: Flaky(2), config=config)
    sound = play(model, tokenizer, lambda: MultiHopEnv(2), config=config)
    assert all(same(played[seed], sound[seed]) for seed in sound)
    del Flaky.retryable
    assert {t.error_kind for t in play(model, tokenizer, lambda: Flaky(2), config=config).values()} == {
        "ReadTimeout"
    }
    for nonsense in (None, ReadTimeout, ("OSError",), [OSError]):
        Flaky.retryable = nonsense
        (trajectory,) = play(model, tokenizer, lambda: Flaky(2), [0], config).values()
        expected = "TypeError: retryable: expected a tuple of exception types, got"
        assert trajectory.error.startswith(expected)
