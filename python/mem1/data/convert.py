"""Public files of questions in this project's form: questions, and the passages that come with them."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from mem1.checks import InputError, require
from mem1.data.sources import data_set, data_sets
from mem1.envs.qa.contexts import context_passages
from mem1.envs.qa.question_files import read_questions
from mem1.envs.qa.questions import Question, each_question
from mem1.envs.tasks import read_rows
from mem1.io import atomic_write


class Converted(NamedTuple):
    """What was written. left_out: where rows stand that were not, and why."""

    questions: int
    passages: int
    left_out: tuple[str, ...]


QUESTIONS, PASSAGES = "qa.jsonl", "corpus.jsonl"


def convert(
    name: str, source: str | os.PathLike[str], out: str | os.PathLike[str], *, overwrite: bool = False
) -> Converted:
    """Write the questions of the file `source`, of the data set `name`, to qa.jsonl in the folder `out`; and
    to corpus.jsonl, each once, the passages that come with them, if there are any.

    A row of qa.jsonl has id, dataset, question, golden_answers, support (ids in the corpus) and type; one of
    corpus.jsonl has id, title and contents ('"Title"', a line break, the text). Tasks of several questions
    are taken apart. Each file is whole or not there. Raises InputError for an unknown name, one without
    questions, a file that cannot be read as its format, and a folder that has either file unless `overwrite`.
    """
    dataset = data_set(name)
    names = ", ".join(known.name for known in data_sets() if known.format)
    if dataset is None or not dataset.format:
        raise InputError(f"name: expected one of {names}, got {name!r}")
    left_out: list[str] = []
    questions = each_question(read_questions(source, dataset.format, left_out))
    folder = Path(out)
    for target in (folder / QUESTIONS, folder / PASSAGES):
        same = target.exists() and target.samefile(source)
        require(not same, "out", "another folder than that of the source", str(folder))
        free = overwrite or not target.exists()
        require(free, "out", f"a folder without {target.name}, or --overwrite", str(folder))
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"out: expected a folder that can be made, got {error}") from error
    passages = _write_passages(source, folder / PASSAGES)  # first: questions never lack theirs
    with atomic_write(folder / QUESTIONS) as file:
        for question in questions:
            _write(file, _row(question))
    if not passages:  # what may be there belongs to the questions that were
        (folder / PASSAGES).unlink(missing_ok=True)
    return Converted(len(questions), passages, tuple(left_out))


def _row(question: Question) -> dict[str, Any]:
    return {
        "id": question.id,
        "dataset": question.dataset,
        "question": question.question,
        "golden_answers": list(question.answers),
        "support": list(question.support),
        "type": question.kind,
    }


def _write_passages(source: str | os.PathLike[str], path: Path) -> int:
    rows = ((where, row) for where, row in read_rows(source) if "paragraphs" in row or "context" in row)
    first = next(rows, None)
    if first is None:
        return 0
    seen: set[str] = set()
    with atomic_write(path) as file:
        for where, row in (first, *rows):
            for passage in context_passages(where, row):
                if passage.id not in seen:
                    seen.add(passage.id)
                    _write(file, {"id": passage.id, "title": passage.title, "contents": passage.contents})
    return len(seen)


def _write(file: TextIO, row: dict[str, Any]) -> None:
    file.write(json.dumps(row) + "\n")
