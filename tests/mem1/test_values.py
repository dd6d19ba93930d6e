"""Values of environments: what is as good as the type that is asked for is taken, and JSON takes it."""

from __future__ import annotations

import enum
import json
from fractions import Fraction
from math import inf

import numpy as np
import pytest
import torch

from mem1.config import RolloutConfig
from mem1.envs.base import Action, ExpertAction, Step
from mem1.envs.toy.multihop import MultiHopEnv
from mem1.parsing.codec import Codec
from mem1.rollout.call_pool import try_call
from mem1.rollout.episode import Episode
from mem1.rollout.rollout_loop import rollout
from mem1.trajectory import Trajectory

CONFIG = RolloutConfig(max_action_tokens=8, max_turns=2, env_retries=0)
INFO = {"exact_match": 1, "f1": 1.0}


class Word(str):
    def __str__(self) -> str:
        return "another"


class Verdict(str, enum.Enum):
    GOOD = "anna"


class World:
    """Says what it is told to; ends with its second step."""

    objectives: object = 2

    def __init__(self, prompt: object = "ada boss ?", text: object = "anna", **other):
        self.prompt, self.text, self.steps = prompt, text, 0
        self.reward, self.info = other.get("reward", 0.5), other.get("info", INFO)
        self.done, self.objectives = other.get("done", (False, True)), other.get("objectives", 2)

    def reset(self, seed: int, task=None) -> object:
        return self.prompt

    def step(self, action) -> Step:
        self.steps += 1
        done = self.done[self.steps - 1]
        return Step(self.text, self.reward if self.steps == 2 else 0.0, done, info=self.info)


def play(tokenizer, **values) -> Trajectory:
    """An episode whose actions are four words."""
    episode = Episode(World(**values), 0, Codec(tokenizer), CONFIG)
    word = tokenizer.encode("emil", add_special_tokens=False)[0]
    while not episode.finish_reason:
        call = episode.take_call()
        if call is not None:
            episode.receive(try_call(call, inf))
        else:
            episode.write(word, -1.0)
    trajectory = episode.trajectory()
    again = Trajectory.from_dict(json.loads(trajectory.to_json()))
    assert again.to_json() == trajectory.to_json() and again.notes == trajectory.notes
    return trajectory


WRONG = [
    ("reset", 3, "TypeError: reset: expected str, got int 3"),
    ("reset", None, "TypeError: reset: expected str, got NoneType None"),
    ("reset", " ", "ValueError: reset: expected a prompt of at least one token and at most max_prompt"),
    ("step", None, "TypeError: step: expected a Step, or another tuple of five, got NoneType None"),
    ("step", ("anna", 0.0, False), "TypeError: step: expected a Step, or another tuple of five, got tuple"),
    ("step", Step(None), "TypeError: step: observation: expected str, got NoneType None"),
    ("step", Step("anna", 0.0, "no"), "TypeError: step: terminated: expected bool, got str 'no'"),
    ("step", Step("anna", truncated=None), "TypeError: step: truncated: expected bool, got NoneType None"),
    ("step", Step("anna", "1"), "ValueError: step: reward: expected a number with which the square of all"),
    ("step", Step("anna", info=None), "TypeError: step: info: expected Mapping, got NoneType None"),
    ("step", Step("anna", info={"f1": 1e39}), "ValueError: step: info: expected numbers that are finite"),
    ("expert_action", None, "TypeError: expert_action: expected ExpertAction, got NoneType None"),
    (
        "expert_action",
        ExpertAction("ada", Action("malformed", "")),
        "ValueError: expert_action: expected one of query, answer, got 'malformed'",
    ),
]


@pytest.mark.parametrize(("method", "value", "message"), WRONG)
def test_a_wrong_value_ends_its_own_episode_only(make_model, tokenizer, method, value, message):
    worlds = [MultiHopEnv(2), MultiHopEnv(2), MultiHopEnv(2)]
    sound = getattr(worlds[1], method)
    setattr(worlds[1], method, lambda *arguments: (sound(*arguments), value)[1])
    make = iter(worlds).__next__
    config = RolloutConfig(max_action_tokens=24, max_turns=6, episode_retries=0)
    played = {t.seed: t for t in rollout(make_model(), tokenizer, make, range(3), config, expert=True)}
    assert played[1].error.startswith(message)
    assert played[1].score == {} and played[1].reward == 0.0
    assert played[1].to_json()
    assert played[0].reward == played[2].reward == 1.0


@pytest.mark.parametrize(
    "done",
    [
        (np.False_, np.True_),
        (0, 1),
        (np.int64(0), np.int64(1)),
        (torch.tensor(False), torch.tensor(True)),
        (np.array(0), np.array(1)),
    ],
)
def test_flags(tokenizer, done):
    assert play(tokenizer, done=done).finish_reason == "environment"


@pytest.mark.parametrize("done", [2, -1, None, "no", 1.0, np.array([True]), []])
def test_no_flags(tokenizer, done):
    error = play(tokenizer, done=(done, True)).error
    assert error.startswith("TypeError: step: terminated: expected bool, got ")


@pytest.mark.parametrize("objectives", [3, np.int64(3), np.array(3), torch.tensor(3)])
def test_counts(tokenizer, objectives):
    played = play(tokenizer, objectives=objectives)
    assert played.objectives == 3 and type(played.objectives) is int


@pytest.mark.parametrize(
    "objectives", [True, np.True_, 3.0, "3", None, torch.tensor(3.0), torch.tensor(True)]
)
def test_no_counts(tokenizer, objectives):
    played = play(tokenizer, objectives=objectives)
    assert played.error_kind == "TypeError" and played.tokens.numel() == 0


@pytest.mark.parametrize("text", [Word("anna"), np.str_("anna"), Verdict.GOOD])
def test_texts(tokenizer, text):
    expected, prompt, info = (
        play(tokenizer, **how) for how in ({"prompt": "anna"}, {"prompt": text}, {"text": text})
    )
    assert torch.equal(prompt.tokens, expected.tokens)
    assert torch.equal(info.tokens, play(tokenizer).tokens)


@pytest.mark.parametrize(
    ("reward", "expected"),
    [
        (True, 1.0),
        (np.True_, 1.0),
        (np.float32(0.25), 0.25),
        (np.float64(0.25), 0.25),
        (np.int8(1), 1.0),
        (np.array(0.25), 0.25),
        (torch.tensor(0.25, requires_grad=True), 0.25),
        (torch.tensor(0.25, dtype=torch.bfloat16), 0.25),
        (Fraction(1, 4), 0.25),
        (1e19, 1e19),  # its square is still a float32
        (10**19, 1e19),
    ],
)
def test_numbers(tokenizer, reward, expected):
    played = play(tokenizer, reward=reward, info=INFO | {"calls": np.int64(7), "share": reward})
    assert played.reward == expected and type(played.rewards[0].reward) is float
    assert played.score == {"exact_match": 1.0, "f1": 1.0, "calls": 7.0, "share": expected}
    assert {type(value) for value in played.score.values()} == {float}


@pytest.mark.parametrize(
    "number",
    [
        float("nan"),
        float("inf"),
        1e39,
        -1e39,
        10**400,
        np.float64(1e300),
        Fraction(10**400),
        np.float32("nan"),
    ],
)
@pytest.mark.parametrize("name", ["reward", "calls"])
def test_numbers_beyond_float32_end_their_episode(tokenizer, name, number):
    given = {"reward": number} if name == "reward" else {"info": INFO | {name: number}}
    played = play(tokenizer, **given)
    assert played.error.startswith("ValueError: step: ") and "finite in float32" in played.error
    assert played.score == {} and played.notes == {} and played.rewards == []


@pytest.mark.parametrize("reward", [None, "1", [1.0], 1j, torch.ones(2)])
def test_no_rewards(tokenizer, reward):
    assert play(tokenizer, reward=reward).error_kind == "ValueError"


def test_what_is_no_number_is_a_note(tokenizer):
    circle: list[object] = []
    circle.append(circle)
    given = {
        "judge": "good",
        "detail": None,
        "name": np.str_("anna"),
        "answers": ["anna", None, ("bruno", 2)],
        "by hop": {1: {"found": True}},
        "\ud800": "\ud800",
        "page": "x" * 1_000_000,
        "set": {3},
        "ends": [float("nan")],
        "circle": circle,
        5: "five",
    }
    played = play(tokenizer, info=INFO | given)
    assert played.finish_reason == "environment" and played.score == INFO
    assert played.notes == {
        "judge": "good",
        "detail": None,
        "name": "anna",
        "answers": ["anna", None, ["bruno", 2]],
        "by hop": {"1": {"found": True}},
        "?": "\ud800",
        "page": '"' + "x" * 19_999 + " ...",
        "set": "{3}",
        "ends": "[nan]",
        "circle": "[[[[[[[...]]]]]]]",
        "5": "five",
    }
    given["answers"].append("later")
    assert len(played.notes["answers"]) == 3
