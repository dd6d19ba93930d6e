"""What a layer makes of queries times keys, and attention over a dense mask for what SDPA does not have."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Scores(NamedTuple):
    """See `mem1_core.ops.trajectory_attention`."""

    scale: float
    window: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None


def dense_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scores: Scores, dropout: float = 0.0
) -> Tensor:
    """Soft caps and sinks in eager mode, the softmax in float32 (float64).

    query [B, Hq, N, D], key [B, Hkv, S, D], value [B, Hkv, S, Dv] -> [B, N, Hq, Dv]. mask [B or 1, 1, N, S]:
    bool, True where a query sees a key, or added to the scores; None: causal with N = S, or N = 1 sees all.
    The window is the mask's business.
    """
    new, length = query.shape[2], key.shape[2]
    grouped = query.unflatten(1, (key.shape[1], -1))
    wide = torch.promote_types(query.dtype, torch.float32)
    score = torch.einsum("bhgnd,bhsd->bhgns", grouped, key).to(wide) * scores.scale
    if scores.softcap is not None:
        score = scores.softcap * (score / scores.softcap).tanh()
    if mask is None and new > 1:
        mask = torch.ones(new, length, dtype=torch.bool, device=query.device).tril()[None, None]
    if mask is not None:
        mask = mask[:, :, None, :, :length]
        if mask.dtype == torch.bool:  # padding may see nothing, and must not become NaN
            score = score.masked_fill(~mask, torch.finfo(wide).min)
        else:
            score = score + mask
    if scores.sinks is not None:
        sinks = scores.sinks.to(wide).view(1, key.shape[1], -1, 1, 1)
        score = torch.cat([score, sinks.expand(*score.shape[:2], -1, new, -1)], dim=-1)
    weight = score.softmax(-1)[..., :length].to(value.dtype)
    weight = torch.nn.functional.dropout(weight, dropout) if dropout else weight
    return torch.einsum("bhgns,bhsd->bnhgd", weight, value).flatten(2, 3)
