"""Batched generation over a slot cache.

The engine knows tokens, slots and positions; what a token means and when a cache is pruned is `rollout`'s
business.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from itertools import accumulate, chain, repeat
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mem1.checks import InputError, require
from mem1.engine.cuda_graphs import Graphs
from mem1.engine.slot_attention import AttentionMetadata, Step, find_flash_attention
from mem1.engine.slots import Slots
from mem1_core.integrations.transformers import cache_shape, check_cache, check_model

_GRAPH_TOKENS = 256  # captured decode steps see a multiple of this
_PIECE = 2048  # tokens of a row in one forward: the mask that SDPA wants has so many rows


class Engine:
    """A model and its slots. Rows are named by their slot; `cache.lengths` says how much each one holds.

    On CUDA a decode step (one token for each row) is captured in a CUDA graph, one for each power of two of
    rows and multiple of 256 tokens seen; elsewhere, and for longer pieces, the same layers run eagerly.

    model: a causal decoder with attention "mem1" that `check_model` and `check_cache` take; raises
    InputError, with the reason, for another one and where logits or positions are not plain.
    """

    def __init__(self, model: PreTrainedModel, num_slots: int, max_num_batched_tokens: int = 16384) -> None:
        try:
            check_model(model)
            check_cache(model)
        except ValueError as error:
            raise InputError(str(error)) from None
        require(num_slots >= 1, "num_slots", "an integer >= 1", num_slots)
        self.model, self.trunk = model, cast(Any, model.get_decoder())
        self._busy = False
        self._refresh()
        self.max_num_batched_tokens = max_num_batched_tokens
        weight = next(self.trunk.parameters())
        self.device = weight.device
        layers, kv_heads, head_dim = cache_shape(model.config)
        self.cache = Slots(layers, num_slots, kv_heads, head_dim, weight.dtype, self.device)
        self._flash = find_flash_attention(self.cache.kv)
        # What a captured decode step reads: token, position and length before it, of each slot.
        self._inputs = torch.zeros(3, num_slots, dtype=torch.int64, device=self.device)
        self._graphs: Graphs | None = Graphs(self.device) if self.device.type == "cuda" else None
        # A 4D mask goes straight to the layers, which do not look at it: transformers makes none of its own.
        self._no_mask = torch.empty(1, 1, 0, 0, dtype=torch.bool, device=self.device)

    @property
    def num_slots(self) -> int:
        return len(self.cache.lengths)

    @property
    def captures(self) -> bool:
        """Whether steps of one token for each row come from a graph."""
        return self._graphs is not None

    @contextmanager
    def session(self) -> Iterator[None]:
        """One rollout: the weights as they are now (training may have changed them in place), and empty slots
        when it is over. RuntimeError while there is another one.
        """
        if self._busy:
            raise RuntimeError("engine: already in use by another rollout")
        self._refresh()
        self._busy = True
        try:
            yield
        finally:
            for slot, length in enumerate(self.cache.lengths):
                if length:
                    self.cache.clear(slot)
            self._busy = False

    def _refresh(self) -> None:
        _check_policy(self.model)
        head: Any = self.model.get_output_embeddings()
        # Logits are made in fp32 here and in the trainer: in bf16 their rounding alone would hide whether the
        # two agree.
        self.head = head.weight.detach().float()

    @torch.inference_mode()
    def feed(self, rows: list[int], tokens: list[list[int]], positions: list[list[int]]) -> Tensor:
        """Append `tokens[i]` at `positions[i]` to slot `rows[i]`; return the last token's hidden state,
        [len(rows), H].

        The lists may differ in length. Long ones are cut into pieces, and rows grouped so that one forward
        has at most `max_num_batched_tokens` tokens, counted as rows times their longest piece (a single
        longer piece still runs, alone; rows with one token are not counted).
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
        self._reserve(max(lengths[row] + len(t) for row, t in zip(rows, tokens, strict=True)))
        if self._graphs is not None and max(map(len, tokens)) == 1:
            return self._decode(rows, tokens, positions, self._graphs)
        groups = self._groups(rows, tokens)
        if groups == [list(range(len(rows)))]:
            return self._forward_packed(rows, tokens, positions)
        hidden = [
            self._forward_packed(*([of_row[i] for i in group] for of_row in (rows, tokens, positions)))
            for group in groups
        ]
        order = torch.tensor(list(chain.from_iterable(groups)), device=self.device)
        return torch.cat(hidden)[order.argsort()]

    def _groups(self, rows: list[int], tokens: list[list[int]]) -> list[list[int]]:
        """Places in `rows` of each forward, those with one token before the others, else by slot."""
        order = sorted(range(len(rows)), key=lambda i: (len(tokens[i]), rows[i]))
        ones = [i for i in order if len(tokens[i]) == 1]
        long, groups = order[len(ones) :], []
        while long:
            group, longest = [], len(tokens[long[-1]])
            while long and (not group or (len(group) + 1) * longest <= self.max_num_batched_tokens):
                group.append(long.pop())
            groups.append(sorted(group, key=lambda i: rows[i]))
        return [ones + groups[0], *groups[1:]] if groups else [ones]

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """fp32 [.., V] of hidden states [.., H]."""
        return hidden.float() @ self.head.T

    def _reserve(self, tokens: int) -> None:
        if self.cache.reserve(tokens) and self._graphs is not None:
            self._graphs.clear()

    def _forward_packed(self, rows: list[int], tokens: list[list[int]], positions: list[list[int]]) -> Tensor:
        """One forward over all tokens, row after row; rows with one token are the first."""
        lengths, counts = self.cache.lengths, [len(t) for t in tokens]
        begins, ones = [lengths[row] for row in rows], counts.count(1)
        ends = [begin + count for begin, count in zip(begins, counts, strict=True)]
        of_tokens = (
            chain.from_iterable(tokens),
            chain.from_iterable(positions),
            chain.from_iterable(map(repeat, rows, counts)),
            chain.from_iterable(map(range, begins, ends)),
        )
        packed = torch.tensor([list(of_token) for of_token in of_tokens])
        ids, places, slots, columns = packed.to(self.device)
        parts = [
            AttentionMetadata.build(rows[part], counts[part], ends[part], self.device)
            for part in (slice(0, ones), slice(ones, None))
            if rows[part]
        ]
        hidden = self._forward(ids, places, Step(self.cache.kv, self._flash, slots, columns, parts))
        for row, end in zip(rows, ends, strict=True):
            lengths[row] = end
        if ones == len(rows):
            return hidden
        return hidden[torch.tensor([*accumulate(counts)], device=self.device) - 1]

    def _decode(
        self, rows: list[int], tokens: list[list[int]], positions: list[list[int]], graphs: Graphs
    ) -> Tensor:
        """One token for each of `rows`, by a graph. Slots in between run along: they write past their end,
        where no query looks.
        """
        lengths, longest = self.cache.lengths, max(self.cache.lengths) + 1
        # Every slot has a place past its end. How much is read, and so how sums are split, follows from the
        # longest one alone, not from what the cache has held before.
        used = -(-longest // _GRAPH_TOKENS) * _GRAPH_TOKENS
        self._reserve(used)
        inputs = torch.zeros(3, len(lengths), dtype=torch.int64)
        inputs[0, rows], inputs[1, rows] = torch.tensor(tokens)[:, 0], torch.tensor(positions)[:, 0]
        inputs[2] = torch.tensor(lengths)
        self._inputs.copy_(inputs, non_blocking=True)
        span = min(1 << max(rows).bit_length(), len(lengths))
        hidden = graphs.run((span, used), partial(self._decode_step, span, used))
        for row in rows:
            lengths[row] += 1
        return hidden[torch.tensor(rows, device=self.device)]

    def _decode_step(self, span: int, used: int) -> Tensor:
        """The device's part of `_decode`: sizes are numbers, all else is read from `_inputs`."""
        tokens, positions, lengths = self._inputs[:, :span]
        slots = torch.arange(span, device=self.device)
        part = AttentionMetadata(
            cache_batch_idx=slots.int(),
            contiguous=slice(0, span),
            query_lens=torch.ones_like(slots, dtype=torch.int32),
            cache_seqlens=(lengths + 1).int(),
            max_cache_seqlen=used,
            max_query_len=1,
            valid=None,
            num_tokens=span,
        )
        step = Step(self.cache.kv, self._flash, slots, lengths, [part])
        return self._forward(tokens, positions, step)

    def _forward(self, tokens: Tensor, positions: Tensor, step: Step) -> Tensor:
        """Hidden states [N, H] of tokens int64 [N]."""
        return self.trunk(
            input_ids=tokens[None],
            position_ids=positions[None],
            attention_mask=self._no_mask,
            use_cache=False,
            mem1_cache=step,
        ).last_hidden_state[0]


def _check_policy(model: PreTrainedModel) -> None:
    """InputError for what the engine would leave out or could not repeat."""
    config: Any = model.config
    head: Any = model.get_output_embeddings()
    if getattr(head, "bias", None) is not None:
        raise InputError("model: expected an output layer without bias, got one with bias")
    for name in ("final_logit_softcapping", "logits_scaling", "logit_scale"):
        if getattr(config, name, None) not in (None, 1, 1.0):
            raise InputError(f"model: expected plain logits, got {name}={getattr(config, name)}")
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if rope in ("dynamic", "longrope"):
        raise InputError(f"model: expected frequencies that stay as they are, got rope_type={rope!r}")
    if model.training and any(isinstance(m, nn.Dropout) and m.p > 0 for m in model.modules()):
        raise InputError("model: expected model.eval(), as it has dropout, got one in training mode")
