"""The trajectories of a rollout once more with Hugging Face `generate`, which encodes the pruned context
again each turn: what is to be held against the tokens a second that `mem1 rollout` tells.

    python bench/regenerate.py MODEL TRAJECTORIES.jsonl BATCH

Rows of a batch go from turn to turn together. The contexts are those that the trajectories had, and each row
writes as many tokens as the longest action of its batch; only its own count.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from mem1.trajectory import Trajectory


def turns(trajectory: Trajectory) -> list[tuple[list[int], int]]:
    """Of each turn what was seen when it began, and how many tokens were written."""
    evict, found, end = trajectory.mask.evict_at[0], [], 0
    begins = {}
    for kind, turn, length in trajectory.segments:
        if kind not in ("prompt", "info"):
            begins.setdefault(turn, [end, 0])[1] += length
        end += length
    for begin, written in begins.values():
        found.append((trajectory.tokens[:begin][evict[:begin] > begin].tolist(), written))
    return found


@torch.inference_mode()
def main(path: str, file: str, batch: int) -> None:
    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="sdpa").eval()
    model.generation_config.eos_token_id = None
    lines = Path(file).read_text().splitlines()
    episodes = [turns(Trajectory.from_dict(json.loads(line))) for line in lines]
    tokens, began = 0, time.perf_counter()
    for first in range(0, len(episodes), batch):
        rows = episodes[first : first + batch]
        for turn in range(max(map(len, rows))):
            contexts = [row[turn] for row in rows if turn < len(row)]
            longest, written = max(len(ids) for ids, _ in contexts), max(n for _, n in contexts)
            ids = torch.zeros(len(contexts), longest, dtype=torch.int64)
            mask = torch.zeros_like(ids)
            for row, (context, _) in enumerate(contexts):
                ids[row, longest - len(context) :] = torch.tensor(context)
                mask[row, longest - len(context) :] = 1
            settings = GenerationConfig(
                do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=written, pad_token_id=0
            )
            model.generate(ids, attention_mask=mask, generation_config=settings)
            tokens += sum(n for _, n in contexts)
            print(f"{tokens} tokens, {tokens / (time.perf_counter() - began):.1f} a second", flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
