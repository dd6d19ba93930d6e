"""Indexes on disk: made once for a corpus and settings, whole or not there, by one process at a time."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from array import array
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mem1.checks import InputError
from mem1.envs.search.corpus import Corpus
from mem1.io import sync

OFFSETS, SETTINGS = "offsets.npy", "settings.json"
Build = Callable[[Path, Iterator[str]], None]


def open_index(
    corpus_path: str | os.PathLike[str],
    index_folder: str | os.PathLike[str] | None,
    settings: Mapping[str, Any],
    build: Build,
) -> tuple[Corpus, Path]:
    """A corpus and the folder with its index, which `build(folder, contents)` has written into an empty one.

    It lies in `index_folder`, by default beside the corpus, in a folder of its own for each content of the
    corpus and `settings` (what else the index follows from): a corpus that has changed is indexed again. What
    is no longer needed stays and may be deleted. Processes that want the same index wait for the first.

    Raises InputError for a corpus with faults (by file and line) and a folder that cannot be written.
    """
    corpus = Corpus(Path(corpus_path))
    folder = Path(f"{corpus.path}.index" if index_folder is None else index_folder)

    def write(fresh: Path) -> None:
        offsets = array("q")
        build(fresh, _contents(corpus, offsets))
        np.save(fresh / OFFSETS, np.asarray(offsets))

    index = _build_once(folder, {"corpus": corpus.identity(), **settings}, write)
    try:
        corpus.offsets = np.asarray(np.load(index / OFFSETS, mmap_mode="r"))
    except (OSError, ValueError, EOFError) as error:
        raise damaged(index, error) from None
    return corpus, index


def damaged(index: Path, error: Exception) -> InputError:
    """The error for an index that cannot be used."""
    return InputError(f"index_folder: expected a whole index, got {str(index)!r} ({error}); delete it")


def _contents(corpus: Corpus, offsets: array[int]) -> Iterator[str]:
    for row in corpus.rows():
        offsets.append(row.offset)
        yield row.contents


def _build_once(folder: Path, settings: Mapping[str, Any], write: Callable[[Path], None]) -> Path:
    text = json.dumps(settings, indent=2, sort_keys=True)
    whole = folder / hashlib.sha256(text.encode()).hexdigest()[:32]
    if whole.is_dir():
        return whole
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # let go of by the system, however the process ends
            if not whole.is_dir():
                _write_whole(whole, text, write)
    except OSError as error:
        raise InputError(
            f"index_folder: expected a folder that can be written, got {str(folder)!r}: {error}"
        ) from error
    return whole


def _write_whole(whole: Path, settings: str, write: Callable[[Path], None]) -> None:
    fresh = whole.with_name(f".{whole.name}.new")
    shutil.rmtree(fresh, ignore_errors=True)  # of a process that was killed: the lock is ours
    fresh.mkdir()
    try:
        write(fresh)
        (fresh / SETTINGS).write_text(settings)
        for path in (*fresh.iterdir(), fresh):
            sync(path)
        fresh.rename(whole)
        sync(whole.parent)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
