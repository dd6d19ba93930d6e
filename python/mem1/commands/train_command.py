"""`mem1 train` and `mem1 plan`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from mem1.checks import InputError, require
from mem1.commands.loading import check_writable, read_trajectories
from mem1.commands.world_options import closing, environment_record, rollout_config, world_of
from mem1.config import RolloutConfig, TrainConfig
from mem1.config_files import Settings, made, merged, read, tag_format, to_yaml, typed
from mem1.envs.toy.training import toy_training
from mem1.envs.worlds import DEFAULT
from mem1.io import ignore_closed_pipe
from mem1.named_objects import imported
from mem1.parsing.tags import MEM1, TagFormat
from mem1.runtime.progress import Progress
from mem1.runtime.ranks import Ranks
from mem1.train.plan import plan
from mem1.train.train_loop import train
from mem1_core.eviction_policies import qualified_name

# Options by the settings that they stand for; the others have the names of their settings.
_SETTINGS = {
    **{field.name: field.name for field in fields(TrainConfig)},
    **{field.name: f"rollout.{field.name}" for field in fields(RolloutConfig)},
    "model": "init",
    "track": "trackers",
    "dtype": "model.dtype",
    "warmstart_steps": "warmstart.steps",
    "algorithm": "algorithm.name",
    "actor_lr": "algorithm.actor_lr",
    "critic_lr": "algorithm.critic_lr",
    "kl_coef": "algorithm.kl_coef",
    "objectives": "environment.objectives",
    "tasks": "environment.tasks",
    "hops": "environment.hops",
    "passage_tokens": "environment.passage_tokens",
}


def run(options: argparse.Namespace, progress: Progress) -> None:
    config, world = resolved(options)
    if options.print_config:
        with ignore_closed_pipe(sys.stdout):
            print(to_yaml(config), end="", flush=True)
        return
    if options.dry_run:
        progress.log(str(plan(config)))
        return
    out = options.out or Path("runs") / (options.config.stem if options.config else "train")
    check_writable(out)
    with _task(world, config) as task:
        try:
            train(config, out, **task, resume=options.resume, overwrite=options.overwrite, progress=progress)
        except KeyboardInterrupt:
            progress.log(f"stopped; the same options with --resume go on from what is in {out}")
            raise
    if Ranks.current().first:
        progress.log(f"checkpoint and metrics are in {out}")


def run_plan(options: argparse.Namespace, progress: Progress) -> None:
    config, _ = resolved(options)
    played = None if options.trajectories is None else read_trajectories(options.trajectories)
    found = plan(config, played, mfu=options.mfu)
    if options.json:
        with ignore_closed_pipe(sys.stdout):
            print(json.dumps(found.to_dict()), flush=True)
    else:
        progress.log(str(found))


def resolved(options: argparse.Namespace) -> tuple[TrainConfig, argparse.Namespace]:
    """The settings of a run: of its config file, over these what the options say, over these what is given
    by its full name. And its world, as the options of other commands have it.
    """
    given = {name: value for name, value in vars(options).items() if value is not None}
    layers = [read(options.config) if options.config else {}, _settings(given), options.settings]
    for layer in layers:
        typed(layer)  # each by itself: what one says wrong, another must not hide
    said, *over = map(_with_table, layers)
    chosen = merged(*over).get("environment", {}).get("name")
    if chosen not in (None, said.get("environment", {}).get("name", DEFAULT)):
        said = {**said, "environment": {}}  # of another world
    settings = typed(merged(said, *over))
    environment = settings.pop("environment", {})
    init, objectives = settings.get("init"), environment.pop("objectives", None)
    name = environment.pop("name", DEFAULT)
    if init is not None:
        for steps in (given.get("warmstart_steps"), options.settings.get("warmstart")):
            require(steps is None, "warmstart-steps", "none beside model", steps)
    elif name != DEFAULT:
        raise InputError(f"model: expected one for an environment other than {DEFAULT}, got none")
    elif objectives is None:
        objectives = (1, 4)
    own = given.get("environment")  # what MODULE:NAME of an option has been found to be
    if isinstance(own, str) or own is None or name != qualified_name(own):
        own = imported(name) if ":" in name else name
    rollout = settings.pop("rollout", {})
    free = {"format": MEM1, "max_info_tokens": None, "max_turns": None}
    world = argparse.Namespace(
        environment=own,
        tasks=environment.pop("tasks", None),
        environment_args=environment,
        hops=None,
        passage_tokens=None,
        turn_hint=given.get("turn_hint", False),
        **free | rollout,
    )
    record = environment_record(world) | ({} if objectives is None else {"objectives": objectives})
    most = max(objectives) if isinstance(objectives, tuple) else objectives
    config = made(settings | {"environment": record, "rollout": vars(rollout_config(world, most))})
    return config, world


def _settings(given: Mapping[str, Any]) -> Settings:
    """What short options say, by the names of the settings."""
    twice = next(
        (n for n in ("hops", "passage_tokens") if n in given and n in given.get("environment_args", ())), None
    )
    require(twice is None, str(twice), "it here or in environment-args, not both", given.get(str(twice)))
    found: Settings = {"environment": dict(given["environment_args"])} if "environment_args" in given else {}
    for name, value in given.items():
        if name == "environment":
            named = value if isinstance(value, str) else qualified_name(value)
            found.setdefault("environment", {})["name"] = named
        elif name in _SETTINGS:
            section, _, last = _SETTINGS[name].rpartition(".")
            (found.setdefault(section, {}) if section else found)[last] = value
    return found


def _with_table(layer: Settings) -> Settings:
    """With the table of a format in the place of its name, so that a part of it can be said."""
    rollout = layer.get("rollout")
    if not isinstance(rollout, Mapping) or not isinstance(rollout.get("format"), (str, TagFormat)):
        return layer
    return {**layer, "rollout": {**rollout, "format": asdict(tag_format(rollout["format"]))}}


@contextmanager
def _task(world: argparse.Namespace, config: TrainConfig) -> Iterator[dict[str, Any]]:
    """What `train` is to be given beside its settings."""
    objectives = config.environment.get("objectives")
    opened = [world_of(world, objectives, "train")]
    if config.init is None:
        yield toy_training(config)
        return
    if config.evaluate_every:
        opened.append(world_of(world, objectives, "test", config.evaluation_episodes))
    with closing(opened):
        yield {
            "make_environment": opened[0].make,
            "tasks": opened[0].tasks,
            "evaluation_tasks": opened[-1].tasks if config.evaluate_every else None,
        }
