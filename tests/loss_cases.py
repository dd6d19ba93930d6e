"""What the tests of the losses over the vocabulary share: batches, options, eager code, the accuracy rule."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mem1_core import reference
from mem1_core.testing import assert_accurate, gradients

LEAVES = ("hidden", "weight", "bias")


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def ragged(rows: int, length: int) -> Tensor:
    """Rows of every kind: all steps, none, the first or the last token alone, holes, padding on the right."""
    chance = torch.rand(rows, length, generator=torch.Generator().manual_seed(7))
    mask = chance < torch.linspace(0.2, 0.95, max(rows, 1))[:rows, None]
    place = torch.arange(length)
    kinds = [
        torch.ones(length),
        torch.zeros(length),
        place == 0,
        place == length - 1,
        place < length // 2,
        (place < length // 4) | (place > length - 3),
    ]
    for row, kind in zip(range(rows), kinds, strict=False):
        mask[row] = kind.bool()
    return mask


def batch(tokens: int = 12, width: int = 4, vocabulary: int = 6, *, bias: bool = False) -> dict[str, Any]:
    """A batch in which ratios fall on both sides of the clip, advantages of both signs. Logits vary by 2."""
    hidden, weight = draw(tokens, width), draw(vocabulary, width, seed=1) * (2 / width**0.5)
    target = torch.randint(0, vocabulary, (tokens,), generator=torch.Generator().manual_seed(2))
    offset = {"bias": draw(vocabulary, seed=5)} if bias else {}
    logprob, _ = reference.linear_logprob(hidden, weight, target, **offset)
    return {
        "hidden": hidden,
        "weight": weight,
        "target": target,
        "old_logprob": logprob + 0.6 * draw(tokens, seed=3),
        "advantage": 2 * draw(tokens, seed=4),
        "loss_mask": torch.arange(tokens) % 4 != 2,
        **offset,
    }


NOISE = draw(12, seed=9)
SEQUENCE = torch.tensor([3, 3, 3, 3, 3, 0, 0, 0, 7, 7, 7, 7])
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "asymmetric clip": {"clip_low": 0.1, "clip_high": 0.4},
    "dual clip": {"dual_clip": 1.3},
    "k1": {"ref_logprob": NOISE - 1.5, "kl_coef": 0.3, "kl_estimator": "k1"},
    "k2": {"ref_logprob": NOISE - 1.5, "kl_coef": 0.3, "kl_estimator": "k2"},
    "k3": {"ref_logprob": NOISE - 1.5, "kl_coef": 0.3, "kl_estimator": "k3"},
    "kl only reported": {"ref_logprob": NOISE - 1.5},
    "entropy": {"entropy_coef": 0.2},
    "temperature": {"temperature": 0.7, "entropy_coef": 0.2},
    "soft cap": {"softcap": 1.5, "temperature": 0.7, "entropy_coef": 0.2},
    "temperature per token": {"temperature": NOISE.abs() + 0.5, "entropy_coef": 0.2},
    "stale sampler": {"rollout_logprob": batch()["old_logprob"] + NOISE, "rollout_is_cap": 1.5},
    "sum": {"aggregation": "sum"},
    "sum, normalised": {"aggregation": "sum", "normalizer": 32.0},
    "tokens, normalised": {"normalizer": 100},
    "sequences": {"aggregation": "sequence-mean", "sequence_ids": SEQUENCE},
    "sequences, normalised": {"aggregation": "sequence-mean", "sequence_ids": SEQUENCE, "normalizer": 8},
}
OPTIONS["everything"] = {
    **OPTIONS["k3"], **OPTIONS["dual clip"], **OPTIONS["asymmetric clip"], **OPTIONS["temperature per token"],
    **OPTIONS["stale sampler"], **OPTIONS["sequences, normalised"],
}  # fmt: skip

FORMS: dict[str, Callable[[Tensor], Tensor]] = {  # ways for a matrix to lie in memory
    "transposed": lambda x: x.T.contiguous().T,
    "sliced": lambda x: torch.cat([x, x], dim=1)[:, : x.shape[1]],
    "every second": lambda x: x.repeat_interleave(2, dim=1)[:, ::2],
    "one row": lambda x: x[:1].expand(len(x), -1),
    "one column": lambda x: x[:, :1].expand(-1, x.shape[1]),
}


def cast(given: dict[str, Any], dtype: torch.dtype, device: str = "cpu") -> dict[str, Any]:
    """The output layer in `dtype`, other floating point tensors in fp32 (fp64), all on `device`."""
    wide = torch.promote_types(dtype, torch.float32)

    def one(name: str, x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        return x.to(device, (dtype if name in LEAVES else wide) if x.is_floating_point() else None)

    return {name: one(name, x) for name, x in given.items()}


def logprob_of(given: dict[str, Any]) -> dict[str, Any]:
    """What linear_logprob takes of a batch."""
    return {name: x for name, x in given.items() if name in (*LEAVES, "target", "temperature", "softcap")}


def eager_logprob(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    temperature: float | Tensor = 1.0,
    bias: Tensor | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """As one writes it by hand, every step in the dtype of the inputs: the error that the dtype excuses."""
    logits = hidden @ weight.T if bias is None else torch.addmm(bias, hidden, weight.T)
    logits = logits if softcap is None else softcap * (logits / softcap).tanh()
    if isinstance(temperature, Tensor):
        temperature = temperature.to(logits).reshape(-1, 1)
    every = (logits / temperature).log_softmax(-1)
    entropy = -(every.exp() * every).sum(-1)
    wide = torch.promote_types(hidden.dtype, torch.float32)
    return every.gather(1, target.long()[:, None])[:, 0].to(wide), entropy.to(wide)


def eager_ppo_loss(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    old_logprob: Tensor,
    advantage: Tensor,
    loss_mask: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    **options: Any,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The logits of all rows by `eager_logprob`, the rest in fp32 (fp64)."""
    logprob, entropy = eager_logprob(hidden, weight, target, temperature, bias, softcap)
    mask, a = loss_mask.to(logprob), advantage
    tokens = max(int(loss_mask.sum()), 1)
    ratio = (logprob - old_logprob).clamp(-20, 20).exp()
    clipped = -a * ratio.clamp(1 - options.get("clip_low", 0.2), 1 + options.get("clip_high", 0.2))
    loss = torch.maximum(-a * ratio, clipped)
    if "dual_clip" in options:
        loss = torch.where(a < 0, loss.minimum(-a * options["dual_clip"]), loss)
    if "rollout_logprob" in options:
        stale = (old_logprob - options["rollout_logprob"]).clamp(-20, 20).exp()
        loss = loss * stale.clamp(max=options.get("rollout_is_cap", 2.0))
    loss = loss - options.get("entropy_coef", 0.0) * entropy
    means = {"entropy": entropy, "clip_fraction": (clipped > -a * ratio).to(a)}
    if "ref_logprob" in options:
        d = (logprob - options["ref_logprob"]).clamp(-20, 20)
        estimates = {"k1": d, "k2": d.square() / 2, "k3": torch.expm1(-d) + d}
        means["kl"] = estimates[options.get("kl_estimator", "k3")]
        loss = loss + options.get("kl_coef", 0.0) * means["kl"]
    if options.get("aggregation") == "sequence-mean":
        own = (options["sequence_ids"][:, None] == options["sequence_ids"]).to(mask) * mask
        default, loss = len(options["sequence_ids"][loss_mask].unique()) or 1, loss / own.sum(1).clamp(min=1)
    else:
        default = 1 if options.get("aggregation") == "sum" else tokens
    metrics = {name: (x.detach() * mask).sum() / tokens for name, x in means.items()}
    metrics["ratio_max"] = torch.cat([ratio.detach() * mask, mask.new_zeros(1)]).max()
    metrics["logprob"] = logprob.detach() * mask
    return (loss * mask).sum() / options.get("normalizer", default), metrics


def results(function: Any, given: dict[str, Any], **options: Any) -> dict[str, Tensor]:
    """Outputs by name, and the gradients: of the loss, or for random ones of log-prob and entropy."""
    leaves = {name: given[name].detach().requires_grad_() for name in LEAVES if name in given}
    first, second = function(**{**given, **leaves}, **options)
    if isinstance(second, Tensor):
        named, grads = {"logprob": first, "entropy": second}, gradients([first, second], [*leaves.values()])
    else:
        named, grads = {"loss": first, **second}, torch.autograd.grad(first, [*leaves.values()])
    return named | {f"d_{name}": x for name, x in zip(leaves, grads, strict=True)}


def check(function: Any, given: dict[str, Any], **options: Any) -> dict[str, Tensor]:
    """Outputs, metrics and gradients against the fp64 reference; returns what was checked."""
    plain, exact = {
        "linear_logprob": (eager_logprob, reference.linear_logprob),
        "fused_linear_ppo_loss": (eager_ppo_loss, reference.fused_linear_ppo_loss),
    }[function.__name__]
    got = results(function, given, **options)
    theirs, want = results(plain, given), results(exact, cast(given, torch.float64))
    assert got.keys() == theirs.keys() == want.keys()
    for name, x in got.items():
        atol = None
        # Differences of nearly equal numbers, however small they come out: the KL of two log-probs, and the
        # gradients of one or two tokens. And all that one token has for its own: a few units in the last
        # place of its log-sum-exp are in its loss and its gradients, by luck or not in eager code.
        if (name == "kl" and want[name].abs() < 1e-3) or (
            len(given["weight"]) <= 2 and x.dtype == torch.float32
        ):
            atol = 1e-7 + 2e-6 * want[name].abs().max().item() if x.numel() else 0.0
        elif given["target"].numel() == 1 and x.dtype == torch.float32:
            atol = 4e-5 * want[name].abs().max().item()
        assert_accurate(x, theirs[name], want[name], atol=atol, name=name)
    return got


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(x, b[name]) for name, x in a.items())
