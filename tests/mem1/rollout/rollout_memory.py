"""Prints, as JSON, the resident size of this process in bytes each time the policy has finished an action.

python rollout_memory.py action|never TURNS
"""

from __future__ import annotations

import json
import resource
import sys
from pathlib import Path

from mem1.config import ModelConfig, RolloutConfig
from mem1.envs.base import Action, Step
from mem1.envs.toy.tokenizer import build_tokenizer
from mem1.models.build import build_model
from mem1.rollout.rollout_loop import rollout

INFO_TOKENS = 240
# Keys and values of a token take 4 KiB: what is kept shows.
MODEL = ModelConfig(
    num_hidden_layers=2,
    hidden_size=256,
    num_attention_heads=4,
    num_key_value_heads=4,
    intermediate_size=64,
    max_position_embeddings=2**15,
)


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


class Meter:
    objectives = 1
    run_inline = True

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def reset(self, seed: int, task=None) -> str:
        return "ada boss ?"

    def step(self, action: Action) -> Step:
        self.sizes.append(resident_bytes())
        return Step("anna " * INFO_TOKENS, 0.0, False)


def main(prune: str, turns: int) -> None:
    tokenizer, meter = build_tokenizer(), Meter()
    tokenizer.eos_token = None  # nothing but the limit ends an episode
    limits = {"max_turns": turns, "max_action_tokens": 8, "max_info_tokens": INFO_TOKENS}
    config = RolloutConfig(num_slots=1, prune=prune, **limits)  # type: ignore[arg-type]
    (trajectory,) = rollout(build_model(tokenizer, MODEL), tokenizer, lambda: meter, [0], config)
    tokens = trajectory.tokens.numel()
    print(json.dumps({"sizes": meter.sizes, "tokens": tokens, "finish_reason": trajectory.finish_reason}))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
