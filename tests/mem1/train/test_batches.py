"""How trajectories are dealt out to ranks and forwards."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mem1.train.batches import Policy, micro_batches, pack, recompute_logprobs


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(1, 900), max_size=40), st.integers(1, 1000), st.integers(1, 5))
def test_every_trajectory_is_in_one_group_that_fits(lengths, max_tokens, ranks):
    dealt = micro_batches(lengths, max_tokens, ranks)
    assert len(dealt) == ranks and len({len(groups) for groups in dealt}) == 1
    groups = [group for rank in dealt for group in rank]
    assert sorted(place for group in groups for place in group) == list(range(len(lengths)))
    for group in groups:
        assert len(group) <= 1 or sum(lengths[place] for place in group) <= max_tokens
    assert micro_batches(lengths, max_tokens, ranks) == dealt


def test_groups_are_few_and_about_equally_long():
    lengths = [10, 20, 30, 40, 50, 60, 70, 80, 90, 100] * 4
    for ranks in (1, 2, 4):
        dealt = micro_batches(lengths, 300, ranks)
        sums = [sum(lengths[place] for place in group) for rank in dealt for group in rank]
        assert len(sums) == 8 and max(sums) - min(sums) <= 10
        loads = [sum(lengths[place] for group in rank for place in group) for rank in dealt]
        assert max(loads) - min(loads) <= 20
    # More ranks than trajectories: some have none.
    assert [len(group) for rank in micro_batches([5], 100, 4) for group in rank] == [1, 0, 0, 0]
    assert micro_batches([], 100, 2) == [[[]], [[]]]
    # A trajectory that is longer than all may share its forward with none.
    assert micro_batches([500, 60, 40], 100) == [[[0], [1, 2]]]


def test_a_rank_without_trajectories_takes_part(make_model):
    model = make_model()
    stream = pack([], "carry")
    assert stream.counts == (0,) and len(stream.targets) == 0
    assert recompute_logprobs(Policy(model), stream).shape == (0,)
    hidden = Policy(model)(stream, lambda hidden, head: hidden.sum() + head.weight.sum() * 0)
    hidden.backward()
    assert all(p.grad is not None and torch.equal(p.grad, torch.zeros_like(p)) for p in model.parameters())


@pytest.mark.parametrize("wrapped", [False, True])
def test_log_probs_of_a_model_or_a_policy(make_model, wrapped):
    model = make_model()
    assert recompute_logprobs(Policy(model) if wrapped else model, pack([], "carry")).shape == (0,)
