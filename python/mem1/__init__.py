"""MEM1 agents: rollout, reinforcement learning and evaluation on the kernels of `mem1_core`."""
