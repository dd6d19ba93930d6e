"""One optimiser step on folded trajectories: each fed once, or once for each context, against a row for each
turn, which is how the other trainers feed them. See `train_step_task.py`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from measure import Candidate
from rollout_task import Workload
from train_step_task import (
    MODEL,
    Task,
    eager_loss,
    fused_loss,
    learner,
    per_turn_rows,
    policy,
    trl_loss,
    verl_loss,
)

ONE_COPY, BLOCKS = "Learner.step, one copy", "Learner.step, blocks"
ROWS = "per-turn rows, packed"
TRAJECTORIES = {4: 12, 8: 6, 16: 3}  # about as many tokens


def compare(bench: Any, turns: int, device: str, config: Any = MODEL) -> dict[str, Any]:
    workload = Workload(TRAJECTORIES[turns], turns)
    if not bench.measuring:
        workload = Workload(2, turns, prompt=(12, 20), action=(8, 14), info=(12, 24))
        small = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "vocab_size": 256}
        config = replace(config, num_hidden_layers=2, **small)
    task = Task.draw(workload, policy(config, device))
    expected: dict[str, float] = {}

    def check(found: dict[str, float]) -> None:
        """Of the same function: the first step's loss and norm of the gradients."""
        tolerance = 1e-3 if config.dtype == "auto" else 3e-2
        for name, value in found.items():
            assert value == pytest.approx(expected.setdefault(name, value), rel=tolerance, abs=1e-5), name

    def finite(found: dict[str, float]) -> None:
        assert found["norm"] > 0

    rows = {
        ROWS: (eager_loss, True),
        f"{ROWS}, our loss": (fused_loss, True),
        f"{ROWS}, verl's log-probs": (verl_loss, True),
        f"{ROWS}, TRL's log-probs": (trl_loss, True),
        "per-turn rows, padded": (eager_loss, False),
    }
    candidates = [
        Candidate(ONE_COPY, learner(task, "carry"), finite),
        Candidate(BLOCKS, learner(task, "reencode"), check),
        *(
            Candidate(name, per_turn_rows(task, loss, packed=packed), check, peer=True)
            for name, (loss, packed) in rows.items()
        ),
    ]
    title = (
        f"one PPO step on {device}, {config.num_hidden_layers} layers x {config.hidden_size}, vocabulary "
        f"{config.vocab_size:,}, {workload}, {task.labels} policy tokens"
    )
    results: dict[str, Any] = bench.compare(title, candidates, device=device, budget_s=20, min_rounds=3)
    if bench.measuring:
        for name, count in task.fed().items():
            bench.fact(f"tokens fed, {name}", count)
    return results


@pytest.mark.parametrize("turns", sorted(TRAJECTORIES))
def test_train_step(bench: Any, turns: int) -> None:
    results = compare(bench, turns, "cpu")
    bench.goal_speedup(results, ONE_COPY, ROWS, 1.6)
    bench.goal_speedup(results, BLOCKS, ROWS, 1.2)


@pytest.mark.parametrize("turns", sorted(TRAJECTORIES))
def test_gpu_train_step(bench: Any, device: str, turns: int) -> None:
    large = replace(
        MODEL,
        vocab_size=151_936,
        num_hidden_layers=8,
        hidden_size=896,
        num_attention_heads=14,
        intermediate_size=4864,
        dtype="bfloat16",
    )
    compare(bench, turns, device, large)
