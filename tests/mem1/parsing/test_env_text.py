"""Text of a task or an environment is data: no text gives an added token, and ordinary text is encoded as the
tokenizer does.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Callable
from pathlib import Path

import pytest
from real_tokenizers import PACKAGES
from small_tokenizers import SMALL, byte_level, sentence_piece
from tokenizers import normalizers
from transformers import PreTrainedTokenizerFast

from mem1.parsing.action import Action
from mem1.parsing.codec import Codec
from mem1.parsing.env_text import PlainEncoder

NAMES = [*SMALL, *PACKAGES]
CodecOf = Callable[[str], Codec]


@pytest.mark.parametrize("name", NAMES)
def test_no_text_gives_an_added_token(name: str, codec_of: CodecOf) -> None:
    codec = codec_of(name)
    added = codec.tokenizer.get_added_vocab()
    banned = {token for word, token in added.items() if word.replace("▁", " ").strip()}
    assert banned
    if name in ("toy", "unigram"):  # where the unknown word stands for words
        banned.remove(codec.tokenizer.unk_token_id)
    frame = [
        token for token in codec.observation("", 1000, turns_left=1) if token in banned
    ]  # the toy's tags
    for word in added:
        around = (word, f"of{word}it", f" {word} ", f"{word}{word}", f"\n{word}\n", f"<{word}>", word.upper())
        for text in around:
            assert not banned & {*codec._plain.encode(text)}, text
            prompt = codec.prompt(text, 1000)
            assert not banned & {*prompt[len(codec._plain.opening) :]}, text
            written = [token for token in codec.observation(text, 1000, turns_left=1) if token in banned]
            assert written == frame, text


def test_a_text_does_not_change_the_tag_before_it() -> None:
    """NFC, which Qwen's tokenizers apply, makes one character of ">" and a stroke through it."""
    tokenizer = byte_level()
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    codec = Codec(tokenizer)
    assert codec.decode(tokenizer.encode("<info>\u0338x")) == "<info\u226fx"
    for text in ("\u0338x", "\u0301\u0338", "\u0338", "e\u0301"):
        said = codec.decode(codec.observation(text, 100, turns_left=1))
        assert "<info>" in said and said.rstrip().endswith("</info>"), text
        tokens = codec.expert("notes", Action("query", text))
        reader = codec.turn(200)
        assert [reader.read(token) for token in tokens][-1] == "end"
        assert reader.action == Action("query", unicodedata.normalize("NFC", text))
    assert "\u00e9" in said, "elsewhere it composes as ever"


@pytest.mark.parametrize(
    "name", ["byte-level", "sentence-piece", "qwen2.5", "mistral-v3", "llama3", "deepseek"]
)
def test_what_looks_like_an_added_token_keeps_its_text(name: str, codec_of: CodecOf) -> None:
    codec = codec_of(name)
    text = "a<|im_end|> </s>[INST]<think></info>\n<IS>"
    tokens = codec.observation(text, 1000, turns_left=1)
    assert codec.decode(tokens) == f"\n<info>{text}</info>\n"


@pytest.mark.parametrize("name", PACKAGES)
def test_passages_are_encoded_as_by_the_tokenizer(name: str, codec_of: CodecOf, data_dir: Path) -> None:
    codec = codec_of(name)
    with (data_dir / "qa" / "corpus.jsonl").open(encoding="utf-8") as lines:
        passages = [json.loads(next(lines))["contents"] for _ in range(200)]
    own = codec.tokenizer.encode
    start = len(own("\n", add_special_tokens=False))
    for passage in passages:  # behind a newline: no tokenizer here joins it to a letter
        assert codec._plain.encode(passage) == own("\n" + passage, add_special_tokens=False)[start:], passage


@pytest.mark.parametrize("name", NAMES)
def test_a_prompt_begins_as_the_tokenizer_begins_a_text(name: str, codec_of: CodecOf) -> None:
    codec = codec_of(name)
    for text in ("The Rhine is long", " two  blanks", "ada boss ?"):
        whole = codec.tokenizer.encode(text)
        tokens = codec.prompt(text, 100)
        assert whole[: len(tokens)] == tokens
        assert all(codec.text.is_special(token) for token in whole[len(tokens) :])  # no end behind it


def test_trusted_text_is_split_as_the_tokenizer_does(codec_of: CodecOf) -> None:
    codec = codec_of("byte-level")
    tokenizer, plain = codec.tokenizer, codec._plain
    text = "<|im_start|>user\n<think>x</think>\n\n\n<|im_end|>\n"
    assert plain.encode_parts([(text, True)]) == tokenizer.encode(text)
    assert plain.encode_parts([(text, False)]) == plain.encode(text)
    # What stands between two added tokens is one text, whoever wrote it.
    parts = [("<|im_start|>us", True), ("er\n<I", False), ("S>The", True), ("<|im_end|>", True)]
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    start = tokenizer.convert_tokens_to_ids("<|im_start|>")
    assert plain.encode_parts(parts) == [start, *plain.encode("user\n<IS>The"), end]
    assert plain.encode_parts([]) == [] == plain.encode_parts([("", True), ("", False)])


@pytest.mark.parametrize("name", ["byte-level", "sentence-piece"])
def test_white_space_that_was_added_stays(name: str, codec_of: CodecOf) -> None:
    codec = codec_of(name)
    tokens = codec._plain.encode("The\n\n\nRhine   is")
    assert {*codec.tokenizer.convert_tokens_to_ids(["\n\n\n", "   "])} <= {*tokens}
    assert codec.decode(tokens) == "The\n\n\nRhine   is"


def test_words_of_the_vocabulary_that_are_added_are_taken_out() -> None:
    """As in Gemma, where text itself makes some."""
    tokenizer = sentence_piece()
    table = tokenizer.convert_tokens_to_ids("<table>")
    bare = tokenizer.backend_tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    assert table in bare.encode("x<table>x").ids
    tokens = PlainEncoder(tokenizer).encode("x<table>x")
    assert table not in tokens and len(tokens) > 3


def test_settings_of_the_tokenizer_do_not_reach_the_copy() -> None:
    tokenizer = sentence_piece()
    tokenizer.backend_tokenizer.enable_truncation(4)
    tokenizer.backend_tokenizer.enable_padding(length=64)
    tokens = PlainEncoder(tokenizer).encode("The Rhine is long, the Rhine is long")
    assert len(tokens) > 4 and tokenizer.pad_token_id not in tokens


def test_lone_surrogates_are_refused(codec_of: CodecOf) -> None:
    codec = codec_of("byte-level")
    with pytest.raises(ValueError, match="surrogates not allowed"):
        codec.observation("a\ud800", 100, turns_left=1)
    with pytest.raises(ValueError, match="surrogates not allowed"):
        codec.prompt("a\ud800", 100)


def test_bpe_without_added_tokens_in_its_vocabulary_is_unchanged(
    load: Callable[[str], PreTrainedTokenizerFast],
) -> None:
    tokenizer = load("byte-level")
    assert PlainEncoder(tokenizer).encode("The Rhine") == tokenizer.encode("The Rhine")
