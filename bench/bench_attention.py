"""trajectory_attention on the two MEM1 trajectories, and what its mask costs to build.

Peers: SDPA with the dense bool mask (the same function), compiled FlexAttention (the same function, CPU
forward only), plain eager attention where it fits, and SDPA causal, which computes another function and
stands there as a scale.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from measure import Contender
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from mem1_core.ops import trajectory_attention
from mem1_core.testing import (
    MEM1_TRAJECTORIES,
    assert_accurate,
    attention_inputs,
    eager_attention,
    mem1_segments,
    random_evict,
    visible_rows,
)
from mem1_core.trajectory import Segment, TrajectoryMask

OURS, DENSE, FLEX, EAGER, CAUSAL = (
    "trajectory_attention", "SDPA dense mask", "FlexAttention", "eager dense mask", "SDPA causal",
)  # fmt: skip
FLEX_BLOCK = 128
MIB = 2**20


def block_mask(mask: TrajectoryMask) -> BlockMask:
    """FlexAttention's block mask straight from our tile plan: O(N + live tiles), where create_block_mask
    visits every pair.

    Flex wants, per query tile, the number and the padded list of the key tiles that need the mask, and of
    those that do not: exactly the plan's two CSR lists.
    """
    plan = mask.tile_plan(FLEX_BLOCK, FLEX_BLOCK)
    batch, tokens = mask.evict.shape
    tiles = -(-tokens // FLEX_BLOCK)

    def padded(offsets: Tensor, members: Tensor) -> tuple[Tensor, Tensor]:
        counts = offsets.diff()
        slots = torch.arange(tiles)
        taken = slots < counts[:, None]
        lists = torch.zeros(batch * tiles, tiles, dtype=torch.int32)
        lists[taken] = members
        return counts.int().view(batch, 1, tiles), lists.view(batch, 1, tiles, tiles)

    evict = mask.evict
    return BlockMask.from_kv_blocks(
        *padded(plan.partial_offsets, plan.partial_tiles),
        *padded(plan.full_offsets, plan.full_tiles),
        BLOCK_SIZE=FLEX_BLOCK,
        mask_mod=lambda b, h, i, j: (j <= i) & (i < evict[b, j]),
        seq_lengths=(tokens, tokens),
    )


def eager_dense(q: Tensor, k: Tensor, v: Tensor, mask: TrajectoryMask) -> Tensor:
    return eager_attention(q, k, v, mask.dense())


def held_bytes(mask: TrajectoryMask | BlockMask) -> int:
    """What a mask keeps in memory between calls."""
    parts = (mask.evict, *mask.plan) if isinstance(mask, TrajectoryMask) else mask.as_tuple()
    return sum(x.nbytes for x in parts if isinstance(x, Tensor))


def shortened(segments: list[Segment]) -> list[Segment]:
    return [Segment(s.kind, s.turn, 1 + s.length // 12) for s in segments]


class Task:
    """One table: the inputs of a trajectory at one dtype and direction, and what the answer should be.

    A sample of the query rows is checked against fp64; all of them would need an N x N matrix per head. The
    gradients are checked for a loss on those rows alone, for which dk and dv are exact on every key.
    """

    def __init__(
        self, segments: list[Segment], heads: tuple[int, int, int], dtype: torch.dtype, backward: bool
    ) -> None:
        self.mask = TrajectoryMask.from_turns(segments)
        self.backward = backward
        n = self.mask.evict.shape[1]
        self.inputs = attention_inputs(1, n, *heads, dtype=dtype, requires_grad=backward)
        generator = torch.Generator().manual_seed(7)
        self.grad = torch.randn(self.inputs[0].shape, generator=generator).to(dtype)
        self.rows = torch.randperm(n, generator=generator)[:128].sort().values
        self.exact, self.eager = self._sampled(torch.float64), self._sampled(dtype)
        # The peers get the layout they like best: heads before tokens, contiguous.
        self.peer_inputs = [
            x.detach().transpose(1, 2).contiguous().requires_grad_(backward) for x in self.inputs
        ]

    def _sampled(self, dtype: torch.dtype) -> list[Tensor]:
        q, k, v = (x.detach().to(dtype) for x in self.inputs)
        q, k, v = (x.requires_grad_(self.backward) for x in (q[:, self.rows], k, v))
        out = eager_attention(q, k, v, visible_rows(self.mask.evict, self.rows))
        if not self.backward:
            return [out]
        return [out.detach(), *torch.autograd.grad(out, (q, k, v), self.grad[:, self.rows].to(dtype))]

    def ours(self, attention: Callable[..., Tensor]) -> list[Tensor]:
        out = attention(*self.inputs, self.mask)
        return [out, *torch.autograd.grad(out, self.inputs, self.grad)] if self.backward else [out]

    def peer(self, attention: Callable[..., Tensor], **options: object) -> list[Tensor]:
        out = attention(*self.peer_inputs, enable_gqa=True, **options)
        if not self.backward:
            return [out]
        return [out, *torch.autograd.grad(out, self.peer_inputs, self.grad.transpose(1, 2))]

    def check_ours(self, results: list[Tensor]) -> None:
        assert_accurate(results[0][:, self.rows], self.eager[0], self.exact[0], name="out")
        if not self.backward:
            return
        sparse = torch.zeros_like(self.grad)
        sparse[:, self.rows] = self.grad[:, self.rows]
        out = trajectory_attention(*self.inputs, self.mask)
        dq, dk, dv = torch.autograd.grad(out, self.inputs, sparse)
        for n, got in enumerate((dq[:, self.rows], dk, dv), start=1):
            assert_accurate(got, self.eager[n], self.exact[n], name=("out", "dq", "dk", "dv")[n])

    def check_peer(self, results: list[Tensor]) -> None:
        out = results[0].transpose(1, 2)[:, self.rows]
        assert_accurate(out, self.eager[0], self.exact[0], factor=4, name="the peer's out")


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")  # small shapes only
@pytest.mark.parametrize("direction", ["forward", "forward+backward"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("tokens", MEM1_TRAJECTORIES)
def test_attention(bench: Any, tokens: int, dtype: torch.dtype, direction: str) -> None:
    segments, heads = MEM1_TRAJECTORIES[tokens], (12, 2, 128)
    if not bench.measuring:
        segments, heads = shortened(segments), (4, 2, 32)
    backward = direction == "forward+backward"
    task = Task(segments, heads, dtype, backward)
    mask, n = task.mask, task.mask.evict.shape[1]

    contenders = [Contender(OURS, lambda: task.ours(trajectory_attention), task.check_ours, held_bytes(mask))]
    affordable = n < 4_000  # dense forward+backward at N 11,852 takes most of a minute and many GiB
    if affordable or not backward:
        dense, sdpa = mask.dense()[:, None], scaled_dot_product_attention
        contenders += [
            Contender(DENSE, lambda: task.peer(sdpa, attn_mask=dense), task.check_peer, dense.nbytes),
            Contender(CAUSAL, lambda: task.peer(sdpa, is_causal=True), note="another function: a scale only"),
        ]
    if not backward:  # FlexAttention has no backward on CPU
        blocks = block_mask(mask)
        flex: Any = flex_attention
        if bench.measuring:
            flex = torch.compile(flex, dynamic=False, fullgraph=True)
        held = held_bytes(blocks) + mask.evict.nbytes
        contenders.append(Contender(FLEX, lambda: task.peer(flex, block_mask=blocks), task.check_peer, held))
    if affordable and dtype == torch.float32:
        contenders.append(Contender(EAGER, lambda: task.ours(eager_dense)))

    hq, hkv, dim = heads
    pairs = mask.visible_pairs()
    title = (
        f"{direction}, {str(dtype).removeprefix('torch.')}, N {n:,}, Hq {hq}, Hkv {hkv}, D {dim}, "
        f"{pairs / (n * n):.1%} of all pairs visible"
    )
    # Two products forward, five backward, 2 FLOPs for each pair, head and channel.
    flops = (14 if backward else 4) * pairs * hq * dim
    results = bench.compare(title, contenders, flops=flops, dtype=dtype)
    bf16 = dtype == torch.bfloat16
    if tokens == 11_852 and not backward:
        bench.goal_speedup(results, OURS, DENSE, 4 if bf16 else 6)
        if not bf16:
            bench.goal_speedup(results, OURS, FLEX, 1.5)
    if tokens == 3_396 and backward:
        bench.goal_speedup(results, OURS, DENSE, 4 if bf16 else 3)


@pytest.mark.parametrize("table", ["MEM1 turns", "random"])
def test_mask_construction(bench: Any, table: str) -> None:
    """128k tokens: from the evict table to the plan for both directions."""
    n = 131_072 if bench.measuring else 1_000
    if table == "random":
        evict = random_evict(n)
    else:
        turns = (n - 1) // 500
        evict = TrajectoryMask.from_turns(mem1_segments(turns, prompt=n - turns * 500)).evict
    assert evict.shape[-1] == n
    built = TrajectoryMask.from_evict(evict)

    def check(mask: TrajectoryMask) -> None:
        assert mask.evict.shape == (1, n)
        assert mask.plan.live_tiles > 0

    contenders = [Contender("TrajectoryMask.from_evict", lambda: TrajectoryMask.from_evict(evict), check)]
    plan = built.plan
    title = (
        f"mask and plan, {table}, N {n:,}, {plan.block_q} x {plan.block_k} tiles, "
        f"{plan.live_ratio:.2%} of them live, {held_bytes(built) / MIB:.2f} MiB in all"
    )
    results = bench.compare(title, contenders, budget_s=1)
    if bench.measuring:
        bench.goal(
            f"mask and plan, {table}", results[contenders[0].name].median * 1e3, 20, at_most=True, unit=" ms"
        )


def test_mask_construction_against_flex(bench: Any) -> None:
    """The mask of the long MEM1 trajectory: ours from the turns, FlexAttention's from our plan, and its own
    way."""
    segments = MEM1_TRAJECTORIES[11_852]
    if not bench.measuring:
        segments = shortened(segments)
    mask = TrajectoryMask.from_turns(segments)
    n, evict = mask.evict.shape[1], mask.evict[0]

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
    contenders = [
        Contender("TrajectoryMask.from_turns", lambda: TrajectoryMask.from_turns(segments)),
        Contender(
            "BlockMask from our plan", lambda: block_mask(TrajectoryMask.from_turns(segments)), check_flex
        ),
        Contender("create_block_mask", visit_every_pair, check_flex),
    ]
    bench.compare(f"mask for one call, N {n:,}", contenders, budget_s=1, min_rounds=1)
