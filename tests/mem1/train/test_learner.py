"""PPO: advantages, what a step does, its formulas written out, and that splitting a minibatch changes
nothing.
"""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from functools import partial

import pytest
import torch

from mem1.checks import InputError
from mem1.config import AlgorithmConfig, RolloutConfig
from mem1.envs.toy.multihop import MultiHopEnv
from mem1.models.build import build_critic
from mem1.rollout.rollout_loop import rollout
from mem1.train.batches import pack, recompute_logprobs
from mem1.train.learner import Learner
from mem1.train.update_metrics import explained_variance
from mem1.trajectory import FinishReason, TokenReward, Trajectory
from mem1_core.segments import Segment

ROLLOUT = RolloutConfig(num_slots=8, max_action_tokens=16, max_turns=4)


@pytest.fixture(scope="module")
def played(make_model, tokenizer) -> list[Trajectory]:
    """Eight episodes of the small model; every second one gets a reward."""
    model = make_model()
    trajectories = list(rollout(model, tokenizer, lambda: MultiHopEnv((1, 3)), range(8), ROLLOUT))
    for trajectory in trajectories:
        trajectory.rewards = [TokenReward(trajectory.tokens.numel() - 1, float(trajectory.seed % 2))]
    return trajectories


def build(make_model, reference=True, **settings) -> Learner:
    actor = make_model()
    torch.manual_seed(1)
    frozen = copy.deepcopy(actor).requires_grad_(False) if reference else None
    return Learner(actor, build_critic(actor), frozen, AlgorithmConfig(**settings), "carry")


def gradients(learner: Learner, batch) -> list[torch.Tensor]:
    """The gradients of one step, read before the optimisers use them."""
    for optimizer in learner.optimizers.values():
        optimizer.step = lambda rate: 0.0
    learner.step(batch)
    return [p.grad.clone() for model in (learner.actor, learner.critic) for p in model.parameters()]


def test_splitting_a_minibatch_changes_no_gradient(make_model, played):
    results = []
    for max_tokens_per_micro_batch in (10**6, 150, 1):
        learner = build(make_model, max_tokens_per_micro_batch=max_tokens_per_micro_batch, max_grad_norm=1e9)
        with torch.no_grad():  # away from the old policy, so that ratios and clipping matter
            for parameter in learner.actor.parameters():
                parameter.mul_(1.02)
        batch, _ = learner.prepare(played)
        for experience in batch:
            experience.old_logprob = experience.trajectory.logprobs[experience.trajectory.policy_mask]
        results.append(gradients(learner, batch))
    assert max(float(g.abs().max()) for g in results[0]) > 1e-3
    for other in results[1:]:
        for whole, parts in zip(results[0], other, strict=True):
            torch.testing.assert_close(parts, whole, atol=2e-5, rtol=1e-3)


def test_advantages_reach_policy_tokens_only_and_carry_the_reward(make_model, played):
    """With gamma = lam = 1 the return of every token is the episode's reward less the KL to come (here
    none).
    """
    learner = build(make_model)
    batch, metrics = learner.prepare(played)
    for experience in batch:
        count = int(experience.trajectory.policy_mask.sum())
        assert experience.returns.shape == experience.advantage.shape == (count,)
        torch.testing.assert_close(
            experience.returns, torch.full((count,), experience.trajectory.reward), atol=1e-4, rtol=0
        )
    advantages = torch.cat([experience.advantage for experience in batch])
    assert abs(float(advantages.mean())) < 1e-4
    assert abs(float(advantages.std()) - 1) < 1e-3
    assert metrics["dlogp_max"] < 5e-5
    assert metrics["kl_reference"] < 1e-8


def alone(module, trajectory: Trajectory) -> torch.Tensor:
    """What an actor (logits) or a critic (values) says before each policy token, unpacked: [M, ...]."""
    positions = torch.arange(trajectory.tokens.numel())[None]
    with torch.no_grad():
        output = module(trajectory.tokens[None], position_ids=positions, mem1_mask=trajectory.mask)
    return getattr(output, "logits", output)[0, trajectory.policy_mask.nonzero()[:, 0] - 1]


@pytest.mark.parametrize("kl_placement", ["reward", "loss"])
def test_prepare_and_step_follow_the_formulas(make_model, tokenizer, kl_placement):
    """Every number is recomputed from single trajectories, with no setting at a value that hides it."""
    gamma, lam, clip, value_clip, kl, entropy, temperatures = 0.9, 0.8, 0.15, 0.1, 0.3, 0.07, 0.7
    learner = Learner(
        make_model(),
        build_critic(make_model()),
        make_model(),
        AlgorithmConfig(
            gamma=gamma,
            lam=lam,
            clip_low=clip,
            clip_high=clip,
            value_clip=value_clip,
            kl_coef=kl,
            kl_placement=kl_placement,
            entropy_coef=entropy,
            max_tokens_per_micro_batch=150,
        ),
        "carry",
        temperature=temperatures,
    )
    torch.manual_seed(2)
    with torch.no_grad():
        learner.critic.head.weight.normal_(std=0.1)
        for parameter in learner.actor.parameters():
            parameter.mul_(1.1)  # away from the reference
    environment = partial(MultiHopEnv, (1, 3))
    played = list(
        rollout(learner.actor, tokenizer, environment, range(6), replace(ROLLOUT, temperature=temperatures))
    )
    for trajectory in played:
        trajectory.rewards = [TokenReward(trajectory.tokens.numel() - 1, float(trajectory.seed % 2))]

    batch, metrics = learner.prepare(played)
    assert [experience.trajectory for experience in batch] == played
    assert metrics["dlogp_max"] < 5e-5
    advantages = []
    for experience in batch:
        trajectory = experience.trajectory
        choice = trajectory.tokens[trajectory.policy_mask][:, None]
        logprob, reference = (
            (alone(model, trajectory) / temperatures).log_softmax(-1).gather(1, choice)[:, 0]
            for model in (learner.actor, learner.reference.model)
        )
        value = alone(learner.critic, trajectory)
        assert value.std() > 0.1
        reward = (
            -kl * (logprob - reference).clamp(min=0) if kl_placement == "reward" else torch.zeros_like(value)
        )
        reward[-1] += trajectory.reward
        advantage, later, next_value = torch.zeros_like(value), 0.0, 0.0
        for t in reversed(range(len(value))):
            later = reward[t] + gamma * next_value - value[t] + gamma * lam * later
            advantage[t], next_value = later, value[t]
        advantages.append(advantage)
        torch.testing.assert_close(experience.old_logprob, logprob, atol=5e-5, rtol=0)
        torch.testing.assert_close(experience.ref_logprob, reference, atol=5e-5, rtol=0)
        torch.testing.assert_close(experience.old_value, value, atol=5e-5, rtol=0)
        torch.testing.assert_close(experience.returns, advantage + value, atol=1e-4, rtol=0)
    raw = torch.cat(advantages)
    white = torch.cat([experience.advantage for experience in batch])
    torch.testing.assert_close(white, (raw - raw.mean()) / raw.std(), atol=5e-4, rtol=0)

    for experience in batch:  # an old policy and an old critic from which both losses have to clip
        experience.old_logprob += 0.4 * torch.randn_like(experience.old_logprob)
        experience.old_value += 0.4 * torch.randn_like(experience.old_value)
    old, ref, old_value, advantage, returns = (
        torch.cat([getattr(experience, name) for experience in batch])
        for name in ("old_logprob", "ref_logprob", "old_value", "advantage", "returns")
    )
    table = torch.cat([alone(learner.actor, t) / temperatures for t in played]).log_softmax(-1)
    tokens = torch.cat([t.tokens[t.policy_mask] for t in played])
    logprob = table.gather(1, tokens[:, None])[:, 0]
    value = torch.cat([alone(learner.critic, t) for t in played])
    ratio = (logprob - old).exp()
    assert ((ratio > 1 + clip) & (advantage > 0)).any() and ((ratio < 1 - clip) & (advantage < 0)).any()
    plain, clipped = -advantage * ratio, -advantage * ratio.clamp(1 - clip, 1 + clip)
    k3 = (ref - logprob).exp() - 1 - (ref - logprob)
    surprise = -(table.exp() * table).sum(-1)
    loss = torch.maximum(plain, clipped) - entropy * surprise + (kl * k3 if kl_placement == "loss" else 0.0)
    error = (value - returns).square()
    clipped_error = (old_value + (value - old_value).clamp(-value_clip, value_clip) - returns).square()
    expected = {
        "policy_loss": loss.mean(),
        "value_loss": torch.maximum(error, clipped_error).mean() / 2,
        "kl": k3.mean(),
        "entropy": surprise.mean(),
        "clip_fraction": (clipped > plain).float().mean(),
        "value_clip_fraction": (clipped_error > error).float().mean(),
        "ratio_max": ratio.max(),
    }
    got = learner.step(batch)
    assert {name: got[name] for name in expected} == pytest.approx(
        {name: float(number) for name, number in expected.items()}, rel=1e-3, abs=1e-5
    )


def test_every_epoch_steps_through_all_minibatches_while_the_rates_warm_up(make_model, played):
    learner = build(
        make_model,
        epochs=3,
        mini_batch_size=4,
        critic_only_updates=1,
        actor_lr=0.01,
        actor_lr_warmup_steps=4,
        critic_lr=0.02,
        critic_lr_warmup_steps=8,
    )
    rates: dict[str, list[float]] = {"actor": [], "critic": []}
    for name, optimizer in learner.optimizers.items():
        take = optimizer.step
        optimizer.step = lambda rate, r=rates[name], take=take: r.append(rate) or take(rate)
    seeds, step = [], learner.step
    learner.step = lambda batch, *rest: (
        seeds.extend(experience.trajectory.seed for experience in batch) or step(batch, *rest)
    )
    for _ in range(2):
        learner.update(played)
    # Two minibatches of four, three times, in two updates; the actor sits out the first of these.
    assert rates["critic"] == pytest.approx([0.02 * min(1, n / 8) for n in range(1, 13)])
    assert rates["actor"] == pytest.approx([0.01 * min(1, n / 4) for n in range(1, 7)])
    epochs = [sorted(seeds[i : i + 8]) for i in range(0, len(seeds), 8)]
    assert epochs == [list(range(8))] * 6


def test_kl_in_the_reward_lowers_returns(make_model, played):
    learner = build(make_model, kl_coef=0.5)
    with torch.no_grad():
        for parameter in learner.actor.parameters():
            parameter.mul_(1.2)
    batch, metrics = learner.prepare(played)
    assert metrics["kl_reference"] > 0.01
    for experience in batch:
        penalty = (experience.old_logprob - experience.ref_logprob).clamp(min=0) * 0.5
        expected = experience.trajectory.reward - penalty.flip(0).cumsum(0).flip(0)
        torch.testing.assert_close(experience.returns, expected, atol=1e-3, rtol=1e-4)


def test_updates_make_rewarded_actions_more_likely(make_model, played):
    learner = build(
        make_model, actor_lr=3e-4, critic_lr=3e-3, critic_only_updates=1, epochs=2, mini_batch_size=4
    )
    stream = pack(played, "carry")
    rewarded = torch.cat(
        [torch.full((count,), t.reward > 0) for t, count in zip(played, stream.counts, strict=True)]
    )
    before = recompute_logprobs(learner.actor, stream)
    first = learner.update(played, torch.Generator().manual_seed(0))
    assert torch.equal(recompute_logprobs(learner.actor, stream), before), (
        "the first update is the critic's alone"
    )
    assert "policy_loss" not in first
    last = [learner.update(played, torch.Generator().manual_seed(i)) for i in range(1, 7)][-1]
    change = recompute_logprobs(learner.actor, stream) - before
    assert float(change[rewarded].mean()) > float(change[~rewarded].mean()) + 0.05
    assert last["value_loss"] < first["value_loss"]
    assert {"kl", "entropy", "clip_fraction", "ratio_max", "actor_grad_norm", "critic_grad_norm"} <= set(last)


@pytest.mark.parametrize("regime", ["reencode", "paper"])
def test_other_regimes_train(make_model, tokenizer, regime):
    actor = make_model()
    config = RolloutConfig(num_slots=4, regime=regime, max_action_tokens=16, max_turns=5)
    played = list(rollout(actor, tokenizer, lambda: MultiHopEnv(2), range(4), config))
    learner = Learner(
        actor, build_critic(actor), None, AlgorithmConfig(kl_coef=0.0, critic_only_updates=0), regime
    )
    metrics = learner.update(played)
    assert metrics["actor_grad_norm"] > 0
    assert (metrics["dlogp_max"] < 5e-5) == (regime == "reencode")


def test_kl_in_the_loss_pulls_back(make_model, played):
    losses = {}
    for kl in (0.0, 10.0):
        learner = build(make_model, kl_placement="loss", kl_coef=kl, entropy_coef=0.0)
        with torch.no_grad():
            for parameter in learner.actor.parameters():
                parameter.mul_(1.05)
        batch, _ = learner.prepare(played)
        losses[kl] = learner.step(batch)["policy_loss"]
    assert losses[10.0] > losses[0.0] + 0.01


def test_a_batch_without_policy_tokens_is_refused(make_model):
    failed = Trajectory(
        torch.arange(3),
        [Segment("prompt", 0, 3)],
        torch.zeros(3),
        "action",
        finish_reason="environment_error",
        error="x",
    )
    with pytest.raises(ValueError, match="at least one, sound, in which the policy wrote a token"):
        build(make_model).update([failed])


def test_a_reference_is_needed_for_a_kl(make_model):
    with pytest.raises(ValueError, match="reference: expected a frozen model for kl_coef = 0.001, got None"):
        build(make_model, reference=False)


def test_a_last_smaller_minibatch_weighs_what_its_tokens_do(make_model, played):
    """Steps of three and one of two add up to the gradient of all, and no step is blown up by having few."""
    learner = build(make_model, mini_batch_size=3, critic_only_updates=0, max_grad_norm=1e9)
    batch, _ = learner.prepare(played)
    seen, step = [], learner.step

    def watching(part, train_actor, normalizer):
        for optimizer in learner.optimizers.values():
            optimizer.step = lambda rate: 0.0
        result = step(part, train_actor, normalizer)
        seen.append((len(part), normalizer, [p.grad.clone() for p in learner.actor.parameters()]))
        return result

    learner.step = watching
    metrics = learner.learn(batch)
    tokens = sum(len(experience.old_logprob) for experience in batch)
    assert [size for size, _, _ in seen] == [3, 3, 2]
    assert {normalizer for _, normalizer, _ in seen} == {tokens * 3 / 8}
    whole = gradients(build(make_model, max_grad_norm=1e9), batch)[: len(seen[0][2])]
    for i, wanted in enumerate(whole):
        added = sum(parts[i] for _, _, parts in seen) * 3 / 8
        torch.testing.assert_close(added, wanted, atol=2e-5, rtol=1e-3)
    one = build(make_model, critic_only_updates=0)
    assert metrics["value_loss"] == pytest.approx(one.step(batch)["value_loss"], rel=1e-4)
    assert metrics["entropy"] == pytest.approx(build(make_model).step(batch)["entropy"], rel=1e-4)


def test_explained_variance_of_equal_returns_is_nan(make_model, played):
    learner = build(make_model, reference=False, kl_coef=0.0)
    with torch.no_grad():
        learner.critic.head.weight.normal_(std=0.1)
    equal = [copy.copy(t) for t in played]
    for trajectory in equal:
        trajectory.rewards = [TokenReward(trajectory.tokens.numel() - 1, 0.5)]
    assert math.isnan(learner.prepare(equal)[1]["explained_variance"])
    assert not math.isnan(learner.prepare(played)[1]["explained_variance"])
    returns = torch.tensor([1.0, 2.0, 4.0])
    assert explained_variance(returns, returns) == 1.0
    assert explained_variance(returns, torch.zeros(3)) == pytest.approx(0.0)
    assert math.isnan(explained_variance(torch.zeros(3), returns))


@pytest.mark.parametrize("reward", [1e20, 1e39, math.inf, math.nan])
def test_a_reward_that_is_not_finite_is_refused(make_model, played, reward):
    bad = copy.copy(played[3])
    bad.rewards = [TokenReward(bad.tokens.numel() - 1, reward)]
    with pytest.raises(
        ValueError,
        match=f"whose squares are finite in float32, got {reward} for seed {bad.seed}".replace("+", r"."),
    ):
        build(make_model).prepare([*played[:3], bad])


def test_the_turn_limit_is_terminal_unless_bootstrapped(make_model, tokenizer):
    """gamma, lam < 1 and a critic with values: the last delta gains gamma V(end), and it is carried back."""
    for regime in ("carry", "reencode"):
        config = replace(ROLLOUT, regime=regime, max_turns=3)
        played = list(rollout(make_model(), tokenizer, partial(MultiHopEnv, 2), range(4), config))
        assert {t.finish_reason for t in played} == {"turn_limit"}
        played[0].finish_reason = FinishReason.ANSWERED
        batches = []
        for bootstrap in (False, True):
            settings = {"gamma": 0.9, "lam": 0.8, "bootstrap_turn_limit": bootstrap}
            learner = Learner(
                make_model(),
                build_critic(make_model()),
                None,
                AlgorithmConfig(kl_coef=0.0, **settings),
                regime,
            )
            with torch.no_grad():
                learner.critic.head.weight.fill_(0.05)
            batches.append(learner.prepare(played)[0])
        for trajectory, plain, more in zip(played, *batches, strict=True):
            layout = trajectory.layout(regime)
            with torch.no_grad():
                values = learner.critic(
                    trajectory.tokens[layout.token_index][None], layout.position_ids[None], layout.mask
                )[0]
            gained = 0.0 if trajectory.finish_reason == "answered" else 0.9 * float(values[-1])
            count = len(plain.returns)
            wanted = gained * (0.9 * 0.8) ** torch.arange(count - 1, -1, -1.0)
            torch.testing.assert_close(more.returns - plain.returns, wanted, atol=1e-5, rtol=1e-4)


def test_truncated_importance_weights(make_model, tokenizer):
    """Tokens that the sampler was `e^0.5` times less likely to draw weigh so much more, up to the cap."""
    actor = make_model()
    played = list(rollout(actor, tokenizer, partial(MultiHopEnv, 2), range(4), ROLLOUT))
    for trajectory in played:
        trajectory.rollout_logprobs = trajectory.logprobs - 0.5 * trajectory.policy_mask
        trajectory.rewards = [TokenReward(trajectory.tokens.numel() - 1, float(trajectory.seed % 2))]
    found = {}
    for cap in (None, 1.2, 9.0):
        learner = build(
            make_model, reference=False, kl_coef=0.0, entropy_coef=0.0, rollout_is_cap=cap, max_grad_norm=1e9
        )
        batch, _ = learner.prepare(played)
        found[cap] = gradients(learner, batch)[0]
    torch.testing.assert_close(found[1.2], found[None] * 1.2, atol=1e-6, rtol=1e-3)
    torch.testing.assert_close(found[9.0], found[None] * math.exp(0.5), atol=1e-6, rtol=1e-3)


def test_dropout_is_off_also_where_layers_are_recomputed(make_model, played):
    learner = build(make_model)
    learner.actor.gradient_checkpointing_enable()
    learner.actor.model.layers[0].mlp.add_module("drop", torch.nn.Dropout(0.5))
    batch, _ = learner.prepare(played)
    assert learner.step(batch)["ratio_max"] < 1.0001
    assert not learner.actor.model.layers[0].mlp.drop.training and learner.actor.model.layers[0].training
    for name in ("dropout", "activation_dropout", "layerdrop"):
        setattr(learner.actor.model.layers[0], name, 0.1)
        expected = "expected no dropout beside gradient checkpointing"
        with pytest.raises(InputError, match=rf"{expected}, got {name}=0.1 in model.layers.0"):
            learner.step(batch)
        delattr(learner.actor.model.layers[0], name)
