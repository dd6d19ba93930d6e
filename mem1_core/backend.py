"""Which implementation of an op runs. One rule for all ops: the tensors' device decides, the caller may
insist, and what is not there is an error that says so; never a silent fallback.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

_BACKENDS = {"cpu": ("cpu",), "cuda": ("cuda", "triton")}  # what runs on a device
_REMEDY = "; under FSDP call this where the root module's forward has gathered it, or pass {}.full_tensor()"


def choose_backend(op: str, tensor: Tensor, requested: str, available: Sequence[str]) -> str:
    """The backend to run `op` with: `requested`, or for `"auto"` the one of the tensor's device.

    `available` are the op's backends in this build, the fastest first. CPU tensors run on `"cpu"`, CUDA
    tensors on `"cuda"` or `"triton"`; `"reference"` (plain PyTorch) runs on any device. Raises ValueError for
    an unknown name, NotImplementedError for a device or backend the op does not have.
    """
    device = tensor.device.type
    if requested == "auto":
        if device not in _BACKENDS:
            raise NotImplementedError(f"{op}: expected a cpu or cuda tensor, got one on {device}")
        requested = next((x for x in available if x in _BACKENDS[device]), "")
        if not requested:
            raise NotImplementedError(
                f"{op}: expected a backend for {device} tensors, got {', '.join(available)}; attention needs "
                "`pip install triton`, all else a build with nvcc; backend='reference' runs anywhere, slowly"
            )
    if requested not in ("cpu", "cuda", "triton", "reference"):
        raise ValueError(
            f"backend: expected 'auto', 'cpu', 'cuda', 'triton' or 'reference', got {requested!r}"
        )
    if requested not in available:
        hint = "; it needs `pip install triton`" if requested == "triton" else ""
        raise NotImplementedError(
            f"{op}: the {requested!r} backend is not available in this build (available: "
            f"{', '.join(available)}){hint}; "
            "backend='reference' runs anywhere, slowly"
        )
    # Triton's kernels take CPU tensors when they are interpreted, which they find out themselves.
    if requested in ("cpu", "cuda") and device != requested:
        raise ValueError(f"backend: {requested!r}: expected {requested} tensors, got one on {device}")
    return requested


def check_whole(**arguments: object) -> None:
    """Raise TypeError or ValueError for a tensor, of those in tuples and lists too, that is not all here: a
    DTensor, or one whose storage was freed; FSDP leaves a weight like that outside of the forward that it is
    gathered for. What is no tensor, others check. Half a microsecond each.
    """
    for name, value in arguments.items():
        if isinstance(value, Tensor):
            _check_whole(name, value)
        elif isinstance(value, (tuple, list)):
            for part in value:
                check_whole(**{name: part})


def _check_whole(name: str, x: Tensor) -> None:
    if type(x) is not Tensor and type(x) is not Parameter and hasattr(x, "full_tensor"):
        remedy = _REMEDY.format(name)
        raise TypeError(f"{name}: expected a whole tensor, got a DTensor of {describe(x)} in all{remedy}")
    try:
        freed = x.untyped_storage().size() == 0 and x.numel() > 0
    except NotImplementedError:  # a wrapper, of torch.func say: the tensor in it has the storage
        return
    if freed:
        remedy = _REMEDY.format(name)
        raise ValueError(
            f"{name}: expected a tensor in memory, got {describe(x)} whose storage was freed{remedy}"
        )


def describe(value: object) -> str:
    """What an op's error says of an argument that came."""
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def is_number(x: Any) -> bool:
    """A number of Python or numpy that a float can be. (math.isfinite breaks the graph of torch.compile.)"""
    if not isinstance(x, Real) or isinstance(x, bool):
        return False
    number: Any = x
    return bool(abs(number) <= sys.float_info.max)


def check_softcap(softcap: float | None) -> float:
    """As ops take it, 0 for none. Raises ValueError unless it is a number > 0, finite in float32, or None."""
    if softcap is not None and not (is_number(softcap) and 0 < softcap < 1e38):
        raise ValueError(f"softcap: expected a finite number > 0 or None, got {softcap!r}")
    return float(softcap or 0.0)


def check_sinks(sinks: Tensor | None, q: Tensor) -> Tensor | None:
    """As ops take them, float32 (float64 beside float64). Raises TypeError or ValueError unless they are
    floating point [heads of q] on its device, or None.
    """
    if sinks is None:
        return None
    if not isinstance(sinks, Tensor) or not sinks.is_floating_point():
        raise TypeError(f"sinks: expected a floating point tensor, got {describe(sinks)}")
    if sinks.shape != (q.shape[2],):
        raise ValueError(f"sinks: expected shape [{q.shape[2]}], the heads of q, got {list(sinks.shape)}")
    if sinks.device != q.device:
        raise ValueError(f"sinks: expected the device of q, {q.device}, got {sinks.device}")
    return sinks.to(torch.float64 if q.dtype == torch.float64 else torch.float32)
