"""The tile plan: against the dense mask, the device's against the host's, without a wait, in a CUDA graph."""

from __future__ import annotations

import math
import time

import pytest
import torch
from torch import Tensor

from mem1_core import _library
from mem1_core.eviction import evict_from_segments
from mem1_core.layout import TrajectoryLayout
from mem1_core.mask import TilePlan, TrajectoryMask
from mem1_core.sample_inputs import EVICT_TABLES, adversarial_evict, mem1_segments, random_evict
from mem1_core.testing import no_wait, poisoned_memory

BLOCKS = [(128, 128), (64, 64), (16, 64), (64, 32), (7, 13)]
LISTS = ("full", "partial")


def batch_of(table: str, batch: int, tokens: int) -> Tensor:
    evict = torch.empty(batch, tokens, dtype=torch.int32)
    for row in range(batch):
        evict[row] = EVICT_TABLES[table](tokens, row)
    return evict


def tiles(plan: TilePlan, batch: int, query_tiles: int, key_tiles: int) -> tuple[Tensor, Tensor]:
    """The plan's two views as int [B, QT, KT]: 0 dead, 1 partial, 2 full; by query tile and by key tile."""
    by_query, by_key = torch.zeros(2, batch, query_tiles, key_tiles, dtype=torch.int64)
    for offsets, listed, state in (
        (plan.full_offsets, plan.full_tiles, 2),
        (plan.partial_offsets, plan.partial_tiles, 1),
    ):
        assert offsets.dtype == listed.dtype == torch.int32
        assert offsets.shape == (batch * query_tiles + 1,)
        assert offsets[0] == 0 and offsets[-1] == len(listed)
        for n, (begin, end) in enumerate(zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)):
            keys = listed[begin:end].tolist()
            assert keys == sorted(set(keys)), "ascending, each once"
            by_query[n // query_tiles, n % query_tiles, keys] += state
    assert plan.key_ranges.dtype == torch.int32 and plan.key_ranges.shape == (batch, key_tiles, 4)
    for b in range(batch):
        for key, (begin, full_begin, full_end, end) in enumerate(plan.key_ranges[b].tolist()):
            assert 0 <= begin <= full_begin <= full_end <= end <= query_tiles
            by_key[b, begin:end, key] = 1
            by_key[b, full_begin:full_end, key] = 2
    return by_query, by_key


def longest_first(work: Tensor) -> list[int]:
    """Indices by falling work, equal ones ascending."""
    counts = work.flatten().tolist()
    return sorted(range(len(counts)), key=lambda n: (-counts[n], n))


@pytest.mark.parametrize("table", EVICT_TABLES)
@pytest.mark.parametrize("tokens", [0, 1, 63, 64, 65, 127, 200])
@pytest.mark.parametrize("blocks", BLOCKS)
def test_tile_plan_against_the_dense_mask(table: str, tokens: int, blocks: tuple[int, int]) -> None:
    block_q, block_k = blocks
    mask = TrajectoryMask.from_evict(batch_of(table, 2, tokens))
    plan, dense = mask.tile_plan(block_q, block_k), mask.dense()
    query_tiles, key_tiles = math.ceil(tokens / block_q), math.ceil(tokens / block_k)
    expected = torch.zeros(2, query_tiles, key_tiles, dtype=torch.int64)
    for q in range(query_tiles):
        for k in range(key_tiles):
            tile = dense[:, q * block_q : (q + 1) * block_q, k * block_k : (k + 1) * block_k].flatten(1)
            whole = (k + 1) * block_k <= tokens  # keys cut short by the end make a partial tile of any
            expected[:, q, k] = tile.any(1).long() + (tile.all(1) & whole).long()
    by_query, by_key = tiles(plan, 2, query_tiles, key_tiles)
    assert torch.equal(by_query, expected)
    assert torch.equal(by_key, expected)
    live = expected > 0
    assert plan.tiles == live.numel()
    assert plan.live_tiles == int(live.sum()) and plan.dead_tiles == int((~live).sum())
    assert plan.query_order.dtype == plan.key_order.dtype == torch.int32
    assert plan.query_order.tolist() == longest_first(live.sum(2))
    assert plan.key_order.tolist() == longest_first(live.sum(1))


def test_tile_plans_are_kept() -> None:
    mask = TrajectoryMask.from_evict(random_evict(100))
    assert (mask.plan.block_q, mask.plan.block_k) == (64, 64)
    assert mask.tile_plan(64, 64) is mask.plan
    assert mask.tile_plan(4, 8) is mask.tile_plan(4, 8)
    with pytest.raises(ValueError, match="block_q, block_k: expected positive sizes, got 0 and 8"):
        mask.tile_plan(0, 8)
    assert mask.to("cpu") is mask


def test_orders_of_plain_causal_attention() -> None:
    plan = TrajectoryMask.from_evict(EVICT_TABLES["causal"](1_000, 0)).plan
    assert plan.query_order.tolist() == list(reversed(range(16)))
    assert plan.key_order.tolist() == list(range(16))


@pytest.mark.parametrize("table", ["MEM1 turns", "random"])
def test_a_long_trajectory_is_planned_in_milliseconds(table: str) -> None:
    if table == "random":
        evict = random_evict(131_072)
    else:
        evict = evict_from_segments(mem1_segments(200, prompt=1_072, internal_state=200, query=50, info=400))
    seconds = []
    for _ in range(10):
        begin = time.perf_counter()
        mask = TrajectoryMask.from_evict(evict)
        seconds.append(time.perf_counter() - begin)
    assert mask.shape == (1, 131_072)
    assert mask.plan.live_ratio < (0.05 if table == "MEM1 turns" else 0.5)
    assert min(seconds) < 0.1, f"the goal is 20 ms, took {min(seconds) * 1e3:.1f} ms"


# --------------------------------------------------------------------------------- the plan of a CUDA mask


def assert_planned(got: TilePlan, evict: Tensor, blocks: tuple[int, int]) -> None:
    """`got` is the host's plan of `evict`, with lists as long as every tile up to the diagonal would need."""
    want = TrajectoryMask(evict.cpu()).tile_plan(*blocks)
    batch, tokens = evict.shape
    block_q, block_k = blocks
    ends = (min(end, tokens) for end in range(block_q, tokens + block_q, block_q))
    bound = batch * sum(math.ceil(end / block_k) for end in ends)
    for name in LISTS:
        listed, expected = getattr(got, f"{name}_tiles").cpu(), getattr(want, f"{name}_tiles")
        assert listed.shape == (bound,) and listed.dtype == torch.int32, name
        assert torch.equal(listed[: len(expected)], expected), name
    for name in ("key_ranges", "full_offsets", "partial_offsets", "query_order", "key_order"):
        assert torch.equal(getattr(got, name).cpu(), getattr(want, name)), name
    assert got.live_tiles == want.live_tiles and got.tiles == want.tiles


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("blocks", BLOCKS)
def test_without_cuda_code_the_host_plans(
    device: str, blocks: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A C library built without nvcc. The CPU stands in for the device where there is none."""
    monkeypatch.setattr(_library, "cuda_architectures", lambda: "")
    for table, batch, tokens in (
        ("random", 3, 200),
        ("adversarial", 1, 129),
        ("causal", 2, 0),
        ("causal", 0, 70),
    ):
        evict = batch_of(table, batch, tokens)
        made = _library._tile_plan_cuda(evict.to(device), *blocks)
        assert {part.device.type for part in made} == {device}
        host = TrajectoryMask(evict).tile_plan(*blocks)
        assert_planned(TilePlan(*blocks, *made, host.query_order, host.key_order), evict, blocks)


def test_a_plan_that_the_device_could_not_index_is_refused() -> None:
    plan = _library._tile_plan_cuda
    one = torch.ones(1, 1, dtype=torch.int32)
    for wrong in (one.long(), one[0]):
        with pytest.raises(TypeError, match=r"evict: expected int32 \[batch, length\], got"):
            plan(wrong, 64, 64)
    for blocks in ((0, 64), (64, 2**20 + 1)):
        with pytest.raises(ValueError, match="block_q, block_k: expected 1 to 2\\^20, got"):
            plan(one, *blocks)
    with pytest.raises(ValueError, match=r"fewer than 2\^31 tiles .* got 2147745792 .*\[64, 1048576\]"):
        plan(one.expand(64, 2**20), 128, 128)
    with pytest.raises(ValueError, match=r"^block_q: expected 1 to 2\^20, got 0"):
        _library._C.tile_plan_cuda(0, 1, 1, 0, 64, *[0] * 6)


@pytest.mark.gpu
@pytest.mark.parametrize("table", EVICT_TABLES)
@pytest.mark.parametrize("blocks", BLOCKS)
def test_the_device_plans_as_the_host(table: str, blocks: tuple[int, int]) -> None:
    for batch in (0, 1, 3):
        for tokens in (0, 1, 127, 128, 129, 2000):
            evict = batch_of(table, batch, tokens)
            on_device = evict.cuda()
            with poisoned_memory(), no_wait():
                plan = TrajectoryMask(on_device).tile_plan(*blocks)
            assert_planned(plan, evict, blocks)


@pytest.mark.gpu
def test_a_mask_comes_to_the_device_without_a_wait() -> None:
    masks = [TrajectoryLayout.from_segments(mem1_segments(turns)).mask for turns in (1, 3)]
    with no_wait():
        moved = [mask.to("cuda") for mask in masks]
        packed = TrajectoryMask.pack(moved)
    for got, want in zip([*moved, packed], [*masks, TrajectoryMask.pack(masks)], strict=True):
        assert got.evict_at.is_cuda and torch.equal(got.evict_at.cpu(), want.evict_at)
        assert got.segments == want.segments
        assert (got.plan.block_q, got.plan.block_k) == (128, 128)
        assert_planned(got.plan, want.evict_at, (128, 128))
    assert torch.equal(packed.to("cpu").evict_at, TrajectoryMask.pack(masks).evict_at)


@pytest.mark.gpu
def test_a_view_on_another_stream_is_planned() -> None:
    wide = (
        torch.stack([adversarial_evict(2_000, seed) for seed in range(3)]).cuda().repeat_interleave(2, dim=1)
    )
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        made = _library.ops.tile_plan(wide[:, ::2], 128, 128)
    torch.cuda.current_stream().wait_stream(stream)
    host = TrajectoryMask(wide[:, ::2].cpu().contiguous()).tile_plan(128, 128)
    plan = TilePlan(128, 128, *made, host.query_order, host.key_order)
    assert_planned(plan, wide[:, ::2].contiguous(), (128, 128))


@pytest.mark.gpu
def test_a_cuda_graph_captures_the_plan() -> None:
    """Captured once, replayed for other lifetimes: a plan's shapes depend on B, N and the blocks alone."""
    evict = batch_of("causal", 2, 2_000).cuda()
    TrajectoryMask(evict)  # the first launch loads the kernels, which a capture does not allow
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        mask = TrajectoryMask(evict)
        live = mask.plan.full_offsets[-1] + mask.plan.partial_offsets[-1]
    for table in EVICT_TABLES:
        evict.copy_(batch_of(table, 2, 2_000))
        graph.replay()
        assert_planned(mask.plan, evict, (128, 128))
        assert int(live) == mask.plan.live_tiles


@pytest.mark.gpu
@pytest.mark.parametrize("wrong", [10**6, -(10**6), 0, 2**31 - 1, -(2**31)])
@pytest.mark.parametrize("blocks", [(128, 128), (5, 9)])
def test_lifetimes_out_of_range_stay_inside_on_the_device(wrong: int, blocks: tuple[int, int]) -> None:
    """The device cannot refuse them without a wait; whatever they are, no index leaves the stream."""
    tokens = 700
    query_tiles, key_tiles = (math.ceil(tokens / block) for block in blocks)
    evict = torch.full((2, tokens), wrong, dtype=torch.int32, device="cuda")
    evict[:, ::3] = tokens
    plan = TrajectoryMask(evict).tile_plan(*blocks)
    ranges = plan.key_ranges.cpu()
    assert ranges.min() >= 0 and ranges.max() <= query_tiles and (ranges.diff() >= 0).all()
    for name in LISTS:
        offsets, listed = getattr(plan, f"{name}_offsets").cpu(), getattr(plan, f"{name}_tiles").cpu()
        assert offsets[0] == 0 and (offsets.diff() >= 0).all() and offsets[-1] <= len(listed)
        assert ((listed >= 0) & (listed < key_tiles))[: offsets[-1]].all()
