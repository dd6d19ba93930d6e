from __future__ import annotations

import json
from dataclasses import asdict, replace

import pytest

from mem1.checks import InputError
from mem1.parsing.tags import (
    ANSWER,
    CHUNKS,
    FOLD,
    FORMATS,
    HINTS,
    MEM1,
    OFFICIAL,
    QUERY,
    SUMMARY,
    ActionTag,
    TagFormat,
)


def test_presets() -> None:
    assert FORMATS == {"mem1": MEM1, "official": OFFICIAL, "fold": FOLD, "summary": SUMMARY, "chunks": CHUNKS}
    assert MEM1 == TagFormat() and MEM1.tags == ("IS", "query", "answer", "info")
    assert OFFICIAL.tags == ("think", "search", "answer", "information")
    assert CHUNKS.state is None and CHUNKS.tags == ("memory", "answer", "info")
    assert {format.rest_kind for format in FORMATS.values()} == {"query"}
    for format, kinds in ((FOLD, {"branch", "return"}), (SUMMARY, {"summary"}), (MEM1, set())):
        assert {action.kind for action in format.actions if action.reply is not None} == kinds


@pytest.mark.parametrize("name", FORMATS)
def test_json_and_back(name: str) -> None:
    assert TagFormat.from_dict(json.loads(json.dumps(asdict(FORMATS[name])))) == FORMATS[name]


def test_defaults_of_a_table() -> None:
    assert TagFormat.from_dict({}) == MEM1
    assert TagFormat.from_dict({"state": None, "actions": [{"tag": "a", "kind": "b"}]}) == TagFormat(
        None, (ActionTag("a", "b"),)
    )


def test_kinds() -> None:
    format = TagFormat(actions=(ANSWER, ActionTag("look", "lookup"), ActionTag("find", "lookup")))
    assert format.rest_kind == "lookup" and format.action("lookup") == ActionTag("look", "lookup")
    assert format.action("query") is None
    assert TagFormat(actions=(ANSWER,)).rest_kind == "query"
    assert TagFormat(turn_hint="{turns_left}/{turns_left}").hint(7) == "7/7"
    paper = replace(OFFICIAL, **HINTS)
    assert paper.hint(2) == "[HINT]You have 2 turns left.[/HINT]"
    assert paper.hint(1).startswith("[HINT]You have 1 turn left. You must answer")
    assert TagFormat(turn_hint="{turns_left}").hint(1) == "1", "no other for the last one"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"state": ""}, "state: expected a tag's name without blanks, <, > and /, got ''"),
        ({"state": "a b"}, "state: expected a tag's name"),
        ({"state": 3}, "state: expected a tag's name"),
        ({"observation": "<info>"}, "observation: expected a tag's name"),
        ({"observation": None}, "observation: expected a tag's name"),
        ({"observation": "query"}, "tags: expected none that begins with another, got 'query' and 'query'"),
        ({"observation": "information", "state": "info"}, "tags: .*got 'info' and 'information'"),
        ({"state": "answers"}, "tags: .*got 'answers' and 'answer'"),
        ({"actions": []}, r"actions: expected at least one ActionTag, got \(\)"),
        ({"actions": [["query", "query"]]}, "actions: expected a table of tag, kind, reply"),
        ({"actions": "query"}, "actions: expected a list, got 'query'"),
        ({"actions": [{"tag": "a/", "kind": "b"}]}, "tag: expected a tag's name"),
        ({"actions": [{"tag": "a"}]}, "actions: expected a table of tag, kind, reply, got {'tag': 'a'}"),
        ({"actions": [{"tag": "a", "kind": "b", "ids": 3}]}, "actions: expected a table"),
        ({"actions": [{"tag": "a", "kind": ""}]}, "kind: expected a lower-case word, none of prompt, info"),
        ({"actions": [{"tag": "a", "kind": 4}]}, "kind: expected a lower-case word"),
        ({"actions": [{"tag": "a", "kind": "Search"}]}, "kind: expected a lower-case word"),
        ({"actions": [{"tag": "a", "kind": "a-b"}]}, "kind: expected a lower-case word"),
        ({"actions": [{"tag": "a", "kind": "b", "reply": 4}]}, "reply: expected a text, got 4"),
        ({"actions": [{"tag": "a", "kind": "b", "reply": "\ud800"}]}, "reply: expected a text"),
        ({"state": "a\ud800"}, "state: expected a tag's name"),
        ({"turn_hint": "\ud800"}, "turn_hint: expected a text"),
        ({"context_request": "\ud800"}, "context_request: expected a text"),
        ({"turn_hint": "{turn}"}, "turn_hint: expected no placeholder but {turns_left}, got '{turn}'"),
        ({"turn_hint": "{}"}, "turn_hint: expected no placeholder"),
        ({"turn_hint": 4}, "turn_hint: expected a text, got 4"),
        (
            {"hint": "x"},
            "format: expected a table of state, actions, observation, turn_hint, last_turn_hint, "
            "context_request, got",
        ),
        ("mem1", "format: expected a table of .*, got 'mem1'"),
    ],
)
def test_what_is_refused(values: dict, message: str) -> None:
    with pytest.raises(InputError, match=f"^{message}"):
        TagFormat.from_dict(values)


@pytest.mark.parametrize("kind", ["prompt", "info", "state", "malformed"])
def test_kinds_that_are_taken(kind: str) -> None:
    with pytest.raises(InputError, match=f"kind: expected .*, got '{kind}'"):
        ActionTag("a", kind)


def test_actions_have_to_be_action_tags() -> None:
    with pytest.raises(InputError, match="actions: expected at least one ActionTag"):
        TagFormat(actions=("query",))
    assert TagFormat(actions=[QUERY]).actions == (QUERY,)
