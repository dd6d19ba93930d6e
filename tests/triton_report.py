"""Compiles Triton kernels without a GPU, exactly as they are launched, and reports what the compiler made of
them.

    python tests/triton_report.py [sm_80 | sm_90a] [kernel ...] [--dtypes bf16 ...] [--no-options] [--json F]

Prints one table: registers and spilled bytes of a thread, shared memory of a block, global scratch memory,
pipeline stages, warpgroup matrix instructions (wgmma) and copy-engine loads (TMA). --json also writes the
rows to a file.

A row is one binary. The column `variant` says by what it differs from the plain one of its blocks: "d_lse"
takes the gradient of a log-sum-exp, in "share" a program of dK/dV sums over several query heads; "window" has
one over positions, "softcap" sinks as well (which only the forward has), "all" all three. The launcher
runs as on a GPU, up to each kernel's start, for all of PROBLEMS, none of which may need a binary of its own.
The loops for keys that are not finite are part of each.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget

from mem1_core import TrajectoryMask
from mem1_core.triton import attention_backward, attention_blocks, attention_forward, attention_launch

KERNELS = {  # name: (module, function)
    "forward": (attention_forward, attention_forward.forward),
    "backward_dq": (attention_backward, attention_backward.backward_dq),
    "backward_dk_dv": (attention_backward, attention_backward.backward_dk_dv),
}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

MOST = {"forward": "plain", "backward_dq": "d_lse", "backward_dk_dv": "share"}
VARIANTS = {  # by dtype: the two halves run the same instructions, so that each takes a half of the variants
    "bf16": dict.fromkeys(KERNELS, ("plain", "all")),
    "fp16": {kernel: (variant, "softcap") for kernel, variant in MOST.items()},
    "fp32": {kernel: (variant, "window", "all") for kernel, variant in MOST.items()},
}


class Case(NamedTuple):
    """A binary, by what makes it one of its own."""

    kernel: str
    dim: int
    dtype: str
    variant: str


class Problem(NamedTuple):
    tokens: int
    batch: int
    masks: int
    group: int  # query heads of a KV head
    offset: int = 0  # in elements, of every tensor in its storage


# One binary serves all of these, with each head dim that has its block shape.
PROBLEMS = [
    Problem(400, batch=1, masks=1, group=6),
    Problem(400, batch=3, masks=3, group=2),
    Problem(401, batch=2, masks=1, group=7),
    Problem(257, batch=2, masks=2, group=16),
    Problem(131, batch=1, masks=1, group=17, offset=1),
    Problem(1, batch=1, masks=1, group=2),
]
MHA = Problem(128, batch=1, masks=1, group=1)
DIMS = (1, 17, 40, 64, 65, 72, 80, 96, 100, 128, 129, 160, 192, 200, 256)


class NoDevice:
    """What Triton's launcher asks its driver before it compiles."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_device(self) -> int:
        return self.target.arch

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self.target


class Compiling:
    """Stands in for a kernel: compiles what a launch needs, and keeps that and the launch's arguments."""

    def __init__(self, function: Any) -> None:
        self.function = function
        self.binaries: list[Any] = []
        self.arguments: dict[str, Any] = {}

    def __getitem__(self, grid: tuple[int, ...]) -> Compiling:
        return self

    def __call__(self, **arguments: Any) -> None:
        self.arguments = arguments
        binary = self.function.warmup(grid=(1,), **arguments)
        if binary not in self.binaries:
            self.binaries.append(binary)


class Ignored:
    """Stands in for the other kernels."""

    def __getitem__(self, grid: tuple[int, ...]) -> Ignored:
        return self

    def __call__(self, **arguments: Any) -> None:
        pass


def tensor(*shape: int, dtype: torch.dtype, offset: int) -> Tensor:
    return torch.zeros(offset + torch.Size(shape).numel(), dtype=dtype)[offset:].view(shape)


def launch(case: Case, dim: int, problem: Problem) -> None:
    tokens, batch, masks, group, offset = problem
    zeros = partial(tensor, dtype=DTYPES[case.dtype], offset=offset)
    q, k = (zeros(batch, tokens, heads, dim) for heads in (2 * group, 2))
    lse, d_lse = (tensor(batch, 2 * group, tokens, dtype=torch.float32, offset=offset) for _ in "ab")
    positions = tensor(masks, tokens, dtype=torch.int32, offset=offset)
    mask = TrajectoryMask(positions + tokens, positions=positions)
    window, cap = case.variant in ("window", "all"), float(case.variant in ("softcap", "all"))
    mask = mask.windowed(64) if window else mask
    tiles = mask.tile_plan(128, 128)
    over_positions = (mask.positions, mask.limits, *tiles.key_lists) if tiles.key_lists else ()
    plan = attention_launch.Plan(mask.evict_at, *tiles.tensors, tiles.block_q, tiles.block_k, *over_positions)
    if case.kernel == "forward":
        sinks = tensor(2 * group, dtype=torch.float32, offset=offset) if cap else None
        attention_launch.forward(q, k, k, plan, 1.0, sinks, cap)
    else:
        d_lse = d_lse if case.variant == "d_lse" else None
        attention_launch.backward(q, d_lse, q, k, k, q, lse, plan, 1.0, cap)


def launched(case: Case, capability: int) -> Compiling:
    """The kernel after all launches of the case."""
    triton.runtime.driver.set_active(NoDevice(capability))
    share = case.variant == "share"
    found = Compiling(KERNELS[case.kernel][1])
    patch = partial(mock.patch.object, attention_launch)
    with ExitStack() as stack:
        for name, (module, _) in KERNELS.items():
            stand_in = found if name == case.kernel else Ignored()
            stack.enter_context(mock.patch.object(module, name, stand_in))
        stack.enter_context(patch("_check"))  # which refuses tensors on the CPU
        stack.enter_context(patch("_capability", lambda device: divmod(capability, 10)))
        stack.enter_context(patch("MIN_PROGRAMS", 0 if share else 2**31))
        dims = [dim for dim in DIMS if attention_blocks.padded_dim(dim) == case.dim]
        for dim, problem in itertools.product(dims, PROBLEMS if share else [*PROBLEMS, MHA]):
            launch(case, dim, problem)
    return found


def compiled(case: Case, capability: int) -> dict[str, Any]:
    """One row of the report."""
    found = launched(case, capability)
    count = len(found.binaries)
    assert count == 1, f"{case}: expected one binary for all problems, got {count}"
    binary, arguments = found.binaries[0], found.arguments
    ptx = binary.asm["ptx"]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(binary.asm["cubin"])
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    (registers, stack), *others = re.findall(r"REG:(\d+) STACK:(\d+)", usage)
    assert not others, f"more than one function: {usage}"
    return {
        "kernel": case.kernel,
        "D": case.dim,
        "dtype": case.dtype,
        "variant": case.variant,
        "block": f"{arguments['BLOCK_Q']}x{arguments['BLOCK_K']}",
        "chunk": arguments["CHUNK"],
        "warps": arguments["num_warps"],
        "stages": arguments["num_stages"],
        "registers": int(registers),
        "spilled": int(stack),  # all that these kernels keep on the stack is what was spilled
        "shared": binary.metadata.shared,
        # Nobody gives these kernels an allocator for it.
        "scratch": binary.metadata.global_scratch_size + binary.metadata.profile_scratch_size,
        "wgmma": len(re.findall(r"\bwgmma\.mma_async", ptx)),
        "mma": len(re.findall(r"\bmma\.sync", ptx)),
        "TMA": len(re.findall(r"\bcp\.async\.bulk\.tensor", ptx)),
    }


def report(arch: str, kernels: list[str], dtypes: list[str], options: bool) -> Iterator[dict[str, Any]]:
    cases = [
        Case(kernel, dim, dtype, variant)
        for kernel, dim, dtype in itertools.product(kernels, attention_blocks.HEAD_DIMS, dtypes)
        for variant in VARIANTS[dtype][kernel][: None if options else 1]
    ]
    with ProcessPoolExecutor() as pool:
        yield from pool.map(partial(compiled, capability=int(re.sub(r"\D", "", arch))), cases)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("arch", nargs="?", default="sm_90a", choices=["sm_80", "sm_90a"])
    parser.add_argument("kernels", nargs="*", help=f"of {', '.join(KERNELS)}; all when none is named")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--no-options", action="store_true", help="without windows and soft caps")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows here")
    options = parser.parse_args()
    rows = []
    kernels = options.kernels or list(KERNELS)
    for row in report(options.arch, kernels, options.dtypes, not options.no_options):
        widths = [max(len(name), 14 if name == "kernel" else 7) for name in row]
        if not rows:
            print(f"Compiled for {options.arch} by Triton {triton.__version__}, not run")
            print("  ".join(name.rjust(n) for name, n in zip(row, widths, strict=True)))
        print("  ".join(str(x).rjust(n) for x, n in zip(row.values(), widths, strict=True)), flush=True)
        rows.append(row)
    if options.json:
        options.json.write_text(json.dumps(rows))


if __name__ == "__main__":
    main()
