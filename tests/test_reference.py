"""The specification of attention, cache pruning and advantages, against loops over tokens and PyTorch."""

from __future__ import annotations

import ast
import inspect
import math
from typing import Any, Literal

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mem1_core import reference
from mem1_core.mask import TrajectoryMask
from mem1_core.sample_inputs import EVICT_TABLES


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64, grad: bool = False) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_(grad)


def test_every_op_is_short_enough_to_be_read() -> None:
    for node in ast.parse(inspect.getsource(reference)).body:
        if isinstance(node, ast.FunctionDef):
            first = node.body[1] if ast.get_docstring(node) else node.body[0]
            assert (node.end_lineno or 0) - first.lineno + 1 < 30, node.name


# -------------------------------------------------------------------------------------------- attention


@pytest.mark.parametrize("table", EVICT_TABLES)
def test_attention_row_by_row(table: str) -> None:
    batch, tokens, heads, kv_heads, dim = 2, 17, 4, 2, 8
    mask = TrajectoryMask.from_evict(
        torch.stack([EVICT_TABLES[table](tokens, seed) for seed in range(batch)])
    )
    q, k, v = (draw(batch, tokens, h, dim, seed=i) for i, h in enumerate((heads, kv_heads, kv_heads)))
    out, lse = reference.trajectory_attention(q, k, v, mask, scale=0.3, return_lse=True)
    assert out.shape == q.shape and lse.shape == (batch, heads, tokens) and lse.dtype == torch.float64
    for b in range(batch):
        for i in range(tokens):
            keys = [j for j in range(tokens) if j <= i < mask.evict_at[b, j]]
            for h in range(heads):
                scores = 0.3 * k[b, keys, h // 2] @ q[b, i, h]
                torch.testing.assert_close(out[b, i, h], scores.softmax(0) @ v[b, keys, h // 2])
                torch.testing.assert_close(lse[b, h, i], scores.exp().sum().log())


def test_attention_against_torch_and_its_gradients() -> None:
    mask = TrajectoryMask.from_evict(EVICT_TABLES["random"](9, 0))
    q, k, v = (draw(1, 9, h, 4, seed=i, grad=True) for i, h in enumerate((4, 2, 2)))
    swapped = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    torch_out = F.scaled_dot_product_attention(*swapped, mask.dense()[:, None], enable_gqa=True)
    out = reference.trajectory_attention(q, k, v, mask)
    torch.testing.assert_close(out, torch_out.transpose(1, 2))

    def both(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return reference.trajectory_attention(q, k, v, mask, return_lse=True)

    assert torch.autograd.gradcheck(both, (q, k, v))


def test_attention_dtypes_and_empty_inputs() -> None:
    mask = TrajectoryMask.from_evict(EVICT_TABLES["causal"](5, 0))
    q = draw(1, 5, 2, 4, dtype=torch.bfloat16)
    out, lse = reference.trajectory_attention(q, q, q, mask, return_lse=True)
    assert out.dtype == torch.bfloat16 and lse.dtype == torch.float32
    for shape in ((1, 0), (0, 3)):
        empty = torch.zeros(*shape, 2, 4)
        none = TrajectoryMask.from_evict(torch.zeros(shape, dtype=torch.int32))
        out, lse = reference.trajectory_attention(empty, empty, empty, none, return_lse=True)
        assert out.shape == empty.shape and lse.shape == (shape[0], 2, shape[1])


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_evicted_poison_does_not_leak(poison: float) -> None:
    evict = EVICT_TABLES["causal"](8, 0)
    evict[2] = 5  # rows 2, 3 and 4 see key 2
    mask = TrajectoryMask.from_evict(evict)
    q, k, v = (draw(1, 8, 2, 4, seed=i) for i in range(3))
    clean = reference.trajectory_attention(q, k, v, mask, return_lse=True)
    k[0, 2], v[0, 2] = poison, poison
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    out, lse = reference.trajectory_attention(q, k, v, mask, return_lse=True)
    others = [0, 1, 5, 6, 7]
    assert torch.equal(out[:, others], clean[0][:, others]) and torch.equal(
        lse[..., others], clean[1][..., others]
    )
    assert out[:, 2:5].isnan().all()
    (grad,) = torch.autograd.grad(out[:, others].sum() + lse[..., others].sum(), q)
    assert grad[:, others].isfinite().all()


# --------------------------------------------------------------------------------------------- KV cache


def rope(keys: Tensor, positions: Tensor, inv_freq: Tensor) -> Tensor:
    """transformers' convention: x cos + rotate_half(x) sin; keys [.., S, H, D], positions [S]."""
    angle = (positions[:, None] * inv_freq).repeat(1, 2)[:, None]
    first, second = keys.chunk(2, -1)
    return keys * angle.cos() + torch.cat([-second, first], -1) * angle.sin()


@pytest.mark.parametrize("positions", ["keep", "compact"])
def test_prune_kv_cache(positions: reference.Positions) -> None:
    layers, batch, slots, heads, dim = 2, 3, 7, 2, 6
    inv_freq = 100.0 ** -(torch.arange(dim // 2) / (dim // 2)).double()
    plain = draw(layers, 2, batch, slots, heads, dim)
    kv = plain.clone()
    kv[:, 0] = rope(plain[:, 0], torch.arange(slots), inv_freq)
    before = kv.clone()
    keep = torch.rand(batch, slots, generator=torch.Generator().manual_seed(0)) < 0.5
    keep[1], keep[2] = True, False
    lengths = torch.tensor([6, 7, 4], dtype=torch.int32)
    expected = [[j for j in range(n) if keep[b, j]] for b, n in enumerate(lengths.tolist())]
    new = reference.prune_kv_cache_(kv, keep, lengths, positions=positions, inv_freq=inv_freq)
    assert new.dtype == torch.int32 and new.tolist() == [len(alive) for alive in expected] == [
        len(expected[0]),
        7,
        0,
    ]
    for b, alive in enumerate(expected):
        n = len(alive)
        torch.testing.assert_close(kv[:, 1, b, :n], before[:, 1, b, alive], rtol=0, atol=0)
        if positions == "keep":
            torch.testing.assert_close(kv[:, 0, b, :n], before[:, 0, b, alive], rtol=0, atol=0)
        else:
            torch.testing.assert_close(
                kv[:, 0, b, :n], rope(plain[:, 0, b, alive], torch.arange(n), inv_freq)
            )


def test_prune_kv_cache_needs_frequencies_to_rotate() -> None:
    with pytest.raises(ValueError, match="inv_freq: expected RoPE's frequencies"):
        reference.prune_kv_cache_(
            torch.zeros(1, 2, 1, 1, 1, 2), torch.ones(1, 1).bool(), torch.ones(1).int(), positions="compact"
        )


@pytest.mark.parametrize("positions", ["keep", "compact"])
def test_prune_paged_kv_cache_is_the_contiguous_one(positions: reference.Positions) -> None:
    page, pages, batch = 4, 11, 3
    kv = draw(2, 2, pages, page, 2, 6)
    inv_freq = torch.tensor([1.0, 0.3, 0.1], dtype=torch.float64)
    table = torch.tensor([[7, 2, 9], [0, 4, -1], [5, 10, 3]], dtype=torch.int32)
    lengths = torch.tensor([10, 8, 12])
    keep = torch.rand(batch, 12, generator=torch.Generator().manual_seed(3)) < 0.5
    keep[0, 4:8] = False  # page 2 dies as a whole
    keep[1] = False
    flat = kv[:, :, table.clamp(min=0).long()].flatten(3, 4)  # [2, 2, B, 12, H, D]
    wanted = reference.prune_kv_cache_(flat, keep, lengths, positions=positions, inv_freq=inv_freq)
    old_pages = set(table[table >= 0].tolist())
    new, page_lengths, freed = reference.prune_paged_kv_cache_(
        kv, keep, table, lengths, gaps="close", positions=positions, inv_freq=inv_freq
    )
    assert torch.equal(page_lengths.sum(1), new)
    assert new.tolist() == wanted.tolist() and new[1] == 0
    assert 2 not in table and (table[1] == -1).all()
    for b, n in enumerate(new.tolist()):
        used = math.ceil(n / page)
        assert (table[b, :used] >= 0).all() and (table[b, used:] == -1).all()
        got = kv[:, :, table[b, :used].long()].flatten(2, 3)[:, :, :n]
        torch.testing.assert_close(got, flat[:, :, b, :n], rtol=0, atol=0)
    assert set(freed.nonzero()[:, 0].tolist()) == old_pages - set(table[table >= 0].tolist())


@pytest.mark.parametrize("gaps", ["close", "leave"])
def test_dropping_whole_pages_moves_nothing_and_shared_pages_stay(gaps: Literal["close", "leave"]) -> None:
    kv = draw(1, 2, 6, 4, 1, 2)
    before = kv.clone()
    table = torch.tensor([[0, 1, 2], [0, 3, 4]])  # page 0 is a prompt that both share
    keep = torch.ones(2, 12, dtype=torch.bool)
    keep[:, 4:8] = False
    new, _, freed = reference.prune_paged_kv_cache_(kv, keep, table, torch.tensor([11, 12]), gaps=gaps)
    assert torch.equal(kv, before)
    assert table.tolist() == [[0, 2, -1], [0, 4, -1]] and new.tolist() == [7, 8]
    assert freed.tolist() == [False, True, False, True, False, False]


# ---------------------------------------------------------------------------------------- advantages, value


def test_gae_is_the_textbook_formula_over_the_policy_tokens() -> None:
    reward, value = draw(3, 11), draw(3, 11, seed=1)
    mask = torch.rand(3, 11, generator=torch.Generator().manual_seed(2)) < 0.6
    mask[2] = False
    reward[~mask], value[~mask] = math.nan, math.nan  # environment tokens and padding are not read
    advantage, returns = reference.gae(reward, value, mask, gamma=0.9, lam=0.8)
    for b in range(3):
        r, v = reward[b, mask[b]].tolist(), value[b, mask[b]].tolist()
        delta = [r[t] + 0.9 * (v[t + 1] if t + 1 < len(v) else 0.0) - v[t] for t in range(len(v))]
        expected = [sum((0.9 * 0.8) ** (s - t) * delta[s] for s in range(t, len(v))) for t in range(len(v))]
        assert advantage[b, mask[b]].tolist() == pytest.approx(expected)
        assert returns[b, mask[b]].tolist() == pytest.approx(
            [x + y for x, y in zip(expected, v, strict=True)]
        )
    assert (advantage[~mask] == 0).all() and (returns[~mask] == 0).all()


def test_gae_without_discount_is_what_is_still_to_come() -> None:
    reward = torch.tensor([[0.0, 0.0, 1.0, 0.0, 2.0]])
    advantage, returns = reference.gae(
        reward, torch.full((1, 5), 0.5), torch.tensor([[True, True, True, False, True]])
    )
    assert returns.tolist() == [[3.0, 3.0, 3.0, 0.0, 2.0]]
    assert advantage.tolist() == [[2.5, 2.5, 2.5, 0.0, 1.5]]
    empty, _ = reference.gae(torch.zeros(2, 0), torch.zeros(2, 0), torch.zeros(2, 0, dtype=torch.bool))
    assert empty.shape == (2, 0)


def test_masked_whiten() -> None:
    values, mask = draw(4, 6) * 3 + 2, torch.rand(4, 6, generator=torch.Generator().manual_seed(0)) < 0.5
    chosen = values[mask]
    values[~mask] = math.nan
    white = reference.masked_whiten(values, mask)
    torch.testing.assert_close(white[mask], (chosen - chosen.mean()) / chosen.std())
    assert (white[~mask] == 0).all()
    kept = reference.masked_whiten(values, mask, shift_mean=False)
    torch.testing.assert_close(kept[mask].mean(), chosen.mean())
    single = torch.zeros_like(mask)
    single[1, 1] = True
    assert (reference.masked_whiten(torch.ones(4, 6), single) == 0).all()
    assert (reference.masked_whiten(values, torch.zeros_like(mask)) == 0).all()


def test_clipped_value_loss() -> None:
    value, old, goal = draw(3, 5, grad=True), draw(3, 5, seed=1), draw(3, 5, seed=2)
    mask = torch.rand(3, 5, generator=torch.Generator().manual_seed(0)) < 0.7
    loss, share = reference.clipped_value_loss(value, old, goal, mask, clip=0.4)
    terms = []
    for v, o, g in zip(*(x[mask].tolist() for x in (value, old, goal)), strict=True):
        terms.append(((v - g) ** 2, (min(max(v, o - 0.4), o + 0.4) - g) ** 2))
    assert loss.item() == pytest.approx(sum(max(pair) for pair in terms) / 2 / len(terms))
    assert float(share) == pytest.approx(sum(cut > plain for plain, cut in terms) / len(terms)) and share > 0
    half, _ = reference.clipped_value_loss(value, old, goal, mask, clip=0.4, normalizer=2 * len(terms))
    torch.testing.assert_close(half, loss / 2)
    (grad,) = torch.autograd.grad(loss, value)
    assert (grad[~mask] == 0).all() and (grad[mask] != 0).any()
    nothing, _ = reference.clipped_value_loss(value, old, goal, torch.zeros_like(mask))
    assert nothing == 0
