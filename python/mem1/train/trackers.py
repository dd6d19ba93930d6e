"""Where else the records of a run go, beside metrics.jsonl: TensorBoard, Weights & Biases, trackio."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import Any, Protocol

from mem1.config import TRACKERS
from mem1.extras import extra
from mem1.rollout.call_pool import warn_of_failure

PROJECT = "mem1"


class Tracker(Protocol):
    """Takes numbers by name; `step` counts within the part of a name before its "/"."""

    def log(self, numbers: Mapping[str, float], step: int) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """Event files in the folder `tensorboard` of the run."""

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        with extra("tensorboard", "trackers"):
            from torch.utils.tensorboard import SummaryWriter
        self._writer: Any = SummaryWriter(str(folder / "tensorboard"))

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class WandB:
    """A run of the project `mem1`, named as the folder, with which a resumed one goes on. Where and as whom
    is what W&B's own environment variables say.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        with extra("wandb", "trackers"):
            import wandb
        name = folder.absolute().name
        self._run: Any = wandb.init(
            project=PROJECT, name=name, id=_id(folder), dir=str(folder), config=dict(settings), resume="allow"
        )

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        self._run.log(dict(numbers))

    def close(self) -> None:
        self._run.finish()


class Trackio:
    """The same, kept on this machine by trackio."""

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        with extra("trackio", "trackers"):
            import trackio
        self._trackio: Any = trackio
        trackio.init(project=PROJECT, name=_id(folder), config=dict(settings), resume="allow")

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        self._trackio.log(dict(numbers))

    def close(self) -> None:
        self._trackio.finish()


_KINDS: dict[str, Any] = dict(zip(TRACKERS, (TensorBoard, WandB, Trackio), strict=True))


class Trackers:
    """Those of `names`. What one of them raises once the run is on is a warning: a run outlives its trackers.
    InputError for one whose package is missing.
    """

    def __init__(self, names: Sequence[str], folder: Path, settings: Mapping[str, Any]) -> None:
        self._all: list[Tracker] = [_KINDS[name](folder, settings) for name in names]

    def log(self, record: Mapping[str, Any]) -> None:
        """A record of metrics.jsonl, by its "phase" and "step"."""
        phase = record["phase"]
        numbers = {f"{phase}/{name}": value for name, value in _numbers(record)}
        for tracker in self._all:
            warn_of_failure(lambda _, tracker=tracker: tracker.log(numbers, int(record["step"])))  # type: ignore[misc]

    def close(self) -> None:
        for tracker in self._all:
            warn_of_failure(lambda _, tracker=tracker: tracker.close())  # type: ignore[misc]


def _numbers(record: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """The finite numbers of a record, those in lists and tables by their place."""
    for name, value in record.items():
        if isinstance(value, Mapping):
            yield from ((f"{name}/{key}", found) for key, found in _numbers(value))
        elif isinstance(value, (list, tuple)):
            yield from (
                (f"{name}/{key}", found)
                for key, found in _numbers({str(n): x for n, x in enumerate(value, 1)})
            )
        elif isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value):
            yield name, float(value)


def _id(folder: Path) -> str:
    """Of a run, the same whenever it goes on: its path, in characters that an id may have."""
    return "".join(letter if letter.isalnum() else "-" for letter in str(folder.absolute()).strip("/"))[-64:]
