"""Low-rank adapters of a model's linear layers, by peft: LoRA (Hu et al. 2021, arXiv 2106.09685).

With them a layer computes W x + (alpha / rank) B A x; A and B learn, in float32, and nothing else. B begins
at zero, so the model is at first what it was; switched off, it is so again.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mem1.checks import InputError
from mem1.config import LoraConfig
from mem1.extras import extra


def add_adapters(model: nn.Module, config: LoraConfig, seed: int) -> None:
    """To the layers of `model`, a decoder of Hugging Face or its trunk, in place; A is drawn from `seed`.
    InputError for layers that it does not have.
    """
    with extra("lora", "lora.rank"):
        import peft
    targets = config.target_modules
    settings = peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        target_modules=targets if isinstance(targets, str) else list(targets),
    )
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            peft.inject_adapter_in_model(settings, model)
    except (ValueError, re.error) as error:
        raise InputError(
            f"lora.target_modules: expected layers of the model, got {targets!r}: {error}"
        ) from None
    output = getattr(model, "get_output_embeddings", lambda: None)()
    if hasattr(output, "base_layer"):  # whose weight the losses read
        raise InputError(f"lora.target_modules: expected no output layer among them, got {targets!r}")
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.data = parameter.data.float()


def adapted_layers(model: nn.Module) -> dict[str, Any]:
    """By name; empty for a model without adapters."""
    return {name: part for name, part in model.named_modules() if hasattr(part, "base_layer")}


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """The model as it was before it learned; for forwards without gradients."""
    layers = list(adapted_layers(model).values())
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


@torch.no_grad()
def norms(model: nn.Module) -> list[float]:
    """Of each weight, in float64: what tells a model from others, for which adapters were not made."""
    return [float(torch.linalg.vector_norm(p, dtype=torch.float64)) for p in model.parameters()]


@torch.no_grad()
def merged_weights(model: nn.Module) -> dict[str, Tensor]:
    """The state of the model that has the sums W + (alpha / rank) B A as its weights, in their dtype."""
    layers = adapted_layers(model)
    found = {
        name.replace(".base_layer.", "."): value
        for name, value in model.state_dict().items()
        if ".lora_" not in name
    }
    for name, layer in layers.items():
        (adapter,) = layer.active_adapters
        weight = layer.base_layer.weight
        delta = layer.get_delta_weight(adapter)
        found[f"{name}.weight"] = (weight.float() + delta.float()).to(weight.dtype)
    return found
