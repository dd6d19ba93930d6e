"""The folder of a training run: its settings, what it measured, and its checkpoints.

train.json                     the settings
metrics.jsonl                  a line for each step
checkpoints/policy-000020/        the newest ones, and the best
last, best                     links to two of them
diverged.jsonl                 the trajectories of an update whose gradients stayed without a finite norm
"""

from __future__ import annotations

import copy
import errno
import fcntl
import json
import os
import shutil
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from mem1.checks import InputError
from mem1.config import default_steps
from mem1.io import atomic_write, leftovers, link, sync, unfinished
from mem1.models.shipped import settings_of
from mem1.runtime.ranks import Ranks
from mem1.train import checkpoint
from mem1.train.checkpoint import CHECKPOINTS, PHASES, Checkpoint, Place, newest, numbered, score_of
from mem1.train.host_copies import host_copies

CONFIG, METRICS = "train.json", "metrics.jsonl"
DIVERGED = "diverged.jsonl"
LAST, BEST = "last", "best"

_NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)  # of file systems on which nobody can be kept out

# Settings that a resumed run may change: they decide how long and where it runs, not what it learns
# (but for `max_wait`, which leaves out what is late).
FREE = frozenset(
    "max_updates evaluate_every evaluation_episodes save_every keep max_failed trackers device threads "
    "warmstart.save_every algorithm.max_tokens_per_micro_batch "
    "scale.ranks scale.replicas scale.activation_checkpointing scale.cpu_offload scale.background_saves "
    "scale.max_wait scale.tflops scale.gpu_memory "
    "rollout.num_slots rollout.kv_memory rollout.max_num_batched_tokens "
    "rollout.env_timeout rollout.env_retries rollout.episode_retries".split()
)


def settings_path(model: str | os.PathLike[str]) -> Path | None:
    """The settings of the run that a model comes from (a name, a folder; None where nobody knows them)."""
    folder = Path(newest(model))
    above = (folder, folder.parent, folder.parent.parent)
    places = (settings_of(folder), *(place / CONFIG for place in above))
    return next((path for path in places if path and path.is_file()), None)


class Resumed(NamedTuple):
    """Where a run goes on."""

    checkpoint: Checkpoint | None  # None: it was stopped before its first one
    init: str | None  # the model that it began with
    notes: list[str]  # for the log: settings that are others than before, and what was damaged


class RunFolder:
    """One run's folder, of all processes on this machine this one's alone until `close`. Raises InputError if
    it cannot be one.
    """

    def __init__(self, path: Path, keep: int = 2, background: bool = False) -> None:
        self.path, self.keep = path, keep
        self._background = ThreadPoolExecutor(1) if background else None
        self._saving: Future[None] | None = None
        self._apart: Ranks | None = None  # of that thread
        self.metrics = path / METRICS
        self.settings: dict[str, Any] = {}  # with "init"
        self._lock: int | None = None
        if path.exists() and not path.is_dir():
            raise InputError(f"out: expected a folder, got the file {str(path)!r}")

    def begin(self, settings: dict[str, Any], *, overwrite: bool) -> None:
        """Start a run here. Raises InputError if one has been, unless `overwrite`, which deletes it."""
        text = json.dumps(settings, indent=2)  # what cannot be written fails before anything is deleted
        self.settings = settings
        if not overwrite:
            self.check_free()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"out: expected a folder that can be written, got {error}") from error
        self._take()
        self._check_links()
        for name in (LAST, BEST, METRICS, DIVERGED):
            (self.path / name).unlink(missing_ok=True)
        for old in [*numbered(self.path), *(self.path / CHECKPOINTS).glob("*.damaged")]:
            _remove(old)
        self._clean()
        self._write(text)
        self.metrics.touch()

    def check_free(self) -> None:
        """InputError if there is a run."""
        held = [path.name for path in (*numbered(self.path), self.metrics) if path.exists()]
        if held:
            raise InputError(
                f"out: expected a folder without a run, got {str(self.path)!r} with {' and '.join(held)}; "
                "resume (--resume) goes on with that run, overwrite (--overwrite) deletes it"
            )

    def resume(self, settings: dict[str, Any]) -> Resumed:
        """Go on from the newest checkpoint that is whole.

        Raises InputError if there is no run, or listing the settings that would make it another one. What
        `metrics.jsonl` says of later steps is dropped, as is what saves that were killed have left.
        """
        if not (self.path / CONFIG).is_file():
            raise InputError(f"resume: expected the folder of a run, got {str(self.path)!r}")
        self._take()
        loaded, damaged = self._newest()
        state = loaded.trainer if loaded else None
        before = state["settings"] if state else json.loads((self.path / CONFIG).read_text())
        self.settings = settings | {"init": before["init"]}
        old, now = map(_compared, (before, self.settings))
        names = sorted(name for name in old | now if old.get(name) != now.get(name))
        changed = {name: f"{name} {old.get(name)} -> {now.get(name)}" for name in names}
        free = ", ".join(changed[name] for name in names if name in FREE)
        if not FREE.issuperset(names):
            others = ", ".join(changed[name] for name in names if name not in FREE)
            may = f" ({free} may change)" if free else ""
            raise InputError(f"resume: expected the settings of the run, got {others}{may}")
        notes = [f"resumed with other settings: {free}"] if free else []
        for path, error in damaged:
            notes.append(f"{path.name} is damaged and now {path.name}.damaged: {error}")
            aside = path.with_name(f"{path.name}.damaged")
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)
        self._clean()
        newest = self._link()
        dropped = self._keep_records((newest and Place.of(newest.name)) or Place(0, 0))
        if newest:
            notes.append(f"goes on from {newest.name}")
        if dropped:
            notes.append(f"{METRICS}: left out {dropped} lines that are no records")
        self._write(json.dumps(self.settings, indent=2))
        return Resumed(loaded, before["init"], notes)

    def close(self) -> None:
        """Finish what is being saved, and let others have the folder."""
        try:
            self._wait()
        finally:
            self._let_go()

    def _let_go(self) -> None:
        if self._background is not None:
            self._background.shutdown()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _take(self) -> None:
        """Keep other processes out, by a lock that goes with this one."""
        if self._lock is None:
            self._lock = os.open(self.path, os.O_RDONLY)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._let_go()
            raise InputError(
                f"out: expected a run that nobody else works on, got {str(self.path)!r}"
            ) from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise

    def _newest(self) -> tuple[Checkpoint | None, list[tuple[Path, InputError]]]:
        """The newest checkpoint that can be loaded, and the newer ones with their faults. Raises InputError
        where all are damaged: that is no run to start over unasked.
        """
        damaged: list[tuple[Path, InputError]] = []
        for path in numbered(self.path):
            try:
                loaded = checkpoint.load(path)
                if loaded.trainer is None:
                    raise InputError(f"path: expected the trainer's state in {str(path)!r}, got none")
                return loaded, damaged
            except InputError as error:
                damaged.append((path, error))
        if damaged:
            raise InputError(f"resume: expected a checkpoint that is whole, got none: {damaged[0][1]}")
        return None, damaged

    def save(
        self,
        place: Place,
        model: Any,
        tokenizer: Any,
        values: dict[str, Any],
        tensors: Mapping[str, Tensor] | None = None,
        *,
        score: float | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        """Save a checkpoint and remove old ones: the newest `keep` stay, and the one of the highest score.
        All of `ranks` call it, as `checkpoint.save`.

        In the background what it needs is copied first; whatever goes wrong then, the next call raises, or
        `close`.
        """
        ranks = ranks or Ranks()
        self._wait()
        if ranks.first and self.metrics.exists():
            sync(self.metrics)  # first: steps that are saved are not done again
        path, tensors = self.path / CHECKPOINTS / str(place), tensors or {}
        checkpoint.check(path, model, tensors, ranks)
        weights = checkpoint.weights_of(model) if ranks.first else {}
        values = values | {"settings": self.settings}
        if self._background:
            self._apart = self._apart or ranks.apart()
            weights, tensors, ranks = host_copies(weights), host_copies(tensors), self._apart
            given = path, model, weights, tokenizer, copy.deepcopy(values), tensors
            self._saving = self._background.submit(self._save, *given, score=score, ranks=ranks)
        else:
            self._save(path, model, weights, tokenizer, values, tensors, score=score, ranks=ranks)

    def _save(self, *given: Any, score: float | None, ranks: Ranks) -> None:
        checkpoint.write(*given, score=score, ranks=ranks)
        if not ranks.first:
            return
        self._link()
        best = self._best()
        for old in numbered(self.path)[self.keep :]:
            if old != best:
                _remove(old)

    def _wait(self) -> None:
        """Until what is saved in the background is on disk."""
        saving, self._saving = self._saving, None
        if saving is not None:
            saving.result()

    def _best(self) -> Path | None:
        """The checkpoint of the highest score, the newest of these."""
        scores = {path: score_of(path) for path in reversed(numbered(self.path))}
        scored = [path for path, score in scores.items() if score is not None]
        return max(reversed(scored), key=lambda path: scores[path] or 0.0, default=None)

    def _link(self) -> Path | None:
        """Let `last` and `best` name what they say; returns the newest checkpoint."""
        newest, best = next(iter(numbered(self.path)), None), self._best()
        for name, path in ((LAST, newest), (BEST, best)):
            if path is None:
                (self.path / name).unlink(missing_ok=True)
            else:
                link(self.path / name, f"{CHECKPOINTS}/{path.name}")
        return newest

    def _check_links(self) -> None:
        """InputError before any work where there can be no links."""
        try:
            link(self.path / LAST, CHECKPOINTS)
        except OSError as error:
            raise InputError(f"out: expected a folder that can have symbolic links, got {error}") from error

    def _write(self, settings: str) -> None:
        with atomic_write(self.path / CONFIG) as file:
            file.write(settings)

    def _clean(self) -> None:
        """Remove what saves that were killed have left, and nothing that is someone else's."""
        for name in (LAST, BEST, CONFIG, METRICS):
            for leftover in leftovers(self.path, name):
                leftover.unlink()
        for phase in PHASES:
            for leftover in leftovers(self.path / CHECKPOINTS, f"{phase}-"):
                shutil.rmtree(leftover, ignore_errors=True)

    def _keep_records(self, place: Place) -> int:
        """Keep what the metrics say of steps up to `place`: what comes after will be done again. Returns how
        many lines a power cut has left that are no records; one without an end is what every kill leaves.
        """
        kept, dropped = [], 0
        text = self.metrics.read_text(errors="replace") if self.metrics.exists() else ""
        for line in text.split("\n")[:-1]:
            try:
                record = json.loads(line)
                here = Place(PHASES.index(record["phase"]), int(record["step"]))
            except (ValueError, KeyError, TypeError):
                dropped += 1
                continue
            if here <= place:
                kept.append(line + "\n")
        with atomic_write(self.metrics) as file:
            file.writelines(kept)
        return dropped


def _compared(settings: dict[str, Any]) -> dict[str, Any]:
    """By their dotted names as JSON has them, where a tuple is a list, with what stands for None."""
    found = flat(json.loads(json.dumps(settings)))
    if found.get("warmstart.steps", 0) is None:
        found["warmstart.steps"] = default_steps(settings["init"])
    return found


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
    # What another process has open, some file systems keep a while: the next run's start removes it.
    shutil.rmtree(leaving, ignore_errors=True)
