"""MEM1 agents: rollout, reinforcement learning and evaluation on the kernels of `mem1_core`."""

from mem1.agent import MemoryEfficientAgent
from mem1.trajectory import Trajectory

__all__ = ["MemoryEfficientAgent", "Trajectory"]
