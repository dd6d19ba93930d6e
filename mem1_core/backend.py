"""Which implementation of an op runs. One rule for all ops: the tensors' device decides, the caller may
insist, and what is not there is an error that says so; never a silent fallback.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

_BACKENDS = {"cpu": ("cpu",), "cuda": ("cuda", "triton")}  # what runs on a device


def choose_backend(op: str, tensor: Tensor, requested: str, available: Sequence[str]) -> str:
    """The backend to run `op` with: `requested`, or for `"auto"` the one of the tensor's device.

    `available` are the op's backends in this build, the fastest first. CPU tensors run on `"cpu"`, CUDA
    tensors on `"cuda"` or `"triton"`; `"reference"` (plain PyTorch) runs on any device. Raises ValueError for
    an unknown name, NotImplementedError for a device or backend the op does not have.
    """
    device = tensor.device.type
    if requested == "auto":
        if device not in _BACKENDS:
            raise NotImplementedError(f"{op}: wanted a cpu or cuda tensor, got one on {device}")
        requested = next((x for x in available if x in _BACKENDS[device]), _BACKENDS[device][-1])
    if requested not in ("cpu", "cuda", "triton", "reference"):
        raise ValueError(f"backend: wanted 'auto', 'cpu', 'cuda', 'triton' or 'reference', got {requested!r}")
    if requested not in available:
        hint = "; it needs `pip install triton`" if requested == "triton" else ""
        raise NotImplementedError(
            f"{op}: the {requested!r} backend is missing here, where there are {', '.join(available)}{hint}; "
            "backend='reference' runs anywhere, slowly"
        )
    # Triton's kernels take CPU tensors when they are interpreted, which they find out themselves.
    if requested in ("cpu", "cuda") and device != requested:
        raise ValueError(f"backend: {requested!r} wants {requested} tensors, got one on {device}")
    return requested


def told(value: object) -> str:
    """What an op's error says of an argument that came."""
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
