from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import web_server  # noqa: F401  skips where packages are missing
from hypothesis import given, settings
from hypothesis import strategies as st

from mem1.envs.web.search_reply import (
    NOTHING_FOUND,
    SearchReply,
    UnreadableReply,
    WebResult,
    format_reply,
    read_reply,
)

REPLY: dict[str, Any] = {
    "searchParameters": {"q": "height of the tower", "type": "search", "num": 10},
    "answerBox": {"title": "Tower / Height", "answer": "330 m", "snippet": "It is 330 m high."},
    "knowledgeGraph": {
        "title": "The Tower",
        "type": "Landmark",
        "description": "A tower\nof iron.",
        "attributes": {"Opened": "1889", "Architect": "S. Sauvestre", "Floors": 3},
    },
    "organic": [
        {"title": "Tower", "link": "https://a.example/tower", "snippet": "A tower.", "date": "3 May 2020"},
        {"title": "Height", "link": "http://b.example/", "snippet": "330 m", "position": 2},
    ],
    "peopleAlsoAsk": [{"question": "How old is it?", "snippet": "From 1889.", "link": "https://c.example/"}],
    "relatedSearches": [{"query": "tower"}],
    "credits": 1,
}
FOUND = SearchReply(
    "Tower / Height: 330 m; It is 330 m high.\n"
    "The Tower: Landmark; A tower of iron.; Opened: 1889; Architect: S. Sauvestre",
    (
        WebResult("Tower", "https://a.example/tower", "A tower.", "3 May 2020"),
        WebResult("Height", "http://b.example/", "330 m"),
    ),
    (WebResult("How old is it?", "https://c.example/", "From 1889."),),
)
TEXT = """Answer: Tower / Height: 330 m; It is 330 m high.
The Tower: Landmark; A tower of iron.; Opened: 1889; Architect: S. Sauvestre
[1] Tower (3 May 2020)
https://a.example/tower
A tower.
[2] Height
http://b.example/
330 m
Related: How old is it? From 1889."""


def read(reply: object, num: int = 10) -> SearchReply:
    return read_reply(json.dumps(reply).encode(), num)


def test_whole_reply() -> None:
    assert read(REPLY) == FOUND
    assert format_reply(FOUND) == TEXT


def test_fewer_results() -> None:
    assert read(REPLY, 1).results == FOUND.results[:1]


def test_nothing_found() -> None:
    assert read({}) == SearchReply("", (), ())
    assert format_reply(read({"organic": []})) == NOTHING_FOUND


@pytest.mark.parametrize("block", ["answerBox", "knowledgeGraph", "organic", "peopleAlsoAsk"])
@pytest.mark.parametrize("wrong", [None, 1, "text", True, [], {}, [[]], [1, None], {"a": 1}], ids=json.dumps)
def test_blocks_that_are_missing_or_wrong(block: str, wrong: object) -> None:
    """The others are still read."""
    missing = read({name: value for name, value in REPLY.items() if name != block})
    assert read(REPLY | {block: wrong}) == missing != FOUND


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ({"title": "T"}, [WebResult("T", "", "")]),
        ({"snippet": "S", "title": 1, "link": 2, "date": []}, [WebResult("", "", "S")]),
        ({"link": "https://a.example/"}, []),
        ({"title": " ", "snippet": "\0"}, []),
        ({"title": "T", "link": "javascript:alert(1)"}, [WebResult("T", "", "")]),
        ({"title": "T", "link": "https://a.example/a b"}, [WebResult("T", "", "")]),
        ({"title": "T", "link": "https://a.example/" + "a" * 2048}, [WebResult("T", "", "")]),
        ({"title": "a\ud800b\nc\0d", "snippet": "s" * 5000}, [WebResult("a b c d", "", "s" * 1000)]),
    ],
    ids=lambda value: json.dumps(value)[:40],
)
def test_entries(entry: dict[str, Any], expected: list[WebResult]) -> None:
    assert list(read({"organic": [entry]}).results) == expected


def test_parts_of_an_answer() -> None:
    assert read({"answerBox": {"answer": "42"}}).answer == "42"
    assert read({"answerBox": {"title": "T"}}).answer == ""
    assert read({"knowledgeGraph": {"title": "T", "attributes": {"Born": "1815"}}}).answer == "T: Born: 1815"
    assert read({"knowledgeGraph": {"attributes": {str(i): "x" for i in range(99)}}}).answer.count("x") == 10


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"null",
        b"[]",
        b'"text"',
        b"1",
        b"{",
        b"<html>",
        b"\xff\xfe",
        b"[" * 100_000,
    ],
    ids=lambda body: repr(body[:8]),
)
def test_no_reply(body: bytes) -> None:
    with pytest.raises(UnreadableReply, match="^search API: a reply that is no JSON object$"):
        read_reply(body, 10)


def places(node: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) of a JSON value."""
    keys = list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else []
    return [(node, key) for key in keys] + [place for key in keys for place in places(node[key])]


LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
LEAVES |= st.text("\0\n\ud800<>|]", max_size=5) | st.just("x" * 100_000)
JSON = st.recursive(
    LEAVES,
    lambda inside: st.lists(inside, max_size=3) | st.dictionaries(st.text(max_size=5), inside, max_size=3),
    max_leaves=5,
)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.data())
def test_damaged_replies(data: st.DataObject) -> None:
    """Parts taken out or exchanged for anything: what is left is read."""
    reply = copy.deepcopy(REPLY)
    for _ in range(data.draw(st.integers(1, 8))):
        container, key = data.draw(st.sampled_from(places(reply)))
        if data.draw(st.booleans()):
            container[key] = data.draw(JSON)
        else:
            del container[key]
        if not reply:
            break
    found = read(reply)
    for result in found.results + found.related:
        assert result.title or result.snippet
        assert not result.url or result.url.startswith(("http://", "https://"))
    text = format_reply(found)
    assert 0 < len(text) < 20_000
    assert "\0" not in text
    text.encode()  # no half of a surrogate pair


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.data())
def test_damaged_bytes(data: st.DataObject) -> None:
    """A reply, or the error that says there is none."""
    body = bytearray(json.dumps(REPLY).encode())
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(body)))
        body[place : place + data.draw(st.integers(0, 40))] = data.draw(st.binary(max_size=4))
    try:
        text = format_reply(read_reply(bytes(body), 10))
    except UnreadableReply:
        return
    assert text
    text.encode()
