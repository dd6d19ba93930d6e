"""Which of the known files a folder has, and whether they came through whole."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Literal, NamedTuple

from mem1.checks import InputError, require
from mem1.data.sources import DataFile, DataSet, data_sets
from mem1.envs.qa.question_files import has_format, read_questions
from mem1.envs.search.corpus import Corpus
from mem1.envs.tasks import read_rows

_BLOCK = 1 << 20  # bytes read at a time
# What files of other sets are called, too: one that is no known version may be one of these.
_COMMON = {"train.json", "dev.json", "train.parquet", "test.parquet", "qa.jsonl", "corpus.jsonl"}


class Finding(NamedTuple):
    """What became of a file.

    path: None where the folder has no file of that name. checksum: "missing" then; "matches" for the size and
    sha256 of a known version, "differs" where there are such and none fits, "unknown" where there are none,
    and where none fits but other sets have files of that name.
    rows: that could be read; None of what is not read (archives, for one). error: why it could not be; "".
    """

    dataset: str
    file: str
    path: Path | None
    checksum: Literal["matches", "differs", "unknown", "missing"]
    rows: int | None = None
    error: str = ""


def check(folder: str | os.PathLike[str]) -> list[Finding]:
    """Look for the files of every data set, by their names, in `folder` and all that it holds. Each that is
    there is read to its end. Of a name that other sets use, such as train.json, questions in another form are
    none of this set. InputError if `folder` is none.
    """
    root = Path(folder)
    require(root.is_dir(), "folder", "a folder", str(root))
    present: dict[str, list[Path]] = {}
    for path in sorted(root.rglob("*")):
        if path.is_file():
            present.setdefault(path.name, []).append(path)
    findings = []
    for dataset in data_sets():
        for file in dataset.files:
            checked = [_checked(dataset, file, path) for path in present.get(file.name, [])]
            found = [finding for finding in checked if finding is not None]
            findings += found
            if not found:
                findings.append(Finding(dataset.name, file.name, None, "missing"))
    return findings


def sha256_of(path: Path) -> str:
    """The hexadecimal digest of a file, which is never held in memory as a whole."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def _checked(dataset: DataSet, file: DataFile, path: Path) -> Finding | None:
    """None for a file of another set."""
    found = Finding(dataset.name, file.name, path, "unknown")
    try:
        if file.digests and _is_known(file, path):
            found = found._replace(checksum="matches")
        elif file.name not in _COMMON:
            found = found._replace(checksum="differs" if file.digests else "unknown")
        elif file.content == "questions" and not has_format(path, dataset.format):
            return None
        return found._replace(rows=_rows(dataset, file, path))
    except (InputError, OSError) as error:
        return found._replace(error=str(error))


def _is_known(file: DataFile, path: Path) -> bool:
    size = path.stat().st_size
    fitting = [digest.sha256 for digest in file.digests if digest.size == size]
    return bool(fitting) and sha256_of(path) in fitting


def _rows(dataset: DataSet, file: DataFile, path: Path) -> int | None:
    if file.content == "questions":
        return len(read_questions(path, dataset.format))
    if file.content == "passages":
        return sum(1 for _ in Corpus(path).rows())
    return sum(1 for _ in read_rows(path)) if file.content == "rows" else None
