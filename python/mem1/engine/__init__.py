"""Batched generation over a KV cache that is pruned in place. Knows no episodes."""
