"""Tasks of several questions at once, out of any set of questions, as MEM1 composes its own."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Iterator
from itertools import count as count_from
from itertools import islice

from mem1.checks import InputError, require
from mem1.envs.qa.questions import Question, QuestionRow, QuestionTask, each_question
from mem1.envs.tasks import shuffled
from mem1.metrics import SEPARATOR


def compose(
    questions: Iterable[QuestionRow],
    objectives: int,
    seed: int,
    count: int | None = None,
    *,
    datasets: Collection[str] = (),
    left_out: list[str] | None = None,
) -> list[QuestionTask]:
    """Tasks of `objectives` questions each, none of them twice in a task: the set in a shuffled order, cut
    into pieces. All follows from the ids of the questions, `objectives` and `seed`, on every machine; the id
    of a task from its questions.

    questions: tasks among them are taken apart. count: of tasks, by default as many as have each question
    once at most; more take the set again, in another order. datasets: take questions of these alone.
    left_out: collects the ids of questions that no answer separated by semicolons can hit, as every golden
    one has a semicolon. Raises InputError for too few questions and for an unknown dataset.
    """
    fits = isinstance(objectives, int) and objectives >= 1
    require(fits, "objectives", "a number >= 1", objectives)
    require(
        count is None or (isinstance(count, int) and count >= 0), "count", "a number >= 0, or None", count
    )
    usable, unusable = _usable(_of(each_question(questions), datasets))
    if left_out is not None:
        left_out += [question.id for question in unusable]
    expected = f"at least {objectives} of them, of which an answer without {SEPARATOR!r} is known"
    require(len(usable) >= objectives, "questions", expected, len(usable))
    wanted = len(usable) // objectives if count is None else count
    return list(islice(_tasks(usable, objectives, seed), wanted))


def _of(questions: list[Question], datasets: Collection[str]) -> list[Question]:
    known = {question.dataset for question in questions}
    for name in datasets:
        if name not in known:
            raise InputError(f"datasets: expected some of {', '.join(sorted(known))}, got {name!r}")
    return [question for question in questions if not datasets or question.dataset in datasets]


def _usable(questions: list[Question]) -> tuple[list[Question], list[Question]]:
    sides: tuple[list[Question], list[Question]] = ([], [])
    for question in questions:
        sides[all(SEPARATOR in answer for answer in question.answers)].append(question)
    return sides


def _tasks(questions: list[Question], objectives: int, seed: int) -> Iterator[QuestionTask]:
    for lap in count_from():
        order = shuffled(questions, seed, f"compose {objectives}, lap {lap}")
        for first in range(0, len(order) - objectives + 1, objectives):
            yield _task(tuple(order[first : first + objectives]), lap)


def _task(questions: tuple[Question, ...], lap: int) -> QuestionTask:
    ids = json.dumps([lap, *(question.id for question in questions)])
    return QuestionTask(f"{len(questions)}-{hashlib.sha256(ids.encode()).hexdigest()[:16]}", questions)
