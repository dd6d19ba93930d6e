"""Streams of real tokenizers and the parts that a right reading finds in them.

MEM1_TAG_CASES is another file of cases, MEM1_TOKENIZERS a folder of tokenizers: what they name has to exist.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from checkout import ROOT

from mem1.parsing.boundaries import TurnReader
from mem1.parsing.codec import Codec
from mem1.parsing.tags import MEM1, OFFICIAL

FORMATS = {"mem1": MEM1, "official": OFFICIAL}
NAMED = os.environ.get("MEM1_TAG_CASES")
FILE = Path(NAMED) if NAMED else ROOT.parent / "shared" / "cases" / "tags.jsonl"


def _cases() -> list[Any]:
    if not FILE.exists():
        return [pytest.param(None, id="none")]
    with FILE.open(encoding="utf-8") as lines:
        cases = [json.loads(line) for line in lines]
    return [pytest.param(case, id=case["id"]) for case in cases]


@pytest.mark.parametrize("case", _cases())
def test_tag_cases(case: dict[str, Any] | None, codec_of: Callable[[str], Codec]) -> None:
    if case is None:
        assert not NAMED, f"MEM1_TAG_CASES: no file {NAMED}"
        pytest.skip(f"no cases at {FILE}: MEM1_TAG_CASES=FILE names others")
    codec, format = codec_of(case["tokenizer"]), FORMATS[case["style"]]
    found, place = [], 0
    for part in case["parts"]:
        assert codec.decode(case["ids"][part["begin"] : part["end"]]) == part["text"]
    for who, begin, end in case["writers"]:
        if who == "env":
            _check_environment(codec, case["ids"][begin:end], first=begin == 0)
            found.append(("info" if begin else "prompt", end - begin))
            continue
        action, (offered, kept) = case["actions"][place], case["consumed"][place]
        limit = kept if action["ended"] == "limit" else offered + 1
        reader = TurnReader(format, codec.text, codec.stop_ids, max_action_tokens=limit)
        events = []
        for token in case["turns"][place]:
            events.append(reader.read(token))
            if reader.ended:
                break
        assert case["ids"][begin:end] == case["turns"][place][:kept]
        assert (reader.num_tokens, len(events)) == (kept, kept)
        assert [place for place, event in enumerate(events, 1) if event == "end"] == [kept]
        if 0 < reader.state_tokens < kept:
            assert events.index("state") + 1 == reader.state_tokens
        parts = [("is", reader.state_tokens), (reader.kind, kept - reader.state_tokens)]
        found += [(kind, length) for kind, length in parts if length]
        read = {"kind": reader.tag or "malformed", "text": reader.action.text, "ended": reader.ended}
        assert {"turn": place + 1, **read, "tail": reader.tail} == action
        place += 1
    assert place == len(case["turns"])
    assert found == [(part["kind"], part["end"] - part["begin"]) for part in case["parts"]]


def _check_environment(codec: Codec, tokens: list[int], first: bool) -> None:
    """What an environment wrote has no added tokens, and is what we make of its text."""
    text = codec.decode(tokens)
    if first:
        tokens = [token for token in tokens if not codec.text.is_special(token)]
        assert codec.prompt(text.lstrip(), 10_000)[-len(tokens) :] == tokens
        return
    body = text.removeprefix("\n<info>").removesuffix("</info>\n")
    if body != text:
        assert codec.observation(body, 10_000, turns_left=1) == tokens
