"""Trajectory attention, forward: online softmax over the live key tiles of a query block.

Full tiles (no mask) and partial ones are walked in two loops, neither with a branch: that is what lets
Triton copy the next tiles into shared memory while the tensor cores work on this one. Scores are kept in
units of log2, as the hardware's exponential is 2^x.

A value that is not finite must not touch the queries that do not see it, but there its weight is 0, and 0 *
NaN is NaN. Cleaning every tile on its way to the tensor cores would cost each call; instead the loops run
as if all were finite, and a program whose sum does not come out finite starts again with SANITIZE loops.
"""

# mypy: ignore-errors
# (Python is only the syntax here: Triton compiles these functions)

import triton
import triton.language as tl

from mem1_core.triton.attention_tiles import (
    INFINITY,
    LN2,
    LOG2E,
    TILE,
    add_rows,
    bad_rows,
    first_token,
    next_tile,
    not_finite,
    operand,
    positions_of,
    products,
    program,
    scaled,
    store,
    tanh,
    tile_lists,
    visible_pairs,
    zeros,
)


@triton.jit
def _attend(
    state, q, i, places, keys, tiles, begin, end, scale, cap_scale,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr,
    V_CHUNKS: tl.constexpr, LOAD_ON_USE: tl.constexpr, MASKED: tl.constexpr, SANITIZE: tl.constexpr,
):  # fmt: skip
    """Online softmax over the key tiles tiles[begin:end]; state is (sum of rows, sum of weights, maximum)."""
    acc, total, top = state
    k_desc, v_desc, keys_of_mask, batch, head, row = keys
    PARTS: tl.constexpr = TILE // BLOCK_K
    tile = next_tile(tiles, begin * PARTS, end * PARTS, PARTS)
    for n in range(begin * PARTS, end * PARTS):
        first = first_token(tile, n, PARTS, BLOCK_K)
        tile = next_tile(tiles, n + 1, end * PARTS, PARTS)
        k = operand(k_desc, batch, head, first, BLOCK_K, CHUNK, CHUNKS, LOAD_ON_USE)
        v = operand(v_desc, batch, head, first, BLOCK_K, CHUNK, V_CHUNKS, LOAD_ON_USE)
        score = products(q, k, BLOCK_Q, BLOCK_K, CHUNK, CHUNKS, LOAD_ON_USE)
        if cap_scale is not None:
            score = tanh(score * cap_scale)
        if SANITIZE:
            # A bad k has made bad scores: NaN, or -inf, which leaves the key out.
            bad = bad_rows(v, BLOCK_K, CHUNK, V_CHUNKS, LOAD_ON_USE)
            score += tl.where(bad, float("nan"), 0.0)[None, :]
        if MASKED:
            score = tl.where(visible_pairs(i, places, first, keys_of_mask, row, BLOCK_K), score, -INFINITY)
        new_top = tl.maximum(top, tl.max(score, axis=1) * scale)
        base = new_top
        if MASKED:  # a row that has seen nothing yet
            base = tl.where(new_top == -INFINITY, 0.0, new_top)
        weight = tl.exp2(score * scale - base[:, None])
        shrink = tl.exp2(top - base)
        total = total * shrink + tl.sum(weight, axis=1)
        acc = scaled(acc, shrink[:, None], V_CHUNKS)
        acc = add_rows(acc, weight, v, BLOCK_K, CHUNK, V_CHUNKS, LOAD_ON_USE, SANITIZE)
        top = new_top
    return acc, total, top


@triton.jit
def _attend_row(
    q, i, places, keys, lists, scale, cap_scale,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr,
    V_CHUNKS: tl.constexpr, LOAD_ON_USE: tl.constexpr, SANITIZE: tl.constexpr,
):  # fmt: skip
    """All live key tiles of a query block: the full ones, then the partial ones."""
    full_tiles, full_begin, full_end, partial_tiles, partial_begin, partial_end = lists
    empty = tl.full([BLOCK_Q], -INFINITY, tl.float32)
    state = (zeros(BLOCK_Q, CHUNK, V_CHUNKS), tl.zeros([BLOCK_Q], tl.float32), empty)
    state = _attend(
        state, q, i, places, keys, full_tiles, full_begin, full_end, scale, cap_scale,
        BLOCK_Q, BLOCK_K, CHUNK, CHUNKS, V_CHUNKS, LOAD_ON_USE, False, SANITIZE,
    )  # fmt: skip
    return _attend(
        state, q, i, places, keys, partial_tiles, partial_begin, partial_end, scale, cap_scale,
        BLOCK_Q, BLOCK_K, CHUNK, CHUNKS, V_CHUNKS, LOAD_ON_USE, True, SANITIZE,
    )  # fmt: skip


@triton.jit(
    do_not_specialize=["copies", "tokens", "heads", "group", "units"],
    do_not_specialize_on_alignment=["positions", "sinks"],
)
def forward(
    q_desc, k_desc, v_desc, evict_desc, positions, limit_desc, sinks, out, lse,
    full_offsets, full_tiles, partial_offsets, partial_tiles, order,
    copies, tokens, heads, group, units, scale, cap_scale,
    CHUNK: tl.constexpr, CHUNKS: tl.constexpr, V_CHUNKS: tl.constexpr, LOAD_ON_USE: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out [B, N, heads, Dv] and lse [B, heads, N] (natural); scale is the softmax scale times log2(e). With a
    soft cap: that is cap * log2(e), and cap_scale the softmax scale / cap; else None. positions and limits of
    the keys for a window, sinks [heads], or None."""
    row, batch, head, first = program(order, copies, tokens, heads, BLOCK_Q)
    lists = tile_lists(full_offsets, full_tiles, partial_offsets, partial_tiles, row)
    keys = (k_desc, v_desc, (evict_desc, limit_desc), batch, head // group, batch // copies)
    i = first + tl.arange(0, BLOCK_Q)
    places = None
    if positions is not None:
        places = positions_of(positions, batch // copies, i, tokens)
    q = operand(q_desc, batch, head, first, BLOCK_Q, CHUNK, CHUNKS, LOAD_ON_USE)
    acc, total, top = _attend_row(
        q, i, places, keys, lists, scale, cap_scale,
        BLOCK_Q, BLOCK_K, CHUNK, CHUNKS, V_CHUNKS, LOAD_ON_USE, False,
    )  # fmt: skip
    if not_finite(acc, V_CHUNKS):
        acc, total, top = _attend_row(
            q, i, places, keys, lists, scale, cap_scale,
            BLOCK_Q, BLOCK_K, CHUNK, CHUNKS, V_CHUNKS, LOAD_ON_USE, True,
        )  # fmt: skip
    if sinks is not None:  # a key more, whose value is 0
        sink = tl.load(sinks + head) * LOG2E
        new_top = tl.maximum(top, sink)
        shrink = tl.exp2(top - new_top)
        total = total * shrink + tl.exp2(sink - new_top)
        acc = scaled(acc, shrink[:, None], V_CHUNKS)
        top = new_top
    at = (batch * heads + head).to(tl.int64) * tokens + i
    tl.store(lse + at, (top + tl.log2(total)) * LN2, mask=i < tokens)  # -inf for a row that sees nothing
    acc = scaled(acc, (1.0 / tl.where(total == 0.0, 1.0, total))[:, None], V_CHUNKS)
    store(out, acc, batch, head, first, tokens, heads, units, BLOCK_Q, CHUNK, V_CHUNKS)
