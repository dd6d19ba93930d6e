"""Environments behind a client of OpenEnv."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from mem1.envs.adapters.session import Session, attempt, invalid, readable
from mem1.envs.base import NOTHING, Action, Step, require_running

MALFORMED = "expected a complete action"
# How the client says that an action is not of the server's type: a code behind the server's words.
_REFUSED = "(code: VALIDATION_ERROR)"


def seed_and_task(seed: int, task: Any) -> dict[str, Any]:
    """The seed, and the entries of a task that is a mapping. Servers leave out what their environment does
    not ask for.
    """
    return {**task, "seed": seed} if isinstance(task, Mapping) else {"seed": seed}


class OpenEnvEnvironment(Session):
    """One client of OpenEnv: `reset(**arguments)` and `step(action)`, which return a result with an
    `observation`, a `reward` and `done`, and `close()`; each at once or as an awaitable.

        OpenEnvEnvironment(lambda: EchoEnv(base_url="http://localhost:8000"),
                           to_action=lambda action: EchoAction(message=action.text),
                           to_text=lambda observation: observation.echoed_message)

    make_client: called at the first reset; gives the client itself (of what `from_env` and
    `from_docker_image` give, the `.sync()`). to_action: gives the client's action for one of the policy's,
    whatever its kind; raises ValueError, with words for the policy, for what is none (so does a pydantic
    model). to_text: makes a text of an observation. to_reset: gives the arguments of the client's reset for a
    seed and a task.

    An action that the server refuses as not of its type is answered and counted as invalid, as malformed ones
    are. No reward counts as 0, `metadata` as the info. A session that was lost is not taken up again: a step
    that fails ends its episode; a reset may be tried again, so that a server without a free session is waited
    for.
    """

    reset_errors = (OSError, RuntimeError)

    def __init__(
        self,
        make_client: Callable[[], Any],
        to_action: Callable[[Action], Any],
        to_text: Callable[[Any], str],
        to_reset: Callable[[int, Any], Mapping[str, Any]] = seed_and_task,
    ) -> None:
        self._make_client, self._to_reset = make_client, to_reset
        self._to_action, self._to_text = to_action, to_text
        self._client: Any = None

    def reset(self, seed: int, task: Any = None) -> str | Awaitable[str]:
        self._running = False
        if self._client is None:
            self._client = self._make_client()
        return attempt(lambda: self._client.reset(**self._to_reset(seed, task)), self._begun)

    def step(self, action: Action) -> Step | Awaitable[Step]:
        require_running(self._running)
        if action.kind == "malformed":
            return invalid(MALFORMED)
        try:
            chosen = self._to_action(action)
        except ValueError as error:
            return invalid(error)
        return attempt(lambda: self._client.step(chosen), self._stepped, (RuntimeError,), _refused)

    def close(self) -> Any:
        """Close the client, if there is one; the next reset makes another. May be a coroutine."""
        self._running = False
        client, self._client = self._client, None
        return None if client is None else client.close()

    def _begun(self, result: Any) -> str:
        self._running = True
        return readable(self._to_text(result.observation), "to_text")

    def _stepped(self, result: Any) -> Step:
        self._running = not result.done
        metadata = getattr(result, "metadata", None)
        return Step(
            readable(self._to_text(result.observation), "to_text"),
            0.0 if result.reward is None else float(result.reward),
            bool(result.done),
            info=metadata if isinstance(metadata, Mapping) else NOTHING,
        )


def _refused(error: BaseException) -> Step:
    if not str(error).endswith(_REFUSED):
        raise error
    return invalid(error)
