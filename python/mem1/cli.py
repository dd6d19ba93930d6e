"""The command `mem1`."""

from __future__ import annotations

import argparse
import json
import signal
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from mem1.checks import InputError, require
from mem1.config import (
    EvictionPolicy,
    ModelConfig,
    PPOConfig,
    RolloutConfig,
    TrainConfig,
    WarmStartConfig,
)
from mem1.demo import demo
from mem1.envs.toy.training import toy_training
from mem1.evaluation.evaluation_loop import OBJECTIVES, evaluate
from mem1.evaluation.results import Result, table
from mem1.io import atomic_write, ignore_closed_pipe
from mem1.models.load import load_report
from mem1.options import (
    build_parser,
    environment_arguments,
    environment_maker,
    environment_name,
    rollout_config,
)
from mem1.parsing.token_text import TokenText
from mem1.rollout.rollout_loop import check_positions, make_codec, make_engine, rollout
from mem1.runtime.device import whereabouts
from mem1.runtime.interrupts import Interrupts
from mem1.runtime.progress import Progress
from mem1.runtime.waiting import share_cpus
from mem1.seeds import LARGEST
from mem1.train import checkpoint
from mem1.train.parity import parity
from mem1.train.run_folder import CONFIG
from mem1.train.train_loop import train
from mem1.trajectory import Trajectory
from mem1_core.eviction_policies import rule_name


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status: 0; 2 for what the user gave and cannot be used, with one line
    on stderr; 128 and the signal's number for a run that a signal ended, 130 for Ctrl-C. What else goes wrong
    is a bug, or the machine's, and shows its traceback.
    """
    runs = {"train": _train, "eval": _eval, "rollout": _rollout, "demo": _demo}
    options = build_parser(runs).parse_args(arguments)
    try:
        with share_cpus(), Interrupts() as interrupts, interrupts.allowed():
            options.run(options, Progress())
    except InputError as error:
        _complain(f"mem1 {options.command}: {error}")
        return 2
    except KeyboardInterrupt as error:
        _complain(f"mem1 {options.command}: {str(error) or 'interrupted'}")
        return 128 + int(getattr(error, "signum", signal.SIGINT))
    return 0


def _complain(line: str) -> None:
    with ignore_closed_pipe(sys.stderr):  # Ctrl-C ends the `tee` after `2>&1 |` as well
        print(line, file=sys.stderr, flush=True)


def _train(options: argparse.Namespace, progress: Progress) -> None:
    steps, objectives = options.warmstart_steps, options.objectives
    if options.model is not None:
        require(steps is None, "warmstart-steps", "none beside model", steps)
    elif options.environment is not None:
        raise InputError("model: expected one for an environment of your own, got none")
    else:
        objectives = objectives or (1, 4)
    environment = environment_name(options) | environment_arguments(options)
    environment |= {"objectives": objectives} if objectives else {}
    config = TrainConfig(
        max_updates=options.max_updates,
        batch_size=options.batch_size,
        environment=environment,
        save_every=options.save_every,
        keep=options.keep,
        device=options.device,
        threads=options.threads,
        seed=options.seed,
        model=ModelConfig(dtype=options.dtype),
        rollout=rollout_config(options, objectives and objectives[1]),
        warmstart=WarmStartConfig(steps=WarmStartConfig.steps if steps is None else steps),
        ppo=PPOConfig(actor_lr=options.actor_lr, critic_lr=options.critic_lr, kl_coef=options.kl_coef),
    )
    _check_writable(options.out)
    try:
        train(
            config,
            options.out,
            **_task(options, config),
            init=options.model,
            resume=options.resume,
            overwrite=options.overwrite,
            progress=progress,
        )
    except KeyboardInterrupt:
        progress.log(f"stopped; the same options with --resume go on from what is in {options.out}")
        raise
    progress.log(f"checkpoint and metrics are in {options.out}")


def _task(options: argparse.Namespace, config: TrainConfig) -> dict[str, Any]:
    """What `train` is to be given beside its settings."""
    if options.model is None:
        return toy_training(config)
    return {"make_environment": environment_maker(options, options.objectives)}


def _eval(options: argparse.Namespace, progress: Progress) -> None:
    sizes = options.objectives or ([None] if options.environment else OBJECTIVES)
    makers = {n: environment_maker(options, n) for n in sizes}
    configs = {n: rollout_config(options, n) for n in sizes}
    agent = "MEM1" if options.prune in ("action", "state") else str(rule_name(options.prune))
    prunes: list[tuple[str, EvictionPolicy]] = [(agent, options.prune), ("full context", "never")]
    if options.truncate is not None:
        prunes.append((f"truncated to {options.truncate}", options.truncate))
    model, tokenizer = _load(options, progress)
    _log_other_settings(options.model, configs[sizes[0]], progress)
    rules = [replace(config, prune=prune) for config in configs.values() for _, prune in prunes]
    for config in rules:
        check_positions(model, config)  # of all rows before the first one
    make_codec(tokenizer, rules[0], model)  # a copy of its vocabulary is part of the memory
    engine = make_engine(model, max(rules, key=RolloutConfig.peak_tokens), options.episodes, progress.log)
    results: list[Result] = []
    for agent, prune in prunes:
        trajectories: list[Trajectory] = []
        for n, config in configs.items():
            row, played = evaluate(
                model,
                tokenizer,
                replace(config, prune=prune),
                makers[n],
                agent=agent,
                objectives=n or 1,
                episodes=options.episodes,
                seed=options.seed,
                engine=engine,
                progress=progress,
            )
            results.append(row)
            trajectories += played
        _log_failures(trajectories, progress)
        progress.log(f"{agent}: sampled and recomputed log-probs")
        progress.log(table([parity(model, trajectories, options.regime, options.temperature)]))
    progress.log("means per sound episode; lengths in tokens, seconds of wall time per episode")
    progress.log(table(results))


def _rollout(options: argparse.Namespace, progress: Progress) -> None:
    objectives = options.objectives or (None if options.environment else (2, 2))
    make_environment = environment_maker(options, objectives)
    if options.expert and isinstance(options.environment, type):
        able = hasattr(options.environment, "expert_action")
        require(able, "expert", "an environment with expert_action", options.environment.__qualname__)
    config = rollout_config(options, objectives and objectives[1])
    seeds = range(options.seed, options.seed + options.episodes)
    require(seeds[-1] < LARGEST, "seed", "one whose last episode is below 2**53", options.seed)
    if options.out is not None:
        require(
            options.out.is_file() or not options.out.exists(),
            "out",
            "the name of a regular file",
            str(options.out),
        )
        _check_writable(options.out.parent)
    model, tokenizer = _load(options, progress)
    _log_other_settings(options.model, config, progress)
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
    make_codec(tokenizer, config, model)  # a copy of its vocabulary is part of the memory
    episodes = options.episodes * options.group_size
    engine = make_engine(model, config, episodes, progress.log)
    start, tokens, failed = time.perf_counter(), 0, list[Trajectory]()
    with (
        atomic_write(options.out) if options.out else nullcontext() as file,
        progress.phase("episodes", total=episodes) as phase,
    ):
        for trajectory in rollout(
            model,
            tokenizer,
            make_environment,
            seeds,
            config,
            group_size=options.group_size,
            expert=options.expert,
            engine=engine,
        ):
            tokens += int(trajectory.policy_mask.sum())
            phase.advance()
            failed += [trajectory] if trajectory.error_kind else []
            if file is None:
                progress.log(transcript(trajectory, tokenizer) + "\n")
            else:
                file.write(trajectory.to_json() + "\n")
    seconds = time.perf_counter() - start
    progress.log(f"{episodes} episodes, {tokens} policy tokens, {tokens / seconds:.0f} per second")
    _log_failures(failed, progress)
    if options.out:
        progress.log(f"trajectories are in {options.out}")
    if len(failed) == episodes:
        expected = "an episode that can be played"
        raise InputError(f"rollout: expected {expected}, got {episodes} that failed, by {_reason(failed[0])}")


def _log_failures(trajectories: Iterable[Trajectory], progress: Progress) -> None:
    failed = [trajectory for trajectory in trajectories if trajectory.error_kind]
    if failed:
        progress.log(f"{len(failed)} episodes failed, seed {failed[0].seed} by {_reason(failed[0])}")


def _reason(failed: Trajectory) -> str:
    return f"{failed.finish_reason}: {failed.error}"


def transcript(trajectory: Trajectory, tokenizer: PreTrainedTokenizerBase) -> str:
    """A trajectory for people: one line per segment, then how it went."""
    text_of, lines, start = TokenText(tokenizer), [], 0
    for kind, turn, length in trajectory.segments:
        text = text_of.decode(trajectory.tokens[start : start + length].tolist())
        lines.append(f"{turn:3d} {kind:>6}  {text}")
        start += length
    lines.append(
        f"seed {trajectory.seed}: {trajectory.error or trajectory.finish_reason}, "
        f"reward {trajectory.reward:.3f}, {start} tokens, at most {trajectory.peak_tokens()} at once"
    )
    return "\n".join(lines)


def _demo(options: argparse.Namespace, progress: Progress) -> None:
    _check_writable(options.out)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    demo(
        options.out,
        quick=options.quick,
        seed=options.seed,
        overwrite=options.overwrite,
        progress=progress,
    )


def _load(options: argparse.Namespace, progress: Progress) -> tuple[Any, PreTrainedTokenizerBase]:
    """The model on the device that was asked for, and its tokenizer."""
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    model, tokenizer, _ = checkpoint.load(options.model, options.dtype, options.device)
    progress.log(whereabouts(model))
    progress.log(str(load_report(model, tokenizer, options.model)))
    return model, tokenizer


def _log_other_settings(model: str, config: RolloutConfig, progress: Progress) -> None:
    """A run's format and rules are not part of its model: say where others are asked for."""
    for folder in (Path(model), Path(model).parent, Path(model).parent.parent):
        if (folder / CONFIG).is_file():
            trained = json.loads((folder / CONFIG).read_text()).get("rollout", {})
            now = TrainConfig(rollout=replace(config, greedy=False)).to_dict()["rollout"]
            for name in "format chat system observation_role prune regime".split():
                was, given = trained.get(name, now[name]), json.loads(json.dumps(now[name]))
                if was != given:
                    progress.log(f"trained with {name} {was}, now {given}")
            return


def _check_writable(folder: Path) -> None:
    """InputError, before any work, if nothing can be written to `folder`, which need not be there yet."""
    try:
        there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise InputError(
            f"out: expected a folder that can be written to, got {str(folder)!r}: {error.strerror}"
        ) from None
