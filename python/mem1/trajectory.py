"""A finished trajectory: what a rollout yields and what the trainer, the evaluation and the plots read."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from mem1_core.layout import TrajectoryLayout
from mem1_core.trajectory import Prune, Regime, Segment, TrajectoryMask, dependency_length, policy_tokens


@dataclass
class Trajectory:
    """The tokens of one episode, who wrote them, and what came of it.

    tokens: int64 [n]. segments: kind, turn and length of each run of tokens, in order; their lengths sum to
    n.
    logprobs: float32 [n], the log-probability with which each policy token was sampled (at the sampling
    temperature, over the full vocabulary); 0 for tokens of the environment. prune: the rule under which it
    was rolled out.
    """

    tokens: Tensor
    segments: list[Segment]
    logprobs: Tensor
    prune: Prune
    score: dict[str, float] = field(default_factory=dict)
    finished: str = "answered"  # why it ended
    seconds: float = 0.0  # wall time from the first to the last token, in a batch with others
    objectives: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        n = self.tokens.numel()
        total = sum(segment.length for segment in self.segments)
        if total != n:
            raise ValueError(f"segments: wanted lengths that sum to the {n} tokens, got {total}")
        if self.logprobs.shape != self.tokens.shape:
            raise ValueError(f"logprobs: wanted shape {[n]}, got {list(self.logprobs.shape)}")

    @cached_property
    def mask(self) -> TrajectoryMask:
        """What each token saw when it was made: the table that also drove the pruning of the KV cache."""
        return TrajectoryMask.from_turns(self.segments, prune=self.prune)

    @cached_property
    def policy_mask(self) -> Tensor:
        """bool [n]: tokens written by the policy."""
        return policy_tokens(self.segments)

    @property
    def turns(self) -> int:
        return max((segment.turn for segment in self.segments), default=0)

    @property
    def reward(self) -> float:
        return self.score.get("reward", 0.0)

    def layout(self, regime: Regime = "carry") -> TrajectoryLayout:
        """The stream on which a trainer recomputes this trajectory's log-probs."""
        return TrajectoryLayout.from_turns(self.segments, regime=regime, prune=self.prune)

    def peak_tokens(self, prompt: bool = True) -> int:
        """The most tokens that are live at once; without the prompt's own if `prompt` is False."""
        return int(self.mask.peak_tokens(prompt=prompt))

    def dependency_length(self) -> float:
        """Sum over actions of (context + length / 2) * length, in token pairs (see mem1_core.trajectory)."""
        return dependency_length(self.segments, self.prune)

    def to_dict(self) -> dict[str, Any]:
        """Plain lists and numbers, for one line of trajectories.jsonl."""
        return {
            "seed": self.seed,
            "objectives": self.objectives,
            "finished": self.finished,
            "score": self.score,
            "prune": self.prune,
            "seconds": self.seconds,
            "peak_tokens": self.peak_tokens(),
            "dependency_length": self.dependency_length(),
            "segments": [list(segment) for segment in self.segments],
            "tokens": self.tokens.tolist(),
            "logprobs": self.logprobs.tolist(),
        }

    def to_json(self) -> str:
        """`to_dict` on one line."""
        return json.dumps(self.to_dict())

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Trajectory:
        """The inverse of `to_dict`."""
        return cls(
            tokens=torch.tensor(data["tokens"], dtype=torch.int64),
            segments=[Segment(*segment) for segment in data["segments"]],
            logprobs=torch.tensor(data["logprobs"], dtype=torch.float32),
            **{name: data[name] for name in ("seed", "objectives", "finished", "score", "prune", "seconds")},
        )
