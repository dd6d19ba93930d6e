"""Each public format is read as it is published; what is malformed is named by its place."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from question_rows import HOTPOTQA, MUSIQUE, NQ_OPEN, QA, TWO_WIKI, mem1_row, search_r1_row, write_rows
from real_data import DATA, needs_data

from mem1.checks import InputError
from mem1.envs.qa.contexts import ContextPassage
from mem1.envs.qa.question_files import FORMATS, read_questions
from mem1.envs.qa.questions import Question, QuestionTask, each_question

BRIDGE = ContextPassage("Old Bridge", "The bridge was built by Ann Lee. It is of stone.", True).id
MILL = ContextPassage("Mill", "The mill stands on the river. Ann Lee built it.", True).id
READ = {
    "qa": (
        "jsonl",
        QA,
        [
            Question("nq_0", "who built the old bridge", ("Ann Lee", "Lee"), "nq", ("7",)),
            Question(
                "h1",
                "Which is older, the bridge or the mill?",
                ("the mill",),
                *("hotpotqa", ("7", "9"), "comparison"),
            ),
        ],
    ),
    "hotpotqa": (
        "json",
        HOTPOTQA,
        [
            Question(
                "5a8b57f25542995d1e6f1371",
                "Were the bridge and the mill built by the same woman?",
                ("yes",),
                *("hotpotqa", (BRIDGE, MILL), "comparison"),
            )
        ],
    ),
    "2wiki": (
        "json",
        TWO_WIKI,
        [
            Question(
                "13f5ad2c088c11ebbd6fac1f6bf848b6",
                "Which mill was built first?",
                ("Mill",),
                *("2wikimultihopqa", (MILL,), "bridge_comparison"),
            )
        ],
    ),
    "musique": (
        "jsonl",
        MUSIQUE,
        [
            Question(
                "2hop__482757_12019",
                "Who built what stands on the river?",
                ("Ann Lee", "Lee"),
                *("musique", (ContextPassage("Mill", "Ann Lee built it.", True).id,), "2hop"),
            )
        ],
    ),
    "nq-open": (
        "jsonl",
        NQ_OPEN,
        [
            Question("rows-1", "who built the old bridge", ("Ann Lee",), "nq"),
            Question("rows-2", "when did the ferry sink", ("1901", "in 1901"), "nq"),
        ],
    ),
}


@pytest.mark.parametrize("named", [True, False], ids=["named", "auto"])
@pytest.mark.parametrize("format", READ)
def test_each_format_is_read_and_recognised(tmp_path: Path, format: str, named: bool) -> None:
    suffix, rows, expected = READ[format]
    path = write_rows(tmp_path / f"rows.{suffix}", rows)
    assert read_questions(path, format if named else "auto") == expected


def test_formats_are_those_of_the_docstring() -> None:
    assert {*FORMATS} == {*READ, "search-r1"}


def test_questions_without_an_answer_are_left_out_and_said(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", MUSIQUE)
    left_out: list[str] = []
    assert len(read_questions(path, left_out=left_out)) == 1
    assert left_out == [f"{path}:2: a question without an answer"]


def test_search_r1_has_a_question_a_row(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    rows = [
        search_r1_row("nq", 0, "who built it?", ["Ann Lee", "Lee"]),
        search_r1_row("hotpotqa", 0, "what question: of two?", ["a; b"]),
    ]
    expected = [
        Question("nq-train-0", "who built it?", ("Ann Lee", "Lee"), "nq"),
        Question("hotpotqa-train-0", "what question: of two?", ("a; b",), "hotpotqa"),
    ]
    assert read_questions(write_rows(tmp_path / "train.parquet", rows)) == expected
    # The published files have the columns of their sources as well, ids that occur twice among them.
    columns = [{"id": "train_0", "question": "who built it", "golden_answers": ["Ann Lee"]} for _ in rows]
    wide = [row | more for row, more in zip(rows, columns, strict=True)]
    read = read_questions(write_rows(tmp_path / "wide.parquet", wide))
    assert [row.id for row in read] == ["nq-train-0", "hotpotqa-train-0"]
    assert {row.question for row in each_question(read)} == {"who built it"}


def test_a_prompt_without_an_instruction_is_the_question(tmp_path: Path) -> None:
    prompt = [{"role": "system", "content": "Question: no."}, {"role": "user", "content": " who? "}]
    row = search_r1_row("nq", 3, "", ["a"], prompt=prompt)
    read = read_questions(write_rows(tmp_path / "rows.jsonl", [row]))
    assert read == [Question("nq-train-3", "who?", ("a",), "nq")]


def test_a_question_about_a_question(tmp_path: Path) -> None:
    prompt = [{"role": "user", "content": "Answer. Question: who asked 'Question: who?'"}]
    row = search_r1_row("nq", 3, "", ["a"], prompt=prompt)
    (read,) = read_questions(write_rows(tmp_path / "rows.jsonl", [row]))
    assert isinstance(read, Question) and read.question == "who asked 'Question: who?'"


def test_mem1_has_the_questions_of_a_task_a_row(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    rows = [
        mem1_row("nq", 0, ["who built it?", "a; or b?"], [["Ann Lee", "Lee"], ["b"]]),
        mem1_row("nq", 2, ["one? ?", "two?"], [["1"], ["2"]]),
        mem1_row("nq", 4, ["which?; who?", "two?"], [["1"], ["2"]]),
        mem1_row("hotpotqa", 0, ["just one?"], [["1", "one"]]),
    ]
    path = write_rows(tmp_path / "test.parquet", rows)
    left_out: list[str] = []
    first, second, third = read_questions(path, left_out=left_out)
    assert first == QuestionTask(
        "nq-test-0x2",
        (
            Question("nq-test-0", "who built it?", ("Ann Lee", "Lee"), "nq"),
            Question("nq-test-1", "a; or b?", ("b",), "nq"),
        ),
    )
    assert isinstance(second, QuestionTask)
    assert [question.question for question in second.questions] == ["one? ?", "two?"]
    assert third == QuestionTask(
        "hotpotqa-test-0x1", (Question("hotpotqa-test-0", "just one?", ("1", "one"), "hotpotqa"),)
    )
    assert left_out == [f"{path}: row 3: 2 questions that cannot be told apart"]


def test_rows_without_an_index_are_named_by_their_place(tmp_path: Path) -> None:
    single, several = search_r1_row("nq", 0, "who?", ["a"]), mem1_row("nq", 0, ["x?", "y?"], [["1"], ["2"]])
    rows = [{**row, "extra_info": {}} for row in (single, several)]
    read = read_questions(write_rows(tmp_path / "rows.jsonl", rows))
    assert [row.id for row in read] == ["rows-1", "rows-2"]
    assert [question.id for question in each_question(read[1:])] == ["rows-2.0", "rows-2.1"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (QA[0] | {"question": None}, "question: expected a text, got None"),
        (QA[0] | {"question": " "}, "question: expected a text, got ' '"),
        (QA[0] | {"golden_answers": []}, r"golden_answers: expected a text or a list of texts, got \[\]"),
        (QA[0] | {"golden_answers": ["a", 3]}, "golden_answers: expected"),
        (QA[0] | {"support": "7"}, "support: expected a list of ids, got '7'"),
        (QA[0] | {"id": True}, "id: expected a text or a number, got True"),
        (HOTPOTQA[0] | {"answer": None}, "answer: expected a text or a list of texts, got None"),
        (HOTPOTQA[0] | {"context": [["Mill"]]}, "expected passages as in HotpotQA or MuSiQue"),
        (MUSIQUE[0] | {"paragraphs": [{"title": "Mill"}]}, "expected passages as in HotpotQA or MuSiQue"),
        (NQ_OPEN[0] | {"answer": {}}, "answer: expected"),
        ({"prompt": "who?", "reward_model": None}, "reward_model: expected an object, got None"),
        (
            {"prompt": [], "reward_model": {"ground_truth": {"target": ["a"]}}, "data_source": "nq"},
            "prompt: expected a text, got None",
        ),
        (
            mem1_row("nq", 0, ["x?", "y?"], [["1"], ["2"]]) | {"extra_info": {"indices": [0]}},
            r"extra_info.indices: expected 2 of them, got \[0\]",
        ),
    ],
)
def test_malformed_rows_are_named(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n" + json.dumps(row))
    with pytest.raises(InputError, match=f"^{path}:2: {message}"):
        read_questions(path)


def test_an_id_may_occur_once(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [*QA, QA[0]])
    with pytest.raises(
        InputError, match=f"^{path}:3: id: expected one of its own, got 'nq_0', as at {path}:1$"
    ):
        read_questions(path)


@pytest.mark.parametrize("format", ["auto", "hotpotqa"])
def test_files_without_rows_and_unknown_ones_are_refused(tmp_path: Path, format: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n")
    with pytest.raises(InputError, match="path: expected a file with at least one row"):
        read_questions(path, format)
    path.write_text('{"text": "a", "label": 1}\n')
    message = f"{path}:1: expected a row of search-r1, .*, got one with text, label"
    with pytest.raises(InputError, match=message if format == "auto" else f"{path}:1: id"):
        read_questions(path, format)
    with pytest.raises(InputError, match="format: expected auto or one of .*, got 'squad'"):
        read_questions(path, "squad")


def test_questions_of_tasks_come_once() -> None:
    one, two = Question("1", "x", ("a",)), Question("2", "y", ("b",))
    assert each_question([QuestionTask("t", (one, two)), two, one]) == [one, two]
    with pytest.raises(InputError, match="got two of '1'"):
        each_question([one, Question("1", "another", ("a",))])


@needs_data
def test_the_real_questions() -> None:
    questions = each_question(read_questions(DATA / "qa" / "qa.jsonl"))
    counts = {name: sum(q.dataset == name for q in questions) for name in ("nq", "hotpotqa", "musique")}
    assert counts == {"nq": 2655, "hotpotqa": 200, "musique": 100}
    assert questions[0] == Question(
        "nq_0", "who got the first nobel prize in physics", ("Wilhelm Conrad Röntgen",), "nq", ("0",)
    )
    assert sum(len(q.support) for q in questions) == 2655 + 2 * 200 + 2 * 68 + 3 * 27 + 4 * 5
