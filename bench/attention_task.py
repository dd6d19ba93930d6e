"""What an attention bench runs: inputs for a mask, candidates on them, and the check of their results."""

from __future__ import annotations

from functools import cached_property, partial

import torch
from measure import Candidate
from peers import Attention, block_mask, flex
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from mem1_core.mask import TrajectoryMask
from mem1_core.ops import trajectory_attention
from mem1_core.testing import assert_accurate, eager_attention

OURS, DENSE, FLEX, EAGER, CAUSAL = (
    "trajectory_attention", "SDPA dense mask", "FlexAttention", "eager dense mask", "SDPA causal",
)  # fmt: skip
SCALE = "another function: a scale only"

# Two products forward, five backward, 2 FLOPs for each pair, head and channel.
FLOPS = {"forward": 4, "backward": 10, "forward+backward": 14}


class Pass:
    """One direction of an attention over given inputs. A call returns [out], or [out, dq, dk, dv].

    The first call is not the one that is timed. It brings the gradient into the memory layout of the output,
    as the layers after an attention do, and backward alone runs its forward there, once.
    """

    def __init__(self, attention: Attention, inputs: list[Tensor], grad: Tensor, direction: str) -> None:
        self.attention, self.inputs, self.grad, self.direction = attention, inputs, grad, direction
        self.out: Tensor | None = None

    def __call__(self) -> list[Tensor]:
        out = self.attention(*self.inputs) if self.out is None else self.out
        if self.direction == "forward":
            return [out]
        if self.grad.stride() != out.stride():
            self.grad = torch.empty_like(out).copy_(self.grad)
        alone = self.direction == "backward"
        if alone:
            self.out = out
        return [out, *torch.autograd.grad(out, self.inputs, self.grad, retain_graph=alone)]


class Task:
    """A mask with inputs of one dtype on the mask's device, and what the answer should be.

    A sample of the query rows is checked against fp64; all of them would need an N x N matrix per head. The
    gradients are checked for a loss on those rows alone: there dk and dv are exact on every key, and 0 on the
    keys that none of the rows sees.
    """

    def __init__(
        self, mask: TrajectoryMask, heads: tuple[int, int, int], dtype: torch.dtype, name: str = ""
    ) -> None:
        self.mask, self.heads, self.dtype, self.name = mask, heads, dtype, name
        hq, hkv, dim = heads
        n, device = mask.evict_at.shape[1], mask.device
        # On the device: the host takes half a minute for the inputs of 64 trajectories.
        generator = torch.Generator(device).manual_seed(0)

        def draw(heads: int) -> Tensor:
            return torch.randn(1, n, heads, dim, generator=generator, device=device).to(dtype)

        self.tensors = [draw(hq), draw(hkv), draw(hkv), draw(hq)]  # q, k, v, the gradient of out
        self.rows = torch.randperm(n, generator=generator, device=device)[:128].sort().values
        visible = mask.visible(self.rows)
        self.seen = visible[0].any(dim=0)
        self._visible = visible[:, :, self.seen]
        self.exact, self.eager = self._sampled(torch.float64), self._sampled(dtype)

    def _sampled(self, dtype: torch.dtype) -> list[Tensor]:
        """out, dq of the sampled rows; dk, dv of the keys that they see."""
        q, k, v, grad = self.tensors
        inputs = [x.to(dtype).requires_grad_() for x in (q[:, self.rows], k[:, self.seen], v[:, self.seen])]
        out = eager_attention(*inputs, self._visible)
        return [out.detach(), *torch.autograd.grad(out, inputs, grad[:, self.rows].to(dtype))]

    @cached_property
    def heads_first(self) -> list[Tensor]:
        """The tensors as SDPA and FlexAttention like them best: q, k, v contiguous in [B, H, N, D]."""
        q, k, v, grad = (x.transpose(1, 2) for x in self.tensors)
        return [q.contiguous(), k.contiguous(), v.contiguous(), grad]

    @cached_property
    def blocks(self) -> BlockMask:
        return block_mask(self.mask)

    @cached_property
    def dense(self) -> Tensor:
        return self.mask.dense()[:, None]

    def ours(self, direction: str) -> Candidate:
        run = self._pass(partial(trajectory_attention, mask=self.mask), self.tensors, direction)
        return Candidate(OURS, run, partial(self._check_ours, direction), held_bytes(self.mask))

    def eager_dense(self, direction: str) -> Candidate:
        def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return eager_attention(q, k, v, self.mask.dense())

        return Candidate(EAGER, self._pass(attention, self.tensors, direction))

    def peer(
        self,
        name: str,
        attention: Attention,
        direction: str,
        *,
        heads_first: bool = True,
        same_function: bool = True,
        held_bytes: int = 0,
    ) -> Candidate:
        run = self._pass(attention, self.heads_first if heads_first else self.tensors, direction)
        check = partial(self._check_peer, heads_first) if same_function else None
        return Candidate(name, run, check, held_bytes, "" if same_function else SCALE, peer=True)

    def flex(self, direction: str, compiled: bool) -> Candidate:
        held = held_bytes(self.blocks) + self.mask.evict_at.nbytes
        return self.peer(FLEX, flex(self.blocks, compiled), direction, held_bytes=held)

    def _pass(self, attention: Attention, tensors: list[Tensor], direction: str) -> Pass:
        # On a CUDA device the forward is that of training too: FlexAttention compiles once for both.
        training = direction != "forward" or self.mask.device.type == "cuda"
        inputs = [x.detach().requires_grad_(training) for x in tensors[:3]]
        return Pass(attention, inputs, tensors[3], direction)

    def _check_ours(self, direction: str, results: list[Tensor]) -> None:
        assert_accurate(results[0][:, self.rows], self.eager[0], self.exact[0], name="out")
        if direction == "forward":
            return
        sparse = torch.zeros_like(self.tensors[3])
        sparse[:, self.rows] = self.tensors[3][:, self.rows]
        inputs = [x.detach().requires_grad_() for x in self.tensors[:3]]
        out = trajectory_attention(*inputs, self.mask)
        dq, dk, dv = torch.autograd.grad(out, inputs, sparse)
        sampled = dq[:, self.rows], dk[:, self.seen], dv[:, self.seen]
        for n, got in enumerate(sampled, start=1):
            assert_accurate(got, self.eager[n], self.exact[n], name=("out", "dq", "dk", "dv")[n])
        for name, got in (("dk", dk), ("dv", dv)):
            assert not got[:, ~self.seen].any(), f"{name}: not 0 on a key that no row of the loss sees"

    def _check_peer(self, heads_first: bool, results: list[Tensor]) -> None:
        out = results[0].transpose(1, 2) if heads_first else results[0]
        assert_accurate(out[:, self.rows], self.eager[0], self.exact[0], factor=4, name="the peer's out")

    @cached_property
    def pairs(self) -> int:
        return self.mask.visible_pairs()

    def flops(self, direction: str) -> float:
        """Of the visible pairs: what the task needs, whatever an implementation computes."""
        return float(FLOPS[direction] * self.pairs * self.heads[0] * self.heads[2])

    def title(self, direction: str) -> str:
        n, (hq, hkv, dim) = self.mask.evict_at.shape[1], self.heads
        kind = f"{self.name}, {direction}" if self.name else direction
        return (
            f"{kind}, {str(self.dtype).removeprefix('torch.')}, N {n:,}, Hq {hq}, Hkv {hkv}, D {dim}, "
            f"{self.pairs / (n * n):.1%} of all pairs visible"
        )


def held_bytes(mask: TrajectoryMask | BlockMask) -> int:
    """What a mask keeps in memory between calls."""
    parts: tuple[object, ...]
    if isinstance(mask, TrajectoryMask):
        parts = (mask.evict_at, mask.positions, *mask.plan, *(mask.plan.key_lists or ()))
    else:
        parts = mask.as_tuple()
    return sum(x.nbytes for x in parts if isinstance(x, Tensor))
