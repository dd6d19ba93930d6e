"""What several commands do: load a model, check where files go, say what has failed."""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from mem1.checks import InputError, require
from mem1.config import RolloutConfig
from mem1.envs.tasks import read_rows
from mem1.evaluation.viewer.page_data import checked
from mem1.models.load import load_report
from mem1.parsing.token_text import unknown_id
from mem1.runtime.device import whereabouts
from mem1.runtime.progress import Progress
from mem1.train import checkpoint
from mem1.train.run_folder import settings_path
from mem1.trajectory import Trajectory

_TRAINED_WITH = (
    *("format", "chat", "system", "observation_role", "prune", "regime"),
    *("max_prompt_tokens", "max_action_tokens", "max_state_tokens", "max_info_tokens", "max_turns"),
)
_UNKNOWN_SHARE = 0.01  # of tokens, from which on a tokenizer cannot be meant for a text


def load_policy(options: argparse.Namespace, progress: Progress) -> tuple[Any, PreTrainedTokenizerBase]:
    """The model on the device that was asked for, and its tokenizer."""
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    model, tokenizer, _ = checkpoint.load(options.model, options.dtype, options.device)
    progress.log(whereabouts(model))
    progress.log(str(load_report(model, tokenizer, options.model)))
    return model, tokenizer


def log_other_settings(model: str, config: RolloutConfig, progress: Progress, whose: str = "") -> None:
    """A run's format and rules are not part of its model: say where others are asked for."""
    if (path := settings_path(model)) is None:
        return
    trained, now = json.loads(path.read_text()).get("rollout", {}), config.to_dict()
    for name in _TRAINED_WITH:
        was, given = trained.get(name, now[name]), json.loads(json.dumps(now[name]))
        if was != given:
            progress.log(f"{whose}weights trained with {name} {was}, now {given}")


def check_writable(folder: Path) -> None:
    """InputError, before any work, if nothing can be written to `folder`, which need not be there yet."""
    try:
        there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise InputError(
            f"out: expected a folder that can be written to, got {str(folder)!r}: {error.strerror}"
        ) from None


def log_failures(trajectories: Iterable[Trajectory], progress: Progress, whose: str = "") -> None:
    """How many have failed, and the first one's reason."""
    failed = [trajectory for trajectory in trajectories if trajectory.error_kind]
    if failed:
        said = f"{len(failed)} episodes failed, seed {failed[0].seed} by {reason(failed[0])}"
        progress.log(f"{whose}: {said}" if whose else said)


def log_unknown(
    trajectories: Iterable[Trajectory], tokenizer: PreTrainedTokenizerBase, progress: Progress
) -> None:
    """That the texts are not of the tokenizer's words, if so."""
    unknown = unknown_id(tokenizer)
    tokens = torch.cat([torch.empty(0, dtype=torch.int64), *(t.tokens for t in trajectories)])
    share = float((tokens == unknown).float().mean()) if unknown is not None and len(tokens) else 0.0
    if share >= _UNKNOWN_SHARE:
        progress.log(f"{100 * share:.0f} % of all tokens stand for words that this tokenizer does not know")


def read_trajectories(path: Path) -> list[Trajectory]:
    """Of a .jsonl file. InputError, by line, for what is none, and for a file without any."""
    read = [checked(where, row) for where, row in read_rows(path)]
    require(len(read) > 0, "trajectories", "a file with trajectories", str(path))
    return read


def reason(failed: Trajectory) -> str:
    return f"{failed.finish_reason}: {failed.error}"
