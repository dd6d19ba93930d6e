"""`mem1 rollout`."""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from pathlib import Path

from mem1.checks import InputError, require
from mem1.commands.loading import check_writable, load_policy, log_failures, log_other_settings, reason
from mem1.commands.world_options import closing, rollout_config, world_of
from mem1.envs.tasks import TaskStream
from mem1.envs.worlds import DEFAULT
from mem1.evaluation.transcripts import transcript
from mem1.io import atomic_write
from mem1.rollout.rollout_loop import make_codec, make_engine, rollout
from mem1.runtime.progress import Progress
from mem1.seeds import LARGEST
from mem1.trajectory import Trajectory


def run(options: argparse.Namespace, progress: Progress) -> None:
    objectives = options.objectives or ((2, 2) if options.environment == DEFAULT else None)
    world = world_of(options, objectives, "test", options.episodes)
    if options.expert and isinstance(options.environment, type):
        able = hasattr(options.environment, "expert_action")
        require(able, "expert", "an environment with expert_action", options.environment.__qualname__)
    config = rollout_config(options, objectives and objectives[1])
    seeds = range(options.seed, options.seed + options.episodes)
    require(seeds[-1] < LARGEST, "seed", "one whose last episode is below 2**53", options.seed)
    stream = None if world.tasks is None else TaskStream(world.tasks, 0)
    rows = stream and [stream[seed] for seed in seeds]
    if options.out is not None:
        there = options.out.exists()
        require(options.out.is_file() or not there, "out", "the name of a regular file", str(options.out))
        require(options.overwrite or not there, "out", "a new file, or --overwrite", str(options.out))
        check_writable(options.out.parent)
    model, tokenizer = load_policy(options, progress)
    log_other_settings(options.model, config, progress)
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
    make_codec(tokenizer, config, model)  # a copy of its vocabulary is part of the memory
    episodes = options.episodes * options.group_size
    engine = make_engine(model, config, episodes, progress.log)
    start, tokens, failed = time.perf_counter(), 0, list[Trajectory]()
    with closing([world]), progress.phase("episodes", total=episodes) as phase:

        def counted() -> Iterator[Trajectory]:
            nonlocal tokens
            for trajectory in rollout(
                model,
                tokenizer,
                world.make,
                seeds,
                config,
                tasks=rows,
                group_size=options.group_size,
                expert=options.expert,
                engine=engine,
            ):
                tokens += int(trajectory.policy_mask.sum())
                failed.extend([trajectory] if trajectory.error_kind else [])
                phase.advance()
                yield trajectory

        if options.out is None:
            for trajectory in counted():
                progress.log(transcript(trajectory, tokenizer) + "\n")
        else:
            _write(counted(), options.out, progress)
    seconds = time.perf_counter() - start
    progress.log(f"{episodes} episodes, {tokens} policy tokens, {tokens / seconds:.0f} per second")
    log_failures(failed, progress)
    if len(failed) == episodes:
        expected = "an episode that can be played"
        raise InputError(f"rollout: expected {expected}, got {episodes} that failed, by {reason(failed[0])}")


def _write(played: Iterator[Trajectory], path: Path, progress: Progress) -> None:
    """Trajectories as they come; those that were played before something ended it are kept, too."""
    ended: BaseException | None = None
    count = 0
    with atomic_write(path) as file:
        try:
            for trajectory in played:
                file.write(trajectory.to_json() + "\n")
                count += 1
        except (InputError, KeyboardInterrupt, RuntimeError) as error:
            if not count:
                raise
            ended = error
    progress.log(f"{count} trajectories are in {path}")
    if ended is not None:
        raise ended
