"""AdamW with fp32 masters, and what it does with numbers that are not finite."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from mem1.train.optim import AdamW, Diverged, not_finite

BETAS = (0.9, 0.95)


def linear(dtype: torch.dtype) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(64, 64).to(dtype)


def drive(model: nn.Linear, optimizer: AdamW, steps: int, rate: float) -> None:
    x = torch.randn(32, 64, generator=torch.Generator().manual_seed(1)).to(model.weight.dtype)
    for _ in range(steps):
        (model(x).float() - 1).square().mean().backward()
        optimizer.step(rate)


def test_fp32_is_torch_adamw():
    ours, theirs = linear(torch.float32), linear(torch.float32)
    optimizer = AdamW(ours.parameters(), betas=BETAS, max_grad_norm=0.1)
    drive(ours, optimizer, 5, 1e-2)
    plain = torch.optim.AdamW(theirs.parameters(), 1e-2, betas=BETAS, weight_decay=0.0)
    x = torch.randn(32, 64, generator=torch.Generator().manual_seed(1))
    for _ in range(5):
        plain.zero_grad()
        (theirs(x) - 1).square().mean().backward()
        nn.utils.clip_grad_norm_(theirs.parameters(), 0.1)
        plain.step()
    assert torch.equal(ours.weight, theirs.weight) and torch.equal(ours.bias, theirs.bias)
    assert optimizer.steps == 5


def test_small_steps_of_bf16_weights_are_not_lost():
    """At 1e-6 a step is far below the resolution of a bf16 weight: a thousand of them are not."""
    model, exact = linear(torch.bfloat16), linear(torch.bfloat16).float()
    start = model.weight.detach().float().clone()
    optimizer = AdamW(model.parameters(), betas=BETAS)
    drive(model, optimizer, 500, 1e-6)
    drive(exact, AdamW(exact.parameters(), betas=BETAS), 500, 1e-6)
    assert all(master.dtype == torch.float32 for master in optimizer.masters)
    moved = optimizer.masters[0].detach() - start
    wanted = exact.weight.detach() - start
    assert float((moved - wanted).norm() / wanted.norm()) < 0.05
    assert torch.equal(model.weight, optimizer.masters[0].to(torch.bfloat16))
    state = optimizer.inner.state[optimizer.masters[0]]
    assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_a_step_will_take_is_known_before_it(dtype):
    model = linear(dtype)
    model.bias.requires_grad_(False)
    optimizer, count = AdamW(model.parameters(), betas=BETAS), 64 * 64
    gradients = 4 * count + (2 * count if dtype == torch.bfloat16 else 0)  # and one of the backward's own
    assert optimizer.bytes_to_come == gradients + 2 * 4 * count
    drive(model, optimizer, 1, 1e-3)
    assert optimizer.bytes_to_come == gradients  # the moments stay
    state = optimizer.inner.state[optimizer.masters[0]]
    assert sum(t.nbytes for t in state.values() if t.dim()) == 2 * 4 * count


def test_micro_batches_of_bf16_add_up_in_fp32():
    model = linear(torch.bfloat16)
    optimizer = AdamW(model.parameters(), betas=BETAS)
    x = torch.randn(256, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    wanted = torch.zeros(64, 64)
    for row in x:  # each gradient is a bf16 tensor, their sum is not
        other = copy.deepcopy(linear(torch.bfloat16))
        (other(row[None]).float().sum() / 256).backward()
        wanted += other.weight.grad.float()
        (model(row[None]).float().sum() / 256).backward()
        optimizer.collect()
        assert model.weight.grad is None
    torch.testing.assert_close(optimizer.masters[0].grad, wanted, atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e30])
def test_a_gradient_without_a_finite_norm_takes_no_step(bad):
    model = linear(torch.float32)
    optimizer = AdamW(model.parameters(), betas=BETAS)
    drive(model, optimizer, 1, 1e-2)
    before = copy.deepcopy((model.state_dict(), optimizer.inner.state_dict()))
    for expected in (1, 2):
        model.weight.grad = torch.full_like(model.weight, bad)
        assert not math.isfinite(optimizer.step(1e-2))
        assert optimizer.skipped == expected and optimizer.steps == 1
    assert model.weight.grad is None
    torch.testing.assert_close(model.state_dict(), before[0], rtol=0, atol=0)
    drive(model, optimizer, 1, 1e-2)  # one that is sound ends the row
    assert optimizer.skipped == 0
    for _ in range(2):
        model.weight.grad = torch.full_like(model.weight, bad)
        optimizer.step(1e-2)
    model.weight.grad = torch.full_like(model.weight, bad)
    with pytest.raises(
        Diverged, match="gradients: expected finite ones, got a norm of (nan|inf) 3 steps in a row"
    ):
        optimizer.step(1e-2)
    assert not not_finite(model.named_parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_loaded_state_goes_on_as_the_saved_one(dtype):
    model = linear(dtype)
    optimizer = AdamW(
        [{"params": [model.weight], "weight_decay": 0.1}, {"params": [model.bias]}], betas=BETAS
    )
    drive(model, optimizer, 3, 1e-3)
    other = copy.deepcopy(linear(dtype))
    other.load_state_dict(model.state_dict())
    loaded = AdamW([{"params": [other.weight], "weight_decay": 0.1}, {"params": [other.bias]}], betas=BETAS)
    known = {name: value.clone() for name, value in optimizer.tensors(dict(model.named_parameters())).items()}
    assert any(name.endswith(".master") for name in known) == (dtype == torch.bfloat16)
    for name, value in loaded.tensors(dict(other.named_parameters()), known).items():
        value.copy_(known[name])
    loaded.restore(optimizer.values())
    drive(model, optimizer, 3, 1e-3)
    drive(other, loaded, 3, 1e-3)
    assert torch.equal(model.weight, other.weight) and torch.equal(model.bias, other.bias)
    assert loaded.steps == 6


def test_an_optimizer_leaves_nothing_on_the_model():
    """A second one, as PPO's after the warm start's, finds its gradients."""
    model = linear(torch.bfloat16)
    drive(model, AdamW(model.parameters(), betas=BETAS), 1, 1e-2)
    second = AdamW(model.parameters(), betas=BETAS)
    model(torch.ones(1, 64).bfloat16()).sum().backward()
    assert second.step(1e-2) > 0


def test_frozen_parameters_take_no_part():
    model = linear(torch.bfloat16)
    model.bias.requires_grad_(False)
    optimizer = AdamW(model.parameters(), betas=BETAS)
    assert len(optimizer.masters) == 1
    bias = model.bias.clone()
    drive(model, optimizer, 2, 1e-1)
    assert torch.equal(model.bias, bias)


def test_what_is_not_finite_is_named():
    model = linear(torch.float32)
    assert not_finite(model.named_parameters()) == ""
    with torch.no_grad():
        model.bias[3] = math.inf
    assert not_finite(model.named_parameters()) == "bias"
