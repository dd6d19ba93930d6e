"""One episode: a stream of tokens that the policy and its environment write in turns."""

from __future__ import annotations

import math
import reprlib
import textwrap
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from numbers import Real
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from mem1.calls import outcome, patiently
from mem1.codec import Codec
from mem1.config import RolloutConfig
from mem1.envs.base import Action, Environment, Observation, ScriptedAction
from mem1.trajectory import ENVIRONMENT_ERROR, POLICY_ERROR, TURN_LIMIT, Trajectory
from mem1_core.trajectory import Kind, Segment, evict_from_turns

_Value = TypeVar("_Value")
_FAILED = {"reward": 0.0, "exact_match": 0.0, "f1": 0.0}
_MOST_TOLD = 200  # characters of an exception's message
_DRAWN = 64  # random numbers at a time
_SEED_STRIDE = 1_000_003  # keeps the samplers of neighbouring seeds apart when `sampling_seed` moves


class Reply(NamedTuple):
    """What an environment says to one question of the loop."""

    text: str  # the prompt, or what an action is answered with
    objectives: int
    finished: str = ""  # why the episode is over
    score: dict[str, float] | None = None  # then
    script: list[int] | None = None  # tokens of the expert's next action


class Episode:
    """One episode: its stream of tokens, and which of these the policy still has to read and may still see.

    Boundaries come from who wrote a token: only `write`, the policy's way in, looks at tags. What a prune
    leaves is asked of `evict_from_turns`, the table that the training mask is made of.

    question: what the environment is to be asked next; `hear` gets the outcome, and until then the episode is
    `waiting`: it may read, but not write. cached: stream index of each token in the slot, in order. unread:
    indices to feed now; held: after the prune that is due.
    """

    def __init__(
        self,
        environment: Environment,
        seed: int,
        codec: Codec,
        config: RolloutConfig,
        sampling_seed: int = 0,
        scripted: bool = False,
    ) -> None:
        self.environment, self.seed, self.codec, self.config = environment, seed, codec, config
        self.scripted = scripted
        self.tokens: list[int] = []
        self.logprobs: list[float] = []
        self.segments: list[Segment] = []
        self.turn = 0
        self.question: Callable[[], Reply] | None = self._reset
        self.waiting = True
        self.finished = ""
        self.cached: list[int] = []
        self.unread: list[int] = []
        self.held: list[int] = []
        self._alive: Tensor | None = None  # bool per token of the stream: a prune is due
        self._action_start = 0  # stream index
        self._state_length = 0  # tokens of this action's `is` segment, 0 before its end
        self._script: deque[int] = deque()
        self._objectives, self._score = 1, dict(_FAILED)
        self._began = time.perf_counter()
        self._uniform: list[float] = []  # drawn and not yet used, the next one last
        self._generator = torch.Generator().manual_seed(seed * _SEED_STRIDE + sampling_seed)

    @property
    def instant(self) -> bool:
        """Whether the environment may be asked without a thread."""
        return outcome(lambda: bool(getattr(self.environment, "instant", False))) is True

    def take_question(self) -> Callable[[], Reply] | None:
        """The question that is open, once."""
        question, self.question = self.question, None
        return question

    def hear(self, reply: Reply | BaseException) -> None:
        """What became of the question."""
        self.waiting = False
        if isinstance(reply, BaseException):
            reply = Reply("", self._objectives, f"{ENVIRONMENT_ERROR}: {_described(reply)}")
        self._objectives = reply.objectives
        if reply.finished:
            self.finished, self._score = reply.finished, reply.score or self._score
            self.unread, self.held = [], []
            return
        if self.turn == 0:
            tokens = self.codec.prompt(reply.text, self.config.max_prompt)
            if not 0 < len(tokens) <= self.config.max_prompt:
                wanted = f"wanted a prompt of 1 to {self.config.max_prompt} tokens"
                self.hear(ValueError(f"reset: {wanted}, got {reprlib.repr(reply.text)}"))
                return
            self._append("prompt", tokens)
        else:
            self._append("info", self.codec.info(reply.text, self.config.max_info))
        self.turn += 1
        self._action_start, self._state_length = len(self.tokens), 0
        self._script = deque(reply.script or [])

    def positions(self) -> list[int]:
        """Position ids of `unread`: the stream's own, or, re-encoding, the places in the pruned context."""
        if self.config.regime == "carry":
            return self.unread
        return list(range(len(self.cached), len(self.cached) + len(self.unread)))

    def read(self) -> Tensor | None:
        """`unread` has been fed. Returns which cached tokens to keep, bool [cached], if a prune is due
        now.
        """
        self.cached += self.unread
        self.unread, self.held = self.held, []
        if self._alive is None:
            return None
        keep = self._alive[self.cached]
        self.cached = torch.tensor(self.cached)[keep].tolist()
        self._alive = None
        return keep

    def uniform(self) -> float:
        """The next number of this episode's own random stream, in [0, 1)."""
        if not self._uniform:
            self._uniform = torch.rand(_DRAWN, generator=self._generator).tolist()[::-1]
        return self._uniform.pop()

    def forced(self) -> int:
        """The next token of the script, -1 where the policy is free."""
        return self._script.popleft() if self._script else -1

    def write(self, token: int, logprob: float) -> None:
        """The policy writes one token; where this completes an action, the environment is asked."""
        if not math.isfinite(logprob):
            self.finished = f"{POLICY_ERROR}: wanted a finite log-prob, got {logprob}"
            return
        self.unread = [len(self.tokens)]
        self.tokens.append(token)
        self.logprobs.append(logprob)
        length = len(self.tokens) - self._action_start
        complete = token in self.codec.stops or length == self.config.max_action
        if token == self.codec.ids["</IS>"] and self._state_length == 0:
            self._state_length = length
            self.segments.append(Segment("is", self.turn, length))
            if not complete:
                self._boundary("query")
        if complete:
            written = self.tokens[self._action_start + self._state_length :]
            action = self.codec.action(written)
            if written:
                kind: Kind = "answer" if action.kind == "answer" else "query"
                self.segments.append(Segment(kind, self.turn, len(written)))
            self._boundary("info")  # before the answer is there: what leaves need not wait for it
            self.question = partial(self._step, action, self.turn == self.config.max_turns)
            self.waiting = True

    def trajectory(self) -> Trajectory:
        """What has happened, once `finished` says why it is over."""
        return Trajectory(
            tokens=torch.tensor(self.tokens, dtype=torch.int64),
            segments=self.segments,
            logprobs=torch.tensor(self.logprobs, dtype=torch.float32),
            prune=self.config.prune,
            score=self._score,
            finished=self.finished,
            seconds=time.perf_counter() - self._began,
            objectives=self._objectives,
            seed=self.seed,
        )

    def _boundary(self, following: Kind) -> None:
        """A place where tokens may leave: ask the table, as if one token of kind `following` came next."""
        n = len(self.tokens)
        evict = evict_from_turns([*self.segments, Segment(following, self.turn, 1)], self.config.prune)[:n]
        if not (evict == n).any():
            return
        alive = evict > n
        if self.config.regime == "carry":
            self._alive = alive  # the last token written is fed first: it still sees what leaves
        else:
            prompt = self.segments[0].length
            self.cached = self.cached[:prompt]
            self.unread = [prompt + j for j in alive[prompt:].nonzero()[:, 0].tolist()]

    def _append(self, kind: Kind, tokens: list[int]) -> None:
        begin = len(self.tokens)
        self.tokens += tokens
        self.logprobs += [0.0] * len(tokens)
        self.segments.append(Segment(kind, self.turn, len(tokens)))
        (self.unread if self._alive is None else self.held).extend(range(begin, len(self.tokens)))

    # The questions. They may run on another thread, while nothing else touches this episode.

    def _reset(self) -> Reply:
        text = _text("reset", self._patiently(partial(self.environment.reset, self.seed)))
        objectives = _expect("objectives", self.environment.objectives, int)
        return Reply(text, objectives, script=self._expert())

    def _step(self, action: Action, last: bool) -> Reply:
        observation = self._patiently(partial(self.environment.step, action))
        text, _, done = _expect("step", observation, Observation)
        text = _text("step: text", text)
        done = _expect("step: done", done, bool)
        if not done and not last:
            return Reply(text, self._objectives, script=self._expert())
        how = "answered" if action.kind == "answer" else "ended by the environment"
        score = _checked_score(self._patiently(self.environment.score))
        return Reply(text, self._objectives, how if done else TURN_LIMIT, score)

    def _expert(self) -> list[int] | None:
        if not self.scripted:
            return None
        step = self.environment.expert_action()  # type: ignore[attr-defined]
        return self.codec.script(_expect("expert_action", step, ScriptedAction))

    def _patiently(self, call: Callable[[], _Value]) -> _Value:
        return patiently(call, self.config.env_retries)


def _expect(what: str, value: object, kind: type[_Value]) -> _Value:
    if not isinstance(value, kind):
        got = f"{type(value).__name__} {reprlib.repr(value)}"
        raise TypeError(f"{what}: wanted {kind.__name__}, got {got}")
    return value


def _described(error: BaseException) -> str:
    message = outcome(lambda: str(error))
    told = message if isinstance(message, str) else "(it cannot be told)"
    return f"{type(error).__name__}: {textwrap.shorten(told, _MOST_TOLD)}"


def _text(what: str, value: object) -> str:
    text = _expect(what, value, str)
    text.encode()  # a lone surrogate, which no tokenizer takes, raises here
    return text


def _checked_score(score: object) -> dict[str, float]:
    given = _expect("score", score, dict)
    sound = all(isinstance(value, Real) and math.isfinite(value) for value in given.values())
    if not sound or not _FAILED.keys() <= given.keys():
        raise ValueError(f"score: wanted finite numbers for {', '.join(_FAILED)}, got {given}")
    return {str(name): float(value) for name, value in given.items()}
