from __future__ import annotations

import asyncio
import json
import threading
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mem1.checks import InputError
from mem1.envs.adapters.tool_env import MALFORMED, ToolEnvironment
from mem1.envs.base import Action, Step


def look_up(word: str) -> str:
    return {"ada": "boss carla"}[word]


async def look_up_later(word: str) -> str:
    await asyncio.sleep(0)
    return look_up(word)


def step(environment: ToolEnvironment, kind: str, text: str) -> Step:
    """What a step comes to, be it at once or as a coroutine."""
    taken = environment.step(Action(kind, text))
    return taken if isinstance(taken, Step) else asyncio.run(taken)  # type: ignore[arg-type]


def begun(*arguments: Any, **settings: Any) -> ToolEnvironment:
    environment = ToolEnvironment("who ?", *arguments, **settings)
    assert environment.reset(0) == "who ?"
    return environment


@pytest.mark.parametrize("tool", [look_up, look_up_later])
def test_queries_are_answered_and_the_answer_ends_the_episode(tool: Any) -> None:
    environment = begun([tool])
    assert step(environment, "query", "ada") == Step("boss carla", info={"tool_errors": []})
    assert environment.answer is None
    assert step(environment, "answer", "carla") == Step("", 0.0, True, info={"tool_errors": []})
    assert environment.answer == "carla"
    with pytest.raises(RuntimeError, match="reset"):
        environment.step(Action("query", "ada"))
    environment.reset(1)
    assert environment.answer is None


def test_a_step_before_the_first_reset_is_refused() -> None:
    with pytest.raises(RuntimeError, match="reset"):
        ToolEnvironment("who ?", [look_up]).step(Action("query", "ada"))


def test_the_prompt_may_follow_from_seed_and_task() -> None:
    environment = ToolEnvironment(lambda seed, task: f"{task['question']} ({seed})", [look_up])
    assert environment.reset(3, {"id": "1", "question": "who ?"}) == "who ? (3)"

    async def prompt(seed: int, task: Any) -> str:
        return f"{seed}"

    assert asyncio.run(ToolEnvironment(prompt, [look_up]).reset(4)) == "4"  # type: ignore[arg-type]


def test_malformed_actions_are_told_the_format_and_the_episode_goes_on() -> None:
    environment = begun([look_up])
    taken = step(environment, "malformed", "<query>")
    assert taken == Step(MALFORMED, info={"tool_errors": [], "invalid_action": True})
    assert step(environment, "query", "ada").observation == "boss carla"


def test_a_query_that_calls_nothing_is_invalid() -> None:
    taken = step(begun([look_up, look_up_later]), "query", "ada")
    assert taken.observation == 'error: expected {"name": ..., "arguments": {...}}, got \'ada\''
    assert taken.info == {"tool_errors": [], "invalid_action": True}


@pytest.mark.parametrize("tool", [look_up, look_up_later])
def test_errors_of_tools_are_told_and_recorded(tool: Any) -> None:
    environment = begun([tool])
    taken = step(environment, "query", "bruno")
    error = {"tool": tool.__name__, "type": "KeyError", "message": "'bruno'"}
    assert taken == Step(f"error: {tool.__name__}: KeyError: 'bruno'", info={"tool_errors": [error]})
    assert step(environment, "query", "x").info["tool_errors"] == [error, {**error, "message": "'x'"}]
    assert taken.info["tool_errors"] == [error]  # a step's info stays as it was
    assert step(environment, "query", "ada").observation == "boss carla"
    assert len(step(environment, "answer", "carla").info["tool_errors"]) == 2
    environment.reset(1)
    assert step(environment, "query", "ada").info == {"tool_errors": []}


def test_messages_are_recorded_up_to_a_length_and_told_in_full() -> None:
    def fail(text: str) -> str:
        raise ValueError("x" * 1000)

    taken = step(begun([fail]), "query", "")
    assert len(taken.info["tool_errors"][0]["message"]) == 200
    assert taken.observation == f"error: fail: ValueError: {'x' * 1000}"


@pytest.mark.parametrize("later", [False, True])
def test_errors_that_may_pass_are_raised_and_change_nothing(later: bool) -> None:
    failures = [ConnectionResetError("gone"), TimeoutError("late")]

    def tool(text: str) -> str:
        if failures:
            raise failures.pop()
        return text

    async def tool_later(text: str) -> str:
        return tool(text)

    environment = begun([tool_later if later else tool])
    assert environment.retryable == (ConnectionError, TimeoutError)
    for _ in range(2):
        with pytest.raises(environment.retryable):
            step(environment, "query", "a")
    assert step(environment, "query", "a") == Step("a", info={"tool_errors": []})


def test_which_errors_are_told_and_raised_can_be_chosen() -> None:
    def open_file(path: str) -> str:
        raise FileNotFoundError(path)

    assert step(begun([open_file]), "query", "a").observation == "error: open_file: FileNotFoundError: a"
    environment = begun([open_file], retryable=(OSError,))
    assert environment.retryable == (OSError,)
    with pytest.raises(FileNotFoundError):
        step(environment, "query", "a")
    with pytest.raises(FileNotFoundError):
        step(begun([open_file], told=(ValueError,), retryable=()), "query", "a")


def test_a_tool_that_is_no_coroutine_runs_on_the_thread_that_asks() -> None:
    asked: list[int] = []

    def where(text: str) -> str:
        asked.append(threading.get_ident())
        return text

    begun([where]).step(Action("query", "a"))
    assert asked == [threading.get_ident()]


@pytest.mark.parametrize(
    ("found", "shown"),
    [
        ("a", "a"),
        (["ä", 1, None], '["ä", 1, null]'),
        ({"a": 0.5}, '{"a": 0.5}'),
        (None, "null"),
        ({1, 2}, '"{1, 2}"'),
        ("a\ud800b", "a?b"),
        (["\ud800"], '["?"]'),
    ],
    ids=range(7),
)
def test_what_a_tool_gives_is_shown_as_text(found: object, shown: str) -> None:
    def tool(text: str) -> Any:
        return found

    assert step(begun([tool]), "query", "") == Step(shown, info={"tool_errors": []})


def test_what_cannot_be_shown_is_an_error_of_the_tool() -> None:
    circle: list[Any] = []
    circle.append(circle)

    def tool(text: str) -> Any:
        return circle

    assert step(begun([tool]), "query", "").info["tool_errors"][0]["type"] == "ValueError"


def graded(answer: str, task: dict[str, str]) -> dict[str, Any]:
    right = answer == task["answer"]
    return {"reward": 0.5 * right, "exact_match": float(right), "why": "compared"}


async def graded_later(answer: str, task: dict[str, str]) -> dict[str, Any]:
    return graded(answer, task)


@pytest.mark.parametrize("grade", [graded, graded_later])
def test_the_answer_is_graded(grade: Any) -> None:
    environment = ToolEnvironment("who ?", [look_up], grade, metrics=["exact_match"])
    environment.reset(0, {"answer": "carla"})
    assert step(environment, "query", "ada").info == {"exact_match": 0.0, "tool_errors": []}
    taken = step(environment, "answer", "carla")
    info = {"exact_match": 1.0, "why": "compared", "tool_errors": []}
    assert taken == Step("", 0.5, True, info=info)
    environment.reset(0, {"answer": "dora"})
    assert step(environment, "answer", "carla").info["exact_match"] == 0.0


def test_a_grade_may_be_a_number() -> None:
    environment = ToolEnvironment("who ?", [look_up], lambda answer, task: answer == "carla")
    environment.reset(0)
    taken = step(environment, "answer", "carla")
    assert taken == Step("", 1.0, True, info={"tool_errors": []}) and isinstance(taken.reward, float)


def test_errors_of_the_grade_are_raised_and_it_can_be_asked_again() -> None:
    failures = [ConnectionResetError("gone")]

    def grade(answer: str, task: Any) -> float:
        if failures:
            raise failures.pop()
        return 1.0

    environment = begun([look_up], grade)
    with pytest.raises(ConnectionResetError):
        step(environment, "answer", "carla")
    assert step(environment, "answer", "carla").reward == 1.0


def test_numbers_of_a_grade_are_named_beforehand() -> None:
    with pytest.raises(
        InputError, match=r"metrics: expected a name for each number of the grade, got \['f1'\]"
    ):
        step(begun([look_up], lambda answer, task: {"reward": 0, "f1": 1.0}), "answer", "")
    with pytest.raises(InputError, match="grade: expected a reward, or a mapping with one"):
        step(begun([look_up], lambda answer, task: {"f1": 1.0}, metrics=["f1"]), "answer", "")


def test_tools_are_checked_at_once() -> None:
    with pytest.raises(InputError, match="tools"):
        ToolEnvironment("who ?", [])


def echo(text: str, times: int = 1) -> str:
    return text * times


@settings(max_examples=100, deadline=None)
@given(
    kind=st.sampled_from(["query", "malformed", "summary"]),
    text=st.text(st.characters(exclude_categories=["Cs"]))
    | st.text(st.characters(), max_size=5).map(
        lambda t: json.dumps({"name": "echo", "arguments": {"text": t}})
    ),
)
def test_whatever_the_policy_writes_is_answered_with_a_text_for_tokenizers(kind: str, text: str) -> None:
    for tools in ([echo], [echo, look_up]):
        observation, reward, terminated, truncated, _ = step(begun(tools), kind, text)
        observation.encode()
        assert (reward, terminated, truncated) == (0.0, False, False)
