"""Copies of tensors in the host's memory, which nobody changes while they are saved."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor


@torch.no_grad()
def host_copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """By the same names; of tensors that are one under several names, one copy. Where these are parts of a
    whole, all ranks call this, and the copies are the same parts.
    """
    made: dict[Any, Tensor] = {}
    found = {}
    for name, tensor in tensors.items():
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        key = local.data_ptr(), local.shape, local.stride(), local.dtype
        if key not in made:
            made[key] = local.detach().to("cpu", copy=True)
        copy = made[key]
        if isinstance(tensor, DTensor):
            mesh = _on_host(tensor.device_mesh)
            copy = DTensor.from_local(
                copy, mesh, tensor.placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
            )
        found[name] = copy
    return found


@cache
def _on_host(mesh: DeviceMesh) -> DeviceMesh:
    """The same ranks."""
    if mesh.device_type == "cpu":
        return mesh
    return init_device_mesh("cpu", tuple(mesh.shape), mesh_dim_names=mesh.mesh_dim_names)
