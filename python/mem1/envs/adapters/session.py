"""What the adapters have in common: text that may be shown, answers that may be awaited, steps that are never
made twice.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from inspect import isawaitable
from typing import Any, NoReturn, TypeVar

from mem1.checks import require
from mem1.envs.base import Step

_Value = TypeVar("_Value")


def readable(text: object, source: str) -> str:
    """A text without lone surrogates, which no tokenizer takes: "?" stands for each. InputError for what is
    no text; `source` says who gave it.
    """
    require(isinstance(text, str), source, "a text", text if text is None else type(text))
    return str(text).encode(errors="replace").decode()


def invalid(reason: object) -> Step:
    """The answer to an action that cannot be taken."""
    return Step(readable(f"invalid action: {reason}", "reason"), info={"invalid_action": True})


def _raise(error: BaseException) -> NoReturn:
    raise error


def attempt(
    call: Callable[[], Any],
    finish: Callable[[Any], _Value],
    errors: tuple[type[BaseException], ...] = (),
    recover: Callable[[BaseException], _Value] = _raise,
) -> _Value | Awaitable[_Value]:
    """`finish(call())`, or `recover(error)` for one of `errors` that came instead; where the call gives an
    awaitable, a coroutine of that. A call that is no coroutine runs here, on the caller's thread.
    """

    async def awaited(value: Awaitable[Any]) -> _Value:
        try:
            return finish(await value)
        except errors as error:
            return recover(error)

    try:
        value = call()
        return awaited(value) if isawaitable(value) else finish(value)
    except errors as error:
        return recover(error)


class Session:
    """An episode in something that lives elsewhere and is asked once for each step.

    A reset that fails with one of `reset_errors` may be made again; a step never: nobody knows what it has
    changed, and a connection made anew knows nothing of the episode.
    """

    reset_errors: tuple[type[BaseException], ...] = (OSError,)
    _running = False

    @property
    def retryable(self) -> tuple[type[BaseException], ...]:
        """What the loop tries again, now."""
        return () if self._running else self.reset_errors
