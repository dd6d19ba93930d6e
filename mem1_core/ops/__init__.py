"""The public ops. Each takes `backend="auto" | "cpu" | "reference" | ...`; see `mem1_core.backend`."""

from mem1_core.ops.attention import trajectory_attention
from mem1_core.ops.cached_attention import cached_attention
from mem1_core.ops.gae import gae, masked_whiten
from mem1_core.ops.kv_cache import prune_kv_cache_, prune_paged_kv_cache_
from mem1_core.ops.logprob import linear_logprob
from mem1_core.ops.ppo_loss import fused_linear_ppo_loss
from mem1_core.ops.value_loss import clipped_value_loss

__all__ = [
    "cached_attention",
    "clipped_value_loss",
    "fused_linear_ppo_loss",
    "gae",
    "linear_logprob",
    "masked_whiten",
    "prune_kv_cache_",
    "prune_paged_kv_cache_",
    "trajectory_attention",
]
