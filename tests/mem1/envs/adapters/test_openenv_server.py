"""The adapter with OpenEnv's own client and server, where the package is installed."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Callable, Iterator
from inspect import isawaitable
from typing import Any

import pytest

from mem1.envs.adapters.openenv_env import OpenEnvEnvironment
from mem1.envs.base import Action, Step
from mem1.runtime.event_loop import EVENT_LOOP

openenv = pytest.importorskip("openenv.core", reason="openenv is not installed")
uvicorn = pytest.importorskip("uvicorn")


class Guess(openenv.Action):  # type: ignore[misc, name-defined]
    number: int


class Hint(openenv.Observation):  # type: ignore[misc, name-defined]
    text: str


class Guessing(openenv.Environment):  # type: ignore[misc, name-defined]
    """Guess a number; the seed is the number."""

    SUPPORTS_CONCURRENT_SESSIONS = True

    def reset(self, seed: int | None = None, episode_id: str | None = None, low: int = 0, **_: Any) -> Hint:
        self.number = seed
        return Hint(text=f"a number from {low}")

    def step(self, action: Guess, timeout_s: float | None = None, **_: Any) -> Hint:
        if action.number < 0:
            raise ZeroDivisionError("a fault of the environment")
        hint = "found" if action.number == self.number else "more" if action.number < self.number else "less"
        done = hint == "found"
        return Hint(text=hint, reward=1.0 if done else None, done=done)

    @property
    def state(self) -> Any:
        return openenv.env_server.State()


Serve = Callable[[int], str]


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Starts a server with room for so many sessions; gives its address."""
    running: list[tuple[Any, threading.Thread]] = []

    def start(sessions: int) -> str:
        app = openenv.create_fastapi_app(Guessing, Guess, Hint, max_concurrent_envs=sessions)
        listening = socket.create_server(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(app, log_level="error"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
        running.append((server, thread))
        thread.start()
        return f"http://127.0.0.1:{listening.getsockname()[1]}"

    yield start
    for server, thread in running:
        server.should_exit = True
        thread.join(timeout=10)


def environment(url: str, sync: bool = False) -> OpenEnvEnvironment:
    def make() -> Any:
        client = openenv.GenericEnvClient(base_url=url)
        return client.sync() if sync else client

    return OpenEnvEnvironment(
        make, lambda action: {"number": int(action.text)}, lambda observation: observation["text"]
    )


def play(made: OpenEnvEnvironment, value: Callable[[Any], Any]) -> list[Any]:
    """What an episode answers to a few actions, then a close."""

    def step(kind: str, text: str) -> Any:
        return value(made.step(Action(kind, text)))

    said = [value(made.reset(3, {"id": "a", "low": 1}))]
    said += [step("query", "1"), step("query", "x"), step("malformed", ""), step("answer", "3")]
    value(made.close())
    return said


EXPECTED = [
    "a number from 1",
    Step("more", 0.0),
    Step("invalid action: invalid literal for int() with base 10: 'x'", info={"invalid_action": True}),
    Step("invalid action: expected a complete action", info={"invalid_action": True}),
    Step("found", 1.0, True),
]


@pytest.mark.parametrize("sync", [False, True])
def test_an_episode_on_a_thread(serve: Serve, sync: bool) -> None:
    assert play(environment(serve(1), sync), lambda answer: answer) == EXPECTED


def test_an_episode_on_an_event_loop(serve: Serve) -> None:
    made = environment(serve(1))

    async def played() -> list[Any]:
        async def value(answer: Any) -> Any:
            return await answer if isawaitable(answer) else answer

        said = [await value(made.reset(3, {"id": "a", "low": 1}))]
        for kind, text in (("query", "1"), ("query", "x"), ("malformed", ""), ("answer", "3")):
            said.append(await value(made.step(Action(kind, text))))
        await value(made.close())
        return said

    assert EVENT_LOOP.run(played(), time.monotonic() + 30) == EXPECTED


def test_an_action_of_another_type_is_told_and_a_fault_is_raised(serve: Serve) -> None:
    made = OpenEnvEnvironment(
        lambda: openenv.GenericEnvClient(base_url=url),
        lambda action: {"number": action.text},
        lambda observation: observation["text"],
    )
    url = serve(1)
    made.reset(3)
    told: Any = made.step(Action("query", "many"))
    assert told.info == {"invalid_action": True} and "VALIDATION_ERROR" in told.observation
    assert made.step(Action("query", "4")) == Step("less")
    with pytest.raises(RuntimeError, match="a fault of the environment"):
        made.step(Action("query", "-1"))
    made.close()


def test_sessions_side_by_side_have_episodes_of_their_own(serve: Serve) -> None:
    url = serve(4)
    made = [environment(url) for _ in range(4)]
    for seed, one in enumerate(made):
        one.reset(seed)
    hints = [one.step(Action("query", "2")) for one in made]
    assert [taken.observation for taken in hints] == ["less", "less", "found", "more"]  # type: ignore[union-attr]
    for one in made:
        one.close()


def test_a_full_server_refuses_a_reset_which_can_be_tried_again(serve: Serve) -> None:
    url = serve(1)
    first, second = environment(url), environment(url)
    first.reset(0)
    with pytest.raises(second.retryable, match="capacity|CAPACITY"):
        second.reset(1)
    first.close()
    assert second.reset(1) == "a number from 0"
    second.close()


def test_no_server_and_a_lost_session_are_errors_of_the_connection(serve: Serve) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        nowhere = f"http://127.0.0.1:{free.getsockname()[1]}"
    made = environment(nowhere)
    with pytest.raises(ConnectionError):
        made.reset(0)
    assert made.retryable == (OSError, RuntimeError)
    made.close()

    made = environment(serve(1))
    made.reset(0)
    client = made._client
    asyncio.run_coroutine_threadsafe(client._ws.close(), client._ws_loop).result(10)
    with pytest.raises(
        RuntimeError, match="no attribute 'number'"
    ):  # a new session, in which nothing has begun
        made.step(Action("query", "0"))
    assert made.retryable == ()
    made.close()
