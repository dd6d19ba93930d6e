"""A critic that is a head on the policy's trunk."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from mem1.config import AlgorithmConfig, RolloutConfig
from mem1.envs.toy.multihop import MultiHopEnv
from mem1.models.build import build_critic
from mem1.rollout.rollout_loop import rollout
from mem1.train.batches import pack
from mem1.train.learner import Learner
from mem1.trajectory import TokenReward


@pytest.fixture
def played(make_model, tokenizer):
    config = RolloutConfig(num_slots=8, max_turns=3, max_action_tokens=12)
    played = list(rollout(make_model(), tokenizer, partial(MultiHopEnv, 1), range(6), config))
    for trajectory in played[::2]:
        trajectory.rewards = [TokenReward(trajectory.tokens.numel() - 1, 1.0)]
    return played


def test_a_shared_trunk_learns_both_losses_at_once(make_model, played):
    """The gradients are those of the policy's loss and of `value_coef` times the value's; the head alone
    learns where the policy does not yet.
    """

    def build_shared(**settings):
        config = AlgorithmConfig(critic="shared", kl_coef=0.0, max_grad_norm=1e9, **settings)
        learner = Learner(make_model(), None, None, config, "carry")
        with torch.no_grad():
            learner.policy.value_head.weight.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
        return learner

    def gradients(learner, batch):
        found = {}
        for name, optimizer in learner.optimizers.items():
            optimizer.step = lambda rate, name=name, o=optimizer: found.update(
                {name: [None if m.grad is None else m.grad.clone() for m in o.masters]}
            )
        metrics = learner.step(batch)
        return found, metrics

    learner = build_shared(value_coef=0.3, critic_only_updates=0)
    batch, metrics = learner.prepare(played)
    assert metrics["value_mean"] != 0.0
    both, stepped = gradients(learner, batch)
    assert {"value_loss", "value_clip_fraction", "policy_loss", "entropy"} <= stepped.keys()
    policy_alone, _ = gradients(build_shared(value_coef=0.0), batch)
    tokens = torch.cat([e.old_logprob for e in batch]).numel()
    stream = pack([e.trajectory for e in batch], "carry")
    hidden = learner.actor.get_decoder()(**stream.inputs(), use_cache=False).last_hidden_state[0]
    value = learner.policy.value_head(hidden[stream.layout.logit_rows])[:, 0]
    old, returns = (torch.cat([getattr(e, name) for e in batch]) for name in ("old_value", "returns"))
    clipped = old + (value - old).clamp(-0.5, 0.5)
    loss = 0.5 * torch.maximum((value - returns) ** 2, (clipped - returns) ** 2).sum() / tokens
    parameters = [*learner.actor.parameters()]
    of_value = torch.autograd.grad(loss, parameters, allow_unused=True)
    for got, policy, extra in zip(both["actor"], policy_alone["actor"], of_value, strict=True):
        expected = policy if extra is None else policy + 0.3 * extra
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)

    learner = build_shared(critic_only_updates=1, critic_lr=1e-2)
    before = [p.clone() for p in learner.actor.parameters()]
    head = learner.policy.value_head.weight.clone()
    first = learner.update(played)
    assert "policy_loss" not in first and first["value_loss"] > 0
    assert all(torch.equal(p, old) for p, old in zip(learner.actor.parameters(), before, strict=True))
    assert not torch.equal(learner.policy.value_head.weight, head)
    assert "policy_loss" in learner.update(played)
    with pytest.raises(ValueError, match="critic: expected None for ppo with a shared trunk, got Critic"):
        Learner(make_model(), build_critic(make_model()), None, learner.config, "carry")
