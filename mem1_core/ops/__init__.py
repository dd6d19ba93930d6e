"""The public ops. Each takes `backend="auto" | "cpu" | "reference" | ...`; see `mem1_core.backend`."""

from mem1_core.ops.attention import trajectory_attention

__all__ = ["trajectory_attention"]
