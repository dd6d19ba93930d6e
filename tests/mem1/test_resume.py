"""A run that stops and goes on is the run that never stopped."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from mem1 import checkpoint
from mem1.config import ModelConfig, PPOConfig, RolloutConfig, TrainConfig, WarmStartConfig
from mem1.train import train

CONFIG = TrainConfig(
    updates=4,
    batch=4,
    objectives=(1, 2),
    model=ModelConfig(layers=1, width=32, heads=2, kv_heads=1, mlp_width=64),
    rollout=RolloutConfig(slots=4, max_action=16, max_turns=3),
    warmstart=WarmStartConfig(steps=2, batch_tokens=256),
    # Large steps and a KL that weighs: whatever is not restored shows in the weights. The warm-up is still
    # under way at the stop.
    ppo=PPOConfig(
        kl=0.5, minibatch=2, actor_lr=0.01, critic_lr=0.01, actor_warmup=9, critic_warmup=9, critic_only=1
    ),
)


def run(config: TrainConfig, out: Path, resume: bool = False) -> dict[str, Any]:
    """All that the checkpoint of a run holds, by its path in the nested dicts and lists."""
    train(config, out, resume=resume, say=lambda line: None)
    saved = checkpoint.load(out / "last")
    return flat({"actor": dict(saved.model.state_dict()), "trainer": saved.trainer})


def flat(tree: Any, path: str = "") -> dict[str, Any]:
    if not isinstance(tree, (dict, list, tuple)):
        return {path: tree}
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    return {name: leaf for key, part in items for name, leaf in flat(part, f"{path}/{key}").items()}


def test_a_resumed_run_ends_where_an_unbroken_one_does(tmp_path):
    unbroken = run(CONFIG, tmp_path / "unbroken")
    stopped = run(replace(CONFIG, updates=2), tmp_path / "stopped")
    resumed = run(CONFIG, tmp_path / "stopped", resume=True)
    assert unbroken["/trainer/ppo/updates"] == resumed["/trainer/ppo/updates"] == 4
    assert resumed.keys() == unbroken.keys()
    for name, wanted in unbroken.items():
        if isinstance(wanted, torch.Tensor):
            torch.testing.assert_close(resumed[name], wanted, atol=1e-6, rtol=0, msg=lambda m, n=name: n + m)
        else:
            assert resumed[name] == wanted, name

    def moved(part: str) -> float:
        """How far the second half of the run took the weights of `part`."""
        return max(
            float((resumed[name] - stopped[name]).abs().max()) for name in resumed if name.startswith(part)
        )

    assert moved("/actor") > 0.01 and moved("/trainer/critic") > 0.01
    assert moved("/trainer/reference") == 0
