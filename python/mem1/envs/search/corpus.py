"""A corpus: passages in a JSONL file, one a line, read from disk when they are asked for.

    {"id": "7", "contents": "\\"Oslo\\"\\nOslo is the capital of Norway."}
    {"id": "7", "title": "Oslo", "text": "Oslo is the capital of Norway."}     the same

Other fields are ignored. `title` may be missing.
"""

from __future__ import annotations

import hashlib
import json
import os
import weakref
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from mem1.checks import InputError, require
from mem1.envs.tasks import is_blank, read_rows

if TYPE_CHECKING:
    import numpy as np

_CHUNK = 1 << 20


class CorpusRow(NamedTuple):
    """A passage and where its line begins, in bytes."""

    offset: int
    id: str
    contents: str


class Corpus:
    """The passages of a file, by their place in it, once `offsets` are known. May be read by several threads.

    A file that is replaced by another while it is open stays readable; of one that is overwritten nothing is
    read any more: that is an InputError.
    """

    def __init__(self, path: Path) -> None:
        """InputError for a file that cannot be read or does not end in .jsonl."""
        require(path.suffix == ".jsonl", "corpus_path", "a file that ends in .jsonl", str(path))
        require(path.is_file(), "corpus_path", "a file", str(path))
        try:
            self._descriptor = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise InputError(
                f"corpus_path: expected a file that can be read, got {str(path)!r}: {error}"
            ) from None
        weakref.finalize(self, os.close, self._descriptor)
        self.path = path
        # Where each passage's line begins, in bytes.
        self.offsets: Sequence[int] | np.ndarray = ()
        self._opened = os.fstat(self._descriptor)
        self._identity: dict[str, Any] | None = None

    def __len__(self) -> int:
        return len(self.offsets)

    def __getitem__(self, place: int) -> tuple[str, str]:
        """Id and contents."""
        begin = int(self.offsets[place])
        end = int(self.offsets[place + 1]) if place + 1 < len(self) else self._opened.st_size
        # Not a memory map: to read beyond the end of a file that was cut would kill the process.
        line = os.pread(self._descriptor, end - begin, begin)
        self._require_unchanged()
        return _passage(f"{self.path}: byte {begin}", json.loads(line))

    def identity(self) -> dict[str, Any]:
        """What tells these contents from any others. Takes about a second per GB."""
        if self._identity is None:
            self._identity = self._digest()
        return self._identity

    def _digest(self) -> dict[str, Any]:
        digest, size = hashlib.sha256(), 0
        while chunk := os.pread(self._descriptor, _CHUNK, size):
            digest.update(chunk)
            size += len(chunk)
        return {"bytes": size, "sha256": digest.hexdigest()}

    def rows(self) -> Iterator[CorpusRow]:
        """All passages, in order. InputError, with file and line, for a row that is none and for an id that
        occurs twice; and for a corpus without passages.
        """
        seen = set[str]()
        for offset, (where, row) in zip(self._line_offsets(), read_rows(self.path), strict=False):
            name, contents = _passage(where, row)
            require(name not in seen, f"{where}: id", "one that occurs once", name)
            seen.add(name)
            yield CorpusRow(offset, name, contents)
        require(
            os.path.samestat(self.path.stat(), self._opened), "corpus_path", "a file that stays", "another"
        )
        self._require_unchanged()
        require(len(seen) > 0, "corpus_path", "a file with passages", str(self.path))

    def _line_offsets(self) -> Iterator[int]:
        """Where the lines begin that `read_rows` reads: those that are not blank."""
        offset = 0
        with self.path.open("rb") as file:
            for line in file:
                if not is_blank(line):
                    yield offset
                offset += len(line)

    def _require_unchanged(self) -> None:
        now, opened = os.fstat(self._descriptor), self._opened
        if (now.st_size, now.st_mtime_ns) != (opened.st_size, opened.st_mtime_ns):
            # Copied over itself, or touched by a backup: then the contents are the same.
            same = self._identity is not None and self._digest() == self._identity
            require(same, "corpus_path", "a file that nobody writes", str(self.path))
            self._opened = now


def _passage(where: str, row: Any) -> tuple[str, str]:
    require(isinstance(row, Mapping), where, "an object", row)
    name, contents = row.get("id"), row.get("contents")
    known = isinstance(name, (str, int)) and not isinstance(name, bool) and name != ""
    require(known, f"{where}: id", "a text or a number", name)
    if contents is None:
        title, text = row.get("title"), row.get("text")
        require(isinstance(text, str), where, "contents, or a text and its title", sorted(row))
        require(title is None or isinstance(title, str), f"{where}: title", "a text", title)
        contents = text if title is None else f'"{title}"\n{text}'
    require(isinstance(contents, str), f"{where}: contents", "a text", contents)
    return str(name), contents
