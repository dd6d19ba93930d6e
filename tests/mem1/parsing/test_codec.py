"""Limits, cuts and experts: what a rollout asks of a codec."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

import pytest
from real_tokenizers import PACKAGES
from small_tokenizers import SMALL, byte_level, sentence_piece, word_piece
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from mem1.checks import InputError
from mem1.parsing.action import Action
from mem1.parsing.codec import Codec
from mem1.parsing.tags import CHUNKS, FOLD, OFFICIAL, ActionTag, TagFormat

CodecOf = Callable[[str], Codec]
WIDE = "Die Ströme — 日本語の質問？ 🦆🦆 naïve e\u0301 " * 6


@pytest.mark.parametrize("name", [*SMALL, *PACKAGES])
def test_observations_are_cut_between_characters(name: str, codec_of: CodecOf) -> None:
    codec = codec_of(name)
    least = codec.observation_overhead()
    whole = codec.observation(WIDE, 10_000, turns_left=1)
    head, tail = codec.observation("", 10_000, turns_left=1)[0], whole[-1]
    for limit in range(least, len(whole) + 3, 1 if name in SMALL else 5):
        tokens = codec.observation(WIDE, limit, turns_left=1)
        assert len(tokens) <= limit and (tokens[0], tokens[-1]) == (head, tail)
        assert len(tokens) >= min(limit, len(whole)) - 8  # no more is lost than a character and a join take
        text = codec.decode(tokens).strip()
        assert text.startswith("<info>") and text.endswith("</info>") and "\ufffd" not in text
        if limit >= len(whole):
            assert tokens == whole
    with pytest.raises(InputError, match=f"limit: expected at least {least}, which the tags take, got"):
        codec.observation(WIDE, least - 1, turns_left=1)


@pytest.mark.parametrize("name", ["byte-level", "sentence-piece"])
def test_what_is_kept_is_the_beginning(name: str, codec_of: CodecOf) -> None:
    codec = codec_of(name)
    for limit in range(codec.observation_overhead(), 90):
        text = codec.decode(codec.observation(WIDE, limit, turns_left=1))
        assert WIDE.startswith(text.removeprefix("\n<info>").removesuffix("</info>\n"))


def test_the_hint_comes_first_and_counts() -> None:
    format = TagFormat(turn_hint="[HINT] You have {turns_left} turns left. [/HINT]\n")
    codec = Codec(byte_level(), format)
    tokens = codec.observation("Doc", 1000, turns_left=3)
    assert codec.decode(tokens) == "\n<info>[HINT] You have 3 turns left. [/HINT]\nDoc</info>\n"
    assert codec.observation_overhead() > Codec(byte_level()).observation_overhead() + 10
    cut = codec.observation("Doc " * 99, codec.observation_overhead() + 5, turns_left=3)
    assert codec.decode(cut).startswith("\n<info>[HINT] You have 3 turns left. [/HINT]\nDoc")
    longer = Codec(
        byte_level(), replace(format, last_turn_hint="Answer now, for this is the last turn. " * 3)
    )
    assert codec.observation_overhead() < longer.observation_overhead()
    last = longer.observation("Doc " * 99, longer.observation_overhead() + 5, turns_left=1)
    assert "Answer now" in codec.decode(last) and codec.decode(last).endswith("</info>\n")


def test_megabytes_are_not_read_to_their_end(codec_of: CodecOf) -> None:
    codec = codec_of("byte-level")
    text = "the Rhine is long " * 500_000
    begin = time.perf_counter()
    assert len(codec.observation(text, 100, turns_left=1)) <= 100
    assert len(codec.prompt(text, 100)) > 100
    assert time.perf_counter() - begin < 0.5


def test_a_prompt_is_never_cut(codec_of: CodecOf) -> None:
    codec = codec_of("byte-level")
    whole = codec.prompt(WIDE, 10_000)
    assert codec.decode(whole) == WIDE
    for limit in (0, 1, 50, len(whole), len(whole) + 1):
        tokens = codec.prompt(WIDE, limit)
        assert len(tokens) > limit or tokens == whole


def test_limits_that_the_tags_exceed() -> None:
    codec = Codec(byte_level())
    codec.check_limits(codec.observation_overhead(), 50, 50)
    codec.check_limits(codec.observation_overhead(), 50)
    least = codec.observation_overhead()
    with pytest.raises(InputError, match=f"max_info_tokens: expected at least {least}, which the tags take"):
        codec.check_limits(least - 1, 50)
    with pytest.raises(InputError, match="max_action_tokens: expected at least [0-9]+, which the tags take"):
        codec.check_limits(50, 1)
    with pytest.raises(InputError, match="max_state_tokens: expected at least [0-9]+, which the tags take"):
        codec.check_limits(50, 50, 1)
    Codec(byte_level(), CHUNKS).check_limits(50, 50, 1)  # which has no state


@pytest.mark.parametrize("name", [*SMALL, *PACKAGES])
def test_an_expert_is_read_as_meant(name: str, codec_of: CodecOf) -> None:
    codec = codec_of(name)
    for kind in ("query", "answer"):
        tokens = codec.expert("ada boss ;", Action(kind, "ada boss"))
        reader = codec.turn(1000)
        events = [reader.read(token) for token in tokens]
        assert [event for event in events if event] == ["state", "end"] and events[-1] == "end"
        assert reader.action.kind == kind and not reader.tail
        if name != "unigram":  # which lacks letters
            assert reader.action.text == "ada boss"


def test_an_expert_writes_as_a_rollout_joins() -> None:
    codec = Codec(byte_level())
    tokens = codec.expert("The Rhine", Action("query", "who?"))
    assert tokens == codec._plain.encode("<IS>The Rhine</IS>\n<query>who?</query>")
    official = Codec(byte_level(), OFFICIAL)
    think = official.tokenizer.convert_tokens_to_ids(["<think>", "</think>"])
    tokens = official.expert("The Rhine <think>", Action("query", "who?"))
    assert [token for token in tokens if token in think] == think
    assert official.decode(tokens) == "<think>The Rhine <think></think>\n<search>who?</search>"


def test_what_no_expert_can_write() -> None:
    codec = Codec(byte_level())
    for kind in ("malformed", "branch", None, 3):
        with pytest.raises(ValueError, match="expert_action: expected one of query, answer, got"):
            codec.expert("", Action(kind, ""))
    assert Codec(byte_level(), FOLD).expert("", Action("branch", "x"))
    chunks = Codec(byte_level(), CHUNKS)
    assert chunks.decode(chunks.expert("", Action("query", "x"))) == "<memory>x</memory>"
    with pytest.raises(ValueError, match="expert_action: expected no state, got 'x'"):
        chunks.expert("x", Action("query", "x"))


def test_stop_ids() -> None:
    tokenizer = byte_level()
    assert Codec(tokenizer).stop_ids == {tokenizer.eos_token_id}
    assert Codec(tokenizer, stop_ids=[7, 9]).stop_ids == {tokenizer.eos_token_id, 7, 9}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    assert Codec(tokenizer).stop_ids == frozenset()


def test_tokenizers_that_are_refused(tmp_path) -> None:
    with pytest.raises(InputError, match="tokenizer: expected a fast one of transformers, got 'object'"):
        Codec(object())
    with pytest.raises(InputError, match="tokenizer: expected one that can write <IS>, got"):
        Codec(word_piece())
    with pytest.raises(InputError, match="tokenizer: expected one that can write <think>, got"):
        Codec(SMALL["toy"](), OFFICIAL)
    toy = TagFormat(actions=(ActionTag("query", "query"), ActionTag("answer", "answer")))
    assert Codec(SMALL["toy"](), toy).expert("ada", Action("query", "ada"))


def test_saved_and_loaded(tmp_path) -> None:
    sentence_piece().save_pretrained(tmp_path)
    loaded = Codec(AutoTokenizer.from_pretrained(tmp_path))
    made = Codec(sentence_piece())
    assert loaded.observation(WIDE, 60, turns_left=1) == made.observation(WIDE, 60, turns_left=1)
    assert loaded.prompt(WIDE, 60) == made.prompt(WIDE, 60)
