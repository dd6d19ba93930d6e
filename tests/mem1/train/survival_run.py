"""A run for `test_survival.py`, in a process that can be killed: python survival_run.py OUT UPDATES.

Of the environment's calls 5 % fail, hang or talk nonsense, which ones follows from the episode's seed, the
attempt and the step; in one update a gradient is NaN, and in another one row of the policy's logits.
"""

from __future__ import annotations

import random
import sys
import time
from pathlib import Path

import torch

from mem1.config import AlgorithmConfig, ModelConfig, RolloutConfig, TrainConfig, WarmStartConfig
from mem1.engine.engine import Engine
from mem1.envs.base import Action, Step
from mem1.envs.toy.multihop import MultiHopEnv
from mem1.envs.toy.training import toy_training
from mem1.runtime.interrupts import Interrupted
from mem1.seeds import derive_seed
from mem1.train import train_loop as train
from mem1.train.learner import Learner

FAULTY = 0.05  # of the calls
NAN_GRADIENT, NAN_LOGITS = 9, 21  # updates

CONFIG = TrainConfig(
    batch_size=6,
    environment={"objectives": (1, 2)},
    save_every=3,
    threads=1,
    max_failed=0.9,
    model=ModelConfig(
        num_hidden_layers=1,
        hidden_size=32,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=64,
    ),
    rollout=RolloutConfig(num_slots=4, max_action_tokens=12, max_turns=3, env_timeout=1.0, synchronous=True),
    warmstart=WarmStartConfig(steps=20, batch_tokens=256, save_every=7),
    algorithm=AlgorithmConfig(mini_batch_size=4, actor_lr=1e-3, critic_only_updates=1),
)


class Faulty(MultiHopEnv):
    run_inline = False
    attempts: dict[int, int] = {}  # of each seed, in this update

    def reset(self, seed: int, task=None) -> str:
        self.attempts[seed] = self.attempts.get(seed, 0) + 1
        self.draw = random.Random(f"{seed} {self.attempts[seed]}")
        return super().reset(seed)

    def step(self, action: Action) -> Step:
        fault = self.draw.choice(("fail", "hang", "nonsense")) if self.draw.random() < FAULTY else ""
        if fault == "fail":
            raise LookupError("no such page")
        if fault == "hang":
            time.sleep(2.5)
        observation = super().step(action)
        return observation._replace(observation=7) if fault == "nonsense" else observation  # type: ignore[arg-type]


def main(out: Path, updates: int) -> int:
    step, logits = Learner.step, Engine.logits
    poisoned = {"gradient": 0, "logits": 0}
    poisoned_seeds = {
        derive_seed(CONFIG.seed, "training", NAN_LOGITS - 1, i) for i in range(CONFIG.batch_size)
    }

    def rolling(*arguments, original=train.rollout, **settings):
        Faulty.attempts.clear()
        poisoned.update(gradient=0, logits=0 if poisoned_seeds.issuperset(settings["seeds"]) else -(10**9))
        return original(*arguments, **settings)

    def stepping(self, *arguments):
        poison = self.updates + 1 == NAN_GRADIENT and not poisoned["gradient"]
        poisoned["gradient"] = 1
        weight = self.actor.get_output_embeddings().weight
        handle = weight.register_hook(lambda grad: grad * torch.nan) if poison else None
        result = step(self, *arguments)
        if handle is not None:
            handle.remove()
        return result

    def poisoning(self, hidden):
        made = logits(self, hidden)
        poisoned["logits"] += 1
        if poisoned["logits"] == 10:
            made = made.clone()
            made[0] = torch.nan
        return made

    train.rollout, Learner.step, Engine.logits = rolling, stepping, poisoning
    config = CONFIG.__class__(**{**vars(CONFIG), "max_updates": updates})
    resume = any(out.glob("checkpoints/*-*"))
    try:
        given = toy_training(config) | {"make_environment": lambda: Faulty((1, 2))}
        train.train(config, out, **given, resume=resume, overwrite=not resume)
    except Interrupted as error:
        return 128 + error.signum
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2])))
