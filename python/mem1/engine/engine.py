"""Batched generation over a slot cache.

The engine knows tokens, slots and positions; what a token means and when a cache is pruned is `rollout`'s
business.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import accumulate, chain, repeat
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from mem1.checks import require
from mem1.config import RolloutConfig
from mem1.engine.cpu_products import BlockProducts, has_large_layers
from mem1.engine.cuda_graphs import Graphs
from mem1.engine.output_layer import output_layer
from mem1.engine.policy_checks import check_policy, check_repeatable
from mem1.engine.sampling import Sampled, joined, sample, temporary_bytes
from mem1.engine.slot_attention import AttentionMetadata, Step, find_flash_attention
from mem1.engine.slots import Slots
from mem1_core._head import ChunkedLMHead
from mem1_core.integrations.transformers import cache_shape, has_windows

_GRAPH_TOKENS = 256  # captured decode steps see a multiple of this
_PIECE = 2048  # tokens of a row in one forward: the mask that SDPA wants has so many rows
# Logits of the rows that are sampled at a time, 48 of 151,936: a call reads the whole output weight, and on
# the CPU takes as long for 16 rows as for one; from there on the time is that of the rows.
LOGITS_BYTES = 32 * 2**20


class Engine:
    """A model and its slots. Rows are named by their slot; `cache.lengths` says how much each one holds.

    On CUDA a decode step (one token for each row) is captured in a CUDA graph, one for each power of two of
    rows and multiple of 256 tokens seen; elsewhere, and for longer pieces, the same layers run eagerly.

    model: a causal decoder with attention "mem1" that `check_policy` takes; raises InputError, with the
    reason, for another one. capacity: the tokens that a slot has room for, reserved at once and never more,
    so that no growth copies the cache (on the CPU, memory is only used once it is written); without, slots
    grow.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        num_slots: int,
        max_num_batched_tokens: int = 4096,
        *,
        capacity: int | None = None,
    ) -> None:
        check_policy(model)
        require(num_slots >= 1, "num_slots", "an integer >= 1", num_slots)
        require(capacity is None or capacity >= 1, "capacity", "an integer >= 1 or None", capacity)
        self.model, self.trunk = model, cast(Any, model.get_decoder())
        self._busy = False
        self._refresh()
        self.max_num_batched_tokens = max_num_batched_tokens
        weight = next(self.trunk.parameters())
        self.device = weight.device
        layers, kv_heads, head_dim = cache_shape(model.config)
        reserved = None if capacity is None else reserved_tokens(capacity, self.device)
        self.cache = Slots(
            layers,
            num_slots,
            kv_heads,
            head_dim,
            weight.dtype,
            self.device,
            reserved,
            keep_positions=has_windows(model.config),
        )
        self.capacity = capacity
        self._flash = find_flash_attention(self.cache.kv)
        # What a captured decode step reads: token, position and length before it, of each slot.
        self._inputs = torch.zeros(3, num_slots, dtype=torch.int64, device=self.device)
        self._graphs: Graphs | None = Graphs(self.device) if self.device.type == "cuda" else None
        # What it looks at each call for shows in steps of tiny models.
        large = self.device.type == "cpu" and has_large_layers(self.trunk)
        self._products = BlockProducts() if large else None
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
        check_repeatable(self.model)
        layer = output_layer(self.model)
        bias = None if layer.bias is None else layer.bias.detach()
        self.head = layer._replace(weight=layer.weight.detach(), bias=bias)

    @torch.inference_mode()
    def feed(self, rows: list[int], tokens: list[list[int]], positions: list[list[int]]) -> Tensor:
        """Append `tokens[i]` at `positions[i]` to slot `rows[i]`; return the last token's hidden state,
        [len(rows), H].

        The lists may differ in length. Long ones are cut into pieces, and rows grouped so that one forward
        has at most `max_num_batched_tokens` tokens, counted as rows times their longest piece (a single
        longer piece still runs, alone; rows with one token are not counted).

        Raises ValueError, and changes nothing, where a slot has no room.
        """
        lengths = self.cache.lengths
        ends = {row: lengths[row] + len(t) for row, t in zip(rows, tokens, strict=True)}
        for row, end in ends.items():
            if self.capacity is not None and end > self.capacity:
                expected = f"at most {self.capacity}, the capacity of the engine"
                raise ValueError(f"tokens: expected {expected}, in slot {row}, got {end}")
        self._reserve(max(ends.values()))
        long = [i for i in range(len(rows)) if len(tokens[i]) > _PIECE]
        if long:
            self.feed(
                [rows[i] for i in long],
                [tokens[i][:-_PIECE] for i in long],
                [positions[i][:-_PIECE] for i in long],
            )
            tokens, positions = [t[-_PIECE:] for t in tokens], [p[-_PIECE:] for p in positions]
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
        """fp32 [n, V] of hidden states [n, H].

        As the trainer makes them: in bf16 their rounding alone would hide whether the two agree.
        """
        weight, bias, scale, cap = self.head
        head = ChunkedLMHead(hidden, weight, bias, None, sys.maxsize, softcap=cap or 0.0)
        logits = head.logits(slice(0, len(hidden)))
        if head.rows_bias is not None:
            logits += head.rows_bias
        return logits if scale == 1.0 else logits.mul_(scale)

    @torch.inference_mode()
    def sample(self, hidden: Tensor, uniform: Tensor, forced: Tensor, config: RolloutConfig) -> Sampled:
        """The next token of each row from its hidden state, [n, H]; uniform, forced [n] and what is returned
        as in `sampling.sample`.

        Logits exist for some rows at a time: `LOGITS_BYTES`, or one row, and what `sampling` says.
        """
        rows = logits_rows(self.head.weight)
        parts = zip(*(x.split(rows) for x in (hidden, uniform, forced)), strict=True)
        return joined([sample(self.logits(h), u, f, config) for h, u, f in parts])

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
        if self.cache.positions is not None:
            self.cache.positions[slots, columns] = places.int()
        parts = [
            AttentionMetadata.build(rows[part], counts[part], ends[part], self.device, self.cache.positions)
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
        if self.cache.positions is not None:
            self.cache.positions[slots, lengths] = positions.int()
        part = AttentionMetadata(
            cache_batch_idx=slots.int(),
            contiguous=slice(0, span),
            query_lens=torch.ones_like(slots, dtype=torch.int32),
            cache_seqlens=(lengths + 1).int(),
            max_cache_seqlen=used,
            max_query_len=1,
            valid=None,
            num_tokens=span,
            positions=self.cache.positions,
        )
        step = Step(self.cache.kv, self._flash, slots, lengths, [part])
        return self._forward(tokens, positions, step)

    def _forward(self, tokens: Tensor, positions: Tensor, step: Step) -> Tensor:
        """Hidden states [N, H] of tokens int64 [N]."""
        with nullcontext() if self._products is None else self._products:
            return self.trunk(
                input_ids=tokens[None],
                position_ids=positions[None],
                attention_mask=self._no_mask,
                use_cache=False,
                mem1_cache=step,
            ).last_hidden_state[0]


def reserved_tokens(capacity: int, device: torch.device) -> int:
    """Tokens that are reserved for a slot of that capacity. Captured steps read multiples of some tokens, and
    write one past the end of each slot.
    """
    return capacity if device.type == "cpu" else -(-(capacity + 1) // _GRAPH_TOKENS) * _GRAPH_TOKENS


def logits_rows(weight: Tensor) -> int:
    """Rows that are sampled at a time."""
    return max(1, LOGITS_BYTES // (4 * len(weight)))


def sampling_bytes(weight: Tensor, rows: int) -> int:
    """What `Engine.sample` allocates at most for that many rows."""
    rows = min(rows, logits_rows(weight))
    return 4 * rows * len(weight) + temporary_bytes(rows, len(weight), weight.device)


def forward_tokens(num_slots: int, capacity: int, max_num_batched_tokens: int) -> int:
    """The most tokens that one forward of an engine has: pieces, and rows with one token."""
    longest = min(_PIECE, capacity)
    return min(max(max_num_batched_tokens, longest) + num_slots, num_slots * longest)
