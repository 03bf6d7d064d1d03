"""The four passes of low-rank adapters beside a matrix product, as Triton kernels and their launches.

Rows come in chunks, each of one adapter. `down_kernel`: a tile of rows times a factor, over a piece of the columns.
`out_kernel` and `up_kernel` hold a block of columns and walk over the rows of a chunk: `out_kernel` reads dy once for
dy B and for the gradient of B, `up_kernel` writes (t o p) F, what the base product is added to, and in the same walk
reads x for the gradient of A. What is split up leaves partial sums, which lora_linear_sums.py adds up.
"""

import torch
import triton
import triton.language as tl

from trifuse.registration.common import interpreting
from trifuse.triton_kernels import common
from trifuse.triton_kernels.common import power_of_2, wide
from trifuse.triton_kernels.lora_linear_sums import Gradient, add_up
from trifuse.triton_kernels.lora_linear_tile import (
    chunk_of,
    factor_tile,
    factors_of,
    keep,
    product,
    row_of,
    scaled,
    turned,
)

__all__ = ["Factor", "Rows", "backward", "base_gradients", "chunk_size", "down", "readable", "up"]

PROGRAMS = 528  # four for each of 132 multiprocessors: chunks of rows are as large as leaves that many programs
PIECES = 8  # of the columns at most; who reads the sums has them all in flight at once
RANKS = 64  # in a block at most

# Kernel: columns in a block, warps and stages, where x is multiplied as it is and where in float32 (see `product`); and
# both for more than 16 ranks.
TILES = {
    "down": ((32, 4, 4), (32, 8, 4), (64, 8, 4), (32, 8, 4)),
    "out": ((128, 4, 2), (64, 4, 2), (64, 4, 2), (64, 4, 2)),
    "up": ((128, 4, 2), (64, 4, 2), (64, 8, 2), (64, 8, 2)),
}


@triton.jit
def down_kernel(
    x, factors, partial, seed, chunks, order, offsets, x_stride, strides, rows, columns, rank, width, piece_columns,
    chunk_rows, tiles, threshold, keep_scale,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr, BY_COLUMN: tl.constexpr, FULL: tl.constexpr,
    PARTS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """partial[piece] = x~ F^T over a piece of the columns."""
    adapter, begin, end = chunk_of(chunks, tl.program_id(0) // tiles, rows, chunk_rows)
    place = begin + tl.program_id(0) % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    mask = place < end
    row = wide(row_of(order, place, mask))
    ranks, base, rank_stride, column_stride = factors_of(factors, strides, offsets, adapter, columns, rank, BY_COLUMN)
    r = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
    piece = tl.program_id(1)
    total = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    last = tl.minimum((piece + 1) * piece_columns, columns)
    i = tl.arange(0, BLOCK_C)
    x_at = x + (row * x_stride)[:, None] + i[None, :]
    f_at = base + (r * rank_stride)[:, None] + (i * column_stride)[None, :]
    for start in tl.range(piece * piece_columns, last, BLOCK_C, num_stages=STAGES):
        c_mask = i < columns - start
        v = tl.load(x_at + start, mask=mask[:, None] & c_mask[None, :], other=0.0)
        if seed is not None:
            v = tl.where(keep(seed, row, start, threshold, BLOCK_C), v, 0.0)
        f = tl.load(f_at + start * column_stride, mask=(r < ranks)[:, None] & c_mask[None, :], other=0.0)
        total = product(v, f, total, FULL, PARTS)
    if seed is not None:
        total *= keep_scale
    at = partial + ((wide(piece) * rows + row) * width)[:, None] + r[None, :]
    tl.store(at, tl.where((r < ranks)[None, :], total, 0.0), mask=mask[:, None] & (r < width)[None, :])


@triton.jit
def out_kernel(
    dy, factors, S, p, sums, grads, chunks, order, offsets, dy_stride, strides, scale, rows, columns, rank, width,
    chunk_rows,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr, BY_COLUMN: tl.constexpr, FULL: tl.constexpr,
    PARTS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """sums[block of columns] = dy F^T over it, or not where sums is None; grads[chunk] = (S o p)^T dy over its rows."""
    adapter, begin, end = chunk_of(chunks, tl.program_id(0), rows, chunk_rows)
    ranks, base, rank_stride, column_stride = factors_of(factors, strides, offsets, adapter, columns, rank, BY_COLUMN)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    c_mask = c < columns
    r = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
    r_mask = r < ranks
    f = factor_tile(base, rank_stride, column_stride, r, r_mask, c, c_mask)
    gradient = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for start in tl.range(begin, end, BLOCK_M, num_stages=STAGES):
        place = start + tl.arange(0, BLOCK_M)
        mask = place < end
        row = wide(row_of(order, place, mask))
        v = tl.load(dy + (row * dy_stride)[:, None] + c[None, :], mask=mask[:, None] & c_mask[None, :], other=0.0)
        if sums is not None:
            z = product(v, f, tl.zeros((BLOCK_M, BLOCK_R), tl.float32), FULL, PARTS)
            at = sums + ((wide(tl.program_id(1)) * rows + row) * width)[:, None] + r[None, :]
            tl.store(at, tl.where(r_mask[None, :], z, 0.0), mask=mask[:, None] & (r < width)[None, :])
        s = tl.load(S + (row * width)[:, None] + r[None, :], mask=mask[:, None] & r_mask[None, :], other=0.0)
        gradient = turned(scaled(s, p, scale, adapter, width, r, r_mask), v, gradient, FULL, PARTS)
    at = grads + ((wide(tl.program_id(0)) * width + r) * columns)[:, None] + c[None, :]
    tl.store(at, gradient, mask=r_mask[:, None] & c_mask[None, :])


@triton.jit
def _summed(t, row, mask, rows, width, r, r_mask, PIECES: tl.constexpr):
    """The sum of the partial sums (PIECES, rows, width) of some rows and ranks."""
    at = t + (row * width)[:, None] + r[None, :]
    mask = mask[:, None] & r_mask[None, :]
    total = tl.load(at, mask=mask, other=0.0)
    for piece in tl.static_range(1, PIECES):
        total += tl.load(at + wide(piece) * rows * width, mask=mask, other=0.0)
    return total


@triton.jit
def _write(
    out, mine, f, t, base, rank_stride, column_stride, p, scale, adapter, bias, kept, keep_scale, row, mask, c, c_mask,
    rows, columns, ranks, width,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr, FULL: tl.constexpr, PIECES: tl.constexpr,
    RANK_BLOCKS: tl.constexpr,
):  # fmt: skip
    """A tile of `out`. mine, f: the first block of ranks of (t o p) and of F."""
    # What is rounded to 8 bits needs no more than 11 of its factors.
    ENOUGH: tl.constexpr = "tf32" if FULL == "tf32x3" and out.dtype.element_ty == tl.bfloat16 else FULL
    value = tl.dot(mine, f, tl.zeros((BLOCK_M, BLOCK_C), tl.float32), input_precision=ENOUGH)
    for block in range(1, RANK_BLOCKS):
        r = block * BLOCK_R + tl.arange(0, BLOCK_R)
        other = _summed(t, row, mask, rows, width, r, r < ranks, PIECES)
        other = scaled(other, p, scale, adapter, width, r, r < ranks)
        g = factor_tile(base, rank_stride, column_stride, r, r < ranks, c, c_mask).to(tl.float32)
        value = tl.dot(other, g, value, input_precision=ENOUGH)
    if kept is not None:
        value = tl.where(kept, value * keep_scale, 0.0)
    if bias is not None:
        value += tl.load(bias + c, mask=c_mask, other=0.0).to(tl.float32)[None, :]
    at = out + (row * columns)[:, None] + c[None, :]
    tl.store(at, value.to(out.dtype.element_ty), mask=mask[:, None] & c_mask[None, :])


@triton.jit
def up_kernel(
    t, factors, p, bias, out, x, S, grads, seed, chunks, order, offsets, x_stride, strides, scale, rows, columns, rank,
    width, chunk_rows, threshold, keep_scale,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr, BY_COLUMN: tl.constexpr, FULL: tl.constexpr,
    PARTS: tl.constexpr, STAGES: tl.constexpr, PIECES: tl.constexpr, RANK_BLOCKS: tl.constexpr,
):  # fmt: skip
    """out = (t o p) F o mask / (1 - rate) + bias, S = t, and grads[chunk] = (t o p)^T x~ over its rows, where these
    are not None. t: (PIECES, rows, width), summed up here."""
    adapter, begin, end = chunk_of(chunks, tl.program_id(0), rows, chunk_rows)
    ranks, base, rank_stride, column_stride = factors_of(factors, strides, offsets, adapter, columns, rank, BY_COLUMN)
    first_column = tl.program_id(1) * BLOCK_C
    c = first_column + tl.arange(0, BLOCK_C)
    c_mask = c < columns
    r = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
    r_mask = r < ranks
    f = factor_tile(base, rank_stride, column_stride, r, r_mask, c, c_mask).to(tl.float32)
    to_store = tl.where(tl.program_id(1) == 0, width, 0)
    gradient = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for start in tl.range(begin, end, BLOCK_M, num_stages=STAGES):
        place = start + tl.arange(0, BLOCK_M)
        mask = place < end
        row = wide(row_of(order, place, mask))
        mine = _summed(t, row, mask, rows, width, r, r_mask, PIECES)
        if S is not None:
            at = S + (row * width)[:, None] + r[None, :]
            tl.store(at, mine, mask=mask[:, None] & (r < to_store)[None, :])
        mine = scaled(mine, p, scale, adapter, width, r, r_mask)
        kept = None
        if seed is not None:
            kept = keep(seed, row, first_column, threshold, BLOCK_C)
        if out is not None:
            if RANK_BLOCKS == 1:
                _write(
                    out, mine, f, t, base, rank_stride, column_stride, p, scale, adapter, bias, kept, keep_scale, row,
                    mask, c, c_mask, rows, columns, ranks, width, BLOCK_M, BLOCK_C, BLOCK_R, FULL, PIECES, 1,
                )  # fmt: skip
            elif tl.program_id(2) == 0:  # one program writes what all blocks of ranks give
                _write(
                    out, mine, f, t, base, rank_stride, column_stride, p, scale, adapter, bias, kept, keep_scale, row,
                    mask, c, c_mask, rows, columns, ranks, width, BLOCK_M, BLOCK_C, BLOCK_R, FULL, PIECES, RANK_BLOCKS,
                )  # fmt: skip
        if grads is not None:
            v = tl.load(x + (row * x_stride)[:, None] + c[None, :], mask=mask[:, None] & c_mask[None, :], other=0.0)
            if seed is not None:
                v = tl.where(kept, v, 0.0)
            gradient = turned(mine, v, gradient, FULL, PARTS)
    if grads is not None:
        if seed is not None:
            gradient *= keep_scale
        at = grads + ((wide(tl.program_id(0)) * width + r) * columns)[:, None] + c[None, :]
        tl.store(at, gradient, mask=r_mask[:, None] & c_mask[None, :])


PART_DTYPES = (torch.bfloat16,)
"""In these, three parts hold a number of float32. (float16 holds its bits, and not its range.)"""


def _full():
    """How tl.dot multiplies float32 to nearly its own precision on the matrix cores of this GPU: "tf32x3" keeps 22 of
    24 bits, and all of x where that is in half precision."""
    if interpreting() or triton.runtime.driver.active.get_current_target().backend != "cuda":
        return "ieee"
    return "tf32x3"


class Rows:
    """How rows are cut into chunks: plainly, or by `chunks` and `order`, see `chunk_of`.

    size: rows in a chunk at most; n: how many chunks there are, or may be; first: (adapters + 1,), the chunks before
    each adapter; offsets: (adapters + 1,), the ranks before each."""

    def __init__(self, rows, size, n=None, chunks=None, order=None, first=None, offsets=None):
        self.rows, self.size, self.n = rows, size, triton.cdiv(rows, size) if n is None else n
        self.chunks, self.order, self.first, self.offsets = chunks, order, first, offsets
        self.tables = chunks, order, offsets
        self.block = power_of_2(size, 16, 32)


def chunk_size(rows, columns, rank):
    """Of rows that a walk over blocks of so many columns takes."""
    blocks = triton.cdiv(columns, 128) * triton.cdiv(rank, RANKS)
    chunks = max(triton.cdiv(PROGRAMS, max(blocks, 1)), 1)
    return max(triton.cdiv(triton.cdiv(rows, chunks), 32), 1) * 32 if rows > 16 else 16


class Factor:
    """A factor as (rank, columns): `tensor` has element (r, c) at r strides[0] + c strides[1]; see `factors_of`."""

    def __init__(self, tensor, strides, rank, width, columns, by_column=False):
        self.tensor, self.strides, self.rank, self.width, self.columns = tensor, strides, rank, width, columns
        self.by_column = by_column

    def sizes(self, kernel, rows, x):
        """Blocks of columns and of ranks, and the kernel's meta parameters."""
        block_r = power_of_2(self.width, 16, RANKS)
        as_it_is = x.dtype in PART_DTYPES or x.dtype == self.tensor.dtype != torch.float32
        block_c, warps, stages = TILES[kernel][(0 if as_it_is else 1) + (2 if block_r > 16 else 0)]
        block_c = power_of_2(self.columns, 16, block_c if block_r < RANKS else 32)
        if self.columns % 16 or self.width > block_r:  # loads of single numbers, or nearly all registers taken
            stages = 1
        blocks = triton.cdiv(self.columns, block_c), triton.cdiv(self.width, block_r)
        meta = {
            "BLOCK_M": rows.block, "BLOCK_C": block_c, "BLOCK_R": block_r, "BY_COLUMN": self.by_column,
            "FULL": _full(), "PARTS": x.dtype in PART_DTYPES, "STAGES": stages, "num_warps": warps,
        }  # fmt: skip
        return blocks, meta


def down(x, factor, rows, dropout=(None, 0, 1.0)):
    """x~ F^T as partial sums (pieces, rows, width)."""
    (_, rank_blocks), meta = factor.sizes("down", rows, x)
    tiles = triton.cdiv(rows.size, rows.block)
    programs = max(rows.n * tiles * rank_blocks, 1)
    columns = meta["BLOCK_C"] * 2
    pieces = min(power_of_2(triton.cdiv(PROGRAMS, programs), 1, PIECES), max(triton.cdiv(factor.columns, columns), 1))
    piece_columns = triton.cdiv(triton.cdiv(max(factor.columns, 1), pieces), meta["BLOCK_C"]) * meta["BLOCK_C"]
    pieces = triton.cdiv(max(factor.columns, 1), piece_columns)
    partial = x.new_empty((pieces, rows.rows, factor.width), dtype=torch.float32)
    seed, threshold, keep_scale = dropout
    common.launch(
        down_kernel, (rows.n * tiles, pieces, rank_blocks),
        x, factor.tensor, partial, seed, *rows.tables, x.stride(0), factor.strides, rows.rows, factor.columns,
        factor.rank, factor.width, piece_columns, rows.size, tiles, threshold, keep_scale, **meta,
    )  # fmt: skip
    return partial


def out(dy, factor, S, p, scale, rows, sums):
    """dy F^T (rows, width) if `sums`, and the gradient of the factor."""
    (column_blocks, rank_blocks), meta = factor.sizes("out", rows, dy)
    z = dy.new_empty((column_blocks, rows.rows, factor.width), dtype=torch.float32) if sums else None
    gradient = Gradient(rows, factor, dy)
    common.launch(
        out_kernel, (rows.n, column_blocks, rank_blocks),
        dy, factor.tensor, S, p, z, gradient.partial, *rows.tables, dy.stride(0), factor.strides, scale, rows.rows,
        factor.columns, factor.rank, factor.width, rows.size, **meta,
    )  # fmt: skip
    return add_up(z) if sums else None, gradient


def up(t, factor, p, scale, rows, target=None, bias=None, S=None, x=None, dropout=(None, 0, 1.0)):
    """Writes ``(t o p) F`` to `target`; with x, the gradient of the factor is returned."""
    (column_blocks, rank_blocks), meta = factor.sizes("up", rows, target if x is None else x)
    gradient = None if x is None else Gradient(rows, factor, x)
    seed, threshold, keep_scale = dropout
    common.launch(
        up_kernel, (rows.n, column_blocks, 1 if gradient is None and S is None else rank_blocks),
        t, factor.tensor, p, bias, target, x, S, None if gradient is None else gradient.partial, seed, *rows.tables,
        0 if x is None else x.stride(0), factor.strides, scale, rows.rows, factor.columns, factor.rank, factor.width,
        rows.size, threshold, keep_scale, PIECES=t.shape[0], RANK_BLOCKS=rank_blocks, **meta,
    )  # fmt: skip
    return gradient


def backward(
    dy, x, A, B, S, p, scale, rows_out, rows_in, dx, needs_A, needs_B, needs_p, dropout=(None, 0, 1.0)
):  # fmt: skip
    """Z = dy B (rows, width) and the gradients of A and B, of which those not needed are None; writes ``((Z o p) A) o
    mask / (1 - rate)`` to dx where that is not None."""
    Z = gradient_A = gradient_B = None
    needs_Z = dx is not None or needs_A or needs_p
    if needs_B:
        Z, gradient_B = out(dy, B, S, p, scale, rows_out, needs_Z)
    elif needs_Z:
        Z = add_up(down(dy, B, rows_out))
    if dx is not None or needs_A:
        gradient_A = up(Z[None], A, p, scale, rows_in, dx, x=x if needs_A else None, dropout=dropout)
    return Z, gradient_A, gradient_B


def base_gradients(dy, x, weight, needs, dx, dweight, dbias):
    """Adds the base product's part to dx, and writes the gradients of weight and bias. Into tensors that are there:
    autocast around a backward pass then changes no dtype."""
    if needs[0]:
        dx.addmm_(dy, weight)
    if needs[1]:
        torch.mm(dy.t(), x, out=dweight)
    if needs[2]:
        torch.sum(dy, 0, out=dbias)


def readable(dy):
    """dy as the kernels read it: columns next to each other."""
    return dy if dy.stride(1) == 1 or dy.shape[1] <= 1 else dy.contiguous()
