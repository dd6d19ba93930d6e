"""Files that are whole or not there, whenever the process or the machine dies."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from mem1.checks import InputError


def unfinished(path: Path) -> Path:
    """Where what will be `path` is written."""
    return path.with_name(f".{path.name}.{os.getpid()}.new")


def leftovers(folder: Path, name: str) -> list[Path]:
    """What processes that were killed have left in `folder` of files whose names begin with `name`."""
    return [path for path in folder.glob(f".{name}*.new") if re.fullmatch(r"\..+\.\d+\.new", path.name)]


def sync(path: Path) -> None:
    """Have a file, or a folder's names, on disk: what a power cut leaves."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def atomic_write(path: Path) -> Iterator[TextIO]:
    """A text file to write to that takes the name `path` only once all of it is on disk.

    Raises InputError if there can be no such file.
    """
    if path.exists() and not path.is_file():
        raise InputError(f"path: expected the name of a regular file, got {str(path)!r}")
    fresh = unfinished(path)
    try:
        file = fresh.open("w")
    except OSError as error:
        raise InputError(f"path: expected the name of a file that can be written, got {error}") from error
    try:
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        fresh.replace(path)
        sync(path.parent)
    finally:
        fresh.unlink(missing_ok=True)


def link(path: Path, target: str) -> None:
    """Let the symbolic link `path` name `target`, from one moment to the next."""
    fresh = unfinished(path)
    fresh.unlink(missing_ok=True)
    fresh.symlink_to(target)
    fresh.replace(path)
    sync(path.parent)


def without_nan(record: dict[str, Any]) -> dict[str, Any]:
    """`record` as JSON can have it, which knows neither NaN nor infinity: null, which means leave out."""
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in record.items()
    }


@contextmanager
def ignore_closed_pipe(stream: TextIO | None) -> Iterator[None]:
    """Writing to standard output or error, which may lead nowhere (a closed pipe, a full disk, a terminal
    that is gone): then that, and whatever follows, is lost, and the work goes on.
    """
    try:
        yield
    except OSError:
        if stream is not None:  # what Python still holds of it is flushed at the end
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def append_json(path: Path, record: dict[str, Any]) -> None:
    """Add one line to a .jsonl file. Raises ValueError for NaN and infinity, which JSON does not have."""
    line = json.dumps(record, allow_nan=False)
    with path.open("a") as file:
        file.write(line + "\n")
