"""Checkpoints: a folder in the Hugging Face format, plus the trainer's own state in `trainer.pt`."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.utils.logging import (
    disable_progress_bar,
    enable_progress_bar,
    is_progress_bar_enabled,
)

from mem1.checks import InputError
from mem1.io import sync, unfinished
from mem1.train.optim import Diverged, not_finite
from mem1_core.integrations.transformers import NAME, register

CHECKPOINTS = "checkpoints"  # the folder within a training run's
PHASES = ("warmstart", "ppo")  # of a training run; a checkpoint is called by one and its step
_TRAINER, _SCORE = "trainer.pt", "score.json"
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")  # one of them must be there


class Checkpoint(NamedTuple):
    model: Any  # causal language model with attention "mem1"
    tokenizer: PreTrainedTokenizerBase
    trainer: dict[str, Any] | None  # None: a plain model, not one of a training run


class Place(NamedTuple):
    """How far a run is. Places compare as they follow one another."""

    phase: int  # index in PHASES
    step: int  # steps of the warm start, or updates of PPO, that are done

    def __str__(self) -> str:
        return f"{PHASES[self.phase]}-{self.step:06}"

    @classmethod
    def of(cls, name: str) -> Place | None:
        """The place that a checkpoint's name stands for; None for any other name."""
        match = re.fullmatch(rf"({'|'.join(PHASES)})-(\d+)", name)
        return match and cls(PHASES.index(match[1]), int(match[2]))


def numbered(run: Path) -> list[Path]:
    """The checkpoints of a training run's folder, the newest first. All are whole: `save` names them last."""
    folder = run / CHECKPOINTS
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    places = sorted(
        (place for name in names if (place := Place.of(name)) and str(place) == name), reverse=True
    )
    return [folder / str(place) for place in places]


def score_of(path: Path) -> float | None:
    """What a checkpoint was saved with."""
    file = path / _SCORE
    return float(json.loads(file.read_text())["score"]) if file.is_file() else None


def save(
    path: str | os.PathLike[str],
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    trainer: dict[str, Any] | None = None,
    score: float | None = None,
) -> Path:
    """Write a checkpoint to the new folder `path`, which has its name only once all of it is on disk.

    Any Hugging Face tool can load the folder; `trainer` is saved in it with torch.save, `score` in
    score.json. Raises InputError if there is something at `path` already (a folder cannot be replaced in one
    go), Diverged, and writes nothing, for numbers that are not finite, the trainer's included.
    """
    path = Path(path)
    if path.exists():
        raise InputError(f"path: expected a name that is free, got {str(path)!r}")
    name = not_finite([*model.state_dict().items(), *_tensors(trainer, "trainer")])
    if name:
        raise Diverged(f"model: expected finite weights to save, got others in {name}")
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = unfinished(path)
    shutil.rmtree(fresh, ignore_errors=True)
    try:
        with _without_bars():
            model.save_pretrained(fresh)
            tokenizer.save_pretrained(fresh)
        if trainer is not None:
            torch.save(trainer, fresh / _TRAINER)
        if score is not None:
            (fresh / _SCORE).write_text(json.dumps({"score": score}))
        for file in [*fresh.rglob("*"), fresh]:
            sync(file)
        fresh.rename(path)
        sync(path.parent)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return path


def load(path: str | os.PathLike[str]) -> Checkpoint:
    """Load a checkpoint, or any Hugging Face causal language model on disk, with its attention set to "mem1".

    `path` may also be the folder of a training run, which stands for its newest checkpoint. Raises InputError
    if there is no model folder, or naming a file of it that is missing or damaged.
    """
    path = Path(path)
    if not (path / "config.json").is_file():
        path = next(iter(numbered(path)), path)
    if not (path / "config.json").is_file():
        raise InputError(f"path: expected a model folder with a config.json, got {str(path)!r}")
    if not any((path / name).is_file() for name in _TOKENIZERS):
        raise InputError(f"path: expected a tokenizer.json in {str(path)!r}, got none")
    register()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", _SCORE):
        _check_json(path / name)
    try:
        with _without_bars():
            model = AutoModelForCausalLM.from_pretrained(path, attn_implementation=NAME)
    except SafetensorError as error:
        raise InputError(
            f"path: expected a readable model.safetensors in {str(path)!r}, got {error}"
        ) from error
    except OSError as error:  # no weights at all
        reason = str(error).split("\n", 1)[0]
        raise InputError(f"path: expected a whole model in {str(path)!r}, got {reason}") from error
    # AutoTokenizer puts the tokenizer class of the architecture over the one that was saved (for qwen2 a
    # byte-level one); tokenizer.json says all there is to say.
    fast = (path / "tokenizer.json").is_file()
    tokenizer = (PreTrainedTokenizerFast if fast else AutoTokenizer).from_pretrained(path)
    return Checkpoint(model.eval(), tokenizer, _load_trainer(path / _TRAINER))


@contextmanager
def _without_bars() -> Iterator[None]:
    """Without those that transformers draws for every file."""
    shown = is_progress_bar_enabled()
    disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            enable_progress_bar()


def _check_json(path: Path) -> None:
    """InputError for a file that is there and is none."""
    if path.is_file():
        try:
            json.loads(path.read_text())
        except ValueError as error:
            raise InputError(f"path: expected a readable {path.name}, got {str(path)!r}: {error}") from error


def _tensors(tree: Any, name: str) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors within dictionaries and lists, by their path."""
    if isinstance(tree, torch.Tensor):
        yield name, tree
    elif isinstance(tree, (dict, list, tuple)):
        for key, part in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from _tensors(part, f"{name}.{key}")


def _load_trainer(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        state: dict[str, Any] = torch.load(path, weights_only=True, map_location="cpu")
    except (RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        reason = str(error).split("\n", 1)[0]
        raise InputError(f"path: expected a readable trainer state in {str(path)!r}, got {reason}") from error
    return state
