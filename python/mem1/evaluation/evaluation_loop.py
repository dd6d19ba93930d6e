"""Evaluation: an agent with constant memory beside one that keeps everything and one that truncates, and the
parity of their log-probs.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from statistics import fmean
from typing import Any

from transformers import PreTrainedTokenizerBase

from mem1.config import RolloutConfig
from mem1.engine.engine import Engine
from mem1.envs.base import Environment, ExpertEnvironment
from mem1.rollout.rollout_loop import play_expert, rollout
from mem1.runtime.progress import Progress
from mem1.seeds import derive_seed
from mem1.trajectory import FinishReason, Trajectory

OBJECTIVES = (1, 2, 4, 8, 16)
_NO_LIMIT = 2**20  # tokens, or turns


@dataclass(frozen=True)
class Result:
    """Means over the sound episodes of one agent at one number of objectives; NaN if there is none. Lengths
    in tokens, time per episode.
    """

    agent: str
    objectives: int
    episodes: int  # with those that went wrong
    errors: dict[str, int]  # episodes that went wrong, by kind: they are in none of the means
    replays: int  # attempts that the environment ended, and that were played again
    reward: float  # share of objectives answered right
    exact_match: float  # objectives answered right, as the paper sums them
    f1: float
    answered: float  # share of episodes that ended with an answer
    turns: float
    tokens: float
    peak_tokens: float  # most tokens live at once
    peak_tokens_without_prompt: float
    dependency_length: float  # token pairs
    dependency_length_without_prompt: float  # as the paper counts them
    seconds: float  # wall time of all episodes, over the sound ones


def error_counts(trajectories: Sequence[Trajectory]) -> dict[str, int]:
    """How many of them went wrong, by `Trajectory.error_kind`, the most frequent kind first."""
    counts = Counter(t.error_kind for t in trajectories if t.error_kind)
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def summarize(agent: str, objectives: int, trajectories: Sequence[Trajectory], seconds: float) -> Result:
    """One row of the table; `seconds` is the wall time of all `trajectories` together."""
    if not trajectories:
        raise ValueError(
            f"trajectories: expected at least one for {agent} at {objectives} objectives, got none"
        )
    sound = [t for t in trajectories if not t.error_kind]

    def mean(value: Callable[[Trajectory], float]) -> float:
        return fmean(map(value, sound)) if sound else math.nan

    return Result(
        agent=agent,
        objectives=objectives,
        episodes=len(trajectories),
        errors=error_counts(trajectories),
        replays=sum(len(t.failures) for t in trajectories),
        reward=mean(lambda t: t.reward),
        exact_match=mean(lambda t: t.score.get("exact_match", 0.0)),
        f1=mean(lambda t: t.score.get("f1", 0.0)),
        answered=mean(lambda t: t.finish_reason == FinishReason.ANSWERED),
        turns=mean(lambda t: t.turns),
        tokens=mean(lambda t: t.tokens.numel()),
        peak_tokens=mean(lambda t: t.peak_tokens()),
        peak_tokens_without_prompt=mean(lambda t: t.peak_tokens(prompt=False)),
        dependency_length=mean(lambda t: t.dependency_length()),
        dependency_length_without_prompt=mean(lambda t: t.dependency_length(prompt=False)),
        seconds=seconds / len(sound) if sound else math.nan,
    )


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
    engine: Engine | None = None,
    progress: Progress | None = None,
) -> tuple[Result, list[Trajectory]]:
    """Let the policy play `episodes` episodes: a row of the table, named by `agent` and `objectives`.

    The episodes follow from `seed`: every agent gets the same, and training never saw them. engine: one of
    this model, kept from row to row, as for `rollout`. A row is a phase of `progress`; None says nothing.
    """
    progress = progress or Progress(log=lambda line: None)
    start, played = time.perf_counter(), []
    with progress.phase(f"{agent}, {objectives} objective" + "s" * (objectives > 1), total=episodes) as phase:
        seeds = evaluation_seeds(seed, episodes)
        for trajectory in rollout(model, tokenizer, make_environment, seeds, config, engine=engine):
            played.append(trajectory)
            phase.advance()
    return summarize(agent, objectives, played, time.perf_counter() - start), played


def evaluate_expert(
    tokenizer: PreTrainedTokenizerBase,
    config: RolloutConfig,
    make_environment: Callable[[], ExpertEnvironment],
    *,
    agent: str,
    objectives: int,
    episodes: int = 4,
    seed: int = 0,
) -> tuple[Result, list[Trajectory]]:
    """The environment's expert in the place of the policy, without a model: what memory a finished job takes.

    No token is computed, so the row's seconds say nothing about speed. The limits of `config` do not hold:
    the expert's notes and turns grow with the task, and only what is asked of it may end an episode.
    """
    free = replace(config, max_turns=_NO_LIMIT, max_action_tokens=_NO_LIMIT, max_info_tokens=_NO_LIMIT)
    start = time.perf_counter()
    played = list(play_expert(tokenizer, make_environment, evaluation_seeds(seed, episodes), free))
    return summarize(agent, objectives, played, time.perf_counter() - start), played


def table(rows: Sequence[Any], columns: Sequence[str] | None = None) -> str:
    """Dataclass instances as a Markdown table, one line each; `columns` picks and orders the fields."""
    if not rows:
        return "(no rows)"
    names = list(columns or (field.name for field in fields(rows[0])))
    cells = [[_cell(getattr(row, name)) for name in names] for row in rows]
    widths = [max(len(line[i]) for line in [names, *cells]) for i in range(len(names))]
    rule = "|".join("-" * (width + 2) for width in widths)
    body = [
        " | ".join(value.rjust(width) for value, width in zip(line, widths, strict=True))
        for line in [names, *cells]
    ]
    return "\n".join([f"| {body[0]} |", f"|{rule}|", *(f"| {line} |" for line in body[1:])])


def _cell(value: object) -> str:
    """A dict of counts as "3: TimeoutError 2, policy 1"; what there is no number for as "-"."""
    if isinstance(value, dict):
        kinds = ", ".join(f"{name} {count}" for name, count in value.items())
        return f"{sum(value.values())}" + (f": {kinds}" if kinds else "")
    if not isinstance(value, float):
        return str(value)
    if math.isnan(value):
        return "-"
    if value != 0 and abs(value) < 1e-3:
        return f"{value:.1e}"
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.0f}"
