"""trajectory_attention at its borders: bad inputs, torch.compile, memory, installation."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mem1_core.ops import trajectory_attention
from mem1_core.testing import attention_inputs, causal_evict, gradients, random_evict
from mem1_core.trajectory import TrajectoryMask

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
    "v of another head size": ("v", lambda: {"v": torch.zeros(2, 10, 2, 8)}),
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


@pytest.mark.parametrize("wrong", BAD_INPUTS)
def test_bad_input(wrong: str) -> None:
    name, changes = BAD_INPUTS[wrong]
    q, k, v = attention_inputs(2, 10, 4, 2, 16)
    good: dict[str, Any] = {"q": q, "k": k, "v": v, "mask": mask_of(causal_evict(10))}
    trajectory_attention(**good)
    with pytest.raises(REFUSED, match=rf"\b{name}\b"):
        trajectory_attention(**good | changes())


@pytest.mark.parametrize("dtype", [torch.float16, torch.int32, torch.complex64], ids=str)
def test_unsupported_dtype(dtype: torch.dtype) -> None:
    q, k, v = (x.to(dtype) for x in attention_inputs(1, 10, 4, 2, 16))
    with pytest.raises(REFUSED, match=r"\bq\b.*wanted float32"):
        trajectory_attention(q, k, v, mask_of(causal_evict(10)))


def test_unsupported_device() -> None:
    mask = mask_of(causal_evict(10))
    q, k, v = attention_inputs(1, 10, 4, 2, 16)
    with pytest.raises(REFUSED, match="meta"):
        trajectory_attention(q.to("meta"), k.to("meta"), v.to("meta"), mask)
    with pytest.raises(REFUSED, match=r"\bk\b.*meta"):
        trajectory_attention(q, k.to("meta"), v, mask)


# ------------------------------------------------------------------------------------------- torch.compile


def test_opcheck() -> None: ...


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


# -------------------------------------------------------------------------------------- memory and install


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="measures with Linux's /proc")
def test_memory_is_linear() -> None:
    """At N 32,768 one bool N x N mask is 1 GiB; both passes together may take 128 MiB over the inputs."""
    code = """
import torch
from mem1_core.ops import trajectory_attention
from mem1_core.testing import attention_inputs, mem1_segments
from mem1_core.trajectory import TrajectoryMask

def memory(key):
    return next(int(x.split()[1]) for x in open("/proc/self/status") if x.startswith(key)) / 1024

def step(turns):
    mask = TrajectoryMask.from_turns(mem1_segments(turns, prompt=768))
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


def test_imports_from_any_directory(tmp_path: Path) -> None:
    try:
        importlib.metadata.version("mem1_core")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("mem1_core is not installed here, only on the path")
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    code = "from mem1_core.ops import trajectory_attention; print(trajectory_attention.__name__)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "trajectory_attention\n", done.stderr
