"""The other implementations of attention that a bench times beside ours.

Each function returns a callable q, k, v -> out. SDPA and FlexAttention take [B, H, N, D], the flash-attn
family and FlashMask [B, N, H, D]. What is optional is imported on the first call: a peer that is not
installed then raises ImportError, which `measure.compare` turns into a row that says so.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch._dynamo import config as dynamo
from torch._functorch import config as functorch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from mem1_core.mask import TrajectoryMask

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]

FLEX_BLOCK = 128

# Causal only. FlashAttention 2 is also what SDPA's flash backend runs.
FLASH_ATTENTION = {
    "flash-attn 2": "flash_attn.flash_attn_interface",
    "flash-attn 3": "flash_attn_interface",
    "flash-attn 4": "flash_attn.cute",
}


def sdpa(backend: SDPBackend, **options: Any) -> Attention:
    """torch's own attention by one named backend, or an error that it cannot."""

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        # On the CPU, in a quick test, there are no such backends.
        with sdpa_kernel(backend if q.is_cuda else SDPBackend.MATH):
            return scaled_dot_product_attention(q, k, v, enable_gqa=k.shape[1] != q.shape[1], **options)

    return attention


def sdpa_repeated_heads(backend: SDPBackend, **options: Any) -> Attention:
    """The same for a backend without grouped heads: each KV head is copied for its query heads."""
    attention = sdpa(backend, **options)

    def repeated(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        group = q.shape[1] // k.shape[1]
        return attention(q, *(x.repeat_interleave(group, dim=1) for x in (k, v)))

    return repeated


def flash_attention(module: str) -> Attention:
    """`flash_attn_func` of one of FLASH_ATTENTION's modules, causal."""

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = import_module(module).flash_attn_func(q, k, v, causal=True)
        return out[0] if isinstance(out, tuple) else out  # some versions return the log-sum-exp too

    return attention


def flashmask(mask: TrajectoryMask) -> Attention:
    """FlashMask: the same O(N) mask, as the first row from which on a key of a causal mask is hidden.

    Its build for torch, sm_90 only; all others take Paddle's tensors.
    """
    hidden_from = mask.evict_at[:, None, :, None]

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        run = import_module("flashmask_interface").flashmask_attention
        return run(q, k, v, hidden_from, causal=True)

    return attention


def flex(blocks: BlockMask, compiled: bool) -> Attention:
    """FlexAttention in its default configuration; uncompiled it is dense, for small shapes only."""

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        run: Any = _compiled_flex() if compiled else flex_attention
        return run(q, k, v, block_mask=blocks, enable_gqa=True)

    return attention


@functools.cache
def _compiled_flex() -> Any:
    # One function for all: masks of one shape share their code. There are more shapes and dtypes than the 8
    # versions allowed by default, and to pass that limit is an error under fullgraph.
    dynamo.recompile_limit = 64
    # With donated buffers a backward could not run twice over one forward, which is how it is timed alone.
    functorch.donated_buffer = False
    return torch.compile(flex_attention, dynamic=False, fullgraph=True)


def block_mask(mask: TrajectoryMask) -> BlockMask:
    """FlexAttention's block mask straight from our tile plan: O(N + live tiles), where create_block_mask
    visits every pair.

    Flex wants, per query tile, the number and the padded list of the key tiles that need the mask, and of
    those that do not: exactly the plan's two CSR lists.
    """
    plan = mask.tile_plan(FLEX_BLOCK, FLEX_BLOCK)
    batch, tokens = mask.evict_at.shape
    tiles = -(-tokens // FLEX_BLOCK)

    def padded(offsets: Tensor, members: Tensor) -> tuple[Tensor, Tensor]:
        counts = offsets.diff()
        slots = torch.arange(tiles, device=mask.device)
        taken = slots < counts[:, None]
        lists = torch.zeros(batch * tiles, tiles, dtype=torch.int32, device=mask.device)
        lists[taken] = members[: int(offsets[-1])]  # on CUDA the list is longer than what is filled of it
        return counts.int().view(batch, 1, tiles), lists.view(batch, 1, tiles, tiles)

    evict, places, limits = mask.evict_at, mask.positions, mask.limits

    def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        alive = (j <= i) & (i < evict[b, j])
        return alive if places is None or limits is None else alive & (places[b, i] < limits[b, j])

    return BlockMask.from_kv_blocks(
        *padded(plan.partial_offsets, plan.partial_tiles),
        *padded(plan.full_offsets, plan.full_tiles),
        BLOCK_SIZE=FLEX_BLOCK,
        mask_mod=visible,
        seq_lengths=(tokens, tokens),
    )
