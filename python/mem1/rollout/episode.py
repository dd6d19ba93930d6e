"""One episode: a stream of tokens that the policy and its environment write in turns."""

from __future__ import annotations

import math
import textwrap
import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mem1.config import RolloutConfig
from mem1.envs.base import Environment
from mem1.parsing.codec import Codec
from mem1.rollout.call_pool import try_call
from mem1.rollout.env_calls import NO_SCORE, EnvironmentCalls, Reply
from mem1.seeds import derive_seed
from mem1.trajectory import Failure, FinishReason, Trajectory
from mem1_core.eviction import evict_from_segments
from mem1_core.segments import Segment

_MAX_MESSAGE = 200  # characters of an exception's message
_UNIFORM_BATCH = 64  # random numbers at a time


class Episode:
    """One episode: its stream of tokens, which of them the policy may still see, which it is yet to be fed.

    Boundaries come from who wrote a token: only `write`, the policy's way in, looks at tags. What a prune
    leaves is asked of `evict_from_segments`, the table that the training mask is made of.

    pending_call: what the environment is to be asked next; `receive` gets the result, and until then the
    episode is `awaiting_reply`: tokens may be fed, but none written. cached: stream index of each token in
    the slot, in order. pending: indices to feed now; deferred: those to feed after the prune that is due.
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
    ) -> None:
        self.seed, self.codec, self.config, self.sampling_seed = seed, codec, config, sampling_seed
        self.model, self.failures = model, [*failures]
        self.tokens: list[int] = []
        self.logprobs: list[float] = []
        self.rollout_logprobs: list[float] = []
        self.segments: list[Segment] = []
        self.turn = 0
        self._calls = EnvironmentCalls(environment, codec, config, expert)
        self.pending_call: Callable[[float], Reply] | None = partial(self._calls.reset, seed)
        self.awaiting_reply = True
        self.finish_reason: FinishReason | None = None  # while it goes on
        self.error = ""
        self.cached: list[int] = []
        self.pending: list[int] = []
        self.deferred: list[int] = []
        self._alive: Tensor | None = None  # bool per token of the stream: a prune is due
        self._action_start = 0  # stream index
        self._state_length = 0  # tokens of this action's `state` segment, 0 before its end
        self._expert_tokens: deque[int] = deque()
        self._objectives, self._score, self._notes = 1, dict(NO_SCORE), dict[str, Any]()
        self._began = time.perf_counter()
        self._uniform: list[float] = []  # drawn and not yet used, the next one last
        self._generator = torch.Generator().manual_seed(derive_seed(seed, "sampling", sampling_seed))

    @property
    def run_inline(self) -> bool:
        """Whether the environment may be asked without a thread."""
        environment = self._calls.environment
        return try_call(lambda: bool(getattr(environment, "run_inline", False))) is True

    def take_call(self) -> Callable[[float], Reply] | None:
        """The pending call, once."""
        call, self.pending_call = self.pending_call, None
        return call

    def receive(self, reply: Reply | BaseException) -> None:
        """The result of the call that was taken."""
        self.awaiting_reply = False
        if isinstance(reply, BaseException):
            self.error = _describe(reply)
            reply = Reply([], self._objectives, FinishReason.ENVIRONMENT_ERROR)
        self._objectives = reply.objectives
        if reply.finish_reason:
            self.finish_reason = reply.finish_reason
            self._score, self._notes = reply.score or self._score, reply.notes or self._notes
            self.pending, self.deferred = [], []
            return
        self._append("info" if self.turn else "prompt", reply.tokens)
        self.turn += 1
        self._action_start, self._state_length = len(self.tokens), 0
        self._expert_tokens = deque(reply.expert_tokens or [])

    def positions(self) -> list[int]:
        """Position ids of `pending`: the stream's own, or, re-encoding, the places in the pruned context."""
        if self.config.regime == "carry":
            return self.pending
        return list(range(len(self.cached), len(self.cached) + len(self.pending)))

    def commit_fed(self) -> Tensor | None:
        """`pending` has been fed. Returns which cached tokens to keep, bool [cached], if a prune is due
        now.
        """
        self.cached += self.pending
        self.pending, self.deferred = self.deferred, []
        if self._alive is None:
            return None
        keep = self._alive[self.cached]
        self.cached = torch.tensor(self.cached)[keep].tolist()
        self._alive = None
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
        if not math.isfinite(logprob):
            self.finish_reason = FinishReason.POLICY_ERROR
            self.error = f"expected a finite log-prob, got {logprob}"
            self._close("query")
            return
        self.pending = [len(self.tokens)]
        self.tokens.append(token)
        self.logprobs.append(logprob)
        self.rollout_logprobs.append(logprob if rollout_logprob is None else rollout_logprob)
        length = len(self.tokens) - self._action_start
        complete = token in self.codec.stops or length == self.config.max_action_tokens
        if token == self.codec.ids["</IS>"] and self._state_length == 0:
            self._state_length = length
            self.segments.append(Segment("state", self.turn, length))
            if not complete:
                self._boundary("query")
        if complete:
            written = self.tokens[self._action_start + self._state_length :]
            self._close("answer" if self.codec.kind(written) == "answer" else "query")
            self._boundary("info")  # before the answer is there: what leaves need not wait for it
            last = self.turn == self.config.max_turns
            self.pending_call = partial(self._calls.step, written, self._objectives, last)
            self.awaiting_reply = True

    def trajectory(self) -> Trajectory:
        """What has happened, once it is over."""
        assert self.finish_reason is not None
        config, same = self.config, self.rollout_logprobs == self.logprobs
        return Trajectory(
            tokens=torch.tensor(self.tokens, dtype=torch.int64),
            segments=self.segments,
            logprobs=torch.tensor(self.logprobs, dtype=torch.float32),
            prune=config.prune,
            score=self._score,
            finish_reason=self.finish_reason,
            error=self.error,
            seconds=time.perf_counter() - self._began,
            objectives=self._objectives,
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
        )

    def _close(self, kind: str) -> None:
        """What the policy has written since its `state` segment, or since its turn began, is one segment."""
        length = len(self.tokens) - self._action_start - self._state_length
        if length:
            self.segments.append(Segment(kind, self.turn, length))

    def _boundary(self, following: str) -> None:
        """A place where tokens may leave: ask the table, as if one token of kind `following` came next."""
        n = len(self.tokens)
        evict = evict_from_segments([*self.segments, Segment(following, self.turn, 1)], self.config.prune)[:n]
        if not (evict == n).any():
            return
        alive = evict > n
        if self.config.regime == "carry":
            self._alive = alive  # the last token written is fed first: it still sees what leaves
        else:
            prompt = self.segments[0].length
            self.cached = self.cached[:prompt]
            self.pending = [prompt + j for j in alive[prompt:].nonzero()[:, 0].tolist()]

    def _append(self, kind: str, tokens: list[int]) -> None:
        begin = len(self.tokens)
        self.tokens += tokens
        self.logprobs += [0.0] * len(tokens)
        self.rollout_logprobs += [0.0] * len(tokens)
        self.segments.append(Segment(kind, self.turn, len(tokens)))
        (self.pending if self._alive is None else self.deferred).extend(range(begin, len(self.tokens)))


def _describe(error: BaseException) -> str:
    message = try_call(str, error)
    text = message if isinstance(message, str) else "(no message: its __str__ raised)"
    printable = text.encode(errors="replace").decode()
    return f"{type(error).__name__}: {textwrap.shorten(printable, _MAX_MESSAGE)}"
