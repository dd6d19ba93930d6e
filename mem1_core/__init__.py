"""mem1_core: kernels for agents with constant memory (MEM1, arXiv 2506.15841).

`mem1_core.ops` has the public ops, `TrajectoryMask` the mask that drives them, `TrajectoryLayout` what a
trainer feeds, `mem1_core.reference` every op in plain PyTorch. `cmake_prefix_path` is where CMake finds the
C library.
"""

from pathlib import Path

from mem1_core._library import cuda_architectures
from mem1_core._library import version as __version__
from mem1_core.layout import TrajectoryLayout
from mem1_core.mask import TilePlan, TrajectoryMask
from mem1_core.segments import Segment

cmake_prefix_path = str(Path(__file__).parent)

__all__ = [
    "Segment",
    "TilePlan",
    "TrajectoryLayout",
    "TrajectoryMask",
    "__version__",
    "cmake_prefix_path",
    "cuda_architectures",
]
