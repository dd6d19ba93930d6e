"""The calls of an episode to its environment, and what it accepts as their results.

All that is foreign happens here: calls of the environment, checks of what they gave, the tokenizer's work on
it. So whatever goes wrong is the result of one call, and ends one episode.
"""

from __future__ import annotations

import json
import math
import operator
import reprlib
from collections.abc import Callable, Mapping
from functools import partial
from inspect import isawaitable
from math import inf
from numbers import Integral, Real
from typing import Any, NamedTuple, TypeVar

import torch

from mem1.config import RolloutConfig
from mem1.envs.base import Environment, ExpertAction
from mem1.parsing.boundaries import TurnReader
from mem1.parsing.codec import Codec
from mem1.rollout.call_pool import retry, try_call
from mem1.runtime.event_loop import EVENT_LOOP
from mem1.trajectory import FinishReason

_Value = TypeVar("_Value")
_MAX_NOTE = 20_000  # characters of an entry of an info that is no number, as JSON
_LARGEST = torch.finfo(torch.float32).max  # rewards, and their squares in the value loss, are float32


class Reply(NamedTuple):
    """What an environment says to one call of the loop."""

    tokens: list[int]  # of the prompt, or of the info that an action is answered with
    objectives: int
    finish_reason: FinishReason | None = None  # of an episode that is over
    reward: float = 0.0
    total: float = 0.0  # of all rewards so far
    score: Mapping[str, float] = {}  # numbers of `Step.info`
    notes: Mapping[str, Any] = {}  # and what it says beside them
    invalid: bool = False  # whether it calls the action that
    expert_tokens: list[int] | None = None  # tokens of the expert's next action


class EnvironmentCalls:
    """The calls of one episode. They may run on another thread, and one that hangs holds this object for
    ever: it knows the environment and settings, nothing of the episode.

    Each takes its deadline as the last argument: nothing is tried again after it.
    """

    def __init__(self, environment: Environment, codec: Codec, config: RolloutConfig, expert: bool) -> None:
        self.environment, self._codec, self._config = environment, codec, config
        self._expert_plays = expert

    def reset(self, seed: int, task: Any, deadline: float) -> Reply:
        text = _text("reset", self._ask(partial(self.environment.reset, seed, task), deadline))
        limit = self._config.max_prompt_tokens
        tokens = self._codec.prompt(text, limit)
        if not 0 < len(tokens) <= limit:
            got = f"more than {limit}" if tokens else "none"
            expected = f"a prompt of at least one token and at most max_prompt_tokens={limit}"
            raise ValueError(f"reset: expected {expected}, got {got} for {reprlib.repr(text)}")
        objectives = _integer("objectives", getattr(self.environment, "objectives", 1))
        return Reply(tokens, objectives, expert_tokens=self._expert(deadline))

    def step(self, written: TurnReader, turn: int, context: int, reply: Reply, deadline: float) -> Reply:
        """The reply to a turn of the policy. context: the tokens that are live after it; reply: the one
        before.
        """
        config, turns_left = self._config, self._config.max_turns - turn
        text, terminated, truncated = written.reply, False, False
        malformed = written.action.kind == "malformed"
        reply = Reply([], reply.objectives, total=reply.total, invalid=malformed)
        if text is None:
            given = self._ask(partial(self.environment.step, written.action), deadline)
            text, reward, terminated, truncated, info = _step(given, reply.total)
            score, notes = _info(info)
            invalid = malformed or bool(score.pop("invalid_action", False))
            reply = reply._replace(
                reward=reward, total=reply.total + reward, score=score, notes=notes, invalid=invalid
            )
        if terminated or truncated or not turns_left or written.ended == "eos":
            how = FinishReason.END_OF_TURN if written.ended == "eos" else FinishReason.TURN_LIMIT
            if truncated:
                how = FinishReason.TRUNCATED
            if terminated:
                answered = written.action.kind == "answer"
                how = FinishReason.ANSWERED if answered else FinishReason.ENVIRONMENT
            return reply._replace(finish_reason=how)
        full = config.context_limit is not None and context > config.context_limit
        tokens = self._codec.observation(
            text, config.max_info_tokens, turns_left=turns_left, context_full=full
        )
        return reply._replace(tokens=tokens, expert_tokens=self._expert(deadline))

    @property
    def closes(self) -> bool:
        """Whether the environment wants to be told that its episode is over."""
        return callable(try_call(lambda: getattr(self.environment, "close", None)))

    def close(self, deadline: float = inf) -> None:
        """Tell the environment that its episode is over. RuntimeError, with its name, for what it raises."""
        environment: Any = self.environment
        result = try_call(lambda: _value(environment.close(), deadline))
        if isinstance(result, BaseException):
            name = type(environment).__qualname__
            raise RuntimeError(f"close of {name}: {type(result).__name__}: {result}")

    def _expert(self, deadline: float) -> list[int] | None:
        if not self._expert_plays:
            return None
        step = _value(self.environment.expert_action(), deadline)  # type: ignore[attr-defined]
        tokens = self._codec.expert(*_expect("expert_action", step, ExpertAction))
        limit = self._config.max_action_tokens
        if len(tokens) > limit:  # cut, it would be played as malformed
            expected = f"at most max_action_tokens={limit}"
            raise ValueError(f"expert_action: expected {expected}, got {len(tokens)} tokens")
        return tokens

    def _ask(self, call: Callable[[], Any], deadline: float) -> Any:
        """What the environment answers, be it at once or as a coroutine."""
        errors = getattr(self.environment, "retryable", (OSError,))
        sound = isinstance(errors, tuple) and all(
            isinstance(error, type) and issubclass(error, BaseException) for error in errors
        )
        if not sound:
            raise TypeError(f"retryable: expected a tuple of exception types, got {reprlib.repr(errors)}")
        return retry(lambda: _value(call(), deadline), self._config.env_retries, errors, deadline)


def _value(answer: Any, deadline: float) -> Any:
    return EVENT_LOOP.run(answer, deadline) if isawaitable(answer) else answer


def _expect(what: str, value: object, kind: type[_Value]) -> _Value:
    if not isinstance(value, kind):
        raise TypeError(f"{what}: expected {kind.__name__}, got {_describe(value)}")
    return value


def _describe(value: object) -> str:
    return f"{type(value).__name__} {reprlib.repr(value)}"


def _text(what: str, value: object) -> str:
    text = str.__str__(_expect(what, value, str))  # of a subclass the text itself
    return text.encode(errors="replace").decode()  # "?" for a lone surrogate, which no tokenizer takes


def _plain(value: Any) -> Any:
    """The Python object in a scalar of numpy or torch."""
    return value.item() if getattr(value, "ndim", None) == 0 else value


def _flag(what: str, value: object) -> bool:
    plain = _plain(value)
    if not isinstance(plain, Integral) or plain not in (0, 1):
        raise TypeError(f"{what}: expected bool, got {_describe(value)}")
    return bool(plain)


def _integer(what: str, value: object) -> int:
    if isinstance(_plain(value), bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{what}: expected int, got {_describe(value)}")
    return operator.index(value)  # type: ignore[arg-type]


def _step(given: object, total: float) -> tuple[str, float, bool, bool, Mapping[str, Any]]:
    """The five parts of a `Step`, checked; `total`: the rewards before it."""
    if not isinstance(given, tuple) or len(given) != 5:
        raise TypeError(f"step: expected a Step, or another tuple of five, got {_describe(given)}")
    observation, reward, terminated, truncated, info = given
    number = _plain(reward)
    # Compared before it is added: an int beyond float64 cannot be.
    most = math.sqrt(_LARGEST)
    sound = isinstance(number, Real) and -most <= number <= most and abs(total + float(number)) <= most
    if not sound:
        expected = "a number with which the square of all rewards together is finite in float32"
        raise ValueError(f"step: reward: expected {expected}, got {_describe(reward)}")
    return (
        _text("step: observation", observation),
        float(number),
        _flag("step: terminated", terminated),
        _flag("step: truncated", truncated),
        _expect("step: info", info, Mapping),  # type: ignore[type-abstract]
    )


def _info(given: Mapping[str, Any]) -> tuple[dict[str, float], dict[str, Any]]:
    """The numbers of an info, and the rest of it."""
    values = {_text("step: info", str(name)): _plain(value) for name, value in given.items()}
    numbers = {name: value for name, value in values.items() if isinstance(value, Real)}
    # math.isfinite would raise for an int beyond float64.
    if not all(-_LARGEST <= value <= _LARGEST for value in numbers.values()):
        raise ValueError(
            f"step: info: expected numbers that are finite in float32, got {reprlib.repr(given)}"
        )
    notes = {name: _note(value) for name, value in values.items() if name not in numbers}
    return {name: float(value) for name, value in numbers.items()}, notes


def _note(value: object) -> Any:
    """A copy of `value` as JSON has it, in words where it has not, and its beginning where it is long."""
    try:
        text = json.dumps(value, allow_nan=False)
    except (TypeError, ValueError, RecursionError):
        return reprlib.repr(value)
    return json.loads(text) if len(text) <= _MAX_NOTE else text[:_MAX_NOTE] + " ..."
