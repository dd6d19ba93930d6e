"""Choosing a token: temperature, top-k, top-p, and the log-prob that a trainer recomputes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mem1.config import RolloutConfig

_BYTES = 20  # of temporaries for each logit: scaled, weights, cumulative weights, a mask and their copies
_MAX_BYTES = 32 * 2**20
# On the CPU a row for each thread, or some small ones: more leave the caches and take up to twice as long.
_CPU_BYTES = 2 * 2**20
_LIKELIEST = 1024  # tokens among which a nucleus almost always ends


class Sampled(NamedTuple):
    """What was chosen in each row."""

    tokens: Tensor  # int64 [b]
    logprobs: Tensor  # fp32 [b]
    rollout_logprobs: Tensor | None  # fp32 [b]; None: the same


def sample(logits: Tensor, uniform: Tensor, forced: Tensor, config: RolloutConfig) -> Sampled:
    """Choose one token per row of fp32 `logits` [b, V] with the numbers `uniform` [b] in [0, 1), best as
    float64.

    Where `forced` int64 [b] is not negative, that token is taken instead. What becomes of a row follows from
    its own logits and number, bit for bit, whoever shares its batch. Temporaries take up to 32 MiB, or what
    one row does.

    A log-prob is that of the full distribution at the sampling temperature,
    `log_softmax(logits / temperature)`: what a trainer recomputes, whatever `top_k` and `top_p` cut away. The
    rollout log-prob is that of the distribution which was drawn from, with what is left divided by its sum:
    0 if `greedy`, and that of the full distribution for a forced token. Tokens as likely as the last one that
    is left are left, too.
    """
    rows = rows_at_once(logits.shape[1], logits.device)
    parts = zip(
        logits.split(rows),
        uniform.to(logits.device, torch.float64).split(rows),
        forced.to(logits.device).split(rows),
        strict=True,
    )
    return joined([_sample(*part, config) for part in parts])


def rows_at_once(vocabulary: int, device: torch.device) -> int:
    """Rows of logits whose temporaries exist side by side."""
    most = _MAX_BYTES // (_BYTES * vocabulary)
    if device.type == "cpu":
        most = min(most, max(torch.get_num_threads(), _CPU_BYTES // (_BYTES * vocabulary)))
    return max(1, most)


def temporary_bytes(rows: int, vocabulary: int, device: torch.device) -> int:
    """What `sample` allocates at most for that many rows."""
    return min(rows, rows_at_once(vocabulary, device)) * vocabulary * _BYTES


def joined(parts: Sequence[Sampled]) -> Sampled:
    """Rows one after another."""
    if len(parts) == 1:
        return parts[0]
    tokens, logprobs, rollout = zip(*parts, strict=True)
    return Sampled(torch.cat(tokens), torch.cat(logprobs), None if rollout[0] is None else torch.cat(rollout))


def _sample(logits: Tensor, uniform: Tensor, forced: Tensor, config: RolloutConfig) -> Sampled:
    scaled = logits / config.temperature
    largest = scaled.amax(-1, keepdim=True)
    weights = (scaled - largest).exp_()
    cumulative = _cumulative(weights)
    total = left = cumulative[:, -1:]
    if config.greedy:
        tokens = logits.argmax(-1)
    else:
        if _cuts(config):
            weights.masked_fill_(weights < _least(weights, total, config), 0)
            cumulative = _cumulative(weights)
            left = cumulative[:, -1:]
        # Inverse transform sampling: one number per row, so a row's tokens do not depend on who shares its
        # batch. Rounding must not lead past the last token that has a weight.
        place = torch.minimum(uniform[:, None] * left, left.nextafter(torch.zeros_like(left)))
        tokens = torch.searchsorted(cumulative, place, right=True)[:, 0].clamp_(max=logits.shape[1] - 1)
    tokens = torch.where(forced < 0, tokens, forced)
    above = (scaled.gather(-1, tokens[:, None]) - largest).double()
    full = (above - total.log())[:, 0].float()
    if config.greedy:
        drawn = torch.zeros_like(full)
    elif _cuts(config):
        drawn = (above - left.log())[:, 0].clamp(max=0).float()
    else:
        return Sampled(tokens, full, None)
    return Sampled(tokens, full, torch.where(forced < 0, drawn, full))


def _cumulative(weights: Tensor) -> Tensor:
    """Sums in float64 up to each place. (`cumsum(dtype=...)` takes five times as long on the CPU.)"""
    return weights.double().cumsum_(-1)


def _cuts(config: RolloutConfig) -> bool:
    return config.top_k > 0 or config.top_p < 1.0


def _least(weights: Tensor, total: Tensor, config: RolloutConfig, count: int = _LIKELIEST) -> Tensor:
    """The least weight [b, 1] of the top k, then of the nucleus of mass `top_p` within them.

    weights: fp32 [b, V]; total: their sums [b, 1]. A nucleus is looked for among the `count` likeliest
    tokens, and among all where it does not end there: one row of 151,936 takes 1 ms, and 40 to sort.
    """
    ranked = weights.topk(min(config.top_k or count, weights.shape[1])).values
    if config.top_p == 1.0:
        return ranked[:, -1:]
    sums = _cumulative(ranked)
    mass = sums[:, -1:] if config.top_k else total
    inside = sums - ranked < config.top_p * mass
    # At least one token, however small the nucleus.
    least = ranked.gather(-1, inside.sum(-1, keepdim=True).clamp_(min=1) - 1)
    if not config.top_k and ranked.shape[1] < weights.shape[1]:
        wider = inside[:, -1].nonzero()[:, 0]
        if len(wider):
            least[wider] = _least(weights[wider], total[wider], config, weights.shape[1])
    return least
