"""The options of the command `mem1`, and the settings that they make."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from dataclasses import fields
from math import inf
from pathlib import Path
from typing import Any, NoReturn, get_args

from mem1.checks import InputError
from mem1.config import (
    ALGORITHMS,
    DTYPES,
    TRACKERS,
    ChatMode,
    Regime,
    RolloutConfig,
    TrainConfig,
)
from mem1.config_files import prune_rule, tag_format
from mem1.envs.worlds import DEFAULT, WORLDS
from mem1.evaluation.baselines.agents import AGENTS, Agent, parse_agent
from mem1.evaluation.evaluation_loop import OBJECTIVES
from mem1.named_objects import imported
from mem1.parsing.tags import FORMATS
from mem1.runtime.progress import Progress
from mem1.seeds import LARGEST
from mem1_core.eviction_policies import RULES

Command = Callable[[argparse.Namespace, Progress], None]

_SIZES = " ".join(map(str, OBJECTIVES))
_AGENTS = ", ".join(
    agent.name + "".join(f"[=N, {field.default}]" for field in fields(agent)) for agent in AGENTS
)
_RULES = ["a number of tokens", *(rule.name + "=N" * len(fields(rule)) for rule in RULES)]


class _Parser(argparse.ArgumentParser):
    """Says in one line what is wrong."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} ({self.prog} --help has all options)\n")


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """With defaults, but for those that say nothing: None."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


def build_parser(runs: Mapping[str, Command]) -> argparse.ArgumentParser:
    """runs: what each command does with its options."""
    parser = _Parser(
        prog="mem1",
        description="Train, evaluate and run agents with constant memory (MEM1, arXiv 2506.15841).",
    )
    config = TrainConfig()
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, text: str, plays: bool = False) -> argparse._ArgumentGroup:
        new = commands.add_parser(
            name,
            help=text,
            description=text,
            parents=[_environment_options(), _format_options(), _sampling_options()] if plays else [],
            formatter_class=_Help,
        )
        new.set_defaults(run=runs[name])
        group = new.add_argument_group(name)
        if plays or name == "demo":
            group.add_argument("--threads", type=_threads, help="CPU threads (default: torch's choice)")
        if plays:
            group.add_argument("--device", default=config.device, help="auto, cpu, cuda or cuda:N")
            group.add_argument(
                "--dtype", choices=DTYPES, default="auto", help="of the weights; auto: as saved"
            )
        return group

    train = command("train", "warm start on expert trajectories, then reinforcement", plays=True)
    add = train.add_argument
    add("config", type=Path, nargs="*", help="YAML of settings, such as those in recipes/; of several runs")
    add("--out", type=Path, help="folder of the run, or of several (default: runs/ and the name of CONFIG)")
    add("--model", type=str, help="start from this folder, Hugging Face id or name, not from random weights")
    add("--resume", action="store_true", help="go on in --out, with the options of that run")
    add("--overwrite", action="store_true", help="start over in an --out that has a run")
    add("--dry-run", action="store_true", help="build what a rank has, without memory, and print the plan")
    add("--print-config", action="store_true", help="print all settings as YAML, and do nothing")
    add("--objectives", type=_interval, help="questions per episode: 2 or 1-4 (default: 1-4)")
    add("--algorithm", choices=ALGORITHMS, help="all but ppo without a critic")
    add("--max-updates", type=int, help="of the policy")
    add("--batch-size", type=_positive, help="episodes per update")
    add("--group-size", type=_positive, help="of these, how many play one task")
    add("--warmstart-steps", type=int, help="supervised steps (default: 2000 of a new model, 0 with --model)")
    add("--actor-lr", type=float, help="learning rate of the policy")
    add("--critic-lr", type=float, help="learning rate of the critic")
    add("--kl-coef", type=float, help="weight of the KL to the first policy")
    add("--evaluate-every", type=_positive, help="updates; in episodes that nobody is trained on")
    add("--evaluation-episodes", type=_positive, help="of one evaluation")
    add("--save-every", type=_positive, help="updates from checkpoint to checkpoint")
    add("--keep", type=_positive, help="checkpoints: the newest, beside the best")
    add("--track", choices=TRACKERS, nargs="+", help="where records go beside metrics.jsonl")
    add("--seed", type=_seed, help="of the run: weights, episodes, samples, order")
    _ask_for_given(commands.choices["train"])

    add = command("plan", "what a run needs of each GPU, and how long an update takes").add_argument
    add(
        "config",
        type=Path,
        help="YAML of settings, such as those in recipes/; and over it any --section.name=value",
    )
    add("--trajectories", type=Path, help=".jsonl of episodes like those to come (default: the longest)")
    add("--mfu", type=float, default=0.4, help="share of the peak that forwards and backwards reach")
    add("--json", action="store_true", help="print a JSON object in place of a table")

    what = "agents on the same weights side by side: answers, memory and time"
    add = command("eval", what, plays=True).add_argument
    add("--model", help="a folder of a model or run, a Hugging Face id, a name; of scripts its tokenizer")
    add(
        "--agents",
        type=_told(_agent),
        nargs="+",
        default=argparse.SUPPRESS,
        metavar="AGENT",
        help=f"any of {_AGENTS}, MODULE:NAME of your own (default: mem1 full-context)",
    )
    add("--out", type=Path, default=Path("runs/eval"), help="folder of the results; goes on with what it has")
    add("--overwrite", action="store_true", help="start over in an --out that has results")
    add("--json", action="store_true", help="print a JSON object per row instead of tables")
    add(
        "--asynchronous", action="store_true", help="wait for no environment: faster, not the same to the bit"
    )
    add("--objectives", type=_positive, nargs="+", help=f"questions per episode (default: {_SIZES})")
    add("--episodes", type=_positive, default=16, help="episodes per number of objectives")
    add("--seed", type=_seed, default=0, help="of the evaluation; its episodes are never trained on")

    add = command("rollout", "let an agent play and print or save what it does", plays=True).add_argument
    add("--model", required=True, help="a folder of a model or of a run, a Hugging Face id, or a name")
    add("--objectives", type=_interval, help="questions per episode: 2 or 1-4 (default: 2)")
    add("--episodes", type=_positive, default=4, help="how many")
    add("--group-size", type=_positive, default=1, help="times that each is played, with other samples")
    add("--expert", action="store_true", help="the environment's expert writes, the model reads along")
    add("--out", type=Path, help="write trajectories to this .jsonl file instead of the terminal")
    add("--overwrite", action="store_true", help="replace an --out that is there")
    add("--seed", type=_seed, default=0, help="of the first episode itself, as a trajectory has it")

    add = command("view", "one HTML page of trajectories, to open in a browser").add_argument
    add("trajectories", type=Path, help="a .jsonl file of `mem1 rollout --out` or `mem1 eval`")
    add("--tokenizer", help="a folder or a Hugging Face id (default: the model's of the trajectories)")
    add("--out", type=Path, help="the page (default: beside the trajectories, .html)")

    add = command("data", "data sets: list them, check what is there, convert it").add_argument
    add("--check", type=Path, metavar="FOLDER", help="which files are there, and whether they are whole")
    add("--convert", metavar="NAME", help="of a data set, with --source and --out")
    add("--source", type=Path, help="its file, as it was published")
    add("--out", type=Path, help="folder for qa.jsonl and corpus.jsonl")
    add("--overwrite", action="store_true", help="replace those that are there")
    add("--json", action="store_true", help="print a JSON object per line")

    add = command("retrieve", "serve a corpus by the retrieval protocol of Search-R1").add_argument
    add("corpus", type=Path, help="JSONL, a passage per line: id, contents")
    add("--index", type=Path, help="folder of its index (default: beside the corpus)")
    add("--dense", metavar="MODEL", help="vectors of this sentence-transformers model in the place of BM25")
    add("--host", default="127.0.0.1", help="address to listen on")
    add("--port", type=_port, default=8000, help="port to listen on")
    add("--top-k", type=_positive, default=3, help="passages of a query that does not say how many")
    add("--max-queries", type=_positive, default=1024, help="of one request")
    add("--max-batch-size", type=_positive, default=64, help="queries that are searched together")
    add("--max-wait-ms", type=float, default=2.0, help="for more queries of a batch")
    add("--max-pending", type=_positive, default=4096, help="queries at a time; more are told to come again")

    add = command("demo", "the models of the package at work, in two minutes on two idle cores").add_argument
    add("--out", type=Path, default=Path("runs/demo"), help="folder for everything it makes")
    add("--train", action="store_true", help="train them all first, which takes hours; again: go on with it")
    add("--overwrite", action="store_true", help="replace an earlier demo in --out, with what it has trained")
    add("--quick", action="store_true", help="the same in well under a minute, without learning much")
    add("--seed", type=_seed, default=0, help="of the evaluation and of the updates")
    return parser


def _ask_for_given(parser: argparse.ArgumentParser) -> None:
    """Options that are not given shall say nothing, not their defaults: those are a config file's, or of the
    settings.
    """
    told = ("config", "out", "resume", "overwrite", "dry_run", "print_config")
    others = vars(parser.parse_args([])).keys() - {"run", *told}
    parser.set_defaults(**dict.fromkeys(others))
    parser.epilog = (
        "Every setting can be given as --section.name=value; --print-config shows all of them, with the "
        "values that they have here. CONFIG counts more than defaults, the command line more than CONFIG."
    )


def _environment_options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(add_help=False)
    add = parser.add_argument_group("environment").add_argument
    add(
        "--environment",
        "--env",
        type=_told(_environment),
        default=DEFAULT,
        metavar="{" + ",".join(WORLDS) + ",MODULE:NAME}",
        help="MODULE:NAME: what makes one, found from the current folder",
    )
    add("--tasks", metavar="FILE", help="rows to play in one of your own: JSONL, JSON or Parquet with ids")
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
        type=_told(tag_format),
        default="mem1",
        metavar="{" + ",".join(FORMATS) + ",FILE}",
        help="tags between which the policy writes; FILE: JSON, see docs/tags.md",
    )
    add("--turn-hint", action="store_true", help="begin observations with the turns left, as the paper's")
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
        type=_told(prune_rule),
        default=default.prune,
        metavar="RULE",
        help="what is forgotten when: " + ", ".join(["action", *_RULES, "MODULE:NAME"]),
    )
    add("--temperature", type=float, default=default.temperature, help="of the sampler")
    add("--top-p", type=float, default=default.top_p, help="nucleus of the sampler")
    add("--top-k", type=int, default=default.top_k, help="most likely tokens only; 0: all")
    add("--greedy", action="store_true", help="always the most likely token")
    return parser


def _told(read: Callable[[str], Any]) -> Callable[[str], Any]:
    """For argparse, which shows errors of its own kind."""

    def told(text: str) -> Any:
        try:
            return read(text)
        except InputError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return told


def _environment(text: str) -> Any:
    if ":" in text:
        return imported(text)
    if text not in WORLDS:
        raise InputError(f"expected MODULE:NAME or one of {', '.join(WORLDS)}, got {text!r}")
    return text


def _agent(text: str) -> Agent:
    if ":" in text:
        made = imported(text)
        made = made() if isinstance(made, type) and issubclass(made, Agent) else made
        if not isinstance(made, Agent):
            raise InputError(f"expected an Agent (mem1.evaluation.baselines.agents), got {text!r}")
        return made
    return parse_agent(text)


def _json(text: str) -> dict[str, Any]:
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise argparse.ArgumentTypeError(f"expected JSON, got {text!r:.200}: {error}") from None
    if not isinstance(values, dict):
        raise argparse.ArgumentTypeError(f"expected a JSON object, got {text!r}")
    return values


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


def _port(text: str) -> int:
    return _integer(text, 0, 65535, "from 0 to 65535")


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
