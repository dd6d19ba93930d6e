"""Ops under activation checkpointing: what they have saved may be made again once, and read once."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mem1_core import TrajectoryMask
from mem1_core.ops import fused_linear_ppo_loss, linear_logprob, trajectory_attention

T, H, V = 12, 16, 50
target = torch.arange(T) % V


def attention(x: Tensor, weight: Tensor) -> Tensor:
    q = (x @ weight[:H].T).view(1, T, 2, H // 2)
    mask = TrajectoryMask(torch.full((1, T), T, dtype=torch.int32))
    return trajectory_attention(q, q, q, mask)


def loss(x: Tensor, weight: Tensor) -> Tensor:
    zeros = torch.zeros(T)
    return fused_linear_ppo_loss(x, weight, target, zeros - 4, zeros + 1, torch.ones(T, dtype=torch.bool))[0]


OPS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "trajectory_attention": attention,
    "linear_logprob, both": lambda x, weight: sum(linear_logprob(x, weight, target)),
    "linear_logprob, logprob": lambda x, weight: linear_logprob(x, weight, target)[0],
    "linear_logprob, entropy": lambda x, weight: linear_logprob(x, weight, target)[1],
    "fused_linear_ppo_loss": loss,
}


def gradients(run: Callable[[Tensor, Tensor], Tensor]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(T, H, generator=generator, requires_grad=True)
    weight = torch.randn(V, H, generator=generator, requires_grad=True)
    return list(torch.autograd.grad(run(x, weight).sum(), (x, weight)))


@pytest.mark.parametrize("op", OPS)
def test_gradients_are_the_same_from_a_checkpoint(op: str) -> None:
    def run(x: Tensor, weight: Tensor) -> Tensor:
        found = checkpoint(OPS[op], x, weight, use_reentrant=False)
        assert isinstance(found, Tensor)
        return found

    for ours, plain in zip(gradients(run), gradients(OPS[op]), strict=True):
        assert torch.equal(ours, plain)


@pytest.mark.parametrize("op", OPS)
def test_each_saved_tensor_is_read_once(op: str) -> None:
    saved, read = [], []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda x: (saved.append(x.shape), x)[1], lambda x: (read.append(x.shape), x)[1]
    ):
        gradients(OPS[op])
    assert sorted(saved) == sorted(read)
