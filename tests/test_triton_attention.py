"""trajectory_attention's Triton kernels, where the common body of test_attention.py does not reach: on the
GPU, or interpreted where torch sees none; at the end what needs one."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_attention import check, equal, mask_of, results
from test_tile_plan import no_wait
from torch import Tensor

from mem1_core import _library, reference
from mem1_core.layout import TrajectoryLayout
from mem1_core.mask import TrajectoryMask
from mem1_core.ops import trajectory_attention
from mem1_core.sample_inputs import (
    EVICT_TABLES,
    adversarial_evict,
    attention_inputs,
    causal_evict,
    mem1_segments,
    random_evict,
)
from mem1_core.testing import assert_accurate, eager_attention, gradients
from mem1_core.triton.attention_blocks import HEAD_DIMS, HOPPER_HALF, blocks

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None,
    reason="needs Triton, which is not installed (there is none but for Linux)",
)

MODULE, BACKWARD = "mem1_core.triton.attention_launch", "mem1_core.triton.attention_backward"
on_device = pytest.mark.parametrize(
    "device", [pytest.param("cuda", marks=pytest.mark.gpu)] if torch.cuda.is_available() else ["cpu"]
)
every_dtype = pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16, torch.float32], ids=["bf16", "fp16", "fp32"]
)


def tables(name: str, batch: int, tokens: int) -> Tensor:
    return torch.stack([EVICT_TABLES[name](tokens, row) for row in range(batch)])


def attend(*arguments: Any, **options: Any) -> Any:
    return trajectory_attention(*arguments, backend="triton", **options)


# ------------------------------------------------------------------------------------------- the function


@on_device
@pytest.mark.parametrize("table", EVICT_TABLES)
def test_float16(device: str, table: str) -> None:
    inputs = attention_inputs(2, 200, 4, 2, 64, dtype=torch.float16, device=device)
    check(inputs, tables(table, 2, 200), "triton")


# A dim between two of HEAD_DIMS is padded. One dtype for most, as compiling takes a GPU seconds per kernel.
@on_device
@pytest.mark.parametrize(
    ("dim", "dtype"),
    [
        (1, torch.float32),
        (17, torch.float16),
        (40, torch.float32),
        (80, torch.float16),
        (100, torch.float32),
        (160, torch.float16),
        (192, torch.bfloat16),
        (192, torch.float32),
        (200, torch.float16),
    ],
    ids=str,
)
def test_head_dims(device: str, dim: int, dtype: torch.dtype) -> None:
    check(attention_inputs(1, 70, 4, 2, dim, dtype=dtype, device=device), random_evict(70), "triton")


@on_device
@pytest.mark.parametrize("n", [1, 127, 128, 129, 255, 256, 257])
def test_lengths_of_a_batch(device: str, n: int) -> None:
    """Rows of evict that do not begin at a multiple of 16 bytes, and ends on either side of a tile's."""
    inputs = attention_inputs(2, n, 4, 2, 16, dtype=torch.float16, device=device)
    check(inputs, tables("adversarial", 2, n), "triton")


@on_device
@pytest.mark.parametrize(("programs", "share"), [(0, 4), (8, 2), (2**31, 1)])
@pytest.mark.parametrize(
    ("rows", "dtype"), [(1, torch.float32), (2, torch.float16)], ids=["one mask", "own masks"]
)
def test_who_sums_over_query_heads(
    device: str, rows: int, dtype: torch.dtype, programs: int, share: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A program over all four, two of them, or one; 2 tiles, 2 batches and 4 heads make 16 at most."""
    kernel = importlib.import_module(BACKWARD).backward_dk_dv
    shares = []

    class Recorded:
        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            def launch(**arguments: Any) -> None:
                shares.append(arguments["heads_per_program"])
                kernel[grid](**arguments)

            return launch

    monkeypatch.setattr(f"{MODULE}.MIN_PROGRAMS", programs)
    monkeypatch.setattr(f"{BACKWARD}.backward_dk_dv", Recorded())
    inputs = attention_inputs(2, 131, 4, 1, 32, dtype=dtype, device=device)
    check(inputs, tables("random", rows, 131), "triton")
    monkeypatch.setattr(f"{MODULE}.MAX_SUMMED", 131 * share - 1)
    check(inputs, tables("random", rows, 131), "triton")
    assert shares == [share, max(1, share // 2)]


@pytest.mark.parametrize("dim", HEAD_DIMS)
@pytest.mark.parametrize("kernel", HOPPER_HALF)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("plain", [True, False], ids=["plain", "options"])
def test_no_hopper_blocks_of_a_kind_that_computed_wrong_results(
    kernel: str, dim: int, dtype: torch.dtype, plain: bool
) -> None:
    """On an H200 under Triton 3.6: 64 rows for 8 warps, with 16 tokens in a step of the loop."""
    shape = blocks(kernel, dim, dtype, hopper=True, plain=plain)
    rows, step = (shape.k, shape.q) if kernel == "backward_dk_dv" else (shape.q, shape.k)
    assert rows >= 16 * shape.warps or step > 16


@on_device
@every_dtype
def test_rows_that_see_no_key(device: str, dtype: torch.dtype) -> None:
    """Out 0, lse -inf, no gradients. The host refuses to plan for such lifetimes, the device does not."""
    evict = random_evict(200).clamp(max=130)
    evict[150:] = 200
    evict[:60] = 0
    evict[130:150] = 7  # before their own time
    i = torch.arange(200)
    visible = (i <= i[:, None]) & (i[:, None] < evict)
    blind, unseen = ~visible.any(1), ~visible.any(0)
    assert blind.sum() == 60 + 20 and unseen.sum() == 60 + 20
    # Every tile on or below the diagonal, all of them masked: evict, then the fields of a TilePlan.
    plan = [evict[None], torch.tensor([[[0, 0, 0, 2], [1, 1, 1, 2]]])]
    plan += [torch.tensor(x) for x in ([0, 0, 0], [], [0, 1, 3], [0, 0, 1], [1, 0], [0, 1])]
    arguments = *(x.to(device, torch.int32) for x in plan), 128, 128, 0.25

    def hand_made(q: Tensor, k: Tensor, v: Tensor, return_lse: bool) -> tuple[Tensor, Tensor]:
        return torch.ops.mem1_core.trajectory_attention_triton(q, k, v, *arguments)

    inputs = attention_inputs(1, 200, 4, 2, 16, dtype=dtype, device=device)
    out, lse, dq, dk, dv = got = results(hand_made, *inputs)
    assert not out[:, blind].any() and not dq[:, blind].any()
    assert (lse[..., blind] == -torch.inf).all() and lse[..., ~blind].isfinite().all()
    assert not dk[:, unseen].any() and not dv[:, unseen].any()
    mask = SimpleNamespace(dense=lambda: visible[None].to(device))
    want = results(reference.trajectory_attention, *(x.double() for x in inputs), mask, scale=0.25)
    for ours, exact in zip(got, want, strict=True):
        tolerance = 1e-5 if ours.dtype == torch.float32 == dtype else 0.03
        torch.testing.assert_close(ours.double(), exact, rtol=tolerance, atol=tolerance)


# ----------------------------------------------------------------------------------------- places in memory


def off_by_one(x: Tensor) -> Tensor:
    """The same values in a view that begins one element into its storage, at no multiple of 16 bytes."""
    return x.new_empty(x.numel() + 1)[1:].view(x.shape).copy_(x)


PLACES: dict[str, Callable[[Tensor], Tensor]] = {
    "odd offset": off_by_one,
    "aligned rows": lambda x: torch.nn.functional.pad(x, (0, 12), value=torch.nan)[..., :-12],
    "channels apart": lambda x: torch.stack([x, torch.full_like(x, torch.nan)], dim=-1)[..., 0],
}


@on_device
@pytest.mark.parametrize("dim", [20, 32])
@pytest.mark.parametrize("place", PLACES)
def test_places_do_not_matter(device: str, place: str, dim: int) -> None:
    """What the copy engine cannot read is copied, as rows of 20 channels, which are no multiple of 16 bytes:
    the results are the same bit for bit."""
    mask = mask_of(random_evict(70).to(device))
    inputs = attention_inputs(2, 70, 4, 2, dim, dtype=torch.float16, device=device)
    out, lse = attend(*(x.requires_grad_() for x in inputs), mask, return_lse=True)
    d_out, d_lse = torch.ones_like(out).cumsum(1) / 70, torch.ones_like(lse).cumsum(2) / 70
    want = torch.autograd.grad([out, lse], inputs, [d_out, d_lse])
    there = [PLACES[place](x.detach()).requires_grad_() for x in inputs]
    assert all(x.stride() != y.stride() or y.data_ptr() % 16 for x, y in zip(inputs, there, strict=True))
    moved = attend(*there, mask, return_lse=True)
    assert equal([out, lse], moved)
    got = torch.autograd.grad(moved, there, [PLACES[place](d_out), PLACES["odd offset"](d_lse)])
    assert equal(want, got)


@on_device
def test_expanded_tensors(device: str) -> None:
    """Strides of 0, also in the gradients that come in."""
    mask = mask_of(random_evict(70).to(device))
    q, k, v = attention_inputs(1, 70, 4, 1, 32, dtype=torch.float16, device=device)
    wide = [q.expand(2, -1, -1, -1), k.expand(2, -1, 2, -1), v.expand(2, -1, 2, -1)]

    found = []
    for place in (Tensor.detach, Tensor.contiguous):
        inputs = [place(x).requires_grad_() for x in wide]
        made = attend(*inputs, mask, return_lse=True)
        ones = [place(x.new_ones(()).expand_as(x)) for x in made]
        found.append([*made, *torch.autograd.grad(made, inputs, ones)])
    assert equal(*found)


@on_device
@pytest.mark.parametrize("batch", [1, 2])
def test_lifetimes_anywhere_in_memory(device: str, batch: int) -> None:
    evict = tables("adversarial", batch, 130).to(device)
    inputs = attention_inputs(batch, 130, 4, 2, 16, dtype=torch.float16, device=device)
    want = results(attend, *inputs, TrajectoryMask(evict))
    assert equal(want, results(attend, *inputs, TrajectoryMask(off_by_one(evict))))


# ------------------------------------------------------------------------------------------ what is refused


@on_device
def test_what_the_kernels_cannot_do_is_refused(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mask = mask_of(causal_evict(70).to(device))
    q, k, v = inputs = attention_inputs(1, 70, 4, 2, 16, device=device)

    def call(op: Any, *tensors: Tensor | None, block: int = 128, scale: float = 0.25) -> None:
        op(*tensors, mask.evict_at, *mask.tile_plan(block, block).tensors, block, block, scale)

    ops = torch.ops.mem1_core
    forward = partial(call, ops.trajectory_attention_triton, q, k, v)
    backward = partial(call, ops.trajectory_attention_triton_backward, q, None, q, k, v, q, q[..., 0].mT)
    for op in (forward, backward):
        op()
        with pytest.raises(ValueError, match=r"^mask: expected a plan of 128 x 128 tiles, got 64 x 64"):
            op(block=64)
        with pytest.raises(ValueError, match=r"^scale: expected > 0 here \(mem1_core.ops takes any\), got 0"):
            op(scale=0.0)
    with pytest.raises(TypeError, match=r"^q: expected bfloat16, float16 or float32 .* got torch.float64"):
        attend(*(x.double() for x in inputs), mask)
    with pytest.raises(ValueError, match=r"^q: expected dim <= 256 on CUDA, got 257"):
        attend(*attention_inputs(1, 70, 4, 2, 257, device=device), mask)
    monkeypatch.setattr(f"{MODULE}._capability", lambda device: (7, 5))
    with pytest.raises(NotImplementedError, match=r"GPU of compute capability 8.0 or later, got 7.5"):
        attend(*inputs, mask)


@on_device
@pytest.mark.parametrize(
    ("argument", "change", "error", "message"),
    [
        ("k", lambda x: x.half(), TypeError, "expected torch.float32, got torch.float16"),
        ("v", lambda x: x[:, :-1], ValueError, r"expected shape \[1, 300, 2, 16\], got \[1, 299, 2, 16\]"),
        ("evict", lambda x: x.long(), TypeError, "expected torch.int32, got torch.int64"),
        ("full_offsets", lambda x: x[1:], ValueError, r"expected shape \[4\], got \[3\]"),
        (
            "key_ranges",
            lambda x: x.mT.contiguous().mT,
            ValueError,
            "expected a contiguous tensor, got strides",
        ),
        ("key_order", lambda x: x[:2], ValueError, r"expected shape \[3\], got \[2\]"),
    ],
)
def test_direct_calls_are_checked(
    device: str, argument: str, change: Any, error: type[Exception], message: str
) -> None:
    mask = mask_of(random_evict(300).to(device))
    plan = mask.tile_plan(128, 128)
    q, k, v = attention_inputs(1, 300, 4, 2, 16, device=device)
    arguments = {"q": q, "k": k, "v": v, "evict": mask.evict_at, **plan._asdict(), "scale": 0.25}
    del arguments["key_lists"]  # which are arguments of their own
    arguments[argument] = change(arguments[argument])
    with pytest.raises(error, match=f"^{argument}: {message}"):
        torch.ops.mem1_core.trajectory_attention_triton(**arguments)


def test_cpu_tensors_are_refused_but_by_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"{MODULE}.INTERPRETED", False)
    with pytest.raises(ValueError, match="^backend: 'triton': expected cuda tensors, got one on cpu"):
        attend(*attention_inputs(1, 70, 4, 2, 16), mask_of(causal_evict(70)))


# ------------------------------------------------------------------------------------------- torch.compile


@on_device
def test_opcheck(device: str) -> None:
    ops = torch.ops.mem1_core
    mask = mask_of(random_evict(70).to(device))
    arguments = mask.evict_at, *mask.tile_plan(128, 128).tensors, 128, 128, 0.25
    inputs = attention_inputs(1, 70, 4, 2, 16, dtype=torch.float16, device=device, requires_grad=True)
    torch.library.opcheck(ops.trajectory_attention_triton.default, (*inputs, *arguments))
    inputs = tuple(x.detach() for x in inputs)
    out, lse = ops.trajectory_attention_triton(*inputs, *arguments)
    for d_lse in (None, torch.ones_like(lse)):
        saved = torch.ones_like(out), d_lse, *inputs, out, lse, *arguments
        torch.library.opcheck(ops.trajectory_attention_triton_backward.default, saved)


@on_device
@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.gpu)])
def test_compile(device: str, compiler: str) -> None:
    torch.compiler.reset()

    def block(q: Tensor, k: Tensor, v: Tensor, mask: TrajectoryMask) -> tuple[Tensor, Tensor]:
        out, lse = attend(q.sin(), k, v * 2, mask, return_lse=True)
        return out.cos(), lse + 1

    compiled = torch.compile(block, backend=compiler, fullgraph=True, dynamic=True)
    for n in (70, 131):
        mask = mask_of(random_evict(n).to(device))
        inputs = attention_inputs(1, n, 4, 2, 16, device=device, requires_grad=True)
        got, want = compiled(*inputs, mask), block(*inputs, mask)
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(gradients(list(got), inputs), gradients(list(want), inputs))


# ------------------------------------------------------------------------------------------- on a GPU only


@pytest.mark.gpu
@every_dtype
@pytest.mark.parametrize("dim", HEAD_DIMS)
def test_every_block_shape(dtype: torch.dtype, dim: int) -> None:
    inputs = attention_inputs(1, 1_000, 4, 2, dim, dtype=dtype, device="cuda")
    check(inputs, adversarial_evict(1_000), "triton")


@pytest.mark.gpu
@pytest.mark.parametrize("programs", [0, 2**31], ids=["a program per KV head", "a program per query head"])
def test_five_runs_are_one(programs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"{MODULE}.MIN_PROGRAMS", programs)
    mask = mask_of(adversarial_evict(4_000).cuda())
    inputs = attention_inputs(4, 4_000, 4, 2, 128, dtype=torch.bfloat16, device="cuda")
    first = results(attend, *inputs, mask)
    for _ in range(4):
        assert equal(results(attend, *inputs, mask), first)


class Step:
    """Forward and backward on tensors that stay where they are."""

    def __init__(self) -> None:
        self.evict = tables("causal", 2, 1_000).cuda()
        inputs = attention_inputs(2, 1_000, 4, 2, 128, dtype=torch.bfloat16, device="cuda")
        self.inputs = [x.requires_grad_() for x in inputs]
        self.d_out, self.d_lse = torch.empty_like(self.inputs[0]), torch.empty(2, 4, 1_000, device="cuda")
        self.fill(0)

    @torch.no_grad()
    def fill(self, seed: int) -> None:
        """New values in the same places."""
        torch.manual_seed(seed)
        for x in (*self.inputs, self.d_out, self.d_lse):
            x.normal_()

    def __call__(self, mask: TrajectoryMask) -> list[Tensor]:
        made = attend(*self.inputs, mask, return_lse=True)
        return [*made, *torch.autograd.grad(made, self.inputs, [self.d_out, self.d_lse])]


@pytest.mark.gpu
def test_the_host_does_not_wait() -> None:
    step = Step()
    mask = TrajectoryMask(step.evict)
    want = step(mask)
    with no_wait():
        got = step(mask)
    assert equal(got, want)


@pytest.mark.gpu
@pytest.mark.parametrize("with_mask", [False, True])
def test_cuda_graph(with_mask: bool) -> None:
    """Captured once, replayed for other values, and for other lifetimes where the graph makes the mask."""
    if with_mask and not _library.cuda_architectures():
        pytest.skip("built without CUDA code: the host plans, and waits")
    step = Step()
    mask = TrajectoryMask(step.evict)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # compiles and loads the kernels
        step(TrajectoryMask(step.evict) if with_mask else mask)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        made = step(TrajectoryMask(step.evict) if with_mask else mask)
    for seed, table in enumerate(EVICT_TABLES if with_mask else ["causal"] * 2, 1):
        step.fill(seed)
        step.evict.copy_(tables(table, 2, 1_000))
        graph.replay()
        got = [x.clone() for x in made]
        assert equal(got, step(TrajectoryMask(step.evict)))


@pytest.mark.gpu
@pytest.mark.memory
def test_a_million_tokens() -> None:
    """Offsets past 2^31, checked on windows of queries and the keys that only those see."""
    segments = mem1_segments(2_096, prompt=576)
    heads, dim, gib = 17, 128, 2**30
    mask = TrajectoryLayout.from_segments(segments).mask.to("cuda")
    tokens = mask.shape[1]
    assert tokens == 2**20 and tokens * heads * dim > 2**31
    torch.cuda.reset_peak_memory_stats()
    torch.manual_seed(0)
    sizes = [(1, tokens, h, dim) for h in (heads, 1, 1, heads)]
    q, k, v, d_out = (torch.randn(size, device="cuda", dtype=torch.bfloat16) for size in sizes)
    inputs = [x.requires_grad_() for x in (q, k, v)]
    out = attend(*inputs, mask)
    dq, dk, dv = torch.autograd.grad(out, inputs, d_out)
    peak = torch.cuda.max_memory_allocated()
    assert peak < 30 * gib, f"{peak / gib:.1f} GiB"

    # The weights of a query sum to 1: the prompt's keys, seen by all queries, are in this.
    # In parts: a sum in fp64 makes a copy in fp64 of what it adds up.
    total = [
        torch.stack([part.sum((0, 1, 2), dtype=torch.float64) for part in x.split(2**15, dim=1)]).sum(0)
        for x in (dv, d_out)
    ]
    # d_out sums to some 4,000. Cut off in fp32 instead of rounded, as tensor cores do, a sum of a million
    # tokens is 0.15 % off.
    torch.testing.assert_close(*total, rtol=0, atol=16.0)

    evict, keys = mask.evict_at[0], torch.arange(tokens, device="cuda")
    for first in (0, tokens // 2 - 1_000, tokens - 2_048):
        rows = slice(first, first + 2_048)
        seen = ((keys < rows.stop) & (evict > first)).nonzero()[:, 0]
        inside = ((seen >= first) & (evict[seen] <= rows.stop) & (seen >= 576)).nonzero()[:, 0]
        visible = ((seen <= keys[rows, None]) & (keys[rows, None] < evict[seen]))[None]
        assert len(inside) >= 1_000
        found = []
        for dtype in (torch.bfloat16, torch.float64):
            part = [x.detach().to(dtype).requires_grad_() for x in (q[:, rows], k[:, seen], v[:, seen])]
            made = eager_attention(*part, visible)
            dq_part, *dkv_part = torch.autograd.grad(made, part, d_out[:, rows].to(dtype))
            found.append([made, dq_part, *(x[:, inside] for x in dkv_part)])
        got = [out[:, rows], dq[:, rows], dk[:, seen[inside]], dv[:, seen[inside]]]
        for name, ours, eager, exact in zip(("out", "dq", "dk", "dv"), got, *found, strict=True):
            assert_accurate(ours, eager, exact, name=name)
