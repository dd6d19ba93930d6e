"""The command `mem1`."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import get_args

import torch
from transformers import PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

from mem1 import checkpoint
from mem1.io import whole_file
from mem1.config import PPOConfig, Prune, Regime, RolloutConfig, TrainConfig, WarmStartConfig
from mem1.demo import demo
from mem1.envs.multihop import MultiHopEnv
from mem1.evaluate import OBJECTIVES, Result, evaluate, parity, table
from mem1.rollout import rollout
from mem1.train import train
from mem1.trajectory import Trajectory


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status. Errors of the user are one line on stderr and status 2."""
    options = _parser().parse_args(arguments)
    disable_progress_bar()  # transformers draws one for every checkpoint
    try:
        options.run(options)
    except (ValueError, OSError, ImportError) as error:
        print(f"mem1 {options.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


def _train(options: argparse.Namespace) -> None:
    config = TrainConfig(
        updates=options.updates,
        seconds=options.seconds,
        batch=options.batch,
        objectives=options.objectives,
        hops=options.hops,
        passage_tokens=options.passage_tokens,
        threads=options.threads,
        seed=options.seed,
        rollout=_rollout_config(options, options.objectives[1]),
        warmstart=WarmStartConfig(seconds=options.warmstart_seconds, steps=options.warmstart_steps),
        ppo=PPOConfig(actor_lr=options.actor_lr, critic_lr=options.critic_lr, kl=options.kl),
    )
    train(config, options.out, init=options.init, resume=options.resume)
    print(f"checkpoint and metrics are in {options.out}")


def _eval(options: argparse.Namespace) -> None:
    _threads(options)

    def make_environment(n: int) -> MultiHopEnv:
        return MultiHopEnv(n, options.hops, options.passage_tokens)

    for n in options.objectives:
        make_environment(n)  # one that is out of range fails before any work
    configs = {n: _rollout_config(options, n) for n in options.objectives}
    model, tokenizer, _ = checkpoint.load(options.model)
    results: list[Result] = []
    prunes: list[tuple[str, Prune]] = [("MEM1", options.prune), ("full context", "never")]
    if options.truncate is not None:
        prunes.append((f"truncated to {options.truncate}", options.truncate))
    for agent, prune in prunes:
        trajectories: list[Trajectory] = []
        for n, config in configs.items():
            rows, played = evaluate(
                model,
                tokenizer,
                replace(config, prune=prune),
                agent=agent,
                objectives=(n,),
                episodes=options.episodes,
                seed=options.seed,
                make_environment=make_environment,
            )
            results += rows
            trajectories += played
        print(f"{agent}: sampled and recomputed log-probs")
        print(table([parity(model, trajectories, options.regime, options.temperature)]))
    print("means per episode; lengths in tokens, seconds of wall time per episode")
    print(table(results))


def _rollout(options: argparse.Namespace) -> None:
    _threads(options)

    def make_environment() -> MultiHopEnv:
        return MultiHopEnv(options.objectives, options.hops, options.passage_tokens)

    make_environment()  # one that is out of range fails before any work
    config = _rollout_config(options, options.objectives[1])
    model, tokenizer, _ = checkpoint.load(options.model)
    seeds = range(options.seed, options.seed + options.episodes)
    start, tokens = time.perf_counter(), 0
    with whole_file(options.out) if options.out else nullcontext() as file:
        for trajectory in rollout(
            model, tokenizer, make_environment, seeds, config, scripted=options.scripted
        ):
            tokens += int(trajectory.policy_mask.sum())
            if file is None:
                print(transcript(trajectory, tokenizer), end="\n\n")
            else:
                file.write(trajectory.to_json() + "\n")
    seconds = time.perf_counter() - start
    print(
        f"{options.episodes} episodes, {tokens} policy tokens, {tokens / seconds:.0f} per second",
        file=sys.stderr,
    )
    if options.out:
        print(f"trajectories are in {options.out}", file=sys.stderr)


def transcript(trajectory: Trajectory, tokenizer: PreTrainedTokenizerBase) -> str:
    """A trajectory for people: one line per segment, then how it went."""
    lines, start = [], 0
    for kind, turn, length in trajectory.segments:
        text = tokenizer.decode(trajectory.tokens[start : start + length])
        lines.append(f"{turn:3d} {kind:>6}  {text}")
        start += length
    lines.append(
        f"seed {trajectory.seed}: {trajectory.finished}, reward {trajectory.reward:.3f}, "
        f"{start} tokens, at most {trajectory.peak_tokens()} at once"
    )
    return "\n".join(lines)


def _demo(options: argparse.Namespace) -> None:
    _threads(options)
    demo(options.out, quick=options.quick, seed=options.seed)


def _threads(options: argparse.Namespace) -> None:
    if options.threads is not None:
        torch.set_num_threads(options.threads)


def _rollout_config(options: argparse.Namespace, objectives: int) -> RolloutConfig:
    """The settings of the sampler for episodes of at most that many objectives.

    Limits that were not given leave room for the world: a whole passage, and twice the turns of the expert.
    """
    default = RolloutConfig()
    room = 2 * (objectives * options.hops + 1)
    return RolloutConfig(
        slots=options.slots,
        regime=options.regime,
        prune=options.prune,
        temperature=options.temperature,
        top_p=options.top_p,
        top_k=options.top_k,
        greedy=options.greedy,
        max_action=options.max_action,
        max_info=max(default.max_info, options.passage_tokens)
        if options.max_info is None
        else options.max_info,
        max_turns=max(default.max_turns, room) if options.max_turns is None else options.max_turns,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mem1",
        description="Train, evaluate and run agents with constant memory (MEM1, arXiv 2506.15841).",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, run: Callable[[argparse.Namespace], None], text: str) -> argparse._ArgumentGroup:
        new = commands.add_parser(
            name,
            help=text,
            description=text,
            parents=[] if run is _demo else [_world(), _sampling()],
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        )
        new.set_defaults(run=run)
        group = new.add_argument_group(name)
        group.add_argument("--threads", type=_positive, help="CPU threads; None leaves torch's choice")
        return group

    config = TrainConfig()
    add = command("train", _train, "warm start on scripted trajectories, then PPO").add_argument
    add("--out", type=Path, default=Path("runs/train"), help="folder of the run")
    add("--init", type=Path, help="checkpoint to start PPO from, without a warm start")
    add("--resume", action="store_true", help="go on from the checkpoint in --out")
    add("--objectives", type=_interval, default=config.objectives, help="questions per episode: 2 or 1-4")
    add("--updates", type=int, default=config.updates, help="PPO updates, at most")
    add("--seconds", type=float, help="time for PPO, at most")
    add("--batch", type=_positive, default=config.batch, help="episodes per update")
    add("--warmstart-steps", type=int, default=config.warmstart.steps, help="supervised steps, at most")
    add("--warmstart-seconds", type=float, help="time for the supervised steps, at most")
    add("--actor-lr", type=float, default=config.ppo.actor_lr, help="learning rate of the policy")
    add("--critic-lr", type=float, default=config.ppo.critic_lr, help="learning rate of the critic")
    add("--kl", type=float, default=config.ppo.kl, help="weight of the KL to the start of PPO")
    add("--seed", type=_seed, default=config.seed, help="of the first episode")

    add = command("eval", _eval, "MEM1 beside the full-context agent of the same weights").add_argument
    add("model", type=Path, help="checkpoint folder")
    add("--objectives", type=_positive, nargs="+", default=OBJECTIVES, help="questions per episode")
    add("--episodes", type=_positive, default=16, help="episodes per number of objectives")
    add("--seed", type=_seed, default=1_000_000, help="of the first episode; training counts from 0")
    add("--truncate", type=_positive, metavar="W", help="beside the full-context agent also --prune W")

    add = command("rollout", _rollout, "let an agent play and print or save what it does").add_argument
    add("model", type=Path, help="checkpoint folder")
    add("--objectives", type=_interval, default=(2, 2), help="questions per episode: 2 or 1-4")
    add("--episodes", type=_positive, default=4, help="how many")
    add("--scripted", action="store_true", help="the environment's expert writes, the model reads along")
    add("--out", type=Path, help="write trajectories to this .jsonl file instead of the terminal")
    add("--seed", type=_seed, default=0, help="of the first episode")

    add = command("demo", _demo, "train, evaluate and plot in about five minutes").add_argument
    add("--out", type=Path, default=Path("runs/demo"), help="folder for everything it makes")
    add("--quick", action="store_true", help="the same in well under a minute, without learning much")
    add("--seed", type=_seed, default=0, help="of the first episode")
    return parser


def _world() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(add_help=False)
    add = parser.add_argument_group("world").add_argument
    add("--hops", type=_positive, default=2, help="relations to follow per question")
    add("--passage-tokens", type=int, default=0, help="length of an answer to a query; 0: bare answer")
    return parser


def _sampling() -> argparse.ArgumentParser:
    default = RolloutConfig()
    parser = argparse.ArgumentParser(add_help=False)
    add = parser.add_argument_group("sampling").add_argument
    add("--slots", type=_positive, default=default.slots, help="episodes side by side")
    add("--regime", choices=get_args(Regime), default=default.regime, help="what a prune does to the cache")
    add(
        "--prune",
        type=_prune,
        default=default.prune,
        metavar="{action,is,never,W}",
        help="when the turns before are dropped; W: as 'action', but only the oldest beyond W tokens",
    )
    add("--temperature", type=float, default=default.temperature, help="of the sampler")
    add("--top-p", type=float, default=default.top_p, help="nucleus of the sampler")
    add("--top-k", type=int, default=default.top_k, help="most likely tokens only; 0: all")
    add("--greedy", action="store_true", help="always the most likely token")
    add("--max-action", type=_positive, default=default.max_action, help="tokens of one action")
    add("--max-info", type=int, help="tokens the environment may say in one turn; None: room for a passage")
    add("--max-turns", type=_positive, help="turns of one episode; None: at least twice the expert's")
    return parser


def _prune(text: str) -> Prune | str:
    """A number where it is one; RolloutConfig says what is wrong with the rest."""
    return int(text) if text.isdecimal() else text


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"wanted an integer >= 1, got {text}")
    return value


def _seed(text: str) -> int:
    value = int(text)
    if not 0 <= value < 2**32:
        raise argparse.ArgumentTypeError(f"wanted an integer in [0, 2**32), got {text}")
    return value


def _interval(text: str) -> tuple[int, int]:
    low, dash, high = text.partition("-")
    try:
        return int(low), int(high if dash else low)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"wanted a number or an interval such as 1-4, got {text!r}"
        ) from None
