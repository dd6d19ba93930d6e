"""What a retriever is, and how its passages are shown to a policy."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Awaitable, Sequence
from numbers import Real
from typing import Any, NamedTuple, Protocol

MAX_QUERY_CHARS = 4096  # of a query, which a policy writes; what comes after them is not searched for
NOTHING_FOUND = "No passage was found."


class Passage(NamedTuple):
    """A passage of a corpus. contents: its title in double quotes, a line end, its text. score: higher is
    better, comparable within the results of one query; 0 where a server gives none.
    """

    id: str
    contents: str
    score: float


class Retriever(Protocol):
    """Finds passages. `search` may be a coroutine function."""

    def search(
        self, queries: Sequence[str], top_k: int
    ) -> list[list[Passage]] | Awaitable[list[list[Passage]]]:
        """Of each query the `top_k` best passages, or fewer where fewer fit, the best first.

        Any text is a query: the first `MAX_QUERY_CHARS` characters count. Raises InputError for a `top_k`
        below 1.
        """
        ...


def check_results(results: Any, count: int) -> None:
    """RuntimeError unless these are what a retriever may return for `count` queries."""
    if not isinstance(results, (list, tuple)) or len(results) != count:
        raise RuntimeError(f"expected a list of results of {count} queries, got {reprlib.repr(results)}")
    for passages in results:
        if not isinstance(passages, (list, tuple)) or not all(map(_is_passage, passages)):
            raise RuntimeError(f"expected a list of passages, got {reprlib.repr(passages)}")


def _is_passage(passage: Any) -> bool:
    return (
        isinstance(passage, Passage)
        and isinstance(passage.id, str)
        and isinstance(passage.contents, str)
        and isinstance(passage.score, Real)
        and math.isfinite(passage.score)
    )


def format_passages(passages: Sequence[Passage]) -> str:
    """The passages of one query as an observation, a line each, in the form on which the released models of
    Search-R1 and MEM1 were trained:

        Doc 1(Title: "Oslo") Oslo is the capital of Norway.
        Doc 2(Title: ...

    A passage without a title is shown as "Doc 1: ..."; no passages as `NOTHING_FOUND`.
    """
    return "\n".join(_line(number, passage) for number, passage in enumerate(passages, 1)) or NOTHING_FOUND


def _line(number: int, passage: Passage) -> str:
    title, separator, text = passage.contents.partition("\n")
    return f"Doc {number}(Title: {title}) {text}" if separator else f"Doc {number}: {title}"
