"""Which models an engine can play with: those whose log-probs a trainer recomputes."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from mem1.checks import InputError
from mem1.engine.output_layer import output_layer
from mem1_core.integrations.transformers import check_cache, check_model

_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3}  # of the largest logit
_HALF_TOLERANCE = 0.03


def check_policy(model: PreTrainedModel) -> None:
    """InputError, with the reason, for a model that an engine cannot run, or of which it would leave
    something out or could not repeat it: `check_model`, `check_cache`, and logits that are more than what
    `output_layer` says. Some forwards of three tokens.
    """
    check_repeatable(model)
    try:
        check_model(model)
        check_cache(model)
    except ValueError as error:
        raise InputError(str(error)) from None
    if model.get_output_embeddings() is None:
        raise InputError(f"model: expected one with an output layer, got {type(model).__name__}")
    config: Any = model.config.get_text_config(decoder=True)
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if rope in ("dynamic", "longrope"):
        raise InputError(f"model: expected frequencies that stay as they are, got rope_type={rope!r}")
    _check_logits(model)


def check_repeatable(model: nn.Module) -> None:
    """InputError where two forwards would not be the same."""
    if any(isinstance(m, nn.Dropout) and m.training and m.p > 0 for m in model.modules()):
        raise InputError("model: expected model.eval(), as it has dropout, got one in training mode")


@torch.inference_mode()
def _check_logits(model: PreTrainedModel) -> None:
    """Configurations name what is done to logits in many ways: this looks at them."""
    weight, bias, scale, cap = output_layer(model)
    ids = torch.arange(1, 4, device=weight.device)[None] % len(weight)  # 0 may be padding, whose state is 0
    hidden = cast(Any, model.get_decoder())(input_ids=ids, use_cache=False).last_hidden_state
    if hidden.dtype != weight.dtype:
        expected = f"an output layer in the dtype of what it reads, {hidden.dtype}"
        raise InputError(f"model: expected {expected}, got {weight.dtype}")
    own = model(input_ids=ids, use_cache=False).logits[0, -1].float()
    fits = hidden.shape[-1] == weight.shape[1]
    plain = nn.functional.linear(hidden[0, -1], weight, bias).float() if fits else own.new_zeros(0)
    plain = scale * (plain if cap is None else cap * (plain / cap).tanh())
    allowed = _TOLERANCE.get(weight.dtype, _HALF_TOLERANCE) * float(own.abs().max())
    if plain.shape != own.shape or not float((plain - own).abs().max()) <= allowed:
        expected = "logits that are hidden states times the output weight"
        raise InputError(f"model: expected {expected}, got others from {type(model).__name__}")
