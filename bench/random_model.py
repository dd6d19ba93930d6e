"""A Qwen2 with random weights of the shape of Qwen2.5-0.5B, as a folder:

python bench/random_model.py TOKENIZER OUT [DTYPE]
"""

from __future__ import annotations

import sys

import torch
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

VOCABULARY = 151_936


def main(tokenizer: str, out: str, dtype: str = "float32") -> None:
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        max_position_embeddings=32768,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        tie_word_embeddings=True,
        initializer_range=0.01,
    )
    Qwen2ForCausalLM(config).to(getattr(torch, dtype)).save_pretrained(out)
    PreTrainedTokenizerFast.from_pretrained(tokenizer).save_pretrained(out)


if __name__ == "__main__":
    main(*sys.argv[1:])
