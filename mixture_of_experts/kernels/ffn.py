# type: ignore  (Triton's language, which type checkers take for Python)
"""Kernels for a routed feed-forward network: tiling, matrix products, and sums over each token's rows.

Axes: t (tokens), k (choices), a (assignments), r (rows sorted by expert, without gaps), e (experts), d (model
dimension), h (hidden dimension), o (output dimension). In matrix products, m and n are the rows and columns of the
result, and c is the summed axis.

A tile contains up to BLOCK_M rows of one expert, and a table lists all tiles. The grid covers the maximum number of
tiles, and programs for unused tiles (expert -1) return immediately. No two programs write to the same location, and all
sums have a fixed order, so results are bitwise reproducible. Strides between rows and between experts are int64.
Offsets within a tile and within an expert's matrix are int32, so matrices with 2^31 or more elements are rejected
before the launch. Out-of-bounds rows and columns are loaded from a valid location instead, and never stored.
Elements past the end of the summed axis are read as zeros. Rows that belong to no expert are neither read nor written.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mixture_of_experts.kernels.pointwise import (
    activation_grad,
    apply_activation,
    apply_gated_activation,
    gated_activation_grads,
)


@triton.jit(do_not_specialize=["num_tiles", "num_experts"])
def find_tiles_kernel(
    counts,  # (e,) int64
    tiles,  # (tiles, 3) int32, output: expert (-1 for unused tiles), first row, and end of rows of each tile
    ends,  # (e,) int32, output: end of each expert's rows
    num_tiles,
    num_experts,
    ROWS: tl.constexpr,  # rows per tile
    BLOCK: tl.constexpr,  # tiles per program
    BLOCK_E: tl.constexpr,
):
    """Write the table of tiles. A tile belongs to the first expert whose cumulative tile count exceeds the tile's
    index."""
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
        its_tiles = (count + ROWS - 1) // ROWS
        tile_ends = tiles_so_far + tl.cumsum(its_tiles, 0)
        row_ends = rows_so_far + tl.cumsum(count, 0)
        if tl.program_id(0) == 0:
            tl.store(ends + index, row_ends, mask=exists)
        before = (tile_ends[None, :] <= tile[:, None]) & exists[None, :]
        expert += tl.sum(before.to(tl.int32), 1)
        first_tile += tl.sum(tl.where(before, its_tiles[None, :], 0), 1)
        first_row += tl.sum(tl.where(before, count[None, :], 0), 1)
        tiles_so_far += tl.sum(its_tiles, 0)
        rows_so_far += tl.sum(count, 0)
    needed = tile < tiles_so_far
    inside = tile < num_tiles
    count = tl.load(counts + expert, mask=needed & inside, other=0).to(tl.int32)
    first = first_row + (tile - first_tile) * ROWS
    place = tiles + 3 * tile
    tl.store(place, tl.where(needed, expert, -1), mask=inside)
    tl.store(place + 1, tl.where(needed, first, 0), mask=inside)
    tl.store(place + 2, tl.where(needed, tl.minimum(first + ROWS, first_row + count), 0), mask=inside)


@triton.jit
def swizzle_program(program, blocks_m, blocks_n):
    """Return the block (m, n) that a program computes. Concurrent programs compute blocks that share cached rows and
    weights."""
    TOGETHER: tl.constexpr = 8  # number of blocks along m that are computed together
    each = TOGETHER * blocks_n
    first = program // each * TOGETHER
    size = tl.minimum(blocks_m - first, TOGETHER)
    return first + program % each % size, program % each // size


@triton.jit
def locate_tile(tiles, num_tiles, blocks_n, BLOCK_M: tl.constexpr):
    """Return the rows and the block of columns that a program computes.

    The function returns the expert (-1 for an unused tile), the tile's first row, the row offsets, a mask of existing
    rows, and the block's index. Rows that do not exist have offset 0, so the first row is read instead.
    """
    tile, block = swizzle_program(tl.program_id(0), num_tiles, blocks_n)
    place = tiles + 3 * tile
    expert, first, line = tl.load(place), tl.load(place + 1), tl.arange(0, BLOCK_M)
    exists = first + line < tl.load(place + 2)
    return expert.to(tl.int64), first.to(tl.int64), tl.where(exists, line, 0), exists, block


@triton.jit
def weight_pointers(expert, c, n, weight_e, weight_c, weight_n):
    """Return pointers to a block of an expert's weight."""
    return expert * weight_e + (c[:, None] * weight_c + n[None, :] * weight_n)


@triton.jit
def load_tokens(token, row, num_tokens):
    """Return the token of each row. Rows without an assignment have an arbitrary token and weight 0."""
    return tl.minimum(tl.load(token + row), num_tokens - 1).to(tl.int64)


@triton.jit
def load_row_weights(row_weight, assignment, row, exists, num_assignments):
    """Return the weight of each row, or 0 for rows without an assignment."""
    index = tl.load(assignment + row, mask=exists, other=num_assignments)
    return tl.load(row_weight + index, mask=index < num_assignments, other=0.0).to(tl.float32)


@triton.jit
def load_block(block, inside, EVEN: tl.constexpr):
    """Load a block, and replace out-of-bounds elements with zeros. If EVEN is True, all elements are in bounds."""
    return tl.load(block) if EVEN else tl.load(block, mask=inside, other=0.0)


@triton.jit
def accumulate_products(
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
    """Return acc + left @ right, summed over `length` in blocks of BLOCK_C.

    `step` is the stride between rows of `right`. If `right_up` is given, the function also returns acc_up + left @
    right_up, and loads `left` only once.
    """
    for start in range(0, length, BLOCK_C):
        inside = start + tl.arange(0, BLOCK_C) < length
        a = load_block(left, inside[None, :], EVEN)
        b = load_block(right, inside[:, None], EVEN)
        if right_up is not None:
            b_up = load_block(right_up, inside[:, None], EVEN)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
        if right_up is not None:
            acc_up = tl.dot(a, b_up, acc_up, input_precision=PRECISION)
        left += BLOCK_C
        right += BLOCK_C * step
        if right_up is not None:
            right_up += BLOCK_C * step
    return acc if right_up is None else (acc, acc_up)


@triton.jit
def split_columns(block, INTERLEAVED: tl.constexpr):
    """Split a block's columns into two halves. The halves are alternating columns if INTERLEAVED is True, and the left
    and right columns otherwise."""
    if INTERLEAVED:
        parts = block.reshape(block.shape[0], block.shape[1] // 2, 2)
    else:
        parts = block.reshape(block.shape[0], 2, block.shape[1] // 2).permute(0, 2, 1)
    return parts.split()


@triton.jit(do_not_specialize=["num_tiles", "num_tokens"])
def grouped_matmul_kernel(
    x,  # (t, c) tokens, or (r, c) rows
    token,  # (r,) int32, token of each row; None if x is `(r, c)`
    weight,  # (e, c, n) with any strides; (e, c, 2 n) if INTERLEAVED
    weight_up,  # second weight of gated experts, or None
    bias,  # (e, n) or (e, 2 n) with any strides, or None
    bias_up,
    # (r, n) or (r, 2 n) with row stride `pre_r`, output: pre-activations saved for the backward pass; or None
    pre,
    pre_up,
    out,  # (r, n)
    tiles,
    num_tiles,
    num_tokens,
    C,
    N,
    pre_r,
    weight_e,
    weight_c,
    weight_n,
    bias_e,
    bias_n,
    ACTIVATION: tl.constexpr,
    ALPHA: tl.constexpr,
    LIMIT: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    PRECISION: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,  # weight columns per program
    BLOCK_C: tl.constexpr,
):
    """Multiply rows by their experts' weights. The *up* product gathers tokens and applies the activation, whereas the
    *down* product does neither."""
    TWO: tl.constexpr = weight_up is not None
    WIDTH: tl.constexpr = BLOCK_N // 2 if TWO or INTERLEAVED else BLOCK_N  # hidden columns per program
    BLOCK: tl.constexpr = 2 * WIDTH if INTERLEAVED else WIDTH  # columns per program in each weight
    expert, first, line, exists, block = locate_tile(tiles, num_tiles, tl.cdiv(N, WIDTH), BLOCK_M)
    if expert < 0:
        return
    c = tl.arange(0, BLOCK_C)
    number = 2 * N if INTERLEAVED else N
    column = block * BLOCK + tl.arange(0, BLOCK)
    inside, column = column < number, column % number
    if token is not None:
        left = x + load_tokens(token, first + line, num_tokens)[:, None] * C + c[None, :]
    else:
        left = x + first * C + (line[:, None] * C + c[None, :])
    right = weight_pointers(expert, c, column, weight_e, weight_c, weight_n)
    acc = tl.zeros((BLOCK_M, BLOCK), tl.float32)
    if TWO:
        up = tl.zeros((BLOCK_M, BLOCK), tl.float32)
        acc, up = accumulate_products(
            acc, up, left, weight + right, weight_up + right, weight_c, C, EVEN, BLOCK_C, PRECISION
        )
    else:
        acc = accumulate_products(acc, None, left, weight + right, None, weight_c, C, EVEN, BLOCK_C, PRECISION)

    place = first * pre_r + (line[:, None] * pre_r + column[None, :])
    stored = exists[:, None] & inside[None, :]
    acc = add_column_bias(acc, bias, expert * bias_e + column * bias_n)
    store_block(acc, pre, place, stored)
    if TWO:
        up = add_column_bias(up, bias_up, expert * bias_e + column * bias_n)
        store_block(up, pre_up, place, stored)
    if INTERLEAVED:
        acc, up = split_columns(acc, True)
    hidden = (
        apply_gated_activation(acc, up, ACTIVATION, ALPHA, LIMIT)
        if TWO or INTERLEAVED
        else apply_activation(acc, ACTIVATION)
    )
    column = block * WIDTH + tl.arange(0, WIDTH)
    store_block(hidden, out, first * N + (line[:, None] * N + column[None, :]), exists[:, None] & (column < N)[None, :])


@triton.jit
def add_column_bias(acc, bias, place):
    """Add the bias to each column of acc, unless `bias` is None, and return the result."""
    return acc if bias is None else acc + tl.load(bias + place).to(tl.float32)[None, :]


@triton.jit
def store_block(acc, out, place, stored):
    """Store acc, unless `out` is None."""
    if out is not None:
        tl.store(out + place, acc.to(out.dtype.element_ty), mask=stored)


@triton.jit(do_not_specialize=["num_tiles", "num_tokens", "num_assignments"])
def hidden_grads(
    grad,  # (t, c) gradient of the output
    token,  # (r,) int32
    assignment,  # (r,) int32
    row_weight,  # (a,) float32
    weight,  # (e, n, c) with any strides: weight of the *down* product
    bias,  # (e, c) contiguous: bias of the *down* product, or None
    pre,  # (r, n) or (r, 2 n) if INTERLEAVED, with row stride `pre_r`
    pre_up,  # pre-activations from the second weight, or None
    hidden,  # (r, n), output: hidden layer multiplied by the row weights; or None
    grad_pre,  # output, laid out like `pre`
    grad_pre_up,
    partial,  # (r, blocks) float32, output: contribution of each column block to the gradients of the row weights
    tiles,
    num_tiles,
    num_tokens,
    num_assignments,
    C,
    N,
    pre_r,
    weight_e,
    weight_n,
    weight_c,
    ACTIVATION: tl.constexpr,
    ALPHA: tl.constexpr,
    LIMIT: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    PRECISION: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Compute the gradients of the pre-activations and of the row weights.

    The gradient of a row's weight is `dot(grad, hidden w + bias)`. Its first term is computed as `dot(grad w^T,
    hidden)`, so that the row outputs need not be saved.
    """
    TWO: tl.constexpr = pre_up is not None
    blocks = tl.cdiv(N, BLOCK_N)
    expert, first, line, exists, block = locate_tile(tiles, num_tiles, blocks, BLOCK_M)
    if expert < 0:
        return
    c = tl.arange(0, BLOCK_C)
    column = block * BLOCK_N + tl.arange(0, BLOCK_N)
    left = grad + load_tokens(token, first + line, num_tokens)[:, None] * C + c[None, :]
    right = weight + weight_pointers(expert, c, column % N, weight_e, weight_c, weight_n)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    acc = accumulate_products(acc, None, left, right, None, weight_c, C, EVEN, BLOCK_C, PRECISION)
    of_weight = tl.zeros((BLOCK_M,), tl.float32)
    if bias is not None:  # noqa: SIM102  (known when it is compiled, and the other is not)
        if block == 0:
            for start in range(0, C, BLOCK_C):
                inside = start + c < C
                a = tl.load(left + start, mask=inside[None, :], other=0.0)
                b = tl.load(bias + expert * C + start + c, mask=inside, other=0.0)
                of_weight += tl.sum(a.to(tl.float32) * b.to(tl.float32)[None, :], 1)

    scale = load_row_weights(row_weight, assignment, first + line, exists, num_assignments)[:, None]
    pre += first * pre_r
    grad_pre += first * pre_r
    if TWO:
        pre_up += first * pre_r
        grad_pre_up += first * pre_r
    if hidden is not None:
        hidden += first * N
    # compute in slices, because the whole block does not fit in the registers
    dtype: tl.constexpr = grad_pre.dtype.element_ty
    width: tl.constexpr = BLOCK_N // 4
    left_half, right_half = split_columns(acc, False)
    parts = split_columns(left_half, False) + split_columns(right_half, False)
    for i in tl.static_range(4):
        grad_hidden = parts[i]  # the gradient is not yet multiplied by the row weights
        start = block * BLOCK_N + i * width
        column = start + tl.arange(0, width)
        stored = exists[:, None] & (column < N)[None, :]
        place, kept = line[:, None] * pre_r + column[None, :], stored
        if INTERLEAVED:
            both = 2 * start + tl.arange(0, 2 * width)
            place, kept = line[:, None] * pre_r + both[None, :], exists[:, None] & (both < 2 * N)[None, :]
        h = tl.load(pre + place, mask=kept, other=0.0).to(tl.float32)
        if INTERLEAVED:
            h, u = split_columns(h, True)
        if TWO:
            u = tl.load(pre_up + place, mask=kept, other=0.0).to(tl.float32)
        if TWO or INTERLEAVED:
            value = apply_gated_activation(h, u, ACTIVATION, ALPHA, LIMIT)
            grad_h, grad_u = gated_activation_grads(h, u, grad_hidden * scale, ACTIVATION, ALPHA, LIMIT)
        else:
            value = apply_activation(h, ACTIVATION)
            grad_h = grad_hidden * scale * activation_grad(h, ACTIVATION)
        if TWO:
            store_block(grad_u, grad_pre_up, place, kept)
        if INTERLEAVED:
            grad_h = tl.join(grad_h.to(dtype), grad_u.to(dtype)).reshape(BLOCK_M, 2 * width)
        store_block(grad_h, grad_pre, place, kept)
        store_block(value * scale, hidden, line[:, None] * N + column[None, :], stored)
        of_weight += tl.sum(tl.where(stored, grad_hidden * value, 0.0), 1)
    tl.store(partial + (first + line) * blocks + block, of_weight, mask=exists)


@triton.jit(do_not_specialize=["num_tiles"])
def row_grads(
    grad_pre,  # (r, c)
    grad_pre_up,  # gradient of the second weight's pre-activations, or None
    weight,  # (e, n, c) with any strides: weight of the *up* product
    weight_up,
    out,  # (r, n)
    tiles,
    num_tiles,
    C,
    N,
    weight_e,
    weight_n,
    weight_c,
    PRECISION: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Compute the gradients of token rows. Each product has its own loop, because Triton miscompiles loops that
    accumulate two products into one sum on Blackwell (https://github.com/triton-lang/triton/issues/10821)."""
    expert, first, line, exists, block = locate_tile(tiles, num_tiles, tl.cdiv(N, BLOCK_N), BLOCK_M)
    if expert < 0:
        return
    c = tl.arange(0, BLOCK_C)
    column = block * BLOCK_N + tl.arange(0, BLOCK_N)
    left = first * C + (line[:, None] * C + c[None, :])
    right = weight_pointers(expert, c, column % N, weight_e, weight_c, weight_n)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    acc = accumulate_products(acc, None, grad_pre + left, weight + right, None, weight_c, C, EVEN, BLOCK_C, PRECISION)
    if weight_up is not None:
        acc = accumulate_products(
            acc, None, grad_pre_up + left, weight_up + right, None, weight_c, C, EVEN, BLOCK_C, PRECISION
        )
    store_block(acc, out, first * N + (line[:, None] * N + column[None, :]), exists[:, None] & (column < N)[None, :])


@triton.jit
def load_row_range(ends, expert):
    """Return the start and end of an expert's rows."""
    return tl.load(ends + expert - 1, mask=expert > 0, other=0), tl.load(ends + expert)


@triton.jit(do_not_specialize=["num_tokens"])
def weight_grads(
    x,  # (t or r, m)
    y,  # (t or r, n)
    y_up,  # second y for gated experts, or None
    token,  # (r,) int32: indices of the rows to gather from x or y
    ends,  # (e,) int32: end of each expert's rows
    out,  # (e, m, n) with any strides
    out_up,
    num_tokens,
    M,
    N,
    out_e,
    out_m,
    out_n,
    GATHER_X: tl.constexpr,  # whether rows are gathered from x rather than y
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Compute `x^T y` for each expert's rows. The result is 0 for experts without rows.

    x is loaded in the layout `(m, c)` that the matrix product uses, and the indices of gathered rows are loaded one
    iteration in advance. This allows both operands to be copied asynchronously, with as many blocks in flight as the
    schedule has stages. If there are two weights, programs alternate between them.
    """
    blocks_m, blocks_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    program = tl.program_id(0)
    if y_up is not None:
        y = y_up if program % 2 == 1 else y
        out = out_up if program % 2 == 1 else out
        program = program // 2
    expert = program // (blocks_m * blocks_n)
    block_m, block_n = swizzle_program(program % (blocks_m * blocks_n), blocks_m, blocks_n)
    begin, end = load_row_range(ends, expert)
    line = block_m * BLOCK_M + tl.arange(0, BLOCK_M)
    column = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    left, right = x + line % M, column % N
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    row = begin + tl.arange(0, BLOCK_C)
    source = tl.load(token + row, mask=row < end, other=0)
    for _ in range(begin, end, BLOCK_C):
        exists = row < end
        source = tl.minimum(source, num_tokens - 1)
        row_x = (source if GATHER_X else row).to(tl.int64)
        place = right[None, :] + (row if GATHER_X else source).to(tl.int64)[:, None] * N
        a = tl.load(left[:, None] + row_x[None, :] * M, mask=exists[None, :], other=0.0)
        b = tl.load(y + place, mask=exists[:, None], other=0.0)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
        row += BLOCK_C
        source = tl.load(token + row, mask=row < end, other=0)
    place = expert.to(tl.int64) * out_e + (line[:, None] * out_m + column[None, :] * out_n)
    stored = (line < M)[:, None] & (column < N)[None, :]
    store_block(acc, out, place, stored)


@triton.jit(do_not_specialize=["num_tokens", "num_assignments"])
def bias_grads_kernel(
    y,  # (t or r, n)
    token,  # (r,) int32: indices of the rows of y that are gathered and weighted; None if y is `(r, n)`
    row_weight,  # (a,) float32
    assignment,  # (r,) int32
    ends,  # (e,) int32: end of each expert's rows
    out,  # (e, n) with any strides
    num_tokens,
    num_assignments,
    N,
    out_e,
    out_n,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Sum each expert's rows of y. The sum is 0 for experts without rows."""
    blocks = tl.cdiv(N, BLOCK_N)
    expert, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    begin, end = load_row_range(ends, expert)
    column = block * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros((BLOCK_C, BLOCK_N), tl.float32)
    for start in range(begin, end, BLOCK_C):
        row = start + tl.arange(0, BLOCK_C)
        exists = row < end
        source = row
        if token is not None:
            source = tl.minimum(tl.load(token + row, mask=exists, other=0), num_tokens - 1)
        place = source.to(tl.int64)[:, None] * N + column[None, :]
        value = tl.load(y + place, mask=exists[:, None] & (column < N)[None, :], other=0.0).to(tl.float32)
        if token is not None:
            value *= load_row_weights(row_weight, assignment, row, exists, num_assignments)[:, None]
        acc += value
    store_block(tl.sum(acc, 0), out + expert.to(tl.int64) * out_e, column * out_n, column < N)


@triton.jit
def accumulate_row(acc, rows, row_of, index, weight, column, num_rows, D):
    """Return acc plus the weighted row of assignment `index`. An assignment whose row index is `num_rows` contributes
    0."""
    row = tl.load(row_of + index).to(tl.int64)
    width = tl.where(row < num_rows, D, 0)
    row = tl.minimum(row, num_rows - 1)
    value = tl.load(rows + row * D + column, mask=column < width, other=0.0).to(tl.float32)
    if weight is not None:
        value *= tl.load(weight + index).to(tl.float32)
    return acc + value


@triton.jit
def sum_partials(partial, row, exists, blocks, BLOCK: tl.constexpr, BLOCKS: tl.constexpr):
    """Add up the partial sums `(r, blocks)` of all blocks. The sum is 0 for rows that do not exist."""
    acc = tl.zeros((BLOCK, BLOCKS), tl.float32)
    for start in range(0, blocks, BLOCKS):
        part = start + tl.arange(0, BLOCKS)
        inside = exists[:, None] & (part < blocks)[None, :]
        acc += tl.load(partial + row[:, None] * blocks + part[None, :], mask=inside, other=0.0)
    return tl.sum(acc, 1)


@triton.jit(do_not_specialize=["num_rows", "blocks"])
def sum_rows_kernel(
    rows,  # (r, d), or None
    row_of,  # (a,) int32: row of each assignment, ordered by token
    weight,  # (a,) float32; None for an unweighted sum
    out,  # (t, d), output
    partial,  # (r, blocks) float32: partial sums of the row weights' gradients; or None
    grad_weight,  # (a,), output: gradients of the assignment weights
    num_rows,
    D,
    blocks,
    CHOICES: tl.constexpr,  # number of rows per token
    WIDTH: tl.constexpr,  # CHOICES rounded up to a power of 2
    BLOCK: tl.constexpr,
):
    """Sum each token's rows in float32 and in a fixed order. If `partial` is given, also write the gradients of the
    weights."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    if rows is not None:
        acc = tl.zeros((BLOCK,), tl.float32)
        if CHOICES <= 16:
            for i in tl.static_range(CHOICES):
                acc = accumulate_row(acc, rows, row_of, token * CHOICES + i, weight, column, num_rows, D)
        else:
            for i in range(CHOICES):
                acc = accumulate_row(acc, rows, row_of, token * CHOICES + i, weight, column, num_rows, D)
        tl.store(out + token * D + column, acc.to(out.dtype.element_ty), mask=column < D)
    if partial is not None:  # noqa: SIM102  (known when it is compiled, and the other is not)
        if tl.program_id(1) == 0:
            choice = tl.arange(0, WIDTH)
            made = token * CHOICES + choice
            row = tl.load(row_of + made, mask=choice < CHOICES, other=num_rows).to(tl.int64)
            total = sum_partials(partial, row, row < num_rows, blocks, WIDTH, 16)
            store_block(total, grad_weight, made, choice < CHOICES)
