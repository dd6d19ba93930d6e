"""Advantages by hand, for each algorithm."""

from __future__ import annotations

import math
from dataclasses import replace
from statistics import fmean, stdev

import pytest
import torch

from mem1.checks import InputError
from mem1.config import AlgorithmConfig, TrainConfig
from mem1.train.advantages import Experience, compared, group_of, set_advantages
from mem1.trajectory import TokenReward, Trajectory
from mem1_core.ops import gae
from mem1_core.segments import Segment

SEGMENTS = [
    *(Segment("prompt", 0, 2), Segment("state", 1, 3), Segment("query", 1, 2), Segment("info", 1, 4)),
    *(Segment("state", 2, 1), Segment("answer", 2, 2)),
]
POLICY = 8  # tokens that it wrote
STATE = torch.tensor([1, 1, 1, 0, 0, 1, 0, 0], dtype=torch.bool)


def experience(reward: float, seed: int = 0, task: str = "", **settings: object) -> Experience:
    tokens = torch.arange(14)
    rewards = [TokenReward(13, reward)] if reward else []
    trajectory = Trajectory(tokens, SEGMENTS, torch.zeros(14), "action", rewards, seed=seed, task=task)
    for name, value in settings.items():
        setattr(trajectory, name, value)
    zeros = torch.zeros(POLICY)
    return Experience(trajectory, zeros, zeros, None, None, zeros, zeros, rows=14)


def advantages(name: str, rewards: list[float], seeds: list[int], **settings: object) -> list[float]:
    """Of each episode; all its tokens have the same."""
    batch = [experience(reward, seed) for reward, seed in zip(rewards, seeds, strict=True)]
    set_advantages(batch, AlgorithmConfig(name=name, kl_coef=0.0, **settings))  # type: ignore[arg-type]
    for one in batch:
        assert one.advantage.shape == (POLICY,) and len(one.advantage.unique()) == 1
    return [float(one.advantage[0]) for one in batch]


def test_groups_are_compared_by_their_formulas():
    rewards, seeds = [1.0, 0.0, 0.5, 2.0, 2.0, 0.25], [7, 9, 7, 7, 9, 9]
    groups = {seed: [r for r, s in zip(rewards, seeds, strict=True) if s == seed] for seed in seeds}
    pairs = list(zip(rewards, seeds, strict=True))
    grpo = [(r - fmean(groups[s])) / (stdev(groups[s]) + 1e-6) for r, s in pairs]
    assert advantages("grpo", rewards, seeds) == pytest.approx(grpo)
    plain = [r - fmean(groups[s]) for r, s in pairs]
    assert advantages("grpo", rewards, seeds, group_std=False) == pytest.approx(plain)
    others = [r - (sum(groups[s]) - r) / 2 for r, s in pairs]
    assert advantages("rloo", rewards, seeds) == pytest.approx(others)
    assert advantages("reinforce", rewards, seeds) == pytest.approx([r - fmean(rewards) for r in rewards])


@pytest.mark.parametrize("name", ["grpo", "rloo", "reinforce"])
@pytest.mark.parametrize("reward", [0.0, 0.1, 1.0, -3.7])
def test_a_group_that_has_all_earned_the_same_gives_exactly_0(name, reward):
    assert advantages(name, [reward] * 3, [1, 1, 1]) == [0.0] * 3
    assert advantages("grpo", [reward, 5.0], [1, 2]) == [0.0, 0.0]  # groups of one


def test_a_group_is_of_a_task_or_of_a_seed():
    rewards = [1.0, 0.0, 1.0, 0.0]
    whose = ((1, "a"), (2, "a"), (3, ""), (3, ""))
    batch = [experience(reward, *one) for reward, one in zip(rewards, whose, strict=True)]
    assert [group_of(one.trajectory) for one in batch] == ["task a", "task a", "seed 3", "seed 3"]
    found = compared(batch, rewards, AlgorithmConfig(name="rloo"))
    assert found == [1.0, -1.0, 1.0, -1.0]
    shuffled = [batch[n] for n in (2, 0, 3, 1)]
    again = compared(shuffled, [rewards[n] for n in (2, 0, 3, 1)], AlgorithmConfig(name="rloo"))
    assert again == [1.0, 1.0, -1.0, -1.0]


def test_ppo_follows_gae_and_is_whitened_over_all_tokens():
    batch = [experience(1.0), experience(0.0)]
    generator = torch.Generator().manual_seed(0)
    for one in batch:
        one.old_value = torch.randn(POLICY, generator=generator)
    config = AlgorithmConfig(kl_coef=0.0, gamma=0.9, lam=0.8)
    values = torch.stack([one.old_value for one in batch if one.old_value is not None])
    rewards = torch.zeros(2, POLICY)
    rewards[0, -1] = 1.0
    expected, returns = gae(rewards, values, torch.ones(2, POLICY, dtype=torch.bool), 0.9, 0.8)
    assert set_advantages(batch, replace(config, whiten=False)) == pytest.approx(float(expected.mean()))
    torch.testing.assert_close(torch.stack([one.advantage for one in batch]), expected)
    set_advantages(batch, config)
    whitened = torch.stack([one.advantage for one in batch])
    torch.testing.assert_close(whitened, (expected - expected.mean()) * (expected.var() + 1e-8).rsqrt())
    torch.testing.assert_close(torch.stack([one.returns for one in batch]), returns)


def test_parts_have_weights_and_formats_are_paid():
    batch = [experience(1.0), experience(0.0)]
    set_advantages(batch, AlgorithmConfig(name="reinforce", kl_coef=0.0, state_weight=0.0, action_weight=2.0))
    for one, value in zip(batch, (0.5, -0.5), strict=True):
        assert torch.equal(one.advantage, torch.where(STATE, 0.0, 2.0 * value))
    batch = [experience(0.0), experience(0.0, invalid_turns=[1]), experience(0.0, invalid_turns=[1, 2])]
    set_advantages(batch, AlgorithmConfig(name="reinforce", kl_coef=0.0, format_reward=0.6))
    assert [float(one.advantage[0]) for one in batch] == pytest.approx([0.3, 0.0, -0.3])


def test_the_kl_is_taken_from_the_reward_where_positive():
    batch = [experience(1.0), experience(1.0)]
    batch[0].old_logprob = torch.tensor([0.5, -0.25, 0, 0, 0, 0, 0, 0])
    set_advantages(batch, AlgorithmConfig(name="reinforce", kl_coef=0.2))
    assert [float(one.advantage[0]) for one in batch] == pytest.approx([-0.05, 0.05])
    set_advantages(batch, AlgorithmConfig(name="reinforce", kl_coef=0.2, kl_placement="loss"))
    assert [float(one.advantage[0]) for one in batch] == [0.0, 0.0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "trpo"}, "name: expected one of ppo, grpo, rloo, reinforce, got 'trpo'"),
        ({"dual_clip": 1.0}, "dual_clip: expected a finite number > 1, got 1.0"),
        ({"kl_estimator": "k4"}, "kl_estimator: expected one of k1, k2, k3, got 'k4'"),
        ({"state_weight": -1.0}, "state_weight: expected a finite number >= 0"),
        ({"format_reward": math.nan}, "format_reward: expected a finite number"),
        ({"whiten": "yes"}, "whiten: expected True or False, got 'yes'"),
        ({"name": "grpo", "bootstrap_turn_limit": True}, "bootstrap_turn_limit: expected False for grpo"),
    ],
)
def test_settings_out_of_range_are_named(settings, message):
    with pytest.raises(InputError, match=message):
        AlgorithmConfig(**settings)


def test_groups_of_a_batch():
    grpo = AlgorithmConfig(name="grpo")
    assert AlgorithmConfig().whiten is True and grpo.whiten is False
    with pytest.raises(InputError, match="group_size: expected at least 2 for grpo, got 1"):
        TrainConfig(algorithm=grpo)
    with pytest.raises(InputError, match="batch_size: expected a multiple of group_size=3, got 64"):
        TrainConfig(algorithm=grpo, group_size=3)
    assert TrainConfig(algorithm=grpo, group_size=8).batch_size == 64
