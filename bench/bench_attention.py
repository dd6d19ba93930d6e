"""trajectory_attention on the MEM1 trajectories, and what its mask costs to build.

Peers on the CPU: SDPA with the dense bool mask (the same function), compiled FlexAttention (the same
function, forward only), plain eager attention where it fits, and SDPA causal, which computes another
function and stands there as a scale. On a CUDA device (`-k gpu`) also causal, random and prefix-tree masks,
each direction apart, and all peers of `peers.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from attention_task import CAUSAL, DENSE, FLEX, FLOPS, OURS, SCALE, Task, held_bytes
from measure import Candidate
from peers import (
    FLASH_ATTENTION,
    FLEX_BLOCK,
    Attention,
    block_mask,
    flash_attention,
    flashmask,
    sdpa,
    sdpa_repeated_heads,
)
from torch import Tensor
from torch.nn.attention import SDPBackend
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from torch.nn.functional import scaled_dot_product_attention

from mem1_core.layout import TrajectoryLayout
from mem1_core.mask import TrajectoryMask
from mem1_core.sample_inputs import (
    MEM1_TRAJECTORIES,
    causal_evict,
    mem1_segments,
    prefix_tree_evict,
    random_evict,
)
from mem1_core.segments import Segment

MIB = 2**20

# --- the GPU tables -----------------------------------------------------------------------------------------
# A run has to end in minutes, and most of it is not timing: FlexAttention compiles for each of seven
# kinds (masks of 16k tokens share one), references and checks take seconds each. 10 masks x 3 directions x
# 1.5 s of timing is most of a minute. The important masks come first: a run that is cut short has them.
GPU_BUDGET_S = 1.5
GQA, MEM1_HEADS = (64, 8, 128), (12, 2, 128)
LONGEST_CAUSAL, LONGEST_DENSE = 2**16, 2**14  # tokens to which peers that see every pair are taken


def shortened(segments: list[Segment]) -> list[Segment]:
    return [Segment(s.kind, s.turn, 1 + s.length // 12) for s in segments]


def synthetic(evict: Callable[[int], Tensor], tokens: int) -> Callable[[bool], TrajectoryMask]:
    return lambda full: TrajectoryMask.from_evict(evict(tokens if full else 1_000))


def trajectories(copies: int) -> Callable[[bool], TrajectoryMask]:
    def packed(full: bool) -> TrajectoryMask:
        segments = MEM1_TRAJECTORIES[11_852]
        one = TrajectoryLayout.from_segments(segments if full else shortened(segments)).mask
        return TrajectoryMask.pack([one] * (copies if full else min(copies, 2)))

    return packed


# Where a window is looked at: in one copy it is a shorter lifetime, in re-encoded blocks it counts positions.
STREAMS: dict[str, Callable[[bool], TrajectoryMask]] = {
    "MEM1": trajectories(1),
    "causal 16k": synthetic(causal_evict, 16_384),
    "MEM1 re-encoded": lambda full: (
        TrajectoryLayout.from_segments(
            MEM1_TRAJECTORIES[11_852] if full else shortened(MEM1_TRAJECTORIES[11_852]), regime="reencode"
        ).mask
    ),
}


def windowed(stream: str, window: int) -> Callable[[bool], TrajectoryMask]:
    return lambda full: STREAMS[stream](full).windowed(window)


# Name -> (Hq, Hkv, D) and the mask, at full size or small.
GPU_TABLES: dict[str, tuple[tuple[int, int, int], Callable[[bool], TrajectoryMask]]] = {
    "causal 16k": (GQA, synthetic(causal_evict, 16_384)),
    "MEM1": (MEM1_HEADS, trajectories(1)),
    "MEM1 x 64 packed": (MEM1_HEADS, trajectories(64)),
    "MEM1, window 512": (MEM1_HEADS, windowed("MEM1", 512)),
    "MEM1 re-encoded, window 512": (MEM1_HEADS, windowed("MEM1 re-encoded", 512)),
    "causal 16k, window 4,096": (GQA, windowed("causal 16k", 4_096)),
    "random eviction 16k": (GQA, synthetic(random_evict, 16_384)),
    "prefix tree 16k": (GQA, synthetic(prefix_tree_evict, 16_384)),
    "causal 8k": (GQA, synthetic(causal_evict, 8_192)),
    "causal 32k": (GQA, synthetic(causal_evict, 32_768)),
}


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")  # small shapes only
@pytest.mark.parametrize("direction", ["forward", "forward+backward"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("tokens", MEM1_TRAJECTORIES)
def test_attention(bench: Any, tokens: int, dtype: torch.dtype, direction: str) -> None:
    segments, heads = MEM1_TRAJECTORIES[tokens], MEM1_HEADS
    if not bench.measuring:
        segments, heads = shortened(segments), (4, 2, 32)
    backward = direction != "forward"
    task = Task(TrajectoryLayout.from_segments(segments).mask, heads, dtype)

    candidates = [task.ours(direction)]
    # Dense forward+backward at N 11,852 takes most of a minute and many GiB.
    affordable = task.mask.evict_at.shape[1] < 4_000
    if affordable or not backward:
        dense: Attention = partial(scaled_dot_product_attention, attn_mask=task.dense, enable_gqa=True)
        causal: Attention = partial(scaled_dot_product_attention, is_causal=True, enable_gqa=True)
        candidates += [
            task.peer(DENSE, dense, direction, held_bytes=task.dense.nbytes),
            task.peer(CAUSAL, causal, direction, same_function=False),
        ]
    if not backward:  # FlexAttention has no backward on CPU
        candidates.append(task.flex(direction, compiled=bench.measuring))
    if affordable and dtype == torch.float32:
        candidates.append(task.eager_dense(direction))

    results = bench.compare(task.title(direction), candidates, flops=task.flops(direction), dtype=dtype)
    bf16 = dtype == torch.bfloat16
    if tokens == 11_852 and not backward:
        bench.goal_speedup(results, OURS, DENSE, 4 if bf16 else 6)
        if not bf16:
            bench.goal_speedup(results, OURS, FLEX, 1.5)
    if tokens == 3_396 and backward:
        bench.goal_speedup(results, OURS, DENSE, 4 if bf16 else 3)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")  # small shapes only
@pytest.mark.parametrize("direction", ["forward", "forward+backward"])
@pytest.mark.parametrize("window", [512, 4_096])
@pytest.mark.parametrize("stream", STREAMS)
def test_window(bench: Any, stream: str, window: int, direction: str) -> None:
    """Layers with a window; in the same run the same stream without one, as a scale."""
    heads = MEM1_HEADS if bench.measuring else (4, 2, 32)
    mask = STREAMS[stream](bench.measuring)
    whole = Task(mask, heads, torch.float32)
    task = Task(mask.windowed(window), heads, torch.float32, f"{stream}, window {window}")
    candidates = [
        task.ours(direction),
        replace(whole.ours(direction), name="without the window", note=SCALE),
    ]
    if direction == "forward":
        candidates.append(task.flex(direction, compiled=bench.measuring))
        dense: Attention = partial(scaled_dot_product_attention, attn_mask=task.dense, enable_gqa=True)
        candidates.append(task.peer(DENSE, dense, direction, held_bytes=task.dense.nbytes))
    results = bench.compare(task.title(direction), candidates, flops=task.flops(direction))
    if direction == "forward":
        bench.goal_speedup(results, OURS, FLEX, 1.5)


def long_evict(table: str, full: bool) -> Tensor:
    """evict int32 [1, N] of 128k tokens, or of a thousand."""
    n = 131_072 if full else 1_000
    if table == "random":
        return random_evict(n)[None]
    turns = (n - 1) // 500
    return TrajectoryLayout.from_segments(mem1_segments(turns, prompt=n - turns * 500)).mask.evict_at


@pytest.mark.parametrize("table", ["MEM1 turns", "random"])
def test_mask_construction(bench: Any, table: str) -> None:
    """128k tokens: from the evict table to the plan for both directions."""
    evict = long_evict(table, bench.measuring)
    built = TrajectoryMask.from_evict(evict)

    def check(mask: TrajectoryMask) -> None:
        assert mask.evict_at.shape == evict.shape
        assert mask.plan.live_tiles > 0

    candidates = [Candidate("TrajectoryMask.from_evict", lambda: TrajectoryMask.from_evict(evict), check)]
    results = bench.compare(mask_title(built, table), candidates, budget_s=1)
    if bench.measuring:
        bench.goal(
            f"mask and plan, {table}", results[candidates[0].name].median * 1e3, 20, at_most=True, unit=" ms"
        )


@pytest.mark.parametrize("table", ["MEM1 turns", "random"])
def test_gpu_mask_construction(bench: Any, device: str, table: str) -> None:
    """The same on the device, which is idle at the start: the time that a caller waits for the plan."""
    evict = long_evict(table, bench.measuring)
    expected = TrajectoryMask.from_evict(evict).tile_plan(128, 128)
    evict = evict.to(device)

    def check(mask: TrajectoryMask) -> None:
        plan = mask.tile_plan(128, 128)
        assert torch.equal(plan.key_ranges.cpu(), expected.key_ranges)
        assert plan.live_tiles == expected.live_tiles

    candidates = [
        Candidate("TrajectoryMask(evict)", lambda: TrajectoryMask(evict), check),
        Candidate("TrajectoryMask.from_evict", lambda: TrajectoryMask.from_evict(evict), check),
    ]
    title = f"on {device}: {mask_title(TrajectoryMask(evict), table)}"
    results = bench.compare(title, candidates, device=device, idle=True, budget_s=1)
    if bench.measuring:
        seconds = results[candidates[0].name].median
        bench.goal(f"mask and plan on the GPU, {table}", seconds * 1e3, 1, at_most=True, unit=" ms")


def mask_title(mask: TrajectoryMask, table: str) -> str:
    plan = mask.plan
    return (
        f"mask and plan, {table}, N {mask.evict_at.shape[1]:,}, {plan.block_q} x {plan.block_k} tiles, "
        f"{plan.live_ratio:.2%} of them live, {held_bytes(mask) / MIB:.2f} MiB in all"
    )


@pytest.fixture(scope="module", params=GPU_TABLES)
def gpu_task(request: pytest.FixtureRequest, bench: Any, device: str) -> Task:
    """Made once for all directions of a table."""
    heads, make = GPU_TABLES[request.param]
    if not bench.measuring:
        heads = (4, 2, 32)
    return Task(make(bench.measuring).to(device), heads, torch.bfloat16, request.param)


@pytest.fixture(scope="module")
def live_rates() -> dict[str, float]:
    """Direction -> FLOP/s that we reach on the tiles of the causal 16k mask, once that table has run."""
    return {}


def gpu_candidates(task: Task, direction: str, measuring: bool) -> list[Candidate]:
    n = task.mask.evict_at.shape[1]
    causal = task.pairs == n * (n + 1) // 2
    candidates = [task.ours(direction)]
    for backend, label in ((SDPBackend.FLASH_ATTENTION, "flash"), (SDPBackend.CUDNN_ATTENTION, "cuDNN")):
        name, attention = f"{CAUSAL}, {label}", sdpa(backend, is_causal=True)
        if n <= LONGEST_CAUSAL:
            candidates.append(task.peer(name, attention, direction, same_function=causal))
        else:
            candidates.append(Candidate(name, None, note=f"not run: {n * n / 2 / task.pairs:.0f}x the pairs"))
    if causal:
        for name, module in FLASH_ATTENTION.items():
            candidates.append(task.peer(name, flash_attention(module), direction, heads_first=False))
    else:
        for make, backend, label in (
            (sdpa, SDPBackend.CUDNN_ATTENTION, "cuDNN"),
            (sdpa_repeated_heads, SDPBackend.EFFICIENT_ATTENTION, "efficient, K and V repeated"),
        ):
            name = f"{DENSE}, {label}"
            if n <= LONGEST_DENSE:
                attention, held = make(backend, attn_mask=task.dense), task.dense.nbytes
                candidates.append(task.peer(name, attention, direction, held_bytes=held))
            else:
                note = f"not run: its mask alone takes {n * n / 2**30:.0f} GiB"
                candidates.append(Candidate(name, None, note=note))
    if direction == "forward" or task.mask.device.type == "cuda":
        candidates.append(task.flex(direction, compiled=measuring))
    else:
        candidates.append(Candidate(FLEX, None, note="no backward on CPU"))
    candidates.append(task.peer("FlashMask", flashmask(task.mask), direction, heads_first=False))
    return candidates


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")  # small shapes only
@pytest.mark.parametrize("direction", FLOPS)
def test_gpu_attention(
    bench: Any, device: str, gpu_task: Task, live_rates: dict[str, float], direction: str
) -> None:
    task = gpu_task
    results = bench.compare(
        task.title(direction),
        gpu_candidates(task, direction, bench.measuring),
        flops=task.flops(direction),
        dtype=task.dtype,
        device=device,
        budget_s=GPU_BUDGET_S,
    )
    if not bench.measuring:
        return
    plan = task.mask.tile_plan(128, 128)
    visible = task.pairs / (plan.live_tiles * plan.block_q * plan.block_k)
    bench.fact("128 x 128 tiles live", 100 * plan.live_ratio, " %")
    bench.fact("pairs of the live tiles visible", 100 * visible, " %")
    visible_rate = task.flops(direction) / results[OURS].median
    live_rate = visible_rate / visible
    if task.name == "causal 16k":
        live_rates[direction] = live_rate
        target = {"forward": 400, "backward": 280}.get(direction)
        if target:
            bench.goal(f"causal 16k, {direction}", visible_rate / 1e12, target, unit=" TFLOP/s")
        return
    # Against what we reach on the tiles of causal 16k, nearly all of which are full.
    share = 100 * live_rate / live_rates[direction] if direction in live_rates else None
    if task.name.startswith("MEM1") and direction != "forward+backward":
        bench.goal_speedup(results, OURS, FLEX, 1.3)
        bench.goal(f"{task.name}, {direction}, of the live-tile rate", share, 85, unit=" %")
    elif share is not None:
        bench.fact("of the live-tile rate", share, " %")


def test_mask_construction_against_flex(bench: Any) -> None:
    """The mask of the long MEM1 trajectory: ours from the turns, FlexAttention's from our plan, and its own
    way."""
    segments = MEM1_TRAJECTORIES[11_852]
    if not bench.measuring:
        segments = shortened(segments)
    mask = TrajectoryLayout.from_segments(segments).mask
    n, evict = mask.evict_at.shape[1], mask.evict_at[0]

    def visit_every_pair() -> BlockMask:
        return create_block_mask(
            lambda b, h, i, j: (j <= i) & (i < evict[j]), 1, None, n, n, device="cpu", BLOCK_SIZE=FLEX_BLOCK
        )

    def check_flex(blocks: BlockMask) -> None:
        assert torch.equal(blocks.to_dense(), live_tiles), "live tiles differ"

    # What every pair says, tile by tile.
    tiles = -(-n // FLEX_BLOCK)
    padded = torch.nn.functional.pad(mask.dense(), (0, tiles * FLEX_BLOCK - n) * 2)
    live_tiles = padded.view(1, 1, tiles, FLEX_BLOCK, tiles, FLEX_BLOCK).any(dim=5).any(dim=3).int()
    candidates = [
        Candidate("TrajectoryLayout.from_segments", lambda: TrajectoryLayout.from_segments(segments).mask),
        Candidate(
            "BlockMask from our plan",
            lambda: block_mask(TrajectoryLayout.from_segments(segments).mask),
            check_flex,
        ),
        Candidate("create_block_mask", visit_every_pair, check_flex),
    ]
    bench.compare(f"mask for one call, N {n:,}", candidates, budget_s=1, min_rounds=1)
