"""Batched generation over a slot cache.

The engine knows tokens, slots and positions; what a token means and when a cache is pruned is `rollout`'s
business.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mem1.graphs import Graphs
from mem1.slots import Slots, Step
from mem1_core.integrations.transformers import cache_shape, check_model

_GRAPH_TOKENS = 256  # captured decode steps see a multiple of this
_PIECE = 2048  # tokens of a row in one forward: the mask that SDPA wants has so many rows


class Engine:
    """A model and its slots. Rows are named by their slot; `cache.lengths` says how much each one holds.

    On CUDA a decode step (one token for each row) is captured in a CUDA graph, one for each power of two of
    rows and multiple of 256 tokens seen; elsewhere, and for longer pieces, the same layers run eagerly.

    model: a causal decoder with attention "mem1" that `check_model` takes; raises ValueError, with the
    reason, for one whose logits or positions are not plain.
    """

    def __init__(self, model: PreTrainedModel, slots: int, prefill_tokens: int = 16384) -> None:
        check_model(model)
        _check_policy(model)
        head: Any = model.get_output_embeddings()
        self.trunk: Any = model.get_decoder()
        # Logits are made in fp32 here and in the trainer: in bf16 their rounding alone would hide whether the
        # two agree.
        self.head = head.weight.detach().float()
        self.prefill_tokens = prefill_tokens
        weight = next(self.trunk.parameters())
        self.device = weight.device
        layers, kv_heads, head_dim = cache_shape(model.config)
        self.cache = Slots(layers, slots, kv_heads, head_dim, weight.dtype, self.device)
        # What a captured decode step reads: token, position and length before it, of each slot.
        self._inputs = torch.zeros(3, slots, dtype=torch.int64, device=self.device)
        self._graphs: Graphs | None = Graphs(self.device) if self.device.type == "cuda" else None
        # A 4D mask goes straight to the layers, which do not look at it: transformers makes none of its own.
        self._no_mask = torch.empty(1, 1, 0, 0, dtype=torch.bool, device=self.device)

    @torch.inference_mode()
    def feed(self, rows: list[int], tokens: list[list[int]], positions: list[list[int]]) -> Tensor:
        """Append `tokens[i]` at `positions[i]` to slot `rows[i]`; return the last token's hidden state,
        [len(rows), H].

        The lists may differ in length. Long ones are cut into pieces, and rows grouped so that one forward
        has at most `prefill_tokens` tokens, padding included (a single longer piece still runs, alone).
        """
        long = [i for i in range(len(rows)) if len(tokens[i]) > _PIECE]
        if long:
            self.feed(
                [rows[i] for i in long],
                [tokens[i][:-_PIECE] for i in long],
                [positions[i][:-_PIECE] for i in long],
            )
            tokens, positions = [t[-_PIECE:] for t in tokens], [p[-_PIECE:] for p in positions]
        lengths = self.cache.lengths
        self._reserve(max(int(lengths[row]) + len(t) for row, t in zip(rows, tokens, strict=True)))
        if self._graphs is not None and max(map(len, tokens)) == 1:
            return self._decode(rows, tokens, positions, self._graphs)
        hidden: list[Tensor] = [torch.empty(0)] * len(rows)
        order = sorted(range(len(rows)), key=lambda i: (len(tokens[i]), rows[i]))
        while order:
            group = [order.pop()]
            longest = len(tokens[group[0]])
            while order and (len(group) + 1) * longest <= self.prefill_tokens:
                group.append(order.pop())
            group.sort(key=lambda i: rows[i])
            out = self._read(
                [rows[i] for i in group], [tokens[i] for i in group], [positions[i] for i in group]
            )
            for i, row in zip(group, out, strict=True):
                hidden[i] = row
        return torch.stack(hidden)

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """fp32 [.., V] of hidden states [.., H]."""
        return hidden.float() @ self.head.T

    @torch.inference_mode()
    def prune(self, keeps: Mapping[int, Tensor]) -> None:
        """Drop the entries of slots where `keeps[slot]` (bool [its length]) is False, all in one call."""
        self.cache.prune(keeps)

    def truncate(self, slot: int, length: int) -> None:
        """Forget all but the first `length` tokens of a slot."""
        self.cache.truncate(slot, length)

    @torch.inference_mode()
    def move(self, source: int, target: int) -> None:
        """Let slot `target` hold what slot `source` holds."""
        self.cache.move(source, target)

    @torch.inference_mode()
    def clear(self, slot: int) -> None:
        """Forget a slot and what it held, numbers that are not finite among it."""
        self.cache.clear(slot)

    def _reserve(self, tokens: int) -> None:
        if self.cache.reserve(tokens) and self._graphs is not None:
            self._graphs.clear()

    def _read(self, rows: list[int], tokens: list[list[int]], positions: list[list[int]]) -> Tensor:
        """One forward, padded on the left; padding is not stored and no token sees it."""
        longest, lengths = max(map(len, tokens)), self.cache.lengths
        count = torch.tensor([len(t) for t in tokens])
        ids = torch.tensor([[0] * (longest - len(t)) + t for t in tokens])
        place = torch.tensor([[0] * (longest - len(p)) + p for p in positions])
        index = torch.tensor(rows)
        ends = lengths[index] + count
        column = ends[:, None] + torch.arange(-longest, 0)  # [b, T], where each token is stored
        real = torch.arange(longest) >= longest - count[:, None]
        contiguous = rows == list(range(rows[0], rows[0] + len(rows)))
        step = Step(
            kv=self.cache.kv,
            flash=self.cache.flash,
            rows=index.int().to(self.device),
            neighbours=slice(rows[0], rows[0] + len(rows)) if contiguous else None,
            counts=count.int().to(self.device),
            real=None if bool(real.all()) else real.to(self.device),
            slots=index[:, None].expand_as(column)[real].to(self.device),
            columns=column[real].to(self.device),
            ends=ends.int().to(self.device),
            used=int(ends.max()),
            width=longest,
        )
        hidden = self._forward(ids.to(self.device), place.to(self.device), step)
        lengths[index] = ends
        return hidden

    def _decode(
        self, rows: list[int], tokens: list[list[int]], positions: list[list[int]], graphs: Graphs
    ) -> Tensor:
        """One token for each of `rows`, by a graph. Slots in between run along: they write behind their end,
        where no query looks.
        """
        lengths = self.cache.lengths
        self._reserve(int(lengths.max()) + 1)  # every slot has a place behind its end
        inputs = torch.zeros(3, lengths.shape[0], dtype=torch.int64)
        inputs[2] = lengths
        index = torch.tensor(rows)
        inputs[0, index], inputs[1, index] = torch.tensor(tokens)[:, 0], torch.tensor(positions)[:, 0]
        self._inputs.copy_(inputs, non_blocking=True)
        span = min(1 << max(rows).bit_length(), lengths.shape[0])
        used = min(-(-(int(lengths.max()) + 1) // _GRAPH_TOKENS) * _GRAPH_TOKENS, self.cache.capacity)
        hidden = graphs.run((span, used), partial(self._decode_step, span, used))
        lengths[index] += 1
        return hidden[index.to(self.device)]

    def _decode_step(self, span: int, used: int) -> Tensor:
        """The device's part of `_decode`: sizes are numbers, all else is read from `_inputs`."""
        tokens, positions, lengths = self._inputs[:, :span]
        slots = torch.arange(span, device=self.device)
        step = Step(
            kv=self.cache.kv,
            flash=self.cache.flash,
            rows=slots.int(),
            neighbours=slice(0, span),
            counts=torch.ones_like(slots, dtype=torch.int32),
            real=None,
            slots=slots,
            columns=lengths,
            ends=(lengths + 1).int(),
            used=used,
            width=1,
        )
        return self._forward(tokens[:, None], positions[:, None], step)

    def _forward(self, ids: Tensor, positions: Tensor, step: Step) -> Tensor:
        """Hidden state of the last token of each row, [b, H]."""
        return self.trunk(
            input_ids=ids,
            position_ids=positions,
            attention_mask=self._no_mask,
            use_cache=False,
            mem1_cache=step,
        ).last_hidden_state[:, -1]


def _check_policy(model: PreTrainedModel) -> None:
    """ValueError for what the engine would leave out or could not repeat."""
    config: Any = model.config
    head: Any = model.get_output_embeddings()
    if getattr(head, "bias", None) is not None:
        raise ValueError("model: wanted an output layer without bias, got one with bias")
    for name in ("final_logit_softcapping", "logits_scaling", "logit_scale"):
        if getattr(config, name, None) not in (None, 1, 1.0):
            raise ValueError(f"model: wanted plain logits, got {name}={getattr(config, name)}")
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if rope in ("dynamic", "longrope"):
        raise ValueError(f"model: wanted frequencies that stay as they are, got rope_type={rope!r}")
    if model.training and any(isinstance(m, nn.Dropout) and m.p > 0 for m in model.modules()):
        raise ValueError("model: wanted model.eval(), as it has dropout, got one in training mode")
