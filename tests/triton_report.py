"""Compiles Triton kernels without a GPU, exactly as they are launched, and reports what the compiler made of
them.

    python tests/triton_report.py [sm_80 | sm_90a] [kernel ...] [--dtypes bf16 ...] [--json FILE]

Prints one table: registers and spilled bytes of a thread, shared memory of a block, pipeline stages,
warpgroup matrix instructions (wgmma) and copy-engine loads (TMA). --json also writes the rows to a file.
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
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.tools.tensor_descriptor import TensorDescriptor

from mem1_core import TrajectoryMask
from mem1_core.triton import attention_backward, attention_blocks, attention_forward, attention_launch

KERNELS = {  # name: (module, function)
    "forward": (attention_forward, attention_forward.forward),
    "backward_dq": (attention_backward, attention_backward.backward_dq),
    "backward_dk_dv": (attention_backward, attention_backward.backward_dk_dv),
}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
POINTERS = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.int32: "i32"}
TOKENS, HEADS, KV_HEADS = 400, 12, 2


class Recorder:
    """Stands in for a kernel: keeps the arguments of its launch."""

    def __init__(self) -> None:
        self.arguments: dict[str, Any] = {}

    def __getitem__(self, grid: tuple[int, ...]) -> Recorder:
        return self

    def __call__(self, **arguments: Any) -> None:
        self.arguments = arguments


def launched(kernel: str, head_dim: int, dtype: torch.dtype, capability: tuple[int, int]) -> dict[str, Any]:
    """The arguments that the launcher gives to `kernel`."""
    mask = TrajectoryMask(torch.full((1, TOKENS), TOKENS, dtype=torch.int32))
    tiles = mask.tile_plan(128, 128)
    plan = attention_launch.Plan(mask.evict_at, *tiles[2:], tiles.block_q, tiles.block_k)
    q = torch.zeros(1, TOKENS, HEADS, head_dim, dtype=dtype)
    k = torch.zeros(1, TOKENS, KV_HEADS, head_dim, dtype=dtype)
    recorders = {name: Recorder() for name in KERNELS}
    with ExitStack() as stack:
        for name, (module, _) in KERNELS.items():
            stack.enter_context(mock.patch.object(module, name, recorders[name]))
        # The tensors are on the CPU, and nothing is computed with them.
        stack.enter_context(mock.patch.object(attention_launch, "INTERPRETED", True))
        stack.enter_context(mock.patch.object(attention_launch, "_readable", lambda x: x))
        stack.enter_context(mock.patch.object(attention_launch, "_capability", lambda device: capability))
        if kernel == "forward":
            attention_launch.forward(q, k, k, plan, 1.0)
        else:
            attention_launch.backward(q, None, q, k, k, q, torch.zeros(1, HEADS, TOKENS), plan, 1.0)
    return recorders[kernel].arguments


def source(function: Any, arguments: dict[str, Any]) -> ASTSource:
    """What Triton's launcher would compile: types of arguments, which divide by 16, which are constant."""
    signature, constants, divisible = {}, {}, {}
    for index, name in enumerate(function.arg_names):
        value = arguments[name]
        if isinstance(value, TensorDescriptor):
            signature[name] = f"tensordesc<{POINTERS[value.base.dtype]}{list(value.block_shape)}>"
        elif isinstance(value, torch.Tensor):
            signature[name] = "*" + POINTERS[value.dtype]
            divisible[(index,)] = [["tt.divisibility", 16]]
        elif function.params[index].do_not_specialize:
            signature[name] = "i32"
        elif name.isupper() or value is None or (isinstance(value, int) and value == 1):
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, int):
            signature[name] = "i32"
            if value % 16 == 0:
                divisible[(index,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32"
    return ASTSource(function, signature, constants, divisible)


def compiled(case: tuple[str, int, str, str]) -> dict[str, Any]:
    """One row of the report."""
    kernel, head_dim, dtype, arch = case
    function = KERNELS[kernel][1]
    capability = int(re.sub(r"\D", "", arch))
    arguments = launched(kernel, head_dim, DTYPES[dtype], divmod(capability, 10))
    options = {name: arguments[name] for name in ("num_warps", "num_stages", "enable_fp_fusion")}
    binary = triton.compile(
        source(function, arguments), target=GPUTarget("cuda", capability, 32), options=options
    )
    ptx = binary.asm["ptx"]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(binary.asm["cubin"])
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    (registers, stack), *others = re.findall(r"REG:(\d+) STACK:(\d+)", usage)
    assert not others, f"more than one function: {usage}"
    return {
        "kernel": kernel,
        "D": head_dim,
        "dtype": dtype,
        "block": f"{arguments['BLOCK_Q']}x{arguments['BLOCK_K']}",
        "chunk": arguments["CHUNK"],
        "warps": arguments["num_warps"],
        "stages": arguments["num_stages"],
        "registers": int(registers),
        "spilled": int(stack),  # all that these kernels keep on the stack is what was spilled
        "shared": binary.metadata.shared,
        "wgmma": len(re.findall(r"\bwgmma\.mma_async", ptx)),
        "mma": len(re.findall(r"\bmma\.sync", ptx)),
        "TMA": len(re.findall(r"\bcp\.async\.bulk\.tensor", ptx)),
    }


def report(arch: str, kernels: list[str], dtypes: list[str]) -> Iterator[dict[str, Any]]:
    cases = itertools.product(kernels, attention_blocks.HEAD_DIMS, dtypes, [arch])
    with ProcessPoolExecutor() as pool:
        yield from pool.map(compiled, cases)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("arch", nargs="?", default="sm_90a", choices=["sm_80", "sm_90a"])
    parser.add_argument("kernels", nargs="*", help=f"of {', '.join(KERNELS)}; all when none is named")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows here")
    options = parser.parse_args()
    rows = []
    for row in report(options.arch, options.kernels or list(KERNELS), options.dtypes):
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
