from __future__ import annotations

from collections.abc import Callable

import pytest
from real_tokenizers import PACKAGES
from small_tokenizers import SMALL, byte_level, sentence_piece, word_piece
from tokenizers import decoders
from transformers import PreTrainedTokenizerFast

from mem1.checks import InputError
from mem1.parsing.codec import Codec
from mem1.parsing.token_text import TokenText

TEXT = "<IS>Ströme 日本語 🦆</IS>\n\n<query> two  blanks </query>\t"


@pytest.mark.parametrize("name", ["byte-level", "sentence-piece", *PACKAGES])
def test_bytes_are_the_text(name: str, codec_of: Callable[[str], Codec]) -> None:
    codec = codec_of(name)
    tokens = codec._plain.encode(TEXT)
    assert b"".join(codec.text.bytes(token) for token in tokens) == TEXT.encode()
    assert codec.decode(tokens) == TEXT


@pytest.mark.parametrize("name", [*SMALL, *PACKAGES])
def test_every_row_of_a_model_has_bytes_or_none(name: str, codec_of: Callable[[str], Codec]) -> None:
    codec = codec_of(name)
    text, size = codec.text, len(codec.tokenizer)
    special = {token for token in range(size + 300) if text.is_special(token)}
    assert special >= {*range(size, size + 300), codec.tokenizer.eos_token_id}
    assert all(text.bytes(token) == b"" for token in special)
    assert all(text.bytes(token) for token in range(size) if token not in special)
    assert text.decode(special) == ""


def test_added_tokens_that_are_text() -> None:
    tokenizer = byte_level()
    text = TokenText(tokenizer)
    think, special = tokenizer.convert_tokens_to_ids(["</think>", "<|im_end|>"])
    assert text.bytes(think) == b"</think>" and not text.is_special(think)
    assert text.bytes(special) == b"" and text.is_special(special)


def test_two_ids_of_one_character() -> None:
    tokenizer = sentence_piece()
    text = TokenText(tokenizer)
    one, two = tokenizer.convert_tokens_to_ids([">", "<0x3E>"])
    assert one != two and text.bytes(one) == text.bytes(two) == b">"


def test_words() -> None:
    toy = SMALL["toy"]()
    text = TokenText(toy)
    assert text.decode(toy.encode("<IS> ada ; xyzzy </IS>")) == " <IS> ada ; <unk> </IS>"
    assert not text.is_special(toy.unk_token_id) and text.is_special(toy.eos_token_id)
    pieces = word_piece()
    assert (
        TokenText(pieces).decode(pieces.encode("who wrotever", add_special_tokens=False)) == " who wrotever"
    )


def test_parts_of_a_character() -> None:
    tokenizer = byte_level()
    text = TokenText(tokenizer)
    duck = tokenizer.encode("🦆")
    assert len(duck) == 4 and text.decode(duck) == "🦆" and text.decode(duck[:2]) == "\ufffd"


def test_decoders_that_are_refused() -> None:
    core = byte_level().backend_tokenizer
    core.decoder = decoders.CTC()
    with pytest.raises(InputError, match="tokenizer: expected a decoder of bytes, blanks or words, got"):
        TokenText(PreTrainedTokenizerFast(tokenizer_object=core))
    with pytest.raises(InputError, match="tokenizer: expected a fast one of transformers, got 'str'"):
        TokenText("gpt2")
