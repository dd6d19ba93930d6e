"""The promise: the log-probs that a trainer recomputes are those that the rollout sampled with."""

from __future__ import annotations

import pytest
import torch

from mem1.config import RolloutConfig
from mem1.envs.toy.multihop import MultiHopEnv
from mem1.rollout.rollout_loop import rollout
from mem1.train.parity import Parity, parity
from mem1_core.eviction import evict_from_segments
from mem1_core.eviction_policies import EvictionPolicy

GATES = {torch.float32: {"max_dlogp": 5e-5}, torch.bfloat16: {"mean_dlogp": 5e-3, "kl": 1e-4}}


def measure(make_model, tokenizer, dtype, regime, prune, expert, temperature=1.0) -> Parity:
    """Ragged by 1 to 4 objectives and 3 slots for 16 episodes, so that rows leave, move and are filled
    again.
    """
    model = make_model(dtype)
    with torch.no_grad():  # more states than it would write
        model.get_output_embeddings().weight[tokenizer.convert_tokens_to_ids("<IS>"), 0] = 0.5
    config = RolloutConfig(
        num_slots=3, regime=regime, prune=prune, max_action_tokens=24, max_turns=7, temperature=temperature
    )
    seeds = range(16)
    played = list(rollout(model, tokenizer, lambda: MultiHopEnv((1, 4)), seeds, config, expert=expert))
    assert {t.seed for t in played} == set(seeds)
    assert len({t.tokens.numel() for t in played}) > 1, "expected a ragged batch"
    assert sum(t.turns >= 4 for t in played) >= 2
    assert any(s.kind == "state" for t in played for s in t.segments)
    if isinstance(prune, int):
        others: list[EvictionPolicy] = ["action", "never"]
        for other in others:
            differ = [
                not torch.equal(t.mask.evict_at[0], evict_from_segments(t.segments, other)) for t in played
            ]
            assert any(differ), f"expected trajectories that prune={other!r} would prune otherwise"
    return parity(model, played, regime, temperature)


def within_gate(result: Parity, dtype: torch.dtype) -> bool:
    return all(getattr(result, name) <= limit for name, limit in GATES[dtype].items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("regime", ["carry", "reencode"])
@pytest.mark.parametrize("prune", ["action", "state", "never", 48])
@pytest.mark.parametrize("expert", [False, True], ids=["sampled", "expert"])
def test_recomputed_logprobs_are_the_sampled_ones(make_model, tokenizer, dtype, regime, prune, expert):
    result = measure(make_model, tokenizer, dtype, regime, prune, expert)
    assert within_gate(result, dtype), result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("regime", ["carry", "reencode"])
@pytest.mark.parametrize("prune", ["action", "state"])
@pytest.mark.parametrize("slots", [1, 64])
def test_batches_of_one_and_of_64(make_model, tokenizer, dtype, regime, prune, slots):
    """Episodes of 3 to 9 turns, each alone and all side by side."""
    model, seeds = make_model(dtype), range(4 if slots == 1 else 64)
    config = RolloutConfig(num_slots=slots, regime=regime, prune=prune, max_turns=12)
    played = list(rollout(model, tokenizer, lambda: MultiHopEnv((1, 4)), seeds, config, expert=True))
    assert {t.seed for t in played} == set(seeds)
    turns = {t.turns for t in played}
    assert len(turns) >= (2 if slots == 1 else 4) and max(turns) >= 4, "expected other ends"
    result = parity(model, played, regime)
    assert within_gate(result, dtype), result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("prune", ["action", "state"])
def test_the_published_recipe_fails_the_same_gate(make_model, tokenizer, dtype, prune):
    result = measure(make_model, tokenizer, dtype, "paper", prune, expert=True)
    assert not within_gate(result, dtype), result
    assert result.max_dlogp > 0.05


def test_parity_at_another_temperature(make_model, tokenizer):
    result = measure(make_model, tokenizer, torch.float32, "carry", "action", expert=False, temperature=0.7)
    assert within_gate(result, torch.float32), result


def test_a_carried_cache_trained_as_reencoded_is_noticed(make_model, tokenizer):
    """The gate can tell the two exact regimes from one another: neither layout fits the other's rollout."""
    model = make_model()
    config = RolloutConfig(regime="carry", max_turns=6)
    played = list(rollout(model, tokenizer, lambda: MultiHopEnv(3), range(2), config, expert=True))
    assert parity(model, played, "carry").max_dlogp <= 5e-5
    assert parity(model, played, "reencode").max_dlogp > 0.05
