"""One evaluation in a folder: every agent at every number of objectives, in parts that a kill cannot break.

    settings.json        what was asked for; a run goes on only with the same
    parts/               while it runs: trajectories of finished parts
    trajectories.jsonl   all episodes, with their "agent": `mem1 view` opens it
    results.jsonl, .csv  a row for each agent and number of objectives, with intervals
    tables.md            the same for people, and laid out as in the paper
    results.png          four figures against the number of objectives

A run that was killed and started again leaves the files of one that was not, but for times of the clock.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mem1.checks import InputError, require
from mem1.envs.tasks import read_rows
from mem1.evaluation.plots import plot_results
from mem1.evaluation.results import Result, summarize, write_csv
from mem1.evaluation.tables import tables
from mem1.io import atomic_write
from mem1.runtime.progress import Progress
from mem1.trajectory import Trajectory

SETTINGS, PARTS, TRAJECTORIES = "settings.json", "parts", "trajectories.jsonl"
_OURS = (SETTINGS, PARTS, TRAJECTORIES, "results.jsonl", "results.csv", "results.png", "tables.md")
_PART = 64  # episodes; they are played side by side, and what a kill can cost


@dataclass(frozen=True)
class Cell:
    """One row of the table to be. play: the episodes of some places, 0 to `episodes`, in their order."""

    agent: str
    objectives: int
    play: Callable[[range, Callable[[], None]], list[Trajectory]]  # the second is called after each episode

    @property
    def title(self) -> str:
        return f"{self.agent}, {self.objectives} objective" + "s" * (self.objectives > 1)


def run_evaluation(
    cells: Sequence[Cell],
    episodes: int,
    out: Path,
    settings: dict[str, Any],
    *,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> list[Result]:
    """Play what is missing in `out`, and write its files. InputError for an `out` with other settings, or
    with anything else in it, unless `overwrite`, which starts over.
    """
    require(episodes >= 1, "episodes", "an integer >= 1", episodes)
    require(len(cells) > 0, "agents", "at least one", cells)
    progress = progress or Progress(log=lambda line: None)
    _begin(out, settings, overwrite)
    if not (out / TRAJECTORIES).is_file():
        for place, cell in enumerate(cells):
            _play(cell, out / PARTS / str(place), episodes, progress)
        with atomic_write(out / TRAJECTORIES) as file:
            for place in range(len(cells)):
                for part in _parts(out / PARTS / str(place), episodes):
                    file.write(part.read_text())
    results = [
        summarize(cell.agent, cell.objectives, played)
        for cell, played in zip(cells, read_cells(out, cells, episodes), strict=True)
    ]
    _write_results(results, out)
    shutil.rmtree(out / PARTS, ignore_errors=True)  # a kill within leaves some, which the next run removes
    return results


def _begin(out: Path, settings: dict[str, Any], overwrite: bool) -> None:
    known = json.loads(json.dumps(settings))
    foreign = [path.name for path in out.iterdir() if path.name not in _OURS] if out.is_dir() else []
    if (out.exists() and not out.is_dir()) or any(name[0] != "." for name in foreign):
        raise InputError(f"out: expected a new or empty folder, or one of `mem1 eval`, got {str(out)!r}")
    before = json.loads((out / SETTINGS).read_text()) if (out / SETTINGS).is_file() else None
    if before is not None and not overwrite:
        other = sorted(name for name in {*before, *known} if before.get(name) != known.get(name))
        if other:
            was, now = ({name: one.get(name) for name in other} for one in (before, known))
            expected = f"the settings of the run in {out}, {was}, or overwrite"
            raise InputError(f"out: expected {expected}, got {now}")
        return
    for name in reversed(_OURS):  # whoever is killed in between finds settings to go on with, or nothing
        path = out / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    out.mkdir(parents=True, exist_ok=True)
    with atomic_write(out / SETTINGS) as file:
        json.dump(known, file, indent=2)


def _parts(folder: Path, episodes: int) -> Iterator[Path]:
    yield from (folder / f"{first:06d}.jsonl" for first in range(0, episodes, _PART))


def _play(cell: Cell, folder: Path, episodes: int, progress: Progress) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    parts = list(_parts(folder, episodes))
    places = [range(first, min(first + _PART, episodes)) for first in range(0, episodes, _PART)]
    done = sum(len(some) for part, some in zip(parts, places, strict=True) if part.is_file())
    with progress.phase(cell.title, episodes, done) as phase:
        for part, some in zip(parts, places, strict=True):
            if part.is_file():
                continue
            played = cell.play(some, phase.advance)
            with atomic_write(part) as file:
                for trajectory in played:
                    file.write(json.dumps({"agent": cell.agent, **trajectory.to_dict()}) + "\n")


def read_cells(out: Path, cells: Sequence[Cell], episodes: int) -> Iterator[list[Trajectory]]:
    """The trajectories of each cell, read from the file that all later work reads."""
    rows = read_rows(out / TRAJECTORIES)
    for _ in cells:
        yield [Trajectory.from_dict(next(rows)[1]) for _ in range(episodes)]


def _write_results(results: Sequence[Result], out: Path) -> None:
    with atomic_write(out / "results.jsonl") as file:
        for row in results:
            file.write(json.dumps(row.to_dict(), allow_nan=False) + "\n")
    with atomic_write(out / "results.csv") as file:
        write_csv(results, file)
    with atomic_write(out / "tables.md") as file:
        file.write(tables(results))
    if find_spec("matplotlib") is not None:
        plot_results(results, out / "results.png")
