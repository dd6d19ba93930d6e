"""The same numbers as other implementations in the field: verl 0.9 and Liger 0.8.5, by their own functions.

A peer that is not installed skips its tests (`pip install verl liger-kernel`). Where a peer's convention is
another, the test says how it is bridged.
"""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from mem1_core.ops import clipped_value_loss, fused_linear_ppo_loss, gae, linear_logprob, masked_whiten

WHY = "wants {0}, with all it imports (pip install {0})"
OFF = 1e9  # verl's dual clip cannot be left out: a bound that no ratio reaches
every_backend = pytest.mark.parametrize("backend", ["cpu", "reference"])


@pytest.fixture(scope="module")
def verl() -> SimpleNamespace:
    """verl's loss functions, and the class of its settings."""
    core = pytest.importorskip("verl.trainer.ppo.core_algos", reason=WHY.format("verl"))
    config = pytest.importorskip("verl.workers.config", reason=WHY.format("verl"))
    correction = pytest.importorskip("verl.trainer.ppo.rollout_corr_helper", reason=WHY.format("verl"))
    functional = pytest.importorskip("verl.utils.torch_functional", reason=WHY.format("verl"))
    return SimpleNamespace(core=core, config=config, correction=correction, functional=functional)


@pytest.fixture(scope="module")
def liger() -> type[torch.nn.Module]:
    reason = WHY.format("liger-kernel")
    return pytest.importorskip("liger_kernel.chunked_loss", reason=reason).LigerFusedLinearGRPOLoss


# ----------------------------------------------------------------------------------------------------- inputs

ROWS, LENGTH, VOCABULARY, WIDTH = 6, 11, 19, 8


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def batch(seed: int) -> dict[str, Tensor]:
    """Ragged rows with holes, one without a token; ratios on both sides of the clip, advantages of any sign.

    hidden [B, T, H], weight [V, H], the others [B, T]; log-ratios within the +-20 of the clamp.
    """
    hidden, weight = draw(ROWS, LENGTH, WIDTH, seed=seed), draw(VOCABULARY, WIDTH, seed=seed + 1)
    generator = torch.Generator().manual_seed(seed)
    target = torch.randint(0, VOCABULARY, (ROWS, LENGTH), generator=generator)
    lengths = torch.tensor([LENGTH, 7, 1, 0, LENGTH - 2, 4])[:, None]
    mask = (torch.arange(LENGTH) < lengths) & (torch.rand(ROWS, LENGTH, generator=generator) < 0.8)
    mask[2, 0] = True
    logprob = (hidden @ weight.T).log_softmax(-1).gather(-1, target[..., None])[..., 0]
    return {
        "hidden": hidden,
        "weight": weight,
        "target": target,
        "mask": mask,
        "advantage": 2 * draw(ROWS, LENGTH, seed=seed + 2),
        "old": logprob + 0.7 * draw(ROWS, LENGTH, seed=seed + 3),
        "ref": logprob + 0.5 * draw(ROWS, LENGTH, seed=seed + 4),
        "sampler": logprob + 1.2 * draw(ROWS, LENGTH, seed=seed + 5),
    }


SEQUENCE = torch.arange(ROWS)[:, None].expand(ROWS, LENGTH)


def ours(
    given: dict[str, Tensor], backend: str, **options: Any
) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """Loss, metrics, and the gradients of hidden, weight (and bias)."""
    leaves = {name: given[name].clone().requires_grad_() for name in ("hidden", "weight")}
    if "bias" in options:
        leaves["bias"] = options.pop("bias").clone().requires_grad_()
    loss, metrics = fused_linear_ppo_loss(
        leaves["hidden"].flatten(0, 1),
        leaves["weight"],
        given["target"].flatten(),
        given["old"].flatten(),
        given["advantage"].flatten(),
        given["mask"].flatten(),
        sequence_ids=SEQUENCE.flatten(),
        bias=leaves.get("bias"),
        backend=backend,
        **{name: x.flatten() if torch.is_tensor(x) and x.dim() else x for name, x in options.items()},
    )
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    return loss.detach(), metrics, dict(zip(leaves, gradients, strict=True))


def same_gradients(got: dict[str, Tensor], loss: Tensor, leaves: dict[str, Tensor]) -> None:
    for name, theirs in zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True):
        assert (theirs != 0).any()
        torch.testing.assert_close(got[name], theirs, msg=lambda text, name=name: f"{name}: {text}")


# ------------------------------------------------------------------------------------------------------- verl


class Verl:
    """verl's way to the loss: log-probs [B, T] of the same hidden states, its functions on top of them."""

    def __init__(self, verl: SimpleNamespace, given: dict[str, Tensor], **settings: Any) -> None:
        self.core, self.given, self.mask = verl.core, given, given["mask"].double()  # 1 - mask: no bool
        self.mode = settings.pop("loss_agg_mode", "token-mean")
        self.config = verl.config.ActorConfig(
            strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1, **{"clip_ratio_c": OFF} | settings
        )
        self.leaves = {name: given[name].clone().requires_grad_() for name in ("hidden", "weight")}
        logits = self.leaves["hidden"] @ self.leaves["weight"].T
        self.entropy = verl.functional.entropy_from_logits(logits)
        self.logprob = verl.functional.logprobs_from_logits_v2(logits, given["target"])

    def policy_loss(self, weights: Tensor | None = None) -> tuple[Tensor, dict[str, Any]]:
        given = self.given
        return self.core.compute_policy_loss_vanilla(
            given["old"], self.logprob, given["advantage"], self.mask, self.mode, self.config, weights
        )

    def mean(self, per_token: Tensor) -> Tensor:
        return self.core.agg_loss(per_token, self.mask, self.mode)


CLIPS = {
    "clip": ({"clip_ratio": 0.2}, {}),
    "wide clip": ({"clip_ratio_low": 0.5, "clip_ratio_high": 0.5}, {"clip_low": 0.5, "clip_high": 0.5}),
    "asymmetric clip": ({"clip_ratio_low": 0.1, "clip_ratio_high": 0.4}, {"clip_low": 0.1, "clip_high": 0.4}),
    "dual clip": ({"clip_ratio_c": 1.5}, {"dual_clip": 1.5}),
    "all": (
        {"clip_ratio_low": 0.3, "clip_ratio_high": 0.15, "clip_ratio_c": 1.3},
        {"clip_low": 0.3, "clip_high": 0.15, "dual_clip": 1.3},
    ),
}


@every_backend
@pytest.mark.parametrize("seed", [0, 100])
@pytest.mark.parametrize("case", CLIPS)
def test_verl_clips(verl: SimpleNamespace, case: str, seed: int, backend: str) -> None:
    settings, options = CLIPS[case]
    given = batch(seed)
    peer = Verl(verl, given, **settings)
    loss, metrics = peer.policy_loss()
    got, own, gradients = ours(given, backend, **options)
    torch.testing.assert_close(got, loss)
    same_gradients(gradients, loss, peer.leaves)
    # Its means divide by the count + 1e-8.
    assert 0 < float(own["clip_fraction"]) == pytest.approx(metrics["actor/pg_clipfrac"], rel=1e-6)
    assert ("dual_clip" in options) == (metrics["actor/pg_clipfrac_lower"] > 0)


def test_verl_logprob_and_entropy(verl: SimpleNamespace) -> None:
    given = batch(0)
    peer = Verl(verl, given)
    logprob, entropy = linear_logprob(
        given["hidden"].flatten(0, 1), given["weight"], given["target"].flatten()
    )
    torch.testing.assert_close(logprob, peer.logprob.flatten())
    torch.testing.assert_close(entropy, peer.entropy.flatten())


@every_backend
@pytest.mark.parametrize("ours_name", ["k1", "k2", "k3"])
def test_verl_kl(verl: SimpleNamespace, ours_name: str, backend: str) -> None:
    given = batch(1)
    for name in {"k1": ("kl", "k1"), "k2": ("mse", "k2"), "k3": ("low_var_kl", "k3")}[ours_name]:
        peer = Verl(verl, given)
        per_token = peer.core.kl_penalty(peer.logprob, given["ref"], name)
        mean = peer.mean(per_token)
        loss = peer.policy_loss()[0] + 0.3 * mean
        options = {"ref_logprob": given["ref"], "kl_coef": 0.3, "kl_estimator": ours_name}
        got, own, gradients = ours(given, backend, **options)
        torch.testing.assert_close(got, loss)
        torch.testing.assert_close(own["kl"], mean.detach())
        same_gradients(gradients, loss, peer.leaves)


def test_verl_bounds_its_kl_elsewhere(verl: SimpleNamespace) -> None:
    """Ours clamps the log-ratio of every estimator to +-20; verl only that of k3, and the value then to 10.

    So k3 differs from log-ratios of about -2.6 on, and k1 and k2 beyond 20; the other tests stay within.
    """
    given = batch(1)
    for shift, name, differs in (
        (-5.0, "k1", False),
        (5.0, "k3", True),
        (25.0, "k1", True),
        (25.0, "k2", True),
    ):
        far = given["ref"] + shift
        peer = Verl(verl, given)
        mean = peer.mean(peer.core.kl_penalty(peer.logprob, far, name)).detach()
        _, own, _ = ours(given, "cpu", ref_logprob=far, kl_estimator=name)
        assert torch.isclose(own["kl"], mean) != differs
        if name == "k3":
            assert mean == pytest.approx(10, rel=0.05) and own["kl"] > 100


@every_backend
def test_verl_entropy_bonus(verl: SimpleNamespace, backend: str) -> None:
    given = batch(2)
    peer = Verl(verl, given)
    entropy = peer.mean(peer.entropy)
    loss = peer.policy_loss()[0] - 0.1 * entropy
    got, own, gradients = ours(given, backend, entropy_coef=0.1)
    torch.testing.assert_close(got, loss)
    torch.testing.assert_close(own["entropy"], entropy.detach())
    same_gradients(gradients, loss, peer.leaves)


@every_backend
def test_verl_stale_sampler(verl: SimpleNamespace, backend: str) -> None:
    """Truncated importance sampling by the token, its "rollout correction"."""
    given = batch(3)
    peer = Verl(verl, given)
    weights, _ = verl.correction.compute_rollout_correction_weights(
        given["old"] - given["sampler"], peer.mask, "token", 1.5
    )
    assert (weights == 1.5).any() and ((weights > 0) & (weights < 1.5)).any()
    loss, _ = peer.policy_loss(weights)
    got, _, gradients = ours(given, backend, rollout_logprob=given["sampler"], rollout_is_cap=1.5)
    torch.testing.assert_close(got, loss)
    same_gradients(gradients, loss, peer.leaves)


LEARNT = 5  # rows of a batch that have a token
AGGREGATIONS: dict[str, dict[str, Any]] = {
    "token-mean": {"aggregation": "token-mean"},
    "seq-mean-token-mean": {"aggregation": "sequence-mean"},
    "seq-mean-token-sum": {"aggregation": "sum", "normalizer": LEARNT},
    "seq-mean-token-sum-norm": {"aggregation": "sum", "normalizer": LEARNT * LENGTH},
    "token-sum": {"aggregation": "sum"},
}


@every_backend
@pytest.mark.parametrize("mode", AGGREGATIONS)
def test_verl_aggregations(verl: SimpleNamespace, mode: str, backend: str) -> None:
    """Both leave out rows without a token. verl's mean of a row divides by its count + 1e-8."""
    given = batch(4)
    assert int(given["mask"].any(1).sum()) == LEARNT
    peer = Verl(verl, given, loss_agg_mode=mode, clip_ratio_c=2.0)
    loss, _ = peer.policy_loss()
    loss = loss + 0.2 * peer.mean(peer.core.kl_penalty(peer.logprob, given["ref"], "k3"))
    options = {"dual_clip": 2.0, "ref_logprob": given["ref"], "kl_coef": 0.2} | AGGREGATIONS[mode]
    got, _, gradients = ours(given, backend, **options)
    torch.testing.assert_close(got, loss, rtol=1e-7, atol=1e-8)
    for name, theirs in zip(peer.leaves, torch.autograd.grad(loss, list(peer.leaves.values())), strict=True):
        torch.testing.assert_close(gradients[name], theirs, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("mode", ["token-mean", "seq-mean-token-mean"])
def test_verl_global_batch_is_our_normalizer(verl: SimpleNamespace, mode: str) -> None:
    """What a micro-batch is divided by: verl's `global_batch_info` with one data-parallel rank."""
    given = batch(5)
    peer = Verl(verl, given, loss_agg_mode=mode)
    peer.config.global_batch_info.update(dp_size=1, batch_num_tokens=100, global_batch_size=16)
    normalizer = 100 if mode == "token-mean" else 16
    loss, _ = peer.policy_loss()
    got, _, _ = ours(given, "cpu", **AGGREGATIONS[mode] | {"normalizer": normalizer})
    torch.testing.assert_close(got, loss.detach(), rtol=1e-7, atol=1e-8)


def test_verl_clamps_the_log_ratio_alike(verl: SimpleNamespace) -> None:
    given = batch(6)
    given["old"], given["advantage"] = given["old"] - 40, -given["advantage"].abs()
    peer = Verl(verl, given)
    loss, _ = peer.policy_loss()
    got, own, _ = ours(given, "cpu")
    torch.testing.assert_close(got, loss.detach())
    assert float(own["ratio_max"]) == pytest.approx(math.exp(20))


@every_backend
@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 1.0), (0.99, 0.95), (0.9, 0.0), (0.5, 0.7)])
def test_verl_gae(verl: SimpleNamespace, gamma: float, lam: float, backend: str) -> None:
    """It carries value and advantage through holes as well, which it fills where ours are 0, and hands out
    advantages that are whitened: ours are, by `masked_whiten`.
    """
    mask = batch(7)["mask"]
    inside = mask[:, 1:-1] < (mask[:, :-2] & mask[:, 2:])
    assert inside.any()  # holes of environment tokens
    reward, value = draw(ROWS, LENGTH, seed=8), draw(ROWS, LENGTH, seed=9)
    theirs = verl.core.compute_gae_advantage_return(reward, value, mask.double(), gamma, lam)
    advantage, returns = gae(reward, value, mask, gamma, lam, backend=backend)
    torch.testing.assert_close(returns[mask], theirs[1][mask])
    torch.testing.assert_close(advantage[mask], (theirs[1] - value)[mask])
    torch.testing.assert_close(masked_whiten(advantage, mask)[mask], theirs[0][mask])


@pytest.mark.parametrize("shift_mean", [True, False])
def test_verl_whitening(verl: SimpleNamespace, shift_mean: bool) -> None:
    """The same variance, by n - 1, and the same eps, but for a count + 1e-8. Outside of the mask ours is 0,
    where verl scales what stands there, and without two tokens ours is 0 where verl raises."""
    values, mask = 3 * draw(ROWS, LENGTH, seed=1) + 2, batch(8)["mask"]
    theirs = verl.functional.masked_whiten(values, mask.double(), shift_mean)
    got = masked_whiten(values, mask, shift_mean=shift_mean)
    torch.testing.assert_close(got[mask], theirs[mask], rtol=1e-6, atol=1e-7)
    assert (got[~mask] == 0).all() and (theirs[~mask] != 0).all()
    with pytest.raises(ValueError, match="At least one element"):
        verl.functional.masked_whiten(values, torch.zeros_like(values))
    assert (masked_whiten(values, torch.zeros_like(mask)) == 0).all()


@pytest.mark.parametrize("clip", [0.1, 0.5, 100.0])
def test_verl_value_loss(verl: SimpleNamespace, clip: float) -> None:
    mask = batch(9)["mask"]
    value, old, returns = (draw(ROWS, LENGTH, seed=seed) for seed in (1, 2, 3))
    one, other = value.clone().requires_grad_(), value.clone().requires_grad_()
    theirs, fraction = verl.core.compute_value_loss(one, returns, old, mask.double(), clip)
    loss, clipped = clipped_value_loss(other, old, returns, mask, clip)
    torch.testing.assert_close(loss, theirs)
    assert float(clipped) == pytest.approx(float(fraction), rel=1e-6) and (clip == 100) == (clipped == 0)
    torch.testing.assert_close(torch.autograd.grad(loss, other), torch.autograd.grad(theirs, one))
    split, _ = clipped_value_loss(value, old, returns, mask, clip, normalizer=100)
    whole, _ = verl.core.compute_value_loss(value, returns, old, mask.double(), clip, batch_num_tokens=100)
    torch.testing.assert_close(split, whole)


# ------------------------------------------------------------------------------------------------------ Liger

# loss_type -> our aggregation. Liger's "grpo" divides by all rows, also those without a token.
TYPES: dict[str, dict[str, Any]] = {
    "dapo": {"aggregation": "token-mean"},
    "bnpo": {"aggregation": "token-mean"},
    "grpo": {"aggregation": "sequence-mean", "normalizer": ROWS},
    "dr_grpo": {"aggregation": "sum", "normalizer": ROWS * 32},
}
LIGER: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "clip": ({}, {}),
    "asymmetric clip": ({"epsilon_low": 0.1, "epsilon_high": 0.4}, {"clip_low": 0.1, "clip_high": 0.4}),
    # A ratio bounded by delta > 1 + epsilon_high: of either sign the same as the dual clip.
    "two-sided clip": ({"delta": 1.5}, {"dual_clip": 1.5}),
    "k3": ({"beta": 0.3}, {"kl_coef": 0.3}),
    "temperature": ({"temperature": 0.8}, {"temperature": 0.8}),
    "all": (
        {"epsilon_low": 0.3, "epsilon_high": 0.15, "delta": 1.3, "beta": 0.1, "temperature": 1.3},
        {"clip_low": 0.3, "clip_high": 0.15, "dual_clip": 1.3, "kl_coef": 0.1, "temperature": 1.3},
    ),
}


@every_backend
@pytest.mark.parametrize("loss_type", TYPES)
@pytest.mark.parametrize("case", LIGER)
def test_liger_grpo(liger: type[torch.nn.Module], case: str, loss_type: str, backend: str) -> None:
    """Liger's chunked loss from hidden states, in fp32 as it keeps the sums.

    An advantage is a row's there, so ours repeats it along the row. Its log-ratios have no clamp (these are
    within ours), its k3 is a term only with beta, its importance weight comes from outside.
    """
    settings, options = LIGER[case]
    given = batch(20)
    given = {name: x.float() if x.is_floating_point() else x for name, x in given.items()}
    advantage, bias = given["advantage"][:, 0], draw(VOCABULARY, seed=30).float()
    weights = (given["old"] - given["sampler"]).exp().clamp(max=1.5)
    leaves = {name: given[name].clone().requires_grad_() for name in ("hidden", "weight")}
    leaves["bias"] = bias.clone().requires_grad_()
    settings = {"beta": 0.0, "max_completion_length": 32} | settings
    peer = liger(compiled=False, loss_type=loss_type, chunk_size=2, **settings)
    loss, metrics = peer(
        leaves["hidden"],
        leaves["weight"],
        given["target"],
        given["mask"].float(),
        advantage,
        leaves["bias"],
        ref_per_token_logps=given["ref"],
        old_per_token_logps=given["old"],
        vllm_is_ratio=weights,
    )
    given["advantage"] = advantage[:, None].expand(ROWS, LENGTH)
    rest = {
        "ref_logprob": given["ref"],
        "rollout_logprob": given["sampler"],
        "rollout_is_cap": 1.5,
        "bias": bias,
    }
    got, own, gradients = ours(given, backend, **rest, **options, **TYPES[loss_type])
    torch.testing.assert_close(got, loss.detach())
    same_gradients(gradients, loss, leaves)
    torch.testing.assert_close(own["clip_fraction"], metrics[-1])
    ratio = (own["logprob"].view(ROWS, LENGTH) - given["old"]).exp()[given["mask"] & (given["advantage"] < 0)]
    assert own["clip_fraction"] > 0 and (ratio > settings.get("delta", 1.2)).any()
    if settings["beta"]:
        torch.testing.assert_close(own["kl"], metrics[0])
