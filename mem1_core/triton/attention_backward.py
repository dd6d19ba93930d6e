"""Trajectory attention, backward: dQ over the live key tiles of a query block, dK and dV over the live query
tiles of a key block. Each recomputes the weights from the log-sum-exp. No atomics: each output has one
writer.

As in the forward, loops have no branch and dQ has SANITIZE ones for keys that are not finite. dK and dV need
none: a key touches only its own rows of them.
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
    chunk,
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
def _attend_backward(
    dq, rows, i, places, keys, tiles, begin, end, scale, cap_scale,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr,
    V_CHUNKS: tl.constexpr, LOAD_ON_USE: tl.constexpr, MASKED: tl.constexpr, SANITIZE: tl.constexpr,
):  # fmt: skip
    """dq + what the key tiles tiles[begin:end] add to it."""
    q, d_out, lse, delta = rows
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
        d_weight = products(d_out, v, BLOCK_Q, BLOCK_K, CHUNK, V_CHUNKS, LOAD_ON_USE)
        d_score = tl.exp2(score * scale - lse[:, None]) * (d_weight - delta[:, None])
        if cap_scale is not None:
            d_score *= 1.0 - score * score
        if MASKED:
            visible = visible_pairs(i, places, first, keys_of_mask, row, BLOCK_K)
            d_score = tl.where(visible, d_score, 0.0)
        dq = add_rows(dq, d_score, k, BLOCK_K, CHUNK, CHUNKS, LOAD_ON_USE, SANITIZE)
    return dq


@triton.jit
def _attend_row_backward(
    rows, i, places, keys, lists, scale, cap_scale,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr,
    V_CHUNKS: tl.constexpr, LOAD_ON_USE: tl.constexpr, SANITIZE: tl.constexpr,
):  # fmt: skip
    full_tiles, full_begin, full_end, partial_tiles, partial_begin, partial_end = lists
    dq = zeros(BLOCK_Q, CHUNK, CHUNKS)
    dq = _attend_backward(
        dq, rows, i, places, keys, full_tiles, full_begin, full_end, scale, cap_scale,
        BLOCK_Q, BLOCK_K, CHUNK, CHUNKS, V_CHUNKS, LOAD_ON_USE, False, SANITIZE,
    )  # fmt: skip
    return _attend_backward(
        dq, rows, i, places, keys, partial_tiles, partial_begin, partial_end, scale, cap_scale,
        BLOCK_Q, BLOCK_K, CHUNK, CHUNKS, V_CHUNKS, LOAD_ON_USE, True, SANITIZE,
    )  # fmt: skip


# Rows of lse, d_lse, evict and positions begin anywhere: to know their first addresses better brings nothing.
@triton.jit(
    do_not_specialize=["copies", "tokens", "heads", "group", "units"],
    do_not_specialize_on_alignment=["lse", "d_lse", "positions"],
)
def backward_dq(
    q_desc, k_desc, v_desc, evict_desc, positions, limit_desc, out_desc, d_out_desc,
    lse, d_lse, row_lse, row_delta, dq,
    full_offsets, full_tiles, partial_offsets, partial_tiles, order,
    copies, tokens, heads, group, units, scale, cap_scale,
    CHUNK: tl.constexpr, CHUNKS: tl.constexpr, V_CHUNKS: tl.constexpr, LOAD_ON_USE: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """dq [B, N, heads, D]; leaves for backward_dk_dv, per row of q, row_lse (in log2) and row_delta, the sum
    of out * d_out less d_lse: [B * heads, N rounded up to whole tiles], inf and 0 past the last token."""
    row, batch, head, first = program(order, copies, tokens, heads, BLOCK_Q)
    lists = tile_lists(full_offsets, full_tiles, partial_offsets, partial_tiles, row)
    i = first + tl.arange(0, BLOCK_Q)
    places = None
    if positions is not None:
        places = positions_of(positions, batch // copies, i, tokens)
    out = operand(out_desc, batch, head, first, BLOCK_Q, CHUNK, V_CHUNKS, LOAD_ON_USE)
    d_out = operand(d_out_desc, batch, head, first, BLOCK_Q, CHUNK, V_CHUNKS, LOAD_ON_USE)
    delta = tl.zeros([BLOCK_Q], tl.float32)
    for c in tl.static_range(V_CHUNKS):
        left = chunk(out, c, BLOCK_Q, CHUNK, LOAD_ON_USE).to(tl.float32)
        delta += tl.sum(left * chunk(d_out, c, BLOCK_Q, CHUNK, LOAD_ON_USE).to(tl.float32), axis=1)
    at = (batch * heads + head).to(tl.int64) * tokens + i
    if d_lse is not None:
        delta -= tl.load(d_lse + at, mask=i < tokens, other=0.0)
    log_total = tl.load(lse + at, mask=i < tokens, other=INFINITY) * LOG2E
    at = (batch * heads + head).to(tl.int64) * (tl.cdiv(tokens, TILE) * TILE) + i
    tl.store(row_lse + at, log_total)
    tl.store(row_delta + at, delta)
    q = operand(q_desc, batch, head, first, BLOCK_Q, CHUNK, CHUNKS, LOAD_ON_USE)
    rows = (q, d_out, log_total, delta)
    keys = (k_desc, v_desc, (evict_desc, limit_desc), batch, head // group, batch // copies)
    acc = _attend_row_backward(
        rows, i, places, keys, lists, scale, cap_scale,
        BLOCK_Q, BLOCK_K, CHUNK, CHUNKS, V_CHUNKS, LOAD_ON_USE, False,
    )  # fmt: skip
    if not_finite(acc, CHUNKS):
        acc = _attend_row_backward(
            rows, i, places, keys, lists, scale, cap_scale,
            BLOCK_Q, BLOCK_K, CHUNK, CHUNKS, V_CHUNKS, LOAD_ON_USE, True,
        )  # fmt: skip
    acc = scaled(acc, slope(scale, cap_scale), CHUNKS)
    store(dq, acc, batch, head, first, tokens, heads, units, BLOCK_Q, CHUNK, CHUNKS)


@triton.jit
def slope(scale, cap_scale):
    """The softmax scale, which is what a product of q and k changes its score by, but for 1 - tanh^2."""
    return scale * LN2 if cap_scale is None else scale * LN2 * cap_scale


@triton.jit
def _gather(
    dk, dv, k, v, j, evict, limit, queries, tiles, begin, gap_begin, gap_end, end, scale, cap_scale,
    heads_per_program, SEVERAL_HEADS: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    CHUNK: tl.constexpr, CHUNKS: tl.constexpr, V_CHUNKS: tl.constexpr, LOAD_ON_USE: tl.constexpr,
    MASKED: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr,
):  # fmt: skip
    """dk (if DK) and dv (if DV) + what query tiles add to them: [begin, end) without [gap_begin, gap_end), or
    in a window those of tiles[begin:end].

    One loop over all heads and their tiles, as the copies ahead of it start over with each loop.
    """
    q_desc, d_out_desc, row_lse_desc, row_delta_desc, positions_desc, batch, mask_row, heads, writer = queries
    PARTS: tl.constexpr = TILE // BLOCK_Q
    before = (gap_begin - begin) * PARTS
    count = before + (end - gap_end) * PARTS
    for n in range(0, heads_per_program * count):
        nth = n // tl.maximum(count, 1) if SEVERAL_HEADS else 0
        head = writer * heads_per_program + nth
        row = batch * heads + head
        n -= nth * count
        if tiles is None:
            first = (n + tl.where(n < before, begin * PARTS, gap_end * PARTS - before)) * BLOCK_Q
        else:
            first = first_token(tl.load(tiles + begin + n // PARTS), n, PARTS, BLOCK_Q)
        q = operand(q_desc, batch, head, first, BLOCK_Q, CHUNK, CHUNKS, LOAD_ON_USE)
        d_out = operand(d_out_desc, batch, head, first, BLOCK_Q, CHUNK, V_CHUNKS, LOAD_ON_USE)
        # dv before d_weight: the fewer values live at once, the fewer spill.
        score = products(k, q, BLOCK_K, BLOCK_Q, CHUNK, CHUNKS, LOAD_ON_USE)
        if cap_scale is not None:
            score = tanh(score * cap_scale)
        weight = tl.exp2(score * scale - row_lse_desc.load([row, first]).reshape(BLOCK_Q)[None, :])
        if MASKED:
            i = first + tl.arange(0, BLOCK_Q)
            visible = (j[:, None] <= i[None, :]) & (i[None, :] < evict[:, None])
            if limit is not None:
                places = positions_desc.load([mask_row, first]).reshape(BLOCK_Q)
                visible &= places[None, :] < limit[:, None]
            weight = tl.where(visible, weight, 0.0)
        if DV:
            dv = add_rows(dv, weight, d_out, BLOCK_Q, CHUNK, V_CHUNKS, LOAD_ON_USE, False)
        if DK:
            d_weight = products(v, d_out, BLOCK_K, BLOCK_Q, CHUNK, V_CHUNKS, LOAD_ON_USE)
            d_score = weight * (d_weight - row_delta_desc.load([row, first]).reshape(BLOCK_Q)[None, :])
            if cap_scale is not None:
                d_score *= 1.0 - score * score
            if MASKED:  # again, as 0 * NaN is NaN
                d_score = tl.where(visible, d_score, 0.0)
            dk = add_rows(dk, d_score, q, BLOCK_Q, CHUNK, CHUNKS, LOAD_ON_USE, False)
    return dk, dv


@triton.jit
def _gather_row(
    k, v, j, evict, limit, queries, live, scale, cap_scale, heads_per_program,
    SEVERAL_HEADS: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    CHUNK: tl.constexpr, CHUNKS: tl.constexpr, V_CHUNKS: tl.constexpr, LOAD_ON_USE: tl.constexpr,
    DK: tl.constexpr, DV: tl.constexpr,
):  # fmt: skip
    """(dk, dv) over all live query tiles: the full ones, then the partial ones on both sides of them."""
    full_tiles, full_begin, full_end, tiles, begin, gap_begin, gap_end, end = live
    dk = zeros(BLOCK_K, CHUNK, CHUNKS if DK else 0)
    dv = zeros(BLOCK_K, CHUNK, V_CHUNKS if DV else 0)
    dk, dv = _gather(
        dk, dv, k, v, j, evict, limit, queries, full_tiles, full_begin, full_end, full_end, full_end,
        scale, cap_scale, heads_per_program,
        SEVERAL_HEADS, BLOCK_Q, BLOCK_K, CHUNK, CHUNKS, V_CHUNKS, LOAD_ON_USE, False, DK, DV,
    )  # fmt: skip
    return _gather(
        dk, dv, k, v, j, evict, limit, queries, tiles, begin, gap_begin, gap_end, end,
        scale, cap_scale, heads_per_program,
        SEVERAL_HEADS, BLOCK_Q, BLOCK_K, CHUNK, CHUNKS, V_CHUNKS, LOAD_ON_USE, True, DK, DV,
    )  # fmt: skip


@triton.jit(
    do_not_specialize=["copies", "tokens", "heads", "group", "units", "v_units", "heads_per_program"],
    do_not_specialize_on_alignment=["evict", "limits"],
)
def backward_dk_dv(
    q_desc, k_desc, v_desc, d_out_desc, row_lse_desc, row_delta_desc, evict, positions_desc, limits,
    dk, dv, ranges, key_full_offsets, key_full_tiles, key_partial_offsets, key_partial_tiles, order,
    copies, tokens, heads, group, heads_per_program, units, v_units, scale, cap_scale,
    SEVERAL_HEADS: tl.constexpr,
    CHUNK: tl.constexpr, CHUNKS: tl.constexpr, V_CHUNKS: tl.constexpr, LOAD_ON_USE: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """dk and dv [B, N, heads / heads_per_program, D]: a program sums over so many query heads of one KV head.

    Compiled twice, for one head (not SEVERAL_HEADS) and for any other number of them.
    """
    heads_per_program = heads_per_program if SEVERAL_HEADS else 1
    plan_row, batch, writer, first = program(order, copies, tokens, heads // heads_per_program, BLOCK_K)
    if limits is None:
        begin, full_begin = tl.load(ranges + plan_row * 4), tl.load(ranges + plan_row * 4 + 1)
        full_end, end = tl.load(ranges + plan_row * 4 + 2), tl.load(ranges + plan_row * 4 + 3)
        live = (None, full_begin, full_end, None, begin, full_begin, full_end, end)
    else:
        full_tiles, full_begin, full_end, tiles, begin, end = tile_lists(
            key_full_offsets, key_full_tiles, key_partial_offsets, key_partial_tiles, plan_row
        )
        live = (full_tiles, full_begin, full_end, tiles, begin, end, end, end)
    j = first + tl.arange(0, BLOCK_K)
    lifetime = tl.load(evict + (batch // copies).to(tl.int64) * tokens + j, mask=j < tokens, other=0)
    limit = None
    if limits is not None:
        limit = positions_of(limits, batch // copies, j, tokens)
    kv_head = writer * heads_per_program // group
    k = operand(k_desc, batch, kv_head, first, BLOCK_K, CHUNK, CHUNKS, LOAD_ON_USE)
    v = operand(v_desc, batch, kv_head, first, BLOCK_K, CHUNK, V_CHUNKS, LOAD_ON_USE)
    queries = (
        q_desc, d_out_desc, row_lse_desc, row_delta_desc, positions_desc,
        batch, batch // copies, heads, writer,
    )  # fmt: skip
    dk_acc, dv_acc = _gather_row(
        k, v, j, lifetime, limit, queries, live, scale, cap_scale, heads_per_program,
        SEVERAL_HEADS, BLOCK_Q, BLOCK_K, CHUNK, CHUNKS, V_CHUNKS, LOAD_ON_USE, not LOAD_ON_USE, True,
    )  # fmt: skip
    writers = heads // heads_per_program
    rows = units if v_units is None else v_units  # which plain attention has no register for
    store(dv, dv_acc, batch, writer, first, tokens, writers, rows, BLOCK_K, CHUNK, V_CHUNKS)
    if LOAD_ON_USE:  # both at once do not fit into the registers
        dk_acc, _ = _gather_row(
            k, v, j, lifetime, limit, queries, live, scale, cap_scale, heads_per_program,
            SEVERAL_HEADS, BLOCK_Q, BLOCK_K, CHUNK, CHUNKS, V_CHUNKS, LOAD_ON_USE, True, False,
        )  # fmt: skip
    dk_acc = scaled(dk_acc, slope(scale, cap_scale), CHUNKS)
    store(dk, dk_acc, batch, writer, first, tokens, writers, units, BLOCK_K, CHUNK, CHUNKS)
