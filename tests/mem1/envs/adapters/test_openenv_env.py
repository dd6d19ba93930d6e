"""The adapter over stand-ins of a client; over OpenEnv's own, see test_openenv_server.py."""

from __future__ import annotations

import asyncio
from inspect import isawaitable
from types import SimpleNamespace
from typing import Any

import pytest

from mem1.envs.adapters.openenv_env import OpenEnvEnvironment, seed_and_task
from mem1.envs.base import Action, Step


class Client:
    """Says every text again; "end" ends the episode, "bad" is not of the action's type, "gone" breaks the
    connection.
    """

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def reset(self, **arguments: Any) -> Any:
        self.calls.append(arguments)
        return SimpleNamespace(observation={"text": "begin"}, reward=None, done=False)

    def step(self, action: Any) -> Any:
        self.calls.append(action)
        if action == "bad":
            raise RuntimeError("Server error: Invalid message (code: VALIDATION_ERROR)")
        if action == "quoted":  # an environment's own words
            raise RuntimeError("Server error: no 'VALIDATION_ERROR' here (code: EXECUTION_ERROR)")
        if action == "gone":
            raise ConnectionResetError("gone")
        if action == "broken":
            raise RuntimeError("Server error: division by zero (code: EXECUTION_ERROR)")
        reward = None if action == "none" else 0.5
        seen = {"text": f"said {action}"}
        return SimpleNamespace(observation=seen, reward=reward, done=action == "end", metadata={"place": 1})

    def close(self) -> None:
        self.calls.append("close")


class AsyncClient(Client):
    async def reset(self, **arguments: Any) -> Any:
        return super().reset(**arguments)

    async def step(self, action: Any) -> Any:
        return super().step(action)

    async def close(self) -> None:  # type: ignore[override]
        super().close()


def to_action(action: Action) -> str:
    if action.text == "no":
        raise ValueError("say something else")
    return action.text


def value(answer: Any) -> Any:
    """An answer, be it given at once or as a coroutine."""

    async def awaited() -> Any:
        return await answer

    return asyncio.run(awaited()) if isawaitable(answer) else answer


@pytest.fixture(params=[Client, AsyncClient])
def client(request: pytest.FixtureRequest) -> Client:
    return request.param()  # type: ignore[no-any-return]


@pytest.fixture
def environment(client: Client) -> OpenEnvEnvironment:
    return OpenEnvEnvironment(lambda: client, to_action, lambda observation: observation["text"])


def step(environment: OpenEnvEnvironment, text: str, kind: str = "query") -> Any:
    return value(environment.step(Action(kind, text)))


def test_an_episode(environment: OpenEnvEnvironment, client: Client) -> None:
    with pytest.raises(RuntimeError, match="reset"):
        environment.step(Action("query", "a"))
    assert value(environment.reset(3, {"id": "x", "split": "test"})) == "begin"
    assert step(environment, "a") == Step("said a", 0.5, info={"place": 1})
    assert step(environment, "none").reward == 0.0
    assert step(environment, "end", "answer") == Step("said end", 0.5, True, info={"place": 1})
    with pytest.raises(RuntimeError, match="reset"):
        environment.step(Action("query", "a"))
    value(environment.close())
    value(environment.close())
    assert client.calls == [{"seed": 3, "id": "x", "split": "test"}, "a", "none", "end", "close"]


@pytest.mark.parametrize(
    ("kind", "text", "told"),
    [
        ("malformed", "a", "invalid action: expected a complete action"),
        ("query", "no", "invalid action: say something else"),
        ("answer", "bad", "invalid action: Server error: Invalid message (code: VALIDATION_ERROR)"),
    ],
)
def test_invalid_actions_are_told_and_the_episode_goes_on(
    environment: OpenEnvEnvironment, kind: str, text: str, told: str
) -> None:
    value(environment.reset(0))
    assert step(environment, text, kind) == Step(told, info={"invalid_action": True})
    assert step(environment, "a").observation == "said a"


def test_faults_of_the_server_are_raised_and_no_step_is_made_twice(environment: OpenEnvEnvironment) -> None:
    assert environment.retryable == (OSError, RuntimeError)
    value(environment.reset(0))
    assert environment.retryable == ()
    with pytest.raises(RuntimeError, match="here"):
        step(environment, "quoted")
    with pytest.raises(RuntimeError, match="division by zero"):
        step(environment, "broken")
    with pytest.raises(ConnectionResetError):
        step(environment, "gone")


def test_a_client_is_made_at_the_first_reset_and_after_a_close() -> None:
    made: list[Client] = []

    def make() -> Client:
        made.append(Client())
        return made[-1]

    environment = OpenEnvEnvironment(make, to_action, str)
    assert made == []
    environment.reset(0)
    environment.reset(1)
    environment.close()
    environment.reset(2)
    assert [len(client.calls) for client in made] == [3, 1]


def test_arguments_of_the_reset() -> None:
    assert seed_and_task(1, None) == seed_and_task(1, "a task that is no mapping") == {"seed": 1}
    assert seed_and_task(1, {"seed": 2, "index": 3}) == {"seed": 1, "index": 3}
    client = Client()
    environment = OpenEnvEnvironment(
        lambda: client, to_action, str, to_reset=lambda seed, task: {"task": task}
    )
    environment.reset(0, "a")
    assert client.calls == [{"task": "a"}]


def test_observations_are_texts_that_tokenizers_take(client: Client) -> None:
    environment = OpenEnvEnvironment(lambda: client, to_action, lambda seen: f"{seen['text']}\ud800")
    assert value(environment.reset(0)) == "begin?"
    assert step(environment, "a").observation == "said a?"
