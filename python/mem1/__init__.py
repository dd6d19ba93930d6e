"""MEM1 agents: rollout, reinforcement learning and evaluation on the kernels of `mem1_core`."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mem1.agent import MemoryEfficientAgent
    from mem1.trajectory import Trajectory

__all__ = ["MemoryEfficientAgent", "Trajectory"]

_HOMES = {"MemoryEfficientAgent": "mem1.agent", "Trajectory": "mem1.trajectory"}


def __getattr__(name: str) -> object:
    # Not before they are asked for: torch takes seconds to load.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_HOMES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
