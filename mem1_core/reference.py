"""Every op in plain PyTorch, each under 30 lines: the specification that the fast ones are tested against.

Nothing here is fast or sparing with memory. Inputs below fp64 are computed in fp32. Shapes, defaults and
meaning are those of `mem1_core.ops`; arguments are not checked.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from mem1_core.mask import TrajectoryMask

Positions = Literal["keep", "compact"]
KLEstimator = Literal["k1", "k2", "k3"]
Aggregation = Literal["token-mean", "sequence-mean", "sum"]

_LOG_RATIO_LIMIT = 20.0  # exp(20) = 5e8: past that a ratio carries no information, only overflow


def trajectory_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: TrajectoryMask,
    scale: float | None = None,
    return_lse: bool = False,
    sinks: Tensor | None = None,
    softcap: float | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention where query `i` sees key `j` iff `mask.dense()[i, j]`: `j <= i < evict[j]`, in a window.

    q [B, N, Hq, D], k [B, N, Hkv, D], v [B, N, Hkv, Dv] -> out [B, N, Hq, Dv] in q's dtype; query head `h`
    reads the key head `h // (Hq // Hkv)`. `scale` is `D ** -0.5` by default; `softcap`: scores become
    `softcap * tanh(score / softcap)`; `sinks` [Hq]: scores of one more key per head whose value is 0. With
    `return_lse` also the natural logarithm
    of each row's softmax denominator, fp32 (fp64 for fp64) [B, Hq, N]. A row that sees nothing has out 0
    and lse -inf; NaN or inf in a key makes NaN of the rows that see it, in a value of that channel of those
    rows; no others notice.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    visible = mask.dense()[:, None]  # [B, 1, N, N]
    query = _wide(q).transpose(1, 2)
    key, value = (_wide(x).repeat_interleave(q.shape[2] // k.shape[2], dim=2).transpose(1, 2) for x in (k, v))
    # 0 * NaN is NaN: what is not finite enters the products as 0 and is put back for those who see it.
    bad_key = visible & ~key.isfinite().all(-1)[:, :, None]
    bad_value = visible.to(value.dtype) @ (~value.isfinite()).to(value.dtype) > 0
    key, value = (x.nan_to_num(0.0, 0.0, 0.0) for x in (key, value))
    score = _capped(query @ key.mT * scale, softcap)
    score = score.masked_fill(~visible, -torch.inf).masked_fill(bad_key, torch.nan)
    if sinks is not None:
        sink = sinks.to(score.dtype)[None, :, None, None].expand(*score.shape[:3], 1)
        score = torch.cat([score, sink], dim=-1)
    prob = score.softmax(-1)[..., : visible.shape[-1]].masked_fill(~visible, 0.0)
    out = (prob @ value).masked_fill(bad_value, torch.nan).transpose(1, 2).to(q.dtype)
    return (out, score.logsumexp(-1)) if return_lse else out


def cached_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_batch_idx: Tensor,
    cache_seqlens: Tensor,
    query_lens: Tensor,
    scale: float,
    evict: Tensor | None = None,
    sinks: Tensor | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Row b of q [B, T, Hq, D] holds the last query_lens[b] of the cache_seqlens[b] tokens in slot
    cache_batch_idx[b] of k_cache and v_cache [slots, capacity, Hkv, D], padded on the left: query t sees the
    entries before `cache_seqlens - T + t + 1`, and of these, where there is an `evict` [B, entries], those
    with `cache_seqlens - T + t < evict`. Returns [B, T, Hq, D of the values], 0 for padding. cache_batch_idx,
    cache_seqlens, query_lens int [B]; `sinks` and `softcap` as in `trajectory_attention`.
    """
    out, group = q.new_zeros(*q.shape[:3], v_cache.shape[3]), q.shape[2] // k_cache.shape[2]
    for b, (row, length, count) in enumerate(
        zip(cache_batch_idx.tolist(), cache_seqlens.tolist(), query_lens.tolist(), strict=True)
    ):
        first = q.shape[1] - count
        key, value = (_wide(x[row, :length]).repeat_interleave(group, 1) for x in (k_cache, v_cache))
        score = torch.einsum("thd,shd->hts", _wide(q[b, first:]), key) * scale
        last = length - count + torch.arange(count, device=q.device)
        hidden = torch.arange(length, device=q.device) > last[:, None]
        if evict is not None:
            hidden |= evict[b, :length] <= last[:, None]
        score = _capped(score, softcap).masked_fill(hidden, -torch.inf)
        if sinks is not None:
            score = torch.cat([score, sinks.to(score.dtype)[:, None, None].expand(-1, count, 1)], dim=-1)
        prob = score.softmax(-1)[..., :length]
        # 0 * NaN is NaN: what is not finite is put back for those who see it.
        bad = torch.einsum("ts,shd->thd", (~hidden).to(value.dtype), (~value.isfinite()).to(value.dtype)) > 0
        product = torch.einsum("hts,shd->thd", prob, value.nan_to_num(0.0, 0.0, 0.0))
        out[b, first:] = product.masked_fill(bad, torch.nan).to(q.dtype)
    return out


def prune_kv_cache_(
    kv: Tensor,
    keep: Tensor,
    lengths: Tensor,
    *,
    positions: Positions = "keep",
    inv_freq: Tensor | None = None,
    base_keys: Tensor | None = None,
    base_positions: Tensor | None = None,
) -> Tensor:
    """Remove entries from a KV cache in place and close the gaps; returns the new lengths, [B] as `lengths`.

    kv [L, 2, B, S, Hkv, D] (layer, key or value, ...), keep bool [B, S], lengths int [B]: the entries in
    use, what `keep` says beyond them does not count. Survivors move to the front in their order; slots from
    the new length on hold whatever. `positions="keep"`: keys stay as they were encoded. `"compact"`: every
    entry was encoded at the position of its slot and is rotated to that of its new one, `inv_freq` [D / 2]
    being RoPE's angular frequencies (rotate-half); with `base_keys` [L, B, S, Hkv, D], encoded at
    `base_positions` [B, S], keys are made from these, which are pruned as well.
    """
    slots = torch.arange(kv.shape[3], device=kv.device)
    alive = keep & (slots < lengths[:, None])
    order = alive.to(torch.int8).argsort(dim=1, descending=True, stable=True)  # survivors first, in order
    moved = kv.gather(3, order[None, None, :, :, None, None].expand_as(kv))
    if positions == "compact":
        source, encoded = moved[:, 0], order
        if base_keys is not None and base_positions is not None:
            base_keys.copy_(base_keys.gather(2, order[None, :, :, None, None].expand_as(base_keys)))
            base_positions.copy_(base_positions.gather(1, order))
            source, encoded = base_keys, base_positions
        moved[:, 0] = _rotate(source, slots - encoded, inv_freq)
    kv.copy_(moved)
    return alive.sum(1).to(lengths.dtype)


def prune_paged_kv_cache_(
    kv: Tensor,
    keep: Tensor,
    block_table: Tensor,
    lengths: Tensor,
    *,
    gaps: Literal["close", "leave"],
    positions: Positions = "keep",
    inv_freq: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The same for a paged cache: pages without a survivor are dropped unmoved, what is left closes the gaps,
    across pages or (`gaps="leave"`) within each page.

    kv [L, 2, pages, page, Hkv, D]; block_table int [B, P]: the page of each `page` tokens of a sequence, -1
    unused; keep bool [B, P * page]; lengths int [B]. `kv` and `block_table` change in place. Returns the new
    lengths [B], the tokens of each page of the new table int32 [B, P], and freed bool [pages], the pages that
    no sequence uses any more. A page shared by several sequences must be kept whole, with all before it.
    """
    page = kv.shape[3]
    before, after = torch.zeros(2, kv.shape[2], dtype=torch.bool, device=kv.device)
    new_lengths, page_lengths = torch.zeros_like(lengths), torch.zeros_like(block_table, dtype=torch.int32)
    for b, length in enumerate(lengths.tolist()):
        table = block_table[b, : -(-length // page)].long()
        alive = keep[b, :length].nonzero()[:, 0]  # positions in the sequence
        left, counts = (alive // page).unique(return_counts=True)
        moved = kv[:, :, table[alive // page], alive % page]  # [L, 2, survivors, Hkv, D]
        target = torch.arange(len(alive), device=kv.device)
        if positions == "compact":
            moved[:, 0] = _rotate(moved[:, 0], target - alive, inv_freq)
        if gaps == "leave":  # from the rank in the sequence to the rank in the page
            shift = torch.arange(len(left), device=kv.device) * page - counts.cumsum(0) + counts
            target += shift.repeat_interleave(counts)
        used = table[left[: int(target[-1]) // page + 1 if len(target) else 0]]
        kv[:, :, used[target // page], target % page] = moved
        before[table], after[used] = True, True
        block_table[b] = -1
        block_table[b, : len(used)] = used.to(block_table.dtype)
        page_lengths[b, : len(used)] = (target // page).bincount(minlength=len(used)).to(torch.int32)
        new_lengths[b] = len(alive)
    return new_lengths, page_lengths, before & ~after


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    temperature: float | Tensor = 1.0,
    bias: Tensor | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-probability of `target` and entropy under `softmax((hidden @ weight.T + bias) / temperature)`, with
    a soft cap `softcap * tanh(.. / softcap)` of the sum.

    hidden [T, H], weight [V, H], bias [V], target int [T], temperature a number or [T] -> logprob and entropy
    [T], fp32 (fp64). A row of nothing but -inf has logprob -inf and entropy 0.
    """
    temperatures = _wide(temperature).reshape(-1, 1) if isinstance(temperature, Tensor) else temperature
    logits = _wide(hidden) @ _wide(weight).T
    logits = logits if bias is None else logits + _wide(bias)
    logits = _capped(logits, softcap) / temperatures
    dead = (logits == -torch.inf).all(-1)
    every = logits.masked_fill(dead[:, None], 0.0).log_softmax(-1)
    prob = every.exp()
    entropy = -(prob * every.masked_fill(prob == 0, 0.0)).sum(-1)
    logprob = every.gather(1, target.long()[:, None])[:, 0]
    return logprob.masked_fill(dead, -torch.inf), entropy.masked_fill(dead, 0.0)


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
) -> tuple[Tensor, dict[str, Tensor]]:
    """PPO's policy loss over the rows of `loss_mask`, from the last hidden states; returns (loss, metrics).

    hidden [T, H], weight [V, H], bias [V], target int [T], loss_mask bool [T], old_logprob and advantage
    [T]. Differentiable in hidden, weight and bias. With r = exp(logprob - old_logprob), A the token's
    advantage, the loss of a token is
    ```
    max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high))      Schulman et al. 2017 (PPO)
        for A < 0 at most -A dual_clip                      Ye et al. 2020 (dual clip; usually 3)
        times min(exp(old_logprob - rollout_logprob), rollout_is_cap)   truncated weight of a stale sampler
    + kl_coef KL(policy | ref_logprob) - entropy_coef entropy        see `kl_estimate`
    ```
    Log-ratios are clamped to +-20. NaN in any of a token's numbers makes its loss and its gradient NaN.
    Log-probs and entropy are those of `linear_logprob`.

    The losses' sum is divided by `normalizer`: by default the number of tokens ("token-mean"), of sequences
    ("sequence-mean": each first averaged over its own tokens; `sequence_ids` int [T] says which token is
    whose), or 1 ("sum"). Give the whole batch's when it is split over micro-batches or devices: the parts add
    up.

    metrics, all detached: over the tokens of this call the means `entropy`, `clip_fraction` (the clipped
    term was the larger) and, with ref_logprob, `kl`; `ratio_max`; `logprob` [T], 0 where not in the loss.
    No tokens: loss 0, metrics 0.
    """
    rows = loss_mask.nonzero()[:, 0]  # the others never reach the matrix product
    if isinstance(temperature, Tensor):
        temperature = temperature.expand(target.shape)[rows]
    logprob, entropy = linear_logprob(hidden[rows], weight, target[rows], temperature, bias, softcap)
    old, adv = (x.detach()[rows].to(logprob.dtype) for x in (old_logprob, advantage))
    ratio = _ratio(logprob, old)
    plain, clipped = -adv * ratio, -adv * ratio.clamp(1 - clip_low, 1 + clip_high)
    policy = torch.maximum(plain, clipped)
    if dual_clip is not None:
        policy = torch.where(adv < 0, policy.minimum(-adv * dual_clip), policy)
    if rollout_logprob is not None:
        policy = policy * _ratio(old, rollout_logprob.detach()[rows].to(old.dtype)).clamp(max=rollout_is_cap)
    per_token = policy - entropy_coef * entropy
    tracked = {"entropy": entropy, "clip_fraction": (clipped > plain).to(ratio.dtype)}
    if ref_logprob is not None:
        tracked["kl"] = kl_estimate(logprob, ref_logprob.detach()[rows].to(old.dtype), kl_estimator)
        per_token = per_token + kl_coef * tracked["kl"]
    elif kl_coef:
        raise ValueError(f"ref_logprob: expected a tensor for kl_coef = {kl_coef}, got None")
    nan = per_token.isnan()  # has a gradient of NaN, though that of a clamp is 0
    per_token = torch.where(nan, logprob * torch.where(nan, per_token.detach(), 1.0), per_token)
    divisor = _divisor(
        None if sequence_ids is None else sequence_ids[rows], len(rows), aggregation, normalizer
    )
    metrics = {name: value.detach().sum() / max(len(rows), 1) for name, value in tracked.items()}
    metrics["ratio_max"] = torch.cat([ratio.detach(), ratio.new_zeros(1)]).amax()
    metrics["logprob"] = logprob.new_zeros(target.shape).index_copy(0, rows, logprob.detach())
    return (per_token / divisor).sum(), metrics


def kl_estimate(logprob: Tensor, ref_logprob: Tensor, estimator: KLEstimator = "k3") -> Tensor:
    """Per-token estimate of KL(policy | reference) from the policy's samples (Schulman 2020).

    With d = logprob - ref_logprob, clamped to +-20: k1 = d, k2 = d^2 / 2, k3 = exp(-d) - 1 + d.
    """
    d = (logprob - ref_logprob).clamp(-_LOG_RATIO_LIMIT, _LOG_RATIO_LIMIT)
    if estimator == "k1":
        return d
    if estimator == "k2":
        return d.square() / 2
    if estimator == "k3":
        return torch.expm1(-d) + d
    raise ValueError(f"kl_estimator: expected 'k1', 'k2' or 'k3', got {estimator!r}")


def gae(
    reward: Tensor, value: Tensor, mask: Tensor, gamma: float = 1.0, lam: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation over the policy's tokens; returns (advantage, returns), fp32 (fp64).

    All [B, T]; mask bool, True for the policy's tokens. Environment tokens are not steps: the value and the
    advantage of the next policy token are carried across them, their reward and value are not read (so a
    reward belongs on the last policy token before it), and both results are 0 there. Schulman et al. 2016,
    over the policy tokens t = 0, 1, ...: `delta_t = reward_t + gamma value_{t+1} - value_t`, `advantage_t =
    delta_t + gamma lam advantage_{t+1}`, `returns = advantage + value`.
    """
    dtype = torch.promote_types(_wide(reward).dtype, _wide(value).dtype)
    reward, value = reward.detach().to(dtype), value.detach().to(dtype)
    advantage = torch.zeros_like(value)
    next_value, carried = torch.zeros(2, value.shape[0], dtype=value.dtype, device=value.device)
    for t in reversed(range(value.shape[1])):
        delta = reward[:, t] + gamma * next_value - value[:, t]
        carried = torch.where(mask[:, t], delta + gamma * lam * carried, carried)
        next_value = torch.where(mask[:, t], value[:, t], next_value)
        advantage[:, t] = torch.where(mask[:, t], carried, 0.0)
    return advantage, torch.where(mask, advantage + value, 0.0)


def masked_whiten(values: Tensor, mask: Tensor, *, shift_mean: bool = True, eps: float = 1e-8) -> Tensor:
    """`values` brought to mean 0 (unless not `shift_mean`) and variance 1 over `mask`; 0 elsewhere.

    Values that are all the same have variance 0: sums are of differences from one of them, which are exact.
    """
    chosen = _wide(values)[mask]
    origin = chosen.detach()[:1].sum()
    chosen = chosen - origin
    mean = chosen.sum() / max(chosen.numel(), 1)
    variance = (chosen - mean).square().sum() / max(chosen.numel() - 1, 1)
    chosen = (chosen - mean) * (variance + eps).rsqrt() + (0.0 if shift_mean else origin + mean)
    return torch.zeros_like(_wide(values)).masked_scatter(mask, chosen)


def clipped_value_loss(
    value: Tensor,
    old_value: Tensor,
    returns: Tensor,
    mask: Tensor,
    clip: float = 0.5,
    normalizer: float | Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """PPO's value loss `max((value - returns)^2, (clip(value, old_value +- clip) - returns)^2) / 2`.

    All of one shape; the sum over `mask` is divided by `normalizer`, by default the number of its tokens.
    Returns the loss and the fraction of the tokens where the clipped term was the larger.
    """
    value, old, goal = (_wide(x)[mask] for x in (value, old_value.detach(), returns.detach()))
    plain, clipped = (value - goal).square(), (value.clamp(old - clip, old + clip) - goal).square()
    count = max(value.numel(), 1)
    loss = torch.maximum(plain, clipped).sum() / 2 / (count if normalizer is None else normalizer)
    return loss, (clipped > plain).sum() / count


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _capped(scores: Tensor, softcap: float | None) -> Tensor:
    return scores if softcap is None else softcap * (scores / softcap).tanh()


def _ratio(logprob: Tensor, old: Tensor) -> Tensor:
    return (logprob - old).clamp(-_LOG_RATIO_LIMIT, _LOG_RATIO_LIMIT).exp()


def _rotate(key: Tensor, delta: Tensor, inv_freq: Tensor | None) -> Tensor:
    """Turn RoPE-encoded keys [.., S, Hkv, D] by `delta` [.., S] positions more; rotate-half convention."""
    if inv_freq is None:
        raise ValueError("inv_freq: expected RoPE's frequencies [D / 2] for positions='compact', got None")
    angle = delta[..., None, None] * inv_freq.to(_wide(key).dtype)
    first, second = _wide(key).chunk(2, dim=-1)
    rotated = (first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin())
    return torch.cat(rotated, dim=-1).to(key.dtype)


def _divisor(
    sequence_ids: Tensor | None, tokens: int, aggregation: Aggregation, normalizer: float | Tensor | None
) -> float | Tensor:
    """What the loss of each token is divided by before the sum: [tokens], or one number for all."""
    if aggregation == "sequence-mean":
        if sequence_ids is None:
            raise ValueError(f"sequence_ids: expected a tensor for aggregation={aggregation!r}, got None")
        _, owner, sizes = sequence_ids.unique(return_inverse=True, return_counts=True)
        return sizes[owner] * (max(len(sizes), 1) if normalizer is None else normalizer)
    if aggregation not in ("token-mean", "sum"):
        raise ValueError(f"aggregation: expected 'token-mean', 'sequence-mean' or 'sum', got {aggregation!r}")
    count = tokens if aggregation == "token-mean" else 1
    return max(count, 1) if normalizer is None else normalizer
