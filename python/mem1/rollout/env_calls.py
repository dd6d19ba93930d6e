"""The calls of an episode to its environment, and what it accepts as their results.

All that is foreign happens here: calls of the environment, checks of what they gave, the tokenizer's work on
it. So whatever goes wrong is the result of one call, and ends one episode.
"""

from __future__ import annotations

import json
import math
import operator
import reprlib
from collections.abc import Callable
from functools import partial
from numbers import Integral, Real
from typing import Any, NamedTuple, TypeVar

import torch

from mem1.config import RolloutConfig
from mem1.envs.base import Environment, ExpertAction, Observation
from mem1.parsing.boundaries import TurnReader
from mem1.parsing.codec import Codec
from mem1.rollout.call_pool import retry
from mem1.trajectory import FinishReason

_Value = TypeVar("_Value")
NO_SCORE = {"reward": 0.0, "exact_match": 0.0, "f1": 0.0}
_LARGEST = torch.finfo(torch.float32).max  # rewards, and their squares in the value loss, are float32


class Reply(NamedTuple):
    """What an environment says to one call of the loop."""

    tokens: list[int]  # of the prompt, or of the info that an action is answered with
    objectives: int
    finish_reason: FinishReason | None = None  # of an episode that is over
    score: dict[str, float] | None = None  # then
    notes: dict[str, Any] | None = None  # and what the score says beside numbers
    expert_tokens: list[int] | None = None  # tokens of the expert's next action


class EnvironmentCalls:
    """The calls of one episode. They may run on another thread, and one that hangs holds this object for
    ever: it knows the environment and settings, nothing of the episode.

    Each takes its deadline as the last argument: nothing is tried again after it.
    """

    def __init__(self, environment: Environment, codec: Codec, config: RolloutConfig, expert: bool) -> None:
        self.environment, self._codec, self._config = environment, codec, config
        self._expert_plays = expert

    def reset(self, seed: int, deadline: float) -> Reply:
        text = _text("reset", self._retry(partial(self.environment.reset, seed), deadline))
        limit = self._config.max_prompt_tokens
        tokens = self._codec.prompt(text, limit)
        if not 0 < len(tokens) <= limit:
            got = f"more than {limit}" if tokens else "none"
            expected = f"a prompt of at least one token and at most max_prompt_tokens={limit}"
            raise ValueError(f"reset: expected {expected}, got {got} for {reprlib.repr(text)}")
        objectives = _integer("objectives", self.environment.objectives)
        return Reply(tokens, objectives, expert_tokens=self._expert())

    def step(self, written: TurnReader, turn: int, context: int, objectives: int, deadline: float) -> Reply:
        """The reply to a turn of the policy; `context`: the tokens that are live after it."""
        config, turns_left = self._config, self._config.max_turns - turn
        text, done = written.reply, False
        if text is None:
            observation = self._retry(partial(self.environment.step, written.action), deadline)
            text, _, done = _expect("step", observation, Observation)
            text, done = _text("step: text", text), _flag("step: done", done)
        if not done and turns_left and written.ended != "eos":
            full = config.context_limit is not None and context > config.context_limit
            tokens = self._codec.observation(
                text, config.max_info_tokens, turns_left=turns_left, context_full=full
            )
            return Reply(tokens, objectives, expert_tokens=self._expert())
        score, notes = _score(self._retry(self.environment.score, deadline))
        how = FinishReason.END_OF_TURN if written.ended == "eos" else FinishReason.TURN_LIMIT
        if done:
            answered = written.action.kind == "answer"
            how = FinishReason.ANSWERED if answered else FinishReason.ENVIRONMENT
        return Reply([], objectives, how, score, notes)

    def _expert(self) -> list[int] | None:
        if not self._expert_plays:
            return None
        step = self.environment.expert_action()  # type: ignore[attr-defined]
        tokens = self._codec.expert(*_expect("expert_action", step, ExpertAction))
        limit = self._config.max_action_tokens
        if len(tokens) > limit:  # cut, it would be played as malformed
            expected = f"at most max_action_tokens={limit}"
            raise ValueError(f"expert_action: expected {expected}, got {len(tokens)} tokens")
        return tokens

    def _retry(self, call: Callable[[], _Value], deadline: float) -> _Value:
        errors = getattr(self.environment, "retryable", (OSError,))
        sound = isinstance(errors, tuple) and all(
            isinstance(error, type) and issubclass(error, BaseException) for error in errors
        )
        if not sound:
            raise TypeError(f"retryable: expected a tuple of exception types, got {reprlib.repr(errors)}")
        return retry(call, self._config.env_retries, errors, deadline)


def _expect(what: str, value: object, kind: type[_Value]) -> _Value:
    if not isinstance(value, kind):
        raise TypeError(f"{what}: expected {kind.__name__}, got {_describe(value)}")
    return value


def _describe(value: object) -> str:
    return f"{type(value).__name__} {reprlib.repr(value)}"


def _text(what: str, value: object) -> str:
    text = str.__str__(_expect(what, value, str))  # of a subclass the text itself
    text.encode()  # a lone surrogate, which no tokenizer takes, raises here
    return text


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


def _score(given: object) -> tuple[dict[str, float], dict[str, Any]]:
    """The numbers of a score, and the rest of it."""
    values = {str(name): _plain(value) for name, value in _expect("score", given, dict).items()}
    score = {name: value for name, value in values.items() if isinstance(value, Real)}
    # math.isfinite would raise for an int beyond float64.
    sound = all(-_LARGEST <= value <= _LARGEST for value in score.values())
    missing = ", ".join(sorted(NO_SCORE.keys() - score.keys()))
    if missing or not (sound and abs(score["reward"]) <= math.sqrt(_LARGEST)):
        expected = f"numbers, finite in float32, for {', '.join(NO_SCORE)}, and a reward whose square is, too"
        none = f" (none for {missing})" if missing else ""
        raise ValueError(f"score: expected {expected}, got {reprlib.repr(given)}{none}")
    notes = {name: _note(value) for name, value in values.items() if name not in score}
    return {name: float(value) for name, value in score.items()}, notes


def _note(value: object) -> Any:
    """A copy of `value` as JSON has it, or in words where it has not."""
    try:
        return json.loads(json.dumps(value, allow_nan=False))
    except (TypeError, ValueError, RecursionError):
        return reprlib.repr(value)
