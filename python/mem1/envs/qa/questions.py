"""What is asked: a question, and a task of several at once."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from mem1.checks import InputError


@dataclass(frozen=True)
class Question:
    """answers: the golden ones, each right by itself; at least one. dataset: the set it comes from. support:
    ids of the passages that hold the answer or a step to it. kind: how its set classes it ("bridge", "2hop").
    """

    id: str
    question: str
    answers: tuple[str, ...]
    dataset: str = ""
    support: tuple[str, ...] = ()
    kind: str = ""


@dataclass(frozen=True)
class QuestionTask:
    """The questions of one episode, each an objective; at least one."""

    id: str
    questions: tuple[Question, ...]


QuestionRow = Question | QuestionTask  # a row of a task set


def each_question(rows: Iterable[QuestionRow]) -> list[Question]:
    """The questions of all rows, in order, one that occurs in several rows once. InputError if two have the
    same id.
    """
    found: dict[str, Question] = {}
    for row in rows:
        for question in row.questions if isinstance(row, QuestionTask) else (row,):
            if found.setdefault(question.id, question) != question:
                raise InputError(f"questions: expected an id for each, got two of {question.id!r}")
    return list(found.values())
