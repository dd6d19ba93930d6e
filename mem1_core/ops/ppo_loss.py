"""fused_linear_ppo_loss: PPO's policy loss from hidden states, whose gradients are made in the forward."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mem1_core import _library, reference
from mem1_core._head import ChunkedLMHead, check_head, check_normalizer, check_rows, check_targets
from mem1_core.backend import check_softcap, check_whole, choose_backend
from mem1_core.ops.logprob import AVAILABLE, fake_gradients, last_backward, no_second_derivative, workspace
from mem1_core.reference import Aggregation, KLEstimator

WORKSPACE_BYTES = {"cpu": 192 * 2**20, "cuda": 512 * 2**20}


def fused_linear_ppo_loss(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    old_logprob: Tensor,
    advantage: Tensor,
    loss_mask: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    ref_logprob: Tensor | None = None,
    rollout_logprob: Tensor | None = None,
    sequence_ids: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    rollout_is_cap: float = 2.0,
    kl_coef: float = 0.0,
    kl_estimator: KLEstimator = "k3",
    entropy_coef: float = 0.0,
    aggregation: Aggregation = "token-mean",
    normalizer: float | Tensor | None = None,
    workspace_bytes: int | None = None,
    backend: str = "auto",
) -> tuple[Tensor, dict[str, Tensor]]:
    r"""PPO's policy loss over the rows of `loss_mask`. Differentiable in hidden, weight and bias.

    With the log-prob of `target` and the entropy H of `linear_logprob`, :math:`r = \exp(\text{logprob} -
    \text{old\_logprob})`, A the token's advantage and d = logprob - ref_logprob:

    .. math:: \ell = w \max(-A r, -A \operatorname{clip}(r, 1 - c_l, 1 + c_h))
              + \beta\, \mathrm{kl}(d) - \eta H

    (Schulman et al. 2017, arXiv 1707.06347), where for A < 0 the maximum is at most -A `dual_clip` (Ye et al.
    2020, arXiv 1912.09729), w = min(exp(old_logprob - rollout_logprob), `rollout_is_cap`), and kl is d, d^2 /
    2 or exp(-d) - 1 + d (k1, k2, k3: Schulman 2020). Every log-ratio is clamped to +-20.

    Once the log-sum-exp of a row is known, its gradient needs nothing else: it replaces the logits of a
    chunk, and the backward only scales what the forward has summed up. That is 6 T H V FLOPs, where
    recomputation takes 8, and no [T, V] tensor. Rows outside of `loss_mask` are not computed.

    Args:
        hidden, weight, target, temperature, bias, softcap, workspace_bytes, backend: as for `linear_logprob`.
            The weight's gradient is summed up in float32 and, for half precision, narrowed where it lies: its
            storage stays twice its size. (Not on the CPU, if the logits of all rows fit the workspace: 192
            MiB when None, 512 MiB on CUDA.)
        old_logprob: floating point [T]: log-probs of the policy before the update.
        advantage: floating point [T], one for each token.
        loss_mask: bool [T].
        ref_logprob: floating point [T]; expected for `kl_coef`, without it a metric.
        rollout_logprob: floating point [T]: log-probs that a stale sampler drew with.
        sequence_ids: integers [T]: which sequence a token belongs to; expected for "sequence-mean".
        clip_low, clip_high: 0 <= clip_low <= 1, clip_high >= 0.
        dual_clip: a number > 1 (usually 3), or None.
        rollout_is_cap: > 0.
        kl_coef, entropy_coef: weights of the two terms.
        kl_estimator: "k1", "k2" or "k3".
        aggregation: what the sum of the losses is divided by: "token-mean" the tokens, "sequence-mean" the
            sequences (each first averaged over its own tokens), "sum" 1.
        normalizer: a number or a tensor [] in the place of these counts. Give the whole batch's where it is
            split over micro-batches or devices: the parts then add up. (A loss scaler for float16 belongs
            here too, as its reciprocal: the gradients are made before the backward.)

    Returns:
        The loss, float32 (float64 for float64) [], and the metrics, all detached: means over the tokens
        `entropy`, `clip_fraction` (the clipped term was the larger) and, with ref_logprob, `kl`; `ratio_max`,
        the largest r; `logprob` [T], 0 where not in the loss. No tokens: loss 0, metrics 0. The loss of a row
        does not depend on the others; nothing is atomic.

    Raises:
        TypeError, ValueError: an argument that is not as above; the message names it.
        NotImplementedError: no such backend for this device; a second derivative.

    Equivalent to:
        >>> logprob, entropy = linear_logprob(hidden[loss_mask], weight, target[loss_mask], temperature)
        >>> r = (logprob - old_logprob[loss_mask]).clamp(-20, 20).exp()
        >>> a, d = advantage[loss_mask], logprob - ref_logprob[loss_mask]
        >>> loss = torch.maximum(-a * r, -a * r.clamp(1 - clip_low, 1 + clip_high))
        >>> loss = (loss + kl_coef * (torch.expm1(-d) + d) - entropy_coef * entropy).sum() / loss_mask.sum()
    """
    check_whole(
        hidden=hidden,
        weight=weight,
        bias=bias,
        target=target,
        temperature=temperature,
        old_logprob=old_logprob,
        advantage=advantage,
        loss_mask=loss_mask,
        ref_logprob=ref_logprob,
        rollout_logprob=rollout_logprob,
        sequence_ids=sequence_ids,
        normalizer=normalizer,
    )
    temperatures, cap = check_head(hidden, weight, bias, target, temperature), check_softcap(softcap)
    check_rows("old_logprob", old_logprob, hidden)
    check_rows("advantage", advantage, hidden)
    check_rows("loss_mask", loss_mask, hidden, "a bool")
    for name, x in (("ref_logprob", ref_logprob), ("rollout_logprob", rollout_logprob)):
        if x is not None:
            check_rows(name, x, hidden)
    settings = _Settings(clip_low, clip_high, dual_clip, rollout_is_cap, kl_coef, kl_estimator, entropy_coef)
    settings.check()
    if kl_coef and ref_logprob is None:
        raise ValueError(f"ref_logprob: expected a tensor for kl_coef = {kl_coef}, got None")
    _check_aggregation(hidden, aggregation, sequence_ids, normalizer)
    chosen = choose_backend("fused_linear_ppo_loss", hidden, backend, AVAILABLE)
    if chosen == "reference":
        return reference.fused_linear_ppo_loss(
            hidden,
            weight,
            target,
            old_logprob,
            advantage,
            loss_mask,
            bias=bias,
            softcap=softcap,
            ref_logprob=ref_logprob,
            rollout_logprob=rollout_logprob,
            sequence_ids=sequence_ids,
            temperature=temperatures,
            aggregation=aggregation,
            normalizer=normalizer,
            **settings._asdict(),
        )
    if normalizer is not None and not isinstance(normalizer, Tensor):
        normalizer = temperatures.new_full((), normalizer)
    with_grad = torch.is_grad_enabled()
    loss, means, logprob, *_ = _library.ops.fused_linear_ppo_loss(
        hidden,
        weight,
        bias,
        target.long(),
        old_logprob,
        advantage,
        loss_mask,
        ref_logprob,
        rollout_logprob,
        sequence_ids,
        temperatures,
        normalizer,
        *settings,
        aggregation,
        cap,
        workspace(workspace_bytes, WORKSPACE_BYTES[hidden.device.type]),
        [x is not None and with_grad and x.requires_grad for x in (hidden, weight, bias)],
    )
    entropy, ratio_max, clip_fraction, kl = means.unbind()
    metrics = {"entropy": entropy, "clip_fraction": clip_fraction, "ratio_max": ratio_max, "logprob": logprob}
    return loss, metrics if ref_logprob is None else metrics | {"kl": kl}


class _Settings(NamedTuple):
    """The scalars of the loss, in the order in which the ops take them."""

    clip_low: float
    clip_high: float
    dual_clip: float | None
    rollout_is_cap: float
    kl_coef: float
    kl_estimator: str
    entropy_coef: float

    def check(self) -> None:
        def finite(x: float) -> bool:  # math.isfinite breaks the graph of torch.compile
            return -math.inf < x < math.inf

        numbers: tuple[tuple[str, Callable[[float], bool], str], ...] = (
            ("clip_low", lambda x: 0 <= x <= 1, "0 to 1"),
            ("clip_high", lambda x: x >= 0, "a number >= 0"),
            ("dual_clip", lambda x: x > 1, "a number > 1 or None"),
            ("rollout_is_cap", lambda x: x > 0, "a number > 0"),
            ("kl_coef", finite, "a finite number"),
            ("entropy_coef", finite, "a finite number"),
        )
        for name, holds, expected in numbers:
            x = getattr(self, name)
            if name == "dual_clip" and x is None:
                continue
            if not isinstance(x, (int, float)) or not holds(x):
                raise ValueError(f"{name}: expected {expected}, got {x!r}")
        if self.kl_estimator not in ("k1", "k2", "k3"):
            raise ValueError(f"kl_estimator: expected 'k1', 'k2' or 'k3', got {self.kl_estimator!r}")


def _check_aggregation(
    hidden: Tensor, aggregation: str, sequence_ids: Tensor | None, normalizer: float | Tensor | None
) -> None:
    if aggregation not in ("token-mean", "sequence-mean", "sum"):
        raise ValueError(f"aggregation: expected 'token-mean', 'sequence-mean' or 'sum', got {aggregation!r}")
    if sequence_ids is not None:
        check_rows("sequence_ids", sequence_ids, hidden, "an integer")
    elif aggregation == "sequence-mean":
        raise ValueError(f"sequence_ids: expected a tensor for aggregation={aggregation!r}, got None")
    check_normalizer(normalizer, hidden.device)


torch.library.define(
    "mem1_core::fused_linear_ppo_loss",
    "(Tensor hidden, Tensor weight, Tensor? bias, Tensor target, Tensor old_logprob, Tensor advantage, "
    "Tensor loss_mask, Tensor? ref_logprob, Tensor? rollout_logprob, Tensor? sequence_ids, "
    "Tensor temperature, Tensor? normalizer, float clip_low, float clip_high, float? dual_clip, "
    "float rollout_is_cap, float kl_coef, str kl_estimator, float entropy_coef, str aggregation, "
    "float softcap, int workspace_bytes, bool[] needs_grad) -> "
    "(Tensor loss, Tensor means, Tensor logprob, Tensor d_hidden, Tensor d_weight, Tensor d_bias)",
)


@torch.library.impl("mem1_core::fused_linear_ppo_loss", ("cpu", "cuda"))
def _(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    old_logprob: Tensor,
    advantage: Tensor,
    loss_mask: Tensor,
    ref_logprob: Tensor | None,
    rollout_logprob: Tensor | None,
    sequence_ids: Tensor | None,
    temperature: Tensor,
    normalizer: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, ...]:
    *settings, aggregation, softcap, space, needs_grad = rest
    rows = loss_mask.nonzero()[:, 0]  # where the host learns how many there are
    check_targets(target, weight.shape[0], rows)
    chosen = None if len(rows) == len(hidden) else rows
    wanted = needs_grad[0], needs_grad[1], needs_grad[2]
    head = ChunkedLMHead(hidden, weight, bias, chosen, space, wanted, softcap=softcap)
    dtype = temperature.dtype
    scale = 1 / _divisor(sequence_ids, rows, aggregation, normalizer, dtype)
    of_rows = [
        None if x is None else x[rows].to(dtype)
        for x in (old_logprob, advantage, ref_logprob, rollout_logprob)
    ]
    old, adv, ref, rollout = of_rows
    target, temperature = target[rows], temperature[rows]
    stats = temperature.new_empty(6, head.count)
    for part in head.chunks():
        logits = head.logits(part)
        tensors = (
            None if x is None else x[part] for x in (target, temperature, old, adv, scale, ref, rollout)
        )
        given = logits, head.rows_bias, *tensors, *settings, any(needs_grad), head.gradient_dtype, softcap
        stats[:, part] = _library.on_current_stream(_library.ops._rows_ppo_, hidden.device, *given)
        if any(needs_grad):
            head.add_gradient(part, logits)
    loss, logprob, entropy, ratio, clipped, kl = stats
    mean = 1 / max(head.count, 1)
    largest = ratio.amax() if head.count else ratio.sum()
    means = torch.stack([entropy.sum() * mean, largest, clipped.sum() * mean, kl.sum() * mean])
    everywhere = logprob.new_zeros(len(hidden)).index_copy(0, rows, logprob)
    return loss.sum(), means, everywhere, *head.gradients()


def _divisor(
    sequence_ids: Tensor | None, rows: Tensor, aggregation: str, normalizer: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """What the loss of each row is divided by before the sum, [n]."""
    divisor = torch.ones(len(rows), dtype=dtype, device=rows.device)
    count = len(rows) if aggregation == "token-mean" else 1
    if sequence_ids is not None and aggregation == "sequence-mean":
        _, owner, sizes = sequence_ids[rows].unique(return_inverse=True, return_counts=True)
        divisor, count = sizes[owner].to(dtype), len(sizes)
    return divisor * (count if normalizer is None else normalizer)


@torch.library.register_fake("mem1_core::fused_linear_ppo_loss")
def _(hidden: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    temperature, needs_grad = rest[7], rest[-1]
    loss, means, logprob = (temperature.new_empty(shape) for shape in ((), (4,), (len(hidden),)))
    return loss, means, logprob, *fake_gradients((hidden, weight, bias), needs_grad)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.needs_grad, ctx.inputs = inputs[-1], len(inputs)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*output[3:])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, d_loss: Tensor | None, *unused: Tensor | None) -> tuple[Tensor | None, ...]:
    nothing: tuple[Tensor | None, ...] = (None,) * ctx.inputs
    if d_loss is None:
        return nothing
    if torch.is_grad_enabled():
        no_second_derivative("fused_linear_ppo_loss", ctx)
    made = zip(ctx.saved_tensors, ctx.needs_grad, strict=True)
    return *(_times(x, d_loss) if want else None for x, want in made), *nothing[3:]


def _times(gradient: Tensor, factor: Tensor) -> Tensor:
    """The product, in place where nobody else will want the gradient that the forward has made."""
    if not last_backward(factor):
        return gradient * factor
    if factor.device.type == "cpu" and factor == 1:
        return gradient
    return gradient.mul_(factor)


torch.library.register_autograd("mem1_core::fused_linear_ppo_loss", _backward, setup_context=_setup)
