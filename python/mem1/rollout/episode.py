"""One episode: a stream of tokens that the policy and its environment write in turns."""

from __future__ import annotations

import math
import sysconfig
import textwrap
import time
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mem1.checks import InputError
from mem1.config import RolloutConfig
from mem1.envs.base import Environment
from mem1.envs.tasks import task_id
from mem1.parsing.codec import Codec
from mem1.rollout.call_pool import try_call
from mem1.rollout.env_calls import EnvironmentCalls, Reply
from mem1.seeds import derive_seed
from mem1.trajectory import Failure, FinishReason, TokenReward, Trajectory
from mem1_core.eviction import EvictionError, EvictionTable
from mem1_core.eviction_policies import short_form
from mem1_core.segments import Segment

_MAX_MESSAGE = 200  # characters of an exception's message
_OURS = Path(__file__).parents[1]
_PYTHON = {sysconfig.get_path(name) for name in ("stdlib", "platstdlib")}
_PACKAGES = {sysconfig.get_path(name) for name in ("purelib", "platlib")}
_UNIFORM_BATCH = 64  # random numbers at a time


class _Stage(NamedTuple):
    """Tokens to feed, and then the prune that is due."""

    tokens: list[int]  # indices in the stream
    alive: Tensor | None  # bool per token of the stream so far; None: no prune


class Episode:
    """One episode: its stream of tokens, which of them the policy may still see, which it is yet to be fed.

    Boundaries come from who wrote a token: only `write`, the policy's way in, looks for tags, in the text
    of what it wrote. What leaves there is asked of the table that the training mask is made of.

    pending_call: what the environment is to be asked next; `receive` gets the result, and until then the
    episode is `awaiting_reply`: tokens may be fed, but none written. cached: stream index of each token in
    the slot, in order; the slot may hold more behind them, which is to be forgotten.
    """

    def __init__(
        self,
        environment: Environment,
        seed: int,
        codec: Codec,
        config: RolloutConfig,
        sampling_seed: int = 0,
        expert: bool = False,
        model: str = "",
        failures: Sequence[Failure] = (),
        task: Any = None,
    ) -> None:
        self.task = task
        self.seed, self.codec, self.config, self.sampling_seed = seed, codec, config, sampling_seed
        self.model, self.failures = model, [*failures]
        self.tokens: list[int] = []
        self.logprobs: list[float] = []
        self.rollout_logprobs: list[float] = []
        self.segments: list[Segment] = []
        self.turn = 0
        self._calls = EnvironmentCalls(environment, codec, config, expert)
        self.pending_call: Callable[[float], Reply] | None = partial(self._calls.reset, seed, task)
        self.awaiting_reply = True
        self.finish_reason: FinishReason | None = None  # while it goes on
        self.error = ""
        self.cached: list[int] = []
        self._stages: deque[_Stage] = deque()
        self._table = EvictionTable(config.prune)
        self._reader = codec.turn(config.max_action_tokens, config.max_state_tokens)
        self._expert_tokens: deque[int] = deque()
        self._reply = Reply([], 1)  # the last one
        self._rewards: list[TokenReward] = []
        self._score, self._notes = dict[str, float](), dict[str, Any]()
        self._invalid_turns: list[int] = []
        self._model_tokens = 0
        self._began = time.perf_counter()
        self._uniform: list[float] = []  # drawn and not yet used, the next one last
        self._generator = torch.Generator().manual_seed(derive_seed(seed, "sampling", sampling_seed))

    @property
    def run_inline(self) -> bool:
        """Whether the environment may be asked without a thread."""
        environment = self._calls.environment
        return try_call(lambda: bool(getattr(environment, "run_inline", False))) is True

    @property
    def pending(self) -> list[int]:
        """Stream indices of what can be fed now: up to the next prune."""
        return self._stages[0].tokens if self._stages else []

    @property
    def prompt(self) -> list[int]:
        """The tokens of the prompt, once it is there."""
        return self.tokens[: self.segments[0].length] if self.segments else []

    @property
    def closing_call(self) -> Callable[[float], None] | None:
        """What is left to be asked once the episode is over."""
        return self._calls.close if self._calls.closes else None

    def take_call(self) -> Callable[[float], Reply] | None:
        """The pending call, once."""
        call, self.pending_call = self.pending_call, None
        return call

    def receive(self, reply: Reply | BaseException) -> None:
        """The result of the call that was taken."""
        self.awaiting_reply = False
        if isinstance(reply, BaseException):
            self.error = _describe(reply)
            self.finish_reason = FinishReason.ENVIRONMENT_ERROR
            self._rewards, self._score, self._notes = [], {}, {}
            self._stages.clear()
            return
        self._reply = reply
        # What was said last counts, be it a number or not.
        self._score = {k: v for k, v in self._score.items() if k not in reply.notes} | {**reply.score}
        self._notes = {k: v for k, v in self._notes.items() if k not in reply.score} | {**reply.notes}
        self._invalid_turns += [self.turn] if reply.invalid else []
        if reply.reward:
            self._rewards.append(TokenReward(len(self.tokens) - 1, reply.reward))
        if reply.finish_reason:
            self.finish_reason = reply.finish_reason
            self._stages.clear()
            return
        begin = len(self.tokens)
        self._extend(reply.tokens, [0.0] * len(reply.tokens), [0.0] * len(reply.tokens))
        self._close("info" if begin else "prompt", len(reply.tokens))
        self.turn += 1
        self._reader = self.codec.turn(self.config.max_action_tokens, self.config.max_state_tokens)
        self._expert_tokens = deque(reply.expert_tokens or [])

    def positions(self, count: int) -> list[int]:
        """Position ids of the first `count` of `pending`: the stream's own, or, re-encoding, the places in
        the pruned context.
        """
        if self.config.regime == "carry":
            return self.pending[:count]
        return list(range(len(self.cached), len(self.cached) + count))

    def adopt_prompt(self, count: int) -> None:
        """The slot has got the first `count` tokens of the prompt from another one that read the same."""
        self._stages[0] = self._stages[0]._replace(tokens=self.pending[count:])
        self.cached = list(range(count))

    def commit_fed(self, count: int) -> Tensor | None:
        """The first `count` of `pending` have been fed. Returns which cached tokens to keep, bool [cached],
        if a prune is due now.
        """
        tokens, alive = self._stages[0]
        self.cached += tokens[:count]
        self._model_tokens += count
        if count < len(tokens):
            self._stages[0] = _Stage(tokens[count:], alive)
            return None
        self._stages.popleft()
        if alive is None:
            return None
        keep = alive[self.cached]
        self.cached = torch.tensor(self.cached)[keep].tolist()
        return keep

    def uniform(self) -> float:
        """The next number of this episode's own random stream, in [0, 1)."""
        if not self._uniform:
            self._uniform = torch.rand(_UNIFORM_BATCH, generator=self._generator).tolist()[::-1]
        return self._uniform.pop()

    def forced(self) -> int:
        """The next token of the expert, -1 where the policy is free."""
        return self._expert_tokens.popleft() if self._expert_tokens else -1

    def write(self, token: int, logprob: float, rollout_logprob: float | None = None) -> None:
        """The policy writes one token; where this completes an action, the environment is asked.

        rollout_logprob: that with which it was drawn, where it is another one.
        """
        reader = self._reader
        if not math.isfinite(logprob):
            self.finish_reason = FinishReason.POLICY_ERROR
            self.error = f"expected a finite log-prob, got {logprob}"
            written = reader.num_tokens - reader.state_tokens
            if written:
                self.segments.append(Segment(reader.kind, self.turn, written))
            return
        self._extend([token], [logprob], [logprob if rollout_logprob is None else rollout_logprob])
        event = reader.read(token)
        if event and reader.state_tokens and self.segments[-1].turn < self.turn:
            self._close("state", reader.state_tokens)
        if event == "end":  # what leaves need not wait for the environment
            self._close(reader.kind, reader.num_tokens - reader.state_tokens)
            context = int(self._table.alive().sum())
            self.pending_call = partial(self._calls.step, reader, self.turn, context, self._reply)
            self.awaiting_reply = True

    def trajectory(self) -> Trajectory:
        """What has happened, once it is over."""
        assert self.finish_reason is not None
        config, same = self.config, self.rollout_logprobs == self.logprobs
        return Trajectory(
            tokens=torch.tensor(self.tokens, dtype=torch.int64),
            segments=self.segments,
            logprobs=torch.tensor(self.logprobs, dtype=torch.float32),
            # What a function of the user's own has decided, whatever it would say when it is asked again.
            prune=config.prune if short_form(config.prune) is not None else self._table.recorded(),
            rewards=self._rewards,
            score=self._score,
            finish_reason=self.finish_reason,
            error=self.error,
            seconds=time.perf_counter() - self._began,
            objectives=self._reply.objectives,
            task="" if self.task is None else task_id(self.task),
            seed=self.seed,
            regime=config.regime,
            temperature=float(config.temperature),
            top_p=float(config.top_p),
            top_k=int(config.top_k),
            greedy=config.greedy,
            sampling_seed=self.sampling_seed,
            model=self.model,
            rollout_logprobs=None if same else torch.tensor(self.rollout_logprobs, dtype=torch.float32),
            failures=self.failures,
            notes=self._notes,
            invalid_turns=self._invalid_turns,
            model_tokens=self._model_tokens,
        )

    def _extend(self, tokens: list[int], logprobs: list[float], rollout_logprobs: list[float]) -> None:
        """More tokens of the stream, which are to be fed."""
        new = list(range(len(self.tokens), len(self.tokens) + len(tokens)))
        self.tokens += tokens
        self.logprobs += logprobs
        self.rollout_logprobs += rollout_logprobs
        if self._stages and self._stages[-1].alive is None:
            self._stages[-1].tokens.extend(new)
        else:
            self._stages.append(_Stage(new, None))

    def _close(self, kind: str, length: int) -> None:
        """The last `length` tokens are a segment. Where that makes others leave, a prune is due: the last
        token is fed first, it still sees them; or what is left of the context is encoded again.
        """
        segment = Segment(kind, self.turn, length)
        self.segments.append(segment)
        try:
            if not self._table.add(segment):
                return
        except EvictionError as error:  # the user's own rule
            raise InputError(str(error)) from None
        alive = self._table.alive()
        if self.config.regime == "carry":
            self._stages[-1] = self._stages[-1]._replace(alive=alive)
            return
        context = self.cached + self.pending
        stays = alive[context].tolist()
        kept = min(stays.index(False), len(self.cached))  # of the cache: up to the first that has left
        survivors = [token for token, stay in zip(context[kept:], stays[kept:], strict=True) if stay]
        if not survivors:  # what follows is sampled from the last one that is left
            kept, survivors = kept - 1, [context[kept - 1]]
        self.cached = context[:kept]
        self._stages = deque([_Stage(survivors, None)])


def _describe(error: BaseException) -> str:
    """Type, message and the last line of the environment's own code on the way to it."""
    message = try_call(str, error)
    text = message if isinstance(message, str) else "(no message: its __str__ raised)"
    said = f"{type(error).__name__}: {textwrap.shorten(_printable(text), _MAX_MESSAGE)}"
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not Path(frame.filename).is_relative_to(_OURS)
    ]
    packaged = [frame for frame in frames if _within(frame, _PACKAGES)]
    own = [frame for frame in frames if not _within(frame, _PYTHON | _PACKAGES)] or packaged
    if not own:
        return said
    last = own[-1]
    return f"{said} (line {last.lineno} of {_printable(Path(last.filename).name)}, in {last.name})"


def _within(frame: traceback.FrameSummary, folders: set[str]) -> bool:
    return any(Path(frame.filename).is_relative_to(folder) for folder in folders)


def _printable(text: str) -> str:
    return text.encode(errors="replace").decode()
