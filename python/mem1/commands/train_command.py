"""`mem1 train` and `mem1 plan`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

from mem1.checks import InputError, require
from mem1.commands.loading import check_writable, read_trajectories
from mem1.commands.world_options import closing, environment_record, rollout_config, world_of
from mem1.config import RolloutConfig, TrainConfig
from mem1.config_files import Settings, made, merged, read, to_yaml, typed
from mem1.envs.toy.training import toy_training
from mem1.envs.worlds import DEFAULT
from mem1.io import ignore_closed_pipe
from mem1.named_objects import imported
from mem1.parsing.tags import MEM1
from mem1.runtime.progress import Progress
from mem1.train.plan import plan
from mem1.train.train_loop import train

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
    progress.log(f"checkpoint and metrics are in {out}")


def run_plan(options: argparse.Namespace, progress: Progress) -> None:
    config, _ = resolved(options)
    played = None if options.trajectories is None else read_trajectories(options.trajectories)
    require(options.gpu_memory > 0, "gpu-memory", "a number of GB > 0", options.gpu_memory)
    gpu_bytes = round(options.gpu_memory * 1e9)
    found = plan(config, played, mfu=options.mfu, tflops=options.tflops, gpu_bytes=gpu_bytes)
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
    said = read(options.config) if options.config else {}
    settings = typed(merged(said, _settings(given), options.settings))
    environment = settings.pop("environment", {})
    before = said.get("environment")
    if "environment" in given and isinstance(before, Mapping) and before.get("name") != environment["name"]:
        environment = {
            key: value for key, value in environment.items() if key not in before.keys() - {"name"}
        }
    init, objectives = settings.get("init"), environment.pop("objectives", None)
    name = environment.pop("name", DEFAULT)
    if init is not None:
        require(
            "warmstart_steps" not in given,
            "warmstart-steps",
            "none beside model",
            given.get("warmstart_steps"),
        )
    elif name != DEFAULT:
        raise InputError(f"model: expected one for an environment other than {DEFAULT}, got none")
    else:
        objectives = objectives or (1, 4)
    rollout = settings.pop("rollout", {})
    free = {"format": MEM1, "max_info_tokens": None, "max_turns": None}
    world = argparse.Namespace(
        environment=imported(name) if isinstance(name, str) and ":" in name else name,
        tasks=environment.pop("tasks", None),
        environment_args=environment,
        hops=None,
        passage_tokens=None,
        turn_hint=given.get("turn_hint", False),
        **free | rollout,
    )
    record = environment_record(world) | ({"objectives": objectives} if objectives else {})
    most = max(objectives) if isinstance(objectives, tuple) else objectives
    config = made(settings | {"environment": record, "rollout": vars(rollout_config(world, most))})
    return config, world


def _settings(given: Mapping[str, Any]) -> Settings:
    """What short options say, by the names of the settings."""
    twice = next(
        (n for n in ("hops", "passage_tokens") if n in given and n in given.get("environment_args", ())), None
    )
    require(twice is None, str(twice), "it here or in environment-args, not both", given.get(str(twice)))
    found: Settings = {"environment": dict(given.get("environment_args", {}))}
    for name, value in given.items():
        if name == "environment":
            found["environment"]["name"] = value
        elif name in _SETTINGS:
            section, _, last = _SETTINGS[name].rpartition(".")
            (found.setdefault(section, {}) if section else found)[last] = value
    return found


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
