from __future__ import annotations

import random

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from mem1.config import RolloutConfig
from mem1.envs.base import Example
from mem1.envs.toy.auxiliary import copy_example, lookup_example
from mem1.envs.toy.expert import expert_example
from mem1.envs.toy.multihop import MultiHopEnv
from mem1.envs.toy.words import NAMES
from mem1.rollout.rollout_loop import play_expert
from mem1_core.layout import TrajectoryLayout
from mem1_core.segments import policy_tokens


def words(tokenizer: PreTrainedTokenizerFast, example: Example, policy: bool | None = None) -> list[str]:
    """The words of an example; with `policy` only those that the policy writes, or only the others."""
    tokens = torch.tensor(example.tokens)
    if policy is not None:
        tokens = tokens[policy_tokens(example.segments) == policy]
    return tokenizer.convert_ids_to_tokens(tokens.tolist())


@pytest.mark.parametrize("seed", range(5))
def test_copy(tokenizer: PreTrainedTokenizerFast, seed: int) -> None:
    example = copy_example(tokenizer.get_vocab(), random.Random(seed))
    given, written = words(tokenizer, example, policy=False), words(tokenizer, example, policy=True)
    assert given[:2] == ["copy", ":"] and given[-1] == "."
    assert written == ["<answer>", *given[2:-1], "</answer>"]


def test_lookup(tokenizer: PreTrainedTokenizerFast) -> None:
    numbered, gaps = set(), set()
    for seed in range(60):
        example = lookup_example(tokenizer.get_vocab(), random.Random(seed))
        prompt, _ = " ".join(words(tokenizer, example)).removeprefix("lookup : ").split(" . ")
        listed = prompt.split(" ; ")
        assert 2 <= len(listed) == len({*listed}) <= 32
        pieces, start = list[str](), 0
        for segment in example.segments:
            pieces.append(" ".join(words(tokenizer, example)[start : start + segment.length]))
            start += segment.length
        keys, values = pieces[::2], pieces[1::2]
        *gap, last = keys[0][keys[0].index(" . ") + 3 :].split()
        names_in_gap = [word for word in gap if word in NAMES]  # of a key of two words
        keys[0] = " ".join([*names_in_gap, last])
        assert " ".join(values).split() == words(tokenizer, example, policy=True)
        for key, value in zip(keys, values, strict=True):
            listed.remove(f"{key} {value}")
        assert len(values) == min(16, len(values) + len(listed))
        numbered.add((last.isdecimal(), len(names_in_gap)))
        gaps.add(len(gap))
    assert numbered == {(True, 0), (False, 0), (False, 1)} and min(gaps) == 0 and 100 < max(gaps) <= 257


def test_an_easy_exercise_is_short(tokenizer: PreTrainedTokenizerFast) -> None:
    for make in (copy_example, lookup_example):
        lengths = {
            grown: max(len(make(tokenizer.get_vocab(), random.Random(n), grown).tokens) for n in range(40))
            for grown in (0.0, 0.2, 1.0)
        }
        assert 3 * lengths[0.0] < lengths[1.0] and lengths[0.0] < lengths[0.2] < lengths[1.0], lengths


@pytest.mark.parametrize("prune", ["action", "state", "never"])
@pytest.mark.parametrize("settings", [{"objectives": 3}, {"objectives": 2, "hops": 1, "passage_tokens": 20}])
def test_scripted_examples_are_what_the_rollout_makes(
    tokenizer: PreTrainedTokenizerFast, settings: dict[str, int], prune: str
) -> None:
    config = RolloutConfig(prune=prune)  # type: ignore[arg-type]
    (expected,) = play_expert(tokenizer, lambda: MultiHopEnv(**settings), [11], config)
    example = expert_example(MultiHopEnv(**settings), 11, tokenizer.get_vocab(), config.prune)
    assert example.tokens == expected.tokens.tolist()
    assert example.segments == expected.segments
    assert example.prune == expected.prune


def test_examples_of_all_kinds_pack_into_one_stream(tokenizer: PreTrainedTokenizerFast) -> None:
    ids, draw = tokenizer.get_vocab(), random.Random(0)
    batch = [
        copy_example(ids, draw),
        lookup_example(ids, draw),
        expert_example(MultiHopEnv(2), 0, ids),
    ]
    for regime in ("carry", "reencode"):
        layouts = [TrajectoryLayout.from_segments(e.segments, regime=regime, prune=e.prune) for e in batch]
        layout = TrajectoryLayout.pack(layouts)
        assert layout.lengths == tuple(len(e.tokens) for e in batch)
        assert len(layout.targets) == sum(int(policy_tokens(e.segments).sum()) for e in batch)


def test_a_word_outside_the_vocabulary_is_named() -> None:
    with pytest.raises(KeyError, match="answer"):
        expert_example(MultiHopEnv(1), 0, {"ada": 0})
