"""The specification of the losses over the vocabulary, against Python's numbers, one token after another."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from loss_cases import NOISE, OPTIONS, SEQUENCE, batch, draw
from torch import Tensor

from mem1_core import reference


def test_linear_logprob() -> None:
    hidden, weight = draw(5, 4), draw(7, 4, seed=1)
    target, temperatures = (
        torch.tensor([0, 6, 3, 3, 1]),
        torch.tensor([1.0, 0.5, 2.0, 1.0, 0.7], dtype=torch.float64),
    )
    for temperature in (temperatures, 0.7, torch.tensor(0.7)):
        logprob, entropy = reference.linear_logprob(hidden, weight, target, temperature)
        each = temperature[:, None] if torch.is_tensor(temperature) and temperature.dim() else temperature
        expected = torch.distributions.Categorical(logits=hidden @ weight.T / each)
        torch.testing.assert_close(logprob, expected.log_prob(target))
        torch.testing.assert_close(entropy, expected.entropy())
    low, _ = reference.linear_logprob(hidden.bfloat16(), weight.bfloat16(), target)
    assert low.dtype == torch.float32


def by_hand(given: dict[str, Any], options: dict[str, Any]) -> tuple[float, dict[str, float]]:
    """The loss in Python's numbers, one token after another."""
    low, high = options.get("clip_low", 0.2), options.get("clip_high", 0.2)
    losses: dict[int, float] = {}
    clipped, kls, entropies, ratios = [], [], [], []
    for t in given["loss_mask"].nonzero()[:, 0].tolist():
        temperatures = options.get("temperature", 1.0)
        temperatures = float(temperatures[t]) if torch.is_tensor(temperatures) else temperatures
        logits = given["weight"] @ given["hidden"][t]
        if cap := options.get("softcap"):
            logits = cap * (logits / cap).tanh()
        logits = logits / temperatures
        logprobs = (logits - logits.exp().sum().log()).tolist()
        logprob, old, a = (
            logprobs[given["target"][t]],
            float(given["old_logprob"][t]),
            float(given["advantage"][t]),
        )
        r = math.exp(logprob - old)
        plain, cut = -a * r, -a * min(max(r, 1 - low), 1 + high)
        loss = max(plain, cut)
        if "dual_clip" in options and a < 0:
            loss = min(loss, -a * options["dual_clip"])
        if "rollout_logprob" in options:
            loss *= min(
                math.exp(old - float(options["rollout_logprob"][t])), options.get("rollout_is_cap", 2.0)
            )
        entropies.append(-sum(math.exp(x) * x for x in logprobs))
        loss -= options.get("entropy_coef", 0.0) * entropies[-1]
        if "ref_logprob" in options:
            d = logprob - float(options["ref_logprob"][t])
            estimates = {"k1": d, "k2": d * d / 2, "k3": math.exp(-d) - 1 + d}
            kls.append(estimates[options.get("kl_estimator", "k3")])
            loss += options.get("kl_coef", 0.0) * kls[-1]
        losses[t] = loss
        clipped.append(cut > plain)
        ratios.append(r)
    if options.get("aggregation") == "sequence-mean":
        groups: dict[int, list[float]] = {}
        for t, loss in losses.items():
            groups.setdefault(int(options["sequence_ids"][t]), []).append(loss)
        total, default = sum(sum(g) / len(g) for g in groups.values()), len(groups)
    else:
        total, default = sum(losses.values()), 1 if options.get("aggregation") == "sum" else len(losses)
    n = len(losses)
    metrics = {"entropy": sum(entropies) / n, "clip_fraction": sum(clipped) / n, "ratio_max": max(ratios)}
    if kls:
        metrics["kl"] = sum(kls) / n
    return total / options.get("normalizer", default), metrics


@pytest.mark.parametrize("case", OPTIONS)
def test_ppo_loss_token_by_token(case: str) -> None:
    given, options = batch(), OPTIONS[case]
    loss, metrics = reference.fused_linear_ppo_loss(**given, **options)
    expected, expected_metrics = by_hand(given, options)
    assert float(loss) == pytest.approx(expected, rel=1e-9)
    logprob = metrics.pop("logprob")
    assert {name: float(value) for name, value in metrics.items()} == pytest.approx(
        expected_metrics, rel=1e-9
    )
    assert not any(value.requires_grad for value in metrics.values())
    temperatures = options.get("temperature", 1.0)
    every, _ = reference.linear_logprob(
        given["hidden"], given["weight"], given["target"], temperatures, softcap=options.get("softcap")
    )
    torch.testing.assert_close(logprob, torch.where(given["loss_mask"], every, 0.0))

    def of(hidden: Tensor, weight: Tensor) -> Tensor:
        return reference.fused_linear_ppo_loss(**{**given, "hidden": hidden, "weight": weight}, **options)[0]

    assert torch.autograd.gradcheck(
        of, tuple(given[n].clone().requires_grad_() for n in ("hidden", "weight"))
    )


def test_the_cases_reach_every_branch() -> None:
    given = batch()
    logprob, _ = reference.linear_logprob(given["hidden"], given["weight"], given["target"])
    ratio, a, kept = (logprob - given["old_logprob"]).exp(), given["advantage"], given["loss_mask"]
    for wanted in (
        (ratio > 1.2) & (a > 0),
        (ratio > 1.3) & (a < 0),
        (ratio < 0.8) & (a > 0),
        (ratio < 0.8) & (a < 0),
        (ratio - 1).abs() < 0.1,
    ):
        assert (wanted & kept).any()


@pytest.mark.parametrize("aggregation", ["token-mean", "sequence-mean", "sum"])
def test_micro_batches_with_the_batch_normaliser_add_up(aggregation: reference.Aggregation) -> None:
    given = batch()
    weight = given.pop("weight").requires_grad_()
    whole, _ = reference.fused_linear_ppo_loss(
        **given, weight=weight, sequence_ids=SEQUENCE, aggregation=aggregation
    )
    normalizer = {"token-mean": int(given["loss_mask"].sum()), "sequence-mean": 3, "sum": 1}[aggregation]
    parts = []
    for rows in (slice(0, 5), slice(5, 12)):  # sequences stay whole
        part = {name: value[rows] for name, value in given.items()}
        loss, _ = reference.fused_linear_ppo_loss(
            **part, weight=weight, sequence_ids=SEQUENCE[rows], aggregation=aggregation, normalizer=normalizer
        )
        parts.append(loss)
    torch.testing.assert_close(sum(parts), whole)
    (one,), (many,) = (torch.autograd.grad(loss, weight) for loss in (whole, sum(parts)))
    torch.testing.assert_close(one, many)


def test_masked_rows_are_not_read() -> None:
    given = batch()
    clean, _ = reference.fused_linear_ppo_loss(**given)
    for name in ("hidden", "old_logprob", "advantage"):
        given[name] = given[name].clone()
        given[name][~given["loss_mask"]] = math.nan
    given["hidden"].requires_grad_()
    dirty, metrics = reference.fused_linear_ppo_loss(**given)
    assert torch.equal(clean, dirty) and all(value.isfinite().all() for value in metrics.values())
    dirty.backward()
    assert (given["hidden"].grad[~given["loss_mask"]] == 0).all() and given["hidden"].grad.isfinite().all()


@pytest.mark.parametrize("aggregation", ["token-mean", "sequence-mean", "sum"])
def test_nothing_to_learn_from_is_a_loss_of_zero(aggregation: reference.Aggregation) -> None:
    given = batch()
    given["hidden"].requires_grad_()
    given["loss_mask"] = torch.zeros_like(given["loss_mask"])
    loss, metrics = reference.fused_linear_ppo_loss(**given, sequence_ids=SEQUENCE, aggregation=aggregation)
    loss.backward()
    assert loss == 0 and (given["hidden"].grad == 0).all()
    assert all((value == 0).all() for value in metrics.values())


def test_wild_log_ratios_stay_finite() -> None:
    given = batch()
    given["old_logprob"] = given["old_logprob"] - 1e4
    given["advantage"] = -given["advantage"].abs()  # the side PPO does not clip
    loss, metrics = reference.fused_linear_ppo_loss(
        **given, ref_logprob=given["old_logprob"] * -1, kl_coef=1.0
    )
    assert loss.isfinite() and float(metrics["ratio_max"]) == pytest.approx(math.exp(20))


def test_ppo_loss_errors() -> None:
    with pytest.raises(ValueError, match="ref_logprob: expected a tensor for kl_coef = 0.1, got None"):
        reference.fused_linear_ppo_loss(**batch(), kl_coef=0.1)
    with pytest.raises(ValueError, match="kl_estimator: expected 'k1', 'k2' or 'k3', got 'k4'"):
        reference.fused_linear_ppo_loss(**batch(), ref_logprob=NOISE, kl_estimator="k4")  # type: ignore[arg-type]
    with pytest.raises(
        ValueError, match="sequence_ids: expected a tensor for aggregation='sequence-mean', got None"
    ):
        reference.fused_linear_ppo_loss(**batch(), aggregation="sequence-mean")
    with pytest.raises(ValueError, match="aggregation: expected 'token-mean', .* got 'mean'"):
        reference.fused_linear_ppo_loss(**batch(), aggregation="mean")  # type: ignore[arg-type]
