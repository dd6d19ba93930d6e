"""Batched generation over a slot cache.

The engine knows tokens, slots and positions; what a token means and when a cache is pruned is `rollout`'s
business.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mem1.slots import Slots, Step
from mem1_core.integrations.transformers import NAME

_GRAPH_TOKENS = 256  # captured decode steps see a multiple of this


class Engine:
    """A model and its slots. Rows are named by their slot; `cache.lengths` says how much each one holds.

    On CUDA a decode step (one token for each row) is captured in a CUDA graph, one for each power of two of
    rows and multiple of 256 tokens seen; elsewhere, and for longer pieces, the same code runs eagerly.
    """

    def __init__(self, model: nn.Module, slots: int, prefill_tokens: int = 16384) -> None:
        config: Any = model.config
        kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
        if kinds != {"full_attention"}:
            raise ValueError(
                f"model: wanted only full attention layers, which a KV cache can prune, got {sorted(kinds)}"
            )
        if config._attn_implementation != NAME:
            raise ValueError(
                f"model: wanted attn_implementation={NAME!r}, got {config._attn_implementation!r}; see "
                "mem1_core.integrations.transformers.register"
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
        self.cache = Slots(config.num_hidden_layers, slots, kv_heads, head_dim, dtype, self.device)
        # What a decode step reads: token, position and length before it, of each slot.
        self._inputs = torch.zeros(3, slots, dtype=torch.int64, device=self.device)
        self._graphs: dict[tuple[int, int], CapturedStep] = {}
        # A 4D mask goes straight to the layers, which do not look at it: transformers makes none of its own.
        self._no_mask = torch.empty(1, 1, 1, 1, dtype=torch.bool, device=self.device)

    @torch.inference_mode()
    def feed(self, rows: list[int], tokens: list[list[int]], positions: list[list[int]]) -> Tensor:
        """Append `tokens[i]` at `positions[i]` to slot `rows[i]`; return the last token's hidden state,
        [len(rows), H].

        The lists may differ in length. Long ones are grouped so that one forward has at most `prefill_tokens`
        tokens, padding included (a single longer row still runs, alone).
        """
        lengths = self.cache.lengths
        wanted = max(int(lengths[row]) + len(t) for row, t in zip(rows, tokens, strict=True))
        # One more for every slot: those that sit a decode step out write behind their end meanwhile.
        if self.cache.reserve(max(wanted, int(lengths.max()) + 1)):
            self._graphs.clear()
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
            out = self._prefill(
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

    def _prefill(self, rows: list[int], tokens: list[list[int]], positions: list[list[int]]) -> Tensor:
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
            rows=slice(rows[0], rows[0] + len(rows)) if contiguous else index.int().to(self.device),
            real=None if bool(real.all()) else real.to(self.device),
            slots=index[:, None].expand_as(column)[real].to(self.device),
            columns=column[real].to(self.device),
            ends=ends.int().to(self.device),
            used=int(ends.max()),
        )
        hidden = self._forward(ids.to(self.device), place.to(self.device), step)
        lengths[index] = ends
        return hidden

    def _decode(self, rows: list[int], tokens: list[list[int]], positions: list[list[int]]) -> Tensor:
        """One token for each of `rows`. Slots in between run along, which beats gathering the others' cache:
        they write behind their end, where nothing reads.
        """
        lengths = self.cache.lengths
        span, used = max(rows) + 1, int(lengths.max()) + 1
        inputs = torch.zeros(3, lengths.shape[0], dtype=torch.int64)
        inputs[2] = lengths
        index = torch.tensor(rows)
        inputs[0, index], inputs[1, index] = torch.tensor(tokens)[:, 0], torch.tensor(positions)[:, 0]
        self._inputs.copy_(inputs, non_blocking=True)
        if self.device.type == "cuda":
            span = min(1 << (span - 1).bit_length(), lengths.shape[0])
            used = min(-(-used // _GRAPH_TOKENS) * _GRAPH_TOKENS, self.cache.capacity)
            step = self._graphs.get((span, used))
            if step is None:
                step = self._graphs[span, used] = CapturedStep(partial(self._decode_step, span, used))
            hidden = step()
        else:
            hidden = self._decode_step(span, used)
        lengths[index] += 1
        return hidden[index.to(self.device)]

    def _decode_step(self, span: int, used: int) -> Tensor:
        """The device's part of `_decode`: sizes are numbers, all else is read from `_inputs`."""
        tokens, positions, lengths = self._inputs[:, :span]
        step = Step(
            kv=self.cache.kv,
            rows=slice(0, span),
            real=None,
            slots=torch.arange(span, device=self.device),
            columns=lengths,
            ends=(lengths + 1).int(),
            used=used,
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


class CapturedStep:
    """`body`, without arguments, as a CUDA graph; what it returns is overwritten by the next call.

    The body runs a few times before it is captured: it must be free to repeat itself.
    """

    def __init__(self, body: Callable[[], Tensor]) -> None:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                body()
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._result = body()

    def __call__(self) -> Tensor:
        self._graph.replay()
        return self._result
