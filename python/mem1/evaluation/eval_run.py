"""One evaluation in a folder: every agent at every number of objectives, in parts that a kill cannot break.

    settings.json        what was asked for; a run goes on only with the same
    tokenizer/           of the policy, for `mem1 view`
    parts/               while it runs: trajectories of finished parts
    trajectories.jsonl   all episodes, with their "agent": `mem1 view` opens it
    results.jsonl, .csv  a row for each agent and number of objectives, with intervals
    tables.md            the same for people, and laid out as in the paper
    results.png          four figures against the number of objectives

A run that was killed and started again leaves the files of one that was not, but for times of the clock.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from mem1.checks import InputError, require
from mem1.envs.tasks import read_rows
from mem1.evaluation.plots import plot_results
from mem1.evaluation.results import Result, row_title, summarize, write_csv
from mem1.evaluation.tables import tables
from mem1.io import atomic_write, leftovers
from mem1.runtime.progress import Progress
from mem1.trajectory import Trajectory

SETTINGS, PARTS, TRAJECTORIES = "settings.json", "parts", "trajectories.jsonl"
TOKENIZER = "tokenizer"
_OURS = (  # the record of the run first: what else is there is its
    *(SETTINGS, PARTS, TRAJECTORIES, "results.jsonl", "results.csv", "results.png", "tables.md"),
    TOKENIZER,
)
_PART = 32  # episodes; they are played side by side, and what a kill can cost


@dataclass(frozen=True)
class Cell:
    """One row of the table to be. objectives: None where the environment says how many. play: the episodes of
    some places, 0 to `episodes`, in their order.
    """

    agent: str
    objectives: int | None
    play: Callable[[range, Callable[[], None]], list[Trajectory]]  # the second is called after each episode

    @property
    def title(self) -> str:
        return row_title(self.agent, self.objectives)


class EvaluationFolder:
    """The folder of an evaluation, of all processes on this machine this one's alone until `close`. Nothing
    is written before `run`, and nothing deleted but what an evaluation has written.

    settings: what the numbers follow from; a run goes on only with the same, but for more "agents" behind
    those that it has. overwrite: start over. Raises InputError for a folder that holds anything else, other
    settings, or a run of another process.
    """

    def __init__(self, out: Path, settings: dict[str, Any], *, overwrite: bool = False) -> None:
        self.out, self._overwrite, self._lock = out, overwrite, -1
        self._settings: dict[str, Any] = json.loads(json.dumps(settings))
        if out.exists() and not out.is_dir():
            raise InputError(f"out: expected a folder, got the file {str(out)!r}")
        self._starts_over()

    def _starts_over(self) -> bool:
        """Whether nothing that is there is gone on with; refuses what may not be touched."""
        names = {path.name for path in self.out.iterdir()} if self.out.is_dir() else set()
        begun = SETTINGS in names
        if not begun and any(name[0] != "." for name in names):
            expected = "a new or empty folder, or one of `mem1 eval`"
            raise InputError(f"out: expected {expected}, got {str(self.out)!r}")
        played = TRAJECTORIES in names or any((self.out / PARTS).rglob("*.jsonl"))
        if self._overwrite or not begun or not played:
            return True
        before, now = _read_settings(self.out / SETTINGS), self._settings
        other = sorted(name for name in {*before, *now} if before.get(name) != now.get(name))
        known = before.get("agents")
        if other == ["agents"] and isinstance(known, list) and now["agents"][: len(known)] == known:
            return False
        if other:
            was, wanted = ({name: one.get(name) for name in other} for one in (before, now))
            raise InputError(
                f"out: expected the settings of the run in {self.out}, {was}, or overwrite, got {wanted}"
            )
        return False

    def run(
        self,
        cells: Sequence[Cell],
        episodes: int,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        progress: Progress | None = None,
    ) -> list[Result]:
        """Play what is missing, and write all files. tokenizer: kept for `mem1 view`. InputError for a part
        of which every episode has failed: nothing is kept of it, and the next run plays it again.
        """
        require(episodes >= 1, "episodes", "an integer >= 1", episodes)
        require(len(cells) > 0, "agents", "at least one", cells)
        progress = progress or Progress(log=lambda line: None)
        self._take()
        if self._starts_over():  # asked again: another process may have been here
            self._begin()
        for name in _OURS:
            for left in leftovers(self.out, name):
                left.unlink()
        if tokenizer is not None and not (self.out / TOKENIZER / "tokenizer.json").is_file():
            tokenizer.save_pretrained(self.out / TOKENIZER)
        whole = self.out / TRAJECTORIES
        known = _known(whole, cells, episodes) if whole.is_file() else 0
        if known < len(cells):
            self._record()  # of agents that came later
            for place in range(known, len(cells)):
                _play(cells[place], self.out / PARTS / str(place), episodes, progress)
            with atomic_write(whole) as file:
                if known:
                    with whole.open() as before:
                        shutil.copyfileobj(before, file)
                for place in range(known, len(cells)):
                    for part in _parts(self.out / PARTS / str(place), episodes):
                        file.write(part.read_text())
        results = [
            summarize(cell.agent, cell.objectives or played[0].objectives, played)
            for cell, played in zip(cells, read_cells(self.out, cells, episodes), strict=True)
        ]
        _write_results(results, self.out)
        if find_spec("matplotlib") is None:
            progress.log("no results.png: matplotlib is missing (pip install 'mem1_core[plot]')")
        else:
            plot_results(results, self.out / "results.png")
        shutil.rmtree(self.out / PARTS, ignore_errors=True)  # what a kill leaves the next run removes
        return results

    def close(self) -> None:
        """Leave the folder to others."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def _take(self) -> None:
        self.out.mkdir(parents=True, exist_ok=True)
        self._lock = os.open(self.out, os.O_RDONLY)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.close()
            raise InputError(
                f"out: expected a folder that no other process uses, got {str(self.out)!r}"
            ) from None

    def _begin(self) -> None:
        for name in reversed(_OURS):  # the record last: who is killed in between finds a run without parts
            path = self.out / name
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        self._record()

    def _record(self) -> None:
        with atomic_write(self.out / SETTINGS) as file:
            json.dump(self._settings, file, indent=2)


def _read_settings(path: Path) -> dict[str, Any]:
    try:
        settings = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"out: expected a readable {SETTINGS}, or overwrite, got {error}") from None
    require(isinstance(settings, dict), "out", f"an object in {SETTINGS}, or overwrite", settings)
    return dict(settings)


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
            # A few at the end of a cell that could be played are what they are.
            whole = part == parts[0] or len(played) == _PART
            if whole and all(trajectory.error_kind for trajectory in played):
                first = f"{played[0].finish_reason}: {played[0].error}"
                expected = "an episode that can be played"
                raise InputError(
                    f"{cell.title}: expected {expected}, got {len(played)} that failed, by {first}"
                )
            with atomic_write(part) as file:
                for trajectory in played:
                    file.write(json.dumps({"agent": cell.agent, **trajectory.to_dict()}) + "\n")


def _known(path: Path, cells: Sequence[Cell], episodes: int) -> int:
    """How many of the cells, from the first, a file has; InputError for one of others."""
    agents = [row.get("agent") for _, row in read_rows(path)]
    wanted = [cell.agent for cell in cells for _ in range(episodes)]
    # Those of a whole file are looked at one by one, when they are read.
    whole = len(agents) % episodes == 0 and agents == wanted[: len(agents)] or len(agents) == len(wanted)
    expected = f"{episodes} trajectories of {', '.join(cell.title for cell in cells)}, or overwrite"
    require(whole, str(path), expected, f"{len(agents)} of {', '.join(map(str, dict.fromkeys(agents)))}")
    return len(agents) // episodes


def read_cells(out: Path, cells: Sequence[Cell], episodes: int) -> Iterator[list[Trajectory]]:
    """The trajectories of each cell, read from the file that all later work reads."""
    rows = read_rows(out / TRAJECTORIES)
    for cell in cells:
        played = list[Trajectory]()
        for where, row in islice(rows, episodes):
            try:
                played.append(Trajectory.from_dict(row))
            except (KeyError, TypeError, ValueError) as error:
                raise InputError(f"{where}: expected a trajectory, or overwrite, got {error!r}") from None
        expected = f"{episodes} trajectories of {cell.title}, or overwrite"
        require(len(played) == episodes, str(out / TRAJECTORIES), expected, len(played))
        yield played


def _write_results(results: Sequence[Result], out: Path) -> None:
    with atomic_write(out / "results.jsonl") as file:
        for row in results:
            file.write(json.dumps(row.to_dict(), allow_nan=False) + "\n")
    with atomic_write(out / "results.csv") as file:
        write_csv(results, file)
    with atomic_write(out / "tables.md") as file:
        file.write(tables(results))
