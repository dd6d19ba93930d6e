from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mem1.checks import InputError
from mem1.envs.adapters.gymnasium_env import GymnasiumEnv
from mem1.envs.base import Action, Step

gymnasium = pytest.importorskip("gymnasium")
spaces = gymnasium.spaces
WORDS = {"left": 0, "down": 1, "right": 2, "up": 3}


class Echo(gymnasium.Env):  # type: ignore[misc, name-defined]
    """Says every text again; "end" ends it, "cut" cuts it off."""

    action_space = spaces.Text(8, charset="abcdentu ")
    observation_space = spaces.Text(100)

    def __init__(self) -> None:
        self.steps: list[str] = []
        self.closed = 0

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[str, dict[str, Any]]:
        super().reset(seed=seed)
        self.steps = []
        return f"begin {self.np_random.integers(1000)} {options}", {}

    def step(self, action: str) -> tuple[str, Any, bool, bool, dict[str, Any]]:
        self.steps.append(action)
        return f"said {action}", len(self.steps) / 2, action == "end", action == "cut", {"taken": action}

    def close(self) -> None:
        self.closed += 1


def begun(**settings: Any) -> tuple[GymnasiumEnv, Echo]:
    """An adapter whose episode has begun, and the environment in it."""
    echo = Echo()
    environment = GymnasiumEnv(lambda: echo, **settings)
    environment.reset(0)
    return environment, echo


def frozen_lake(**settings: Any) -> GymnasiumEnv:
    def make() -> Any:
        return gymnasium.make("FrozenLake-v1", map_name="4x4", is_slippery=False)

    return GymnasiumEnv(make, WORDS, lambda place, info: f"row {place // 4} column {place % 4}", **settings)


def test_texts_are_passed_on_and_the_five_values_come_back() -> None:
    environment, echo = begun()
    assert environment.step(Action("query", "ab")) == Step("said ab", 0.5, info={"taken": "ab"})
    assert environment.step(Action("answer", "end")) == Step("said end", 1.0, True, info={"taken": "end"})
    assert echo.steps == ["ab", "end"]
    with pytest.raises(RuntimeError, match="reset"):
        environment.step(Action("query", "ab"))
    environment.reset(1)
    taken = environment.step(Action("query", "cut"))
    assert (taken.terminated, taken.truncated) == (False, True)
    with pytest.raises(RuntimeError, match="reset"):
        environment.step(Action("query", "ab"))


def test_seed_and_task_reach_the_reset() -> None:
    environment = GymnasiumEnv(Echo)
    texts = {environment.reset(seed, {"id": "a"}) for seed in range(5)}
    assert len(texts) == 5 and all(text.endswith(" {'id': 'a'}") for text in texts)
    assert environment.reset(3) == GymnasiumEnv(Echo).reset(3)
    assert environment.reset(3).endswith(" None")


def test_an_environment_is_made_at_the_first_reset_and_closed_once() -> None:
    made: list[Echo] = []

    def make() -> Echo:
        made.append(Echo())
        return made[-1]

    environment = GymnasiumEnv(make)
    environment.close()
    assert made == []
    environment.reset(0)
    environment.reset(1)
    environment.close()
    environment.close()
    assert [echo.closed for echo in made] == [1]
    with pytest.raises(RuntimeError, match="reset"):
        environment.step(Action("query", "ab"))
    environment.reset(2)
    assert [echo.closed for echo in made] == [1, 0]


@pytest.mark.parametrize(
    ("kind", "text"), [("query", "xyz"), ("query", ""), ("answer", "a" * 9), ("malformed", "ab")]
)
def test_what_is_not_in_the_action_space_is_told_what_is(kind: str, text: str) -> None:
    environment, echo = begun()
    taken = environment.step(Action(kind, text))
    allowed = "invalid action: expected 1 to 8 characters of:  abcdentu"
    assert taken == Step(allowed, info={"invalid_action": True})
    assert echo.steps == []


def test_a_long_alphabet_is_cut() -> None:
    environment, echo = begun()
    echo.action_space = spaces.Text(3, charset="".join(map(chr, range(1000, 2000))))
    environment.reset(0)
    observation = environment.step(Action("query", "a")).observation
    assert len(observation) < 300 and observation.endswith("...")


def test_words_stand_for_the_actions_of_a_discrete_space() -> None:
    environment = frozen_lake()
    assert environment.reset(0) == "row 0 column 0"
    path = ["down", " Down ", "RIGHT", "right", "down", "right"]
    steps = [environment.step(Action("query", word)) for word in path]
    assert [taken.observation for taken in steps[:2]] == ["row 1 column 0", "row 2 column 0"]
    assert steps[-1].observation == "row 3 column 3"
    assert [taken.reward for taken in steps] == [0.0] * 5 + [1.0]
    assert steps[-1].terminated and not steps[-1].truncated
    assert steps[-1].info["prob"] == 1.0
    environment.reset(0)
    taken = environment.step(Action("query", "north"))
    assert taken == Step(
        "invalid action: expected one of: left, down, right, up", info={"invalid_action": True}
    )
    environment.close()


def test_a_time_limit_truncates() -> None:
    environment = frozen_lake()
    environment.reset(0)
    for _ in range(99):
        assert not environment.step(Action("query", "left")).truncated
    assert environment.step(Action("query", "left")).truncated
    environment.close()


def test_actions_may_come_from_a_function() -> None:
    def shout(action: Action) -> str:
        if action.text == "no":
            raise ValueError("say something else")
        return action.text[:3]

    environment, echo = begun(to_action=shout)
    environment.step(Action("query", "abcde"))
    assert echo.steps == ["abc"]
    taken = environment.step(Action("query", "no"))
    assert taken == Step("invalid action: say something else", info={"invalid_action": True})
    taken = environment.step(Action("query", "xyz"))
    assert taken.observation.startswith("invalid action: expected an action in Text(1, 8")
    assert echo.steps == ["abc"]


def test_a_reset_may_be_tried_again_and_a_step_not() -> None:
    environment = GymnasiumEnv(Echo)
    assert environment.retryable == (OSError,)
    environment.reset(0)
    assert environment.retryable == ()
    environment.step(Action("query", "end"))
    assert environment.retryable == (OSError,)


class Other(gymnasium.Env):  # type: ignore[misc, name-defined]
    action_space = spaces.Discrete(2)
    observation_space = spaces.Discrete(2)


@pytest.mark.parametrize(
    ("make", "settings", "message"),
    [
        (Other, {}, "observation_space: expected Text, or to_text"),
        (Other, {"to_text": str}, "action_space: expected Text, or to_action"),
        (Other, {"to_text": str, "to_action": {"a": 2}}, "to_action: 'a': expected an action in Discrete"),
        (object, {}, "make: expected an environment of gymnasium"),
    ],
)
def test_a_space_that_does_not_fit_is_named(make: Any, settings: dict[str, Any], message: str) -> None:
    environment = GymnasiumEnv(make, **settings)
    for _ in range(2):
        with pytest.raises(InputError, match=message):
            environment.reset(0)


@pytest.mark.parametrize("words", [{}, {"a": 0, " A ": 1}, {" ": 0}])
def test_words_that_cannot_be_told_apart_are_named(words: dict[str, int]) -> None:
    with pytest.raises(InputError, match="to_action: expected words, got"):
        GymnasiumEnv(Other, to_action={0: 0})  # type: ignore[dict-item]
    with pytest.raises(InputError, match="to_action: expected words"):
        GymnasiumEnv(Other, words)


def test_an_observation_that_is_no_text_is_named() -> None:
    with pytest.raises(InputError, match="to_text: expected a text, got <class 'int'>"):
        begun(to_text=lambda observation, info: 3)


def test_observations_are_texts_that_tokenizers_take() -> None:
    environment, _ = begun(to_text=lambda observation, info: f"{observation[:3]}\ud800\x00</info>")
    taken = environment.step(Action("query", "a"))
    assert taken.observation == "sai?\x00</info>"
    assert type(begun()[0].step(Action("query", "a")).reward) is float


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(["query", "answer", "malformed", "memory"]), st.text())
def test_whatever_the_policy_writes_is_answered(kind: str, text: str) -> None:
    for environment in (begun()[0], begun(to_action={"go on": "a"})[0]):
        taken = environment.step(Action(kind, text))
        assert math.isfinite(taken.reward)
        assert taken.info.get("invalid_action", False) == taken.observation.startswith("invalid action")
