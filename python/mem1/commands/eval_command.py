"""`mem1 eval`."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from mem1.checks import require
from mem1.commands.loading import (
    check_writable,
    load_policy,
    log_failures,
    log_other_settings,
    log_unknown,
)
from mem1.commands.world_options import closing, environment_record, rollout_config, world_of
from mem1.config import RolloutConfig
from mem1.engine.engine import Engine
from mem1.envs.tasks import shuffled
from mem1.envs.toy.tokenizer import build_tokenizer
from mem1.envs.worlds import COMPOSED, TOYS, World
from mem1.evaluation.baselines.agents import AGENTS, Agent, FullContext, Mem1, Oracle, RandomActions
from mem1.evaluation.eval_run import Cell, EvaluationFolder, read_cells
from mem1.evaluation.evaluation_loop import OBJECTIVES, evaluation_seeds, without_limits
from mem1.evaluation.results import table
from mem1.evaluation.tables import tables
from mem1.io import ignore_closed_pipe
from mem1.models.load import load_tokenizer
from mem1.rollout.rollout_loop import check_positions, make_codec, make_engine, play_expert, rollout
from mem1.runtime.progress import Progress
from mem1.train import checkpoint
from mem1.train.parity import Parity, parity
from mem1.trajectory import Trajectory

_COMPARED = 16  # trajectories of an agent whose log-probs are recomputed


@dataclass(frozen=True)
class _Gap(Parity):
    agent: str


Play = Callable[[range, Callable[[], None]], list[Trajectory]]


def run(options: argparse.Namespace, progress: Progress) -> None:
    """Play, or go on with, an evaluation; say what came of it."""
    if options.json:  # the rows alone belong on standard output
        progress = Progress(log=_to_stderr)
    check_writable(options.out)
    agents: list[Agent] = getattr(options, "agents", [Mem1(), FullContext()])
    names = [str(agent) for agent in agents]
    require(len({*names}) == len(names), "agents", "each once", " ".join(names))
    sizes = options.objectives or (OBJECTIVES if options.environment in COMPOSED else [None])
    require(len({*sizes}) == len(sizes), "objectives", "each once", " ".join(map(str, sizes)))
    opened = {n: world_of(options, n, "test", episodes=options.episodes) for n in sizes}
    worlds = {n: _in_order(world, options) for n, world in opened.items()}
    configs = {n: replace(rollout_config(options, n), synchronous=not options.asynchronous) for n in sizes}
    _check_scripts(agents, worlds[sizes[0]])
    for n, world in worlds.items():
        asked = [q.id for task in world.tasks or () for q in getattr(task, "questions", ())]
        if len({*asked}) < len(asked):
            told = f"{len(asked)} questions are asked, {len({*asked})} of them different"
            progress.log(f"{n} objectives: {told}: intervals are narrower than they should be")
    folder = EvaluationFolder(options.out, _settings(options, agents, configs), overwrite=options.overwrite)
    model, tokenizer, engine = _policy(options, agents, list(configs.values()), progress)
    cells = [
        Cell(str(agent), n, _player(options, agent, worlds[n], config, model, tokenizer, engine))
        for agent in agents
        for n, config in configs.items()
    ]
    with closing(worlds.values()), contextlib.closing(folder):
        results = folder.run(cells, options.episodes, tokenizer=tokenizer, progress=progress)
    if options.json:
        with ignore_closed_pipe(sys.stdout):
            for row in results:
                print(json.dumps(row.to_dict(), allow_nan=False), flush=True)
    else:
        progress.log(tables(results))
    _tell(options, agents, model, tokenizer, cells, progress)
    progress.log(f"trajectories and tables are in {options.out}")


def _in_order(world: World, options: argparse.Namespace) -> World:
    """With a row for each episode, the same for every agent."""
    if world.tasks is None:
        return world
    expected = f"at least {options.episodes} for as many episodes"
    require(len(world.tasks) >= options.episodes, "tasks", expected, len(world.tasks))
    return world._replace(tasks=shuffled(world.tasks, options.seed, "evaluation")[: options.episodes])


def _to_stderr(line: str) -> None:
    with ignore_closed_pipe(sys.stderr):
        print(line, file=sys.stderr, flush=True)


def _check_scripts(agents: Sequence[Agent], world: World) -> None:
    """InputError for a script that the environment does not have."""
    for agent, method in ((Oracle, "expert_action"), (RandomActions, "random_action")):
        if any(isinstance(one, agent) for one in agents):
            environment = world.make()
            able = hasattr(environment, method)
            require(
                able, "agents", f"an environment with {method} for {agent.name}", type(environment).__name__
            )


def _policy(
    options: argparse.Namespace, agents: Sequence[Agent], configs: Sequence[RolloutConfig], progress: Progress
) -> tuple[Any, PreTrainedTokenizerBase, Engine | None]:
    """Model, tokenizer and an engine large enough for all agents; of scripts alone, no more than a tokenizer,
    the toy's in its own worlds.
    """
    if all(agent.scripted for agent in agents):
        if options.model is None:
            fits = options.environment in TOYS
            require(
                fits, "model", "one: its tokenizer counts the tokens of an environment of real text", None
            )
            return None, build_tokenizer(), None
        return None, load_tokenizer(checkpoint.newest(options.model)), None
    require(options.model is not None, "model", "a folder or a Hugging Face id for a policy", None)
    model, tokenizer = load_policy(options, progress)
    for agent in agents:
        if not agent.scripted:
            log_other_settings(options.model, agent.settings(configs[0]), progress, f"{agent}: ")
    rules = [agent.settings(config) for config in configs for agent in agents if not agent.scripted]
    for config in rules:
        check_positions(model, config)  # of all rows before the first one
        make_codec(tokenizer, config, model)  # a copy of its vocabulary is part of the memory
    largest = max(rules, key=RolloutConfig.peak_tokens)
    return model, tokenizer, make_engine(model, largest, options.episodes, progress.log)


def _player(
    options: argparse.Namespace,
    agent: Agent,
    world: World,
    config: RolloutConfig,
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    engine: Engine | None,
) -> Play:
    """What plays the episodes of one agent at one number of objectives, the same for every agent."""
    rules, make = agent.settings(config), agent.environments(world.make, tokenizer, config)
    seeds = evaluation_seeds(options.seed, options.episodes)
    # What a script writes is not cut. Random actions get a policy's turns, the oracle more than it needs.
    turns = 10 * rules.max_turns if isinstance(agent, Oracle) else rules.max_turns
    limits = replace(without_limits(rules), max_turns=turns)

    def play(places: range, advance: Callable[[], None]) -> list[Trajectory]:
        some = [seeds[place] for place in places]
        given = None if world.tasks is None else [world.tasks[place] for place in places]
        played = (
            play_expert(tokenizer, make, some, limits, given)  # type: ignore[arg-type]
            if agent.scripted
            else rollout(model, tokenizer, make, some, rules, tasks=given, engine=engine)
        )
        found = {}
        for trajectory in played:
            found[trajectory.seed] = trajectory
            advance()
        return [found[seed] for seed in some]

    return play


def _settings(
    options: argparse.Namespace, agents: Sequence[Agent], configs: dict[int | None, RolloutConfig]
) -> dict[str, Any]:
    """What the numbers follow from."""
    given = {
        name: value for name, value in options.environment_args.items() if name not in ("index", "key_file")
    }
    theirs = [type(agent) for agent in agents if type(agent) not in AGENTS]
    own = [_source(one) for one in (options.environment, options.prune, *theirs) if callable(one)]
    paths = [path for path in (options.tasks, *given.values(), *own) if isinstance(path, str)]
    model = None if options.model is None else str(checkpoint.newest(options.model))
    return {
        "agents": [str(agent) for agent in agents],
        "episodes": options.episodes,
        "seed": options.seed,
        "model": options.model,
        "weights": model and [stamp for stamp in _stamps(model) if not stamp[0].endswith(".json")],
        "dtype": options.dtype,
        "device": options.device,
        "threads": options.threads,
        "environment": environment_record(options),
        "files": {path: stamps for path in paths if (stamps := _stamps(path))},
        "rollout": {str(n): config.to_dict() for n, config in configs.items()},
    }


def _source(imported: Any) -> str | None:
    """The file of MODULE:NAME; None of what has none."""
    return getattr(sys.modules.get(getattr(imported, "__module__", "")), "__file__", None)


def _stamps(path: str) -> list[list[Any]]:
    """Name, size and time of a file, or of all files of a folder: what tells them from others in their place.
    Empty for a text that names neither.
    """
    try:
        found = sorted(Path(path).iterdir()) if Path(path).is_dir() else [Path(path)]
        stats = [(file, file.stat()) for file in found if file.is_file()]
    except (OSError, ValueError):  # of an argument that is no path
        return []
    return [[str(file), stat.st_size, stat.st_mtime_ns] for file, stat in stats]


def _tell(
    options: argparse.Namespace,
    agents: Sequence[Agent],
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    cells: Sequence[Cell],
    progress: Progress,
) -> None:
    """Failures, and of every policy the sampled log-probs against those that a trainer recomputes."""
    gaps = []
    played = dict[str, list[Trajectory]]()
    for cell, trajectories in zip(cells, read_cells(options.out, cells, options.episodes), strict=True):
        log_failures(trajectories, progress, cell.title)
        played[cell.agent] = trajectories[:_COMPARED]  # of the largest number of objectives
    for agent in agents:
        if not agent.scripted:
            config = agent.settings(RolloutConfig(regime=options.regime))
            with torch.inference_mode():
                gap = parity(model, played[str(agent)], config.regime, options.temperature)
            gaps.append(_Gap(**asdict(gap), agent=str(agent)))
    if gaps:
        progress.log(f"sampled and recomputed log-probs, {_COMPARED} episodes of an agent at most")
        progress.log(table(gaps, ("agent", *(field.name for field in fields(Parity)))))
    log_unknown((t for trajectories in played.values() for t in trajectories), tokenizer, progress)
