"""Masks and inputs of every awkward kind, shared by tests and benches. What is drawn follows from a seed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mem1_core.segments import Segment

# ------------------------------------------------------------------------------------------ evict tables
# Each takes (n, seed) and returns int32 [n] with j < evict[j] <= n.


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def causal_evict(n: int, seed: int = 0) -> Tensor:
    """Nothing is ever evicted: plain causal attention."""
    return torch.full((n,), n, dtype=torch.int32)


def random_evict(n: int, seed: int = 0) -> Tensor:
    """evict[j] uniform in (j, n]."""
    keys = torch.arange(n)
    draw = torch.rand(n, generator=_generator(seed), dtype=torch.float64)
    return (keys + 1 + (draw * (n - keys)).long()).to(torch.int32)


def monotone_evict(n: int, seed: int = 0) -> Tensor:
    """A window of changing width that never moves back: evict does not decrease."""
    if n == 0:
        return torch.empty(0, dtype=torch.int32)
    width = torch.randint(1, max(2, n // 3), (n,), generator=_generator(seed))
    return (torch.arange(n) + width).clamp(max=n).cummax(0).values.to(torch.int32)


def adversarial_evict(n: int, seed: int = 0, tile: int = 64) -> Tensor:
    """What a tile plan gets wrong first: keys seen by themselves only beside keys that live for ever, and
    deaths on a tile boundary or one token to either side of it."""
    generator = _generator(seed)
    keys = torch.arange(n)
    boundary = (keys // tile + torch.randint(1, 4, (n,), generator=generator)) * tile
    choices = torch.stack([keys + 1, boundary - 1, boundary, boundary + 1, torch.full((n,), n)])
    pick = torch.randint(0, len(choices), (n,), generator=generator)
    # Whole tiles of short-lived keys, so that dead tiles occur too, with one survivor here and there.
    lonely = torch.rand(n // tile + 1, generator=generator).repeat_interleave(tile)[:n] < 0.4
    pick = torch.where(lonely & (torch.rand(n, generator=generator) < 0.98), 0, pick)
    chosen = choices.gather(0, pick[None])[0]
    return torch.minimum(torch.maximum(chosen, keys + 1), torch.tensor(n)).to(torch.int32)


def packed_evict(n: int, seed: int = 0) -> Tensor:
    """Documents packed end to end: evict = end of the document."""
    ends = torch.arange(1, n + 1)
    is_end = torch.rand(n, generator=_generator(seed)) < 4 / max(n, 1)
    if n:
        is_end[-1] = True
    ends = ends[is_end]
    return ends[torch.searchsorted(ends, torch.arange(n), right=True)].to(torch.int32)


def prefix_tree_evict(n: int, seed: int = 0) -> Tensor:
    """A random prefix tree in depth-first order: evict = end of the subtree that hangs below the token."""
    generator = _generator(seed)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    evict = torch.full((n,), n, dtype=torch.int32)
    path: list[int] = []  # first tokens of the open nodes, root first
    position = 0
    while position < n:
        depth = draw(0, len(path) + 1) if path else 0
        if depth < len(path):
            closed = evict[path[depth] : position]  # the subtree of a closed node ends here, if not earlier
            closed.clamp_(max=position)
            del path[depth:]
        path.append(position)
        position += draw(1, max(2, n // 8))
    return evict


EVICT_TABLES: dict[str, Callable[[int, int], Tensor]] = {
    "causal": causal_evict,
    "random": random_evict,
    "monotone": monotone_evict,
    "adversarial": adversarial_evict,
    "packed": packed_evict,
    "prefix_tree": prefix_tree_evict,
}


def mem1_segments(
    turns: int, *, prompt: int = 396, internal_state: int = 84, query: int = 36, info: int = 380
) -> list[Segment]:
    """A MEM1 trajectory: the prompt, then `turns` times `<IS>`, `<query>` and `<info>`; lengths in tokens."""
    segments = [Segment("prompt", 0, prompt)]
    for turn in range(1, turns + 1):
        segments.append(Segment("state", turn, internal_state))
        segments.append(Segment("query", turn, query))
        segments.append(Segment("info", turn, info))
    return segments


# ---------------------------------------------------------------------------------------------- tensors

# The two trajectories that every attention figure of this project is measured on, by their length in tokens.
MEM1_TRAJECTORIES: dict[int, list[Segment]] = {
    3_396: mem1_segments(6),
    11_852: mem1_segments(16, internal_state=180, info=500),
}


LAYOUTS = ("contiguous", "transposed", "fused", "padded")


def attention_inputs(
    batch: int,
    tokens: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    layout: str = "contiguous",
    requires_grad: bool = False,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Random q [B, N, Hq, D], k and v [B, N, Hkv, D]; the same numbers whatever the layout in memory.

    layout: "contiguous"; "transposed" (memory [B, H, N, D]); "fused" (slices of one [B, N, Hq + 2 Hkv, D]
    projection); "padded" (every row D of a longer one, so that no stride is a product of sizes).
    """
    generator = _generator(seed)
    sizes = (heads, kv_heads, kv_heads)
    q, k, v = (torch.randn(batch, tokens, h, head_dim, generator=generator).to(device, dtype) for h in sizes)
    if layout == "transposed":
        q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
    elif layout == "fused":
        q, k, v = torch.cat([q, k, v], dim=2).split(sizes, dim=2)
    elif layout == "padded":
        q, k, v = (torch.nn.functional.pad(x, (0, 8))[..., :head_dim] for x in (q, k, v))
    elif layout != "contiguous":
        raise ValueError(f"layout: expected one of {LAYOUTS}, got {layout!r}")
    q, k, v = (x.detach().requires_grad_(requires_grad) for x in (q, k, v))
    return q, k, v


KV_LAYOUTS = ("tokens", "heads", "padded", "misaligned", "layers")


def kv_cache(
    layers: int,
    rows: int,
    slots: int,
    heads: int,
    head_dim: int,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    layout: str = "tokens",
    seed: int = 0,
) -> Any:
    """A random cache [L, 2, rows, slots, Hkv, D]; the same numbers whatever the layout in memory.

    rows are sequences, or the pages of a paged cache. layout: "tokens" (contiguous); "heads" (memory [..,
    Hkv, slots, D]); "padded" (every row D of a longer one); "misaligned" (the same by one element, so that no
    entry starts where a vector could be loaded); "layers" (a list of L separate pairs (key, value)).
    """
    shape = (layers, 2, rows, slots, heads, head_dim)
    generator = _generator(seed)
    if dtype.is_floating_point:
        kv = torch.randn(shape, generator=generator, device="cpu").to(device, dtype)
    else:
        kv = torch.randint(0, 256, shape, generator=generator, device="cpu").to(device, dtype)
    if layout == "heads":
        return kv.transpose(3, 4).contiguous().transpose(3, 4)
    if layout == "padded":
        return torch.nn.functional.pad(kv, (0, 8))[..., :head_dim]
    if layout == "misaligned":
        return torch.nn.functional.pad(kv, (1, 0))[..., 1:]
    if layout == "layers":
        return [(layer[0].clone(), layer[1].clone()) for layer in kv]
    if layout != "tokens":
        raise ValueError(f"layout: expected one of {KV_LAYOUTS}, got {layout!r}")
    return kv


KEEP_PATTERNS = ("random", "none", "all", "prefix", "suffix", "alternating", "mem1")


def keep_mask(pattern: str, lengths: Sequence[int], slots: int, seed: int = 0) -> Tensor:
    """bool [B, slots]: what stays of the first lengths[b] entries of each sequence; chance past them.

    "mem1" is what a turn of MEM1 leaves of the prompt, the previous turn and the action just written.
    """
    generator = _generator(seed)
    keep = torch.rand(len(lengths), slots, generator=generator, device="cpu") < 0.5
    for row, n in zip(keep, lengths, strict=True):
        slot = torch.arange(n, device="cpu")
        if pattern == "mem1":
            row[:n] = (slot < 396 * n // 1016) | (slot >= 896 * n // 1016)
        elif pattern != "random":
            row[:n] = {
                "none": slot < 0,
                "all": slot >= 0,
                "prefix": slot < n // 2,
                "suffix": slot >= n // 2,
                "alternating": slot % 2 == 1,
            }[pattern]
    return keep


def ranges_of(keep: Tensor, lengths: Sequence[int]) -> list[list[tuple[int, int]]]:
    """A mask as sorted ranges [begin, end) for each sequence."""
    ranges = []
    for row, n in zip(keep.tolist(), lengths, strict=True):
        edges = [s for s in range(n + 1) if (s < n and row[s]) != (s > 0 and row[s - 1])]
        ranges.append(list(zip(edges[::2], edges[1::2], strict=True)))
    return ranges
