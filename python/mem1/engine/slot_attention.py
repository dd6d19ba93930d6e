"""Attention of one forward over the slots of a KV cache."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from mem1_core.eviction import window_evict
from mem1_core.integrations.scores import Scores, dense_attention
from mem1_core.ops import cached_attention


@dataclass(frozen=True)
class AttentionMetadata:
    """Rows of a forward that attend in one call: their new tokens lie side by side in it.

    For the call they are padded on the left, so that the last query of each is its last token. Every tensor
    is on the device of the cache.
    """

    cache_batch_idx: Tensor  # int32 [b]: the slots
    contiguous: slice | None  # the same, where they follow one another
    query_lens: Tensor  # int32 [b]: new tokens of each row
    cache_seqlens: Tensor  # int32 [b]: length of each slot after this forward
    max_cache_seqlen: int  # no slot that is read is longer
    max_query_len: int  # T
    valid: Tensor | None  # bool [b, T]: not padding; None: all are
    num_tokens: int  # sum of query_lens
    positions: Tensor | None = None  # int32 [slots, capacity], of the entries; None: no layer has a window
    lifetimes: dict[int, Tensor] = field(default_factory=dict)  # of the entries, by window

    @classmethod
    def build(
        cls,
        slots: list[int],
        query_lens: list[int],
        cache_seqlens: list[int],
        device: torch.device,
        positions: Tensor | None = None,
    ) -> AttentionMetadata:
        longest, follow = max(query_lens), slice(slots[0], slots[0] + len(slots))
        index, new, end = torch.tensor([slots, query_lens, cache_seqlens], dtype=torch.int32).to(device)
        padded = min(query_lens) < longest
        return cls(
            cache_batch_idx=index,
            contiguous=follow if slots == list(range(follow.start, follow.stop)) else None,
            query_lens=new,
            cache_seqlens=end,
            max_cache_seqlen=max(cache_seqlens),
            max_query_len=longest,
            valid=torch.arange(longest, device=device) >= longest - new[:, None] if padded else None,
            num_tokens=sum(query_lens),
            positions=positions,
        )

    def evict(self, window: int | None) -> Tensor | None:
        """int32 [b, max_cache_seqlen]: the lifetimes of the entries in a window, made once for all layers."""
        if window is None:
            return None
        assert self.positions is not None
        if window not in self.lifetimes:
            places = self.positions[self.cache_batch_idx, : self.max_cache_seqlen]
            self.lifetimes[window] = window_evict(places, window, self.cache_seqlens)
        return self.lifetimes[window]

    def visible(self, window: int | None) -> Tensor:
        """bool [b, 1, T, max_cache_seqlen], which entries each query sees."""
        device = self.cache_seqlens.device
        last = self.cache_seqlens[:, None] + torch.arange(-self.max_query_len, 0, device=device)
        # Padding sees the first entry, as a row without any would be NaN.
        last = last.clamp(min=0)[..., None]
        seen, evict = torch.arange(self.max_cache_seqlen, device=device) <= last, self.evict(window)
        return (seen if evict is None else seen & (last < evict[:, None]))[:, None]

    def attend(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        scores: Scores,
        flash: Callable[..., Tensor] | None,
    ) -> Tensor:
        """query [tokens, Hq, D], keys and values [slots, capacity, Hkv, D] -> [tokens, Hq, D of the values].

        Query t of a row sees the entries of its slot before `cache_seqlens - query_lens + t + 1`, and of
        these in a window those whose positions are in it.
        """
        if self.valid is None:
            padded = query.unflatten(0, (-1, self.max_query_len))
        else:
            padded = query.new_zeros(*self.valid.shape, *query.shape[1:])
            padded[self.valid] = query
        if query.device.type == "cpu":
            out = cached_attention(
                padded,
                keys,
                values,
                self.cache_seqlens,
                cache_batch_idx=self.cache_batch_idx,
                query_lens=self.query_lens,
                scale=scores.scale,
                evict=self.evict(scores.window),
                softcap=scores.softcap,
                sinks=scores.sinks,
            )
        elif (
            flash is not None
            and scores.window is None
            and scores.sinks is None
            and keys.shape == values.shape
        ):
            out = self._flash(flash, padded, keys, values, scores)
        else:
            out = self._dense(padded, keys, values, scores)
        return out.flatten(0, 1) if self.valid is None else out[self.valid]

    def _dense(self, query: Tensor, keys: Tensor, values: Tensor, scores: Scores) -> Tensor:
        b, new, heads, dim = query.shape
        rows = self.cache_batch_idx if self.contiguous is None else self.contiguous
        query, keys, values = (x.transpose(1, 2) for x in (query, keys[rows], values[rows]))
        keys, values = keys[:, :, : self.max_cache_seqlen], values[:, :, : self.max_cache_seqlen]
        if scores.softcap is not None or scores.sinks is not None:  # which SDPA does not have
            return dense_attention(query, keys, values, self.visible(scores.window), scores)
        group = heads // keys.shape[1]
        if new == 1:  # the query heads of a KV head stand as so many queries: nothing is repeated
            query = query.reshape(b, heads // group, group, dim)
        elif group > 1:
            keys, values = (x.repeat_interleave(group, dim=1) for x in (keys, values))
        out = scaled_dot_product_attention(
            query, keys, values, attn_mask=self.visible(scores.window), scale=scores.scale
        )
        return out.reshape(b, heads, new, -1).transpose(1, 2)

    def _flash(
        self, flash: Callable[..., Tensor], query: Tensor, keys: Tensor, values: Tensor, scores: Scores
    ) -> Tensor:
        rows: Tensor | None = self.cache_batch_idx
        if self.contiguous is not None:
            keys, values, rows = keys[self.contiguous], values[self.contiguous], None
        # Bottom-right causal masks: the last query sees all of its slot, as it must with padding on the left.
        return flash(
            query,
            keys[:, : self.max_cache_seqlen],
            values[:, : self.max_cache_seqlen],
            cache_seqlens=self.cache_seqlens,
            cache_batch_idx=rows,
            softmax_scale=scores.scale,
            causal=True,
            **({} if scores.softcap is None else {"softcap": scores.softcap}),  # since its version 2.6
        )


@dataclass(frozen=True)
class Step:
    """One forward over some of the slots: `mem1_cache` of `mem1_core.integrations.transformers`.

    Its tokens are one sequence to the model, [1, N], row after row: nothing is padded but where rows attend.
    """

    kv: Tensor  # [layers, 2, slots, capacity, Hkv, D]
    flash: Callable[..., Tensor] | None  # flash-attn's function, where it is to be used
    slots: Tensor  # int64 [N]: where each token is stored
    columns: Tensor  # int64 [N]
    parts: list[AttentionMetadata]  # in the order of the tokens

    def attend(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, scores: Scores) -> Tensor:
        """Store key and value [1, Hkv, N, D] and let each query attend to all that its row's slot holds.

        query [1, Hq, N, D] -> [1, N, Hq, D of the values]. Values narrower than keys leave channels unused.
        """
        layer: Any = module.layer_idx
        keys, values = self.kv[layer]
        values = values[..., : value.shape[3]]
        if value.shape[3] == key.shape[3]:
            self.kv[layer][:, self.slots, self.columns] = torch.cat((key, value)).transpose(1, 2)
        else:
            keys[self.slots, self.columns] = key[0].transpose(0, 1)
            values[self.slots, self.columns] = value[0].transpose(0, 1)
        out, begin = [], 0
        for part in self.parts:
            of_part = query[0, :, begin : begin + part.num_tokens].transpose(0, 1)
            out.append(part.attend(of_part, keys, values, scores, self.flash))
            begin += part.num_tokens
        return (out[0] if len(out) == 1 else torch.cat(out))[None]


def find_flash_attention(kv: Tensor) -> Callable[..., Tensor] | None:
    """flash-attn's KV-cache function, if it is installed and takes this cache."""
    if kv.device.type != "cuda" or kv.dtype not in (torch.bfloat16, torch.float16) or kv.shape[-1] > 256:
        return None
    if importlib.util.find_spec("flash_attn") is None:
        return None
    # Its fourth generation alone brings a package of that name without this function.
    return getattr(importlib.import_module("flash_attn"), "flash_attn_with_kvcache", None)
