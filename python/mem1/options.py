"""The options of the command `mem1`, and the settings that they make."""

from __future__ import annotations

import argparse
import importlib
import inspect
import json
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import fields
from functools import partial
from math import inf
from pathlib import Path
from typing import Any, cast, get_args

from mem1.checks import InputError, require
from mem1.config import DTYPES, ChatMode, EvictionPolicy, Regime, RolloutConfig, TrainConfig
from mem1.envs.base import Environment
from mem1.envs.toy.multihop import MultiHopEnv
from mem1.evaluation.evaluation_loop import OBJECTIVES
from mem1.parsing.tags import FORMATS, TagFormat
from mem1.runtime.progress import Progress
from mem1.seeds import LARGEST
from mem1_core.eviction_policies import RULES, qualified_name

Command = Callable[[argparse.Namespace, Progress], None]

_SIZES = " ".join(map(str, OBJECTIVES))
_RULES = ["a number of tokens", *(rule.name + "=N" * len(fields(rule)) for rule in RULES)]


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """With defaults, but for those that say nothing: None."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


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
            parents=[]
            if name == "demo"
            else [_environment_options(), _format_options(), _sampling_options()],
            formatter_class=_Help,
        )
        new.set_defaults(run=runs[name])
        group = new.add_argument_group(name)
        group.add_argument("--threads", type=_threads, help="CPU threads (default: torch's choice)")
        if name != "demo":
            group.add_argument("--device", default=config.device, help="auto, cpu, cuda or cuda:N")
            group.add_argument(
                "--dtype", choices=DTYPES, default="auto", help="of the weights; auto: as saved"
            )
        if name in ("eval", "rollout"):
            group.add_argument(
                "--model", required=True, help="a model's folder, a run's, or a Hugging Face id"
            )
        return group

    add = command("train", "warm start on expert trajectories, then PPO").add_argument
    add("--out", type=Path, default=Path("runs/train"), help="folder of the run")
    add("--model", type=str, help="start PPO from this folder or Hugging Face id, without a warm start")
    add("--resume", action="store_true", help="go on in --out, with the options of that run")
    add("--overwrite", action="store_true", help="start over in an --out that has a run")
    add("--objectives", type=_interval, help="questions per episode: 2 or 1-4 (default: 1-4)")
    add("--max-updates", type=int, default=config.max_updates, help="PPO updates")
    add("--batch-size", type=_positive, default=config.batch_size, help="episodes per update")
    add("--warmstart-steps", type=int, help=f"supervised steps (default: {config.warmstart.steps})")
    add("--actor-lr", type=float, default=config.ppo.actor_lr, help="learning rate of the policy")
    add("--critic-lr", type=float, default=config.ppo.critic_lr, help="learning rate of the critic")
    add("--kl-coef", type=float, default=config.ppo.kl_coef, help="weight of the KL to the start of PPO")
    add(
        "--save-every",
        type=_positive,
        default=config.save_every,
        help="updates from checkpoint to checkpoint",
    )
    add("--keep", type=_positive, default=config.keep, help="checkpoints: the newest, beside the best")
    add("--seed", type=_seed, default=config.seed, help="of the run: weights, episodes, samples, order")

    add = command("eval", "MEM1 beside the full-context agent of the same weights").add_argument
    add("--objectives", type=_positive, nargs="+", help=f"questions per episode (default: {_SIZES})")
    add("--episodes", type=_positive, default=16, help="episodes per number of objectives")
    add("--seed", type=_seed, default=0, help="of the evaluation; its episodes are never trained on")
    add("--truncate", type=_positive, metavar="W", help="beside the full-context agent also --prune W")

    add = command("rollout", "let an agent play and print or save what it does").add_argument
    add("--objectives", type=_interval, help="questions per episode: 2 or 1-4 (default: 2)")
    add("--episodes", type=_positive, default=4, help="how many")
    add("--group-size", type=_positive, default=1, help="times that each is played, with other samples")
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
    add(
        "--environment",
        type=_imported,
        metavar="MODULE:NAME",
        help="what makes one, found from the current folder (default: questions over drawn facts)",
    )
    add("--environment-args", type=_json, default={}, metavar="JSON", help="its keyword arguments")
    add("--hops", type=_positive, help="relations to follow per question of drawn facts (default: 2)")
    add("--passage-tokens", type=int, help="length of their answers to a query (default: 0, bare answers)")
    return parser


def _format_options() -> argparse.ArgumentParser:
    default = RolloutConfig()
    parser = argparse.ArgumentParser(add_help=False)
    add = parser.add_argument_group("format").add_argument
    add(
        "--format",
        type=_format,
        default="mem1",
        metavar="{" + ",".join(FORMATS) + ",FILE}",
        help="tags between which the policy writes; FILE: JSON, see docs/tags.md",
    )
    add("--chat", choices=get_args(ChatMode), default=default.chat, help="raw text, or the chat template")
    add("--system", help="system message of a chat")
    add("--max-prompt-tokens", type=_positive, default=default.max_prompt_tokens, help="tokens of a task")
    add("--max-action-tokens", type=_positive, default=default.max_action_tokens, help="tokens of one action")
    add("--max-state-tokens", type=_positive, help="of its state (default: no limit of its own)")
    add("--max-info-tokens", type=_positive, help="tokens of one observation (default: room for a passage)")
    add("--max-turns", type=_positive, help="turns of one episode (default: at least twice the expert's)")
    add("--observation-role", default=default.observation_role, help="of observations with --chat turns")
    add("--context-limit", type=_positive, help="live tokens beyond which a summary is asked for")
    return parser


def _sampling_options() -> argparse.ArgumentParser:
    default = RolloutConfig()
    parser = argparse.ArgumentParser(add_help=False)
    add = parser.add_argument_group("sampling").add_argument
    add("--num-slots", type=_positive, default=default.num_slots, help="episodes side by side, at most")
    add("--kv-memory", type=float, default=default.kv_memory, help="of the KV cache: a share, or bytes")
    add(
        "--max-num-batched-tokens",
        type=_positive,
        default=default.max_num_batched_tokens,
        help="of longer texts that are read in one step",
    )
    add("--regime", choices=get_args(Regime), default=default.regime, help="what a prune does to the cache")
    add(
        "--prune",
        type=_prune,
        default=default.prune,
        metavar="RULE",
        help="what is forgotten when: " + ", ".join(["action", *_RULES, "MODULE:NAME"]),
    )
    add("--temperature", type=float, default=default.temperature, help="of the sampler")
    add("--top-p", type=float, default=default.top_p, help="nucleus of the sampler")
    add("--top-k", type=int, default=default.top_k, help="most likely tokens only; 0: all")
    add("--greedy", action="store_true", help="always the most likely token")
    return parser


def _prune(text: str) -> EvictionPolicy | str:
    """A number or a function where it is one; RolloutConfig says what is wrong with the rest."""
    if ":" in text:
        return cast(EvictionPolicy, _imported(text))
    return int(text) if _number(text) else text


def _imported(text: str) -> Any:
    """The object MODULE:NAME, of an installed module or one in the current folder."""
    module, _, name = text.partition(":")
    sys.path.insert(0, os.getcwd())
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise argparse.ArgumentTypeError(f"expected MODULE:NAME, got {text!r}: {error}") from None
    finally:
        sys.path.remove(os.getcwd())


def _json(text: str) -> dict[str, Any]:
    try:
        values = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"expected JSON, got {text!r}: {error}") from None
    if not isinstance(values, dict):
        raise argparse.ArgumentTypeError(f"expected a JSON object, got {text!r}")
    return values


def _format(text: str) -> TagFormat:
    if text in FORMATS:
        return FORMATS[text]
    try:
        written = Path(text).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise argparse.ArgumentTypeError(
            f"expected one of {', '.join(FORMATS)} or a file, got {text!r}: {error}"
        ) from None
    try:
        return TagFormat.from_dict(json.loads(written))
    except ValueError as error:  # InputError is one
        raise argparse.ArgumentTypeError(f"{text}: {error}") from None


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
    """What the environment of the options is made with, apart from its number of objectives."""
    if options.environment is None:
        facts = {"hops": options.hops or 2, "passage_tokens": options.passage_tokens or 0}
        return facts | options.environment_args
    for name in ("hops", "passage_tokens"):
        require(getattr(options, name) is None, name, "none beside environment", getattr(options, name))
    return dict(options.environment_args)


def environment_name(options: argparse.Namespace) -> dict[str, str]:
    """What a run's record says of an environment of one's own, beside its arguments."""
    make = options.environment
    return {} if make is None else {"environment": qualified_name(make)}


def environment_maker(
    options: argparse.Namespace, objectives: int | tuple[int, int] | None
) -> Callable[[], Environment]:
    """Makes the environment of the options; InputError, before any work, if it cannot be made of them."""
    make, arguments = options.environment or MultiHopEnv, environment_arguments(options)
    if objectives is not None:
        arguments["objectives"] = objectives
    require(callable(make), "environment", "what makes an environment", make)
    try:
        inspect.signature(make).bind(**arguments)
    except ValueError:  # of some builtins Python knows no signature
        pass
    except TypeError as error:
        name = getattr(make, "__qualname__", repr(make))
        raise InputError(f"environment-args: expected arguments of {name}: {error}") from None
    if make is MultiHopEnv:
        make(**arguments)  # which costs nothing, and refuses what is out of its range
    return partial(make, **arguments)


def rollout_config(options: argparse.Namespace, objectives: int | None) -> RolloutConfig:
    """The settings of the sampler for episodes of at most that many objectives, None for an environment of
    which nothing is known.

    Limits that were not given leave room: for a whole passage, and for twice the turns of the expert.
    They leave no more than that: a model has to have a position for every token that they allow.
    """
    default = RolloutConfig()
    max_info_tokens, max_turns = default.max_info_tokens, default.max_turns
    if options.environment is None:
        max_info_tokens = 64 + (options.passage_tokens or 0)
        max_turns = max(max_turns, 2 * ((objectives or 1) * (options.hops or 2) + 1))
    names = {field.name for field in fields(RolloutConfig)} & vars(options).keys()
    return RolloutConfig(
        **{name: getattr(options, name) for name in names - {"max_info_tokens", "max_turns"}},
        max_info_tokens=max_info_tokens if options.max_info_tokens is None else options.max_info_tokens,
        max_turns=max_turns if options.max_turns is None else options.max_turns,
    )
