"""One row of an evaluation: an agent, or the environment's expert, at one number of objectives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from mem1.checks import require
from mem1.config import RolloutConfig
from mem1.engine.engine import Engine
from mem1.envs.base import Environment, ExpertEnvironment
from mem1.evaluation.results import Result, row_title, summarize
from mem1.rollout.rollout_loop import play_expert, rollout
from mem1.runtime.progress import Progress
from mem1.seeds import derive_seed
from mem1.trajectory import Trajectory

OBJECTIVES = (1, 2, 4, 8, 16)
_NO_LIMIT = 2**20  # tokens, or turns


def evaluation_seeds(seed: int, episodes: int) -> list[int]:
    """Seeds of episodes that neither a warm start nor training ever sees."""
    return [derive_seed(seed, "evaluation", i) for i in range(episodes)]


def evaluate(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    config: RolloutConfig,
    make_environment: Callable[[], Environment],
    *,
    agent: str,
    objectives: int,
    episodes: int = 16,
    seed: int = 0,
    tasks: Sequence[Any] | None = None,
    engine: Engine | None = None,
    progress: Progress | None = None,
) -> tuple[Result, list[Trajectory]]:
    """Let the policy play `episodes` episodes: a row of the table, named by `agent` and `objectives`.

    The episodes follow from `seed`: every agent gets the same, and training never saw them. tasks: a row for
    each. engine: one of this model, kept from row to row, as for `rollout`. A row is a phase of `progress`;
    None says nothing.
    """
    require(episodes >= 1, "episodes", "an integer >= 1", episodes)
    progress = progress or Progress(log=lambda line: None)
    played = []
    with progress.phase(row_title(agent, objectives), total=episodes) as phase:
        seeds = evaluation_seeds(seed, episodes)
        for trajectory in rollout(
            model, tokenizer, make_environment, seeds, config, tasks=tasks, engine=engine
        ):
            played.append(trajectory)
            phase.advance()
    place = {seed: n for n, seed in enumerate(seeds)}
    played.sort(key=lambda trajectory: place[trajectory.seed])  # not as they finished
    return summarize(agent, objectives, played), played


def evaluate_expert(
    tokenizer: PreTrainedTokenizerBase,
    config: RolloutConfig,
    make_environment: Callable[[], ExpertEnvironment],
    *,
    agent: str,
    objectives: int,
    episodes: int = 4,
    seed: int = 0,
    tasks: Sequence[Any] | None = None,
) -> tuple[Result, list[Trajectory]]:
    """The environment's expert in the place of the policy, without a model: what memory a finished job takes.

    No token is computed, so the row's seconds say nothing about speed. The limits of `config` do not hold:
    the expert's notes and turns grow with the task, and only what is asked of it may end an episode.
    """
    require(episodes >= 1, "episodes", "an integer >= 1", episodes)
    seeds = evaluation_seeds(seed, episodes)
    played = list(play_expert(tokenizer, make_environment, seeds, without_limits(config), tasks))
    return summarize(agent, objectives, played), played


def without_limits(config: RolloutConfig) -> RolloutConfig:
    """`config` with limits that no episode reaches."""
    limits = dict.fromkeys("max_prompt_tokens max_turns max_action_tokens max_info_tokens".split(), _NO_LIMIT)
    return replace(config, max_state_tokens=None, **limits)
