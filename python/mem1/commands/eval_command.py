"""`mem1 eval`."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from mem1.checks import require
from mem1.commands.loading import check_writable, load_policy, log_failures, log_other_settings
from mem1.commands.world_options import closing, environment_record, rollout_config, world_of
from mem1.config import RolloutConfig
from mem1.engine.engine import Engine
from mem1.envs.tasks import shuffled
from mem1.envs.toy.tokenizer import build_tokenizer
from mem1.envs.worlds import COMPOSED, TOYS, World
from mem1.evaluation.baselines.agents import Agent, Oracle, RandomActions
from mem1.evaluation.eval_run import Cell, EvaluationFolder, read_cells
from mem1.evaluation.evaluation_loop import OBJECTIVES, evaluation_seeds, without_limits
from mem1.evaluation.results import table
from mem1.evaluation.tables import tables
from mem1.io import ignore_closed_pipe
from mem1.models.load import load_tokenizer
from mem1.rollout.rollout_loop import check_positions, make_codec, make_engine, play_expert, rollout
from mem1.runtime.progress import Progress
from mem1.train import checkpoint
from mem1.train.parity import parity
from mem1.trajectory import Trajectory

_COMPARED = 16  # trajectories of an agent whose log-probs are recomputed

Play = Callable[[range, Callable[[], None]], list[Trajectory]]


def run(options: argparse.Namespace, progress: Progress) -> None:
    """Play, or go on with, an evaluation; say what came of it."""
    if options.json:  # the rows alone belong on standard output
        progress = Progress(log=lambda line: print(line, file=sys.stderr, flush=True))
    check_writable(options.out)
    agents: list[Agent] = options.agents
    names = [str(agent) for agent in agents]
    require(len({*names}) == len(names), "agents", "each once", " ".join(names))
    sizes = options.objectives or (OBJECTIVES if options.environment in COMPOSED else [None])
    worlds = {n: world_of(options, n, "test", episodes=options.episodes) for n in sizes}
    configs = {n: replace(rollout_config(options, n), synchronous=not options.asynchronous) for n in sizes}
    _check_scripts(agents, worlds[sizes[0]])
    folder = EvaluationFolder(options.out, _settings(options, names, configs), overwrite=options.overwrite)
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
    _tell(options, agents, model, cells, progress)
    progress.log(f"trajectories and tables are in {options.out}")


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
            require(fits, "model", "one whose tokenizer counts, for an environment of real text", None)
            return None, build_tokenizer(), None
        return None, load_tokenizer(checkpoint.newest(options.model)), None
    require(options.model is not None, "model", "a folder or a Hugging Face id for a policy", None)
    model, tokenizer = load_policy(options, progress)
    log_other_settings(options.model, configs[0], progress)
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
    rules, make, tasks = agent.settings(config), agent.environments(world.make), world.tasks
    seeds = evaluation_seeds(options.seed, options.episodes)
    # What a script writes is not cut. The oracle ends by itself; who acts at random gets a policy's turns.
    limits = without_limits(rules)
    limits = limits if isinstance(agent, Oracle) else replace(limits, max_turns=rules.max_turns)
    rows = None if tasks is None else shuffled(tasks, options.seed, "evaluation")
    if rows is not None:
        expected = f"at least {options.episodes} for as many episodes"
        require(len(rows) >= options.episodes, "tasks", expected, len(rows))

    def play(places: range, advance: Callable[[], None]) -> list[Trajectory]:
        some = [seeds[place] for place in places]
        given = None if rows is None else [rows[place] for place in places]
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
    options: argparse.Namespace, agents: list[str], configs: dict[int | None, RolloutConfig]
) -> dict[str, Any]:
    """What the numbers follow from."""
    files = [options.tasks, *(v for v in options.environment_args.values() if isinstance(v, str))]
    model = None if options.model is None else str(checkpoint.newest(options.model))
    return {
        "agents": agents,
        "episodes": options.episodes,
        "seed": options.seed,
        "model": options.model,
        "weights": model and _stamps(Path(model), "*.safetensors"),
        "dtype": options.dtype,
        "device": options.device,
        "environment": environment_record(options),
        "files": {name: _stamps(Path(name).parent, Path(name).name) for name in files if name},
        "rollout": {str(n): config.to_dict() for n, config in configs.items()},
    }


def _stamps(folder: Path, pattern: str) -> list[list[Any]]:
    """Name, size and time of files: what tells them from others that take their place."""
    found = sorted(folder.glob(pattern)) if folder.is_dir() and pattern else []
    stats = [(path, path.stat()) for path in found if path.is_file()]
    return [[str(path), stat.st_size, stat.st_mtime_ns] for path, stat in stats]


def _tell(
    options: argparse.Namespace,
    agents: Sequence[Agent],
    model: Any,
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
                gaps.append(parity(model, played[str(agent)], config.regime, options.temperature))
    if gaps:
        progress.log(f"sampled and recomputed log-probs, {_COMPARED} episodes of an agent at most")
        progress.log(table(gaps))
