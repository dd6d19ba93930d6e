"""How much an update computes: floating-point operations of matrix products and of attention's visible pairs.

Of a token a forward costs 2 operations a weight (Kaplan et al. 2020, arXiv 2001.08361), without embeddings;
of a pair that attention sees, 4 a dimension of each query head and layer; of a token that is predicted, 2 a
weight of the output layer. A backward costs as much for its inputs, and for the weights that learn again.
What is computed again is not counted.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple, cast

import torch
from torch import nn

from mem1_core.integrations.transformers import cache_shape
from mem1_core.layout import TrajectoryLayout

# TFLOP/s of dense products of bf16, as the makers have it; the first that the device's name has.
_PEAKS = {"H100 PCIe": 756.0, "H100 NVL": 835.0, "H100": 989.0, "H200": 989.0, "A100": 312.0}


class Work(NamedTuple):
    """Of forwards over streams of tokens."""

    rows: int  # tokens that are fed
    pairs: int  # of a query and a key that it sees
    labels: int  # tokens that are predicted

    @classmethod
    def of(cls, layouts: Iterable[TrajectoryLayout]) -> Work:
        return cls.sum(
            cls(layout.token_index.numel(), layout.mask.visible_pairs(), layout.targets.numel())
            for layout in layouts
        )

    @classmethod
    def sum(cls, works: Iterable[Work]) -> Work:
        return cls(*map(sum, zip(*works, strict=True)))


class Flops(NamedTuple):
    forward: float
    backward: float


def flops(trunk: nn.Module, work: Work, head: nn.Module | None = None) -> Flops:
    """Of a forward and its backward. trunk: a decoder of Hugging Face; head: the output layer, where its
    logits are made. A weight that does not learn costs its backward half.
    """
    config: Any = cast(Any, trunk).config.get_text_config(decoder=True)
    layers, kv_heads, head_dim = cache_shape(config)
    embedding = cast(Any, trunk).get_input_embeddings().weight
    matrices = [(p, work.rows) for p in trunk.parameters() if p.dim() > 1 and p is not embedding]
    if head is not None:
        matrices.append((cast(Any, head).weight, work.labels))
    products = sum(2.0 * p.numel() * rows for p, rows in matrices)
    learned = sum(2.0 * p.numel() * rows for p, rows in matrices if p.requires_grad)
    heads = getattr(config, "num_attention_heads", kv_heads)
    attention = 4.0 * heads * head_dim * layers * work.pairs
    return Flops(products + attention, products + learned + 2.0 * attention)


def peak_tflops(device: torch.device) -> float | None:
    """Of a GPU that is known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for known, peak in _PEAKS.items() if known in name), None)
