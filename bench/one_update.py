"""One update of PPO on trajectories that `mem1 rollout` has written, with the gap between the log-probs that
were sampled with and those that the trainer computes:

python bench/one_update.py MODEL TRAJECTORIES.jsonl [EPISODES]
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch

from mem1.config import AlgorithmConfig
from mem1.models.build import build_critic
from mem1.models.load import load
from mem1.train.learner import Learner
from mem1.trajectory import TokenReward, Trajectory


def main(path: str, file: str, episodes: int | None = None) -> None:
    lines = Path(file).read_text().splitlines()[:episodes]
    played = [Trajectory.from_dict(json.loads(line)) for line in lines]
    # Random weights get no reward: give some, so that there is something to learn.
    for trajectory in played:
        trajectory.rewards = [TokenReward(trajectory.tokens.numel() - 1, float(trajectory.seed % 2))]
    actor, _, report = load(path)
    print(report)
    config = AlgorithmConfig(critic_only_updates=0, kl_coef=0.0, max_tokens_per_micro_batch=4096)
    learner = Learner(actor, build_critic(actor), None, config, played[0].regime, played[0].temperature)
    began = time.perf_counter()
    batch, metrics = learner.prepare(played)
    print(
        {name: metrics[name] for name in ("dlogp_max", "dlogp_mean")},
        f"{time.perf_counter() - began:.0f} s",
        flush=True,
    )
    metrics = learner.learn(batch, torch.Generator().manual_seed(0))
    print(metrics, f"{time.perf_counter() - began:.0f} s", flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]) if len(sys.argv) > 3 else None)
