"""Tasks of several questions: reproducible, no question twice, semicolons kept out."""

from __future__ import annotations

import hashlib

import pytest
from real_data import DATA, needs_data

from mem1.checks import InputError
from mem1.envs.qa.compose import compose
from mem1.envs.qa.question_files import read_questions
from mem1.envs.qa.questions import Question, QuestionTask, each_question
from mem1.envs.tasks import check_ids

QUESTIONS = [Question(f"q{n}", f"what is {n}?", (f"{n}",), "odd" if n % 2 else "even") for n in range(40)]


def ids(tasks: list[QuestionTask]) -> list[list[str]]:
    return [[question.id for question in task.questions] for task in tasks]


@pytest.mark.parametrize("objectives", [1, 2, 3, 4, 8, 16, 40])
def test_each_question_comes_once(objectives: int) -> None:
    tasks = compose(QUESTIONS, objectives, 0)
    check_ids(tasks)
    assert [len(task.questions) for task in tasks] == [objectives] * (40 // objectives)
    used = sum(ids(tasks), [])
    assert len(used) == len({*used}) and {*used} <= {question.id for question in QUESTIONS}


def test_the_same_on_every_machine_and_in_any_order() -> None:
    tasks = compose(QUESTIONS, 3, 7, 2)
    assert ids(tasks) == [["q18", "q36", "q39"], ["q2", "q28", "q11"]]
    assert [task.id for task in tasks] == ["3-74bbcb6a2559ba70", "3-fc3d97582ea37402"]
    assert compose(QUESTIONS[::-1], 3, 7, 2) == tasks
    assert ids(compose(QUESTIONS, 3, 8, 2)) != ids(tasks)


def test_the_order_is_that_of_hashes() -> None:
    def place(question: Question) -> bytes:
        return hashlib.sha256(f'["compose 2, lap 0", 5, "{question.id}"]'.encode()).digest()

    assert sum(ids(compose(QUESTIONS, 2, 5)), []) == [q.id for q in sorted(QUESTIONS, key=place)]


@pytest.mark.parametrize("objectives", [1, 3, 16])
def test_more_tasks_than_questions_take_the_set_again(objectives: int) -> None:
    tasks = compose(QUESTIONS, objectives, 0, 100)
    check_ids(tasks)
    assert len(tasks) == 100
    assert all(len({*task}) == objectives for task in ids(tasks))
    once = 40 // objectives
    assert tasks[:once] == compose(QUESTIONS, objectives, 0)
    assert ids(tasks[once : 2 * once]) != ids(tasks[:once])
    assert compose(QUESTIONS, objectives, 0, 0) == []


def test_tasks_are_composed_anew() -> None:
    assert compose(compose(QUESTIONS, 2, 1), 8, 0) == compose(QUESTIONS, 8, 0)


def test_answers_with_semicolons_only_are_left_out() -> None:
    both, only = Question("both", "?", ("a; b", "a b")), Question("only", "?", ("a; b", ";"))
    left_out: list[str] = []
    tasks = compose([both, only, *QUESTIONS[:2]], 3, 0, left_out=left_out)
    assert left_out == ["only"]
    assert {*ids(tasks)[0]} == {"both", "q0", "q1"}


def test_of_some_data_sets() -> None:
    tasks = compose(QUESTIONS, 4, 0, datasets=["odd"])
    assert len(tasks) == 5
    assert {question.dataset for task in tasks for question in task.questions} == {"odd"}
    with pytest.raises(InputError, match="datasets: expected some of even, odd, got 'prime'"):
        compose(QUESTIONS, 4, 0, datasets=["odd", "prime"])


@pytest.mark.parametrize(
    ("objectives", "count", "message"),
    [
        (0, None, "objectives: expected a number >= 1, got 0"),
        (41, None, "questions: expected at least 41 of them, .*, got 40"),
        (2, -1, "count: expected a number >= 0, or None, got -1"),
    ],
)
def test_arguments_out_of_range(objectives: int, count: int | None, message: str) -> None:
    with pytest.raises(InputError, match=message):
        compose(QUESTIONS, objectives, 0, count)


@needs_data
def test_the_real_questions_compose() -> None:
    questions = read_questions(DATA / "qa" / "qa.jsonl")
    left_out: list[str] = []
    counts = {}
    for objectives in (1, 2, 4, 8, 16, 32):
        tasks = compose(questions, objectives, 0, left_out=left_out)
        counts[objectives] = len(tasks)
        assert len(each_question(tasks)) == objectives * len(tasks)
    assert counts == {1: 2955, 2: 1477, 4: 738, 8: 369, 16: 184, 32: 92}
    assert left_out == []
