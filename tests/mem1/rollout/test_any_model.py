"""The whole loop with models and tokenizers that people have: architectures small and random, tokenizers
real where their packages are installed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from parity_gates import GATES, assert_parity
from scripted import ScriptedEnv
from small_families import FAMILIES, NO_MODEL, POSITIONS, VOCABULARY, build
from small_tokenizers import SMALL
from transformers import PreTrainedModel

from mem1.checks import InputError
from mem1.config import RolloutConfig
from mem1.engine.engine import Engine
from mem1.models.build import to_dtype
from mem1.parsing.tags import MEM1, OFFICIAL
from mem1.rollout.rollout_loop import rollout
from mem1_core.integrations import transformers as integration
from mem1_core.segments import by_policy

CONFIG = RolloutConfig(
    num_slots=32, max_turns=5, max_prompt_tokens=400, max_action_tokens=256, max_info_tokens=256
)
MODELS = {  # tokenizer -> architecture, format
    "qwen2.5": ("qwen2", MEM1),
    "qwen3": ("qwen3", OFFICIAL),
    "llama3": ("llama", MEM1),
    "deepseek": ("llama", OFFICIAL),
    "mistral-nemo": ("mistral", MEM1),
    "mistral-v3": ("mistral", OFFICIAL),
    "llama2-like": ("llama", MEM1),
    "gemma3": ("gemma", OFFICIAL),
    "byte-level": ("qwen2", OFFICIAL),
    "sentence-piece": ("llama", MEM1),
}

integration.register()


def model_for(family: str, tokenizer: Any, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    sizes = {VOCABULARY: len(tokenizer) + 100, POSITIONS: 4096}
    model = to_dtype(build(family, "mem1", sizes), dtype)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    return model


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("regime", ["carry", "reencode"])
def test_parity_with_a_real_tokenizer(
    load: Callable[[str], Any], name: str, regime: str, dtype: torch.dtype
) -> None:
    """32 ragged episodes, forced through awkward texts: 5 turns each but for their lengths."""
    tokenizer, (family, format) = load(name), MODELS[name]
    model = model_for(family, tokenizer, dtype)
    config = replace(CONFIG, regime=regime, format=format)  # type: ignore[arg-type]
    make = lambda: ScriptedEnv(MEM1, (3, 4), words=5)  # noqa: E731
    played = list(rollout(model, tokenizer, make, range(32), config, expert=True))
    assert {t.finish_reason for t in played} == {"answered"}
    assert min(t.turns for t in played) >= 4 and len({t.tokens.numel() for t in played}) > 12
    assert_parity(model, played)
    # Sampled: what such weights write has no sense, and every reading has its end.
    config = replace(config, max_action_tokens=24, max_turns=4)
    played = list(rollout(model, tokenizer, make, range(32), config))
    assert sum(t.turns == 4 for t in played) >= 8
    assert_parity(model, played)


def examine(family: str) -> str:
    """How a family fares in a rollout: "" if all is well, else why it is refused."""
    tokenizer = SMALL["byte-level"]()
    if family in NO_MODEL:
        return NO_MODEL[family]
    try:
        model = model_for(family, tokenizer)
        Engine(model, 1)
    except (KeyError, InputError) as refusal:
        return str(refusal)
    make = lambda: ScriptedEnv(MEM1, (3, 4), words=3)  # noqa: E731
    for regime, limit in (("carry", 256), ("reencode", 16)):  # the one forced, the other sampled
        config = replace(CONFIG, regime=regime, num_slots=3, max_action_tokens=limit)  # type: ignore[arg-type]
        played = list(rollout(model, tokenizer, make, range(4), config, expert=regime == "carry"))
        assert all(by_policy(segment.kind) for t in played for segment in t.segments[1:2])
        assert_parity(model, played)
    return ""


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "phi", "qwen3_moe", "olmo2", "mixtral"])
def test_a_family(family: str) -> None:
    assert examine(family) == ""


@pytest.mark.slow
@pytest.mark.parametrize("part", range(4))  # for several processes
def test_every_family_that_an_engine_takes(record_property: Callable[[str, object], None], part: int) -> None:
    results = {family: examine(family) for family in [*FAMILIES][part::4]}
    passed = [family for family, why in results.items() if not why]
    record_property(
        "report",
        f"rolled out, log-probs recomputed within {GATES[torch.float32]}: {len(passed)} families: "
        + " ".join(passed),
    )
    assert len(passed) >= 12
