"""The trainer on the fast losses learns as it does on their specification."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial

import pytest

from mem1.config import AlgorithmConfig, TrainConfig
from mem1.envs.toy.training import toy_training
from mem1.runtime.progress import Progress
from mem1.train import advantages, batches, learner
from mem1.train import train_loop as train

SETTINGS = TrainConfig(
    max_updates=5,
    batch_size=8,
    environment={"objectives": (1, 1)},
    init="mem1-tiny-start",
    algorithm=AlgorithmConfig(
        mini_batch_size=4,
        epochs=2,
        critic_only_updates=1,
        kl_coef=0.01,
        kl_placement="loss",
        entropy_coef=0.01,
        actor_lr=3e-4,
    ),
)


@pytest.mark.slow
def test_the_curve_is_that_of_the_reference_loss(tmp_path, monkeypatch):
    config = replace(SETTINGS, rollout=replace(SETTINGS.rollout, max_turns=4, max_action_tokens=24))
    quiet = Progress(log=lambda line: None)
    given = toy_training(config) | {"progress": quiet}
    curves = []
    for backend in ("auto", "reference"):
        with monkeypatch.context() as patch:
            for module, name in (
                (learner, "fused_linear_ppo_loss"),
                (batches, "linear_logprob"),
                (advantages, "gae"),
            ):
                patch.setattr(module, name, partial(getattr(module, name), backend=backend))
            train.train(config, tmp_path / backend, **given)
        lines = (tmp_path / backend / "metrics.jsonl").read_text().splitlines()
        curves.append([r for r in map(json.loads, lines) if r["phase"] == "policy"])
    ours, reference = curves
    assert len(ours) == len(reference) == 5
    for step, (one, other) in enumerate(zip(ours, reference, strict=True)):
        assert one.keys() == other.keys()
        for name in {name for name in one if "second" not in name} - {"phase"}:
            # The differences of two log-probs that should be equal are rounding and nothing else.
            number = isinstance(other[name], int | float | list)
            expected = pytest.approx(other[name], rel=2e-3, abs=1e-4) if number else other[name]
            assert one[name] == expected, f"update {step + 1}: {name}"
    assert all(record["actor_grad_norm"] > 0 for record in ours[1:])
    assert any(record["reward"] > 0 for record in ours)
