"""Public files in this project's form: what is written reads back as what was there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from question_rows import HOTPOTQA, MUSIQUE, NQ_OPEN, QA, TWO_WIKI, mem1_row, search_r1_row, write_rows

from mem1.checks import InputError
from mem1.data.convert import Converted, convert
from mem1.envs.qa.question_files import read_questions
from mem1.envs.qa.questions import each_question
from mem1.envs.search.corpus import Corpus

SEARCH_R1 = [search_r1_row("nq", 0, "who?", ["a"]), search_r1_row("nq", 1, "what?", ["b", "c"])]
FILES = {
    "hotpotqa": ("hotpot.json", HOTPOTQA, 3),
    "2wiki": ("dev.json", TWO_WIKI, 2),
    "musique": ("musique.jsonl", MUSIQUE, 2),
    "nq-open": ("nq.jsonl", NQ_OPEN, 0),
    "search-r1": ("train.jsonl", SEARCH_R1, 0),
    "qa": ("mine.jsonl", QA, 0),
}


@pytest.mark.parametrize("name", FILES)
def test_what_is_written_reads_back(tmp_path: Path, name: str) -> None:
    file, rows, passages = FILES[name]
    source, out = write_rows(tmp_path / file, rows), tmp_path / "new" / "qa"
    expected = each_question(read_questions(source, name))
    left_out = (f"{source}:2: a question without an answer",) if name == "musique" else ()
    assert convert(name, source, out) == Converted(len(expected), passages, left_out)
    assert read_questions(out / "qa.jsonl") == expected
    assert (out / "corpus.jsonl").exists() == bool(passages)
    if passages:
        ids = {row.id for row in Corpus(out / "corpus.jsonl").rows()}
        assert len(ids) == passages
        assert all(question.support and {*question.support} <= ids for question in expected)
    assert {path.name for path in out.iterdir()} == {"qa.jsonl", *(["corpus.jsonl"] if passages else [])}


def test_the_written_rows(tmp_path: Path) -> None:
    convert("2wiki", write_rows(tmp_path / "dev.json", TWO_WIKI), tmp_path)
    (question,) = [json.loads(line) for line in (tmp_path / "qa.jsonl").read_text().splitlines()]
    passages = [json.loads(line) for line in (tmp_path / "corpus.jsonl").read_text().splitlines()]
    assert question == {
        "id": "13f5ad2c088c11ebbd6fac1f6bf848b6",
        "dataset": "2wikimultihopqa",
        "question": "Which mill was built first?",
        "golden_answers": ["Mill"],
        "support": [passages[0]["id"]],
        "type": "bridge_comparison",
    }
    mill = '"Mill"\nThe mill stands on the river. Ann Lee built it.'
    assert passages[0] == {"id": passages[0]["id"], "title": "Mill", "contents": mill}
    assert passages[1]["contents"] == '"Ferry"\nIt sank.'


def test_a_passage_of_several_questions_is_written_once(tmp_path: Path) -> None:
    rows = [*HOTPOTQA, {**HOTPOTQA[0], "_id": "another"}]
    assert convert("hotpotqa", write_rows(tmp_path / "rows.json", rows), tmp_path) == Converted(2, 3, ())
    # And has the same id wherever it comes from: "Mill" is also in a file of 2WikiMultihopQA.
    convert("2wiki", write_rows(tmp_path / "dev.json", TWO_WIKI), tmp_path / "2wiki")
    one, other = (
        {row.contents: row.id for row in Corpus(folder / "corpus.jsonl").rows()}
        for folder in (tmp_path, tmp_path / "2wiki")
    )
    shared = one.keys() & other.keys()
    assert len(shared) == 1 and all(one[contents] == other[contents] for contents in shared)


def test_tasks_are_taken_apart(tmp_path: Path) -> None:
    rows = [mem1_row("nq", 0, ["x?", "y?"], [["1"], ["2"]]), mem1_row("nq", 2, ["x; y?"], [["3"]])]
    source = write_rows(tmp_path / "test.jsonl", rows)
    assert convert("search-r1", source, tmp_path).questions == 3
    assert [question.id for question in each_question(read_questions(tmp_path / "qa.jsonl"))] == [
        "nq-test-0",
        "nq-test-1",
        "nq-test-2",
    ]


@pytest.mark.parametrize("name", ["wiki-18", "squad"])
def test_names_without_questions_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match=f"name: expected one of hotpotqa, .*, got '{name}'"):
        convert(name, write_rows(tmp_path / "rows.jsonl", QA), tmp_path)


def test_a_malformed_file_leaves_what_was_there(tmp_path: Path) -> None:
    source: Path = write_rows(tmp_path / "rows.json", HOTPOTQA)
    convert("hotpotqa", source, tmp_path)
    with pytest.raises(InputError, match="out: expected a folder without qa.jsonl, or --overwrite, got"):
        convert("hotpotqa", source, tmp_path)
    before: dict[str, Any] = {path.name: path.read_text() for path in tmp_path.glob("*.jsonl")}
    write_rows(source, [*HOTPOTQA, {"_id": "x"}])
    with pytest.raises(InputError, match="row 2: question: expected a text"):
        convert("hotpotqa", source, tmp_path, overwrite=True)
    assert {path.name: path.read_text() for path in tmp_path.glob("*.jsonl")} == before
    assert len(before) == 2


def test_what_is_replaced_takes_its_passages_along(tmp_path: Path) -> None:
    convert("hotpotqa", write_rows(tmp_path / "rows.json", HOTPOTQA), tmp_path / "out")
    passages = tmp_path / "out" / "corpus.jsonl"
    assert passages.is_file()
    nq = write_rows(tmp_path / "NQ-open.dev.jsonl", NQ_OPEN)
    assert convert("nq-open", nq, tmp_path / "out", overwrite=True).passages == 0
    assert not passages.exists() and len(read_questions(tmp_path / "out" / "qa.jsonl")) == len(NQ_OPEN)
    convert("hotpotqa", tmp_path / "rows.json", tmp_path / "other")
    (tmp_path / "other" / "qa.jsonl").unlink()
    with pytest.raises(InputError, match="out: expected a folder without corpus.jsonl, or --overwrite"):
        convert("nq-open", nq, tmp_path / "other")


def test_a_file_is_not_converted_into_itself(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "qa.jsonl", QA)
    with pytest.raises(InputError, match="out: expected another folder than that of the source"):
        convert("qa", source, tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="out: expected a folder that can be made"):
        convert("qa", source, tmp_path / "file" / "out")
