"""fused_linear_ppo_loss, linear_logprob and gae: time and memory.

Peers over the vocabulary: eager PyTorch and torch.compile of it; TRL's log-probs in chunks, Liger's scaled
cross-entropy and cut cross-entropy, each followed by the same loss in plain PyTorch; and the matrix
products alone, below which nothing gets that forms logits. FLOPs are those of these products, 2 T H V forward
and 6 T H V with gradients, whatever a row really computes. Whoever takes gradients returns d_hidden and
d_weight: memory beyond these is a figure of its own.

gae against the loop over time steps in plain PyTorch. GB/s count what it has to read and write.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from measure import Candidate, Result, speedup
from ppo_loss_task import BARE, BOTH, EAGER, FORWARD, OURS, PPO, RECOMPUTED, Shape, Task
from torch import Tensor

from mem1_core import reference
from mem1_core.ops import gae
from mem1_core.testing import assert_accurate

MIB = 2**20
# The output layers of Qwen2.5-0.5B, and of an 8B model with a vocabulary that suits the hardware.
FULL = {
    "cpu": Shape(512, 896, 151_936, torch.float32),
    "cpu bf16": Shape(512, 896, 151_936, torch.bfloat16),
    "gpu": Shape(8_192, 4_096, 131_072, torch.bfloat16),
}
QUICK = {
    "cpu": Shape(37, 48, 1_003, torch.float32),
    "cpu bf16": Shape(37, 48, 1_003, torch.bfloat16),
    "gpu": Shape(130, 64, 1_000, torch.bfloat16),
}
BEYOND = "beyond gradients MiB"
GPU_BUDGET_S = 1.5


def measure(bench: Any, work: str, place: str, device: str) -> tuple[Task, dict[str, Result]]:
    """One table, with a column of the peak memory beyond the gradients."""
    task = Task(work, (FULL if bench.measuring else QUICK)[place], device, bench.measuring)
    results = bench.compare(
        task.title(),
        task.candidates(),
        flops=task.flops,
        dtype=task.shape.dtype,
        device=device,
        # On the CPU a call takes seconds: two or three rounds.
        budget_s=10.0 if device == "cpu" else GPU_BUDGET_S,
        min_rounds=3 if work == PPO else 2,
    )
    if bench.measuring and work != FORWARD:
        for name, result in results.items():
            over = beyond(task, result)
            if over is not None:
                bench.columns(name)[BEYOND] = over / MIB
                bench.print(f"  {name}: {over / MIB:,.1f} MiB beyond the gradients")
    return task, results


def beyond(task: Task, result: Result) -> int | None:
    return None if result.peak_bytes is None else result.peak_bytes - task.gradient_bytes


def goal_at_most(bench: Any, text: str, ours: float | None, theirs: float | None, target: float) -> None:
    ratio = ours / theirs if ours is not None and theirs else None
    bench.goal(text, ratio, target, at_most=True)


def test_ppo_loss(bench: Any) -> None:
    task, results = measure(bench, PPO, "cpu", "cpu")
    if not bench.measuring:
        return
    ours, eager = results[OURS[PPO]], results[EAGER]
    goal_at_most(bench, "time, of eager's", 1.0, speedup(ours, eager), 0.75)
    memory = beyond(task, ours), beyond(task, eager)
    goal_at_most(bench, "memory beyond the gradients, of eager's", *memory, 0.25)
    for name, peer in results.items():
        if peer.seconds and name not in (OURS[PPO], RECOMPUTED, BARE):
            bench.goal_speedup(results, OURS[PPO], name, 1)


@pytest.mark.parametrize("place", ["cpu", "cpu bf16"])
@pytest.mark.parametrize("work", [FORWARD, BOTH])
def test_logprob(bench: Any, work: str, place: str) -> None:
    task, results = measure(bench, work, place, "cpu")
    if not bench.measuring:
        return
    for name, peer in results.items():
        # In bf16 the peers round their logits to it, which halves what they write: no goal, only figures.
        if peer.seconds and name not in (OURS[work], BARE) and task.shape.dtype == torch.float32:
            bench.goal_speedup(results, OURS[work], name, 1)


def test_gpu_ppo_loss(bench: Any, device: str) -> None:
    task, results = measure(bench, PPO, "gpu", device)
    if not bench.measuring:
        return
    ours = results[OURS[PPO]]
    goal_at_most(bench, "time, of the matrix products alone", 1.0, speedup(ours, results[BARE]), 1.15)
    allowed = 2 * task.hidden.numel() + 4 * task.weight.numel() + 512 * MIB
    text = "peak memory: d_hidden, d_weight in fp32 and 512 MiB"
    peak = ours.peak_bytes and ours.peak_bytes / MIB
    bench.goal(text, peak, allowed / MIB, at_most=True, unit=" MiB")


@pytest.mark.parametrize("work", [FORWARD, BOTH])
def test_gpu_logprob(bench: Any, device: str, work: str) -> None:
    measure(bench, work, "gpu", device)
    if bench.measuring and work == FORWARD:
        share = bench.columns(OURS[work]).get("of peak")  # of the best matrix product in the same rounds
        bench.goal(
            "linear_logprob forward, of the matrix product's speed", share and 100 * share, 75, unit=" %"
        )


def measure_gae(bench: Any, device: str) -> dict[str, Result]:
    batch, tokens = (64, 2_048) if bench.measuring else (5, 70)
    generator = torch.Generator(device).manual_seed(0)
    reward, value = torch.randn(2, batch, tokens, generator=generator, device=device)
    # The policy wrote 3 pieces of 16 tokens in 5, and rows end where they end.
    pieces = torch.arange(tokens, device=device) // 16 % 5 < 3
    ends = torch.randint(tokens // 2, tokens + 1, (batch, 1), generator=generator, device=device)
    mask = pieces & (torch.arange(tokens, device=device) < ends)
    given = reward, value, mask, 0.99, 0.95
    plain = reference.gae(*given)
    exact = reference.gae(reward.double(), value.double(), *given[2:])

    def check(results: tuple[Tensor, Tensor]) -> None:
        for name, got, eager, expected in zip(("advantage", "returns"), results, plain, exact, strict=True):
            assert_accurate(got, eager, expected, name=name)

    candidates = [
        Candidate("gae", partial(gae, *given), check),
        Candidate("a loop in PyTorch", partial(reference.gae, *given), check),
    ]
    where = "" if device == "cpu" else f" on {device}"
    title = f"gae{where}, float32, B {batch}, T {tokens:,}, {mask.float().mean():.0%} of them the policy's"
    moved = sum(x.numel() * x.element_size() for x in (reward, value, mask, *plain))
    return bench.compare(title, candidates, moved_bytes=moved, device=device, budget_s=GPU_BUDGET_S)


def test_gae(bench: Any) -> None:
    measure_gae(bench, "cpu")


def test_gpu_gae(bench: Any, device: str) -> None:
    measure_gae(bench, device)
