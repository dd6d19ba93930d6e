"""A MEM1 agent as an object: load it, let it work in an environment, or give it a question and a tool."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from mem1.checks import InputError, require
from mem1.config import RolloutConfig
from mem1.envs.adapters.tool_env import ToolEnvironment
from mem1.envs.base import Environment
from mem1.rollout.rollout_loop import make_engine, rollout
from mem1.runtime.waiting import share_cpus
from mem1.train import checkpoint
from mem1.trajectory import Trajectory


class Reply(NamedTuple):
    """`text` is None if the agent gave no answer; `trajectory.finish_reason` then says why."""

    text: str | None
    trajectory: Trajectory


class MemoryEfficientAgent:
    """A policy that forgets all but its own notes.

        agent = MemoryEfficientAgent("mem1-tiny")
        trajectory = agent.run(MultiHopEnv(objectives=4, facts=4), seed=7)
        reply = agent.answer(
            "answer these questions in order , a name each : 17 ada boss teacher .", tool=look_up
        )

    model: the name of a model of the package, the folder of a run of `mem1 train`, any folder or id of the
    Hugging Face format (`mem1.train.checkpoint.load`); or a causal language model with attention "mem1", and
    any fast tokenizer beside it.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: PreTrainedTokenizerBase | None = None,
        config: RolloutConfig | None = None,
    ) -> None:
        if isinstance(model, (str, os.PathLike)):
            require(
                tokenizer is None,
                "tokenizer",
                "none beside the name of a model, which has its own",
                tokenizer,
            )
            model, tokenizer, _ = checkpoint.load(model)
        if tokenizer is None:
            raise InputError("tokenizer: expected one beside a model, got none")
        self.model, self.tokenizer = model, tokenizer
        # The environment is the caller's one object: nothing is played again in it.
        self.config = replace(config or RolloutConfig(), num_slots=1, episode_retries=0)
        self._engine = make_engine(model, self.config, 1)

    def run(self, environment: Environment, seed: int = 0, task: Any = None) -> Trajectory:
        """One episode at a time. The same seed gives the same episode and the same samples. The environment
        is the caller's to close.
        """
        make, engine = (lambda: _Lent(environment)), self._engine
        tasks = None if task is None else [task]
        played = rollout(self.model, self.tokenizer, make, [seed], self.config, tasks=tasks, engine=engine)
        with share_cpus():
            return next(played)

    def answer(self, question: str, tool: Callable[[str], str], seed: int = 0) -> Reply:
        """Answer a question with a tool that takes the text of a query and returns what the agent is shown;
        its errors are told to the agent (`mem1.envs.adapters.tool_env`).
        """
        environment = ToolEnvironment(question, [tool])
        trajectory = self.run(environment, seed)
        return Reply(environment.answer, trajectory)


class _Lent:
    """An environment without its `close`."""

    def __init__(self, environment: Environment) -> None:
        self._environment = environment

    def __getattr__(self, name: str) -> Any:
        if name == "close":
            raise AttributeError(name)
        return getattr(self._environment, name)
