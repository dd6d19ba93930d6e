"""clipped_value_loss: what PPO's critic learns from."""

from __future__ import annotations

import torch
from torch import Tensor

from mem1_core import reference
from mem1_core._head import check_normalizer
from mem1_core.backend import check_whole, describe


def clipped_value_loss(
    value: Tensor,
    old_value: Tensor,
    returns: Tensor,
    mask: Tensor,
    clip: float = 0.5,
    normalizer: float | Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    r"""PPO's value loss over the tokens of `mask`. Differentiable in value. Plain PyTorch on any device.

    .. math:: \ell = \tfrac12 \max\left((V - R)^2, (\operatorname{clip}(V, V_{\text{old}} \pm c) - R)^2\right)

    (as in OpenAI's baselines and verl). Some numbers a token: next to the matrix products of a step it costs
    nothing, so there is no kernel.

    Args:
        value, old_value, returns: floating point, of one shape; only the first gets a gradient.
        mask: bool, of the same shape.
        clip: c, >= 0.
        normalizer: what the sum is divided by; the tokens of the mask when None. Give the whole batch's where
            it is split.

    Returns:
        The loss, float32 (float64 for float64) [], and the fraction of the tokens where the clipped term was
        the larger. No tokens: 0 and 0.

    Raises:
        TypeError, ValueError: an argument that is not as above; the message names it.

    Equivalent to:
        >>> bounded = value.clamp(old_value - clip, old_value + clip)
        >>> loss = torch.maximum((value - returns) ** 2, (bounded - returns) ** 2)[mask].mean() / 2
    """
    check_whole(value=value, old_value=old_value, returns=returns, mask=mask)
    for name, x in (("value", value), ("old_value", old_value), ("returns", returns), ("mask", mask)):
        if not isinstance(x, Tensor) or not (
            x.dtype == torch.bool if name == "mask" else x.is_floating_point()
        ):
            kind = "bool" if name == "mask" else "floating point"
            raise TypeError(f"{name}: expected a {kind} tensor, got {describe(x)}")
        if x.shape != value.shape or x.device != value.device:
            raise ValueError(
                f"{name}: expected shape and device of value, {list(value.shape)} on {value.device}, got "
                f"{list(x.shape)} on {x.device}"
            )
    if not isinstance(clip, (int, float)) or not clip >= 0:
        raise ValueError(f"clip: expected a number >= 0, got {clip!r}")
    check_normalizer(normalizer, value.device)
    return reference.clipped_value_loss(value, old_value, returns, mask, clip, normalizer)
