"""Choosing a token: temperature, top-k, top-p, and the log-prob that a trainer recomputes."""

from __future__ import annotations

import torch
from torch import Tensor

from mem1.config import RolloutConfig


def sample(logits: Tensor, uniform: Tensor, forced: Tensor, config: RolloutConfig) -> tuple[Tensor, Tensor]:
    """Choose one token per row of fp32 `logits` [b, V] with the numbers `uniform` [b] in [0, 1).

    Where `forced` int64 [b] is not negative, that token is taken instead.

    Returns tokens int64 [b] and their log-probs fp32 [b]. A log-prob is that of the full distribution at the
    sampling temperature, `log_softmax(logits / temperature)`: what a trainer recomputes, whatever `top_k` and
    `top_p` cut away.
    """
    logprobs = (logits / config.temperature).log_softmax(-1)
    if config.greedy:
        tokens = logits.argmax(-1)
    else:
        # Inverse transform sampling: one number per row, so a row's tokens do not depend on who shares its
        # batch.
        cumulative = _truncated(logprobs, config).double().cumsum(-1)
        threshold = uniform.to(logits.device).double()[:, None] * cumulative[:, -1:]
        tokens = torch.searchsorted(cumulative, threshold, right=True)[:, 0].clamp_(max=logits.shape[-1] - 1)
    forced = forced.to(logits.device)
    tokens = torch.where(forced < 0, tokens, forced)
    return tokens, logprobs.gather(-1, tokens[:, None])[:, 0]


def _truncated(logprobs: Tensor, config: RolloutConfig) -> Tensor:
    """Probabilities [b, V] with those outside the top k, then outside the nucleus of mass `top_p`, set to
    0.
    """
    probs = logprobs.exp()
    if config.top_k == 0 and config.top_p == 1.0:
        return probs
    ranked, order = probs.sort(stable=True, dim=-1, descending=True)
    if config.top_k:
        ranked[:, config.top_k :] = 0
    before = ranked.cumsum(-1) - ranked
    inside = before < config.top_p * ranked.sum(-1, keepdim=True)
    inside[:, 0] = True  # however small the nucleus
    ranked = ranked.where(inside, 0.0)
    return torch.zeros_like(probs).scatter_(-1, order, ranked)
