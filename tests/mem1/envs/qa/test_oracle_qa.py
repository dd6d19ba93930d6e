"""The oracle over real questions and BM25: it knows the answer wherever a supporting passage was found."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest
from checkout import ROOT
from real_data import DATA, needs_data

from mem1.envs.qa.compose import compose
from mem1.envs.qa.question_files import read_questions
from mem1.envs.qa.retrieval_qa import RetrievalQAEnv

pytest.importorskip("bm25s")
pytest.importorskip("Stemmer")
pytestmark = needs_data


@pytest.fixture(scope="module")
def bench() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "bench" / "oracle_qa.py"))


@pytest.fixture(scope="module")
def retriever(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from mem1.envs.search.bm25 import BM25Retriever

    return BM25Retriever.open(DATA / "qa" / "corpus.jsonl", tmp_path_factory.mktemp("index"))


@pytest.mark.parametrize("objectives", [1, 16])
def test_the_oracle_is_right_where_the_passage_was_found(
    bench: dict[str, Any], retriever: Any, objectives: int
) -> None:
    tasks = compose(read_questions(DATA / "qa" / "qa.jsonl"), objectives, 0, 320 // objectives)
    environment = RetrievalQAEnv(None, retriever)
    oracle = bench["play"](environment, tasks, bench["AGENTS"]["oracle"])
    assert len(oracle.found) == len(oracle.matches) == 320
    assert 0.8 < sum(oracle.found) / 320 < 0.95  # BM25's share, .866 on all of Natural Questions
    assert oracle.matches == oracle.found
    assert max(oracle.turns) == objectives + 1
    by_chance = bench["play"](environment, tasks, bench["AGENTS"]["random"])
    assert sum(by_chance.matches) / 320 < 0.02


def test_the_table(bench: dict[str, Any], capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for name in ("qa", "corpus"):
        lines = (DATA / "qa" / f"{name}.jsonl").read_bytes().splitlines(keepends=True)
        (tmp_path / f"{name}.jsonl").write_bytes(b"".join(lines[:40]))
    bench["main"]([str(tmp_path), "--episodes", "2"])
    header, line, *rows = capsys.readouterr().out.splitlines()
    table = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    assert {len(row) for row in table} == {header.count("|") - 1} == {line.count("|") - 1}
    assert [row[0] for row in table] == ["oracle"] * 11 + ["random"] * 5
    assert [row[3] for row in table] == ["1", *["1", "2", "4", "8", "16"] * 3]
    assert all(row[7].startswith("1.000 [") for row in table[:11])
