"""`mem1 train` and `mem1 plan`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

from torch.distributed import is_torchelastic_launched

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
from mem1.train import checkpoint
from mem1.train.plan import Plan, plan
from mem1.train.run_folder import CONFIG
from mem1.train.train_loop import train
from mem1.trajectory import Trajectory
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


class Stage(NamedTuple):
    """One run of several. awaited: the model that it begins with is what another recipe makes, and is not
    there yet.
    """

    out: Path
    config: TrainConfig
    world: argparse.Namespace
    awaited: bool = False

    def plan(self, played: list[Trajectory] | None = None, **how: Any) -> Plan:
        """What is yet to come is as large as a new model of these settings."""
        return plan(replace(self.config, init=None) if self.awaited else self.config, played, **how)


def run(options: argparse.Namespace, progress: Progress) -> None:
    """One run, or one after the other; all settings are read before the first begins."""
    stages = stages_of(options.config or [None], options.out, options)
    if options.print_config:
        with ignore_closed_pipe(sys.stdout):
            print("---\n".join(to_yaml(stage.config) for stage in stages), end="", flush=True)
        return
    if options.dry_run:
        for stage in stages:
            progress.log(str(stage.plan()))
        return
    train_stages(stages, progress, resume=options.resume, overwrite=options.overwrite)


def train_stages(
    stages: Sequence[Stage],
    progress: Progress,
    *,
    resume: bool = False,
    overwrite: bool = False,
    goes_on: str = "mem1 train goes on from it with --resume",
) -> None:
    """One after the other. resume: go on with what there is; of several, those that have not begun begin.
    goes_on: what is said of a run that was stopped.
    """
    several = len(stages) > 1
    for number, stage in enumerate(stages):
        check_writable(stage.out)
        begun = resume and (stage.out / CONFIG).is_file()
        earlier = [before.out for before in stages[:number]]
        there = begun or not stage.awaited or _within(str(stage.config.init), earlier)
        require(there, "init", "a run that another recipe makes: run that one first", stage.config.init)
    for number, stage in enumerate(stages, 1):
        if several:
            progress.log(f"[{number}/{len(stages)}] {stage.out}")
        again = resume and (not several or (stage.out / CONFIG).is_file())
        _train(stage, again, overwrite, goes_on, progress)


def stages_of(recipes: Sequence[Path | None], out: Path | None, options: argparse.Namespace) -> list[Stage]:
    """A run for each file of settings (None: for none), over which the options count; InputError before any
    begins. out: the folder of one, or that of several in folders of their names; by default below runs/.
    """
    several = len(recipes) > 1
    require(not (several and is_torchelastic_launched()), "config", "one file a torchrun", len(recipes))
    stages = list[Stage]()
    for recipe in recipes:
        folder = Path("runs", *_below_recipes(recipe)) if recipe else Path("runs", "train")
        if out:
            folder = out / folder.name if several else out
        require(
            folder not in [stage.out for stage in stages], "config", "files of different names", str(recipe)
        )
        config, world = resolved(options, recipe)
        init, awaited = _beside(config.init, recipe, folder, [stage.out for stage in stages])
        stages.append(Stage(folder, replace(config, init=init), world, awaited))
    return stages


def _below_recipes(recipe: Path) -> Sequence[str]:
    """Of recipes/a/b.yaml a and b, of any other file its name alone."""
    parts = recipe.absolute().with_suffix("").parts
    return parts[len(parts) - parts[::-1].index("recipes") :] if "recipes" in parts else parts[-1:]


def _beside(
    init: str | None, recipe: Path | None, out: Path, earlier: Sequence[Path]
) -> tuple[str | None, bool]:
    """A model's place, and whether it is awaited: an `init` that names a model beside the run's own folder,
    an earlier run of this call, or another recipe beside its own, whose run is to be there, is that.
    """
    if init is None or Path(init).is_absolute():
        return init, False
    there = out.parent / init
    if (there / "config.json").is_file() or checkpoint.numbered(there):
        return str(there), False
    other = recipe and (recipe.parent / Path(init).parts[0]).with_suffix(recipe.suffix)
    awaited = _within(there, earlier) or (other is not None and other != recipe and other.is_file())
    return (str(there), True) if awaited else (init, False)


def _within(path: str | Path, runs: Sequence[Path]) -> bool:
    return any(run in (Path(path), *Path(path).parents) for run in runs)


def _train(stage: Stage, resume: bool, overwrite: bool, goes_on: str, progress: Progress) -> None:
    out = stage.out
    with _task(stage.world, stage.config) as task:
        try:
            train(stage.config, out, **task, resume=resume, overwrite=overwrite, progress=progress)
        except KeyboardInterrupt:
            progress.log(f"stopped; what is in {out} stays, and {goes_on}")
            raise
    if Ranks.current().first:
        progress.log(f"checkpoint and metrics are in {out}")


def run_plan(options: argparse.Namespace, progress: Progress) -> None:
    (stage,) = stages_of([options.config], None, options)
    played = None if options.trajectories is None else read_trajectories(options.trajectories)
    found = stage.plan(played, mfu=options.mfu)
    if options.json:
        with ignore_closed_pipe(sys.stdout):
            print(json.dumps(found.to_dict()), flush=True)
    else:
        progress.log(str(found))


def resolved(
    options: argparse.Namespace, recipe: Path | None = None
) -> tuple[TrainConfig, argparse.Namespace]:
    """The settings of a run: of its config file, over these what the options say, over these what is given
    by its full name. And its world, as the options of other commands have it.
    """
    given = {name: value for name, value in vars(options).items() if value is not None}
    layers = [read(recipe) if recipe else {}, _settings(given), options.settings]
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
    if init is None:
        if name != DEFAULT:
            raise InputError(f"model: expected one for an environment other than {DEFAULT}, got none")
        objectives = (1, 4) if objectives is None else objectives
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
