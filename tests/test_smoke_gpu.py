"""One small case of each kernel that runs on a GPU, against the reference: the first thing to try on a new
machine. On the CPU the same cases keep this file true.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from mem1_core.layout import TrajectoryLayout
from mem1_core.mask import TrajectoryMask
from mem1_core.ops import (
    fused_linear_ppo_loss,
    gae,
    linear_logprob,
    prune_kv_cache_,
    prune_paged_kv_cache_,
    trajectory_attention,
)
from mem1_core.sample_inputs import attention_inputs, mem1_segments

pytestmark = [
    pytest.mark.smoke,
    pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]),
]
BACKENDS = ("auto", "reference")


def mask_on(device: str) -> TrajectoryMask:
    return TrajectoryLayout.from_segments(mem1_segments(3, prompt=150)).mask.to(device)


def close(got: list[Tensor], exact: list[Tensor], tolerance: float) -> None:
    for one, other in zip(got, exact, strict=True):
        scale = max(1.0, float(other.double().abs().max()))
        torch.testing.assert_close(one.double(), other.double(), rtol=0, atol=tolerance * scale)


def test_tile_plan(device: str) -> None:
    made = mask_on(device)
    exact = TrajectoryMask.from_evict(made.evict_at.cpu()).tile_plan(128, 128)
    plan = made.tile_plan(128, 128)
    assert torch.equal(plan.key_ranges.cpu(), exact.key_ranges)
    for name in ("full", "partial"):
        offsets, tiles = (getattr(plan, f"{name}_{part}").cpu() for part in ("offsets", "tiles"))
        assert torch.equal(offsets, getattr(exact, f"{name}_offsets"))
        assert torch.equal(tiles[: offsets[-1]], getattr(exact, f"{name}_tiles")[: offsets[-1]])


def test_attention_forward(device: str) -> None:
    mask = mask_on(device)
    q, k, v = attention_inputs(1, mask.shape[1], 4, 2, 128, dtype=torch.bfloat16, device=device)
    made, exact = (
        trajectory_attention(q, k, v, mask, return_lse=True, backend=backend) for backend in BACKENDS
    )
    close(list(made), list(exact), 0.02)


def test_attention_backward(device: str) -> None:
    mask = mask_on(device)
    results = []
    for backend in BACKENDS:
        inputs = attention_inputs(
            1, mask.shape[1], 4, 2, 128, dtype=torch.bfloat16, device=device, requires_grad=True
        )
        out = trajectory_attention(*inputs, mask, backend=backend)
        results.append(list(torch.autograd.grad(out.float().square().sum(), inputs)))
    close(*results, 0.03)


def of_each_backend(make: Callable[[], dict[str, Tensor]], call: Callable[..., Tensor], *read: str) -> None:
    """`call` gives the same with either backend, and leaves the same in the arguments `read`."""
    results = []
    for backend in BACKENDS:
        arguments = make()
        lengths = call(**arguments, backend=backend)
        results.append((lengths, *(arguments[name] for name in read)))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


def test_prune_kv_cache(device: str) -> None:
    def make() -> dict[str, Tensor]:
        torch.manual_seed(0)
        kv = torch.randn(3, 2, 2, 64, 2, 64).to(device, torch.bfloat16)
        keep = torch.ones(2, 64, dtype=torch.bool, device=device)
        keep[:, 9:30] = False
        return {"kv": kv, "keep": keep, "lengths": torch.tensor([64, 64], device=device)}

    def call(kv: Tensor, keep: Tensor, lengths: Tensor, backend: str) -> Tensor:
        made = prune_kv_cache_(kv, keep, lengths, backend=backend)
        kv[:, :, :, 43:] = 0  # past the new length anything may stand
        return made

    of_each_backend(make, call, "kv")


def test_prune_paged_kv_cache(device: str) -> None:
    made = []
    for backend in BACKENDS:
        torch.manual_seed(0)
        kv = torch.randn(2, 2, 8, 16, 2, 64).to(device, torch.bfloat16)
        table = torch.arange(8, dtype=torch.int32, device=device).view(2, 4)
        keep = torch.ones(2, 64, dtype=torch.bool, device=device)
        keep[:, 9:30] = False
        result = prune_paged_kv_cache_(
            kv, keep, table, torch.tensor([64, 64], device=device), gaps="close", backend=backend
        )
        made.append([result.lengths, table[:, :2], kv[:, :, table[0, :2].long()]])
    for one, other in zip(*made, strict=True):
        assert torch.equal(one, other)


def output_layer(device: str) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    hidden, weight = torch.randn(40, 64, device=device), torch.randn(500, 64, device=device)
    return hidden.requires_grad_(), weight.requires_grad_(), torch.randint(500, (40,), device=device)


def test_linear_logprob(device: str) -> None:
    results = []
    for backend in BACKENDS:
        hidden, weight, target = output_layer(device)
        logprob, entropy = linear_logprob(hidden, weight, target, backend=backend)
        gradients = torch.autograd.grad((logprob * 2 + entropy).sum(), (hidden, weight))
        results.append([logprob.detach(), entropy.detach(), *gradients])
    close(*results, 1e-3)


def test_fused_linear_ppo_loss(device: str) -> None:
    results = []
    for backend in BACKENDS:
        hidden, weight, target = output_layer(device)
        old = linear_logprob(hidden, weight, target, backend="reference")[0].detach() + 0.1
        advantage = torch.linspace(-1, 1, 40, device=device)
        loss, _ = fused_linear_ppo_loss(
            hidden, weight, target, old, advantage, torch.ones_like(target, dtype=torch.bool), backend=backend
        )
        results.append([loss.detach(), *torch.autograd.grad(loss, (hidden, weight))])
    close(*results, 1e-3)


def test_gae(device: str) -> None:
    torch.manual_seed(0)
    reward, value = torch.randn(2, 5, 70, device=device)
    mask = torch.rand(5, 70, device=device) < 0.6
    made, exact = (gae(reward, value, mask, 0.9, 0.8, backend=backend) for backend in BACKENDS)
    close([x[mask] for x in made], [x[mask] for x in exact], 1e-5)
