"""A small decoder with random weights that are large enough for errors to show, and with a liking for the
tags; tokenizers by name.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from real_tokenizers import build, missing_package
from small_tokenizers import SMALL
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from mem1.envs.toy.tokenizer import build_tokenizer
from mem1_core.integrations.transformers import register

Load = Callable[[str], PreTrainedTokenizerFast]


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """The toy's, without an end of text, which random weights would write in their first turn."""
    tokenizer = build_tokenizer()
    tokenizer.eos_token = None
    return tokenizer


@pytest.fixture(scope="session")
def make_model(tokenizer: PreTrainedTokenizerFast) -> Callable[..., Qwen2ForCausalLM]:
    register()

    def make(dtype: torch.dtype = torch.float32, seed: int = 0, **settings: object) -> Qwen2ForCausalLM:
        torch.manual_seed(seed)
        shape = {
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 65536,
            "tie_word_embeddings": False,
            "attn_implementation": "mem1",
        }
        model = Qwen2ForCausalLM(Qwen2Config(vocab_size=len(tokenizer), **(shape | settings)))
        with torch.no_grad():
            for weight in model.parameters():
                if weight.dim() > 1:
                    weight.mul_(8)
            # The first channel is nearly constant, so it works as a bias of the output: more tags, fewer
            # words.
            model.get_input_embeddings().weight[:, 0] = 0.3
            head = model.get_output_embeddings().weight
            head.mul_(0.12)
            head[:, 0] = 0.0
            for tag, bias in (("</IS>", 1.5), ("<query>", 1.0), ("</query>", 1.0), ("</answer>", -2.0)):
                head[tokenizer.convert_tokens_to_ids(tag), 0] = bias
        return model.to(dtype).eval()

    return make


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
