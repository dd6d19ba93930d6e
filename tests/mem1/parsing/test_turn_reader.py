"""How a turn is read: the table in docs/tags.md, row by row, and what it cannot show."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
from checkout import ROOT

from mem1.parsing.boundaries import TurnReader
from mem1.parsing.codec import Codec
from mem1.parsing.tags import CHUNKS, FOLD, MEM1, OFFICIAL, TagFormat


def _rows() -> list[list[str]]:
    lines = (ROOT / "docs" / "tags.md").read_text(encoding="utf-8").splitlines()
    start = next(place for place, line in enumerate(lines) if line.startswith("| the policy writes"))
    rows = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        rows.append([cell.strip("`").replace("\\n", "\n") for cell in cells])
    return rows


@pytest.mark.parametrize("split", [False, True], ids=["whole", "by-character"])
@pytest.mark.parametrize("name", ["byte-level", "sentence-piece"])
@pytest.mark.parametrize("row", _rows(), ids=lambda row: row[0])
def test_readings(row: list[str], name: str, split: bool, codec_of: Callable[[str], Codec]) -> None:
    written, state, kind, text, ended, _ = row
    codec = codec_of(name)
    special = {
        "EOS": codec.tokenizer.eos_token_id,
        "SPECIAL": codec.tokenizer.convert_tokens_to_ids("[INST]"),
    }
    tokens: list[int] = []
    for piece in re.split("(EOS|SPECIAL|LIMIT)", written):
        if piece in special:
            tokens.append(special[piece])
        elif piece != "LIMIT":
            for part in piece if split else [piece]:
                tokens += codec._plain.encode(part)
    reader = codec.turn(len(tokens) if "LIMIT" in written else 100)
    events = [reader.read(token) for token in tokens]
    assert events.index("end") == len(tokens) - 1
    assert (reader.action.kind, reader.action.text, reader.ended) == (kind, text, ended)
    assert reader.num_tokens == len(tokens)
    if split:
        assert codec.decode(tokens[: reader.state_tokens]) == state
    assert bool(reader.state_tokens) == bool(state)
    assert reader.kind == ("query" if kind == "malformed" else kind)
    assert reader.tag == (None if kind == "malformed" else kind)


class Pieces:
    """Stands for a TokenText: token i has the i-th text."""

    def __init__(self, *pieces: str | bytes | None) -> None:
        self.pieces = [piece.encode() if isinstance(piece, str) else piece for piece in pieces]

    def piece(self, token: int) -> bytes | None:
        return self.pieces[token]


def read(*pieces: str | bytes | None, format: TagFormat = MEM1, **limits: int) -> tuple[TurnReader, list]:
    """All pieces, one token each, or as many as the turn has."""
    limits = {"max_action_tokens": 100, **limits}
    reader = TurnReader(format, Pieces(*pieces), frozenset(), **limits)
    events = []
    for token in range(len(pieces)):
        events.append(reader.read(token))
        if reader.ended:
            break
    return reader, events


def test_one_token_may_end_both_parts() -> None:
    reader, events = read("<IS>", "a</IS><query>b</query>\n\n")
    assert events == [None, "end"] and (reader.num_tokens, reader.state_tokens) == (2, 2)
    assert reader.action == ("query", "b") and reader.tail == "\n\n"


def test_an_action_that_ends_first_in_the_same_token_leaves_no_state() -> None:
    reader, events = read("<IS><query>b</query></IS>")
    assert events == ["end"] and reader.state_tokens == 0
    assert reader.action == ("query", "b") and reader.tail == "</IS>"


def test_state_event_and_shared_token() -> None:
    reader, events = read("<IS>a</IS", "><", "answer>1</answer", "></")
    assert events == [None, "state", None, "end"] and reader.state_tokens == 2
    assert reader.action == ("answer", "1") and reader.tail == "</" and reader.kind == "answer"


def test_a_state_that_ended_is_not_ended_again_by_the_window() -> None:
    _, events = read("<IS>a</IS>", ">", ">", "<query>", "</query>")
    assert events == ["state", None, None, None, "end"]


def test_a_tag_is_looked_for_in_bytes() -> None:
    """Byte by byte, a name of more bytes than characters."""
    format = TagFormat("\u65e5\u672c\u8a9e\u65e5\u672c\u8a9e", MEM1.actions)
    text = f"<{format.state}>a</{format.state}><answer>1</answer>".encode()
    reader, events = read(*[text[n : n + 1] for n in range(len(text))], format=format)
    assert [event for event in events if event] == ["state", "end"]
    assert reader.action == ("answer", "1") and text[: reader.state_tokens].decode().endswith(
        "</\u65e5\u672c\u8a9e\u65e5\u672c\u8a9e>"
    )


def test_limits() -> None:
    reader, events = read("<IS>", "a", "b", "c", max_state_tokens=3)
    assert events == [None, None, "end"] and (reader.ended, reader.state_tokens) == ("limit", 0)
    assert reader.action == ("malformed", "<IS>ab")
    reader, events = read("<IS>", "a", "</IS>", "c", "<query></query>", max_state_tokens=3)
    assert events == [None, None, "state", None, "end"]
    reader, events = read("<IS>a</IS>", "b", max_action_tokens=1)
    assert events == ["end"] and (reader.num_tokens, reader.state_tokens) == (1, 1)
    reader, _ = read("<answer>1</answer>", max_action_tokens=1)
    assert reader.ended == "stop" and reader.action == ("answer", "1")
    reader, _ = read("a", "b", format=CHUNKS, max_state_tokens=1)
    assert reader.ended is None


def test_bytes_that_are_no_text() -> None:
    reader, _ = read("<query>a", b"\xe6", b"\x97", "</query>", b"\xa5")
    assert reader.action == ("query", "a\ufffd") and reader.tail == ""
    reader, _ = read("<query>", b"\xe6\x97", b"\xa5", "</query>")
    assert reader.action.text == "日"


def test_a_stop_token_has_no_text() -> None:
    reader = TurnReader(MEM1, Pieces("<query>a", "</query>"), frozenset({1}), max_action_tokens=9)
    assert [reader.read(0), reader.read(1)] == [None, "end"]
    assert reader.ended == "eos" and reader.action == ("malformed", "<query>a")


def test_other_formats() -> None:
    reader, _ = read("<think>a</think>", "<search>b</search>", format=OFFICIAL)
    assert (reader.tag, reader.kind, reader.action) == ("search", "query", ("query", "b"))
    reader, _ = read("<branch>b</branch>", format=FOLD)
    assert reader.kind == "branch" and reader.reply == FOLD.action("branch").reply
    reader, _ = read("<IS></IS>", "<memory>m</memory>", format=CHUNKS)
    assert reader.state_tokens == 0 and (reader.tag, reader.action) == ("memory", ("query", "m"))
    assert read("x", format=CHUNKS)[0].kind == "query"


def test_many_special_tokens_take_no_more_time_each() -> None:
    reader, _ = read("<query>", *([None] * 20_000), "</query>", max_action_tokens=10**6)
    assert reader.ended == "stop" and reader.action == ("query", "")
