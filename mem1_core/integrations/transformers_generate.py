"""A decoding loop for `model.generate` that drops tokens from the KV cache in place while it writes.

    out = model.generate(**inputs, custom_generate=prune_generate, eviction_policy=rule, max_new_tokens=512)

`mem1.parsing.turn_eviction.TurnEviction` makes a rule of a tokenizer and its tags.

To go on after the environment's answer, give each call the same `SlotCache` (`**cache.kwargs`: its name is
`cache`, before transformers 5.24 `past_key_values`), and all tokens so far: the cache knows which of them it
has read.

What is generated has the log-probs that one forward over all tokens gives with positions 0 .. N-1 and the
mask of what the rule has let go.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.generation import GenerateDecoderOnlyOutput

from mem1_core.integrations.transformers_cache import CACHE, SlotCache

EvictionFunction = Callable[[list[int], list[int], bool], Tensor | None]

# What `generate` hands to a loop for text; position ids follow from the mask.
_UNDERSTOOD = {"attention_mask", "position_ids", CACHE, "use_cache", "logits_to_keep"}


def prune_generate(
    model: Any,
    input_ids: Tensor,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    *,
    eviction_policy: EvictionFunction | None = None,
    capacity: int | None = None,
    streamer: Any = None,
    **model_kwargs: Any,
) -> GenerateDecoderOnlyOutput | Tensor:
    """Greedy decoding or sampling as transformers has it, over a `SlotCache` that is pruned as it goes.

    For `model.generate(..., custom_generate=prune_generate, eviction_policy=..., capacity=...)`, which
    prepares all else. Prompts may be padded anywhere, as `attention_mask` says; a row's positions count its
    own tokens.

    Args:
        eviction_policy: asked for each token that a row has written, and when it has read what it was given.
            Its arguments are the row's tokens so far; their runs: how many were given, then written, given,
            ...; and whether the row writes no more in this call. Returns bool [tokens], True for those that
            later ones may still see, or None for all. The last token is fed first: it sees what leaves.
        capacity: of the cache that is made where none is given; by default the longest possible sequence.
        streamer: give it to `generate` and, as that hands none on, here:
            `custom_generate=partial(prune_generate, streamer=streamer)`.
        cache, past_key_values before transformers 5.24: a `SlotCache`. It has read all tokens when the call
            returns, the last ones too. In the next call `input_ids` holds, in each row, what it held before,
            what was written, and more. A row without anything new writes nothing.

    Returns:
        As `model.generate`. Rows that are done are filled up with the pad token (0 where there is none).

    Raises:
        ValueError: for beam search, inputs other than text, attentions or hidden states as output, another
            cache than `SlotCache`, tokens that are not those the cache has read, and as
            `SlotCache.forward_kwargs`. An error on the way leaves the cache at a place that `reset` alone
            makes good.
    """
    _check_policy(eviction_policy)
    cache, streams = _begin(model, input_ids, generation_config, capacity, model_kwargs)
    pad = getattr(generation_config, "_pad_token_tensor", None)
    pad = input_ids.new_zeros(()) if pad is None else pad.to(input_ids)
    full_output = generation_config.return_dict_in_generate
    scores: tuple[Tensor, ...] | None = () if full_output and generation_config.output_scores else None
    raw: tuple[Tensor, ...] | None = () if full_output and generation_config.output_logits else None

    # 1. Read what is new.
    unread = [stream[read:] for stream, read in zip(streams, cache.positions.tolist(), strict=True)]
    writing = [bool(tokens) for tokens in unread]
    if not any(writing):
        raise ValueError("input_ids: expected tokens that the cache has not read, got none")
    keeps_logits = "logits_to_keep" in model_kwargs
    logits = _read(model, cache, unread, keeps_logits)
    for stream, runs in zip(streams, cache.run_lengths, strict=True):
        if given := len(stream) - sum(runs):
            _extend(runs, given, written=False)
    if eviction_policy is not None:
        asked = zip(streams, cache.run_lengths, writing, strict=True)
        _forget(cache, [_ask(eviction_policy, *row[:2], False) if row[2] else None for row in asked])

    last: list[list[int]] = [[] for _ in streams]  # of each row that is done: the token that is still unread
    stays: list[Tensor | None] = [None] * len(streams)  # what its prune leaves, once that token is read
    while any(writing):
        # 2. Choose a token for each row that writes.
        logits = logits.to(input_ids.device)
        processed = logits_processor(input_ids, logits)
        if scores is not None:
            scores += (processed,)
        if raw is not None:
            raw += (logits,)
        if generation_config.do_sample:
            chosen = torch.multinomial(processed.softmax(-1), num_samples=1)[:, 0]
        else:
            chosen = processed.argmax(-1)
        chosen = torch.where(torch.tensor(writing, device=chosen.device), chosen, pad)
        input_ids = torch.cat([input_ids, chosen[:, None]], dim=1)
        if streamer is not None:
            streamer.put(chosen.cpu())

        # 3. Ask what may leave after it.
        unread = [[] for _ in streams]
        due: list[Tensor | None] = [None] * len(streams)
        over = stopping_criteria(input_ids, scores).tolist()
        for row, token in enumerate(chosen.tolist()):
            if writing[row]:
                streams[row].append(token)
                _extend(cache.run_lengths[row], 1, written=True)
                writing[row] = not over[row]
                alive = (
                    None
                    if eviction_policy is None
                    else _ask(eviction_policy, streams[row], cache.run_lengths[row], over[row])
                )
                if over[row]:
                    last[row], stays[row] = [token], alive
                else:
                    unread[row], due[row] = [token], alive

        # 4. Read it, then forget: it still sees what leaves.
        if any(writing):
            logits = _read(model, cache, unread, keeps_logits)
            _forget(cache, due)

    if full_output or model_kwargs.get(CACHE) is cache:  # the cache outlives this call
        _read(model, cache, last, keeps_logits)
        _forget(cache, stays)
    if streamer is not None:
        streamer.end()
    if full_output:
        fields: dict[str, Any] = {"sequences": input_ids, "scores": scores, "logits": raw}
        return GenerateDecoderOnlyOutput(**fields, **cache.kwargs)
    return input_ids


def _check_policy(policy: Any) -> None:
    if policy is None:
        return
    try:
        inspect.signature(policy).bind([], [], False)
    except TypeError as error:
        expected = "a function of a row's tokens, their runs and whether it has ended, as TurnEviction is"
        raise ValueError(f"eviction_policy: expected {expected}, got {policy!r}: {error}") from None


def _begin(
    model: Any, input_ids: Tensor, config: Any, capacity: int | None, kwargs: dict[str, Any]
) -> tuple[SlotCache, list[list[int]]]:
    """The cache, and each row's tokens without padding. Refuses what the loop does not do."""
    if config.num_beams != 1:
        raise ValueError(f"prune_generate: expected num_beams=1, got {config.num_beams}")
    for name in ("output_attentions", "output_hidden_states"):
        if getattr(config, name):
            raise ValueError(f"prune_generate: expected {name}=False, got True")
    foreign = sorted(name for name, value in kwargs.items() if value is not None and name not in _UNDERSTOOD)
    if foreign:
        raise ValueError(
            f"prune_generate: expected input_ids and attention_mask, got {', '.join(foreign)} as well"
        )
    mask = kwargs.get("attention_mask")
    mask = torch.ones_like(input_ids) if mask is None else mask
    if mask.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask: expected the shape of input_ids, all tokens so far, {list(input_ids.shape)}, "
            f"got {list(mask.shape)}"
        )
    streams = [row[real].tolist() for row, real in zip(input_ids, mask.bool(), strict=True)]
    cache = kwargs.get(CACHE)
    if not isinstance(cache, SlotCache):
        if cache is not None and cache.get_seq_length():
            raise ValueError(f"{CACHE}: expected a SlotCache, got a filled {type(cache).__name__}")
        cache = SlotCache(model, len(streams), capacity or config.max_length)
    if cache.batch != len(streams):
        raise ValueError(f"{CACHE}: expected a SlotCache of {len(streams)} rows, got {cache.batch}")
    for row, (stream, read) in enumerate(zip(streams, cache.positions.tolist(), strict=True)):
        if sum(cache.run_lengths[row]) > read:
            raise ValueError(
                f"{CACHE}: expected a cache that has read all of row {row} and kept its positions"
            )
        if len(stream) < read:
            raise ValueError(
                f"input_ids[{row}]: expected all tokens so far, {read} or more as the cache has read these, "
                f"got {len(stream)}"
            )
    return cache, streams


def _read(model: Any, cache: SlotCache, tokens: list[list[int]], keeps_logits: bool) -> Tensor:
    """Feed each row its tokens; the logits after its last one, fp32 [B, V] (without any, of no meaning)."""
    counts = torch.tensor([len(row) for row in tokens])
    width = int(counts.max())
    ids = torch.tensor([row + [0] * (width - len(row)) for row in tokens], device=cache.kv.device)
    columns, index = (counts - 1).clamp(min=0).unique(return_inverse=True)
    options: dict[str, Any] = {"logits_to_keep": columns.to(ids.device)} if keeps_logits else {}
    out = model(input_ids=ids, use_cache=True, return_dict=True, **cache.forward_kwargs(counts), **options)
    place = (index if keeps_logits else columns[index]).to(out.logits.device)
    return out.logits[torch.arange(len(tokens), device=place.device), place].float()


def _extend(runs: list[int], count: int, *, written: bool) -> None:
    """Runs at even places were given, those at odd places written."""
    if len(runs) % 2 == written:
        runs.append(count)
    else:
        runs[-1] += count


def _ask(eviction_policy: EvictionFunction, tokens: list[int], runs: list[int], ended: bool) -> Tensor | None:
    alive = eviction_policy(tokens, runs, ended)
    if alive is not None and (alive.dtype != torch.bool or alive.shape != (len(tokens),)):
        raise ValueError(
            f"eviction_policy: expected bool [{len(tokens)}] or None, got {alive.dtype} {list(alive.shape)}"
        )
    return None if alive is None else alive.cpu()


def _forget(cache: SlotCache, alive: list[Tensor | None]) -> None:
    """Prune the rows for which there is an answer; in a row's tokens, an entry's index is its
    position."""
    keep = torch.ones(cache.batch, cache.used, dtype=torch.bool, device="cpu")
    for row, answer in enumerate(alive):
        if answer is not None:
            length = int(cache.lengths[row])
            keep[row, :length] = answer[cache.entries[row, :length].long()]
    if not keep.all():
        cache.prune(keep)
