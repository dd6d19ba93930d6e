"""Rows of a corpus: which are read, which are refused and how, and what is read later."""

from __future__ import annotations

import json
import os
import re

import pytest
from small_corpus import write_rows

from mem1.checks import InputError
from mem1.envs.search.corpus import Corpus

GOOD = '{"id": "a", "contents": "\\"T\\"\\ntext"}'


def opened(path):
    corpus = Corpus(path)
    corpus.offsets = [row.offset for row in corpus.rows()]
    return corpus


def test_rows_are_read_in_either_form_and_again_by_their_place(tmp_path):
    rows = [
        {"id": 7, "contents": '"Oslo"\nÅ fjord.', "title": "ignored", "source": "x"},
        {"id": "8", "title": "Rome", "text": "A \u2028 river."},
        {"id": "9", "text": "No title."},
    ]
    path = tmp_path / "corpus.jsonl"
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text("\n  \n" + lines[0] + "\r\n\n" + "\n".join(lines[1:]), encoding="utf-8")
    corpus = opened(path)
    expected = [("7", '"Oslo"\nÅ fjord.'), ("8", '"Rome"\nA \u2028 river.'), ("9", "No title.")]
    assert [(row.id, row.contents) for row in corpus.rows()] == expected
    assert [corpus[place] for place in range(len(corpus))] == expected


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("{", ":2: expected a line of JSON"),
        ("[]", ":2: expected an object"),
        ('{"id": "\udcff"}', ":2: expected a line of JSON"),  # a byte that is no UTF-8
        ('{"contents": "x"}', ":2: id: expected a text or a number, got None"),
        ('{"id": true, "contents": "x"}', ":2: id: expected a text or a number, got True"),
        ('{"id": "", "contents": "x"}', ":2: id: expected a text or a number, got ''"),
        ('{"id": "b"}', ":2: expected contents, or a text and its title, got ['id']"),
        ('{"id": "b", "contents": 7}', ":2: contents: expected a text, got 7"),
        ('{"id": "b", "title": 7, "text": "x"}', ":2: title: expected a text, got 7"),
        ('{"id": "b", "text": null}', ":2: expected contents, or a text and its title"),
        (GOOD, ":2: id: expected one that occurs once, got 'a'"),
        ("[" * 100_000, ":2: expected a line of JSON"),
    ],
)
def test_a_row_with_a_fault_is_named_by_file_and_line(tmp_path, line, expected):
    path = tmp_path / "corpus.jsonl"
    path.write_bytes(f"{GOOD}\n{line}\n".encode(errors="surrogateescape"))
    with pytest.raises(InputError, match=re.escape(f"{path}{expected}")):
        list(Corpus(path).rows())


def test_what_is_no_corpus_is_refused(tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "corpus.csv").write_text(GOOD)
    (tmp_path / "folder.jsonl").mkdir()
    for name, expected in [
        ("empty.jsonl", "a file with passages"),
        ("corpus.csv", "a file that ends in .jsonl"),
        ("missing.jsonl", "a file, got"),
        ("folder.jsonl", "a file, got"),
    ]:
        with pytest.raises(InputError, match=f"corpus_path: expected {expected}.*{name}"):
            list(Corpus(tmp_path / name).rows())


def test_a_file_that_is_replaced_stays_readable_and_one_that_is_overwritten_is_refused(tmp_path):
    path = write_rows(tmp_path / "corpus.jsonl", [{"id": "a", "contents": "x" * 50}])
    corpus = opened(path)
    write_rows(tmp_path / "other.jsonl", [{"id": "b", "contents": "y"}]).replace(path)
    assert corpus[0] == ("a", "x" * 50)
    corpus = opened(path)
    with path.open("r+") as file:
        file.truncate(3)
    with pytest.raises(InputError, match="corpus_path: expected a file that nobody writes"):
        corpus[0]


def test_a_file_that_is_touched_stays_readable(tmp_path):
    path = write_rows(tmp_path / "corpus.jsonl", [{"id": "a", "contents": "x"}, {"id": "b", "contents": "y"}])
    corpus = opened(path)
    corpus.identity()
    os.utime(path, ns=(1, 1))
    assert corpus[0] == ("a", "x") and corpus[1] == ("b", "y")
    path.write_text(path.read_text().replace("x", "z"))  # in place, and as long
    with pytest.raises(InputError, match="corpus_path: expected a file that nobody writes"):
        corpus[0]


@pytest.mark.parametrize("blank", ["\f", "\v", "\x85", "\xa0"])
def test_a_line_of_what_json_does_not_call_blank_is_named(tmp_path, blank):
    path = tmp_path / "corpus.jsonl"
    path.write_text('{"id": "a", "contents": "x"}\n \t\r\n' + blank + '\n{"id": "b", "contents": "y"}\n')
    with pytest.raises(InputError, match=r"corpus.jsonl:3: expected a line of JSON"):
        list(Corpus(path).rows())


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path):
    rows = [{"id": f"{n}", "contents": "x"} for n in range(3)]
    path = write_rows(tmp_path / "corpus.jsonl", rows)
    reading = Corpus(path).rows()
    next(reading)
    write_rows(tmp_path / "other.jsonl", rows).replace(path)
    with pytest.raises(InputError, match="expected a file that stays"):
        list(reading)
    reading = Corpus(path).rows()
    next(reading)
    os.utime(path, ns=(1, 1))
    with pytest.raises(InputError, match="expected a file that nobody writes"):
        list(reading)
