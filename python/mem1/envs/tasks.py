"""Task sets: rows with an id, read from files, shuffled and split the same way on every machine.

A row is a mapping with an entry "id", or an object with an attribute `id`; an environment gets one with
`reset(seed, task)`.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from numbers import Integral, Real
from pathlib import Path
from typing import Any, TypeVar

from mem1.checks import InputError, require
from mem1.extras import extra

_Task = TypeVar("_Task")


def task_id(task: Any) -> str:
    """The id of a row; InputError if it has none."""
    found = task.get("id") if isinstance(task, Mapping) else getattr(task, "id", None)
    if not isinstance(found, (str, Integral)) or isinstance(found, bool) or found == "":
        raise InputError(f"task: expected a row with an id, a text or a number, got {task!r:.200}")
    return str(found)


def check_ids(tasks: Iterable[Any]) -> None:
    """InputError for a row without an id, and for two with the same."""
    seen = set[str]()
    for task in tasks:
        name = task_id(task)
        if name in seen:
            raise InputError(f"tasks: expected ids of which each occurs once, got {name!r} twice")
        seen.add(name)


def shuffled(tasks: Iterable[_Task], seed: int, purpose: str = "shuffle") -> list[_Task]:
    """The rows in an order that follows from their ids and `seed` alone: not from the order in which they
    come, nor from the machine or the version of Python. Rows that are added go in between the others.
    """
    return sorted(tasks, key=lambda task: _key(task, seed, purpose))


def split(tasks: Iterable[_Task], seed: int, held_out: float) -> tuple[list[_Task], list[_Task]]:
    """The rows to train on, and about the share `held_out` (0 to 1) of all, which are not among them. Where a
    row goes follows from its id and `seed` alone, so it stays there whatever is added.
    """
    sound = isinstance(held_out, Real) and 0.0 <= held_out <= 1.0
    require(sound, "held_out", "a share from 0 to 1", held_out)
    limit = held_out * 2.0**64
    sides: tuple[list[_Task], list[_Task]] = ([], [])
    for task in tasks:
        place = int.from_bytes(_key(task, seed, "split")[0][:8], "big")
        sides[place < limit].append(task)
    return sides


def _key(task: Any, seed: int, purpose: str) -> tuple[bytes, str]:
    name = task_id(task)
    return hashlib.sha256(json.dumps([purpose, int(seed), name]).encode()).digest(), name


class TaskStream:
    """An endless stream of rows, by place: all of `tasks` in a shuffled order, then all in another, ..."""

    __iter__ = None  # it has no end

    def __init__(self, tasks: Iterable[Any], seed: int) -> None:
        self.tasks, self._seed = shuffled(tasks, 0), seed  # in an order of their own, not the file's
        require(len(self.tasks) > 0, "tasks", "at least one row", self.tasks)
        check_ids(self.tasks)
        self._order: tuple[int, list[Any]] = (-1, [])

    def __getitem__(self, place: int) -> Any:
        epoch, index = divmod(place, len(self.tasks))
        if self._order[0] != epoch:
            self._order = epoch, shuffled(self.tasks, self._seed, f"epoch {epoch}")
        return self._order[1][index]


def read_rows(path: str | os.PathLike[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of a file, each with where it stands: "file:line" (of a list in JSON or a Parquet file,
    "file: row N").

    .jsonl: an object per line; .json: a list of objects; .parquet: columns (needs pyarrow). InputError for a
    file that cannot be read, and for a row that is none, by its place.
    """
    file = Path(path)
    readers = {".jsonl": _jsonl, ".json": _json, ".parquet": _parquet}
    require(file.suffix in readers, "path", f"a file that ends in {', '.join(readers)}", str(file))
    try:
        yield from readers[file.suffix](file)
    except OSError as error:
        raise InputError(f"path: expected a file that can be read, got {str(file)!r}: {error}") from None


def is_blank(line: bytes) -> bool:
    """Whether a line of JSONL has nothing but what JSON calls white space."""
    return not line.strip(b" \t\r\n")


def _jsonl(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    with file.open("rb") as lines:  # bytes: only "\n" ends a line, not every character that Unicode calls one
        for number, line in enumerate(lines, 1):
            if not is_blank(line):
                yield f"{file}:{number}", _object(f"{file}:{number}", line)


def _json(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        rows = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file}: expected JSON, got {error}") from None
    require(isinstance(rows, list), str(file), "a list of objects", type(rows).__name__)
    for number, row in enumerate(rows, 1):
        where = f"{file}: row {number}"
        require(isinstance(row, dict), where, "an object", row)
        yield where, row


def _object(where: str, line: bytes) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: expected a line of JSON, got {line[:80]!r}: {error}") from None
    require(isinstance(row, dict), where, "an object", row)
    return dict(row)


def _parquet(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    with extra("data", str(file)):
        import pyarrow
        import pyarrow.parquet
    file.open("rb").close()
    try:
        number = 0
        for batch in pyarrow.parquet.ParquetFile(file).iter_batches():
            for row in batch.to_pylist():
                number += 1
                yield f"{file}: row {number}", row
    # A text that is not UTF-8, a time that Python does not have: what pyarrow does not notice itself.
    except (pyarrow.ArrowException, ValueError, OverflowError) as error:
        raise InputError(f"{file}: expected a Parquet file, got {error}") from None
