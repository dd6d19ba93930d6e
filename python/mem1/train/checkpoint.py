"""Checkpoints: a folder in the Hugging Face format, plus the trainer's own state (`trainer_state`)."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from mem1.checks import InputError
from mem1.io import sync, unfinished
from mem1.models.adapters import adapted_layers, merged_weights
from mem1.models.load import check_json, without_bars
from mem1.models.load import load as load_model
from mem1.models.shipped import shipped
from mem1.runtime.ranks import Ranks
from mem1.train import trainer_state
from mem1.train.optim import Diverged, not_finite
from mem1.train.trainer_state import TrainerState

CHECKPOINTS = "checkpoints"  # the folder within a training run's
PHASES = ("warmstart", "policy")  # of a training run; a checkpoint is called by one and its step
_SCORE = "score.json"


class Checkpoint(NamedTuple):
    model: Any  # causal language model with attention "mem1"
    tokenizer: PreTrainedTokenizerBase
    trainer: TrainerState | None  # None: a plain model, not one of a training run


class Place(NamedTuple):
    """How far a run is. Places compare as they follow one another."""

    phase: int  # index in PHASES
    step: int  # steps of the warm start, or updates of the policy, that are done

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
    values: Mapping[str, Any] | None = None,
    tensors: Mapping[str, Tensor] | None = None,
    *,
    score: float | None = None,
    ranks: Ranks | None = None,
) -> Path:
    """Write a checkpoint to the new folder `path`, which has its name only once all of it is on disk.

    Any Hugging Face tool can load the folder; adapters are merged into the weights. values, tensors: the
    trainer's state, what JSON has and the rest; `score` goes to score.json. All of `ranks` call it, each with
    the whole model and its parts of the tensors; None: this process saves by itself. Raises InputError if
    there is something at `path` already (a folder cannot be replaced in one go), Diverged, and writes
    nothing, for numbers that are not finite, the trainer's included.
    """
    path, ranks, tensors = Path(path), ranks or Ranks(), tensors or {}
    check(path, model, tensors, ranks)
    write(path, model, weights_of(model), tokenizer, values, tensors, score=score, ranks=ranks)
    return path


def check(path: Path, model: Any, tensors: Mapping[str, Tensor], ranks: Ranks) -> None:
    """What `save` raises before it writes."""
    if path.exists():
        raise InputError(f"path: expected a name that is free, got {str(path)!r}")
    name = next(filter(None, ranks.gather(not_finite([*model.state_dict().items(), *tensors.items()]))), "")
    if name:
        raise Diverged(f"model: expected finite weights to save, got others in {name}")


def weights_of(model: Any) -> dict[str, Tensor]:
    """What a model is saved with."""
    return merged_weights(model) if adapted_layers(model) else model.state_dict()


def write(
    path: Path,
    model: Any,
    weights: Mapping[str, Tensor],
    tokenizer: PreTrainedTokenizerBase,
    values: Mapping[str, Any] | None,
    tensors: Mapping[str, Tensor],
    *,
    score: float | None,
    ranks: Ranks,
) -> None:
    """`save` of what has been checked. weights: `weights_of` the model or a copy, of the first rank alone."""
    fresh = ranks.broadcast(unfinished(path))
    if ranks.first:
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(fresh, ignore_errors=True)
    try:
        if ranks.first:
            with without_bars():
                model.save_pretrained(fresh, state_dict=weights)
                tokenizer.save_pretrained(fresh)
            if score is not None:
                (fresh / _SCORE).write_text(json.dumps({"score": score}))
        ranks.barrier()
        if values is not None:
            trainer_state.write(fresh, values, tensors, ranks)
        ranks.barrier()
        if ranks.first:
            for file in [*fresh.rglob("*"), fresh]:
                sync(file)
            fresh.rename(path)
            sync(path.parent)
        ranks.barrier()
    finally:
        if ranks.first:
            shutil.rmtree(fresh, ignore_errors=True)


def load(path: str | os.PathLike[str], dtype: str = "auto", device: str = "cpu") -> Checkpoint:
    """Load a checkpoint, or any Hugging Face causal language model, with its attention set to "mem1".

    `path` may also be the folder of a training run, which stands for its newest checkpoint, the name of a
    model of the package (`models.shipped`), or the id of a model on the Hugging Face hub; see `models.load`,
    whose InputErrors come through. Also raises InputError for a damaged trainer's state or score.
    """
    path = newest(path)
    check_json(Path(path) / _SCORE)
    model, tokenizer, _ = load_model(path, dtype, device)
    folder = Path(path)
    trainer = TrainerState(folder) if (folder / trainer_state.VALUES).is_file() else None
    return Checkpoint(model, tokenizer, trainer)


def newest(path: str | os.PathLike[str]) -> str | os.PathLike[str]:
    """The newest checkpoint of a training run's folder; the folder of a model of the package; or `path`."""
    there = (Path(path) / "config.json").is_file()
    return path if there else next(iter(numbered(Path(path))), shipped(str(path)) or path)
