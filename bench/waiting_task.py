"""What `bench_waiting.py` times, in a process of its own: python waiting_task.py ROUNDS STEPS EPISODES.

Prints one line of JSON: the seconds of each round, for each kind of work, policy and company. The work is a
step of the warm start, an update of PPO (its rollout included) and an evaluation of the default small model.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import islice
from typing import Any

import torch

from mem1.config import AlgorithmConfig, ModelConfig, RolloutConfig, WarmStartConfig
from mem1.envs.toy.curriculum import Curriculum
from mem1.envs.toy.multihop import MultiHopEnv
from mem1.envs.toy.tokenizer import build_tokenizer
from mem1.evaluation.evaluation_loop import evaluate
from mem1.models.build import build_critic, build_model
from mem1.rollout.rollout_loop import rollout
from mem1.runtime.waiting import share_cpus
from mem1.train.learner import Learner
from mem1.train.warmstart import warm_start

LIMITS = RolloutConfig(max_turns=6, max_action_tokens=32)
WORK = WARM_START, UPDATE, EVALUATION = "warm start", "PPO update", "evaluation"
OURS, PLAIN = "mem1", "as OpenMP comes"
POLICIES: dict[str, Callable[[], Any]] = {OURS: share_cpus, PLAIN: nullcontext}
IDLE, BUSY = "idle", "beside a busy process"


def seconds(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def measured(steps: int, episodes: int) -> dict[str, float]:
    """Seconds of each kind of work."""
    tokenizer = build_tokenizer()
    model = build_model(tokenizer, ModelConfig())
    draw = Curriculum(tokenizer.get_vocab(), {"objectives": (1, 4)})
    warm = warm_start(model, WarmStartConfig(steps=steps + 2), draw)
    list(islice(warm, 2))
    found = {WARM_START: seconds(lambda: list(warm)) / steps}

    learner = Learner(
        model, build_critic(model), None, AlgorithmConfig(kl_coef=0.0, critic_only_updates=0), "carry"
    )
    make = partial(MultiHopEnv, (1, 4))

    def update() -> None:
        played = list(rollout(model.eval(), tokenizer, make, range(episodes), LIMITS))
        learner.update(played, torch.Generator().manual_seed(0))

    found[UPDATE] = seconds(update)
    found[EVALUATION] = seconds(
        lambda: evaluate(model, tokenizer, LIMITS, MultiHopEnv, agent="", objectives=2, episodes=episodes)
    )
    return found


@contextmanager
def beside_a_busy_process() -> Iterator[None]:
    other = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        yield
    finally:
        other.kill()
        other.wait()


COMPANY: dict[str, Callable[[], Any]] = {IDLE: nullcontext, BUSY: beside_a_busy_process}


def row(policy: str, company: str) -> str:
    return f"{policy}, {company}"


def main(rounds: int, steps: int, episodes: int) -> None:
    rows: dict[str, dict[str, list[float]]] = {}
    for _ in range(rounds):
        for company, beside in COMPANY.items():
            for policy, waiting in POLICIES.items():
                with beside(), waiting():
                    for work, took in measured(steps, episodes).items():
                        rows.setdefault(work, {}).setdefault(row(policy, company), []).append(took)
    print(json.dumps(rows))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
