"""The folder of a training run: its settings, what it measured, and its checkpoints.

train.json                     the settings
metrics.jsonl                  a line for each step
checkpoints/ppo-000020/        the newest ones, and the best
last, best                     links to two of them; best.json has the score
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from mem1 import checkpoint
from mem1.checkpoint import CHECKPOINTS, PHASES, Checkpoint, Place, numbered
from mem1.checks import InputError
from mem1.io import link, unfinished, whole_file

CONFIG, METRICS = "train.json", "metrics.jsonl"
LAST, BEST, BEST_SCORE = "last", "best", "best.json"

# Settings that a resumed run may change: they decide how long and where it runs, not what it learns.
FREE = frozenset(
    "updates save_every keep max_failed device threads warmstart.save_every ppo.micro_tokens rollout.slots "
    "rollout.prefill_tokens rollout.env_timeout rollout.env_retries rollout.episode_retries".split()
)


class RunFolder:
    """One run's folder. Raises InputError if it cannot be one."""

    def __init__(self, path: Path, keep: int = 2) -> None:
        self.path, self.keep = path, keep
        self.metrics = path / METRICS
        if path.exists() and not path.is_dir():
            raise InputError(f"out: wanted a folder, got the file {str(path)!r}")

    def begin(self, settings: dict[str, Any], *, overwrite: bool) -> None:
        """Start a run here. Raises InputError if one has been, unless `overwrite`, which deletes it."""
        held = [path.name for path in map(self.path.joinpath, (CHECKPOINTS, METRICS)) if path.exists()]
        if held and not overwrite:
            raise InputError(
                f"out: wanted a folder without a run, got {str(self.path)!r} with {' and '.join(held)}; "
                "resume goes on with that run, overwrite deletes it"
            )
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"out: wanted a folder that can be written, got {error}") from error
        for name in (LAST, BEST, BEST_SCORE, METRICS):
            (self.path / name).unlink(missing_ok=True)
        if (self.path / CHECKPOINTS).exists():
            _remove(self.path / CHECKPOINTS)
        self._write(settings)
        self.metrics.touch()

    def resume(self, settings: dict[str, Any]) -> tuple[Checkpoint, list[str]]:
        """The newest checkpoint, and what is set otherwise than in the run so far, as "slots 32 -> 64".

        Raises InputError if there is none, or listing the settings that would make it another run. What
        `metrics.jsonl` says of later steps is dropped, as is what saves that were killed have left.
        """
        found = numbered(self.path)
        if not found:
            raise InputError(f"resume: wanted the folder of a run with a checkpoint, got {str(self.path)!r}")
        loaded = checkpoint.load(found[0])
        if loaded.trainer is None:
            raise InputError(f"resume: wanted a checkpoint with the trainer's state, got {str(found[0])!r}")
        before, now = flat(loaded.trainer["settings"]), flat(settings)
        changed = {name for name in before | now if before.get(name) != now.get(name)}
        told = [f"{name} {before.get(name)} -> {now.get(name)}" for name in sorted(changed)]
        if changed - FREE:
            raise InputError(f"resume: wanted the settings of the run, got {', '.join(told)}")
        place = Place.of(found[0].name)
        assert place is not None
        for leftover in [*self.path.glob(".*.new"), *(self.path / CHECKPOINTS).glob(".*.new")]:
            if leftover.is_dir() and not leftover.is_symlink():
                shutil.rmtree(leftover)
            else:
                leftover.unlink()
        link(self.path / LAST, f"{CHECKPOINTS}/{found[0].name}")
        self._keep_records(place)
        self._write(settings)
        return loaded, told

    def save(
        self, place: Place, model: Any, tokenizer: Any, trainer: dict[str, Any], score: float | None = None
    ) -> None:
        """Save a checkpoint and remove old ones: the newest `keep` stay, and the one of the highest score."""
        checkpoint.save(self.path / CHECKPOINTS / str(place), model, tokenizer, trainer)
        link(self.path / LAST, f"{CHECKPOINTS}/{place}")
        best = self._best()
        if score is not None and (best is None or score >= best["score"]):
            best = {"checkpoint": str(place), "score": score}
            with whole_file(self.path / BEST_SCORE) as file:
                json.dump(best, file)
            link(self.path / BEST, f"{CHECKPOINTS}/{place}")
        for old in numbered(self.path)[self.keep :]:
            if best is None or old.name != best["checkpoint"]:
                _remove(old)

    def _best(self) -> dict[str, Any] | None:
        path = self.path / BEST_SCORE
        best: dict[str, Any] | None = json.loads(path.read_text()) if path.exists() else None
        return best

    def _write(self, settings: dict[str, Any]) -> None:
        with whole_file(self.path / CONFIG) as file:
            json.dump(settings, file, indent=2)

    def _keep_records(self, place: Place) -> None:
        """Keep what the metrics say of steps up to `place`: what comes after will be done again."""
        kept = []
        lines = self.metrics.read_text().splitlines(keepends=True) if self.metrics.exists() else []
        for line in lines:
            if not line.endswith("\n"):  # cut off when the run died
                break
            record = json.loads(line)
            if Place(PHASES.index(record["phase"]), record["step"]) <= place:
                kept.append(line)
        with whole_file(self.metrics) as file:
            file.writelines(kept)


def flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by their dotted names."""
    found: dict[str, Any] = {}
    for name, value in settings.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return found


def _remove(folder: Path) -> None:
    # Renamed first: a folder with a checkpoint's name is a whole one, also when this is cut off.
    leaving = unfinished(folder)
    shutil.rmtree(leaving, ignore_errors=True)
    folder.rename(leaving)
    shutil.rmtree(leaving)
