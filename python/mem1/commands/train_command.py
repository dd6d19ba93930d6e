"""`mem1 train`."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

from mem1.checks import InputError, require
from mem1.commands.loading import check_writable
from mem1.commands.world_options import closing, environment_record, rollout_config, world_of
from mem1.config import AlgorithmConfig, ModelConfig, ScaleConfig, TrainConfig, WarmStartConfig
from mem1.envs.toy.training import toy_training
from mem1.envs.worlds import DEFAULT
from mem1.runtime.progress import Progress
from mem1.train.train_loop import train


def run(options: argparse.Namespace, progress: Progress) -> None:
    steps, objectives = options.warmstart_steps, options.objectives
    if options.model is not None:
        require(steps is None, "warmstart-steps", "none beside model", steps)
    elif options.environment != DEFAULT:
        raise InputError(f"model: expected one for an environment other than {DEFAULT}, got none")
    else:
        objectives = objectives or (1, 4)
    environment = environment_record(options) | ({"objectives": objectives} if objectives else {})
    config = TrainConfig(
        max_updates=options.max_updates,
        batch_size=options.batch_size,
        group_size=options.group_size,
        environment=environment,
        save_every=options.save_every,
        keep=options.keep,
        trackers=tuple(options.track),
        scale=ScaleConfig(**{field.name: getattr(options, field.name) for field in fields(ScaleConfig)}),
        device=options.device,
        threads=options.threads,
        seed=options.seed,
        model=ModelConfig(dtype=options.dtype),
        rollout=rollout_config(options, objectives and objectives[1]),
        warmstart=WarmStartConfig(steps=WarmStartConfig.steps if steps is None else steps),
        algorithm=AlgorithmConfig(
            name=options.algorithm,
            actor_lr=options.actor_lr,
            critic_lr=options.critic_lr,
            kl_coef=options.kl_coef,
        ),
    )
    check_writable(options.out)
    with _task(options, config) as task:
        try:
            train(
                config,
                options.out,
                **task,
                init=options.model,
                resume=options.resume,
                overwrite=options.overwrite,
                progress=progress,
            )
        except KeyboardInterrupt:
            progress.log(f"stopped; the same options with --resume go on from what is in {options.out}")
            raise
    progress.log(f"checkpoint and metrics are in {options.out}")


@contextmanager
def _task(options: argparse.Namespace, config: TrainConfig) -> Iterator[dict[str, Any]]:
    """What `train` is to be given beside its settings."""
    world = world_of(options, config.environment.get("objectives"), "train")
    if options.model is None:
        yield toy_training(config)
        return
    with closing([world]):
        yield {"make_environment": world.make, "tasks": world.tasks}
