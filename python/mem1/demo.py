"""The models of the package at work, in minutes on two idle cores: memory, words, parity, learning."""

from __future__ import annotations

import copy
import importlib.util
import json
import os
import textwrap
import time
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedTokenizerBase

from mem1.checks import InputError, require
from mem1.config import Regime, RolloutConfig, TrainConfig
from mem1.config_files import made, read, typed
from mem1.envs.toy.multihop import MultiHopEnv
from mem1.envs.toy.training import toy_training
from mem1.evaluation.evaluation_loop import OBJECTIVES, evaluate, evaluation_seeds
from mem1.evaluation.plots import plot_learning, plot_live, plot_results, plot_trajectory
from mem1.evaluation.results import Result, table
from mem1.evaluation.transcripts import transcript
from mem1.evaluation.viewer.page import write_page
from mem1.io import atomic_write, without_nan
from mem1.models.shipped import PACKAGED
from mem1.rollout.rollout_loop import rollout
from mem1.runtime.progress import Progress
from mem1.train import checkpoint
from mem1.train.parity import Parity, parity
from mem1.train.run_folder import CONFIG, METRICS, settings_path
from mem1.train.train_loop import train
from mem1.trajectory import Trajectory

_SHOWN = (
    *("agent", "objectives", "reward", "answers_miscounted", "turns"),
    *("peak_tokens", "peak_tokens_without_prompt"),
)
_PANELS = {
    "reward": "share of the questions answered right",
    "peak_tokens": "peak tokens, prompt included",
    "dependency_length_without_prompt": "dependency length (token pairs), without the prompt",
    "answers_miscounted": "share of episodes with too many or too few answers",
}
_TOLD = 2  # objectives of the trajectory in words
_SEEN = 2  # trajectories of a row on the page
_TRAIN = "train"
_WIDTH = 100  # of a line of text
_FILES = {
    "tables.md": "the tables above",
    "results.json": "the same, with every metric",
    "agents.png": "part 1: right answers and memory against the number of questions",
    "live_tokens.png": "part 1: what is in memory while an episode goes on",
    "trajectories.html": "part 1: episodes to look through, with what was forgotten when",
    "trajectories.jsonl": "part 1: all of them, for `mem1 view`",
    "trajectory_mask.png": "part 2: who sees whom in that episode, as the trainer has it",
    "learning_curve.png": "part 4: the reward, update by update",
}


class Agents(NamedTuple):
    """Names or folders of models of one world (`checkpoint.load`): with the memory of MEM1, the same before
    reinforcement, and one that forgets nothing.
    """

    mem1: str | os.PathLike[str] = PACKAGED / "mem1-tiny"
    start: str | os.PathLike[str] = PACKAGED / "mem1-tiny-start"
    full_context: str | os.PathLike[str] = PACKAGED / "mem1-tiny-full-context"


def demo(
    out: Path,
    agents: Agents | None = None,
    *,
    quick: bool = False,
    seed: int = 0,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> None:
    """Run the demo; everything it makes is in the folder `out`.

    `quick` does the same in well under a minute, with a few episodes and updates. `overwrite` starts over
    where `out` has a training run. Raises InputError at once for what `check` finds.
    """
    check(out, overwrite)
    progress, agents = progress or Progress(), agents or Agents()
    log = progress.log
    began = time.perf_counter()
    out.mkdir(parents=True, exist_ok=True)

    def title(text: str) -> None:
        log(f"\n[{time.perf_counter() - began:4.0f} s] {text}")

    def say(text: str) -> None:
        log(textwrap.fill(text, _WIDTH))

    title("1/4 MEM1 against an agent of the same size and training that forgets nothing, greedy")
    config = trained_with(agents.mem1)
    asked = config.environment["objectives"]
    say(
        "Many questions at once about facts that only a tool knows. MEM1 has in memory the questions, its "
        "latest notes and what the tool said last; full context has all that was written and read. Both "
        f"were given {asked} questions at a time in reinforcement: what they do with other numbers they were "
        "never paid for. reward: the share of the questions answered right; answers_miscounted: the share "
        "of episodes with more or fewer answers than questions; lengths in tokens."
    )
    sizes, episodes = (OBJECTIVES[:2], 4) if quick else (OBJECTIVES, 16)
    results, played = compare(agents, sizes, episodes, seed, progress)
    tables = [table(results, _SHOWN)]
    log(tables[0])
    if not quick:
        log(growth(results))
    say("MEM1's memory grows with the questions and their answers, full context's with all that it reads.")

    title(
        f"2/4 an episode of MEM1 with {_TOLD} questions in words, and what was in memory when each turn began"
    )
    model, tokenizer, _ = checkpoint.load(agents.mem1)
    told = next(trajectory for _, trajectory in played if trajectory.objectives == _TOLD)
    log(transcript(told, tokenizer))

    title("3/4 log-probs: sampled by the rollout against recomputed by the trainer")
    say(
        "carry (the cache is pruned in place) and reencode (what is live is read again) compute one "
        "function: the largest gap, max_dlogp, is rounding, more of it in bfloat16. paper is the published "
        "recipe, which trains with another mask than it samples with: its gap is no rounding."
    )
    measured = parity_results(model, tokenizer, config, 4 if quick else 8, seed, progress)
    tables.append(table(measured))
    log(tables[1])

    report = {
        "evaluation": [row.to_dict() for row in results],
        "parity": [without_nan(asdict(row)) for row in measured],
    }
    rows = [{"agent": agent, **trajectory.to_dict()} for agent, trajectory in played]
    with atomic_write(out / "results.json") as file:
        json.dump(report, file, indent=2, allow_nan=False)
    with atomic_write(out / "trajectories.jsonl") as file:
        for row in rows:
            file.write(json.dumps(row, allow_nan=False) + "\n")
    shown = [row for i, row in enumerate(rows) if i % episodes < _SEEN]
    write_page(shown, out / "trajectories.html", tokenizer=tokenizer, title="mem1 demo")
    plot_results(results, out / "agents.png", _PANELS)
    plot_live(dict(played), out / "live_tokens.png")  # the last of each, of the most questions
    plot_trajectory(told, out / "trajectory_mask.png")
    tokenizer.save_pretrained(out / "tokenizer")  # for `mem1 view`

    title(f"4/4 reinforcement on {asked} questions alone, from a start that is content too early")
    learning = TrainConfig(
        init=str(agents.start),
        max_updates=2 if quick else 16,
        batch_size=16 if quick else 64,
        environment=config.environment,
        rollout=config.rollout,
        algorithm=config.algorithm,
        seed=seed,
    )
    learned = train(learning, out / _TRAIN, **toy_training(learning), overwrite=overwrite, progress=progress)
    log(rise(out / _TRAIN / METRICS))
    plot_learning(out / _TRAIN / METRICS, out / "learning_curve.png")
    if not quick:
        most, began_with = sizes[-1], checkpoint.load(agents.start)
        before, after = (
            play(policy, tokenizer, config, most, episodes // 2, seed, name, progress)[0]
            for name, (policy, tokenizer, _) in (("before", began_with), ("after", learned))
        )
        say(
            f"{most} questions, of which it has met none in these updates: {before['reward']:.2f} of them "
            f"right before, {after['reward']:.2f} after"
        )
    with atomic_write(out / "tables.md") as file:
        file.write("\n\n".join(tables) + "\n")
    title(f"done. In {out.resolve()}:")
    width = max(map(len, _FILES))
    log("\n".join(f"{name:<{width}}  {what}" for name, what in _FILES.items()))


def check(out: Path, overwrite: bool = False) -> None:
    """InputError if there is no matplotlib for the plots, or something in `out` that is to stay."""
    if importlib.util.find_spec("matplotlib") is None:
        raise InputError("matplotlib: expected for the plots, got none: pip install 'mem1_core[plot]'")
    held = [] if overwrite else [name for name in (*_FILES, _TRAIN) if (out / name).exists()]
    expected = "a folder without results, or --overwrite, which replaces these"
    require(not held, "out", expected, f"{out} with {', '.join(held)}")


def trained_with(model: str | os.PathLike[str]) -> TrainConfig:
    """The settings of the run that a model comes from."""
    if (path := settings_path(model)) is None:
        raise InputError(f"model: expected one with a {CONFIG}, got {str(model)!r}")
    return made(typed(read(path)))


def compare(
    agents: Agents, sizes: tuple[int, ...], episodes: int, seed: int, progress: Progress
) -> tuple[list[Result], list[tuple[str, Trajectory]]]:
    """Both kinds of memory on the same episodes, each with the weights that were trained with it."""
    results: list[Result] = []
    played: list[tuple[str, Trajectory]] = []
    for name, model in (("MEM1", agents.mem1), ("full context", agents.full_context)):
        config = trained_with(model)
        policy, tokenizer, _ = checkpoint.load(model)
        for n in sizes:
            row, trajectories = play(policy, tokenizer, config, n, episodes, seed, name, progress)
            results.append(row)
            played += [(name, trajectory) for trajectory in trajectories]
    return results, played


def play(
    policy: Any,
    tokenizer: PreTrainedTokenizerBase,
    config: TrainConfig,
    objectives: int,
    episodes: int,
    seed: int,
    name: str,
    progress: Progress,
) -> tuple[Result, list[Trajectory]]:
    """A row of the evaluation."""
    return evaluate(
        policy,
        tokenizer,
        limits(config, objectives),
        partial(MultiHopEnv, **config.environment | {"objectives": objectives}),
        agent=name,
        objectives=objectives,
        episodes=episodes,
        seed=seed,
        progress=progress,
    )


def limits(config: TrainConfig, objectives: int) -> RolloutConfig:
    """Room for what the expert would write, and some more: an agent that has lost its way must come to an
    end.
    """
    hops = max(MultiHopEnv(**config.environment | {"objectives": objectives}).hops)
    turns, tokens = (hops + 1) * objectives + 4, 8 * objectives + 32
    return replace(config.rollout, greedy=True, max_turns=turns, max_action_tokens=tokens)


def growth(results: list[Result]) -> str:
    """How peak memory grows from the least objectives to the most, a line per agent."""
    lines, bare = [], "peak_tokens_without_prompt"
    for agent in dict.fromkeys(r.agent for r in results):
        rows = sorted((r for r in results if r.agent == agent), key=lambda r: r.objectives)
        small, large = next(r for r in rows if r.objectives >= 2), rows[-1]
        times, without = (large[name] / small[name] for name in ("peak_tokens", bare))
        lines.append(
            f"{agent}: {large.objectives} objectives need {times:.2f}x the peak of {small.objectives}, "
            f"{without:.2f}x without the prompt"
        )
    return "\n".join(lines)


def rise(metrics: Path) -> str:
    """The rewards of a run as a line."""
    rewards = [json.loads(line)["reward"] for line in metrics.read_text().splitlines()]
    return "reward, update by update: " + " ".join(f"{reward:.2f}" for reward in rewards)


def parity_results(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    config: TrainConfig,
    episodes: int,
    seed: int,
    progress: Progress,
) -> list[Parity]:
    """Every regime in fp32 and bf16, on sampled episodes of 4 objectives."""
    rows: list[Parity] = []
    regimes: tuple[Regime, ...] = ("carry", "reencode", "paper")
    cases = [(dtype, regime) for dtype in (torch.float32, torch.bfloat16) for regime in regimes]
    make = partial(MultiHopEnv, **config.environment | {"objectives": 4})
    with progress.phase("regimes and dtypes", total=len(cases)) as phase:
        for dtype, regime in cases:
            policy = copy.deepcopy(model).to(dtype)
            rules = replace(limits(config, 4), greedy=False, regime=regime)
            played = list(rollout(policy, tokenizer, make, evaluation_seeds(seed, episodes), rules))
            rows.append(parity(policy, played, regime, rules.temperature))
            phase.advance()
    return rows
