"""Where a command computes: the device it was given, and the line that says so."""

from __future__ import annotations

import torch
from torch import nn

from mem1.checks import require
from mem1_core import cuda_architectures
from mem1_core.testing import machine


def pick_device(name: str) -> torch.device:
    """The device called `name`: "cpu", "cuda", "cuda:1"; "auto" is the first CUDA device if there is one,
    else the CPU. A CUDA device comes with its index. Raises InputError for one that is not there, or that
    this build of mem1_core has no code for.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count and not cuda_architectures():
        require(not name.startswith("cuda"), "device", "a build of mem1_core with nvcc for CUDA", name)
        count = 0
    there = {"cpu": torch.device("cpu")} | {f"cuda:{i}": torch.device("cuda", i) for i in range(count)}
    chosen = {"auto": "cuda:0" if count else "cpu", "cuda": "cuda:0"}.get(name, name)
    seen = f"{', '.join(there)} (torch {torch.__version__} sees {count or 'no'} CUDA devices)"
    require(chosen in there, "device", f"one of auto, {seen}", name)
    return there[chosen]


def whereabouts(model: nn.Module) -> str:
    """One line on where and in what `model` computes, as in "device cpu (AMD EPYC), 2 threads; float32,
    815,360 parameters".
    """
    parameters = list(model.parameters())
    device = parameters[0].device
    facts = machine()
    if device.type == "cuda":
        place = f"{device} ({torch.cuda.get_device_name(device)})"
    else:
        place = f"{device} ({facts['cpu']}), {facts['threads']} thread" + "s" * (facts["threads"] > 1)
    kinds = ", ".join(sorted({str(p.dtype).removeprefix("torch.") for p in parameters}))
    return f"device {place}; {kinds}, {sum(p.numel() for p in parameters):,} parameters"
