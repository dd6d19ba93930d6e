"""Every setting of the loop, as frozen dataclasses with the defaults of `mem1 train`; `config_files` has them
as YAML and on the command line.

All are checked when they are made: InputError names the field.
"""

from __future__ import annotations

import json
import operator
from dataclasses import asdict, dataclass, field, replace
from types import NoneType
from typing import Any, Literal, get_args

from mem1.checks import (
    InputError,
    require,
    require_choice,
    require_flags,
    require_integers,
    require_numbers,
)
from mem1.parsing.tags import MEM1, ChatMode, TagFormat
from mem1.seeds import LARGEST
from mem1_core.eviction_policies import (
    EvictionPolicy,
    Never,
    Recorded,
    resolve_policy,
    rule_name,
)
from mem1_core.layout import Regime

TRACKERS = ("tensorboard", "wandb", "trackio")
Algorithm = Literal["ppo", "grpo", "rloo", "reinforce"]
ALGORITHMS: tuple[str, ...] = get_args(Algorithm)
DTYPES = ("auto", "float32", "bfloat16", "float16")


def _recorded(name: str, value: Any) -> dict[str, Any]:
    """A dict as it can be kept on record: numbers of numpy become Python's."""
    require(isinstance(value, dict), name, "a dict of arguments", value)

    def plain(x: Any) -> Any:
        if isinstance(x, dict):
            return {key: plain(part) for key, part in x.items()}
        if isinstance(x, (tuple, list)):
            return type(x)(map(plain, x))
        return x.item() if getattr(x, "ndim", None) == 0 else x

    arguments: dict[str, Any] = plain(value)
    try:
        json.dumps(arguments, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise InputError(f"{name}: expected arguments that JSON has, got {value!r}: {error}") from None
    return arguments


@dataclass(frozen=True)
class ModelConfig:
    """A decoder of the Qwen2 architecture, by default a small one.

    Without `TrainConfig.init` its weights are random; beside it, what that model has to be (and, where it is
    not on this machine, what `mem1 plan` takes it for).
    """

    vocab_size: int | None = None  # rows of the embedding; None: the tokens that the tokenizer has

    num_hidden_layers: int = 4
    hidden_size: int = 128
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    intermediate_size: int = 384
    max_position_embeddings: int = 65536
    rope_theta: float = 10000.0
    tie_word_embeddings: bool = True
    initializer_range: float = 0.06  # of the random weights; with the usual 0.02 copying is learned far later
    # Scores by which the heads of the first layer begin by looking one or two tokens back; 0: they look
    # anywhere, and looking things up is learned far later.
    look_back: float = 20.0
    dtype: str = "auto"  # of the weights: float32, or as a loaded model was saved

    def __post_init__(self) -> None:
        require_integers(
            self,
            "num_hidden_layers hidden_size num_attention_heads num_key_value_heads intermediate_size "
            "max_position_embeddings",
            1,
        )
        if self.vocab_size is not None:
            require_integers(self, "vocab_size", 1)
        require_numbers(self, "rope_theta initializer_range", above=True)
        require_numbers(self, "look_back", 0.0, 100.0)
        require_flags(self, "tie_word_embeddings")
        require_choice(self, "dtype", DTYPES)
        heads, groups = self.num_attention_heads, self.num_key_value_heads
        require(
            self.hidden_size % (2 * heads) == 0,
            "hidden_size",
            f"a multiple of 2 * num_attention_heads={heads}",
            self.hidden_size,
        )
        require(
            heads % groups == 0, "num_attention_heads", f"a multiple of num_key_value_heads={groups}", heads
        )


@dataclass(frozen=True)
class RolloutConfig:
    """How trajectories are generated. Lengths are in tokens."""

    num_slots: int = 32  # trajectories generated side by side, or fewer where `kv_memory` is less
    regime: Regime = "carry"  # "paper" rolls out as "reencode"
    prune: EvictionPolicy = "action"  # which segments leave when: see mem1_core.eviction.evict_from_segments
    format: TagFormat = MEM1
    chat: ChatMode = "raw"  # how a task stands in the stream: see mem1.parsing.codec.Codec
    system: str | None = None  # the system message of a chat
    observation_role: str = "user"  # of observations in a chat of turns
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0: no limit
    greedy: bool = False
    max_prompt_tokens: int = 4096  # a longer one is an environment's error
    max_action_tokens: int = 192  # what the policy writes in one turn, state included
    max_state_tokens: int | None = None  # its state, where that is to be shorter
    max_info_tokens: int = 512  # what the environment writes in one turn, tags, hints and template included
    max_turns: int = 40
    context_limit: int | None = None  # live tokens beyond which the policy is told `format.context_request`
    # What is being written goes on while longer texts are read, so many tokens of these in one step.
    max_num_batched_tokens: int = 1024
    kv_memory: float = 0.6  # for the KV cache: a share of what is free, or bytes from 2 on
    env_timeout: float = (
        60.0  # seconds for one answer of an environment that is not `run_inline`, with retries
    )
    env_retries: int = 2  # of a call, after an error that the environment calls worth one
    episode_retries: int = 2  # of a whole episode, from its seed, after an environment's error
    # Wait for every environment before each step: a token's batch, and so its rounding, then follows from the
    # seeds alone, at the price of the slowest environment.
    synchronous: bool = False

    def __post_init__(self) -> None:
        require_integers(
            self,
            "num_slots max_prompt_tokens max_action_tokens max_info_tokens max_turns max_num_batched_tokens",
            1,
        )
        require_integers(self, "top_k env_retries episode_retries", 0)
        for name in ("max_state_tokens", "context_limit"):
            if getattr(self, name) is not None:
                require_integers(self, name, 1)
        require_flags(self, "greedy synchronous")
        require_choice(self, "regime", get_args(Regime))
        require_choice(self, "chat", get_args(ChatMode))
        require(isinstance(self.format, TagFormat), "format", "a TagFormat", self.format)
        asks = self.context_limit is None or bool(self.format.context_request)
        require(asks, "context_limit", "None for a format without context_request", self.context_limit)
        if hasattr(self.prune, "__index__") and not isinstance(self.prune, bool):  # numpy's numbers
            object.__setattr__(self, "prune", operator.index(self.prune))
        try:
            rule = resolve_policy(self.prune)
        except ValueError as error:
            raise InputError(str(error)) from None
        require(not isinstance(self.prune, Recorded), "prune", "a rule for all trajectories", self.prune)
        missing = set(getattr(rule, "kinds", ())) - {action.kind for action in self.format.actions}
        if missing:
            expected = f"a format with an action of kind {' and '.join(sorted(missing))}"
            raise InputError(f"prune: expected {expected} for {self.prune_name!r}, got {self.format}")
        require_numbers(self, "temperature", 1e-4)  # less is `greedy`
        require_numbers(self, "top_p", 0.0, 1.0, above=True)
        require_numbers(self, "env_timeout kv_memory", above=True)
        share = self.kv_memory <= 1 or self.kv_memory >= 2
        require(share, "kv_memory", "a share of at most 1, or bytes from 2 on", self.kv_memory)

    @property
    def prune_name(self) -> str | int:
        """The rule as it is written in files and messages."""
        return rule_name(self.prune)

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it; a rule of forgetting that is a function, by its name."""
        return asdict(replace(self, prune="action")) | {"prune": self.prune_name}

    def peak_tokens(self) -> int:
        """The most tokens of an episode that can be live at once: what a slot of the KV cache must hold."""
        limits = self.max_prompt_tokens, self.max_action_tokens, self.max_info_tokens, self.max_turns
        peak = getattr(resolve_policy(self.prune), "peak_tokens", Never().peak_tokens)
        return int(peak(*limits))

    def positions(self) -> int:
        """How many positions an episode can come to need: what a model's `max_position_embeddings` must
        allow.

        Positions run on through all turns, but where the context is encoded again: there they are those of
        the live tokens.
        """
        return self.peak_tokens() if self.regime == "reencode" else replace(self, prune="never").peak_tokens()


def default_steps(init: str | None) -> int:
    """Of the warm start of a model with random weights, or of one that is loaded."""
    return 2000 if init is None else 0


@dataclass(frozen=True)
class WarmStartConfig:
    """Supervised steps on expert trajectories before PPO."""

    steps: int | None = None  # None: `default_steps`
    batch_tokens: int = 1536
    learning_rate: float = 2e-3
    warmup_steps: int = 50
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    regimes: tuple[Regime, ...] = ()  # how steps lay episodes out, by turns; (): as rollouts do
    auxiliary_fraction: float = 0.4  # share of copy and look-up exercises, at the start
    growth: float = (
        0.5  # share of the steps in which the most questions of an episode grow to the range's end
    )
    save_every: int = 500  # steps

    def __post_init__(self) -> None:
        require_integers(self, "warmup_steps" if self.steps is None else "steps warmup_steps", 0)
        require_integers(self, "batch_tokens save_every", 1)
        require_numbers(self, "max_grad_norm", above=True)
        require_numbers(self, "learning_rate", 0.0, 1.0, above=True)
        require_numbers(self, "weight_decay")
        require_numbers(self, "auxiliary_fraction growth", 0.0, 1.0)
        for regime in self.regimes:
            require(regime in get_args(Regime), "regimes", f"any of {', '.join(get_args(Regime))}", regime)


@dataclass(frozen=True)
class AlgorithmConfig:
    """How an update learns from a batch of episodes; the defaults are the paper's PPO except the learning
    rates, made for the small model. `mem1.train.advantages` has the formulas.
    """

    name: Algorithm = "ppo"  # all but the first without a critic
    gamma: float = 1.0  # of ppo, as lam
    lam: float = 1.0
    group_std: bool = True  # grpo: divide by the standard deviation of a group
    critic: Literal["own", "shared"] = "own"  # of ppo: a trunk of its own, or a head on the policy's
    value_coef: float = 0.1  # weight of a shared trunk's value loss beside the policy's
    whiten: bool | None = None  # advantages, over the batch's tokens; None: where the algorithm does, ppo
    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float | None = None  # how often -A the loss of a bad token can be; usually 3
    value_clip: float = 0.5
    kl_coef: float = 0.001
    kl_placement: Literal["reward", "loss"] = "reward"  # taken from it where positive, or in the loss
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"  # in the loss
    entropy_coef: float = 0.001
    state_weight: float = 1.0  # of advantages of tokens of the state, and of actions
    action_weight: float = 1.0
    format_reward: float = 0.0  # for an episode without an invalid action, less its share of these
    epochs: int = 1
    mini_batch_size: int = 32  # trajectories of one optimiser step
    max_tokens_per_micro_batch: int = 8192  # tokens of one forward, rounded up to a whole trajectory
    actor_lr: float = 1e-4
    critic_lr: float = 1e-3
    actor_lr_warmup_steps: int = 2  # optimiser steps until the full learning rate
    critic_lr_warmup_steps: int = 2
    critic_only_updates: int = 2  # first updates in which only the critic learns
    max_grad_norm: float = 1.0
    freeze_embeddings: bool = False  # of actor and critic; with them an output layer that is tied to them
    # An episode that the turn limit ended, or its environment before the task was over: False, its rewards
    # are all; True, the critic's value of what would have followed is added to the last one.
    bootstrap_turn_limit: bool = False
    # Truncated importance weights, for tokens that top_p, top_k or stale weights drew from another
    # distribution than the one trained on: the most that a weight can be. None: no weights.
    rollout_is_cap: float | None = None

    def __post_init__(self) -> None:
        require_choice(self, "name", ALGORITHMS)
        require_integers(self, "epochs mini_batch_size max_tokens_per_micro_batch", 1)
        require_integers(self, "actor_lr_warmup_steps critic_lr_warmup_steps critic_only_updates", 0)
        require_numbers(self, "gamma lam", 0.0, 1.0)
        require_numbers(self, "clip_low", 0.0, 1.0, above=True)
        require_numbers(self, "clip_high")
        require_numbers(self, "value_clip max_grad_norm", above=True)
        require_numbers(self, "actor_lr critic_lr", 0.0, 1.0, above=True)
        require_numbers(self, "value_coef kl_coef entropy_coef state_weight action_weight")
        require_numbers(self, "format_reward", -1e6, 1e6)
        require_choice(self, "critic", ("own", "shared"))
        require_choice(self, "kl_placement", ("reward", "loss"))
        require_choice(self, "kl_estimator", ("k1", "k2", "k3"))
        require_flags(self, "bootstrap_turn_limit group_std freeze_embeddings")
        if self.whiten is None:
            object.__setattr__(self, "whiten", self.name == "ppo")
        require_flags(self, "whiten")
        for name, low in (("rollout_is_cap", 0.0), ("dual_clip", 1.0)):
            if getattr(self, name) is not None:
                require_numbers(self, name, low, above=True)
        critic = self.name == "ppo" or not self.bootstrap_turn_limit
        require(critic, "bootstrap_turn_limit", f"False for {self.name}, which has no critic", True)


@dataclass(frozen=True)
class LoraConfig:
    """Adapters in the place of all weights (`mem1.models.adapters`), of actor and critic."""

    rank: int = 0  # 0: none, all weights learn
    alpha: float = 32.0  # what they add is multiplied by alpha / rank
    target_modules: str | tuple[str, ...] = "all-linear"  # but for the output layer; or names of layers

    def __post_init__(self) -> None:
        require_integers(self, "rank", 0)
        require_numbers(self, "alpha", above=True)
        names = self.target_modules
        listed = (
            isinstance(names, (list, tuple)) and len(names) > 0 and all(isinstance(n, str) for n in names)
        )
        require(listed or isinstance(names, str), "target_modules", "'all-linear' or names", names)
        object.__setattr__(self, "target_modules", names if isinstance(names, str) else tuple(names))


@dataclass(frozen=True)
class ScaleConfig:
    """How a model that learns is laid out in memory. None of it but `max_wait` changes what is learned."""

    ranks: int | None = None  # processes, each with a GPU of its own, that a run is made for; None: any
    replicas: int = 1  # of all that is in parts, each over ranks / replicas (HSDP): a node's, as a rule
    activation_checkpointing: bool = False  # activations of a layer are computed again in the backward
    cpu_offload: bool = False  # parameters and states wait in the host's memory; CUDA, several ranks
    background_saves: bool = False  # of checkpoints, from a copy in the host's memory
    # Seconds from when a first rank has played its episodes until the others leave out those that are not
    # over; None: as long as it takes.
    max_wait: float | None = None
    tflops: float | None = None  # the peak of a GPU, for the share of it; None: of those that are known
    gpu_memory: float = 80.0  # of a GPU, in GB, for plans

    def __post_init__(self) -> None:
        require_integers(self, "replicas", 1)
        require_numbers(self, "gpu_memory", 0.001, 1e6)
        for name in ("max_wait", "tflops"):
            if getattr(self, name) is not None:
                require_numbers(self, name, above=True)
        if self.ranks is not None:
            require_integers(self, "ranks", 1)
            whole_nodes = self.ranks % self.replicas == 0
            require(whole_nodes, "replicas", f"a divisor of ranks={self.ranks}", self.replicas)
        require_flags(self, "activation_checkpointing cpu_offload background_saves")


@dataclass(frozen=True)
class TrainConfig:
    """One training run: warm start, then updates on episodes of the policy."""

    init: str | None = None  # a folder or an id to start from, in place of random weights
    max_updates: int = 100
    batch_size: int = 64  # trajectories of one update
    group_size: int = 1  # of these, how many play the same task
    environment: dict[str, Any] = field(default_factory=dict)  # what it is made with, kept with the run
    evaluate_every: int = 0  # updates; 0: never
    evaluation_episodes: int = 64  # that nobody is trained on, sampled as in training
    save_every: int = 20  # updates
    keep: int = 2  # checkpoints: the newest ones, and the best
    max_failed: float = 0.5  # share of a batch's episodes that may fail for good before the run stops
    trackers: tuple[str, ...] = ()  # beside metrics.jsonl: tensorboard, wandb, trackio
    device: str = "auto"  # "auto": the first CUDA device if there is one, else the CPU
    threads: int | None = None  # torch threads; None leaves torch's choice
    seed: int = 0
    model: ModelConfig = field(default_factory=ModelConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    warmstart: WarmStartConfig = field(default_factory=WarmStartConfig)
    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    scale: ScaleConfig = field(default_factory=ScaleConfig)

    def __post_init__(self) -> None:
        require_integers(self, "batch_size group_size evaluation_episodes save_every keep", 1)
        whole = self.batch_size % self.group_size == 0
        require(whole, "batch_size", f"a multiple of group_size={self.group_size}", self.batch_size)
        grouped = self.algorithm.name not in ("grpo", "rloo") or self.group_size > 1
        require(grouped, "group_size", f"at least 2 for {self.algorithm.name}", self.group_size)
        require_integers(self, "max_updates evaluate_every", 0)
        require(isinstance(self.init, (str, NoneType)), "init", "a folder or an id", self.init)
        learned = self.init is not None or not self.lora.rank
        require(learned, "lora.rank", "0 without init: random weights are nothing to adapt", self.lora.rank)
        alone = not (self.lora.rank and self.warmstart_steps)
        require(alone, "lora.rank", "0 beside warmstart.steps, in which all weights learn", self.lora.rank)
        require_integers(self, "seed", 0, LARGEST - 1)
        require_numbers(self, "max_failed", 0.0, 1.0)
        require(isinstance(self.device, str), "device", "'auto' or the name of a torch device", self.device)
        if self.threads is not None:
            require_integers(self, "threads", 1, 4096)
        known = isinstance(self.trackers, (tuple, list)) and all(name in TRACKERS for name in self.trackers)
        require(known, "trackers", f"some of {', '.join(TRACKERS)}", self.trackers)
        object.__setattr__(self, "trackers", tuple(self.trackers))
        object.__setattr__(self, "environment", _recorded("environment", self.environment))
        require(not self.rollout.greedy, "greedy", "False in training, which learns from samples", True)

    @property
    def warmstart_steps(self) -> int:
        """`warmstart.steps`, or what stands for None."""
        return default_steps(self.init) if self.warmstart.steps is None else self.warmstart.steps

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it; a rule of forgetting that is a function, by its name."""
        return asdict(replace(self, rollout=replace(self.rollout, prune="action"))) | {
            "rollout": self.rollout.to_dict()
        }
