"""Batched generation over a preallocated KV cache with one slot per trajectory.

The engine knows tokens, slots and positions; what a token means and when a cache is pruned is `rollout`'s
business. A slot holds the tokens that its trajectory can still see, in order, without holes: pruning moves
the survivors to the left.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

from mem1.config import RolloutConfig
from mem1_core.reference import prune_kv_cache_


class Engine:
    """A model and its slot cache.

    kv: [layers, 2 (K, V), slots, capacity, Hkv, D] in the model's dtype; it grows when a trajectory needs
    more.
    lengths: int64 [slots] on the host, tokens in each slot. Rows are named by their slot.
    """

    def __init__(self, model: nn.Module, slots: int, prefill_tokens: int = 16384) -> None:
        config: Any = model.config
        kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
        if kinds != {"full_attention"}:
            raise ValueError(
                f"model: wanted only full attention layers, which a KV cache can prune, got {sorted(kinds)}"
            )
        head: Any = model.get_output_embeddings()  # type: ignore[operator]
        if getattr(head, "bias", None) is not None:
            raise ValueError("model: wanted an output layer without bias, got one with bias")
        self.trunk: Any = model.get_decoder()  # type: ignore[operator]
        # Logits are made in fp32 here and in the trainer: in bf16 their rounding alone would hide whether the
        # two agree.
        self.head = head.weight.detach().float()
        self.prefill_tokens = prefill_tokens
        self.device, dtype = head.weight.device, head.weight.dtype
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        self.kv = torch.zeros(
            (config.num_hidden_layers, 2, slots, 0, kv_heads, head_dim), dtype=dtype, device=self.device
        )
        self.lengths = torch.zeros(slots, dtype=torch.int64)
        self._cache = Cache(layers=[_SlotLayer(self, layer) for layer in range(config.num_hidden_layers)])

    @torch.inference_mode()
    def feed(self, rows: list[int], tokens: list[list[int]], positions: list[list[int]]) -> Tensor:
        """Append `tokens[i]` at `positions[i]` to slot `rows[i]`; return the last token's hidden state,
        [len(rows), H].

        The lists may differ in length. Long ones are grouped so that one forward has at most `prefill_tokens`
        tokens, padding included (a single longer row still runs, alone).
        """
        self._reserve(max(int(self.lengths[r]) + len(t) for r, t in zip(rows, tokens, strict=True)))
        if max(map(len, tokens)) == 1:
            return self._decode(rows, tokens, positions)
        hidden: list[Tensor] = [torch.empty(0)] * len(rows)
        order = sorted(range(len(rows)), key=lambda i: (len(tokens[i]), rows[i]))
        while order:
            group = [order.pop()]
            longest = len(tokens[group[0]])
            while order and (len(group) + 1) * longest <= self.prefill_tokens:
                group.append(order.pop())
            group.sort(key=lambda i: rows[i])
            out = self._forward(
                [rows[i] for i in group], [tokens[i] for i in group], [positions[i] for i in group], longest
            )
            for i, row in zip(group, out, strict=True):
                hidden[i] = row
        return torch.stack(hidden)

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """fp32 [.., V] of hidden states [.., H]."""
        return hidden.float() @ self.head.T

    @torch.inference_mode()
    def prune(self, row: int, keep: Tensor) -> None:
        """Drop the entries of a slot where `keep` (bool [length of the slot]) is False, in every layer, in
        place.
        """
        length = int(self.lengths[row])
        if keep.shape != (length,):
            raise ValueError(
                f"keep: wanted shape [{length}], the length of slot {row}, got {list(keep.shape)}"
            )
        window = self.kv[:, :, row : row + 1, :length]
        lengths = torch.tensor([length], device=self.device)
        self.lengths[row] = int(prune_kv_cache_(window, keep[None].to(self.device), lengths)[0])

    def truncate(self, row: int, length: int) -> None:
        """Forget all but the first `length` tokens of a slot."""
        self.lengths[row] = min(length, int(self.lengths[row]))

    @torch.inference_mode()
    def move(self, source: int, target: int) -> None:
        """Let slot `target` hold what slot `source` holds."""
        length = int(self.lengths[source])
        self.kv[:, :, target, :length] = self.kv[:, :, source, :length]
        self.lengths[target] = length

    def _decode(self, rows: list[int], tokens: list[list[int]], positions: list[list[int]]) -> Tensor:
        """One token for each of `rows`. Slots in between run along without a token, which beats gathering the
        others' cache.
        """
        span = list(range(max(rows) + 1))
        fed = {row: (token, place) for row, token, place in zip(rows, tokens, positions, strict=True)}
        given = [fed.get(row, ([], [])) for row in span]
        hidden = self._forward(span, [token for token, _ in given], [place for _, place in given], 1)
        return hidden[torch.tensor(rows, device=self.device)]

    def _reserve(self, wanted: int) -> None:
        capacity = self.kv.shape[3]
        if wanted <= capacity:
            return
        grown = self.kv.new_zeros((*self.kv.shape[:3], max(wanted, 2 * capacity, 128), *self.kv.shape[4:]))
        grown[:, :, :, :capacity] = self.kv
        self.kv = grown

    def _forward(
        self, rows: list[int], tokens: list[list[int]], positions: list[list[int]], longest: int
    ) -> Tensor:
        """One padded forward. Padding is on the right, is not stored, and no real token sees it."""
        count = torch.tensor([len(t) for t in tokens])
        ids = torch.tensor([t + [0] * (longest - len(t)) for t in tokens])
        place = torch.tensor([p + [0] * (longest - len(p)) for p in positions])
        index = torch.tensor(rows)
        column = self.lengths[index][:, None] + torch.arange(longest)  # [b, T], where each token is stored
        real = torch.arange(longest) < count[:, None]
        used = int((self.lengths[index] + count).max())
        visible = torch.arange(used) <= column[..., None]  # [b, T, used]
        contiguous = rows == list(range(rows[0], rows[0] + len(rows)))
        self._step = _Step(
            rows=slice(rows[0], rows[0] + len(rows)) if contiguous else index.to(self.device),
            real=real.to(self.device),
            slots=index[:, None].expand_as(column)[real].to(self.device),
            columns=column[real].to(self.device),
            used=used,
        )
        hidden = self.trunk(
            input_ids=ids.to(self.device),
            position_ids=place.to(self.device),
            attention_mask=visible[:, None].to(self.device),
            past_key_values=self._cache,
            use_cache=True,
        ).last_hidden_state
        self.lengths[index] += count
        return hidden[torch.arange(len(rows), device=self.device), (count - 1).to(self.device)]

    def _update(self, layer: int, which: int, new: Tensor) -> Tensor:
        """Store new keys or values [b, Hkv, T, D] in their slots and return the used part of these, [b, Hkv,
        used, D].
        """
        step, store = self._step, self.kv[layer, which]
        store[step.slots, step.columns] = new.transpose(1, 2)[step.real]
        return store[step.rows, : step.used].transpose(1, 2)


class _Step(NamedTuple):
    """Where the tokens of one forward belong."""

    rows: slice | Tensor  # slots that take part, in batch order
    real: Tensor  # bool [b, T]: not padding
    slots: Tensor  # int64 [real tokens]: where each one is stored
    columns: Tensor  # int64 [real tokens]
    used: int  # longest slot after this forward


class _SlotLayer(CacheLayerMixin):
    """What transformers sees of one layer of the engine's cache."""

    is_sliding = False

    def __init__(self, engine: Engine, layer: int) -> None:
        super().__init__()
        self.engine, self.layer = engine, layer
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: the engine allocates."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        return self.engine._update(self.layer, 0, key_states), self.engine._update(
            self.layer, 1, value_states
        )

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.engine._step.used, 0

    def get_seq_length(self) -> int:
        return int(self.engine.lengths.max())

    def get_max_length(self) -> int:
        return -1


def sample(logits: Tensor, uniform: Tensor, forced: Tensor, config: RolloutConfig) -> tuple[Tensor, Tensor]:
    """Choose one token per row of fp32 `logits` [b, V] with the numbers `uniform` [b] in [0, 1).

    Where `forced` int64 [b] is not negative, that token is taken instead.

    Returns tokens int64 [b] and their log-probs fp32 [b]. A log-prob is that of the full distribution at the
    sampling temperature, `log_softmax(logits / temperature)`: what a trainer recomputes, whatever `top_k` and
    `top_p` cut away.
    """
    logprobs = (logits / config.temperature).log_softmax(-1)
    if config.greedy:
        tokens = logits.argmax(-1)
    else:
        # Inverse transform sampling: one number per row, so a row's tokens do not depend on who shares its
        # batch.
        cumulative = _truncated(logprobs, config).double().cumsum(-1)
        threshold = uniform.to(logits.device).double()[:, None] * cumulative[:, -1:]
        tokens = torch.searchsorted(cumulative, threshold, right=True)[:, 0].clamp_(max=logits.shape[-1] - 1)
    forced = forced.to(logits.device)
    tokens = torch.where(forced < 0, tokens, forced)
    return tokens, logprobs.gather(-1, tokens[:, None])[:, 0]


def _truncated(logprobs: Tensor, config: RolloutConfig) -> Tensor:
    """Probabilities [b, V] with those outside the top k, then outside the nucleus of mass `top_p`, set to
    0.
    """
    probs = logprobs.exp()
    if config.top_k == 0 and config.top_p == 1.0:
        return probs
    ranked, order = probs.sort(-1, descending=True)
    if config.top_k:
        ranked[:, config.top_k :] = 0
    before = ranked.cumsum(-1) - ranked
    ranked = ranked.where(before < config.top_p * ranked.sum(-1, keepdim=True), 0.0)
    return torch.zeros_like(probs).scatter_(-1, order, ranked)
