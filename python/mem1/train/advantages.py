"""From rewards to advantages: PPO with a critic, and the algorithms that compare episodes instead.

ppo         generalised advantage estimation over a critic's values (Schulman et al. 2016, arXiv 1506.02438),
            whitened over the policy's tokens of the batch
grpo        A = (R - mean) / std over the episodes of the same task (DeepSeekMath, arXiv 2402.03300); with
            `group_std` off, A = R - mean (Dr. GRPO, arXiv 2503.20783)
rloo        A = R - mean of the others of the same task (Ahmadian et al. 2024, arXiv 2402.14740)
reinforce   A = R - mean over the batch

R is the sum of an episode's rewards, the KL's share included where that is taken from the reward; every token
that the policy wrote in it gets A.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from mem1.config import AlgorithmConfig
from mem1.trajectory import CUT_OFF, Trajectory
from mem1_core.ops import gae, masked_whiten
from mem1_core.reference import kl_estimate
from mem1_core.segments import by_policy

_EPSILON = 1e-6  # beside a standard deviation


@dataclass
class Experience:
    """One trajectory with what the losses need; tensors fp32 [policy tokens of the trajectory].

    old_value, last_value: of a critic, the latter [] behind the last token; None without one. rows: tokens
    of a forward that it takes.
    """

    trajectory: Trajectory
    old_logprob: Tensor  # recomputed by the trainer before the update
    ref_logprob: Tensor
    old_value: Tensor | None
    last_value: Tensor | None
    advantage: Tensor
    returns: Tensor
    rows: int

    def rollout_logprob(self) -> Tensor:
        """With which the sampler drew the tokens."""
        t = self.trajectory
        drawn = t.logprobs if t.rollout_logprobs is None else t.rollout_logprobs
        return drawn[t.policy_mask].to(self.old_logprob.device)


def set_advantages(batch: Sequence[Experience], config: AlgorithmConfig) -> float:
    """Give the experiences of a whole batch, of all ranks, their advantages and returns; returns the mean
    advantage of a token before whitening and weights.

    Raises ValueError for rewards whose squares are not finite in fp32.
    """
    rewards = _rewards(batch, config)
    if config.name == "ppo":
        mean = _estimated(batch, rewards, config)
    else:
        totals = [float(reward.double().sum()) for reward in rewards]
        for experience, value in zip(batch, compared(batch, totals, config), strict=True):
            experience.advantage = torch.full_like(experience.old_logprob, value)
            experience.returns = experience.advantage
        mean = float(torch.cat([e.advantage for e in batch]).mean())
        if config.whiten:
            _whiten(batch)
    weights = config.state_weight, config.action_weight
    if weights != (1.0, 1.0):
        for experience in batch:
            experience.advantage = experience.advantage * _part_weights(experience, *weights)
    return mean


def compared(batch: Sequence[Experience], totals: Sequence[float], config: AlgorithmConfig) -> list[float]:
    """The advantage of each episode, from what all have earned. Of a group that has all earned the same, or
    has one member, it is exactly 0.
    """
    groups: dict[str, list[int]] = {}
    for place, experience in enumerate(batch):
        groups.setdefault("" if config.name == "reinforce" else group_of(experience.trajectory), []).append(
            place
        )
    advantages = [0.0] * len(totals)
    for places in groups.values():
        earned = [totals[place] for place in places]
        if len(places) == 1 or min(earned) == max(earned):
            continue
        mean = fmean(earned)
        scale = 1.0
        if config.name == "rloo":
            scale = len(places) / (len(places) - 1)  # the mean of the others instead of all
        elif config.name == "grpo" and config.group_std:
            variance = math.fsum((total - mean) ** 2 for total in earned) / (len(places) - 1)
            scale = 1.0 / (math.sqrt(variance) + _EPSILON)
        for place, total in zip(places, earned, strict=True):
            advantages[place] = (total - mean) * scale
    return advantages


def group_of(trajectory: Trajectory) -> str:
    """What episodes of one task have in common: the row's id, or the seed where that is all there is."""
    return f"task {trajectory.task}" if trajectory.task else f"seed {trajectory.seed}"


def _estimated(batch: Sequence[Experience], rewards: list[Tensor], config: AlgorithmConfig) -> float:
    values = pad_sequence([_of(e.old_value) for e in batch], batch_first=True)
    counts = torch.tensor([len(reward) for reward in rewards], device=values.device)
    mask = torch.arange(values.shape[1], device=values.device) < counts[:, None]  # [B, T]
    reward = pad_sequence(rewards, batch_first=True)
    advantage, returns = gae(reward, values, mask, config.gamma, config.lam)
    for experience, a, r, count in zip(batch, advantage, returns, counts.tolist(), strict=True):
        experience.advantage, experience.returns = a[:count], r[:count]
    if config.whiten:
        _whiten(batch)
    return float(advantage[mask].mean())


def _whiten(batch: Sequence[Experience]) -> None:
    flat = torch.cat([e.advantage for e in batch])
    parts = masked_whiten(flat, torch.ones_like(flat, dtype=torch.bool)).split(
        [len(e.advantage) for e in batch]
    )
    for experience, part in zip(batch, parts, strict=True):
        experience.advantage = part


def _rewards(batch: Sequence[Experience], config: AlgorithmConfig) -> list[Tensor]:
    """fp32 [policy tokens] of each: its rewards and what the settings add to them."""
    found = []
    for experience in batch:
        trajectory, device = experience.trajectory, experience.old_logprob.device
        reward = trajectory.policy_rewards().to(device)
        if not math.isfinite(reward.cumsum(0).square().max() + reward.flip(0).cumsum(0).square().max()):
            raise ValueError(
                f"trajectories: expected rewards whose squares are finite in float32, got "
                f"{trajectory.reward} for seed {trajectory.seed}"
            )
        if config.format_reward:
            valid = 1.0 - trajectory.invalid_actions / max(trajectory.turns, 1)
            reward[-1] += config.format_reward * valid
        if config.bootstrap_turn_limit and trajectory.finish_reason in CUT_OFF:
            reward[-1] += config.gamma * _of(experience.last_value)
        if config.kl_placement == "reward" and config.kl_coef:
            kl = kl_estimate(experience.old_logprob, experience.ref_logprob, "k1")
            reward = reward - config.kl_coef * kl.clamp(min=0)
        found.append(reward)
    return found


def _part_weights(experience: Experience, state: float, action: float) -> Tensor:
    segments = [s for s in experience.trajectory.segments if by_policy(s.kind)]
    weights = torch.tensor([state if s.kind == "state" else action for s in segments])
    lengths = torch.tensor([s.length for s in segments])
    return weights.repeat_interleave(lengths).to(experience.advantage)


def _of(value: Tensor | None) -> Tensor:
    assert value is not None, "a critic"
    return value
