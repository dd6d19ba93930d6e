"""What the attention kernels share: operands in chunks of channels, products of them, the walk over the tile
plan.

A head dim is cut into CHUNKS of CHUNK channels, a power of two each, so that 96 or 192 channels are not
padded. An operand is a tuple of its chunks. With LOAD_ON_USE (float32, which needs twice the registers) it is
only the place in memory from which a chunk is read when it is used.

Whatever a loop reads comes through a tensor descriptor: the copy engine fills in 0 past the end of the
tensor, so that bounds cost nothing.
"""

# mypy: ignore-errors
# (Python is only the syntax here: Triton compiles these functions)

import triton
import triton.language as tl

TILE = tl.constexpr(128)  # the plan's tiles, both ways; a kernel's own blocks are this or parts of it
LN2 = tl.constexpr(0.6931471805599453)
LOG2E = tl.constexpr(1.4426950408889634)
INFINITY = tl.constexpr(float("inf"))


@triton.jit
def operand(
    desc, batch, head, first,
    ROWS: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr, LOAD_ON_USE: tl.constexpr,
):  # fmt: skip
    """Rows [first, first + ROWS) of one head of a [B, H, N, D] tensor."""
    if LOAD_ON_USE:
        return (desc, batch, head, first)
    else:
        chunks = ()
        for c in tl.static_range(CHUNKS):
            chunks = chunks + (desc.load([batch, head, first, c * CHUNK]).reshape(ROWS, CHUNK),)
        return chunks


@triton.jit
def chunk(operand, c, ROWS: tl.constexpr, CHUNK: tl.constexpr, LOAD_ON_USE: tl.constexpr):
    """[ROWS, CHUNK]: chunk c."""
    if LOAD_ON_USE:
        desc, batch, head, first = operand
        return desc.load([batch, head, first, c * CHUNK]).reshape(ROWS, CHUNK)
    else:
        return operand[c]


@triton.jit
def zeros(ROWS: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr):
    chunks = ()
    for _ in tl.static_range(CHUNKS):
        chunks = chunks + (tl.zeros([ROWS, CHUNK], tl.float32),)
    return chunks


@triton.jit
def scaled(acc, factor, CHUNKS: tl.constexpr):
    chunks = ()
    for c in tl.static_range(CHUNKS):
        chunks = chunks + (acc[c] * factor,)
    return chunks


@triton.jit
def dot(a, b, acc):
    """a @ b + acc in float32; float32 operands keep their precision (three tf32 products)."""
    return tl.dot(a, b, acc, input_precision="tf32x3")


@triton.jit
def products(
    a,
    b,
    A_ROWS: tl.constexpr,
    B_ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    LOAD_ON_USE: tl.constexpr,
):
    """a @ b^T, [A_ROWS, B_ROWS]: every row of a with every row of b."""
    acc = tl.zeros([A_ROWS, B_ROWS], tl.float32)
    if LOAD_ON_USE:
        for c in range(CHUNKS):  # not unrolled: one chunk's addresses at a time
            acc = dot(chunk(a, c, A_ROWS, CHUNK, LOAD_ON_USE), chunk(b, c, B_ROWS, CHUNK, LOAD_ON_USE).T, acc)
    else:
        for c in tl.static_range(CHUNKS):
            acc = dot(a[c], b[c].T, acc)
    return acc


@triton.jit
def finite(x):
    return tl.abs(x.to(tl.float32)) < INFINITY


@triton.jit
def add_rows(
    acc, weight, b, B_ROWS: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr,
    LOAD_ON_USE: tl.constexpr, SANITIZE: tl.constexpr,
):  # fmt: skip
    """acc + weight @ b: sums of the rows of b."""
    chunks = ()
    for c in tl.static_range(CHUNKS):
        rows = chunk(b, c, B_ROWS, CHUNK, LOAD_ON_USE)
        if SANITIZE:
            rows = tl.where(finite(rows), rows, 0.0)
        chunks = chunks + (dot(weight.to(rows.dtype), rows, acc[c]),)
    return chunks


@triton.jit
def bad_rows(
    operand, ROWS: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr, LOAD_ON_USE: tl.constexpr
):
    """bool [ROWS]: which rows hold a NaN or an infinity."""
    count = tl.zeros([ROWS], tl.int32)
    for c in tl.static_range(CHUNKS):
        count += tl.sum(1 - finite(chunk(operand, c, ROWS, CHUNK, LOAD_ON_USE)).to(tl.int32), axis=1)
    return count > 0


@triton.jit
def not_finite(acc, CHUNKS: tl.constexpr):
    """Whether anything in acc is a NaN or an infinity."""
    count = 0
    for c in tl.static_range(CHUNKS):
        count += tl.sum(tl.sum(1 - finite(acc[c]).to(tl.int32), axis=1), axis=0)
    return count > 0


@triton.jit
def store(
    out, acc, batch, head, first, tokens, heads, units,
    ROWS: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """Rows [first, first + ROWS) of one head of the contiguous [B, N, heads, D] tensor out, D being `units`
    of 16 bytes: as the compiler knows that, it stores as many at once, for every D."""
    dim = units * (128 // out.dtype.element_ty.primitive_bitwidth)
    rows = first + tl.arange(0, ROWS)
    at = out + ((batch.to(tl.int64) * tokens + rows) * heads + head)[:, None] * dim
    for c in tl.static_range(CHUNKS):
        d = c * CHUNK + tl.arange(0, CHUNK)[None, :]
        tl.store(at + d, acc[c].to(out.dtype.element_ty), mask=(rows < tokens)[:, None] & (d < dim))


@triton.jit
def program(order, copies, tokens, heads, BLOCK: tl.constexpr):
    """(row of the plan, batch, head, first token) of this program.

    Heads vary fastest, so that those which share keys run side by side; the longest rows come first. A plan
    for one batch (copies = B) serves all of them.
    """
    program = tl.program_id(0)
    head = program % heads
    program = program // heads
    part = program % (TILE // BLOCK)
    program = program // (TILE // BLOCK)
    row = tl.load(order + program // copies)
    tiles = tl.cdiv(tokens, TILE)
    return row, row // tiles * copies + program % copies, head, row % tiles * TILE + part * BLOCK


@triton.jit
def tile_lists(full_offsets, full_tiles, partial_offsets, partial_tiles, row):
    """(full tiles, begin, end, partial tiles, begin, end) of a row of the plan.

    Load them before the row's own operand: waiting for that then hides their latency.
    """
    full_begin, full_end = tl.load(full_offsets + row), tl.load(full_offsets + row + 1)
    partial_begin, partial_end = tl.load(partial_offsets + row), tl.load(partial_offsets + row + 1)
    return full_tiles, full_begin, full_end, partial_tiles, partial_begin, partial_end


@triton.jit
def next_tile(tiles, n, end, PARTS: tl.constexpr):
    """The tile of the n-th block along a list of tiles, each of PARTS blocks.

    A loop asks for it one round ahead. Loaded where it is used, it would take one of the pipeline's stages
    from K and V, whose addresses hang on it.
    """
    return tl.load(tiles + n // PARTS, mask=n < end, other=0)


@triton.jit
def first_token(tile, n, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """Of the n-th block, which lies in `tile`."""
    return tile * TILE + (n - n // PARTS * PARTS) * BLOCK


@triton.jit
def visible_pairs(i, places, first, keys_of_mask, row, BLOCK_K: tl.constexpr):
    """bool [queries i, keys from `first` on], by the row of evict: 0 past the last token, seen by none. In a
    window the queries' positions are `places`, else None."""
    evict_desc, limit_desc = keys_of_mask
    j = first + tl.arange(0, BLOCK_K)
    evict = evict_desc.load([row, first]).reshape(BLOCK_K)
    visible = (j[None, :] <= i[:, None]) & (i[:, None] < evict[None, :])
    if places is not None:
        limit = limit_desc.load([row, first]).reshape(BLOCK_K)
        visible &= places[:, None] < limit[None, :]
    return visible


@triton.jit
def positions_of(positions, row, tokens_of_block, tokens):
    """The positions of some tokens of a row of positions."""
    at = positions + row.to(tl.int64) * tokens + tokens_of_block
    return tl.load(at, mask=tokens_of_block < tokens, other=0)


@triton.jit
def tanh(x):
    """Near 0, where 1 - 2 / (..) cancels, by its series."""
    square = x * x
    near = x * (1.0 + square * (-1.0 / 3.0 + square * (2.0 / 15.0 - square * (17.0 / 315.0))))
    far = 1.0 - 2.0 / (1.0 + tl.exp2(x * (2.0 * LOG2E)))
    return tl.where(tl.abs(x) < 0.125, near, far)
