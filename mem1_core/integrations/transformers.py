"""Trajectory attention inside any Hugging Face decoder that uses the attention interface.

    from mem1_core.integrations import transformers as mem1_transformers
    mem1_transformers.register()
    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="mem1")
    mem1_transformers.check_model(model)
    logits = model(input_ids, position_ids=position_ids, mem1_mask=mask, use_cache=False).logits

With `mem1_mask` (a `TrajectoryMask`) every layer runs `mem1_core.ops.trajectory_attention`; with `mem1_cache`
(a `LayerCache`) it hands over to that, as a rollout engine with a KV cache of its own wants it; without
either the model behaves exactly as with `attn_implementation="sdpa"`, or, where that would drop a soft cap or
sinks, as with "eager". So one model object serves all.

Windows, soft caps, sinks and values of another size are the layers' own. A layer that is more than that
refuses the mask, and so does a model whose config tells of layers that are not attention. `check_model` finds
the models that would drop the mask without a word, `check_cache` those that a cache cannot follow.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
import transformers
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from mem1_core.integrations.scores import Scores, dense_attention
from mem1_core.mask import TrajectoryMask
from mem1_core.ops import trajectory_attention
from mem1_core.versions import warn_if_untested

warn_if_untested(transformers)

NAME = "mem1"
_LAYER_TYPES = {"full_attention", "sliding_attention"}

# What a model's code raises that meets an argument it has no use for.
_OF_A_MODEL = (
    ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, RuntimeError, TypeError,
)  # fmt: skip


class LayerCache(Protocol):
    """A KV cache that does the attention over itself."""

    def attend(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, scores: Scores) -> Tensor:
        """Store key and value [B, Hkv, N, D] of the layer `module.layer_idx` and attend to what is there:
        query [B, Hq, N, D] -> [B, N, Hq, D of the values].
        """
        ...


def register() -> None:
    """Make `attn_implementation="mem1"` known to transformers. May be called any number of times."""
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, deferred_mask)


@torch.no_grad()
def check_model(model: PreTrainedModel) -> None:
    """Raise ValueError, with the reason, unless `mem1_mask` rules all that passes between tokens of `model`.

    For the start of a training run: a layer that cannot work says so itself, but a model can also take
    `mem1_mask` and drop it, as each does that runs another attention implementation. So this tries: two rows
    of three tokens, one of them NaN, which the mask hides from the others in the one row and causality in the
    other; and whether `position_ids`, which packed trajectories need, count from 0. Two small forwards; the
    model, its gradients and torch's random numbers stay as they are. What else a model's code raises on the
    way (on meeting a mask that it wants to compute with, say) is chained to the ValueError. TypeError for
    what is no model.
    """
    if not isinstance(model, torch.nn.Module) or not hasattr(model, "config"):
        raise TypeError(f"model: expected a model of transformers, got {type(model).__name__}")
    name = type(model).__name__
    config = model.config.get_text_config()
    problem = config_problem(config)
    if problem is None and not model._supports_attention_backend:
        problem = (
            "expected attention through the AttentionInterface of transformers, got a model with its own"
        )
    if problem:
        raise ValueError(f"mem1_mask in {name}: {problem}")
    if config._attn_implementation != NAME:
        raise ValueError(
            f"{name}: expected attn_implementation={NAME!r}, got {config._attn_implementation!r}"
        )
    with _refusing(f"mem1_mask in {name}: expected a forward that runs with it"):
        embedding: Any = model.get_input_embeddings()
        device = next(embedding.parameters()).device
        hidden = torch.tensor([[True, False, False], [False, False, True]], device=device)
        mask = TrajectoryMask.from_evict(torch.tensor([1, 3, 3], device=device))
        places = torch.arange(3, device=device).expand(2, 3)
        with _nan_at(embedding, hidden):
            out, placed = (
                _repeatable(model, hidden, mem1_mask=mask, use_cache=False, **positions)
                for positions in ({}, {"position_ids": places})
            )
    if not torch.equal(out.isnan().any(-1), hidden.to(out.device)):
        raise ValueError(f"mem1_mask in {name}: expected a model that heeds it, got one that ignores it")
    rounding = 0.01 * float(out.nan_to_num().abs().max())
    if not torch.allclose(out, placed, rtol=0, atol=rounding, equal_nan=True):
        raise ValueError(f"position_ids in {name}: expected some that count from 0, got others by default")


@contextmanager
def _nan_at(embedding: nn.Module, hidden: Tensor) -> Iterator[None]:
    """What the embedding says of the tokens in bool [B, N] is NaN. (Models that look up more by a token's id
    want to be given ids.)
    """

    def hide(module: nn.Module, given: Any, embeds: Tensor) -> Tensor:
        return embeds.masked_fill(hidden.to(embeds.device)[..., None], torch.nan)

    handle = embedding.register_forward_hook(hide)
    try:
        yield
    finally:
        handle.remove()


def _repeatable(model: PreTrainedModel, like: Tensor, **settings: Any) -> Tensor:
    """Logits [B, N, V] of the first token of the vocabulary, with the same dropout in each call."""
    devices = {parameter.device for parameter in model.parameters()} - {torch.device("cpu")}
    with torch.random.fork_rng(devices, device_type=like.device.type):
        return model(torch.zeros_like(like, dtype=torch.int64), **settings)[0]


@torch.no_grad()
def check_cache(model: PreTrainedModel) -> None:
    """Raise ValueError, with the reason, unless a `LayerCache` can hold what `model` attends to.

    For the start of a rollout, after `check_model`: `mem1_cache` has to be asked once for each of the layers
    of `cache_shape`, with keys and values of its KV heads and head dim. A model that runs a layer twice, or
    splits or repeats heads before it attends, would overwrite or not fit what is stored. One small forward of
    `model.get_decoder()`, the way an engine calls it; whatever that raises is chained to the ValueError.
    """
    name = type(model).__name__
    layers, heads, dim = cache_shape(model.config)
    calls = _Calls()
    with _refusing(f"mem1_cache in {name}: expected a decoder that runs with it"):
        trunk: Any = model.get_decoder()
        device = next(trunk.parameters()).device
        ids = torch.zeros(1, 2, dtype=torch.int64, device=device)
        settings = {"position_ids": torch.arange(2, device=device)[None], "use_cache": False}
        nothing = ids.new_empty(1, 1, 0, 0, dtype=torch.bool)  # goes to the layers, which do not look at it
        out = trunk(ids, attention_mask=nothing, mem1_cache=calls, **settings)
        if getattr(out, "last_hidden_state", None) is None:
            raise TypeError(f"{type(trunk).__name__}'s output has no last_hidden_state")
    if len(calls.seen) != layers:
        raise ValueError(
            f"mem1_cache in {name}: expected {layers} layers that attend once each, "
            f"got {len(calls.seen)} calls"
        )
    for layer, seen in enumerate(calls.seen):
        if seen != (layer, heads, dim):
            expected = f"expected (layer, KV heads, head dim) {(layer, heads, dim)}"
            raise ValueError(f"mem1_cache in {name}: {expected}, got {seen}")


@contextmanager
def _refusing(expected: str) -> Iterator[None]:
    """What a model's own code raises becomes a ValueError; one that is a ValueError has its reason."""
    try:
        yield
    except (ValueError, torch.OutOfMemoryError):
        raise
    except _OF_A_MODEL as error:
        raise ValueError(f"{expected}, got {type(error).__name__}: {error}") from error


class _Calls:
    """A LayerCache that keeps nothing but who asked: (layer, KV heads, head dim)."""

    def __init__(self) -> None:
        self.seen: list[tuple[int | None, int, int]] = []

    def attend(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, scores: Scores) -> Tensor:
        dim = max(key.shape[3], value.shape[3])
        self.seen.append((getattr(module, "layer_idx", None), key.shape[1], dim))
        return value.transpose(1, 2).repeat_interleave(query.shape[1] // value.shape[1], dim=2)


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | DeferredMask | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    mem1_mask: TrajectoryMask | None = None,
    mem1_cache: LayerCache | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function of one layer.

    query [B, Hq, N, D], key and value [B, Hkv, S, D]; returns ([B, N, Hq, D], None). With `mem1_mask` S = N:
    a KV cache must be empty before the call. Without it the call is transformers' own
    `sdpa_attention_forward`, with soft caps or sinks `dense_attention`.

    Windows (`sliding_window`), soft caps (`softcap`), sinks (`s_aux`) and values of another size than the
    keys are the layer's own. Raises ValueError, naming the layer and the reason, when `mem1_mask` comes to a
    layer that is more than that (a bias, dropout), to a model that has other layers beside it (linear
    attention, state space, an encoder), with a filled cache, or together with an `attention_mask`.

    With `mem1_cache` the mask is its business (`attention_mask` is not looked at); the rest as above.
    """
    scores = Scores(
        query.shape[-1] ** -0.5 if scaling is None else scaling,
        kwargs.get("sliding_window"),
        kwargs.get("softcap"),
        kwargs.get("s_aux"),
    )
    if mem1_cache is not None:
        problem = _problem(module, query, key, None, dropout, kwargs)
        if problem:
            raise ValueError(f"mem1_cache in {_where(module)}: {problem}")
        return mem1_cache.attend(module, query, key, value, scores), None
    if mem1_mask is None:
        mask = attention_mask() if isinstance(attention_mask, DeferredMask) else attention_mask
        if scores.softcap is not None or scores.sinks is not None:  # which sdpa would drop
            return dense_attention(query, key, value, mask, scores, dropout), None
        return sdpa_attention_forward(
            module, query, key, value, mask, dropout=dropout, scaling=scaling, **kwargs
        )
    problem = _problem(module, query, key, attention_mask, dropout, kwargs)
    if problem:
        raise ValueError(f"mem1_mask in {_where(module)}: {problem}")
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    return trajectory_attention(q, k, v, mem1_mask, **scores._asdict()), None


def _where(module: nn.Module) -> str:
    layer = getattr(module, "layer_idx", None)
    return type(module).__name__ if layer is None else f"{type(module).__name__} (layer {layer})"


def config_problem(config: Any) -> str | None:
    """Why a model cannot run with the mask, whatever its attention layers are.

    Layers of another kind never call `attention_forward`: all it sees of them is the config that they share.
    """
    others = set(getattr(config, "layer_types", None) or ()) - _LAYER_TYPES
    if others:
        kinds, name = ", ".join(sorted(others)), type(config).__name__
        return f"expected full_attention or sliding_attention in all of {name}.layer_types, got {kinds}"
    if getattr(config, "is_encoder_decoder", False):
        return f"expected a decoder-only model, got is_encoder_decoder=True in {type(config).__name__}"
    return None


def _problem(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    attention_mask: Tensor | DeferredMask | None,
    dropout: float,
    kwargs: dict[str, Any],
) -> str | None:
    """Why this layer cannot run with the mask. Attributes and sizes only, so that it traces to nothing."""
    config = getattr(module, "config", None)
    if problem := config_problem(config):
        return problem
    if kwargs.get("position_bias") is not None:
        return "expected attention without a bias, got position_bias"
    is_causal = kwargs.get("is_causal")  # transformers lets the argument overrule the module
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True) and getattr(config, "is_causal", True)
    if not is_causal:
        return "expected causal self-attention, got is_causal=False"
    if dropout:
        return f"expected attention dropout 0, got {dropout}"
    if query.shape[2] != key.shape[2]:
        return (
            f"expected an empty KV cache or none, got {key.shape[2]} keys for {query.shape[2]} queries "
            "(use_cache=False makes none)"
        )
    if isinstance(attention_mask, DeferredMask):
        # What masks are made by and what the layer says: a cache has only the latter to go by.
        window = kwargs.get("sliding_window")
        if attention_mask.window != window:
            return f"expected the window of its masks, {attention_mask.window}, got sliding_window={window}"
        attention_mask = attention_mask.padding
    if attention_mask is not None:
        return (
            f"expected no attention_mask beside it, got one of shape {list(attention_mask.shape)} "
            "(mem1_mask says all of what is visible)"
        )
    return None


def cache_shape(config: Any) -> tuple[int, int, int]:
    """Layers, KV heads and head dim of a decoder's KV cache; where values are narrower than keys, the keys'.

    Latent attention (DeepSeek-V2, arXiv 2405.04434) is cached expanded: a key and a value of each head.
    Raises ValueError for layers that differ.
    """
    config = config.get_text_config(decoder=True)
    if varies := varying_shape(config):
        raise ValueError(
            f"mem1_cache in {type(config).__name__}: expected layers alike, got some with another {varies}"
        )
    if getattr(config, "kv_lora_rank", None) and getattr(config, "qk_rope_head_dim", None):
        dim = config.qk_nope_head_dim + config.qk_rope_head_dim
        return config.num_hidden_layers, config.num_attention_heads, max(dim, config.v_head_dim)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return config.num_hidden_layers, heads, dim


def varying_shape(config: Any) -> str:
    """What of a layer's cache differs between the layers of a decoder, by the names of its fields."""
    varying = getattr(config, "per_layer_attributes", None) or ()
    return ", ".join(sorted({"head_dim", "num_key_value_heads"} & {*varying}))


def has_windows(config: Any) -> bool:
    """Whether a layer of a decoder may see a window only: some do though `layer_types` lists none."""
    return (getattr(config.get_text_config(decoder=True), "sliding_window", None) or 0) > 0


def deferred_mask(**kwargs: Any) -> DeferredMask | Tensor | None:
    """The mask function: `sdpa_mask`, at once for models that cannot run with `mem1_mask`, else later.

    transformers makes masks before the layers run and does not show `mem1_mask` to this function. Deferring
    keeps a training step free of any [N, N] tensor and leaves every other use of the model as it is under
    "sdpa". (A 4D mask given by the caller never comes here: transformers passes it straight to the layers.)
    """
    return sdpa_mask(**kwargs) if config_problem(kwargs.get("config")) else DeferredMask(kwargs)


class DeferredMask:
    """What `sdpa_mask` makes of its arguments, made by the first layer that asks for it."""

    def __init__(self, kwargs: dict[str, Any]) -> None:
        self.padding: Tensor | None = kwargs.get("attention_mask")
        self.window: int | None = kwargs.get("local_size")
        self._kwargs = kwargs
        self._made: tuple[Tensor | None] | None = None

    def __call__(self) -> Tensor | None:
        if self._made is None:
            self._made = (sdpa_mask(**self._kwargs),)
        return self._made[0]

    def __getattr__(self, name: str) -> Any:
        expected = "layers that hand attention_mask on to the attention as it is"
        raise AttributeError(
            f"attn_implementation={NAME!r}: expected {expected}, got one that reads its {name}"
        )
