"""trajectory_attention at its borders: bad inputs, torch.compile, direct calls, memory."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from mem1_core.backend import choose_backend
from mem1_core.mask import TrajectoryMask
from mem1_core.ops import trajectory_attention
from mem1_core.sample_inputs import attention_inputs, causal_evict, random_evict
from mem1_core.testing import attention_backends, gradients

mask_of = TrajectoryMask.from_evict

# -------------------------------------------------------------------------------------------- bad inputs

REFUSED = (TypeError, ValueError, RuntimeError, NotImplementedError)


# What is wrong: (the argument that the message must name, the arguments that differ from good ones)
BAD_INPUTS: dict[str, tuple[str, Callable[[], dict[str, Any]]]] = {
    "q not a tensor": ("q", lambda: {"q": [1.0]}),
    "q of rank 3": ("q", lambda: {"q": torch.zeros(10, 4, 16)}),
    "k of rank 3": ("k", lambda: {"k": torch.zeros(10, 2, 16)}),
    "v of rank 5": ("v", lambda: {"v": torch.zeros(1, 2, 10, 2, 16)}),
    "k of another dtype": ("k", lambda: {"k": torch.zeros(2, 10, 2, 16, dtype=torch.bfloat16)}),
    "v of another dtype": ("v", lambda: {"v": torch.zeros(2, 10, 2, 16, dtype=torch.float64)}),
    "k of another batch": ("k", lambda: {"k": torch.zeros(3, 10, 2, 16)}),
    "k of another length": ("k", lambda: {"k": torch.zeros(2, 11, 2, 16)}),
    "v of another length": ("v", lambda: {"v": torch.zeros(2, 9, 2, 16)}),
    "k of another head size": ("k", lambda: {"k": torch.zeros(2, 10, 2, 8)}),
    "v of no channels": ("v", lambda: {"v": torch.zeros(2, 10, 2, 0)}),
    "v of other heads": ("v", lambda: {"v": torch.zeros(2, 10, 1, 16)}),
    "Hq not a multiple of Hkv": ("k", lambda: dict.fromkeys("kv", torch.zeros(2, 10, 3, 16))),
    "no key heads": ("k", lambda: dict.fromkeys("kv", torch.zeros(2, 10, 0, 16))),
    "q strided in D": ("q", lambda: {"q": torch.zeros(2, 10, 4, 32)[..., ::2]}),
    "k strided in D": ("k", lambda: {"k": torch.zeros(2, 10, 16, 2).transpose(2, 3)}),
    "v strided in D": ("v", lambda: {"v": torch.zeros(2, 10, 2, 32)[..., ::2]}),
    "mask too short": ("mask", lambda: {"mask": mask_of(causal_evict(9))}),
    "mask of another batch": ("mask", lambda: {"mask": mask_of(causal_evict(10).expand(3, -1))}),
    "mask a tensor": ("mask", lambda: {"mask": causal_evict(10)}),
    "mask missing": ("mask", lambda: {"mask": None}),
    "scale not a number": ("scale", lambda: {"scale": "1"}),
    "backend unknown": ("backend", lambda: {"backend": "fast"}),
    "backend of another device": ("backend", lambda: {"backend": "cuda"}),
}


@pytest.mark.parametrize(
    ("backend", "wrong"),
    [
        (backend, wrong)
        for backend, device in attention_backends()
        if device == "cpu" and backend != "reference"
        for wrong in BAD_INPUTS
        if not (backend == "triton" and "strided" in wrong)  # copies those
    ],
)
def test_bad_input(backend: str, wrong: str) -> None:
    name, changes = BAD_INPUTS[wrong]
    q, k, v = attention_inputs(2, 10, 4, 2, 16)
    good: dict[str, Any] = {"q": q, "k": k, "v": v, "mask": mask_of(causal_evict(10)), "backend": backend}
    trajectory_attention(**good)
    with pytest.raises(REFUSED, match=rf"\b{name}\b"):
        trajectory_attention(**good | changes())


@pytest.mark.parametrize("dtype", [torch.float16, torch.int32, torch.complex64], ids=str)
def test_unsupported_dtype(dtype: torch.dtype) -> None:
    q, k, v = (x.to(dtype) for x in attention_inputs(1, 10, 4, 2, 16))
    with pytest.raises(REFUSED, match=r"\bq\b.*expected float32"):
        trajectory_attention(q, k, v, mask_of(causal_evict(10)))


def test_unsupported_device() -> None:
    mask = mask_of(causal_evict(10))
    q, k, v = attention_inputs(1, 10, 4, 2, 16)
    with pytest.raises(REFUSED, match="meta"):
        trajectory_attention(q.to("meta"), k.to("meta"), v.to("meta"), mask)
    with pytest.raises(REFUSED, match=r"\bk\b.*meta"):
        trajectory_attention(q, k.to("meta"), v, mask)


def on(device: str) -> Any:
    """Stands in for a tensor on a device that the machine may not have."""
    return SimpleNamespace(device=torch.device(device))


def test_choice_of_a_backend() -> None:
    cpu, cuda, meta = (on(device) for device in ("cpu", "cuda", "meta"))
    every = ("cpu", "triton", "reference")
    for tensor, requested, chosen in (
        (cpu, "auto", "cpu"),
        (cuda, "auto", "triton"),
        (cpu, "triton", "triton"),  # it finds out itself whether it is interpreted
        (meta, "reference", "reference"),
    ):
        assert choose_backend("gae", tensor, requested, every) == chosen
    with pytest.raises(NotImplementedError, match="^gae: expected a cpu or cuda tensor, got one on meta$"):
        choose_backend("gae", meta, "auto", every)
    with pytest.raises(ValueError, match="^backend: expected 'auto', .* or 'reference', got 'fast'$"):
        choose_backend("gae", cpu, "fast", every)
    with pytest.raises(ValueError, match="^backend: 'cpu': expected cpu tensors, got one on cuda$"):
        choose_backend("gae", cuda, "cpu", every)


def test_a_backend_that_is_not_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where Triton is not installed: the error says so, and what there is instead."""
    missing = (
        "^trajectory_attention: the 'triton' backend is not available in this build "
        r"\(available: cpu, reference\); "
        "it needs `pip install triton`; backend='reference' runs anywhere, slowly$"
    )
    monkeypatch.setattr("mem1_core.ops.attention._AVAILABLE", ("cpu", "reference"))
    inputs, mask = attention_inputs(1, 10, 4, 2, 16), mask_of(causal_evict(10))
    with pytest.raises(NotImplementedError, match=missing):
        trajectory_attention(*inputs, mask, backend="triton")
    nothing = (
        "^gae: expected a backend for cuda tensors, got cpu, reference; attention needs `pip install triton`"
    )
    with pytest.raises(NotImplementedError, match=nothing + ", all else a build with nvcc; "):
        choose_backend("gae", on("cuda"), "auto", ("cpu", "reference"))
    with pytest.raises(
        NotImplementedError,
        match="the 'cuda' backend is not available in this build .* cpu, reference.; back",
    ):
        trajectory_attention(*inputs, mask, backend="cuda")


# ------------------------------------------------------------------------------------------- torch.compile


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_opcheck(dtype: torch.dtype) -> None:
    ops = torch.ops.mem1_core
    mask = mask_of(random_evict(70))
    q, k, v = attention_inputs(1, 70, 4, 2, 16, dtype=dtype, requires_grad=True)
    plan = mask.plan
    arguments = (mask.evict_at, *plan.tensors, plan.block_q, plan.block_k, 0.25)
    torch.library.opcheck(ops.tile_plan.default, (mask.evict_at, 64, 64))
    torch.library.opcheck(ops.trajectory_attention.default, (q, k, v, *arguments))
    with torch.no_grad():
        out, lse = ops.trajectory_attention(q, k, v, *arguments)
    inputs = [t.detach() for t in (q, k, v)]
    for d_lse in (None, torch.ones_like(lse)):
        saved = (torch.ones_like(out), d_lse, *inputs, out, lse, *arguments)
        torch.library.opcheck(ops.trajectory_attention_backward.default, saved)


def test_second_derivative_is_refused() -> None:
    q, k, v = attention_inputs(1, 10, 4, 2, 16, requires_grad=True)
    out = trajectory_attention(q, k, v, mask_of(causal_evict(10)))
    (dq,) = torch.autograd.grad(out.square().sum(), [q], create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        torch.autograd.grad(dq.square().sum(), [k])


# ------------------------------------------------------------------------ direct calls of the registered ops


def damaged(damage: str) -> tuple[object, ...]:
    mask = mask_of(causal_evict(130))
    parts = [part.clone() for part in mask.plan.tensors]
    if damage == "offsets":
        parts[3][1] = 10**8
    elif damage == "tiles":
        parts[4][0] = 10**8
    elif damage == "short":
        parts[1] = parts[1][:-1]
    return (mask.evict_at, *parts, 64, 64, 0.25)


@pytest.mark.parametrize("damage", ["offsets", "tiles", "short"])
def test_a_wrong_plan_is_refused(damage: str) -> None:
    q, k, v = attention_inputs(1, 130, 2, 1, 16)
    with pytest.raises(ValueError, match="mask: expected"):
        torch.ops.mem1_core.trajectory_attention(q, k, v, *damaged(damage))


def test_the_cpu_reads_neither_ranges_nor_orders() -> None:
    inputs = attention_inputs(1, 130, 2, 1, 16)
    evict, _, *lists_and_orders = damaged("nothing")
    nothing = torch.empty(0, dtype=torch.int32)
    others = (evict, nothing, *lists_and_orders[:4], nothing, nothing, 64, 64, 0.25)
    ops = torch.ops.mem1_core
    out, lse = ops.trajectory_attention(*inputs, *others)
    assert torch.equal(out, ops.trajectory_attention(*inputs, *damaged("nothing"))[0])
    saved = (out, None, *inputs, out, lse)
    got = ops.trajectory_attention_backward(*saved, *others)
    want = ops.trajectory_attention_backward(*saved, *damaged("nothing"))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_wrong_statistics_are_refused() -> None:
    q, k, v = attention_inputs(1, 130, 2, 1, 16)
    good = damaged("nothing")
    out, lse = torch.ops.mem1_core.trajectory_attention(q, k, v, *good)
    backward = torch.ops.mem1_core.trajectory_attention_backward
    with pytest.raises(ValueError, match="^lse: expected shape"):
        backward(out, None, q, k, v, out, lse[:, :1, :1], *good)
    with pytest.raises(TypeError, match="^d_lse: expected"):
        backward(out, lse.double(), q, k, v, out, lse, *good)


def test_tile_plan_refuses_what_it_cannot_index() -> None:
    plan = torch.ops.mem1_core.tile_plan
    with pytest.raises(ValueError, match="block_q"):
        plan(causal_evict(64)[None].int(), 2**32 + 1, 64)
    for wrong in (10**6, -(10**6), 0):
        with pytest.raises(ValueError, match="evict: expected"):
            plan(torch.full((1, 64), wrong, dtype=torch.int32), 64, 64)


def test_bfloat16_without_bfloat16_products() -> None:
    """Where the vendor library has none, operands are widened: at least as accurate."""
    mask = mask_of(random_evict(200))
    q, k, v = attention_inputs(1, 200, 4, 2, 64, dtype=torch.bfloat16, requires_grad=True)
    want = trajectory_attention(q, k, v, mask)
    with torch.backends.mkldnn.flags(enabled=False):
        got = trajectory_attention(q, k, v, mask)
        torch.testing.assert_close(
            gradients([got], [q, k, v]), gradients([want], [q, k, v]), atol=0.05, rtol=0.05
        )
    torch.testing.assert_close(got, want, atol=0.02, rtol=0.02)


@pytest.mark.parametrize(
    ("compiler", "dynamic"),
    [("aot_eager", False), ("aot_eager", True), pytest.param("inductor", False, marks=pytest.mark.slow)],
)
def test_compile(compiler: str, dynamic: bool) -> None:
    torch.compiler.reset()

    def block(q: Tensor, k: Tensor, v: Tensor, mask: TrajectoryMask) -> tuple[Tensor, Tensor]:
        out, lse = trajectory_attention(q.sin(), k, v * 2, mask, return_lse=True)
        return out.cos(), lse + 1

    compiled = torch.compile(block, backend=compiler, fullgraph=True, dynamic=dynamic)
    for n in (70, 131):
        mask = mask_of(random_evict(n))
        inputs = attention_inputs(2, n, 4, 2, 16, requires_grad=True)
        got, want = compiled(*inputs, mask), block(*inputs, mask)
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(gradients(list(got), inputs), gradients(list(want), inputs))


# -------------------------------------------------------------------------------------------------- memory


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="measures with Linux's /proc")
def test_memory_is_linear() -> None:
    """At N 32,768 one bool N x N mask is 1 GiB; both passes together may take 128 MiB over the inputs."""
    code = """
import torch
from mem1_core.ops import trajectory_attention
from mem1_core.sample_inputs import attention_inputs, mem1_segments
from mem1_core.layout import TrajectoryLayout

def memory(key):
    return next(int(x.split()[1]) for x in open("/proc/self/status") if x.startswith(key)) / 1024

def step(turns):
    mask = TrajectoryLayout.from_segments(mem1_segments(turns, prompt=768)).mask
    q, k, v = attention_inputs(1, mask.shape[1], 2, 1, 16, requires_grad=True)
    open("/proc/self/clear_refs", "w").write("5")
    before = memory("VmRSS")
    trajectory_attention(q, k, v, mask).sum().backward()
    return mask.shape[1], memory("VmHWM") - before

step(1)  # what the libraries allocate once
print(*step(64))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    tokens, growth = done.stdout.split()
    assert int(tokens) == 32_768
    assert float(growth) < 128, f"{growth} MiB"
