"""Trajectory attention inside any Hugging Face decoder that uses the attention interface.

    from mem1_core.integrations import transformers as mem1_transformers
    mem1_transformers.register()
    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="mem1")
    hidden = model.model(input_ids, position_ids=position_ids, mem1_mask=mask,
    use_cache=False).last_hidden_state

With `mem1_mask` (a `TrajectoryMask`) every layer runs `mem1_core.ops.trajectory_attention`; without it the
model behaves exactly as with `attn_implementation="sdpa"`, so that one model object serves the trainer and a
rollout with a KV cache.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from mem1_core.ops import trajectory_attention
from mem1_core.trajectory import TrajectoryMask

NAME = "mem1"
_UNSUPPORTED = (
    "sliding_window",
    "softcap",
    "s_aux",
    "position_bias",
)  # what some decoders add to plain attention


def register() -> None:
    """Make `attn_implementation="mem1"` known to transformers. May be called any number of times."""
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, deferred_mask)


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | Callable[[], Tensor | None] | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    mem1_mask: TrajectoryMask | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function of one layer.

    query [B, Hq, N, D], key and value [B, Hkv, S, D]; returns ([B, N, Hq, D], None). With `mem1_mask` N = S
    and `attention_mask` must not be a tensor; without it the call is transformers' own
    `sdpa_attention_forward`. Raises ValueError for a layer that is more than plain causal attention (sliding
    window, soft cap, sinks, bias, dropout).
    """
    if mem1_mask is None:
        mask = attention_mask() if callable(attention_mask) else attention_mask
        return sdpa_attention_forward(
            module, query, key, value, mask, dropout=dropout, scaling=scaling, **kwargs
        )
    for name in _UNSUPPORTED:
        if kwargs.get(name) is not None:
            raise ValueError(
                f"attn_implementation='mem1' with mem1_mask cannot run a layer that uses {name} "
                f"(wanted None, got {type(kwargs[name]).__name__} in {type(module).__name__})"
            )
    if dropout:
        raise ValueError(
            f"attn_implementation='mem1' wants attention dropout 0 with mem1_mask, got {dropout}"
        )
    if isinstance(attention_mask, Tensor):
        raise ValueError(
            "pass either mem1_mask or attention_mask, not both: mem1_mask says all of what is visible"
        )
    out = trajectory_attention(
        query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), mem1_mask, scale=scaling
    )
    return out, None


def deferred_mask(**kwargs: Any) -> Callable[[], Tensor | None]:
    """The mask function: what `sdpa_mask` would build, built on the first layer that asks for it.

    transformers makes masks before the layers run and does not show `mem1_mask` to this function. Deferring
    keeps a training step free of any [N, N] tensor and leaves every other use of the model as it is under
    "sdpa". (A 4D mask given by the caller never comes here: transformers passes it straight to the layers.)
    """
    return cache(partial(sdpa_mask, **kwargs))
