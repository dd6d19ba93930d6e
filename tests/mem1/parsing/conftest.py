"""Codecs by the name of their tokenizer."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from transformers import PreTrainedTokenizerFast

from mem1.parsing.codec import Codec

Load = Callable[[str], PreTrainedTokenizerFast]


@pytest.fixture(scope="session")
def codec_of(load: Load) -> Callable[[str], Codec]:
    known: dict[str, Codec] = {}

    def codec_of(name: str) -> Codec:
        if name not in known:
            known[name] = Codec(load(name))
        return known[name]

    return codec_of
