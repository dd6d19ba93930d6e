"""Linear layers of a forward on the CPU by mem1_core's block products, where torch's are slower."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

_LARGE = 2**18  # weights of a layer: of smaller ones a call costs more than the product
# Rows of hidden states, by measurement: weights of 4,864 x 896, 2 cores of an AMD EPYC (Zen 4, AVX2), torch
# against blocks. float32: 8 rows 2.0 and 1.4 ms, 32 rows 6.2 and 4.1, 1,024 rows 61 and 95; bfloat16 without
# instructions for it: 2.9 and 1.3, 12.2 and 3.1, 275 and 86.
_FLOAT32_ROWS = range(3, 33)
_BFLOAT16_ROWS = range(5, 2**31)


class BlockProducts(TorchFunctionMode):
    """Within it `linear` of float32, and of bfloat16 on a CPU that does not compute in it, goes by blocks for
    the numbers of rows where that is faster. Rounded as torch's: sums in float32, then to the dtype. For
    inference: it has no gradient.
    """

    def __init__(self) -> None:
        super().__init__()
        self._rows = {torch.float32: _FLOAT32_ROWS}
        if not torch.ops.mem1_core._linear_in_bfloat16():
            self._rows[torch.bfloat16] = _BFLOAT16_ROWS

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if function is F.linear and not kwargs and self._takes(*args[:2]):
            return _linear(*args)
        return function(*args, **(kwargs or {}))

    def _takes(self, x: Tensor, weight: Tensor) -> bool:
        if weight.numel() < _LARGE or weight.dtype != x.dtype or not weight.is_contiguous():
            return False
        return x.numel() // weight.shape[1] in self._rows.get(x.dtype, ())


def has_large_layers(model: nn.Module) -> bool:
    """Whether block products could be of use to it."""
    return any(isinstance(m, nn.Linear) and m.weight.numel() >= _LARGE for m in model.modules())


def product_bytes(model: nn.Module, tokens: int) -> int:
    """What a block product of so many rows takes beside its operands and its result: bfloat16 is multiplied
    and summed in float32.
    """
    weight = next(model.parameters())
    narrow = weight.dtype == torch.bfloat16 and not torch.ops.mem1_core._linear_in_bfloat16()
    if weight.device.type != "cpu" or not narrow:
        return 0
    layers = (m.weight.shape for m in model.modules() if isinstance(m, nn.Linear))
    return max((4 * tokens * (2 * wide + out) for out, wide in layers if out * wide >= _LARGE), default=0)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear`."""
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    out = rows.new_empty(len(rows), len(weight), dtype=torch.float32)
    torch.ops.mem1_core._linear_logits_(rows, weight, out)
    if bias is not None:
        out += bias
    return out.to(x.dtype).view(*x.shape[:-1], len(weight))
