"""The command `mem1`."""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, get_args

import torch
from transformers import PreTrainedTokenizerBase

from mem1.checks import InputError, require
from mem1.config import (
    DTYPES,
    EvictionPolicy,
    ModelConfig,
    PPOConfig,
    Regime,
    RolloutConfig,
    TrainConfig,
    WarmStartConfig,
)
from mem1.demo import demo
from mem1.engine.engine import Engine
from mem1.envs.toy.multihop import MultiHopEnv
from mem1.envs.toy.training import toy_training
from mem1.evaluation.evaluation_loop import OBJECTIVES, Result, evaluate, table
from mem1.io import atomic_write, ignore_closed_pipe
from mem1.rollout.rollout_loop import check_positions, rollout
from mem1.runtime.device import pick_device, whereabouts
from mem1.runtime.interrupts import Interrupts
from mem1.runtime.progress import Progress
from mem1.runtime.waiting import share_cpus
from mem1.seeds import LARGEST
from mem1.train import checkpoint
from mem1.train.parity import parity
from mem1.train.train_loop import train
from mem1.trajectory import Trajectory


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status: 0; 2 for what the user gave and cannot be used, with one line
    on stderr; 128 and the signal's number for a run that a signal ended, 130 for Ctrl-C. What else goes wrong
    is a bug, or the machine's, and shows its traceback.
    """
    options = _parser().parse_args(arguments)
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
    steps = options.warmstart_steps
    if options.init is not None:  # it has weights
        require(options.dtype is None, "dtype", "none beside init", options.dtype)
        require(steps is None, "warmstart-steps", "none beside init", steps)
    config = TrainConfig(
        max_updates=options.max_updates,
        batch_size=options.batch_size,
        environment=_environment(options),
        save_every=options.save_every,
        keep=options.keep,
        device=options.device,
        threads=options.threads,
        seed=options.seed,
        model=ModelConfig(dtype=options.dtype or ModelConfig.dtype),
        rollout=_rollout_config(options, options.objectives[1]),
        warmstart=WarmStartConfig(steps=WarmStartConfig.steps if steps is None else steps),
        ppo=PPOConfig(actor_lr=options.actor_lr, critic_lr=options.critic_lr, kl_coef=options.kl_coef),
    )
    _check_writable(options.out)
    try:
        train(
            config,
            options.out,
            **toy_training(config),
            init=options.init,
            resume=options.resume,
            overwrite=options.overwrite,
            progress=progress,
        )
    except KeyboardInterrupt:
        progress.log(f"stopped; the same options with --resume go on from what is in {options.out}")
        raise
    progress.log(f"checkpoint and metrics are in {options.out}")


def _eval(options: argparse.Namespace, progress: Progress) -> None:
    makers = {n: _maker(options, n) for n in options.objectives}
    configs = {n: _rollout_config(options, n) for n in options.objectives}
    prunes: list[tuple[str, EvictionPolicy]] = [("MEM1", options.prune), ("full context", "never")]
    if options.truncate is not None:
        prunes.append((f"truncated to {options.truncate}", options.truncate))
    model, tokenizer = _load(options, progress)
    for config in configs.values():
        check_positions(model, replace(config, prune="never"))  # of all rows before the first one
    slots = min(options.num_slots, options.episodes)
    engine = Engine(model, slots, RolloutConfig.max_num_batched_tokens)
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
                objectives=n,
                episodes=options.episodes,
                seed=options.seed,
                engine=engine,
                progress=progress,
            )
            results.append(row)
            trajectories += played
        progress.log(f"{agent}: sampled and recomputed log-probs")
        progress.log(table([parity(model, trajectories, options.regime, options.temperature)]))
    progress.log("means per sound episode; lengths in tokens, seconds of wall time per episode")
    progress.log(table(results))


def _rollout(options: argparse.Namespace, progress: Progress) -> None:
    make_environment = _maker(options, options.objectives)
    config = _rollout_config(options, options.objectives[1])
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
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
    start, tokens = time.perf_counter(), 0
    with (
        atomic_write(options.out) if options.out else nullcontext() as file,
        progress.phase("episodes", total=options.episodes) as phase,
    ):
        for trajectory in rollout(model, tokenizer, make_environment, seeds, config, expert=options.expert):
            tokens += int(trajectory.policy_mask.sum())
            phase.advance()
            if file is None:
                progress.log(transcript(trajectory, tokenizer) + "\n")
            else:
                file.write(trajectory.to_json() + "\n")
    seconds = time.perf_counter() - start
    progress.log(f"{options.episodes} episodes, {tokens} policy tokens, {tokens / seconds:.0f} per second")
    if options.out:
        progress.log(f"trajectories are in {options.out}")


def transcript(trajectory: Trajectory, tokenizer: PreTrainedTokenizerBase) -> str:
    """A trajectory for people: one line per segment, then how it went."""
    lines, start = [], 0
    for kind, turn, length in trajectory.segments:
        text = tokenizer.decode(trajectory.tokens[start : start + length])
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
    device = pick_device(options.device)
    model, tokenizer, _ = checkpoint.load(options.model)
    model = model.to(device)
    progress.log(whereabouts(model))
    return model, tokenizer


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


def _environment(options: argparse.Namespace) -> dict[str, Any]:
    return {
        "objectives": options.objectives,
        "hops": options.hops,
        "passage_tokens": options.passage_tokens,
    }


def _maker(options: argparse.Namespace, objectives: int | tuple[int, int]) -> Callable[[], MultiHopEnv]:
    """Makes the environment of the options; InputError, before any work, if one is out of its range."""
    make = partial(MultiHopEnv, **_environment(options) | {"objectives": objectives})
    make()
    return make


def _rollout_config(options: argparse.Namespace, objectives: int) -> RolloutConfig:
    """The settings of the sampler for episodes of at most that many objectives.

    Limits that were not given leave room: for a whole passage, and for twice the turns of the expert.
    They leave no more than that: a model has to have a position for every token that they allow.
    """
    default = RolloutConfig()
    room = 2 * (objectives * options.hops + 1)
    return RolloutConfig(
        num_slots=options.num_slots,
        regime=options.regime,
        prune=options.prune,
        temperature=options.temperature,
        top_p=options.top_p,
        top_k=options.top_k,
        greedy=options.greedy,
        max_action_tokens=options.max_action_tokens,
        max_info_tokens=64 + options.passage_tokens
        if options.max_info_tokens is None
        else options.max_info_tokens,
        max_turns=max(default.max_turns, room) if options.max_turns is None else options.max_turns,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mem1",
        description="Train, evaluate and run agents with constant memory (MEM1, arXiv 2506.15841).",
    )
    config = TrainConfig()
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(
        name: str, run: Callable[[argparse.Namespace, Progress], None], text: str
    ) -> argparse._ArgumentGroup:
        new = commands.add_parser(
            name,
            help=text,
            description=text,
            parents=[] if run is _demo else [_environment_options(), _sampling_options()],
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        )
        new.set_defaults(run=run)
        group = new.add_argument_group(name)
        group.add_argument("--threads", type=_positive, help="CPU threads; None leaves torch's choice")
        if run is not _demo:
            group.add_argument("--device", default=config.device, help="auto, cpu, cuda or cuda:N")
        return group

    add = command("train", _train, "warm start on expert trajectories, then PPO").add_argument
    add("--out", type=Path, default=Path("runs/train"), help="folder of the run")
    add("--init", type=Path, help="checkpoint to start PPO from, without a warm start")
    add("--resume", action="store_true", help="go on in --out, with the options of that run")
    add("--overwrite", action="store_true", help="start over in an --out that has a run")
    add("--objectives", type=_interval, default=(1, 4), help="questions per episode: 2 or 1-4")
    add("--max-updates", type=int, default=config.max_updates, help="PPO updates")
    add("--batch-size", type=_positive, default=config.batch_size, help="episodes per update")
    add("--warmstart-steps", type=int, help=f"supervised steps; None: {config.warmstart.steps}")
    add("--actor-lr", type=float, default=config.ppo.actor_lr, help="learning rate of the policy")
    add("--critic-lr", type=float, default=config.ppo.critic_lr, help="learning rate of the critic")
    add("--kl-coef", type=float, default=config.ppo.kl_coef, help="weight of the KL to the start of PPO")
    add("--dtype", choices=DTYPES, help=f"of a new model's weights; None: {config.model.dtype}")
    add(
        "--save-every",
        type=_positive,
        default=config.save_every,
        help="updates from checkpoint to checkpoint",
    )
    add("--keep", type=_positive, default=config.keep, help="checkpoints: the newest, beside the best")
    add("--seed", type=_seed, default=config.seed, help="of the run: weights, episodes, samples, order")

    add = command("eval", _eval, "MEM1 beside the full-context agent of the same weights").add_argument
    add("model", type=Path, help="checkpoint folder")
    add("--objectives", type=_positive, nargs="+", default=OBJECTIVES, help="questions per episode")
    add("--episodes", type=_positive, default=16, help="episodes per number of objectives")
    add("--seed", type=_seed, default=0, help="of the evaluation; its episodes are never trained on")
    add("--truncate", type=_positive, metavar="W", help="beside the full-context agent also --prune W")

    add = command("rollout", _rollout, "let an agent play and print or save what it does").add_argument
    add("model", type=Path, help="checkpoint folder")
    add("--objectives", type=_interval, default=(2, 2), help="questions per episode: 2 or 1-4")
    add("--episodes", type=_positive, default=4, help="how many")
    add("--expert", action="store_true", help="the environment's expert writes, the model reads along")
    add("--out", type=Path, help="write trajectories to this .jsonl file instead of the terminal")
    add("--seed", type=_seed, default=0, help="of the first episode itself, as a trajectory has it")

    add = command(
        "demo", _demo, "train, evaluate and plot in about five minutes on two idle cores"
    ).add_argument
    add("--out", type=Path, default=Path("runs/demo"), help="folder for everything it makes")
    add("--overwrite", action="store_true", help="start over in an --out that has a run")
    add("--quick", action="store_true", help="the same in well under a minute, without learning much")
    add("--seed", type=_seed, default=0, help="of the training and the evaluation")
    return parser


def _environment_options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(add_help=False)
    add = parser.add_argument_group("environment").add_argument
    add("--hops", type=_positive, default=2, help="relations to follow per question")
    add("--passage-tokens", type=int, default=0, help="length of an answer to a query; 0: bare answer")
    return parser


def _sampling_options() -> argparse.ArgumentParser:
    default = RolloutConfig()
    parser = argparse.ArgumentParser(add_help=False)
    add = parser.add_argument_group("sampling").add_argument
    add("--num-slots", type=_positive, default=default.num_slots, help="episodes side by side")
    add("--regime", choices=get_args(Regime), default=default.regime, help="what a prune does to the cache")
    add(
        "--prune",
        type=_prune,
        default=default.prune,
        metavar="{action,state,never,W}",
        help="when the turns before are dropped; W: as 'action', but only the oldest beyond W tokens",
    )
    add("--temperature", type=float, default=default.temperature, help="of the sampler")
    add("--top-p", type=float, default=default.top_p, help="nucleus of the sampler")
    add("--top-k", type=int, default=default.top_k, help="most likely tokens only; 0: all")
    add("--greedy", action="store_true", help="always the most likely token")
    add("--max-action-tokens", type=_positive, default=default.max_action_tokens, help="tokens of one action")
    add(
        "--max-info-tokens",
        type=int,
        help="tokens the environment may say in one turn; None: room for a passage",
    )
    add("--max-turns", type=_positive, help="turns of one episode; None: at least twice the expert's")
    return parser


def _prune(text: str) -> EvictionPolicy | str:
    """A number where it is one; RolloutConfig says what is wrong with the rest."""
    return int(text) if text.isdecimal() else text


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected an integer >= 1, got {text}")
    return int(text)


def _seed(text: str) -> int:
    if not text.isdecimal() or int(text) >= LARGEST:
        raise argparse.ArgumentTypeError(f"expected an integer in [0, 2**53), got {text}")
    return int(text)


def _interval(text: str) -> tuple[int, int]:
    low, dash, high = text.partition("-")
    try:
        return int(low), int(high if dash else low)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"expected a number or an interval such as 1-4, got {text!r}"
        ) from None
