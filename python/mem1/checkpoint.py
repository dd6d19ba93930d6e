"""Checkpoints: a folder in the Hugging Face format, plus the trainer's own state in `trainer.pt`."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from mem1_core.integrations.transformers import NAME, register

LAST = "last"  # the checkpoint in the folder of a training run
_TRAINER = "trainer.pt"
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")  # one of them must be there


class Checkpoint(NamedTuple):
    model: Any  # causal language model with attention "mem1"
    tokenizer: PreTrainedTokenizerBase
    trainer: dict[str, Any] | None  # None: a plain model, not one of a training run


def save(
    path: str | os.PathLike[str],
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    trainer: dict[str, Any] | None = None,
) -> Path:
    """Write a checkpoint to the folder `path`, replacing what is there only once all of the new one is on
    disk.

    Any Hugging Face tool can load the folder; `trainer` is saved beside it with torch.save.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f".{path.name}.{os.getpid()}.new")
    stale = path.with_name(f".{path.name}.{os.getpid()}.old")
    for leftover in (fresh, stale):
        shutil.rmtree(leftover, ignore_errors=True)
    try:
        model.save_pretrained(fresh)
        tokenizer.save_pretrained(fresh)
        if trainer is not None:
            torch.save(trainer, fresh / _TRAINER)
        if path.exists():
            path.rename(stale)
        fresh.rename(path)
    finally:  # a save that fails, or is interrupted, leaves what was there
        if stale.exists() and not path.exists():
            stale.rename(path)
        for leftover in (fresh, stale):
            shutil.rmtree(leftover, ignore_errors=True)
    return path


def load(path: str | os.PathLike[str]) -> Checkpoint:
    """Load a checkpoint, or any Hugging Face causal language model on disk, with its attention set to "mem1".

    `path` may also be the folder of a training run, which stands for its last checkpoint. Raises
    FileNotFoundError if there is no model folder, ValueError naming a file of it that is missing or damaged.
    """
    path = Path(path)
    if not (path / "config.json").is_file() and (path / LAST).is_dir():
        path = path / LAST
    if not (path / "config.json").is_file():
        raise FileNotFoundError(f"path: wanted a model folder with a config.json, got {str(path)!r}")
    if not any((path / name).is_file() for name in _TOKENIZERS):
        raise ValueError(f"path: wanted a tokenizer.json in {str(path)!r}, got none")
    register()
    try:
        model = AutoModelForCausalLM.from_pretrained(path, attn_implementation=NAME)
    except SafetensorError as error:
        raise ValueError(
            f"path: wanted a readable model.safetensors in {str(path)!r}, got {error}"
        ) from error
    # AutoTokenizer puts the tokenizer class of the architecture over the one that was saved (for qwen2 a
    # byte-level one); tokenizer.json says all there is to say.
    fast = (path / "tokenizer.json").is_file()
    tokenizer = (PreTrainedTokenizerFast if fast else AutoTokenizer).from_pretrained(path)
    return Checkpoint(model.eval(), tokenizer, _load_trainer(path / _TRAINER))


def _load_trainer(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        state: dict[str, Any] = torch.load(path, weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        reason = str(error).split("\n", 1)[0]
        raise ValueError(f"path: wanted a readable trainer state in {str(path)!r}, got {reason}") from error
    return state


@contextmanager
def whole_file(path: Path) -> Iterator[TextIO]:
    """A text file to write to that takes the name `path` only once all of it is written."""
    if path.exists() and not path.is_file():
        raise ValueError(f"path: wanted the name of a regular file, got {str(path)!r}")
    fresh = path.with_name(f".{path.name}.{os.getpid()}.new")
    try:
        with fresh.open("w") as file:
            yield file
        fresh.replace(path)
    finally:
        fresh.unlink(missing_ok=True)


def append_json(path: Path, record: dict[str, Any]) -> None:
    """Add one line to a .jsonl file."""
    with path.open("a") as file:
        file.write(json.dumps(record) + "\n")
