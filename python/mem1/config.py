"""Every setting of the loop, as frozen dataclasses with the defaults of `mem1 train`."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from mem1_core.trajectory import Prune, Regime, check_prune


def _require(condition: bool, name: str, wanted: str, value: object) -> None:
    if not condition:
        raise ValueError(f"{name}: wanted {wanted}, got {value!r}")


def _require_rate(name: str, value: float) -> None:
    _require(math.isfinite(value) and value > 0, name, "a finite number > 0", value)


def _require_seconds(value: float | None) -> None:
    _require(value is None or value > 0, "seconds", "a number > 0 or None", value)


def _require_seed(value: int) -> None:
    # Samplers multiply it by a million, torch takes 64 bits; the warm start's episodes begin at 2**32.
    _require(0 <= value < 2**32, "seed", "an integer in [0, 2**32)", value)


def _require_objectives(value: tuple[int, int]) -> None:
    least, most = value
    _require(1 <= least <= most, "objectives", "1 <= least <= most", value)


@dataclass(frozen=True)
class ModelConfig:
    """A small decoder of the Qwen2 architecture with random weights."""

    layers: int = 4
    width: int = 128
    heads: int = 4
    kv_heads: int = 2
    mlp_width: int = 384
    max_positions: int = 32768
    rope_theta: float = 10000.0
    tie_embeddings: bool = True
    init_std: float = 0.06  # of the random weights; with the usual 0.02 copying is learned far later
    dtype: str = "float32"
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("layers", "width", "heads", "kv_heads", "mlp_width", "max_positions"):
            _require(getattr(self, name) >= 1, name, "an integer >= 1", getattr(self, name))
        _require(self.width % self.heads == 0, "width", f"a multiple of heads={self.heads}", self.width)
        _require(
            self.heads % self.kv_heads == 0, "heads", f"a multiple of kv_heads={self.kv_heads}", self.heads
        )
        _require_seed(self.seed)


@dataclass(frozen=True)
class RolloutConfig:
    """How trajectories are generated. Lengths are in tokens."""

    slots: int = 32  # trajectories generated side by side
    regime: Regime = "carry"  # "paper" rolls out as "reencode"
    prune: Prune = "action"  # "never": the full-context agent; a number of tokens: the truncating one
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0: no limit
    greedy: bool = False
    max_action: int = 192  # tokens of one action, tags included
    max_info: int = 512  # tokens of environment text in one turn, tags excluded
    max_prompt: int = 16384  # a longer one is an environment's error
    max_turns: int = 40
    prefill_tokens: int = 16384  # padded tokens of one prefill call
    env_timeout: float = (
        60.0  # seconds for one answer of an environment that is not `instant`, retries included
    )
    env_retries: int = 2  # after an OSError

    def __post_init__(self) -> None:
        for name in ("slots", "max_action", "max_prompt", "max_turns", "prefill_tokens"):
            _require(getattr(self, name) >= 1, name, "an integer >= 1", getattr(self, name))
        for name in ("top_k", "max_info", "env_retries"):
            _require(getattr(self, name) >= 0, name, "an integer >= 0", getattr(self, name))
        _require(self.regime in get_args(Regime), "regime", f"one of {get_args(Regime)}", self.regime)
        check_prune(self.prune)
        _require(
            1e-4 <= self.temperature < math.inf,
            "temperature",
            "a finite number >= 1e-4 (greedy=True for the arg max)",
            self.temperature,
        )
        _require(0 < self.top_p <= 1, "top_p", "0 < top_p <= 1", self.top_p)
        _require_rate("env_timeout", self.env_timeout)


@dataclass(frozen=True)
class WarmStartConfig:
    """Supervised steps on scripted trajectories before PPO.

    In a training run the world and the layout are those of the run: `train` sets objectives, hops,
    passage_tokens, regime and prune.
    """

    steps: int = 2000  # at most; whichever of steps and seconds comes first
    seconds: float | None = None
    batch_tokens: int = 1536
    learning_rate: float = 2e-3
    warmup_steps: int = 50
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    auxiliary: float = 0.4  # share of copy and dictionary look-up sequences, at the start
    objectives: tuple[int, int] = (1, 4)  # least and most questions of one episode
    hops: int = 2
    passage_tokens: int = 0
    regime: Regime = "carry"  # the layout that is trained on: that of the rollouts to come
    prune: Prune = "action"
    seed: int = 1

    def __post_init__(self) -> None:
        _require(self.steps >= 0, "steps", "an integer >= 0", self.steps)
        _require_seconds(self.seconds)
        _require_rate("learning_rate", self.learning_rate)
        _require(0 <= self.auxiliary <= 1, "auxiliary", "a share in [0, 1]", self.auxiliary)
        check_prune(self.prune)
        _require_objectives(self.objectives)
        _require_seed(self.seed)


@dataclass(frozen=True)
class PPOConfig:
    """Proximal policy optimisation; the defaults are the paper's except the learning rates, made for the
    small model.
    """

    gamma: float = 1.0
    lam: float = 1.0
    clip: float = 0.2
    value_clip: float = 0.5
    kl: float = 0.001
    kl_in: Literal["reward", "loss"] = "reward"  # taken from it where positive, or as k3 in the loss
    entropy: float = 0.001
    epochs: int = 1
    minibatch: int = 32  # trajectories of one optimiser step
    micro_tokens: int = 8192  # tokens of one forward, rounded up to a whole trajectory
    actor_lr: float = 1e-4
    critic_lr: float = 1e-3
    actor_warmup: int = 2  # optimiser steps until the full learning rate
    critic_warmup: int = 2
    critic_only: int = 2  # first updates in which only the critic learns
    max_grad_norm: float = 1.0

    def __post_init__(self) -> None:
        for name in ("epochs", "minibatch", "micro_tokens"):
            _require(getattr(self, name) >= 1, name, "an integer >= 1", getattr(self, name))
        _require(math.isfinite(self.kl) and self.kl >= 0, "kl", "a finite number >= 0", self.kl)
        _require(self.kl_in in ("reward", "loss"), "kl_in", "'reward' or 'loss'", self.kl_in)
        for name in ("actor_lr", "critic_lr"):
            _require_rate(name, getattr(self, name))


@dataclass(frozen=True)
class TrainConfig:
    """One training run: warm start, then PPO."""

    updates: int = 100  # PPO updates, at most; whichever of updates and seconds comes first
    seconds: float | None = None
    batch: int = 64  # trajectories of one update
    objectives: tuple[int, int] = (1, 4)  # least and most questions of one episode
    hops: int = 2
    passage_tokens: int = 0
    save_every: int = 20  # updates
    threads: int | None = None  # torch threads; None leaves torch's choice
    seed: int = 0
    model: ModelConfig = field(default_factory=ModelConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    warmstart: WarmStartConfig = field(default_factory=WarmStartConfig)
    ppo: PPOConfig = field(default_factory=PPOConfig)

    def __post_init__(self) -> None:
        for name in ("batch", "hops", "save_every"):
            _require(getattr(self, name) >= 1, name, "an integer >= 1", getattr(self, name))
        _require(self.updates >= 0, "updates", "an integer >= 0", self.updates)
        _require(
            self.threads is None or self.threads >= 1, "threads", "an integer >= 1 or None", self.threads
        )
        _require_seconds(self.seconds)
        _require_objectives(self.objectives)
        _require_seed(self.seed)

    def environment(self) -> dict[str, Any]:
        """Keyword arguments of the training environment."""
        return {"objectives": self.objectives, "hops": self.hops, "passage_tokens": self.passage_tokens}
