"""Rows of task sets: read, shuffled, split and dealt out the same way everywhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mem1.checks import InputError
from mem1.envs.tasks import TaskStream, check_ids, read_rows, shuffled, split, task_id

ROWS = [{"id": f"row {i}", "n": i} for i in range(100)]


def ids(rows: list[dict[str, Any]]) -> list[str]:
    return [row["id"] for row in rows]


def test_an_order_follows_from_ids_and_seed_alone():
    first = ids(shuffled(ROWS, 0))
    assert first == ids(shuffled(ROWS[::-1], 0)) != ids(shuffled(ROWS, 1))
    assert sorted(first) == sorted(ids(ROWS)) and first != ids(ROWS)
    # Right on every machine and in every version: sha256 decides.
    assert first[:5] == ["row 19", "row 13", "row 20", "row 8", "row 94"]
    assert [name for name in ids(shuffled(ROWS[:50], 0))] == [n for n in first if int(n[4:]) < 50]


def test_a_split_stays_as_it_is_when_rows_are_added():
    train, test = split(ROWS, 0, 0.2)
    assert sorted(ids(train) + ids(test)) == sorted(ids(ROWS)) and 10 <= len(test) <= 30
    few_train, few_test = split(ROWS[:30], 0, 0.2)
    assert {*ids(few_train)} <= {*ids(train)} and {*ids(few_test)} <= {*ids(test)}
    assert ids(split(ROWS, 1, 0.2)[1]) != ids(test)
    assert split(ROWS, 0, 0.0) == (ROWS, []) and split(ROWS, 0, 1.0) == ([], ROWS)
    with pytest.raises(InputError, match="held_out: expected a share from 0 to 1, got 2"):
        split(ROWS, 0, 2)


def test_a_stream_has_every_row_once_before_any_comes_again():
    stream = TaskStream(ROWS, 5)
    first, second = ([stream[place] for place in range(at, at + 100)] for at in (0, 100))
    assert sorted(ids(first)) == sorted(ids(second)) == sorted(ids(ROWS)) and ids(first) != ids(second)
    assert stream[17] == first[17], "any place, in any order"
    assert ids([TaskStream(ROWS, 6)[place] for place in range(100)]) != ids(first)
    with pytest.raises(InputError, match="tasks: expected at least one row"):
        TaskStream([], 0)


def test_ids():
    class Row:
        id = 3

    assert task_id(Row()) == "3" and task_id({"id": "x"}) == "x"
    for wrong in (None, {}, {"id": None}, {"id": ""}, {"id": True}, {"id": 1.5}, "x"):
        with pytest.raises(InputError, match="task: expected a row with an id"):
            task_id(wrong)
    with pytest.raises(InputError, match="tasks: expected ids of which each occurs once, got '3' twice"):
        check_ids([Row(), {"id": "4"}, {"id": 3}])


def read(path: Path) -> list[tuple[str, dict[str, Any]]]:
    return list(read_rows(path))


def test_rows_of_every_kind_of_file(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    text = "\n".join(json.dumps(row) for row in ROWS[:3])
    (tmp_path / "a.jsonl").write_text(text.replace("\n", "\n\n") + "\n")
    (tmp_path / "a.json").write_text(json.dumps(ROWS[:3]))
    parquet.write_table(pyarrow.Table.from_pylist(ROWS[:3]), tmp_path / "a.parquet")
    for name, places in (
        ("a.jsonl", [":1", ":3", ":5"]),
        ("a.json", [": row 1", ": row 2", ": row 3"]),
        ("a.parquet", [": row 1", ": row 2", ": row 3"]),
    ):
        path = tmp_path / name
        assert read(path) == [(f"{path}{place}", row) for place, row in zip(places, ROWS, strict=False)]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"id": 1}\n{"id": \n', r"a\.jsonl:2: expected a line of JSON"),
        ("a.jsonl", b'{"id": 1}\n\n[1]\n', r"a\.jsonl:3: expected an object, got \[1\]"),
        ("a.jsonl", b'{"id": "\xff"}\n', r"a\.jsonl:1: expected a line of JSON"),
        ("a.jsonl", b"[" * 100_000, r"a\.jsonl:1: expected a line of JSON"),
        ("a.json", b'{"id": 1}', r"a\.json: expected a list of objects, got 'dict'"),
        ("a.json", b'[{"id": 1}, 2]', r"a\.json: row 2: expected an object, got 2"),
        ("a.json", b"[", r"a\.json: expected JSON"),
        ("a.parquet", b"PAR1", r"a\.parquet: expected a Parquet file"),
        ("a.csv", b"id\n1\n", r"path: expected a file that ends in \.jsonl, \.json, \.parquet"),
        ("a.jsonl", None, r"path: expected a file that can be read"),
    ],
)
def test_what_is_malformed_is_named_by_its_place(tmp_path, name, content, message):
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        read(tmp_path / name)


def test_values_of_parquet_that_python_does_not_have_are_named(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    beyond = pyarrow.array([2**62], pyarrow.timestamp("us"))
    text = pyarrow.Array.from_buffers(
        pyarrow.string(),
        1,
        [None, pyarrow.array([0, 1], pyarrow.int32()).buffers()[1], pyarrow.py_buffer(b"\xff")],
    )
    for name, values in ("time", beyond), ("text", text):
        path = tmp_path / f"{name}.parquet"
        parquet.write_table(pyarrow.Table.from_arrays([values], ["id"]), path)
        with pytest.raises(InputError, match=rf"{name}\.parquet: expected a Parquet file, got "):
            read(path)


def test_a_line_ends_with_a_line_feed_alone(tmp_path):
    row = {"id": "a", "text": "one\u2028two\x85three\rfour"}
    (tmp_path / "a.jsonl").write_text(
        json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8", newline=""
    )
    assert [found for _, found in read(tmp_path / "a.jsonl")] == [row]
