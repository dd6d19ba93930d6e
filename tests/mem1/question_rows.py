"""Rows of every format of questions, in the form in which they are published; what they say is made up."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

QA = [
    {
        "id": "nq_0",
        "dataset": "nq",
        "question": "who built the old bridge",
        "golden_answers": ["Ann Lee", "Lee"],
        "support": [7],
    },
    {
        "id": "h1",
        "dataset": "hotpotqa",
        "question": "Which is older, the bridge or the mill? ",
        "golden_answers": ["the mill"],
        "support": [7, 9],
        "type": "comparison",
        "level": "easy",
    },
]
HOTPOTQA = [
    {
        "_id": "5a8b57f25542995d1e6f1371",
        "answer": "yes",
        "question": "Were the bridge and the mill built by the same woman?",
        "supporting_facts": [["Old Bridge", 0], ["Mill", 1], ["Old Bridge", 1]],
        "context": [
            ["Old Bridge", ["The bridge was built by Ann Lee.", " It is of stone."]],
            ["Ferry", ["The ferry sank."]],
            ["Mill", ["The mill stands on the river.", " Ann Lee built it."]],
        ],
        "type": "comparison",
        "level": "hard",
    }
]
TWO_WIKI = [
    {
        "_id": "13f5ad2c088c11ebbd6fac1f6bf848b6",
        "type": "bridge_comparison",
        "question": "Which mill was built first?",
        "context": [
            ["Mill", ["The mill stands on the river.", "Ann Lee built it."]],
            ["Ferry", ["It sank."]],
        ],
        "supporting_facts": [["Mill", 1]],
        "evidences": [["Mill", "architect", "Ann Lee"]],
        "answer": "Mill",
        "evidences_id": [],
        "answer_id": "Q1",
    }
]
MUSIQUE = [
    {
        "id": "2hop__482757_12019",
        "paragraphs": [
            {"idx": 0, "title": "Ferry", "paragraph_text": "The ferry sank.", "is_supporting": False},
            {"idx": 1, "title": "Mill", "paragraph_text": "Ann Lee built it.", "is_supporting": True},
        ],
        "question": "Who built what stands on the river?",
        "question_decomposition": [],
        "answer": "Ann Lee",
        "answer_aliases": ["Lee", "Ann Lee"],
        "answerable": True,
    },
    {
        "id": "2hop__482757_12019",
        "paragraphs": [],
        "question": "Who built what stands on the river?",
        "answer": "Ann Lee",
        "answer_aliases": [],
        "answerable": False,
    },
]
NQ_OPEN = [
    {"question": "who built the old bridge", "answer": ["Ann Lee"]},
    {"question": "when did the ferry sink", "answer": ["1901", "in 1901"]},
]


def search_r1_row(source: str, index: int, question: str, answers: list[str], **more: Any) -> dict[str, Any]:
    """As Search-R1's scripts write it: one question, at the end of the prompt."""
    return {
        "data_source": source,
        "prompt": [
            {"role": "user", "content": f"Answer the given question. Reason first. Question: {question}\n"}
        ],
        "ability": "fact-reasoning",
        "reward_model": {"style": "rule", "ground_truth": {"target": answers}},
        "extra_info": {"index": index, "split": "train"},
        **more,
    }


def mem1_row(source: str, first: int, questions: list[str], answers: list[list[str]]) -> dict[str, Any]:
    """As MEM1's scripts write it: the questions of a task, joined, and a list of golden answers for each."""
    before = "Write after the initial questions: notes.\n\nAnswer the following questions: "
    return {
        "data_source": source,
        "prompt": [{"role": "user", "content": f"{before}{'; '.join(questions)}\n"}],
        "ability": "fact-reasoning",
        "reward_model": {"style": "rule", "ground_truth": {"target": answers}},
        "extra_info": {"indices": list(range(first, first + len(questions))), "split": "test"},
    }


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    """A file of the type that its name ends in."""
    if path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path
