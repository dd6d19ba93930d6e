"""A finished trajectory: what a rollout yields and what the trainer, the evaluation and the plots read."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from enum import Enum
from functools import cache, cached_property
from typing import Any, NamedTuple, get_type_hints

import torch
from torch import Tensor

from mem1.checks import has_type, require
from mem1_core.eviction import dependency_length, eviction_table
from mem1_core.eviction_policies import EvictionPolicy, Recorded, short_form
from mem1_core.layout import Regime, TrajectoryLayout
from mem1_core.mask import TrajectoryMask
from mem1_core.segments import Segment, policy_tokens


class FinishReason(str, Enum):
    """Why an episode is over; compares and prints as its value."""

    ANSWERED = "answered"
    ENVIRONMENT = "environment"  # which said so, without an answer
    TRUNCATED = "truncated"  # by the environment: the task was not over
    TURN_LIMIT = "turn_limit"
    END_OF_TURN = "end_of_turn"  # the policy ended its message without a complete action
    # The environment raised, took too long, or gave something else than the protocol asks for. Such an
    # episode has reward 0 and says nothing about the policy.
    ENVIRONMENT_ERROR = "environment_error"
    POLICY_ERROR = "policy_error"  # its numbers were not finite

    def __str__(self) -> str:
        return self.value


# Ends that say nothing of what would have followed.
CUT_OFF = (FinishReason.TURN_LIMIT, FinishReason.TRUNCATED)


class TokenReward(NamedTuple):
    """A reward, and the token of the stream behind which it came."""

    token: int
    reward: float


class Failure(NamedTuple):
    """An attempt at an episode that the environment ended, before the one that counts."""

    error_kind: str  # the name of the exception's type
    turns: int
    tokens: int


@dataclass
class Trajectory:
    """The tokens of one episode, who wrote them, and what came of it. A line of JSON has all that training on
    it takes.

    tokens: int64 [n]. segments: kind, turn and length of each run of tokens, in order; their lengths sum to
    n.
    logprobs: float32 [n], the log-probability of each policy token at the sampling temperature, over the full
    vocabulary: what a trainer recomputes. rollout_logprobs: float32 [n], that with which it was drawn: from
    what `top_k` and `top_p` left, scaled to a sum of 1; 0 for a token of `greedy`, which was certain; None:
    the same. Both 0 for tokens of the environment.
    rewards: those that are not 0, in order; each counts for the last token that the policy wrote up to its
    own. score: the other numbers that the environment reported, the latest of each.
    prune, regime, temperature, top_p, top_k, greedy: the rules under which it was rolled out.
    """

    tokens: Tensor
    segments: list[Segment]
    logprobs: Tensor
    prune: EvictionPolicy
    rewards: list[TokenReward] = field(default_factory=list)
    score: dict[str, float] = field(default_factory=dict)
    finish_reason: FinishReason = FinishReason.ANSWERED
    error: str = ""  # what went wrong, as in "TimeoutError: no answer in 60 s"
    seconds: float = 0.0  # wall time from the environment's reset to the end, in a batch with others
    objectives: int = 1
    task: str = ""  # the id of the row that was played, "" where the seed is all there is
    seed: int = 0
    regime: Regime = "carry"
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    greedy: bool = False
    sampling_seed: int = 0
    model: str = ""  # the name of the policy, or the path of its weights
    rollout_logprobs: Tensor | None = None
    failures: list[Failure] = field(default_factory=list)  # earlier attempts at this episode
    notes: dict[str, Any] = field(default_factory=dict)  # what the environment reported beside numbers
    invalid_turns: list[int] = field(default_factory=list)  # malformed, or called invalid by the environment
    model_tokens: int = 0  # that went through the model; those of a prompt that another read, not

    def __post_init__(self) -> None:
        self.finish_reason = FinishReason(self.finish_reason)
        n = self.tokens.numel()
        total = sum(segment.length for segment in self.segments)
        if total != n:
            raise ValueError(f"segments: expected lengths that sum to the {n} tokens, got {total}")
        for name in ("logprobs", "rollout_logprobs"):
            value = getattr(self, name)
            if value is not None and value.shape != self.tokens.shape:
                raise ValueError(f"{name}: expected shape {[n]}, got {list(value.shape)}")
        for token, _ in self.rewards:
            if not 0 <= token < n:
                raise ValueError(f"rewards: expected tokens from 0 to {n - 1}, got {token}")

    @property
    def error_kind(self) -> str:
        """What went wrong, by kind: "" for a sound episode, "policy", or the type of the environment's
        exception, as in "TimeoutError".
        """
        if self.finish_reason == FinishReason.POLICY_ERROR:
            return "policy"
        if self.finish_reason == FinishReason.ENVIRONMENT_ERROR:
            return self.error.partition(":")[0]
        return ""

    @property
    def invalid_actions(self) -> int:
        """How many turns had no valid action."""
        return len(self.invalid_turns)

    @cached_property
    def mask(self) -> TrajectoryMask:
        """What each token saw when it was made: the table that also drove the pruning of the KV cache."""
        return self.layout().mask

    @cached_property
    def _layouts(self) -> dict[str, TrajectoryLayout]:
        return {}

    @cached_property
    def policy_mask(self) -> Tensor:
        """bool [n]: tokens written by the policy."""
        return policy_tokens(self.segments)

    @property
    def turns(self) -> int:
        return max((segment.turn for segment in self.segments), default=0)

    @property
    def reward(self) -> float:
        """The sum of the rewards."""
        return math.fsum(reward for _, reward in self.rewards)

    def policy_rewards(self) -> Tensor:
        """float32 [policy tokens]: what came behind each, environment text between them or not.

        Raises ValueError for a reward before the policy's first token.
        """
        written = self.policy_mask.long().cumsum(0)
        rewards = torch.zeros(int(self.policy_mask.sum()), dtype=torch.float64)
        for token, reward in self.rewards:
            place = int(written[token]) - 1
            if place < 0:
                raise ValueError(f"rewards: expected none before the policy's first token, got token {token}")
            rewards[place] += reward
        return rewards.float()

    def layout(self, regime: Regime = "carry") -> TrajectoryLayout:
        """The stream on which a trainer recomputes this trajectory's log-probs; made once."""
        if regime not in self._layouts:
            made = TrajectoryLayout.from_segments(self.segments, regime=regime, prune=self.prune)
            self._layouts[regime] = made
        return self._layouts[regime]

    def peak_tokens(self, prompt: bool = True) -> int:
        """The most tokens that are live at once; without the prompt's own if `prompt` is False."""
        return int(self.mask.peak_tokens(prompt=prompt))

    def dependency_length(self, prompt: bool = True) -> float:
        """The paper's measure of attention work, in token pairs (see mem1_core.eviction); the official
        definition, which leaves the prompt out of the context, if `prompt` is False.
        """
        return dependency_length(self.segments, self.prune, prompt=prompt)

    def to_dict(self) -> dict[str, Any]:
        """Plain lists and numbers, for one line of trajectories.jsonl."""
        rollout_logprobs = self.rollout_logprobs
        return {
            **{name: getattr(self, name) for name in _PLAIN},
            # Of a function of one's own, what it has decided: any program can read that.
            "prune": short_form(self.prune) or asdict(eviction_table(self.segments, self.prune).recorded()),
            "finish_reason": self.finish_reason.value,
            "reward": self.reward,
            "invalid_actions": self.invalid_actions,
            "rewards": [list(reward) for reward in self.rewards],
            "peak_tokens": self.peak_tokens(),
            "dependency_length": self.dependency_length(),
            "failures": [failure._asdict() for failure in self.failures],
            "segments": [list(segment) for segment in self.segments],
            "tokens": self.tokens.tolist(),
            "logprobs": self.logprobs.tolist(),
            "rollout_logprobs": None if rollout_logprobs is None else rollout_logprobs.tolist(),
        }

    def to_json(self) -> str:
        """`to_dict` on one line."""
        return json.dumps(self.to_dict())

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Trajectory:
        """The inverse of `to_dict`. KeyError, TypeError or ValueError for what cannot be one."""
        rollout_logprobs, prune = data.get("rollout_logprobs"), data["prune"]
        plain = [name for name in _PLAIN if name in data]
        for name in plain:
            require(has_type(data[name], _hints()[name]), name, str(cls.__annotations__[name]), data[name])
        fits = has_type(data["rewards"], list[tuple[int, float]])
        require(fits, "rewards", "pairs of a token and a reward", data["rewards"])
        return cls(
            tokens=torch.tensor(data["tokens"], dtype=torch.int64),
            segments=[Segment(*segment) for segment in data["segments"]],
            logprobs=torch.tensor(data["logprobs"], dtype=torch.float32),
            rollout_logprobs=None if rollout_logprobs is None else torch.tensor(rollout_logprobs),
            rewards=[TokenReward(*reward) for reward in data["rewards"]],
            failures=[Failure(**failure) for failure in data.get("failures", [])],
            finish_reason=FinishReason(data["finish_reason"]),
            prune=Recorded(tuple(prune["lifetimes"]), prune["rule"]) if isinstance(prune, dict) else prune,
            **{name: data[name] for name in plain},
        )


@cache
def _hints() -> dict[str, Any]:
    return get_type_hints(Trajectory)


# The fields that are as they are in JSON.
_PLAIN = (
    *("task", "seed", "sampling_seed", "model", "objectives", "error", "score", "notes", "seconds"),
    *("regime", "temperature", "top_p", "top_k", "greedy", "invalid_turns", "model_tokens"),
)
