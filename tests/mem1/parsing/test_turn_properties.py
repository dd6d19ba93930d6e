"""Random tokens of each tokenizer, read one by one and, by another program, all at once."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from real_tokenizers import PACKAGES
from small_tokenizers import SMALL

from mem1.parsing.boundaries import TurnReader
from mem1.parsing.codec import Codec
from mem1.parsing.tags import CHUNKS, MEM1, OFFICIAL, TagFormat

NAMES = [*SMALL, *PACKAGES]
TEXTS = "<IS> </IS> <query> </query> <answer> </answer> < / > </ IS query >\n a é 日本 </think>"
TEXTS += " <search> </search>"
PROPERTY = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def whole(format: TagFormat, codec: Codec, tokens: list[int], limit: int) -> tuple:
    """(kept, of the state, kind, text, ended) of a turn, from all its text at once: a character per byte, `☐`
    for a token without text.
    """
    pieces = []
    for token in tokens[:limit]:
        stop = token in codec.stop_ids
        blank = stop or codec.text.is_special(token)
        pieces.append("☐" if blank else codec.text.bytes(token).decode("latin-1"))
        if stop:
            break
    text = "".join(pieces)
    ends = [sum(map(len, pieces[: place + 1])) for place in range(len(pieces))]

    def holder(offset: int) -> int:
        return next(place for place, end in enumerate(ends, 1) if offset <= end)

    kinds = {action.tag: action.kind for action in format.actions}
    action = re.search("</(" + "|".join(kinds) + ")>", text)
    stopped = len(pieces) and tokens[len(pieces) - 1] in codec.stop_ids
    kept = holder(action.end()) if action else len(pieces)
    ended = "stop" if action else "eos" if stopped else "limit" if len(pieces) == limit else None
    state = re.search(f"</{format.state}>", text[: action.start()] if action else text)
    said = text[: action.start()].split(f"<{action[1]}>") if action else [""]
    malformed = len(said) == 1
    said = "".join(pieces[:kept]) if malformed else said[-1]
    said = said.replace("☐", "").encode("latin-1").decode("utf-8", "replace").strip()
    kind = "malformed" if malformed else kinds[action[1]]
    return kept, holder(state.end()) if state else 0, kind, said, ended


@cache
def _chunks(codec: Codec) -> list[list[int]]:
    """What random turns are made of: tags in one piece and in several, bytes, special tokens."""
    texts = TEXTS.split(" ")
    chunks = [codec._plain.encode_parts([(text, trusted)]) for text in texts for trusted in (True, False)]
    chunks += [codec._plain.encode(character) for text in texts for character in text]
    chunks += [codec._plain.encode(text + other) for text in texts[:6] for other in texts[:6]]
    return [*chunks, [codec.tokenizer.eos_token_id], [len(codec.tokenizer) + 9], [len(codec.tokenizer) // 2]]


def _turns(codec: Codec) -> st.SearchStrategy[list[int]]:
    one = st.one_of(
        st.sampled_from(_chunks(codec)), st.integers(0, len(codec.tokenizer) - 1).map(lambda token: [token])
    )
    return st.lists(one, max_size=25).map(lambda chunks: sum(chunks, []))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("format", [MEM1, OFFICIAL, CHUNKS], ids=["mem1", "official", "chunks"])
def test_token_by_token_is_all_at_once(
    name: str, format: TagFormat, codec_of: Callable[[str], Codec]
) -> None:
    codec = codec_of(name)

    @PROPERTY
    @given(st.data())
    def check(data: st.DataObject) -> None:
        tokens, limit = data.draw(_turns(codec)), data.draw(st.integers(1, 60))
        reader = TurnReader(format, codec.text, codec.stop_ids, max_action_tokens=limit)
        state_at = 0
        for token in tokens:
            event = reader.read(token)
            state_at = reader.num_tokens if event == "state" else state_at
            if reader.ended:
                assert event == "end"
                break
        kept, state, kind, text, ended = whole(format, codec, tokens, limit)
        assert (reader.num_tokens, reader.state_tokens, reader.ended) == (kept, state, ended)
        assert state_at == (state if state != kept or not ended else 0)
        if ended:
            assert reader.action == (kind, text)

    check()


@pytest.mark.parametrize("name", NAMES)
def test_parts_cover_a_stream_whatever_the_environment_says(
    name: str, codec_of: Callable[[str], Codec]
) -> None:
    """Turns and observations one behind the other: the parts cover every token once, and what the policy did
    is read the same with every text between.
    """
    codec = codec_of(name)
    limit = codec.observation_overhead() + 30
    said = st.sampled_from([*TEXTS.split(" "), *codec.tokenizer.get_added_vocab(), " ", "\n", "x"])

    @PROPERTY
    @given(st.lists(st.tuples(_turns(codec), st.lists(said).map("".join)), min_size=1, max_size=3))
    def check(turns: list[tuple[list[int], str]]) -> None:
        assert _play(codec, turns, limit) == _play(codec, [(turn, "") for turn, _ in turns], limit)

    check()


def _play(codec: Codec, turns: list[tuple[list[int], str]], limit: int) -> list[tuple]:
    """The policy's parts, turn by turn, and its actions."""
    found = []
    for turn, said in turns:
        reader = codec.turn(40)
        events = [reader.read(token) for token in turn[:1]]
        for token in turn[1:]:
            if reader.ended:
                break
            events.append(reader.read(token))
        assert len(events) == reader.num_tokens >= reader.state_tokens
        assert [event for event in events if event] == (["state"] if "state" in events else []) + (
            ["end"] if reader.ended else []
        )
        info = codec.observation(said, limit, turns_left=1)
        assert 0 < len(info) <= limit
        found.append((reader.num_tokens, reader.state_tokens, reader.kind, reader.action))
    return found
