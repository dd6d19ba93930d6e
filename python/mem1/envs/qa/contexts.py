"""The passages that come with the questions of HotpotQA, 2WikiMultihopQA and MuSiQue."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from mem1.checks import InputError


class ContextPassage(NamedTuple):
    """A passage beside a question. supports: the set says that it holds the answer or a step to it."""

    title: str
    text: str
    supports: bool

    @property
    def id(self) -> str:
        """Follows from title and text, 16 hexadecimal digits: the same in every file and data set."""
        return hashlib.sha256(json.dumps([self.title, self.text]).encode()).hexdigest()[:16]

    @property
    def contents(self) -> str:
        """The form that Search-R1's retriever serves: the title in quotes, a line break, the text."""
        return f'"{self.title}"\n{self.text}'


def context_passages(where: str, row: Mapping[str, Any]) -> list[ContextPassage]:
    """The passages of a row, in its order; none where the format has none. InputError, which begins with
    `where`, for a row of another form than its set has.
    """
    try:
        if "paragraphs" in row:
            return [
                _passage(entry["title"], [entry["paragraph_text"]], entry.get("is_supporting", False))
                for entry in row["paragraphs"]
            ]
        if "context" in row:
            gold = {title for title, _ in row.get("supporting_facts", ())}
            return [_passage(title, sentences, title in gold) for title, sentences in row["context"]]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{where}: expected passages as in HotpotQA or MuSiQue, got {error!r}") from None
    return []


def _passage(title: str, sentences: list[str], supports: bool) -> ContextPassage:
    """Some sets begin a sentence with the blank that divides it from the one before, some do not."""
    if not isinstance(sentences, list):  # a text is a list of letters, too
        raise TypeError(f"sentences: expected a list of texts, got {type(sentences).__name__}")
    return ContextPassage(title.strip(), " ".join(sentence.strip() for sentence in sentences), bool(supports))
