from __future__ import annotations

import re
from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from mem1.envs.toy.tokenizer import EOS, PAD, TAGS, UNK, build_tokenizer, vocabulary


def test_every_word_is_one_token(tokenizer: PreTrainedTokenizerFast) -> None:
    words = vocabulary()
    assert len(set(words)) == len(words) == len(tokenizer)
    for index, word in enumerate(words):
        assert tokenizer.encode(word) == [index], word


@pytest.mark.parametrize("text", ["<IS>ada</IS>", "ada<IS> ; </IS>.", "x</info><answer>ada"])
def test_tags_are_one_token_wherever_they_stand(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    tokens = tokenizer.convert_ids_to_tokens(tokenizer.encode(text))
    assert [t for t in tokens if t in TAGS] == re.findall("</?[A-Za-z]+>", text)
    assert "ada" in tokens


def test_text_survives_the_round_trip(tokenizer: PreTrainedTokenizerFast) -> None:
    text = "<IS> ada dora ; bruno rival guest </IS> <query> bruno rival </query> <info> emil . </info>"
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_case_punctuation_and_unknown_words(tokenizer: PreTrainedTokenizerFast) -> None:
    tokens = tokenizer.convert_ids_to_tokens(tokenizer.encode("Ada;BRUNO. xyzzy"))
    assert tokens == ["ada", ";", "bruno", ".", UNK]
    assert tokenizer.encode("") == []
    assert (tokenizer.pad_token, build_tokenizer().eos_token, tokenizer.unk_token) == (PAD, EOS, UNK)


def test_saved_tokenizer_loads_with_transformers(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    text = "questions : ada boss </info><answer> max"
    assert loaded.encode(text) == tokenizer.encode(text)
    assert loaded.decode(loaded.encode(text)) == tokenizer.decode(tokenizer.encode(text))
