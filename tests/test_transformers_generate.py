"""`prune_generate`: the log-probs of what it writes are those of one forward with a TrajectoryMask; without a
rule it is `generate`.
"""

from __future__ import annotations

import re
from functools import partial
from typing import Any

import pytest
import torch
from test_integration_transformers import DEVICES, FAMILIES, VOCABULARY, build, twin
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor
from transformers import (
    DynamicCache,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.generation.streamers import BaseStreamer

from mem1.parsing.codec import Codec
from mem1.parsing.turn_eviction import TurnEviction
from mem1_core.eviction import evict_from_segments
from mem1_core.eviction_policies import EvictionPolicy
from mem1_core.integrations.transformers_cache import CACHE, SlotCache
from mem1_core.integrations.transformers_generate import prune_generate
from mem1_core.layout import TrajectoryLayout
from mem1_core.mask import TrajectoryMask

PAD, STATE, QUERY, ANSWER, EOS = range(5)  # the ids of </IS> and so on
PROMPTS = (9, 4, 13)


def make_codec() -> Codec:
    """Every word one token: the tags at the ids above, as the models here are random and small."""
    tags = "</IS> </query> </answer> <eos> <IS> <query> <answer> <info> </info>".split()
    words = ["<pad>", *tags, *[f"w{n}" for n in range(len(tags) + 1, VOCABULARY)]]
    core = Tokenizer(WordLevel({word: n for n, word in enumerate(words)}, unk_token=words[-1]))
    core.pre_tokenizer = WhitespaceSplit()
    return Codec(PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>", pad_token="<pad>"))


CODEC = make_codec()


class Script(LogitsProcessor):
    """Token `script[row][step]` is certain; elsewhere no tag comes up by chance."""

    def __init__(self, script: list[dict[int, int]], start: int) -> None:
        self.script, self.start = script, start

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores = scores.clone()
        scores[:, : EOS + 1] = -torch.inf
        for row, steps in enumerate(self.script):
            token = steps.get(input_ids.shape[1] - self.start)
            if token is not None:
                scores[row] = -torch.inf
                scores[row, token] = 0.0
        return scores


def ids(count: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(EOS + 1, VOCABULARY, (count,), generator=generator).tolist()


def padded(rows: list[list[int]]) -> dict[str, Tensor]:
    """`input_ids` and `attention_mask`, padded on the left."""
    width = max(map(len, rows))
    tokens = torch.tensor([[PAD] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return {"input_ids": tokens, "attention_mask": mask}


def generate(
    model: PreTrainedModel, rows: list[list[int]], script: list[dict[int, int]], **options: Any
) -> Any:
    """One call of `generate`, sampling, with each step's logits."""
    inputs = {name: tensor.to(model.device) for name, tensor in padded(rows).items()}
    script_processor = Script(script, inputs["input_ids"].shape[1])
    return model.generate(
        **inputs, custom_generate=prune_generate, logits_processor=LogitsProcessorList([script_processor]),
        do_sample=True, return_dict_in_generate=True, output_logits=True, pad_token_id=PAD, eos_token_id=EOS,
        **options,
    )  # fmt: skip


def recomputed(model: PreTrainedModel, tokens: list[int], mask: TrajectoryMask) -> Tensor:
    """[N, V], the log-probs after each token, by one forward."""
    with torch.no_grad():
        ids, mask = torch.tensor([tokens], device=model.device), mask.to(model.device)
        logits = twin(model, "mem1")(ids, mem1_mask=mask, use_cache=False).logits
    return logits[0].log_softmax(-1)


def distance(
    model: PreTrainedModel, tokens: list[int], mask: TrajectoryMask, logits: dict[int, Tensor]
) -> float:
    """The largest difference of the log-probs that the tokens at the places `logits` were written with."""
    exact = recomputed(model, tokens, mask)
    return max(
        float((row.log_softmax(-1)[tokens[n]] - exact[n - 1, tokens[n]]).abs()) for n, row in logits.items()
    )


def no_prune(mask: TrajectoryMask) -> TrajectoryMask:
    return TrajectoryMask.from_evict(torch.full_like(mask.evict_at, mask.shape[1]))


# -------------------------------------------------------------------------------------------- exactness

# Steps at which a tag is written: four turns or more, which end at different steps, each row its own way.
FOUR_TURNS: list[dict[int, int]] = [
    {3: STATE, 6: QUERY, 11: STATE, 13: QUERY, 20: STATE, 24: QUERY, 29: STATE, 33: ANSWER, 36: EOS},
    {2: STATE, 5: QUERY, 9: QUERY, 12: STATE, 13: QUERY, 18: STATE, 22: QUERY, 24: STATE, 28: STATE, 30: EOS},
    {7: STATE, 8: QUERY, 15: STATE, 21: QUERY, 26: STATE, 27: QUERY, 33: QUERY, 39: QUERY},
]


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("prune", ["action", "state"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_was_written_is_exact(
    family: str, implementation: str, prune: EvictionPolicy, rows: int
) -> None:
    """All turns in one call, and in no more room than the mask says is live at once."""
    model = build(family, implementation)
    prompts = [ids(n, seed=n) for n in PROMPTS[:rows]]
    rule = TurnEviction(CODEC, prune)
    options = {"eviction_policy": rule, "max_new_tokens": 44}
    torch.manual_seed(0)
    out = generate(model, prompts, FOUR_TURNS[:rows], **options)
    start, peak = max(PROMPTS[:rows]), 0
    for row, prompt in enumerate(prompts):
        given, written = out[CACHE].run_lengths[row]
        tokens = prompt + out.sequences[row, start : start + written].tolist()
        assert given == len(prompt) and (out.sequences[row, start + written :] == PAD).all()
        segments = rule.segments(tokens, (given, written))
        assert segments[-1].turn >= 4
        mask = TrajectoryLayout.from_segments(segments, prune=prune).mask
        logits = {given + step: out.logits[step][row] for step in range(written)}
        assert distance(model, tokens, mask, logits) <= 5e-5
        assert distance(model, tokens, no_prune(mask), logits) > 1e-3  # the prune is felt
        peak = max(peak, int(mask.peak_tokens()))
    torch.manual_seed(0)
    again = generate(model, prompts, FOUR_TURNS[:rows], capacity=peak, **options)
    assert torch.equal(again.sequences, out.sequences)
    with pytest.raises(ValueError, match=f"capacity: expected room for {peak} tokens in slot"):
        generate(model, prompts, FOUR_TURNS[:rows], capacity=peak - 1, **options)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_an_environment_answers(family: str, implementation: str, rows: int, device: str) -> None:
    """A call for each turn, over one cache. Actions end at different steps or by the limit, a row early."""
    model = build(family, implementation).to(device)
    rule = TurnEviction(CODEC)
    tokens = [ids(n, seed=n) for n in PROMPTS[:rows]]
    logits: list[dict[int, Tensor]] = [{} for _ in tokens]
    cache = SlotCache(model, rows, 60)
    place = cache.kv.data_ptr()
    torch.manual_seed(0)
    for turn in range(5):
        script = [{2 + row: STATE, (5 + 3 * row + turn) % 9 + 4: EOS} for row in range(rows)]
        out = generate(model, tokens, script, eviction_policy=rule, **cache.kwargs, max_new_tokens=10)
        start = max(map(len, tokens))
        for row, stream in enumerate(tokens):
            runs = cache.run_lengths[row]
            if row == 1 and turn == 4:  # it was given nothing, so it has written nothing
                assert (out.sequences[row, start:] == PAD).all() and len(runs) == 8
                continue
            assert len(runs) == 2 * (turn + 1) and sum(runs[:-1]) == len(stream)
            for step in range(runs[-1]):
                logits[row][len(stream)] = out.logits[step][row]
                stream.append(int(out.sequences[row, start + step]))
            live = sum(part.length for part in rule.segments(stream, runs) if part.turn in (0, turn + 1))
            assert (cache.positions[row], cache.lengths[row]) == (len(stream), live)
            if not (row == 1 and turn == 3):
                stream += ids(4 + 5 * row + turn, seed=turn)
    for row, stream in enumerate(tokens):
        stream = stream[: sum(cache.run_lengths[row])]
        mask = TrajectoryLayout.from_segments(rule.segments(stream, cache.run_lengths[row])).mask
        assert distance(model, stream, mask, logits[row]) <= 5e-5
        assert distance(model, stream, no_prune(mask), logits[row]) > 1e-3
    assert cache.kv.data_ptr() == place and max(map(len, tokens)) > cache.capacity


@pytest.mark.parametrize("prune", ["action", "state", "never"])
def test_the_rule_is_the_table(prune: EvictionPolicy) -> None:
    """What is left after each token written is what the table of the whole trajectory says."""
    generator = torch.Generator().manual_seed(0)
    rule = TurnEviction(CODEC, prune)
    tokens, runs, left = ids(6), [6], torch.ones(6, dtype=torch.bool)
    seen: list[Tensor] = []
    for _ in range(12):
        length = int(torch.randint(1, 12, (), generator=generator))
        runs.append(0)
        for n in range(length):
            tokens.append(int(torch.randint(STATE, 9, (), generator=generator)))
            runs[-1] += 1
            left = torch.nn.functional.pad(left, (0, 1), value=True)
            alive = rule(tokens, runs, n == length - 1)
            left = left if alive is None else left & alive
            seen.append(left)
        runs.append(5)
        tokens += ids(5)
        left = torch.nn.functional.pad(left, (0, 5), value=True)
    evict = evict_from_segments(rule.segments(tokens, runs), prune)
    for left in seen:
        assert torch.equal(left, evict[: len(left)] > len(left))
    assert all(left.all() for left in seen) == (prune == "never")


# ----------------------------------------------------------------------------------- without a rule


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": False},
        {"do_sample": False, "repetition_penalty": 1.3, "min_new_tokens": 5},
        {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "num_return_sequences": 2},
    ],
    ids=["greedy", "processors", "sampling"],
)
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_generate(family: str, implementation: str, options: dict[str, Any]) -> None:
    """Token for token, ended by `eos_token_id` where that comes up."""
    model = build(family, implementation)
    inputs = padded([ids(n, seed=n) for n in PROMPTS])
    options = {
        **inputs,
        **options,
        "max_new_tokens": 24,
        "pad_token_id": PAD,
        "eos_token_id": list(range(1, 14)),
    }
    torch.manual_seed(0)
    wanted = model.generate(**options, return_dict_in_generate=True, output_scores=True)
    torch.manual_seed(0)
    got = model.generate(
        **options, return_dict_in_generate=True, output_scores=True, custom_generate=prune_generate
    )
    assert torch.equal(got.sequences, wanted.sequences)
    finished = (wanted.sequences == PAD)[:, max(PROMPTS) :].sum(1)
    assert len(set(finished.tolist())) > 1  # rows that end at different steps
    for step, (a, b) in enumerate(zip(got.scores, wanted.scores, strict=True)):
        live = wanted.sequences[:, max(PROMPTS) + step] != PAD
        torch.testing.assert_close(a[live], b[live], atol=2e-5, rtol=2e-5)
    torch.manual_seed(0)
    assert torch.equal(model.generate(**options, custom_generate=prune_generate), wanted.sequences)


@pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning")
@pytest.mark.parametrize("name", sorted({"past_key_values", CACHE}))
def test_the_cache_has_the_names_that_transformers_takes(name: str) -> None:
    model = build("Qwen2", "sdpa")
    cache, tokens = SlotCache(model, 1, 16), torch.tensor([ids(6)])
    out = model.generate(
        tokens,
        custom_generate=prune_generate,
        max_new_tokens=4,
        do_sample=False,
        pad_token_id=PAD,
        **{name: cache},
    )
    assert cache.positions.tolist() == [out.shape[1]]  # what was written has been read, for the next call


def test_no_padding_and_no_pad_token() -> None:
    model = build("Llama", "sdpa")
    model.generation_config.pad_token_id = model.generation_config.eos_token_id = None
    tokens = torch.tensor([ids(6, seed=1), ids(6, seed=2)])
    options = {"max_length": 20, "do_sample": False}
    got = model.generate(tokens, custom_generate=prune_generate, **options)
    assert torch.equal(got, model.generate(tokens, **options))


def test_tokens_are_streamed() -> None:
    class Collector(BaseStreamer):
        def __init__(self) -> None:
            self.tokens: list[int] = []
            self.ended = 0

        def put(self, value: Tensor) -> None:
            self.tokens += value.flatten().tolist()

        def end(self) -> None:
            self.ended += 1

    streamer, model = Collector(), build("Qwen2", "sdpa")
    loop = partial(prune_generate, streamer=streamer)
    out = model.generate(
        torch.tensor([ids(5)]), custom_generate=loop, streamer=streamer, max_new_tokens=6, do_sample=False
    )
    assert streamer.tokens == out[0].tolist() and streamer.ended == 1


# ------------------------------------------------------------------------------------------ refusals


def test_refusals() -> None:
    model = build("Qwen2", "sdpa")
    inputs = padded([ids(6), ids(4)])
    filled = DynamicCache(config=model.config)
    with torch.no_grad():
        model(inputs["input_ids"], **{CACHE: filled})

    def refused(message: str, **options: Any) -> None:
        options = {**inputs, "max_new_tokens": 3, "pad_token_id": PAD, **options}
        with pytest.raises(ValueError, match=re.escape(message)):
            model.generate(**options, custom_generate=prune_generate)

    refused("num_beams=1, got 2", num_beams=2)
    refused("output_attentions=False", output_attentions=True, return_dict_in_generate=True)
    refused("got inputs_embeds", inputs_embeds=model.get_input_embeddings()(inputs["input_ids"]))
    refused("expected a SlotCache, got a filled DynamicCache", **{CACHE: filled})
    refused("expected a SlotCache of 2 rows, got 3", **SlotCache(model, 3, 16).kwargs)
    refused("capacity: expected room for 7 tokens in slot 0, got 6", capacity=6)
    refused(
        "eviction_policy: expected bool [6] or None, got torch.bool [3]",
        eviction_policy=lambda *_: torch.ones(3).bool(),
    )
    for wrong in ("action", lambda segments: [True]):
        refused("eviction_policy: expected a function of a row's tokens", eviction_policy=wrong)
    with pytest.raises(TypeError, match="codec: expected a Codec, got "):
        TurnEviction(CODEC.tokenizer)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="prune: expected"):
        TurnEviction(CODEC, "all")  # type: ignore[arg-type]

    cache = SlotCache(model, 2, 32)
    out = model.generate(
        **inputs, custom_generate=prune_generate, **cache.kwargs, max_new_tokens=3, pad_token_id=PAD
    )
    refused("input_ids: expected tokens that the cache has not read", **cache.kwargs, **both(out, [9, 7]))
    refused("input_ids[1]: expected all tokens so far, 7 or more", **cache.kwargs, **both(out, [9, 6]))
    more = torch.cat([out, out[:, :2]], dim=1)
    only_new = both(more, [11, 9]) | {"input_ids": more[:, 9:]}
    refused("attention_mask: expected the shape of input_ids", **cache.kwargs, **only_new)
    cache.prune(torch.arange(9).expand(2, 9) > 3, "compact")
    refused("kept its positions", **cache.kwargs, **both(more, [11, 9]))


def both(tokens: Tensor, counts: list[int]) -> dict[str, Tensor]:
    """The last `counts` tokens of each row."""
    columns = torch.arange(tokens.shape[1])
    return {
        "input_ids": tokens,
        "attention_mask": (columns >= tokens.shape[1] - torch.tensor(counts)[:, None]).long(),
    }
