"""The options of the command `mem1`, and the settings that they make."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from functools import partial
from math import inf
from pathlib import Path
from typing import Any, get_args

from mem1.config import DTYPES, EvictionPolicy, Regime, RolloutConfig, TrainConfig
from mem1.envs.toy.multihop import MultiHopEnv
from mem1.evaluation.evaluation_loop import OBJECTIVES
from mem1.runtime.progress import Progress
from mem1.seeds import LARGEST

Command = Callable[[argparse.Namespace, Progress], None]


def build_parser(runs: Mapping[str, Command]) -> argparse.ArgumentParser:
    """runs: what each command does with its options."""
    parser = argparse.ArgumentParser(
        prog="mem1",
        description="Train, evaluate and run agents with constant memory (MEM1, arXiv 2506.15841).",
    )
    config = TrainConfig()
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, text: str) -> argparse._ArgumentGroup:
        new = commands.add_parser(
            name,
            help=text,
            description=text,
            parents=[] if name == "demo" else [_environment_options(), _sampling_options()],
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        )
        new.set_defaults(run=runs[name])
        group = new.add_argument_group(name)
        group.add_argument("--threads", type=_threads, help="CPU threads; None leaves torch's choice")
        if name != "demo":
            group.add_argument("--device", default=config.device, help="auto, cpu, cuda or cuda:N")
        return group

    add = command("train", "warm start on expert trajectories, then PPO").add_argument
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

    add = command("eval", "MEM1 beside the full-context agent of the same weights").add_argument
    add("model", type=Path, help="checkpoint folder")
    add("--objectives", type=_positive, nargs="+", default=OBJECTIVES, help="questions per episode")
    add("--episodes", type=_positive, default=16, help="episodes per number of objectives")
    add("--seed", type=_seed, default=0, help="of the evaluation; its episodes are never trained on")
    add("--truncate", type=_positive, metavar="W", help="beside the full-context agent also --prune W")

    add = command("rollout", "let an agent play and print or save what it does").add_argument
    add("model", type=Path, help="checkpoint folder")
    add("--objectives", type=_interval, default=(2, 2), help="questions per episode: 2 or 1-4")
    add("--episodes", type=_positive, default=4, help="how many")
    add("--expert", action="store_true", help="the environment's expert writes, the model reads along")
    add("--out", type=Path, help="write trajectories to this .jsonl file instead of the terminal")
    add("--seed", type=_seed, default=0, help="of the first episode itself, as a trajectory has it")

    add = command("demo", "train, evaluate and plot in about five minutes on two idle cores").add_argument
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
    return int(text) if _number(text) else text


def _number(text: str) -> bool:
    return text.isascii() and text.isdecimal()


def _integer(text: str, low: int, high: float, expected: str) -> int:
    if not _number(text) or not low <= int(text) <= high:
        raise argparse.ArgumentTypeError(f"expected an integer {expected}, got {text}")
    return int(text)


def _threads(text: str) -> int:
    return _integer(text, 1, 4096, "from 1 to 4096")


def _positive(text: str) -> int:
    return _integer(text, 1, inf, ">= 1")


def _seed(text: str) -> int:
    return _integer(text, 0, LARGEST - 1, "in [0, 2**53)")


def _interval(text: str) -> tuple[int, int]:
    low, dash, high = text.partition("-")
    try:
        return int(low), int(high if dash else low)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"expected a number or an interval such as 1-4, got {text!r}"
        ) from None


def environment_arguments(options: argparse.Namespace) -> dict[str, Any]:
    return {
        "objectives": options.objectives,
        "hops": options.hops,
        "passage_tokens": options.passage_tokens,
    }


def environment_maker(
    options: argparse.Namespace, objectives: int | tuple[int, int]
) -> Callable[[], MultiHopEnv]:
    """Makes the environment of the options; InputError, before any work, if one is out of its range."""
    make = partial(MultiHopEnv, **environment_arguments(options) | {"objectives": objectives})
    make()
    return make


def rollout_config(options: argparse.Namespace, objectives: int) -> RolloutConfig:
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
