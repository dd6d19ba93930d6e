"""AdamW as training needs it: fp32 whatever the model's dtype, and no step on numbers that are not finite."""

from __future__ import annotations

import math
from collections.abc import Container, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm

MAX_SKIPPED = 3  # steps in a row
_BESIDE_NORM = 1e-6  # as torch's clip_grad_norm_ has it


class Diverged(RuntimeError):
    """Gradients or weights are not finite, again and again. The weights are those of the last good step."""


class AdamW:
    """`torch.optim.AdamW` over fp32 master copies of the parameters that have a lower precision.

    In bf16 a weight has 8 bits: a step of 1e-6 of it changes nothing, and moments forget. Masters add up
    gradients and steps in fp32 and hand their rounded values to the model. Parameters of float32 or float64
    are their own masters; frozen ones take no part.

    groups: parameters, or dicts as for `torch.optim.AdamW`. max_grad_norm: of all gradients together.
    """

    def __init__(
        self,
        groups: Iterable[nn.Parameter] | Iterable[dict[str, Any]],
        *,
        betas: tuple[float, float],
        weight_decay: float = 0.0,
        max_grad_norm: float = 1.0,
    ) -> None:
        self.max_grad_norm = max_grad_norm
        self.steps = 0  # taken
        self.skipped = 0  # in a row
        self._narrow: list[tuple[nn.Parameter, nn.Parameter]] = []  # parameter, its master
        given: list[Any] = list(groups)
        mastered = [
            {**group, "params": self._masters(group["params"])}
            for group in (given if given and isinstance(given[0], dict) else [{"params": given}])
        ]
        self.inner = torch.optim.AdamW(mastered, betas=betas, weight_decay=weight_decay)

    def _masters(self, parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
        masters = []
        for parameter in parameters:
            if not parameter.requires_grad:
                continue
            master = parameter
            if parameter.dtype in (torch.bfloat16, torch.float16):
                master = nn.Parameter(parameter.detach().float())
                self._narrow.append((parameter, master))
            masters.append(master)
        return masters

    @property
    def masters(self) -> list[nn.Parameter]:
        return [parameter for group in self.inner.param_groups for parameter in group["params"]]

    @property
    def bytes_to_come(self) -> int:
        """Of gradients and moments that the next step makes and that are not there yet."""
        narrow = sum(parameter.nbytes for parameter, _ in self._narrow)
        gradients = sum(local(master).nbytes for master in self.masters if master.grad is None)
        moments = sum(2 * local(master).nbytes for master in self.masters if master not in self.inner.state)
        return narrow + gradients + moments

    def zero_grad(self) -> None:
        self.inner.zero_grad(set_to_none=True)
        for parameter, _ in self._narrow:
            parameter.grad = None

    def collect(self) -> None:
        """Take the gradients that a backward has made: called after each, they add up in fp32."""
        for parameter, master in self._narrow:
            if parameter.grad is not None:
                gradient = parameter.grad.float()
                master.grad = gradient if master.grad is None else master.grad.add_(gradient)
                parameter.grad = None

    @torch.no_grad()
    def step(self, learning_rate: float) -> float:
        """Clip the gradients, take a step and forget them; returns their norm before clipping.

        Where that is not finite no step is taken. The third time in a row raises Diverged.
        """
        self.collect()
        gradients = [master.grad for master in self.masters if master.grad is not None]
        norm = _whole_norm(gradients)
        if math.isfinite(norm):
            if gradients:
                torch._foreach_mul_(gradients, min(1.0, self.max_grad_norm / (norm + _BESIDE_NORM)))
            for group in self.inner.param_groups:
                group["lr"] = learning_rate
            self.inner.step()
            for parameter, master in self._narrow:
                parameter.copy_(master)
            self.steps, self.skipped = self.steps + 1, 0
        else:
            self.skipped += 1
        self.zero_grad()
        if self.skipped == MAX_SKIPPED:
            raise Diverged(
                f"gradients: expected finite ones, got a norm of {norm} {MAX_SKIPPED} steps in a row"
            )
        return norm

    def values(self) -> dict[str, int]:
        """What a resumed run needs, beside `tensors`."""
        return {"steps": self.steps, "skipped": self.skipped}

    def tensors(
        self, named: Mapping[str, nn.Parameter], known: Container[str] = (), *, alone: bool = False
    ) -> dict[str, Tensor]:
        """Masters and moments by the names of the parameters, as far as there are any; those in `known`,
        names of a saved state, are made. Filled anew, they have to be followed by `restore`.

        A parameter that is its own master is in it where it is a part of one, and with `alone`, for a model
        that is saved nowhere else.
        """
        masters = {id(parameter): master for parameter, master in self._narrow}
        found: dict[str, Tensor] = {}
        for name, parameter in named.items():
            if not parameter.requires_grad:
                continue
            master = masters.get(id(parameter), parameter)
            if f"{name}.exp_avg" in known and master not in self.inner.state:
                moments = {key: torch.zeros_like(master) for key in ("exp_avg", "exp_avg_sq")}
                self.inner.state[master] = {"step": torch.tensor(0.0), **moments}
            if alone or master is not parameter or isinstance(parameter, DTensor):
                found[f"{name}.master"] = master.detach()
            found |= {f"{name}.{key}": value for key, value in self.inner.state.get(master, {}).items()}
        return found

    @torch.no_grad()
    def restore(self, values: Mapping[str, int]) -> None:
        """Go on from a saved state, whose tensors are filled in."""
        self.steps, self.skipped = values["steps"], values["skipped"]
        for parameter, master in self._narrow:
            parameter.copy_(master)


def local(parameter: Tensor) -> Tensor:
    """This rank's part."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def _whole_norm(gradients: list[Tensor]) -> float:
    """Of all together, whatever part of them this rank has."""
    norm = get_total_norm(gradients)
    return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)


def not_finite(named: Iterable[tuple[str, Tensor]]) -> str:
    """The name of the first tensor that holds NaN or infinity, "" if none does."""
    return next((name for name, value in named if not bool(local(value).isfinite().all())), "")
