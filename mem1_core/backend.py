"""Which implementation of an op runs. One rule for all ops: the tensors' device decides, the caller may
insist, and what is not there is an error that says so; never a silent fallback.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def choose_backend(op: str, tensor: Tensor, requested: str, available: Sequence[str]) -> str:
    """The backend to run `op` with: `requested`, or for `"auto"` the one of the tensor's device.

    `available` are the op's backends in this build. CPU tensors run on `"cpu"`; `"reference"` (plain
    PyTorch) runs on any device. Raises ValueError for an unknown name, NotImplementedError for a device or
    backend the op does not have.
    """
    device = tensor.device.type
    if requested == "auto":
        if device not in ("cpu", "cuda"):
            raise NotImplementedError(f"{op}: wanted a cpu or cuda tensor, got one on {device}")
        requested = device
    if requested not in ("cpu", "cuda", "triton", "reference"):
        raise ValueError(f"backend: wanted 'auto', 'cpu', 'cuda', 'triton' or 'reference', got {requested!r}")
    if requested not in available:
        raise NotImplementedError(
            f"{op}: the {requested!r} backend is missing in this version of mem1_core, which has "
            f"{', '.join(available)}; backend='reference' runs anywhere, slowly"
        )
    wanted_device = {"cpu": "cpu", "cuda": "cuda", "triton": "cuda", "reference": device}[requested]
    if device != wanted_device:
        raise ValueError(f"backend: {requested!r} wants {wanted_device} tensors, got one on {device}")
    return requested
