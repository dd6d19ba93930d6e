"""Choosing a token: temperature, top-k, top-p, and the log-prob that a trainer recomputes."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mem1.config import RolloutConfig


class Sampled(NamedTuple):
    """What was chosen in each row."""

    tokens: Tensor  # int64 [b]
    logprobs: Tensor  # fp32 [b]
    rollout_logprobs: Tensor | None  # fp32 [b]; None: the same


def sample(logits: Tensor, uniform: Tensor, forced: Tensor, config: RolloutConfig) -> Sampled:
    """Choose one token per row of fp32 `logits` [b, V] with the numbers `uniform` [b] in [0, 1).

    Where `forced` int64 [b] is not negative, that token is taken instead.

    A log-prob is that of the full distribution at the sampling temperature,
    `log_softmax(logits / temperature)`: what a trainer recomputes, whatever `top_k` and `top_p` cut away. The
    rollout log-prob is that of the distribution which was drawn from, with what is left divided by its sum:
    0 if `greedy`, and that of the full distribution for a forced token.
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
    chosen = logprobs.gather(-1, tokens[:, None])[:, 0]
    if config.greedy:
        rollout = torch.zeros_like(chosen)
    elif _cuts(config):
        rollout = (chosen - cumulative[:, -1].log()).clamp(max=0).float()
    else:
        return Sampled(tokens, chosen, None)
    return Sampled(tokens, chosen, torch.where(forced < 0, rollout, chosen))


def _cuts(config: RolloutConfig) -> bool:
    return config.top_k > 0 or config.top_p < 1.0


def _truncated(logprobs: Tensor, config: RolloutConfig) -> Tensor:
    """Probabilities [b, V] with those outside the top k, then outside the nucleus of mass `top_p`, set to
    0.
    """
    probs = logprobs.exp()
    if not _cuts(config):
        return probs
    ranked, order = probs.sort(stable=True, dim=-1, descending=True)
    if config.top_k:
        ranked[:, config.top_k :] = 0
    before = ranked.cumsum(-1) - ranked
    inside = before < config.top_p * ranked.sum(-1, keepdim=True)
    inside[:, 0] = True  # however small the nucleus
    ranked = ranked.where(inside, 0.0)
    return torch.zeros_like(probs).scatter_(-1, order, ranked)
