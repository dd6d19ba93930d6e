"""A process that plans, rolls out at full size and prints (planned bytes, bytes at its peak)."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from mem1.config import RolloutConfig
from mem1.engine.engine import Engine
from mem1.models.memory_plan import plan_memory
from mem1_core.integrations.transformers import register

VOCABULARY, SLOTS, CAPACITY, BATCHED = 60_000, 4, 512, 2048


def peak_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def main(dtype: str) -> None:
    register()
    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=12,
        num_attention_heads=8,
        num_key_value_heads=2,
        attn_implementation="mem1",
    )
    torch.set_default_dtype(getattr(torch, dtype))
    model = Qwen2ForCausalLM(config).eval()
    torch.set_default_dtype(torch.float32)
    plan = plan_memory(model, CAPACITY, SLOTS, 1.0, BATCHED)
    engine = Engine(model, plan.num_slots, BATCHED, capacity=plan.capacity)
    rows, tokens = list(range(SLOTS)), torch.randint(0, VOCABULARY, (SLOTS, CAPACITY)).tolist()
    with engine.session():
        hidden = engine.feed(rows, tokens, [list(range(CAPACITY))] * SLOTS)
        numbers, free = torch.rand(SLOTS, dtype=torch.float64), torch.full((SLOTS,), -1)
        engine.sample(hidden, numbers, free, RolloutConfig(top_p=0.9))
    print(json.dumps([plan.total_bytes, peak_bytes()]))


if __name__ == "__main__":
    main(sys.argv[1])
