"""All of MEM1 on a real language model, on the CPU: 64 scripted trajectories over real passages, supervised
steps on them, 16 episodes, one update of PPO.

python bench/language_model.py MODEL QA_FOLDER [SUPERVISED_STEPS]   # bench/gemma.py makes a MODEL

Prints the share of turns with an action before and after the supervised steps, tokens a second, the gap
between the log-probs that were sampled with and those that the trainer computes, and the peak of memory.
"""

from __future__ import annotations

import copy
import json
import resource
import sys
import time
from functools import partial
from typing import Any

import torch
from passages import QuestionEnv

from mem1.config import AlgorithmConfig, RolloutConfig, WarmStartConfig
from mem1.models.build import build_critic
from mem1.models.load import load
from mem1.rollout.rollout_loop import rollout
from mem1.train.learner import Learner
from mem1.train.warmstart import expert_examples, warm_start
from mem1.trajectory import Trajectory

CONFIG = RolloutConfig(
    num_slots=16,
    max_turns=5,
    max_action_tokens=128,
    max_info_tokens=512,
    max_prompt_tokens=256,
    kv_memory=0.3,
)
UNSEEN = 10**6  # seeds from here on; the scripted ones are below 64


def main(path: str, data: str, steps: int = 40) -> None:
    model, tokenizer, report = load(path, dtype="float32")
    print(report, flush=True)
    make, scripted = partial(QuestionEnv, data), partial(QuestionEnv, data, episodes=64)

    def play(episodes: int, config: RolloutConfig = CONFIG) -> list[Trajectory]:
        began = time.perf_counter()
        seeds = range(UNSEEN, UNSEEN + episodes)
        played = list(rollout(model.eval(), tokenizer, make, seeds, config))
        say("rollout", **described(played, time.perf_counter() - began))
        return played

    # The untrained model writes no action: two turns say that.
    play(8, RolloutConfig(**{**vars(CONFIG), "max_turns": 2}))
    lessons = WarmStartConfig(steps=steps, batch_tokens=1536, learning_rate=3e-5, warmup_steps=4)
    began = time.perf_counter()
    for record in warm_start(model, lessons, expert_examples(tokenizer, scripted, CONFIG)):
        say("supervised", seconds=time.perf_counter() - began, **record)
    model.eval()
    played = play(16)
    config = AlgorithmConfig(
        critic_only_updates=0, max_tokens_per_micro_batch=2048, actor_lr=1e-6, critic_lr=1e-5
    )
    reference = copy.deepcopy(model).requires_grad_(False)
    learner = Learner(model, build_critic(model), reference, config, CONFIG.regime, CONFIG.temperature)
    began = time.perf_counter()
    batch, metrics = learner.prepare(played)
    say("prepared", seconds=time.perf_counter() - began, **metrics)
    say(
        "learned",
        **learner.learn(batch, torch.Generator().manual_seed(0)),
        seconds=time.perf_counter() - began,
    )


def described(played: list[Trajectory], seconds: float) -> dict[str, Any]:
    written = sum(int(t.policy_mask.sum()) for t in played)
    return {
        "seconds": seconds,
        "episodes": len(played),
        "turns": sum(t.turns for t in played),
        "well_formed": sum(t.turns - t.invalid_actions for t in played),
        "answered": sum(t.finish_reason == "answered" for t in played),
        "exact_match": sum(t.score.get("exact_match", 0.0) for t in played),
        "peak_tokens": max(t.peak_tokens() for t in played),
        "policy_tokens": written,
        "policy_tokens_per_second": written / seconds,
    }


def say(what: str, **figures: Any) -> None:
    gigabytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(json.dumps({"": what, **figures, "peak_gb": round(gigabytes, 2)}, default=str), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], *map(int, sys.argv[3:4]))
