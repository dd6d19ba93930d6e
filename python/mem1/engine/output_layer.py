"""What stands between hidden states and logits, the same for the engine and the trainer."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

_LOGITS_BYTES = 32 * 2**20  # at a time


class OutputLayer(NamedTuple):
    """`logits = scale * cap(hidden @ weight.T + bias)`; cap(x): `softcap * tanh(x / softcap)`, or x.

    A scale of logits is nothing but a temperature: where the log-probs of `logits / t` are wanted, those of
    `cap(hidden @ weight.T + bias) / temperature(t)` are the same.
    """

    weight: Tensor  # [V, H]
    bias: Tensor | None  # [V]
    scale: float = 1.0
    softcap: float | None = None

    def temperature(self, temperature: float) -> float:
        return temperature / self.scale

    @torch.no_grad()
    def likeliest(self, hidden: Tensor) -> Tensor:
        """int64 [n]: the likeliest token after each of hidden [n, H], some rows of logits at a time."""
        rows = max(1, _LOGITS_BYTES // (hidden.element_size() * len(self.weight)))
        logits = (torch.nn.functional.linear(part, self.weight, self.bias) for part in hidden.split(rows))
        return torch.cat([part.argmax(-1) for part in logits])


def output_layer(model: PreTrainedModel) -> OutputLayer:
    """Of a causal language model: Cohere multiplies its logits, Granite divides them, Gemma 2 caps them."""
    head: Any = model.get_output_embeddings()
    config: Any = model.config.get_text_config(decoder=True)
    times, over = (getattr(config, name, None) or 1.0 for name in ("logit_scale", "logits_scaling"))
    cap = getattr(config, "final_logit_softcapping", None)
    return OutputLayer(head.weight, getattr(head, "bias", None), times / over, cap)
