"""Codecs by name: small tokenizers that are made here, and those of real models where they can be had."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from real_tokenizers import build, missing_package
from small_tokenizers import SMALL
from transformers import PreTrainedTokenizerFast

from mem1.parsing.codec import Codec

Load = Callable[[str], PreTrainedTokenizerFast]


@pytest.fixture(scope="session")
def load(request: pytest.FixtureRequest) -> Load:
    """A tokenizer by name. MEM1_TOKENIZERS is a folder of real ones, where given."""
    known: dict[str, PreTrainedTokenizerFast] = {}

    def find(name: str) -> Path:
        if folder := os.environ.get("MEM1_TOKENIZERS"):
            assert (Path(folder) / name / "tokenizer.json").exists(), (
                f"MEM1_TOKENIZERS: no {name} in {folder}"
            )
            return Path(folder) / name
        if missing := missing_package(name):
            pytest.skip(f"the tokenizer {name} {missing}")
        return build(name, request.config.cache.mkdir("tokenizers"))

    def load(name: str) -> PreTrainedTokenizerFast:
        if name in SMALL:
            return SMALL[name]()
        if name not in known:
            known[name] = PreTrainedTokenizerFast.from_pretrained(find(name))
        return known[name]

    return load


@pytest.fixture(scope="session")
def codec_of(load: Load) -> Callable[[str], Codec]:
    known: dict[str, Codec] = {}

    def codec_of(name: str) -> Codec:
        if name not in known:
            known[name] = Codec(load(name))
        return known[name]

    return codec_of
