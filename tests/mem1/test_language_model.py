"""Gemma 3 270M, which has seen language, over real passages: 15 of its 18 layers see 512 positions."""

from __future__ import annotations

import json
import os
import random
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from checkout import ROOT
from torch import Tensor
from transformers import DynamicCache, PreTrainedTokenizerBase

from mem1.config import RolloutConfig
from mem1.envs.base import Action, ExpertAction, Step
from mem1.models.load import load
from mem1.rollout.rollout_loop import rollout
from mem1.train.batches import PackedBatch, pack, recompute_logprobs
from mem1.train.parity import parity
from mem1_core.integrations.transformers_cache import CACHE, SlotCache
from mem1_core.integrations.transformers_generate import prune_generate
from mem1_core.layout import TrajectoryLayout
from mem1_core.mask import TrajectoryMask
from mem1_core.segments import Segment
from mem1_core.testing import assert_accurate

sys.path.insert(0, str(ROOT / "bench"))
from gemma import MISSING, installed, save

pytestmark = [pytest.mark.weights, pytest.mark.slow]
both_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


@pytest.fixture(scope="module")
def folder(request: pytest.FixtureRequest) -> Path:
    if given := os.environ.get("MEM1_GEMMA"):
        assert (Path(given) / "config.json").exists(), f"MEM1_GEMMA: no model in {given}"
        return Path(given)
    if not installed():
        pytest.skip(MISSING)
    made = request.config.cache.mkdir("gemma") / "model"
    if not made.exists():
        save(made)
    return made


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def passages(data_dir: Path) -> list[str]:
    with (data_dir / "qa" / "corpus.jsonl").open(encoding="utf-8") as lines:
        return [json.loads(line)["contents"] for line in islice(lines, 200)]


def model_of(folder: Path, attention: str, dtype: torch.dtype) -> tuple[Any, PreTrainedTokenizerBase]:
    model, tokenizer, _ = load(folder, dtype=str(dtype).removeprefix("torch."), attention=attention)
    return model, tokenizer


@both_dtypes
def test_logits_are_those_of_eager_attention(folder: Path, passages: list[str], dtype: torch.dtype) -> None:
    """After every 16th of 2,000 tokens, by the rule of two eager errors."""
    model, tokenizer = model_of(folder, "mem1", dtype)
    ids = tokenizer("\n".join(passages), return_tensors="pt").input_ids[:, :2000]
    mask = TrajectoryMask.from_evict(torch.full((2000,), 2000))
    rows = slice(15, None, 16)

    def logits(model: Any, **masks: Any) -> Tensor:
        return model.lm_head(model.model(ids, use_cache=False, **masks).last_hidden_state[:, rows])

    got = logits(model, mem1_mask=mask)
    model.set_attn_implementation("eager")
    plain = logits(model)
    model.to(torch.float64).set_attn_implementation("sdpa")
    assert_accurate(got, plain, logits(model))


def test_perplexity_of_passages(folder: Path, passages: list[str]) -> None:
    """50 of them, one stream for us, one by one under eager attention."""
    model, tokenizer = model_of(folder, "mem1", torch.float32)
    texts = [tokenizer(text).input_ids for text in passages[:50]]
    layout = TrajectoryLayout.pack(
        [
            TrajectoryLayout.from_segments([Segment("prompt", 0, 1), Segment("state", 1, len(text) - 1)])
            for text in texts
        ]
    )
    stream = torch.tensor([token for text in texts for token in text])
    ours = recompute_logprobs(model, PackedBatch(stream, layout))
    model.set_attn_implementation("eager")
    losses = []
    for text in texts:
        ids = torch.tensor([text])
        losses.append(model(ids, labels=ids, use_cache=False).loss * (len(text) - 1))
    wanted = torch.stack(losses).sum() / len(ours)
    assert 2 < float(wanted.exp()) < 60, "a model that has seen language"
    torch.testing.assert_close((-ours.mean()).exp(), wanted.exp(), rtol=1e-3, atol=0)


class Reader:
    """Reads some passages in each of four turns, then answers; an expert writes what it just read."""

    objectives = 1

    def __init__(self, passages: list[str]) -> None:
        self.passages = passages

    def reset(self, seed: int, task=None) -> str:
        self.rng, self.turn, self.read = random.Random(seed), 0, ""
        return "Read on, and note what you read.\n" + self.text(2)

    def text(self, passages: int) -> str:
        self.read = "\n".join(self.rng.sample(self.passages, passages))
        return self.read

    def expert_action(self) -> ExpertAction:
        kind = "answer" if self.turn == 4 else "query"
        return ExpertAction(self.read[:150], Action(kind, self.read[-40:]))

    def step(self, action: Action) -> Step:
        self.turn += 1
        return Step(self.text(self.rng.randint(3, 5)), 0.0, action.kind == "answer")


@pytest.fixture(scope="module")
def rounding(folder: Path, passages: list[str]) -> tuple[float, float]:
    """How far transformers' own cached steps are from its own forward in bfloat16: the mean gap of log-probs,
    and the KL, of 200 tokens of passages. (Both are as far from float32: 0.02 to 0.03 on average.)
    """
    model, tokenizer = model_of(folder, "sdpa", torch.bfloat16)
    ids = tokenizer("\n".join(passages), return_tensors="pt").input_ids[:, :801]
    with torch.no_grad():
        whole = model.model(ids[:, :800], use_cache=False).last_hidden_state[0, 600:]
        cache, steps = DynamicCache(config=model.config), []
        for begin, end in [(0, 600), *((n, n + 1) for n in range(600, 800))]:
            places = torch.arange(begin, end)[None]
            kept = {CACHE: cache, "use_cache": True, "position_ids": places}
            steps.append(model.model(ids[:, begin:end], **kept).last_hidden_state[0, -1])
        written = torch.stack(steps[1:])
        new, old = (
            model.lm_head(hidden).float().log_softmax(-1).gather(1, ids[0, 601:, None])
            for hidden in (whole, written)
        )
    gap = new - old
    return float(gap.abs().mean()), float((gap.exp() - 1 - gap).mean())


@both_dtypes
@pytest.mark.parametrize("regime", ["carry", "reencode"])
def test_what_is_sampled_is_what_is_recomputed(
    folder: Path, passages: list[str], regime: Any, dtype: torch.dtype, request: pytest.FixtureRequest
) -> None:
    """In bfloat16, whose rounding is more here than the gates of small models, by the rule of two errors."""
    model, tokenizer = model_of(folder, "mem1", dtype)
    config = RolloutConfig(
        num_slots=3, max_turns=5, max_action_tokens=128, max_info_tokens=2048, regime=regime, kv_memory=0.3
    )
    make = lambda: Reader(passages)  # noqa: E731
    played = list(rollout(model, tokenizer, make, range(3), config, expert=True))
    assert {t.finish_reason for t in played} == {"answered"} and {t.turns for t in played} == {5}
    assert min(t.peak_tokens() for t in played) > 512
    if dtype == torch.bfloat16:
        measured = parity(model, played, regime)
        mean, kl = request.getfixturevalue("rounding")
        assert measured.mean_dlogp <= 2 * mean and measured.kl <= 2 * kl, (measured, mean, kl)
        return
    # A forced token of log-prob -9 is 6e-5 from fp64 in the rollout, 4e-5 in one forward: rounding, which
    # grows with the logits, is 2e-6 on average.
    new = torch.cat([recompute_logprobs(model, pack([t], regime, torch.device("cpu"))) for t in played])
    old = torch.cat([t.logprobs[t.policy_mask] for t in played])
    gap = (new - old).abs()
    assert float((gap / old.abs().clamp(min=1)).max()) <= 5e-5 and float(gap.mean()) <= 5e-6


@both_dtypes
def test_prune_generate(
    folder: Path, passages: list[str], dtype: torch.dtype, request: pytest.FixtureRequest
) -> None:
    """Four calls over one cache; the passages of a turn leave it when the turn has been written."""
    model, tokenizer = model_of(folder, "mem1", dtype)
    reader = Reader(passages)
    tokens = tokenizer(reader.reset(0)).input_ids
    prompt, evict, written = len(tokens), [], {}
    cache = SlotCache(model, 1, 4096)

    def policy(ids: list[int], runs: Any, done: bool) -> Tensor | None:
        keep = torch.ones(len(ids), dtype=torch.bool)
        keep[prompt : len(ids) - runs[-1]] = False
        return keep if done else None

    for _ in range(4):
        tokens = tokens + tokenizer(reader.text(5), add_special_tokens=False).input_ids
        out = model.generate(
            torch.tensor([tokens]), custom_generate=prune_generate, eviction_policy=policy, do_sample=False,
            max_new_tokens=24, return_dict_in_generate=True, output_logits=True, **cache.kwargs,
        )  # fmt: skip
        begin, tokens = len(tokens), out.sequences[0].tolist()
        written |= {begin + step: row[0].log_softmax(-1) for step, row in enumerate(out.logits)}
        evict += [len(tokens)] * (begin - len(evict))  # what it was given leaves with its last token
        evict += [0] * (len(tokens) - len(evict))
    mask = TrajectoryMask.from_evict(lifetimes(evict, prompt, len(tokens)))
    assert int(mask.peak_tokens()) > 512 and len(tokens) > 2 * int(cache.lengths[0])
    exact = model(torch.tensor([tokens]), mem1_mask=mask, use_cache=False).logits[0].float().log_softmax(-1)
    gaps = torch.tensor([float(row[tokens[n]] - exact[n - 1, tokens[n]]) for n, row in written.items()])
    largest, mean = float(gaps.abs().max()), float(gaps.abs().mean())
    if dtype == torch.float32:
        assert largest <= 5e-5, (largest, mean)
    else:
        assert mean <= 2 * request.getfixturevalue("rounding")[0], (largest, mean)


def lifetimes(evict: list[int], prompt: int, tokens: int) -> Tensor:
    """What was written in a turn leaves with the passages of the next one."""
    table, ends = torch.tensor(evict), sorted({end for end in evict if end})
    for end, following in zip(ends, [*ends[1:], tokens], strict=True):
        own = (table == 0) & (torch.arange(len(evict)) < end)
        table[own] = following
    table[:prompt] = tokens
    return table.clamp(max=tokens)


def test_greedy_text_is_that_of_generate(folder: Path, passages: list[str]) -> None:
    model, tokenizer = model_of(folder, "mem1", torch.float32)

    class Whole(Reader):
        def step(self, action: Action) -> Step:
            return Step("", 0.0, True)

        def reset(self, seed: int, task=None) -> str:
            return "\n".join(self.passages[10 * seed : 10 * seed + 8])

    config = RolloutConfig(num_slots=2, max_turns=1, max_action_tokens=48, greedy=True, kv_memory=0.3)
    played = list(rollout(model, tokenizer, lambda: Whole(passages), range(2), config))
    model.set_attn_implementation("sdpa")
    for trajectory in played:
        first = int(trajectory.policy_mask.nonzero()[0])
        assert first > 600
        ids = trajectory.tokens[None, :first]
        out = model.generate(ids, do_sample=False, max_new_tokens=len(trajectory.tokens) - first)
        assert torch.equal(out[0], trajectory.tokens)
