"""SlotCache: what a plain model computes over it, what is in it, and what it refuses."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from test_integration_transformers import DEVICES, FAMILIES, VOCABULARY, build, twin
from torch import Tensor
from transformers import PreTrainedModel

from mem1_core.integrations.transformers_cache import SlotCache

IMPLEMENTATIONS = ("sdpa", "eager", "mem1")


@pytest.fixture(autouse=True)
def no_gradients() -> Any:
    with torch.no_grad():
        yield


def ids(count: int, rows: int = 1, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, VOCABULARY, (rows, count), generator=generator)


def dense_logits(model: PreTrainedModel, tokens: Tensor, visible: Tensor) -> Tensor:
    """[N, V] of one row's tokens [N] in one forward with positions 0 .. N-1 and the mask `visible` [N, N]."""
    exact = twin(model, "sdpa")
    return exact(tokens[None], attention_mask=visible.tril()[None, None], use_cache=False).logits[0]


def state(cache: SlotCache) -> list[Tensor]:
    return [x.clone() for x in (cache.kv, cache.lengths, cache.positions, cache.entries)]


def same_state(cache: SlotCache, before: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(state(cache), before, strict=True))


def close(got: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(got, wanted, atol=2e-5, rtol=2e-5)


# ---------------------------------------------------------------------------------------------- forwards


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_of_one_is_pruned_without_any_help(family: str, implementation: str) -> None:
    """Masks and positions are those that transformers makes of what the cache tells it."""
    model = build(family, implementation)
    tokens = ids(20)
    cache = SlotCache(model, 1, 24)
    place = cache.kv.data_ptr()
    visible = torch.ones(20, 20, dtype=torch.bool)
    parts = [model(tokens[:, :9], **cache.kwargs).logits]
    cache.prune(torch.tensor([[1, 1, 1, 0, 0, 1, 0, 0, 1]]).bool())
    visible[9:, [3, 4, 6, 7]] = False
    for begin, end in ((9, 10), (10, 15)):  # one token; several at once
        parts.append(model(tokens[:, begin:end], **cache.kwargs).logits)
    cache.prune([[(0, 5), (6, 10)]])  # entry 5 is token 9
    visible[15:, [9, 14]] = False
    cache.prune(torch.arange(9)[None] < 9)
    parts.append(model(tokens[:, 15:], **cache.kwargs).logits)
    close(torch.cat(parts, dim=1)[0], dense_logits(model, tokens[0], visible))
    assert cache.kv.data_ptr() == place == cache.layers[0].keys.data_ptr()
    assert (cache.get_seq_length(), cache.used, cache.get_max_length()) == (20, 14, 24)
    assert cache.entries[0, :14].tolist() == [0, 1, 2, 5, 8, 10, 11, 12, 13, 15, 16, 17, 18, 19]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_ragged_rows_with_poisonous_padding(implementation: str, device: str) -> None:
    """Each row gets what it gets alone, though padding is NaN: it is neither stored nor seen."""
    model = build("Qwen3", implementation).to(device)
    model.get_input_embeddings().weight[0] = torch.nan
    tokens, cache = ids(30, rows=3).to(device), SlotCache(model, 3, 16)
    visible = torch.ones(3, 30, 30, dtype=torch.bool, device=device)
    got: list[list[Tensor]] = [[], [], []]
    read = [0, 0, 0]
    keeps = {2: {0: [1, 2, 5]}, 4: {0: [0], 2: [0, 1, 2, 3, 7]}}
    for turn, counts in enumerate(([4, 7, 1], [3, 0, 2], [1, 1, 1], [0, 0, 5], [2, 4, 1], [5, 3, 0])):
        if turn in keeps:
            keep = torch.ones(3, cache.used, dtype=torch.bool)
            for row, gone in keeps[turn].items():
                keep[row, gone] = False
                for token in cache.entries[row, gone].tolist():
                    visible[row, read[row] :, token] = False
            cache.prune(keep)
        batch = torch.zeros(3, max(counts), dtype=torch.int64, device=device)
        for row, count in enumerate(counts):
            batch[row, :count] = tokens[row, read[row] : read[row] + count]
        logits = model(batch, **cache.forward_kwargs(counts)).logits
        for row, count in enumerate(counts):
            got[row].append(logits[row, :count])
            read[row] += count
    assert cache.kv.isfinite().all()
    assert cache.positions.tolist() == read and cache.lengths.tolist() == [11, 15, 5]
    for row, parts in enumerate(got):
        n = read[row]
        close(torch.cat(parts), dense_logits(model, tokens[row, :n], visible[row, :n, :n]))


def test_padding_needs_no_positions_of_its_own() -> None:
    """Positions that are looked up end with the table, for rows that are full or still empty as well."""
    model = build("GPTBigCode", "sdpa", max_position_embeddings=8, num_key_value_heads=1, head_dim=16)
    cache, tokens = SlotCache(model, 3, 8), ids(8, rows=3)
    model(tokens, **cache.forward_kwargs([8, 5, 0]))
    got = model(tokens[:, 5:], **cache.forward_kwargs([0, 3, 2])).logits
    close(got[1], model(tokens[1:2], use_cache=False).logits[0, 5:])
    close(got[2, :2], model(tokens[2:, 5:7], use_cache=False).logits[0])


@pytest.mark.parametrize(
    "rope", [None, {"rope_type": "yarn", "factor": 4.0}, {"rope_type": "linear", "factor": 2.0}]
)
def test_compact_positions(rope: dict[str, Any] | None) -> None:
    """The first layer's keys, which follow from token and position alone, are those of a new encoding."""
    settings = {} if rope is None else {"rope_parameters": {"rope_theta": 10000.0, **rope}}
    model = build("Llama", "sdpa", **settings)
    tokens, cache = ids(12, rows=2), SlotCache(model, 2, 16)
    model(tokens, **cache.kwargs)
    keep = torch.ones(2, 12, dtype=torch.bool)
    keep[0, 2:7], keep[1, [0, 3]] = False, False
    cache.prune(keep, "compact")
    assert cache.lengths.tolist() == cache.positions.tolist() == [7, 10]
    cache.prune([[(1, 7)], [(0, 10)]], "compact")  # one after another
    keep[0, 0] = False
    for row in range(2):
        left = tokens[row, keep[row]]
        again = SlotCache(model, 1, 16)
        model(left[None], **again.kwargs)
        close(cache.kv[0, 0, row, : len(left)], again.kv[0, 0, 0, : len(left)])
    step = cache.forward_kwargs([1, 1])
    assert step["position_ids"].tolist() == [[6], [10]] and step["attention_mask"] is not None


def test_as_the_cache_of_generate() -> None:
    """Greedy, sampled, left-padded and beam search: token for token as with a DynamicCache."""
    model = build("Qwen2", "sdpa")
    tokens = ids(9, rows=2)
    padding = torch.ones_like(tokens)
    padding[1, :4] = 0
    for options in ({}, {"do_sample": True}, {"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}):
        options = {"attention_mask": padding, "max_new_tokens": 12, "do_sample": False} | options
        torch.manual_seed(0)
        wanted = model.generate(tokens, **options)
        cache = SlotCache(model, 2 * options.get("num_beams", 1), 32)
        torch.manual_seed(0)
        assert torch.equal(model.generate(tokens, **cache.kwargs, **options), wanted)


def test_generate_goes_on_after_a_prune() -> None:
    """`generate` feeds what the cache has not read, at its positions: a cache says how much it has read."""
    model = build("Qwen2", "sdpa")
    cache, tokens = SlotCache(model, 1, 32), ids(10)
    model(tokens[:, :7], **cache.kwargs)
    cache.prune([[(0, 2), (5, 7)]])
    out = model.generate(tokens, **cache.kwargs, max_new_tokens=8, do_sample=False)
    visible = torch.ones(18, 18, dtype=torch.bool)
    visible[7:, 2:5] = False
    assert torch.equal(dense_logits(model, out[0], visible)[9:-1].argmax(-1), out[0, 10:])


# ------------------------------------------------------------------------------------------ the slots


def test_crop_reorder_reset_and_copy() -> None:
    model = build("Qwen2", "sdpa")
    cache, tokens = SlotCache(model, 3, 12), ids(8, rows=3)
    model(tokens, **cache.kwargs)
    cache.prune([[(0, 8)], [(0, 2), (7, 8)], [(0, 3)]])
    cache.crop(0)
    assert cache.lengths.tolist() == [8, 3, 3]
    cache.crop(-2)  # of row 1 only one entry is that new, of row 2 none
    assert cache.lengths.tolist() == [6, 2, 3] and cache.positions.tolist() == [6, 6, 6]
    twin_cache = copy.deepcopy(cache)
    place, before = cache.kv.data_ptr(), cache.kv.clone()
    cache.run_lengths = [[1], [2], [3]]
    cache.reorder_cache(torch.tensor([1, 1, 0]))
    assert cache.run_lengths == [[2], [2], [1]]
    assert cache.lengths.tolist() == [2, 2, 6] and cache.kv.data_ptr() == place
    assert torch.equal(cache.kv[:, :, 2, :6], before[:, :, 0, :6])
    assert torch.equal(twin_cache.kv, before)  # a copy has slots of its own, and its layers write to these
    assert twin_cache.layers[1].values.data_ptr() == twin_cache.kv[1, 1].data_ptr()
    cache.crop(-99)
    assert cache.used == 0 and cache.get_seq_length() == 0
    cache.reset()
    assert not cache.kv.any() and cache.run_lengths == [[], [], []]
    cache.prune(torch.ones(3, 0, dtype=torch.bool))  # nothing there, nothing wrong
    again = model(tokens, **cache.kwargs).logits
    close(again, model(tokens, use_cache=False).logits)


def test_a_full_slot_refuses_and_stays_as_it_was() -> None:
    model = build("Qwen2", "sdpa")
    cache, tokens = SlotCache(model, 2, 10), ids(8, rows=2)
    model(tokens, **cache.kwargs)
    cache.prune([[(0, 8)], [(0, 5)]])
    before = state(cache)
    message = re.escape("capacity: expected room for 11 tokens in slot 0, got 10")
    with pytest.raises(ValueError, match=message):
        cache.forward_kwargs([3, 3])
    with pytest.raises(ValueError, match=message):  # with a mask of one's own, so that only layers can tell
        model(tokens[:, :3], **cache.kwargs, attention_mask=torch.ones(2, 1, 3, 11, dtype=torch.bool))
    assert same_state(cache, before)
    close(  # row 1 has room, and the cache still works
        model(tokens[:, :2], **cache.forward_kwargs([0, 2])).logits[1, 1],
        dense_logits(model, torch.cat([tokens[1], tokens[1, :2]]), visible_but(10, 8, slice(5, 8)))[-1],
    )


def visible_but(n: int, begin: int, gone: slice) -> Tensor:
    visible = torch.ones(n, n, dtype=torch.bool)
    visible[begin:, gone] = False
    return visible


def test_a_forward_that_fails_leaves_nothing_behind() -> None:
    model = build("Qwen2", "sdpa")
    cache, tokens = SlotCache(model, 1, 16), ids(8)
    model(tokens[:, :5], **cache.kwargs)
    hook = model.model.layers[1].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(tokens[:, 5:], **cache.forward_kwargs(3))
    hook.remove()
    assert cache.lengths.tolist() == [5] and cache.get_seq_length() == 5
    got = model(tokens[:, 5:7], **cache.kwargs).logits  # another width: no announcement is left
    close(got, model(tokens[:, :7], use_cache=False).logits[:, 5:])


# ------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: transformers.Llama4TextConfig(), "got chunked_attention"),
        (lambda: transformers.DeepseekV3Config(), "got the latent ones of kv_lora_rank=512"),
        (lambda: transformers.T5Config(), "is_encoder_decoder=True"),
        (lambda: transformers.MambaConfig(), "got linear_attention"),
        (lambda: transformers.RwkvConfig(), "RwkvConfig without num_attention_heads"),
        (lambda: build("Mpt", "eager"), "AttentionInterface"),  # positions as a bias on where a key lies
    ],
    ids=["layer types", "latent", "encoder", "state space", "no attention", "own attention"],
)
def test_models_that_no_slot_can_hold(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"SlotCache: .*{message}"):
        SlotCache(make(), 1, 16)


def test_refusals() -> None:
    model = build("Qwen2", "sdpa")
    cache, tokens = SlotCache(model.config, 2, 16), ids(6, rows=2)

    def refused(message: str, call: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        before = state(cache)
        with pytest.raises(ValueError, match=re.escape(message)):
            call(*args, **kwargs)
        assert same_state(cache, before)

    with pytest.raises(ValueError, match="batch: expected an integer >= 1, got 0"):
        SlotCache(model, 0, 4)
    with pytest.raises(ValueError, match=r"capacity: expected an integer >= 1, got 64\.0"):
        SlotCache(model, 1, 64.0)
    assert (cache.kv.dtype, cache.kv.device.type) == (torch.float32, "cpu")
    refused("new_tokens: expected 0 or more", cache.forward_kwargs, [0, 0])
    refused("new_tokens: expected 0 or more", cache.forward_kwargs, [2, -1])
    refused("keys and values [2, 2, 6, 32], torch.float32", model, ids(6, rows=3), **cache.kwargs)
    refused("got [2, 2, 6, 32], torch.bfloat16", copy.deepcopy(model).bfloat16(), tokens, **cache.kwargs)
    refused("inv_freq: expected RoPE's frequencies", cache.prune, torch.ones(2, 0).bool(), "compact")
    model(tokens, **cache.kwargs)
    refused("keep: expected a mask of shape [2, 6]", cache.prune, torch.ones(2, 5).bool())
    refused("keep", cache.prune, [[(0, 3), (2, 6)], []])
    refused("keep", cache.prune, [[(0, 3)], [(0, 7)]])
    refused("positions: expected", cache.prune, torch.ones(2, 6).bool(), "close")
    kv = torch.zeros(2, 2, 1, 32)
    refused("attends once in each of its 2 layers, got layer 2", cache.update, kv, kv, 2)
    refused("tokens_to_remove: expected 0 or less, got 3", cache.crop, 3)
    refused("got 2 repeats", cache.batch_repeat_interleave, 2)
    refused("a selection of rows", cache.batch_select_indices, torch.tensor([0]))
    cache.forward_kwargs(3)
    refused("the 3 columns that `forward_kwargs` announced, got 5", model, tokens[:, :5], **cache.kwargs)

    cache.prune([[(0, 6)], [(2, 6)]])
    refused("expected the attention_mask of `SlotCache.forward_kwargs`", model, tokens[:, :1], **cache.kwargs)
    refused("positions: expected 'keep'", cache.prune, torch.ones(2, 6).bool(), "compact")
    model.config._attn_implementation = "flash_attention_2"
    refused(
        "'sdpa', 'eager' or 'mem1' for rows that differ and windows, got 'flash_attention_2'",
        cache.forward_kwargs,
        [1, 1],
    )


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("Cohere", {}),  # turns neighbours, not halves
        ("Llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}),
        ("GPTNeoX", {"head_dim": 16, "num_key_value_heads": 4}),  # turns a part of the dimensions
    ],
)
def test_keys_that_cannot_be_turned(family: str, settings: dict[str, Any]) -> None:
    model = build(family, "sdpa", **settings)
    cache = SlotCache(model, 1, 8)
    model(ids(4), **cache.kwargs)
    before = state(cache)
    with pytest.raises(ValueError, match="inv_freq: expected"):
        cache.prune([[(1, 4)]], "compact")
    assert same_state(cache, before)
