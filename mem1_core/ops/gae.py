"""gae: generalised advantage estimation over the policy's tokens; and masked_whiten, for what comes of it."""

from __future__ import annotations

import math

import torch
from torch import Tensor, distributed

from mem1_core import _library, reference
from mem1_core.backend import check_whole, choose_backend, describe
from mem1_core.ops.logprob import AVAILABLE


def gae(
    reward: Tensor,
    value: Tensor,
    mask: Tensor,
    gamma: float = 1.0,
    lam: float = 1.0,
    *,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    r"""Advantages and returns over the masked-in tokens of ragged rows (Schulman et al. 2016, arXiv
    1506.02438).

    .. math:: A_t = r_t + \gamma V_{t+1} - V_t + \gamma \lambda A_{t+1}, \quad R_t = A_t + V_t

    where t + 1 is the next token of the mask: value and advantage are carried across what the environment
    wrote. After the last one both are 0. Without gradients.

    A reward on a token that the environment wrote (mask False) is not counted, and nothing says so: such a
    token is no step. Add what the environment pays there to the last of the policy's tokens before it,
    undecayed, as between the two no step has passed.

    Args:
        reward, value: floating point [B, T]; not read where the mask is False, NaN there does no harm.
        mask: bool [B, T], True for the policy's tokens.
        gamma, lam: finite numbers.
        backend: see `mem1_core.backend`. "cuda" is one launch.

    Returns:
        advantage and returns [B, T], float32 (float64 if one of reward and value is), 0 where the mask is
        False.

    Raises:
        TypeError, ValueError: an argument that is not as above; the message names it.
        NotImplementedError: no such backend for this device.

    Equivalent to:
        >>> for t in reversed(range(T)):
        ...     delta = reward[:, t] + gamma * next_value - value[:, t]
        ...     carried = torch.where(mask[:, t], delta + gamma * lam * carried, carried)
        ...     next_value = torch.where(mask[:, t], value[:, t], next_value)
        ...     advantage[:, t] = torch.where(mask[:, t], carried, 0)
    """
    check_whole(reward=reward, value=value, mask=mask)
    for name, x in (("reward", reward), ("value", value)):
        if not isinstance(x, Tensor) or x.dim() != 2 or not x.is_floating_point():
            raise TypeError(f"{name}: expected a floating point tensor [B, T], got {describe(x)}")
        _check_like(name, x, reward)
    _check_mask(mask, reward)
    for name, number in (("gamma", gamma), ("lam", lam)):
        if not isinstance(number, (int, float)) or not math.isfinite(number):
            raise ValueError(f"{name}: expected a finite number, got {number!r}")
    chosen = choose_backend("gae", reward, backend, AVAILABLE)
    if chosen == "reference":
        return reference.gae(reward, value, mask, gamma, lam)
    dtype = torch.promote_types(torch.promote_types(reward.dtype, value.dtype), torch.float32)
    return _library.ops.gae(reward.detach().to(dtype), value.detach().to(dtype), mask, gamma, lam)


def masked_whiten(
    values: Tensor,
    mask: Tensor,
    *,
    shift_mean: bool = True,
    eps: float = 1e-8,
    group: distributed.ProcessGroup | None = None,
) -> Tensor:
    r"""`values` with mean 0 and variance 1 over `mask`, 0 elsewhere. Plain PyTorch on any device.

    .. math:: y = (x - \mu) / \sqrt{\sigma^2 + \epsilon}, \quad \sigma^2 = \sum (x - \mu)^2 / (n - 1)

    Values that are all the same give exactly 0.

    Args:
        values: floating point, any shape.
        mask: bool, of the same shape.
        shift_mean: False: the mean is put back.
        eps: added to the variance, > 0.
        group: data-parallel ranks (`torch.distributed`) whose tokens count together: all call this, also one
            that has no token. None: this process by itself.

    Returns:
        float32 (float64 for float64), of the shape of values. Without gradients with a group.

    Raises:
        TypeError, ValueError: an argument that is not as above; the message names it.

    Equivalent to:
        >>> x = values[mask]
        >>> y[mask] = (x - x.mean()) * (x.var() + eps).rsqrt()
    """
    check_whole(values=values, mask=mask)
    if not isinstance(values, Tensor) or not values.is_floating_point():
        raise TypeError(f"values: expected a floating point tensor, got {describe(values)}")
    _check_mask(mask, values)
    if not isinstance(eps, (int, float)) or not eps > 0:
        raise ValueError(f"eps: expected a number > 0, got {eps!r}")
    if group is None:
        return reference.masked_whiten(values, mask, shift_mean=shift_mean, eps=eps)
    wide = values.detach().to(torch.promote_types(values.dtype, torch.float32))
    chosen = wide[mask].double()
    # Differences from one value of all ranks: exactly 0 where all are the same.
    origin = torch.cat([chosen, chosen.new_tensor([-math.inf])]).amax()
    distributed.all_reduce(origin, distributed.ReduceOp.MAX, group=group)
    chosen = chosen - origin
    count = torch.stack([chosen.new_tensor(chosen.numel()), chosen.sum()])
    distributed.all_reduce(count, group=group)
    mean = count[1] / count[0].clamp(min=1)
    spread = (chosen - mean).square().sum()
    distributed.all_reduce(spread, group=group)
    scale = (spread / (count[0] - 1).clamp(min=1) + eps).rsqrt()
    chosen = (chosen - mean) * scale + (0.0 if shift_mean else origin + mean)
    return torch.zeros_like(wide).masked_scatter(mask, chosen.to(wide.dtype))


def _check_like(name: str, x: Tensor, like: Tensor) -> None:
    if x.shape != like.shape or x.device != like.device:
        raise ValueError(
            f"{name}: expected {list(like.shape)} on {like.device}, got {list(x.shape)} on {x.device}"
        )


def _check_mask(mask: Tensor, like: Tensor) -> None:
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        raise TypeError(f"mask: expected a bool tensor {list(like.shape)}, got {describe(mask)}")
    _check_like("mask", mask, like)


torch.library.define(
    "mem1_core::gae",
    "(Tensor reward, Tensor value, Tensor mask, float gamma, float lam) -> "
    "(Tensor advantage, Tensor returns)",
)


@torch.library.impl("mem1_core::gae", ("cpu", "cuda"))
def _(reward: Tensor, value: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    given = reward.contiguous(), value.contiguous(), mask.contiguous(), gamma, lam
    return _library.on_current_stream(_library.ops._gae, reward.device, *given)


@torch.library.register_fake("mem1_core::gae")
def _(reward: Tensor, value: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    return tuple(reward.new_empty(reward.shape) for _ in range(2))  # type: ignore[return-value]
