"""The public ops. Each takes `backend="auto" | "cpu" | "reference" | ...`; see `mem1_core.backend`."""

from mem1_core.ops.attention import trajectory_attention
from mem1_core.ops.cached_attention import cached_attention
from mem1_core.ops.kv_cache import prune_kv_cache_, prune_paged_kv_cache_

__all__ = ["cached_attention", "prune_kv_cache_", "prune_paged_kv_cache_", "trajectory_attention"]
