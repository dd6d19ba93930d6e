"""Agents on the same engine and weights: each is what it changes in the settings and in the environment.

`parse_agent` reads the short forms of the command line: a name, and a number where there is one to choose.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import partial
from importlib.util import find_spec
from typing import Any, ClassVar

from transformers import PreTrainedTokenizerBase

from mem1.checks import InputError, require
from mem1.config import RolloutConfig
from mem1.envs.base import Environment, ExpertAction, SampledEnvironment
from mem1.parsing.env_text import PlainEncoder
from mem1.parsing.tags import SUMMARY
from mem1.seeds import derive_seed
from mem1_core.eviction_policies import Compact, HideObservations, Truncate

MakeEnvironment = Callable[[], Environment]


@dataclass(frozen=True)
class Agent:
    """What an agent changes; a subclass of your own is one more. Its fields are integers >= 1.

    name: in tables. scripted: a script of the environment's writes instead of a policy.
    """

    name: ClassVar[str]
    scripted: ClassVar[bool] = False

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            require(isinstance(value, int) and value >= 1, field.name, "an integer >= 1", value)

    def __str__(self) -> str:
        return "=".join([self.name, *(str(getattr(self, field.name)) for field in fields(self))])

    def settings(self, config: RolloutConfig) -> RolloutConfig:
        """Those of the sampler."""
        return config

    def environments(
        self, make: MakeEnvironment, tokenizer: PreTrainedTokenizerBase, config: RolloutConfig
    ) -> MakeEnvironment:
        """What makes the environments that it plays in; `config` is what `settings` was given."""
        return make


@dataclass(frozen=True)
class Mem1(Agent):
    """Rewrites its internal state in each turn and forgets the turns before, by the rule and in the regime of
    the settings.
    """

    name = "mem1"


@dataclass(frozen=True)
class Mem1Reencode(Agent):
    """The same, with the pruned context encoded again after each prune, as serving engines do."""

    name = "mem1-reencode"

    def settings(self, config: RolloutConfig) -> RolloutConfig:
        return replace(config, regime="reencode")


@dataclass(frozen=True)
class FullContext(Agent):
    """Forgets nothing."""

    name = "full-context"

    def settings(self, config: RolloutConfig) -> RolloutConfig:
        return replace(config, prune="never")


@dataclass(frozen=True)
class Truncation(Agent):
    """Keeps the prompt and the newest turns, of at most `tokens` tokens."""

    name = "truncate"
    tokens: int = 1024

    def settings(self, config: RolloutConfig) -> RolloutConfig:
        return replace(config, prune=Truncate(self.tokens))


@dataclass(frozen=True)
class LastObservations(Agent):
    """Keeps all that it wrote, and the observations of the last `turns` turns."""

    name = "last-observations"
    turns: int = 1

    def settings(self, config: RolloutConfig) -> RolloutConfig:
        return replace(config, prune=HideObservations(self.turns))


@dataclass(frozen=True)
class RunningSummary(Agent):
    """Keeps everything until there are more than `tokens` live tokens; then all goes but its newest state. In
    a format without one it is asked for a summary, which takes the place of all that was written so far.
    """

    name = "running-summary"
    tokens: int = 1024

    def settings(self, config: RolloutConfig) -> RolloutConfig:
        if config.format.state is not None:
            return replace(config, prune=Compact(self.tokens))
        action = SUMMARY.action("summary")
        assert action is not None
        own = (one for one in config.format.actions if one.kind != "summary")
        tags = replace(config.format, actions=(*own, action), context_request=SUMMARY.context_request)
        return replace(config, format=tags, prune="summary", context_limit=self.tokens)


@dataclass(frozen=True)
class ExternalMemory(Agent):
    """Sees one turn at a time, as MEM1; each observation becomes a note outside of the context, and `notes`
    of these come back with every observation (after A-MEM, arXiv 2502.12110; its tokens count).
    """

    name = "external-memory"
    notes: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        require(find_spec("bm25s") is not None, "agents", "bm25s (mem1_core[retrieval]) for its notes", None)

    def settings(self, config: RolloutConfig) -> RolloutConfig:
        return replace(config, prune="action", max_info_tokens=(1 + self.notes) * config.max_info_tokens)

    def environments(
        self, make: MakeEnvironment, tokenizer: PreTrainedTokenizerBase, config: RolloutConfig
    ) -> MakeEnvironment:
        from mem1.evaluation.baselines.external_memory import MemoryEnvironment  # which wants bm25s

        cut = partial(PlainEncoder(tokenizer).head, limit=config.max_info_tokens)
        return lambda: MemoryEnvironment(make(), self.notes, cut)


@dataclass(frozen=True)
class Oracle(Agent):
    """The environment's expert: what can be had."""

    name = "oracle"
    scripted = True


@dataclass(frozen=True)
class RandomActions(Agent):
    """One of the possible actions, whichever: what can be had for nothing."""

    name = "random"
    scripted = True

    def environments(
        self, make: MakeEnvironment, tokenizer: PreTrainedTokenizerBase, config: RolloutConfig
    ) -> MakeEnvironment:
        return lambda: _AtRandom(make())


class _AtRandom:
    """An environment whose expert acts at random, as the seed of the episode has it."""

    def __init__(self, environment: Any) -> None:
        self._environment: SampledEnvironment = environment

    def __getattr__(self, name: str) -> Any:
        return getattr(self._environment, name)

    def reset(self, seed: int, task: Any = None) -> Any:
        self._rng = random.Random(derive_seed(seed, "sampling"))
        return self._environment.reset(seed, task)

    def expert_action(self) -> ExpertAction:
        return self._environment.random_action(self._rng)


AGENTS: tuple[type[Agent], ...] = (
    *(Mem1, Mem1Reencode, FullContext, Truncation, LastObservations, RunningSummary, ExternalMemory),
    *(Oracle, RandomActions),
)


def parse_agent(text: str) -> Agent:
    """The agent of a short form: "mem1", "truncate" or "truncate=512". InputError for any other text."""
    name, equals, number = text.partition("=")
    for agent in AGENTS:
        if agent.name == name and (not equals or (fields(agent) and re.fullmatch(r"[0-9]{1,9}", number))):
            return agent(*([int(number)] if equals else []))
    forms = ", ".join(agent.name + "[=N]" * len(fields(agent)) for agent in AGENTS)
    raise InputError(f"agents: expected one of {forms}, got {text!r}")
