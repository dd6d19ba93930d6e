"""Checkpoints: a folder in the Hugging Face format, plus the trainer's own state in `trainer.pt`."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from mem1_core.integrations.transformers import NAME, register

_TRAINER = "trainer.pt"


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
    model.save_pretrained(fresh)
    tokenizer.save_pretrained(fresh)
    if trainer is not None:
        torch.save(trainer, fresh / _TRAINER)
    if path.exists():
        path.rename(stale)
    fresh.rename(path)
    shutil.rmtree(stale, ignore_errors=True)
    return path


def load(path: str | os.PathLike[str]) -> Checkpoint:
    """Load a checkpoint, or any Hugging Face causal language model on disk, with its attention set to "mem1".

    Raises FileNotFoundError if `path` is not a model folder.
    """
    path = Path(path)
    if not (path / "config.json").is_file():
        raise FileNotFoundError(f"path: wanted a model folder with a config.json, got {str(path)!r}")
    register()
    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation=NAME)
    # AutoTokenizer puts the tokenizer class of the architecture over the one that was saved (for qwen2 a
    # byte-level one); tokenizer.json says all there is to say.
    fast = (path / "tokenizer.json").is_file()
    tokenizer = (PreTrainedTokenizerFast if fast else AutoTokenizer).from_pretrained(path)
    state = torch.load(path / _TRAINER, weights_only=True) if (path / _TRAINER).is_file() else None
    return Checkpoint(model.eval(), tokenizer, state)


def append_json(path: Path, record: dict[str, Any]) -> None:
    """Add one line to a .jsonl file."""
    with path.open("a") as file:
        file.write(json.dumps(record) + "\n")
