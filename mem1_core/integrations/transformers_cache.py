"""A KV cache of preallocated slots for plain Hugging Face models; it forgets entries in place.

    cache = SlotCache(model, batch=1, capacity=4096)
    logits = model(ids, **cache.kwargs).logits   # cache=cache; before transformers 5.24 past_key_values=cache
    cache.prune(keep)                            # bool [1, entries], all layers, one call
    logits = model(more, **cache.kwargs).logits  # positions go on where they were

`mem1_core.integrations.transformers_generate` has the decoding loop for `model.generate`.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Sequence
from numbers import Integral
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import Cache, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin
from transformers.modeling_outputs import BaseModelOutputWithPast

from mem1_core.integrations.transformers import NAME, cache_shape, config_problem, has_windows, varying_shape
from mem1_core.ops.kv_cache import Keep, Positions, prune_kv_cache_

# What a cache is called by models, `generate` and their outputs: transformers 5.24 renamed it.
CACHE = "cache" if "cache" in BaseModelOutputWithPast.__dataclass_fields__ else "past_key_values"


class SlotCache(Cache):
    """One slot per row of the batch, all layers in one tensor that is allocated once.

    Rows of equal length without padding (a batch of one, always) go through any model as they are:
    `model(ids, **cache.kwargs)`, where no layer has a window or nothing has left yet. For ragged rows, tokens
    padded on the right, or windows after a prune, it is `model(ids, **cache.forward_kwargs(counts))`, under
    the attention implementations "sdpa", "eager" and "mem1".

    kv: [L, 2, B, capacity, Hkv, D]. On the host: `lengths` int32 [B], the entries of each slot; `positions`
    int32 [B], the position id of a row's next token, which is not the length once entries have left;
    `entries` int32 [B, capacity], the position id of each entry; `run_lengths`, of each row how many tokens
    were given, written, given, ... (`prune_generate` keeps it).

    Raises ValueError for a model that is not a decoder of layers with full or windowed attention only, alike
    in heads and head dim, each with keys and values of its own.
    """

    def __init__(
        self,
        config_or_model: PreTrainedConfig | PreTrainedModel,
        batch: int,
        capacity: int,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        """`dtype` and `device` are by default the model's; with a config its dtype and the CPU."""
        model = config_or_model if isinstance(config_or_model, PreTrainedModel) else None
        config: Any = config_or_model if model is None else model.config
        problem = config_problem(config)
        config = config.get_text_config(decoder=True)
        problem = problem or config_problem(config) or _layers_problem(config)
        if not problem and model is not None and not model._supports_attention_backend:
            problem = f"expected attention through the AttentionInterface, got {type(model).__name__}'s own"
        if problem:
            raise ValueError(f"SlotCache: {problem}")
        for name, size in (("batch", batch), ("capacity", capacity)):
            if not isinstance(size, Integral) or isinstance(size, bool) or size < 1:
                raise ValueError(f"{name}: expected an integer >= 1, got {size!r}")
        batch, capacity = int(batch), int(capacity)
        layers, heads, dim = cache_shape(config)
        dtype = dtype or (config.dtype if model is None else model.dtype) or torch.get_default_dtype()
        device = device or ("cpu" if model is None else model.device)
        shape = (layers, 2, batch, capacity, heads, dim)
        # Zeros: what lies past a length is masked, which helps only if it is finite.
        self.kv = torch.zeros(shape, dtype=dtype, device=device)
        self.batch, self.capacity = batch, capacity
        self.lengths = torch.zeros(batch, dtype=torch.int32, device="cpu")
        self.positions = torch.zeros_like(self.lengths)
        self.entries = torch.zeros(batch, capacity, dtype=torch.int32, device="cpu")
        self.run_lengths: list[list[int]] = [[] for _ in range(batch)]
        self._columns = torch.arange(capacity, device="cpu")
        self._config, self._inv_freq = config, None if model is None else _frequencies(model)
        kinds = getattr(config, "layer_types", None) or ()
        self._by_kind = bool(kinds) if model is None else _masks_by_kind(model)
        windowed = has_windows(config) and (model is None or _masks_windows(model))
        if self._by_kind and "sliding_attention" not in kinds:
            windowed = False
        self._window: int | None = config.sliding_window if windowed else None
        self._step: _Step | None = None  # of the forward that is announced or under way
        self._announced = False
        super().__init__(layers=[_SlotLayer(self, layer) for layer in range(shape[0])])

    @property
    def kwargs(self) -> dict[str, Any]:
        """This cache by the name that the installed transformers has for it: `cache`, before 5.24
        `past_key_values`. Where it takes both names, a model or `generate` may be given either.
        """
        return {CACHE: self}

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """What a model's layers call. ValueError for a layer that the configuration does not have."""
        if layer_idx >= len(self.layers):
            raise ValueError(
                f"SlotCache: expected a model that attends once in each of its {len(self.layers)} layers, "
                f"got layer {layer_idx}"
            )
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    @property
    def used(self) -> int:
        """The length of the longest slot."""
        return int(self.lengths.max())

    def forward_kwargs(self, new_tokens: int | Sequence[int] | Tensor) -> dict[str, Any]:
        """Announce the next forward: how many of each row's tokens are real; the rest is padding.

        `new_tokens` int [B], or one number for all; the forward has `max(new_tokens)` columns. Padding is
        neither stored nor seen; a row with 0 stays as it is. Returns what the model wants beside its tokens:
        `kwargs`, `position_ids` [B, T] and `attention_mask`: bool [B, 1, T, used], True where a
        token sees an entry ("eager" gets what it adds), in models with windows one for each kind of layers;
        or None where plain causality says the same.

        Raises ValueError, the cache being as it was, when a slot is too small for its tokens, or for ragged
        rows and windows under an attention implementation that takes no such mask.
        """
        counts = torch.as_tensor(new_tokens, dtype=torch.int32, device="cpu").expand(self.batch)
        if int(counts.min()) < 0 or int(counts.max()) < 1:
            raise ValueError(f"new_tokens: expected 0 or more for each row, not all 0, got {counts.tolist()}")
        step, device = self._plan(counts), self.kv.device
        mask: Tensor | dict[str, Tensor] | None = None
        column = self._columns[: step.width]
        window = self._window if int((self.positions + counts).max()) > (self._window or 0) else None
        if not step.alike or window is not None:
            implementation = self._config._attn_implementation
            if implementation not in ("sdpa", "eager", NAME):
                expected = "attn_implementation 'sdpa', 'eager' or 'mem1' for rows that differ and windows"
                raise ValueError(f"SlotCache.forward_kwargs: expected {expected}, got {implementation!r}")
            last = (self.lengths[:, None] + column).to(device)  # the last entry that each token sees
            seen = (torch.arange(step.used, device=device) <= last[..., None])[:, None]
            near = seen if window is None else seen & self._in_window(step, window)
            mask, near = (self._as_mask(x, implementation == "eager") for x in (seen, near))
            if self._window is not None:
                mask = {"full_attention": mask, "sliding_attention": near} if self._by_kind else near
        # Padding repeats a position in use: where positions are looked up, it must exist.
        place = (self.positions[:, None] + torch.minimum(column, counts[:, None] - 1)).clamp(min=0)
        self._step, self._announced = step, True
        return {**self.kwargs, "position_ids": place.long().to(device), "attention_mask": mask}

    def _in_window(self, step: _Step, window: int) -> Tensor:
        """bool [B, 1, T, used], by the positions of tokens and entries."""
        rows, columns, slots = step.places
        entries = self.entries[:, : step.used].clone()
        entries[rows, slots] = self.positions[rows] + columns.int()
        tokens = self.positions[:, None] + self._columns[: step.width]
        return (tokens[:, None, :, None] - entries[:, None, None] < window).to(self.kv.device)

    def _in_order(self, length: int) -> bool:
        """Whether the entries of the rows, which are alike, stand side by side up to the next token."""
        places = self._columns[:length] + (self.positions[:, None] - length)
        return torch.equal(self.entries[:, :length], places.int())

    def _as_mask(self, seen: Tensor, added: bool) -> Tensor:
        """As "sdpa" takes it, or, `added`, as "eager" does."""
        if not added:
            return seen
        least = torch.finfo(self.kv.dtype).min
        return torch.zeros_like(seen, dtype=self.kv.dtype).masked_fill(~seen, least)

    def prune(self, keep: Keep, positions: Positions = "keep", *, inv_freq: Tensor | None = None) -> None:
        """Drop entries in place, in all layers at once, by `mem1_core.ops.prune_kv_cache_`.

        keep: bool [B, used], or ranges of slots as `prune_kv_cache_` takes them. `positions="keep"`:
        survivors stay as they were encoded, and so does the position of the next token. `"compact"`: they
        are rotated to positions 0, 1, ...; for a cache whose entries stand at their slots, so never together
        with "keep". `inv_freq` [D / 2] is by default the model's.

        Raises ValueError and TypeError as `prune_kv_cache_` does, the cache being as it was. (On CUDA, ranges
        that are wrong there raise after the other rows were pruned.) Waits for the device.
        """
        used, compact = self.used, positions == "compact"
        if compact:
            if not torch.equal(self.positions, self.lengths):
                raise ValueError("positions: expected 'keep', as entries are not at their slots' positions")
            inv_freq = self._inv_freq if inv_freq is None else inv_freq
            if inv_freq is None:
                expected = (
                    "RoPE's frequencies, or a cache made from a model that rotates halves by fixed ones, "
                    "in all layers alike"
                )
                raise ValueError(f"inv_freq: expected {expected}, got None")
            inv_freq = inv_freq.to(self.kv.device)
        mask = keep if isinstance(keep, Tensor) and keep.dtype == torch.bool else None
        lengths = prune_kv_cache_(
            self.kv[:, :, :, :used],
            keep if mask is None else mask.to(self.kv.device),
            self.lengths.to(self.kv.device),
            positions=positions,
            inv_freq=inv_freq,
        ).tolist()
        self._announced = False
        rows = [_in_ranges(ranges, used) for ranges in keep] if mask is None else mask.cpu()
        for row, (before, length) in enumerate(zip(self.lengths.tolist(), lengths, strict=True)):
            if length >= 0:
                left = self.entries[row, :before][rows[row][:before]]
                self.entries[row, :length] = self._columns[:length] if compact else left
                self.lengths[row] = length
                if compact:
                    self.positions[row] = length
        if min(lengths) < 0:
            row = lengths.index(-1)
            raise ValueError(f"keep[{row}]: expected ranges in order, up to {self.lengths[row]}, got others")

    def reset(self) -> None:
        """Empty all slots."""
        for tensor in (self.kv, self.lengths, self.positions, self.entries):
            tensor.zero_()
        self.run_lengths, self._announced = [[] for _ in range(self.batch)], False

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last `-tokens_to_remove` tokens that each row has read; the next take their positions.

        Raises ValueError for a number above 0, transformers' former way to say how many stay.
        """
        if tokens_to_remove > 0:
            raise ValueError(f"tokens_to_remove: expected 0 or less, got {tokens_to_remove}")
        self.positions.add_(tokens_to_remove).clamp_(min=0)
        stored = self._columns < self.lengths[:, None]
        self.lengths.copy_((stored & (self.entries < self.positions[:, None])).sum(1))
        self._announced = False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Let row `n` hold what row `beam_idx[n]` holds, as beam search asks for; in place."""
        used, order = self.used, beam_idx.to("cpu")
        self.kv[:, :, :, :used] = self.kv[:, :, beam_idx.to(self.kv.device), :used]
        for tensor in (self.lengths, self.positions, self.entries):
            tensor.copy_(tensor[order])
        self.run_lengths = [list(self.run_lengths[row]) for row in order.tolist()]

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Raises ValueError: the number of slots is fixed."""
        raise ValueError(f"SlotCache: expected its batch of {self.batch} to stay, got {repeats} repeats")

    def batch_select_indices(self, indices: Tensor) -> None:
        """Raises ValueError: the number of slots is fixed."""
        raise ValueError(f"SlotCache: expected its batch of {self.batch} to stay, got a selection of rows")

    def _plan(self, counts: Tensor) -> _Step:
        ends = self.lengths + counts
        if int(ends.max()) > self.capacity:
            slot = int(ends.argmax())
            raise ValueError(
                f"capacity: expected room for {ends[slot]} tokens in slot {slot}, got {self.capacity}"
            )
        width = int(counts.max())
        rows, columns = (self._columns[:width] < counts[:, None]).nonzero(as_tuple=True)
        places = (rows, columns, self.lengths[rows] + columns)
        stacked = torch.stack([self.lengths, counts, self.positions])
        lengths_alike, counts_alike, positions_alike = (stacked == stacked[:, :1]).all(1).tolist()
        even = lengths_alike and counts_alike
        return _Step(
            counts=counts,
            width=width,
            used=int(ends.max()),
            alike=even and positions_alike,
            places=places,
            scatter=None if even else [index.to(self.kv.device) for index in places],
        )

    def _commit(self, step: _Step) -> None:
        """The last layer has stored its keys and values: from here on the tokens of this forward count."""
        rows, columns, slots = step.places
        self.entries[rows, slots] = self.positions[rows] + columns.int()
        self.lengths += step.counts
        self.positions += step.counts


class _Step(NamedTuple):
    """One forward: what it stores where."""

    counts: Tensor  # int32 [B]
    width: int
    used: int  # the length of the longest slot afterwards
    alike: bool  # rows are alike in all that transformers' own masks and positions depend on
    places: tuple[Tensor, Tensor, Tensor]  # of each real token its row, its column, and its place in the slot
    scatter: (
        list[Tensor] | None
    )  # `places` on the cache's device; None: all columns go to one place in all rows


class _SlotLayer(CacheLayerMixin):
    """What transformers sees of one layer: `keys` and `values` are views [B, Hkv, capacity, D]."""

    is_sliding = False
    is_croppable = True
    keys: Tensor
    values: Tensor

    def __init__(self, cache: SlotCache, layer: int) -> None:
        super().__init__()
        self.cache, self.layer = cache, layer
        self.keys, self.values = cache.kv[layer].transpose(2, 3)
        self.batch_size, self.dtype, self.device = cache.batch, cache.kv.dtype, cache.kv.device
        self.is_initialized = True

    def __deepcopy__(self, memo: dict[int, Any]) -> _SlotLayer:
        """With its cache. A model that copies a layer alone, for another pass, would store into it beside the
        slots.
        """
        if id(self.cache) not in memo:
            raise ValueError(
                f"SlotCache: expected a model that attends once in each of its {len(self.cache.layers)} "
                f"layers, got one that copies layer {self.layer}"
            )
        copied = _SlotLayer.__new__(_SlotLayer)
        copied.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return copied

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: the cache allocates."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Store new keys and values [B, Hkv, T, D] after each row's entries; return what is in use, as views
        [B, Hkv, used, D]. Raises ValueError, before the first entry is written, when they do not fit.
        """
        cache, width = self.cache, key_states.shape[-2]
        if self.layer == 0 and not cache._announced:
            cache._step = cache._plan(torch.full_like(cache.lengths, width))
        step, cache._announced = cache._step, False  # a forward that fails leaves no announcement
        if step is None or step.width != width:
            announced = None if step is None else step.width
            raise ValueError(
                f"SlotCache: expected the {announced} columns that `forward_kwargs` announced, got {width}"
            )
        store = (self.keys, self.values)
        for new, old in zip((key_states, value_states), store, strict=True):
            expected = (*old.shape[:2], width, old.shape[3])
            if new.shape != expected or new.dtype != old.dtype or new.device != old.device:
                raise ValueError(
                    f"SlotCache, layer {self.layer}: expected keys and values {list(expected)}, {old.dtype} "
                    f"on {old.device}, got {list(new.shape)}, {new.dtype} on {new.device}"
                )
        for new, old in zip((key_states.detach(), value_states.detach()), store, strict=True):
            if step.scatter is None:
                old[:, :, step.used - width : step.used] = new
            else:
                rows, columns, slots = step.scatter
                old.transpose(1, 2)[rows, slots] = new.transpose(1, 2)[rows, columns]
        if self.layer == len(cache.layers) - 1:
            cache._commit(step)
        return self.keys[:, :, : step.used], self.values[:, :, : step.used]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Entries that a forward will see, and the position of the first, counted back from the last."""
        cache = self.cache
        step = cache._step if cache._announced else None
        step = step or cache._plan(torch.full_like(cache.lengths, query_length))
        if not step.alike:
            raise ValueError(
                "SlotCache: expected the attention_mask of `SlotCache.forward_kwargs`, as rows "
                "differ in length or "
                "position, got one made by transformers"
            )
        length = int(cache.lengths[0])
        reached = query_length + int(cache.positions[0])
        if cache._window is not None and reached > cache._window and not cache._in_order(length):
            raise ValueError(
                "SlotCache: expected the attention_mask of `SlotCache.forward_kwargs`, as a window counts "
                "positions and entries have left, got one made by transformers"
            )
        return length + query_length, int(cache.positions[0]) - length

    def get_seq_length(self) -> int:
        """Tokens read so far, which is the position of the next, not the number of entries."""
        return int(self.cache.positions.max())

    def get_max_length(self) -> int:
        return self.cache.capacity


def _in_ranges(ranges: Any, used: int) -> Tensor:
    mask = torch.zeros(used, dtype=torch.bool, device="cpu")
    for begin, end in ranges.tolist() if isinstance(ranges, Tensor) else ranges:
        mask[begin:end] = True
    return mask


def _layers_problem(config: Any) -> str | None:
    """What `layer_types` does not say, or would say of configs that have none."""
    if not getattr(config, "num_attention_heads", None):
        return f"expected attention layers, got {type(config).__name__} without num_attention_heads"
    if varies := varying_shape(config):
        return f"expected layers alike, got some with another {varies}"
    if rank := getattr(config, "kv_lora_rank", None):
        return f"expected keys and values of heads, got the latent ones of kv_lora_rank={rank}"
    if shared := getattr(config, "num_kv_shared_layers", 0):
        return f"expected keys and values of every layer's own, got num_kv_shared_layers={shared}"
    if (loops := getattr(config, "n_recurrent_loops", 1)) > 1:
        return f"expected layers that attend once each, got n_recurrent_loops={loops}"
    chunk = getattr(config, "attention_chunk_size", None)
    if chunk is not None and getattr(config, "layer_types", None) is None:
        return f"expected full attention or windows, got attention_chunk_size={chunk}"
    return None


def _masks_windows(model: PreTrainedModel) -> bool:
    """Whether the code of a model whose configuration names a window looks at it."""
    codes = (sys.modules[type(part).__module__] for part in (model, model.get_decoder()))
    return any(hasattr(code, "create_sliding_window_causal_mask") for code in codes)


def _masks_by_kind(model: PreTrainedModel) -> bool:
    """Whether the code of a model looks at a list of kinds in its configuration: then each attention keeps
    the window of its own kind. (Mistral's and others go by `sliding_window` alone.)
    """
    listed = getattr(model.config.get_text_config(decoder=True), "layer_types", None)
    return bool(listed) and any(hasattr(part, "sliding_window") for part in model.modules())


def _frequencies(model: PreTrainedModel) -> Tensor | None:
    """RoPE's angular frequencies; None where they change with the length, where not halves are rotated, and
    where layers differ: of mixed kinds, some have other frequencies or none.
    """
    config: Any = model.config.get_text_config(decoder=True)
    if len(set(getattr(config, "layer_types", None) or ())) > 1:
        return None
    if not all(getattr(config, "no_rope_layers", None) or (True,)):
        return None
    decoder = model.get_decoder()
    rotary: Any = getattr(decoder, "rotary_emb", None)
    rotate = getattr(sys.modules[type(decoder).__module__], "rotate_half", None)
    if rotate is None or getattr(rotary, "rope_type", None) in (None, "dynamic", "longrope"):
        return None
    if rotate(torch.arange(4.0)).tolist() != [-2.0, -3.0, 0.0, 1.0]:
        return None
    return getattr(rotary, "inv_freq", None)
