"""The block shapes of the attention kernels: a small table by architecture, kernel, dtype and head dim.

Hopper's for bfloat16 without options are the fastest of those measured on an H200, but for head dim 96.
The others are chosen from the compiler's report (`python tests/triton_report.py` prints it), under Triton 3.6
and 3.9: the largest blocks whose loops do not spill. That says less than it seems to: those that were
fastest for head dim 256 spill 200 to 340 bytes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

HEAD_DIMS = (64, 96, 128, 192, 256)  # a head dim between two of them runs as the larger one


class Blocks(NamedTuple):
    """How one kernel is cut: query and key tokens of a block, channels of a chunk, warps, pipeline stages."""

    q: int
    k: int
    chunk: int
    warps: int
    stages: int


Table = dict[str, dict[int, Blocks]]

# Hopper: tensor cores of a warpgroup, copy engine, 227 KB of shared memory. 64 rows for 8 warps with steps of
# 16 gave wrong results there in float32 (Triton 3.6).
HOPPER_HALF: Table = {
    "forward": {
        64: Blocks(64, 128, 64, 4, 3),
        96: Blocks(128, 128, 32, 8, 2),
        128: Blocks(128, 128, 128, 8, 3),
        192: Blocks(128, 64, 64, 8, 3),
        256: Blocks(128, 64, 256, 8, 2),
    },
    "backward_dq": {
        64: Blocks(128, 64, 64, 4, 3),
        96: Blocks(128, 64, 32, 8, 3),
        128: Blocks(128, 64, 128, 8, 3),
        192: Blocks(128, 64, 64, 8, 2),
        256: Blocks(128, 32, 128, 8, 2),
    },
    "backward_dk_dv": {
        64: Blocks(128, 64, 64, 4, 2),
        96: Blocks(64, 128, 32, 8, 3),
        128: Blocks(64, 128, 128, 8, 3),
        192: Blocks(32, 128, 64, 8, 2),
        256: Blocks(64, 64, 256, 8, 2),
    },
}
HOPPER_SINGLE: Table = {
    "forward": {
        64: Blocks(128, 64, 32, 8, 2),
        96: Blocks(64, 32, 32, 4, 2),
        128: Blocks(128, 32, 32, 8, 2),
        192: Blocks(128, 16, 32, 8, 2),
        256: Blocks(128, 16, 32, 8, 2),
    },
    "backward_dq": {
        64: Blocks(64, 64, 32, 4, 2),
        96: Blocks(64, 32, 32, 4, 2),
        128: Blocks(64, 32, 32, 4, 2),
        192: Blocks(128, 16, 32, 8, 2),
        256: Blocks(128, 16, 16, 8, 2),
    },
    "backward_dk_dv": {
        64: Blocks(32, 64, 32, 4, 2),
        96: Blocks(32, 64, 32, 4, 2),
        128: Blocks(32, 64, 32, 4, 2),
        192: Blocks(16, 128, 32, 8, 2),
        256: Blocks(16, 128, 16, 8, 2),
    },
}

# Every other GPU from compute capability 8.0 on: 99 KB of shared memory, descriptors become pointers. None of
# these has run; that 64 rows for 8 warps with steps of 16 went wrong was with a warpgroup's tensor cores.
OTHER_HALF: Table = {
    "forward": {
        64: Blocks(128, 32, 64, 8, 2),
        96: Blocks(64, 32, 32, 4, 2),
        128: Blocks(64, 32, 128, 4, 2),
        192: Blocks(64, 16, 128, 8, 2),
        256: Blocks(64, 16, 128, 8, 2),
    },
    "backward_dq": {
        64: Blocks(64, 64, 64, 4, 2),
        96: Blocks(64, 32, 32, 4, 2),
        128: Blocks(64, 64, 128, 8, 2),
        192: Blocks(64, 16, 128, 8, 2),
        256: Blocks(64, 16, 128, 8, 2),
    },
    "backward_dk_dv": {
        64: Blocks(32, 64, 64, 4, 2),
        96: Blocks(16, 64, 32, 4, 2),
        128: Blocks(32, 64, 128, 8, 2),
        192: Blocks(16, 64, 128, 8, 2),
        256: Blocks(16, 64, 128, 8, 2),
    },
}
OTHER_SINGLE: Table = {
    "forward": {
        64: Blocks(32, 32, 32, 4, 2),
        96: Blocks(32, 16, 32, 4, 2),
        128: Blocks(32, 16, 16, 4, 2),
        192: Blocks(32, 16, 32, 4, 2),
        256: Blocks(16, 16, 32, 4, 2),
    },
    "backward_dq": {
        64: Blocks(32, 32, 32, 4, 2),
        96: Blocks(32, 32, 32, 4, 2),
        128: Blocks(32, 16, 16, 4, 2),
        192: Blocks(32, 16, 32, 4, 2),
        256: Blocks(32, 16, 32, 8, 2),
    },
    "backward_dk_dv": {
        64: Blocks(32, 32, 32, 4, 2),
        96: Blocks(16, 32, 16, 4, 2),
        128: Blocks(16, 32, 16, 4, 2),
        192: Blocks(16, 32, 32, 8, 2),
        256: Blocks(16, 32, 32, 8, 2),
    },
}


# Of these, what is another with a soft cap or a window over positions: mostly smaller.
HOPPER_HALF_OPTIONS: Table = {
    "forward": {
        64: Blocks(128, 128, 64, 8, 3),
        96: Blocks(128, 64, 32, 8, 2),
        128: Blocks(128, 64, 128, 8, 3),
        192: Blocks(128, 32, 64, 8, 2),
        256: Blocks(128, 32, 256, 8, 3),
    },
    "backward_dq": {64: Blocks(64, 64, 64, 4, 3), 256: Blocks(64, 32, 128, 8, 2)},
    "backward_dk_dv": {
        64: Blocks(64, 64, 64, 4, 2),
        128: Blocks(32, 128, 128, 8, 3),
        192: Blocks(32, 64, 64, 8, 3),
        256: Blocks(32, 64, 256, 8, 2),
    },
}
HOPPER_SINGLE_OPTIONS: Table = {
    "forward": {},
    "backward_dq": {64: Blocks(64, 32, 32, 4, 2)},
    "backward_dk_dv": {},
}


def blocks(kernel: str, head_dim: int, dtype: torch.dtype, hopper: bool, plain: bool = True) -> Blocks:
    """The blocks of `kernel` for a head dim up to 256; dtype bfloat16, float16 or float32. Not `plain`: with
    a soft cap or a window over positions.
    """
    single, dim = dtype == torch.float32, padded_dim(head_dim)
    if not hopper:
        return (OTHER_SINGLE if single else OTHER_HALF)[kernel][dim]
    smaller = {} if plain else (HOPPER_SINGLE_OPTIONS if single else HOPPER_HALF_OPTIONS)[kernel]
    return smaller.get(dim) or (HOPPER_SINGLE if single else HOPPER_HALF)[kernel][dim]


def padded_dim(head_dim: int) -> int:
    return next(d for d in HEAD_DIMS if d >= head_dim)
