"""The slot cache by itself, and the call of flash-attn against what that function is documented to do."""

from __future__ import annotations

import mmap
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from mem1.engine import slot_attention, slots
from mem1.engine.slot_attention import AttentionMetadata, Step, find_flash_attention
from mem1.engine.slots import Slots
from mem1_core.integrations.scores import Scores


def filled(lengths: list[int], capacity: int = 24, windows: bool = False) -> Slots:
    cache = Slots(2, len(lengths), 2, 8, torch.float32, torch.device("cpu"), keep_positions=windows)
    cache.reserve(capacity)
    if windows:  # with gaps, where entries have left
        steps = torch.randint(1, 4, cache.positions.shape, generator=torch.Generator().manual_seed(2))
        cache.positions.copy_(steps.cumsum(1))
    cache.kv.copy_(torch.randn(cache.kv.shape, generator=torch.Generator().manual_seed(0)))
    cache.lengths = list(lengths)
    return cache


def test_reserve_grows_by_doubling_and_keeps_what_is_there():
    cache = filled([5, 3])
    assert not cache.reserve(128) and cache.capacity == 128
    before = cache.kv.clone()
    assert cache.reserve(129) and cache.capacity == 256
    for slot, length in enumerate(cache.lengths):
        assert torch.equal(cache.kv[:, :, slot, :length], before[:, :, slot, :length])
        assert not cache.kv[:, :, slot, length:].any()


def test_a_given_capacity_stays_and_takes_no_memory_before_it_is_written():
    cache = Slots(4, 64, 2, 64, torch.bfloat16, torch.device("cpu"), capacity=2**14)
    assert cache.kv.nbytes == 2**31 and cache.capacity == 2**14  # 2 GiB
    before, address = resident(), cache.kv.data_ptr()
    assert not cache.reserve(100)
    cache.kv[:, :, 3, :100] = 1
    cache.lengths[3] = 100
    cache.copy(3, 5, 60)
    cache.prune({3: torch.arange(100) % 2 > 0})
    for slot in (3, 5, 7):
        cache.clear(slot)
    assert resident() - before < 2**25 and cache.kv.data_ptr() == address
    with pytest.raises(ValueError, match="tokens: expected at most 16384 in a slot, got 16385"):
        cache.reserve(2**14 + 1)


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


def test_a_copy_has_the_first_entries_of_its_source():
    cache = filled([10, 7, 3])
    before = cache.kv.clone()
    cache.copy(0, 2, 6)
    assert cache.lengths == [10, 7, 6]
    assert torch.equal(cache.kv[:, :, 2, :6], before[:, :, 0, :6])
    assert torch.equal(cache.kv[:, :, 2, 6:], before[:, :, 2, 6:])
    assert torch.equal(cache.kv[:, :, :2], before[:, :, :2])
    cache.copy(1, 2, 0)
    assert cache.lengths == [10, 7, 0]
    for wrong in (-1, 8):
        with pytest.raises(ValueError, match=f"length: expected 0 to 7, what slot 1 holds, got {wrong}"):
            cache.copy(1, 0, wrong)


def test_positions_of_entries_follow_them():
    cache = filled([10, 7, 3], windows=True)
    before, keep = cache.positions.clone(), torch.arange(10) % 3 > 0
    cache.prune({0: keep})
    assert torch.equal(cache.positions[0, :6], before[0, :10][keep])
    cache.copy(0, 2, 5)
    assert torch.equal(cache.positions[2, :5], before[0, :10][keep][:5])
    assert torch.equal(cache.positions[1], before[1])
    wider = cache.capacity + 1
    held = cache.positions.clone()
    assert cache.reserve(wider) and cache.positions.shape[1] == cache.capacity >= wider
    assert torch.equal(cache.positions[:, : held.shape[1]], held)
    assert filled([1]).positions is None


def test_prune_is_one_call_for_all_slots_and_moves_nothing_else(monkeypatch):
    cache = filled([10, 7, 20])
    before, address = cache.kv.clone(), cache.kv.data_ptr()
    calls = []
    op = slots.prune_kv_cache_
    monkeypatch.setattr(slots, "prune_kv_cache_", lambda *a: (calls.append(a), op(*a))[1])
    first, last = torch.arange(10) % 3 > 0, torch.arange(20) >= 15
    cache.prune({0: first, 2: last})
    assert len(calls) == 1 and cache.kv.data_ptr() == address
    assert cache.lengths == [6, 7, 5]
    assert torch.equal(cache.kv[:, :, 0, :6], before[:, :, 0, :10][:, :, first])
    assert torch.equal(cache.kv[:, :, 1], before[:, :, 1])
    assert torch.equal(cache.kv[:, :, 2, :5], before[:, :, 2, 15:20])
    cache.prune({})
    assert len(calls) == 1


def test_a_wrong_mask_is_refused_before_anything_moves():
    cache = filled([10, 7])
    before = cache.kv.clone()
    with pytest.raises(ValueError, match=r"keep: expected shape \[7\], the length of slot 1, got \[8\]"):
        cache.prune({0: torch.zeros(10, dtype=torch.bool), 1: torch.ones(8, dtype=torch.bool)})
    assert torch.equal(cache.kv, before) and cache.lengths == [10, 7]


def naive_step(cache: Slots, rows, counts, query, key, value, scores):
    """What a forward must compute, row by row and query by query: query [N, Hq, D] -> [N, Hq, Dv]."""
    out, group = query.new_empty(*query.shape[:2], value.shape[2]), query.shape[1] // key.shape[1]
    begin = 0
    for row, count in zip(rows, counts, strict=True):
        length, new = cache.lengths[row], slice(begin, begin + count)
        begin += count
        keys, values = (
            torch.cat([cache.kv[0, which, row, :length, :, : x.shape[2]], x[new]])
            for which, x in enumerate((key, value))
        )
        for t in range(count):
            seen = length + t + 1
            places = torch.arange(seen) if cache.positions is None else cache.positions[row, :seen]
            near = places > places[-1] - (scores.window or 10**6)
            for head in range(query.shape[1]):
                score = keys[:seen, head // group] @ query[new][t, head] * scores.scale
                score = score if scores.softcap is None else scores.softcap * (score / scores.softcap).tanh()
                score = score.masked_fill(~near, -torch.inf)
                if scores.sinks is not None:
                    score = torch.cat([score, scores.sinks[head, None]])
                out[new][t, head] = score.softmax(0)[:seen] @ values[:seen, head // group]
    return out


def documented_flash(
    q, k_cache, v_cache, *, cache_seqlens, cache_batch_idx, softmax_scale, causal, softcap=0.0
):
    """flash_attn_with_kvcache as its docstring has it: caches [B, S, Hkv, D], causal masks aligned to the
    bottom right corner, a query that sees nothing gives 0.
    """
    assert causal and k_cache.stride(-1) == 1 and cache_seqlens.dtype == torch.int32
    rows = range(q.shape[0]) if cache_batch_idx is None else cache_batch_idx.tolist()
    out, group = q.new_zeros(*q.shape[:3], v_cache.shape[3]), q.shape[2] // k_cache.shape[2]
    for i, row in enumerate(rows):
        for t in range(q.shape[1]):
            seen = int(cache_seqlens[i]) - q.shape[1] + t + 1
            for head in range(q.shape[2] if seen > 0 else 0):
                score = k_cache[row, :seen, head // group] @ q[i, t, head] * softmax_scale
                score = softcap * (score / softcap).tanh() if softcap else score
                out[i, t, head] = score.softmax(0) @ v_cache[row, :seen, head // group]
    return out


def transposed_sdpa(query, key, value, **settings):
    """Results as torch's memory-efficient kernel lays them out, which is its choice on a GPU."""
    out = torch.nn.functional.scaled_dot_product_attention(query, key, value, **settings)
    return out.transpose(1, 2).contiguous().transpose(1, 2)


def attend_like_a_gpu(monkeypatch, parts: list[AttentionMetadata], flash: bool) -> None:
    """Let `AttentionMetadata.attend` go the way it goes on a GPU, on the CPU."""
    monkeypatch.setattr(slot_attention, "scaled_dot_product_attention", transposed_sdpa)

    def cached(
        query, k_cache, v_cache, cache_seqlens, *, cache_batch_idx, query_lens, scale, evict, softcap, sinks
    ):
        (part,) = (part for part in parts if part.cache_batch_idx is cache_batch_idx)
        windows = [window for window, made in part.lifetimes.items() if made is evict]
        scores = Scores(scale, windows[0] if windows else None, softcap, sinks)
        if flash:
            return part._flash(documented_flash, query, k_cache, v_cache, scores)
        return part._dense(query, k_cache, v_cache, scores)

    monkeypatch.setattr(slot_attention, "cached_attention", cached)


SINKS = torch.tensor([0.5, -1.0, 2.0, 0.0])
SCORES = {
    "plain": Scores(0.3),
    "window": Scores(0.3, window=6),
    "soft cap": Scores(0.3, softcap=0.4),
    "sinks": Scores(0.3, sinks=SINKS),
    "all": Scores(0.3, 6, 0.4, SINKS),
}
OF_FLASH = ("plain", "soft cap")


@pytest.mark.parametrize(
    ("backend", "option"),
    [(b, o) for b in ("op", "dense", "flash") for o in SCORES if b != "flash" or o in OF_FLASH],
)
@pytest.mark.parametrize(
    ("rows", "counts"),
    [([0, 1, 2], [1, 1, 1]), ([1, 2], [3, 5]), ([0, 2], [4, 2]), ([2], [6]), ([3, 0, 1, 2], [1, 1, 5, 3])],
)
@pytest.mark.parametrize("value_dim", [8, 5])
def test_a_step_stores_and_attends(monkeypatch, backend, option, rows, counts, value_dim):
    """The ways of attention; what a GPU takes is run here on the CPU."""
    cache, generator = filled([10, 7, 15, 0], windows=True), torch.Generator().manual_seed(1)
    sizes = ((4, 8), (2, 8), (2, value_dim))
    query, key, value = (torch.randn(sum(counts), *size, generator=generator) for size in sizes)
    scores = SCORES[option]
    expected = naive_step(cache, rows, counts, query, key, value, scores)
    ends = [cache.lengths[row] + count for row, count in zip(rows, counts, strict=True)]
    ones = counts.count(1)
    parts = [
        AttentionMetadata.build(rows[part], counts[part], ends[part], torch.device("cpu"), cache.positions)
        for part in (slice(0, ones), slice(ones, None))
        if rows[part]
    ]
    stored = [(row, ends[i] - counts[i] + t) for i, row in enumerate(rows) for t in range(counts[i])]
    where, columns = torch.tensor(stored).T
    if backend != "op":
        attend_like_a_gpu(monkeypatch, parts, backend == "flash")
    step = Step(cache.kv, None, where, columns, parts)
    packed = (x.transpose(0, 1)[None] for x in (query, key, value))
    out = step.attend(SimpleNamespace(layer_idx=0), *packed, scores)
    torch.testing.assert_close(out, expected[None])
    for stored, new in zip(cache.kv[0], (key, value), strict=True):
        assert torch.equal(stored[where, columns][..., : new.shape[2]], new)


def test_slots_that_follow_one_another_are_named_by_a_slice():
    for rows, expected in (([1, 2], slice(1, 3)), ([4], slice(4, 5)), ([0, 2], None), ([2, 1], None)):
        ones = [1] * len(rows)
        assert AttentionMetadata.build(rows, ones, ones, torch.device("cpu")).contiguous == expected


def test_flash_attention_is_for_half_precision_on_a_gpu(monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_attn", SimpleNamespace(flash_attn_with_kvcache=documented_flash))
    monkeypatch.setattr(slot_attention.importlib.util, "find_spec", lambda name: object())
    for device, dtype, dim, taken in [
        ("cuda", torch.bfloat16, 128, True),
        ("cuda", torch.float16, 256, True),
        ("cuda", torch.float32, 128, False),
        ("cuda", torch.bfloat16, 512, False),
        ("cpu", torch.bfloat16, 128, False),
    ]:
        kv = SimpleNamespace(device=torch.device(device), dtype=dtype, shape=(2, 2, 4, 8, 2, dim))
        assert (find_flash_attention(kv) is documented_flash) == taken
    monkeypatch.setitem(sys.modules, "flash_attn", SimpleNamespace(cute=None))  # the fourth generation alone
    kv = SimpleNamespace(device=torch.device("cuda"), dtype=torch.bfloat16, shape=(2, 2, 4, 8, 2, 128))
    assert find_flash_attention(kv) is None
