"""Files of questions, in this project's form and those of the public sets.

    qa         id, question, golden_answers; dataset, support (ids of passages), type. FlashRAG's form, too
    hotpotqa   _id, question, answer, context, supporting_facts, type
    2wiki      the same, with evidences (2WikiMultihopQA)
    musique    id, question, answer, answer_aliases, paragraphs, answerable
    nq-open    question, answer (a list)
    search-r1  data_source, prompt, reward_model, extra_info: Search-R1's Parquet files, and MEM1's, whose
               rows hold the questions of a whole task

Where a set has the passages beside the question, `support` has the ids that `convert` gives to them.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from mem1.checks import InputError, require
from mem1.envs.qa.contexts import context_passages
from mem1.envs.qa.questions import Question, QuestionRow, QuestionTask
from mem1.envs.tasks import read_rows

_QUESTION, _QUESTIONS = "Question:", "questions:"  # what stands before it in Search-R1's prompts, MEM1's
_TARGET = "reward_model.ground_truth.target"
_NEXT_QUESTION = re.compile(r"(?<=\?);\s+")  # MEM1's prompts join questions, each with its "?", by "; "


class _Place(NamedTuple):
    """Where a row stands: for messages, and as an id for a row that has none."""

    where: str
    id: str


_Read = Callable[[_Place, Mapping[str, Any]], QuestionRow | str]  # a text says why the row is left out


def read_questions(
    path: str | os.PathLike[str], format: str = "auto", left_out: list[str] | None = None
) -> list[QuestionRow]:
    """The rows of a file (`read_rows` says of which types), questions or whole tasks.

    format: one of `FORMATS`, "auto": as the fields of the first row say. left_out: collects where the rows
    stand that are in order but of no use, with the reason: questions of MuSiQue that have no answer, prompts
    of MEM1 whose questions cannot be told apart. InputError for a file without rows or of no known format,
    for a malformed row and an id that occurs twice, by file and line or row.
    """
    require(format in ("auto", *FORMATS), "format", f"auto or one of {', '.join(FORMATS)}", format)
    found: list[QuestionRow] = []
    seen: dict[str, str] = {}
    number = 0
    for number, (where, row) in enumerate(read_rows(path), 1):
        if format == "auto":
            format = _recognised(where, row)
        read = _READERS[format].read(_Place(where, f"{Path(path).stem}-{number}"), row)
        if isinstance(read, str):
            if left_out is not None:
                left_out.append(f"{where}: {read}")
            continue
        if read.id in seen:
            raise InputError(f"{where}: id: expected one of its own, got {read.id!r}, as at {seen[read.id]}")
        seen[read.id] = where
        found.append(read)
    require(number > 0, "path", "a file with at least one row", str(path))
    return found


def has_format(path: str | os.PathLike[str], format: str) -> bool:
    """Whether the first row of a file has the fields by which `format` is known. InputError as
    `read_questions`, for a file that cannot be read.
    """
    return any(_READERS[format].marks <= row.keys() for _, row in islice(read_rows(path), 1))


def _recognised(where: str, row: Mapping[str, Any]) -> str:
    for name, reader in _READERS.items():
        if reader.marks <= row.keys():
            return name
    raise InputError(f"{where}: expected a row of {', '.join(FORMATS)}, got one with {', '.join(row)}")


def _own(place: _Place, row: Mapping[str, Any]) -> Question:
    support = row.get("support") or []
    fits = isinstance(support, list) and all(isinstance(entry, (str, int)) for entry in support)
    _require(fits, place, "support", "a list of ids", support)
    return Question(
        _id(place, row.get("id")),
        _text(place, "question", row.get("question")),
        _texts(place, "golden_answers", row.get("golden_answers")),
        str(row.get("dataset") or ""),
        tuple(str(entry) for entry in support),
        str(row.get("type") or ""),
    )


def _hotpotqa(dataset: str, place: _Place, row: Mapping[str, Any]) -> Question:
    return Question(
        _id(place, row.get("_id")),
        _text(place, "question", row.get("question")),
        _texts(place, "answer", row.get("answer")),
        dataset,
        _support(place, row),
        str(row.get("type") or ""),
    )


def _musique(place: _Place, row: Mapping[str, Any]) -> Question | str:
    if row.get("answerable") is False:
        return "a question without an answer"
    name = _id(place, row.get("id"))
    answers = _texts(place, "answer", row.get("answer"))
    aliases = row.get("answer_aliases") or []
    return Question(
        name,
        _text(place, "question", row.get("question")),
        tuple(dict.fromkeys([*answers, *(_texts(place, "answer_aliases", aliases) if aliases else ())])),
        "musique",
        _support(place, row),
        name.partition("__")[0],
    )


def _nq_open(place: _Place, row: Mapping[str, Any]) -> Question:
    question = _text(place, "question", row.get("question"))
    return Question(place.id, question, _texts(place, "answer", row.get("answer")), "nq")


def _search_r1(place: _Place, row: Mapping[str, Any]) -> QuestionRow | str:
    truth = _table(place, "reward_model", row.get("reward_model")).get("ground_truth")
    target = _table(place, "reward_model.ground_truth", truth).get("target")
    source = _text(place, "data_source", row.get("data_source"))
    extra = _table(place, "extra_info", row.get("extra_info") or {})
    prefix = f"{source}-{extra.get('split') or 'rows'}"
    if isinstance(target, list) and any(isinstance(answers, list) for answers in target):
        return _mem1_task(place, row, target, source, prefix, extra.get("indices"))
    name = place.id if extra.get("index") is None else f"{prefix}-{extra['index']}"
    text = _text(place, "question", row.get("question") or _asked(place, row, _QUESTION, str.partition))
    return Question(name, text, _texts(place, _TARGET, target), source)


def _mem1_task(
    place: _Place, row: Mapping[str, Any], target: list[Any], source: str, prefix: str, indices: Any
) -> QuestionTask | str:
    """target: of each question its golden answers. indices: the places of the questions in their set."""
    texts = _NEXT_QUESTION.split(_asked(place, row, _QUESTIONS, str.rpartition).strip())
    if len(texts) != len(target):
        return f"{len(target)} questions that cannot be told apart"
    task, names = place.id, [f"{place.id}.{part}" for part in range(len(target))]
    if indices is not None:
        fits = isinstance(indices, list) and len(indices) == len(target)
        _require(fits, place, "extra_info.indices", f"{len(target)} of them", indices)
        names = [f"{prefix}-{index}" for index in indices]
        task = f"{names[0]}x{len(names)}"
    parts = [
        Question(name, text.strip(), _texts(place, _TARGET, answers), source)
        for name, text, answers in zip(names, texts, target, strict=True)
    ]
    return QuestionTask(task, tuple(parts))


def _asked(
    place: _Place, row: Mapping[str, Any], mark: str, cut: Callable[[str, str], tuple[str, str, str]]
) -> str:
    """What the last user's message has after `mark`, the first one or the last; all of it without one."""
    prompt = row.get("prompt")
    fits = isinstance(prompt, list) and all(isinstance(message, dict) for message in prompt)
    _require(fits, place, "prompt", "a list of chat messages", prompt)
    texts = [message.get("content") for message in prompt or () if message.get("role") == "user"]
    text = _text(place, "prompt", texts[-1] if texts else None)
    return cut(text, mark)[2] if mark in text else text


def _support(place: _Place, row: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(passage.id for passage in context_passages(place.where, row) if passage.supports)


def _id(place: _Place, value: object) -> str:
    fits = isinstance(value, (str, int)) and not isinstance(value, bool) and value != ""
    _require(fits, place, "id", "a text or a number", value)
    return str(value)


def _table(place: _Place, name: str, value: object) -> dict[str, Any]:
    _require(isinstance(value, dict), place, name, "an object", value)
    return dict(value)  # type: ignore[call-overload]


def _text(place: _Place, name: str, value: object) -> str:
    _require(isinstance(value, str) and bool(value.strip()), place, name, "a text", value)
    return str(value).strip()


def _texts(place: _Place, name: str, value: object) -> tuple[str, ...]:
    """A text or several, each once."""
    texts: list[Any] = value if isinstance(value, list) else [value]
    fits = len(texts) > 0 and all(isinstance(text, str) and text.strip() for text in texts)
    _require(fits, place, name, "a text or a list of texts", value)
    return tuple(dict.fromkeys(text.strip() for text in texts))


def _require(fits: bool, place: _Place, name: str, expected: str, value: object) -> None:
    if not fits:
        raise InputError(f"{place.where}: {name}: expected {expected}, got {value!r:.100}")


class _Reader(NamedTuple):
    marks: frozenset[str]  # fields by which a row is recognised
    read: _Read


# Searched from the top: further down rows have fewer fields of their own.
_READERS = {
    "search-r1": _Reader(frozenset({"prompt", "reward_model"}), _search_r1),
    "qa": _Reader(frozenset({"question", "golden_answers"}), _own),
    "musique": _Reader(frozenset({"question", "paragraphs"}), _musique),
    "2wiki": _Reader(frozenset({"_id", "evidences"}), partial(_hotpotqa, "2wikimultihopqa")),
    "hotpotqa": _Reader(frozenset({"_id", "context"}), partial(_hotpotqa, "hotpotqa")),
    "nq-open": _Reader(frozenset({"question", "answer"}), _nq_open),
}
FORMATS = tuple(_READERS)
