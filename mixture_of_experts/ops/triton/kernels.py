# type: ignore  (a language of its own: type checkers take it for Python)
"""Kernels of a routed feed-forward network: tiles, products of rows and weights, sums of a token's rows.

Axes: t tokens, k choices, a assignments, r rows (sorted by expert, without gaps), e experts, d model dim, h hidden dim,
o output dim. In a product m are rows, n columns of the result, and c what is summed over.

A tile is up to BLOCK_M rows of one expert. Its table says where it is; the grid has as many tiles as there can be at
most, and those that are not needed (expert -1) return at once. No two programs write to one place and every sum has a
fixed order, so all runs give the same bits. What is multiplied by a row or by an expert is int64; places within a tile
and within an expert's matrix are int32 (matrices of 2^31 elements are refused before). A row or column past the end is
read at a place inside and never stored; past the end of a sum zeros are read. Rows past the last expert's are neither
written nor read.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mixture_of_experts.ops.triton.activations import activate, gated, gated_grads, slope


@triton.jit(do_not_specialize=["num_tiles"])
def find_tiles(
    counts,  # (e,) int64
    tile_expert,  # (tiles,) int32: the expert of each tile, -1 for a tile that is not needed
    tile_first,  # (tiles,) int32: its first row
    tile_stop,  # (tiles,) int32: the row after its last
    ends,  # (e,) int32: the row after each expert's last
    num_tiles,
    num_experts,
    ROWS: tl.constexpr,  # rows of a tile
    BLOCK: tl.constexpr,  # tiles of a program
    BLOCK_E: tl.constexpr,
):
    """A tile belongs to the expert whose tiles end behind it: sums over the experts before it say where it starts."""
    tile = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    expert = tl.zeros((BLOCK,), tl.int32)
    first_tile = tl.zeros((BLOCK,), tl.int32)
    first_row = tl.zeros((BLOCK,), tl.int32)
    tiles_so_far = 0
    rows_so_far = 0
    for start in range(0, num_experts, BLOCK_E):
        index = start + tl.arange(0, BLOCK_E)
        exists = index < num_experts
        count = tl.load(counts + index, mask=exists, other=0).to(tl.int32)
        tiles = (count + ROWS - 1) // ROWS
        tile_ends = tiles_so_far + tl.cumsum(tiles, 0)
        row_ends = rows_so_far + tl.cumsum(count, 0)
        if tl.program_id(0) == 0:
            tl.store(ends + index, row_ends, mask=exists)
        before = (tile_ends[None, :] <= tile[:, None]) & exists[None, :]
        expert += tl.sum(before.to(tl.int32), 1)
        first_tile += tl.sum(tl.where(before, tiles[None, :], 0), 1)
        first_row += tl.sum(tl.where(before, count[None, :], 0), 1)
        tiles_so_far += tl.sum(tiles, 0)
        rows_so_far += tl.sum(count, 0)
    needed = tile < tiles_so_far
    inside = tile < num_tiles
    count = tl.load(counts + expert, mask=needed & inside, other=0).to(tl.int32)
    first = first_row + (tile - first_tile) * ROWS
    tl.store(tile_expert + tile, tl.where(needed, expert, -1), mask=inside)
    tl.store(tile_first + tile, tl.where(needed, first, 0), mask=inside)
    tl.store(tile_stop + tile, tl.where(needed, tl.minimum(first + ROWS, first_row + count), 0), mask=inside)


@triton.jit
def block_of(program, blocks_m, blocks_n, GROUP: tl.constexpr):
    """Block (m, n) of a program: programs that run together share rows and weights in the cache."""
    each = GROUP * blocks_n
    first = program // each * GROUP
    size = tl.minimum(blocks_m - first, GROUP)
    return first + program % each % size, program % each // size


@triton.jit
def find_block(
    tile_expert,
    tile_first,
    tile_stop,
    num_tiles,
    N,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    GROUP: tl.constexpr,
):
    """What a program computes: some rows of an expert (-1: nobody's) and some of N columns.

    Returns the expert, its first row here, the rows from there on, which of them exist (the others are read at the
    first), and the number of the block of columns.
    """
    tile, block = block_of(tl.program_id(0), num_tiles, tl.cdiv(N, BLOCK_N), GROUP)
    expert = tl.load(tile_expert + tile).to(tl.int64)
    first = tl.load(tile_first + tile)
    line = tl.arange(0, BLOCK_M)
    exists = first + line < tl.load(tile_stop + tile)
    return expert, first.to(tl.int64), tl.where(exists, line, 0), exists, block


@triton.jit
def place_of(line, exists, column, N):
    """Where rows and columns lie, from the first row on, and which of these places exist."""
    return line[:, None] * N + column[None, :], exists[:, None] & (column < N)[None, :]


@triton.jit
def of_expert(expert, c, n, weight_e, weight_c, weight_n):
    """Where a block of an expert's weight lies."""
    return expert * weight_e + (c[:, None] * weight_c + n[None, :] * weight_n)


@triton.jit
def read(block, inside, EVEN: tl.constexpr):
    """A block, zeros where it is not inside; all of it is if EVEN."""
    return tl.load(block) if EVEN else tl.load(block, mask=inside, other=0.0)


@triton.jit
def multiply(acc, left, right, step, length, EVEN: tl.constexpr, BLOCK_C: tl.constexpr, PRECISION: tl.constexpr):
    """acc + left @ right, `length` summed over in blocks of BLOCK_C; `step` from one row of the right to the next."""
    for start in range(0, length, BLOCK_C):
        inside = start + tl.arange(0, BLOCK_C) < length
        a = read(left, inside[None, :], EVEN)
        acc = tl.dot(a, read(right, inside[:, None], EVEN), acc, input_precision=PRECISION)
        left += BLOCK_C
        right += BLOCK_C * step
    return acc


@triton.jit
def multiply_two(
    acc,
    acc_up,
    left,
    right,
    right_up,
    step,
    length,
    EVEN: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The same for two right operands and their own sums."""
    for start in range(0, length, BLOCK_C):
        inside = start + tl.arange(0, BLOCK_C) < length
        a = read(left, inside[None, :], EVEN)
        b = read(right, inside[:, None], EVEN)
        b_up = read(right_up, inside[:, None], EVEN)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
        acc_up = tl.dot(a, b_up, acc_up, input_precision=PRECISION)
        left += BLOCK_C
        right += BLOCK_C * step
        right_up += BLOCK_C * step
    return acc, acc_up


@triton.jit(do_not_specialize=["num_tiles"])
def rows_by_weights(
    x,  # (t, c) tokens, or (r, c) rows
    token,  # (r,) int32; read if GATHER
    weight,  # (e, c, n) in any strides
    weight_up,  # likewise, the second of gated experts
    bias,  # (e, n) in any strides, or None
    bias_up,
    pre,  # (r, n): the products, kept for the backward; or None
    pre_up,
    out,  # (r, n)
    tile_expert,
    tile_first,
    tile_stop,
    num_tiles,
    C,
    N,
    weight_e,
    weight_c,
    weight_n,
    bias_e,
    bias_n,
    ACTIVATION: tl.constexpr,
    ALPHA: tl.constexpr,
    LIMIT: tl.constexpr,
    GATED: tl.constexpr,
    GATHER: tl.constexpr,
    PRECISION: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    GROUP: tl.constexpr,
):
    """*up*: tokens gathered, one product or two, activation. *down*: rows in place, one product, no activation."""
    expert, first, line, exists, block = find_block(
        tile_expert, tile_first, tile_stop, num_tiles, N, BLOCK_M, BLOCK_N, GROUP
    )
    if expert < 0:
        return
    column = block * BLOCK_N + tl.arange(0, BLOCK_N)
    n = column % N
    c = tl.arange(0, BLOCK_C)
    if GATHER:
        left = x + tl.load(token + first + line).to(tl.int64)[:, None] * C + c[None, :]
    else:
        left = x + first * C + (line[:, None] * C + c[None, :])
    right = weight + of_expert(expert, c, n, weight_e, weight_c, weight_n)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if GATED:
        right_up = weight_up + of_expert(expert, c, n, weight_e, weight_c, weight_n)
        acc_up = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        acc, acc_up = multiply_two(acc, acc_up, left, right, right_up, weight_c, C, EVEN, BLOCK_C, PRECISION)
    else:
        acc = multiply(acc, left, right, weight_c, C, EVEN, BLOCK_C, PRECISION)

    place, stored = place_of(line, exists, column, N)
    if bias is not None:
        acc += tl.load(bias + expert * bias_e + n * bias_n).to(tl.float32)[None, :]
    if pre is not None:
        tl.store(pre + first * N + place, acc.to(out.dtype.element_ty), mask=stored)
    if GATED:
        if bias_up is not None:
            acc_up += tl.load(bias_up + expert * bias_e + n * bias_n).to(tl.float32)[None, :]
        if pre_up is not None:
            tl.store(pre_up + first * N + place, acc_up.to(out.dtype.element_ty), mask=stored)
        hidden = gated(acc, acc_up, ACTIVATION, ALPHA, LIMIT)
    else:
        hidden = activate(acc, ACTIVATION)
    tl.store(out + first * N + place, hidden.to(out.dtype.element_ty), mask=stored)


@triton.jit
def split_columns(block):
    """The left and the right half of a block's columns."""
    return block.reshape(block.shape[0], 2, block.shape[1] // 2).permute(0, 2, 1).split()


@triton.jit
def hidden_grads_slice(
    grad,  # (m, n) float32: gradient of the hidden layer for rows of weight 1
    scale,  # (m, 1): weights of the rows
    line,
    exists,
    column,
    N,
    pre,
    pre_up,
    hidden,
    grad_pre,
    grad_pre_up,
    ACTIVATION: tl.constexpr,
    ALPHA: tl.constexpr,
    LIMIT: tl.constexpr,
    GATED: tl.constexpr,
):
    """Write some columns of the gradients; returns what they add to those of the rows' weights."""
    place, stored = place_of(line, exists, column, N)
    dtype: tl.constexpr = grad_pre.dtype.element_ty
    h = tl.load(pre + place, mask=stored, other=0.0).to(tl.float32)
    if GATED:
        u = tl.load(pre_up + place, mask=stored, other=0.0).to(tl.float32)
        value = gated(h, u, ACTIVATION, ALPHA, LIMIT)
        grad_h, grad_u = gated_grads(h, u, grad * scale, ACTIVATION, ALPHA, LIMIT)
        tl.store(grad_pre_up + place, grad_u.to(dtype), mask=stored)
    else:
        value = activate(h, ACTIVATION)
        grad_h = grad * scale * slope(h, ACTIVATION)
    tl.store(grad_pre + place, grad_h.to(dtype), mask=stored)
    if hidden is not None:
        tl.store(hidden + place, (value * scale).to(dtype), mask=stored)
    return tl.sum(tl.where(stored, grad * value, 0.0), 1)


@triton.jit(do_not_specialize=["num_tiles", "num_rows"])
def hidden_grads(
    grad,  # (t, c) gradient of the tokens' outputs
    token,  # (r,) int32
    assignment,  # (r,) int32
    row_weight,  # (a,) float32
    weight,  # (e, n, c) in any strides: of the last product
    bias,  # (e, c) contiguous: of the last product, or None
    pre,  # (r, n)
    pre_up,
    hidden,  # (r, n): the hidden layer times its row's weight, computed anew; or None
    grad_pre,  # (r, n)
    grad_pre_up,
    partial,  # (blocks, r) float32: what each block of columns adds to the gradient of a row's weight
    tile_expert,
    tile_first,
    tile_stop,
    num_tiles,
    num_rows,
    C,
    N,
    weight_e,
    weight_n,
    weight_c,
    ACTIVATION: tl.constexpr,
    ALPHA: tl.constexpr,
    LIMIT: tl.constexpr,
    GATED: tl.constexpr,
    PRECISION: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Gradients of the pre-activations. That of a row's weight is `grad . (hidden w + bias)`, and the first part of it
    `(grad w^T) . hidden`: no row of outputs is kept for it."""
    expert, first, line, exists, block = find_block(
        tile_expert, tile_first, tile_stop, num_tiles, N, BLOCK_M, BLOCK_N, GROUP
    )
    if expert < 0:
        return
    column = block * BLOCK_N + tl.arange(0, BLOCK_N)
    c = tl.arange(0, BLOCK_C)
    left = grad + tl.load(token + first + line).to(tl.int64)[:, None] * C + c[None, :]
    right = weight + of_expert(expert, c, column % N, weight_e, weight_c, weight_n)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    acc = multiply(acc, left, right, weight_c, C, EVEN, BLOCK_C, PRECISION)
    of_weight = tl.zeros((BLOCK_M,), tl.float32)
    if bias is not None:  # noqa: SIM102  (known when it is compiled, and the other is not)
        if block == 0:
            for start in range(0, C, BLOCK_C):
                inside = start + c < C
                a = tl.load(left + start, mask=inside[None, :], other=0.0)
                b = tl.load(bias + expert * C + start + c, mask=inside, other=0.0)
                of_weight += tl.sum(a.to(tl.float32) * b.to(tl.float32)[None, :], 1)

    scale = tl.load(row_weight + tl.load(assignment + first + line)).to(tl.float32)[:, None]
    start = first * N
    grad_pre += start
    pre += start
    if GATED:
        grad_pre_up += start
        pre_up += start
    if hidden is not None:
        hidden += start
    # in slices, or the registers do not hold it
    quarter: tl.constexpr = BLOCK_N // 4
    left_half, right_half = split_columns(acc)
    parts = split_columns(left_half) + split_columns(right_half)
    for i in tl.static_range(4):
        of_weight += hidden_grads_slice(
            parts[i],
            scale,
            line,
            exists,
            block * BLOCK_N + i * quarter + tl.arange(0, quarter),
            N,
            pre,
            pre_up,
            hidden,
            grad_pre,
            grad_pre_up,
            ACTIVATION,
            ALPHA,
            LIMIT,
            GATED,
        )
    tl.store(partial + block.to(tl.int64) * num_rows + first + line, of_weight, mask=exists)


@triton.jit(do_not_specialize=["num_tiles"])
def row_grads(
    grad_pre,  # (r, c)
    grad_pre_up,
    weight,  # (e, n, c) in any strides: of the first products
    weight_up,
    out,  # (r, n)
    tile_expert,
    tile_first,
    tile_stop,
    num_tiles,
    C,
    N,
    weight_e,
    weight_n,
    weight_c,
    GATED: tl.constexpr,
    PRECISION: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Gradients of rows of tokens. Two loops: two products into one sum within one loop are miscompiled on Blackwell
    (https://github.com/triton-lang/triton/issues/10821)."""
    expert, first, line, exists, block = find_block(
        tile_expert, tile_first, tile_stop, num_tiles, N, BLOCK_M, BLOCK_N, GROUP
    )
    if expert < 0:
        return
    column = block * BLOCK_N + tl.arange(0, BLOCK_N)
    c = tl.arange(0, BLOCK_C)
    left = first * C + (line[:, None] * C + c[None, :])
    right = of_expert(expert, c, column % N, weight_e, weight_c, weight_n)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    acc = multiply(acc, grad_pre + left, weight + right, weight_c, C, EVEN, BLOCK_C, PRECISION)
    if GATED:
        acc = multiply(acc, grad_pre_up + left, weight_up + right, weight_c, C, EVEN, BLOCK_C, PRECISION)
    place, stored = place_of(line, exists, column, N)
    tl.store(out + first * N + place, acc.to(out.dtype.element_ty), mask=stored)


@triton.jit
def weight_grads(
    x,  # (t or r, m)
    y,  # (t or r, n)
    y_up,  # likewise, of the second weight of gated experts
    token,  # (r,) int32: which rows of x (GATHER_X) or y (GATHER_Y) are read
    ends,  # (e,) int32: the row after each expert's last
    out,  # (e, m, n) in any strides
    out_up,
    M,
    N,
    out_e,
    out_m,
    out_n,
    GATED: tl.constexpr,
    GATHER_X: tl.constexpr,
    GATHER_Y: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    GROUP: tl.constexpr,
):
    """For every expert `x^T y` over its rows, zeros where it has none.

    x is read as it is multiplied, `(m, c)`, and the rows to gather are read a turn ahead: so both operands are copied
    asynchronously, with as many blocks under way as the schedule says.
    """
    each = tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N)
    expert = tl.program_id(0) // each
    block_m, block_n = block_of(tl.program_id(0) % each, tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP)
    begin, end = rows_of(ends, expert)
    line = block_m * BLOCK_M + tl.arange(0, BLOCK_M)
    column = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    of_line, of_column = x + line % M, y + column % N
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if GATED:
        of_column_up = y_up + column % N
        acc_up = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    row = begin + tl.arange(0, BLOCK_C)
    if GATHER_X or GATHER_Y:
        source = tl.load(token + row, mask=row < end, other=0)
    for _ in range(begin, end, BLOCK_C):
        exists = row < end
        row_x = (source if GATHER_X else row).to(tl.int64)
        row_y = (source if GATHER_Y else row).to(tl.int64)
        a = tl.load(of_line[:, None] + row_x[None, :] * M, mask=exists[None, :], other=0.0)
        b = tl.load(of_column[None, :] + row_y[:, None] * N, mask=exists[:, None], other=0.0)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
        if GATED:
            b_up = tl.load(of_column_up[None, :] + row_y[:, None] * N, mask=exists[:, None], other=0.0)
            acc_up = tl.dot(a, b_up, acc_up, input_precision=PRECISION)
        row += BLOCK_C
        if GATHER_X or GATHER_Y:
            source = tl.load(token + row, mask=row < end, other=0)
    place = expert.to(tl.int64) * out_e + (line[:, None] * out_m + column[None, :] * out_n)
    stored = (line < M)[:, None] & (column < N)[None, :]
    tl.store(out + place, acc.to(out.dtype.element_ty), mask=stored)
    if GATED:
        tl.store(out_up + place, acc_up.to(out.dtype.element_ty), mask=stored)


@triton.jit
def rows_of(ends, expert):
    """First row of an expert, and the row after its last."""
    return tl.load(ends + expert - 1, mask=expert > 0, other=0), tl.load(ends + expert)


@triton.jit
def bias_grads(
    y,  # (t or r, n)
    token,  # (r,) int32: which rows of y are read; None reads those of the expert
    row_weight,  # (a,) float32: the weight of each of them, or None (then 1)
    assignment,  # (r,) int32; read if there are weights
    ends,  # (e,) int32: the row after each expert's last
    out,  # (e, n) in any strides
    N,
    out_e,
    out_n,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """For every expert the sum of its rows of y, 0 where it has none."""
    blocks = tl.cdiv(N, BLOCK_N)
    expert, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    begin, end = rows_of(ends, expert)
    column = block * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros((BLOCK_C, BLOCK_N), tl.float32)
    for start in range(begin, end, BLOCK_C):
        row = start + tl.arange(0, BLOCK_C)
        exists = row < end
        source = row if token is None else tl.load(token + row, mask=exists, other=0)
        place = source.to(tl.int64)[:, None] * N + column[None, :]
        value = tl.load(y + place, mask=exists[:, None] & (column < N)[None, :], other=0.0).to(tl.float32)
        if row_weight is not None:
            index = tl.load(assignment + row, mask=exists, other=0)
            value *= tl.load(row_weight + index, mask=exists, other=0.0).to(tl.float32)[:, None]
        acc += value
    place = out + expert.to(tl.int64) * out_e + column * out_n
    tl.store(place, tl.sum(acc, 0).to(out.dtype.element_ty), mask=column < N)


@triton.jit
def add_row(acc, rows, row_of, index, weight, assignment, column, num_rows, D, BY_ROW: tl.constexpr):
    """acc + the row at `index` of a token's list, times its weight; nothing where the row is `num_rows`, for none."""
    row = tl.load(row_of + index).to(tl.int64)
    width = tl.where(row < num_rows, D, 0)
    row = tl.minimum(row, num_rows - 1)
    value = tl.load(rows + row * D + column, mask=column < width, other=0.0).to(tl.float32)
    if weight is not None:
        value *= tl.load(weight + (tl.load(assignment + row) if BY_ROW else index)).to(tl.float32)
    return acc + value


@triton.jit(do_not_specialize=["num_rows"])
def sum_rows(
    rows,  # (r, d)
    row_of,  # (a,) int32 (int64 if CHOICES is 0): the rows of a token, one after the other
    start_of,  # (t + 1,) int64: where each token's begin; read if CHOICES is 0
    weight,  # (a,) float32, by assignment; None sums without
    assignment,  # (r,) int32; read if CHOICES is 0
    out,  # (t, d)
    num_rows,
    D,
    CHOICES: tl.constexpr,  # rows of every token; 0 where they are no fixed number
    BLOCK: tl.constexpr,
):
    """Every token's rows, in float32 and in order."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK,), tl.float32)
    if CHOICES == 0:
        for index in range(tl.load(start_of + token), tl.load(start_of + token + 1)):
            acc = add_row(acc, rows, row_of, index, weight, assignment, column, num_rows, D, True)
    elif CHOICES <= 16:
        for choice in tl.static_range(CHOICES):
            acc = add_row(acc, rows, row_of, token * CHOICES + choice, weight, assignment, column, num_rows, D, False)
    else:
        for choice in range(CHOICES):
            acc = add_row(acc, rows, row_of, token * CHOICES + choice, weight, assignment, column, num_rows, D, False)
    tl.store(out + token * D + column, acc.to(out.dtype.element_ty), mask=column < D)


@triton.jit(do_not_specialize=["num_rows", "num_assignments"])
def sum_partials(
    partial,  # (blocks, r) float32
    row_of,  # (a,) int32
    out,  # (a,)
    num_rows,
    num_assignments,
    blocks,
    BLOCK: tl.constexpr,
):
    """The gradient of every assignment's weight: the sum of what the blocks of columns added to its row's, else 0."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < num_assignments
    row = tl.load(row_of + index, mask=inside, other=0).to(tl.int64)
    exists = inside & (row < num_rows)
    acc = tl.zeros((BLOCK,), tl.float32)
    place = partial + row
    for _ in range(blocks):
        acc += tl.load(place, mask=exists, other=0.0)
        place += num_rows
    tl.store(out + index, acc.to(out.dtype.element_ty), mask=inside)
