"""Parts of lora_linear's Triton kernels: whose rows a program has, where their factors lie, products, dropout."""

import triton
import triton.language as tl

from trifuse.triton_kernels.common import wide

__all__ = ["chunk_of", "factor_tile", "factors_of", "keep", "product", "row_of", "scaled", "turned"]


@triton.jit
def chunk_of(chunks, chunk, rows, chunk_rows):
    """The adapter of a chunk of rows, and its first place and its end among the rows in the order of their adapters.
    chunks: (n, 3) int64, or None where one adapter has all rows."""
    if chunks is None:
        adapter = wide(0)
        begin = wide(chunk) * chunk_rows
        end = tl.minimum(begin + chunk_rows, rows)
    else:
        at = chunks + wide(chunk) * 3
        adapter = tl.load(at)
        begin = tl.load(at + 1)
        end = tl.load(at + 2)
    return adapter, begin, end


@triton.jit
def row_of(order, place, mask):
    """The rows at some places of that order."""
    return place if order is None else tl.load(order + place, mask=mask, other=0)


@triton.jit
def factors_of(factors, strides, offsets, adapter, columns, rank, BY_COLUMN: tl.constexpr):
    """The rank of an adapter, and where its factor begins: element (r, c) is at r strides[0] + c strides[1].

    offsets: None for the only adapter; else (n + 1,), the ranks before each adapter, whose factors follow each other
    as (rank, columns), or BY_COLUMN as (columns, rank)."""
    if offsets is None:
        ranks = wide(rank)
        base = factors
        rank_stride = wide(strides[0])
        column_stride = wide(strides[1])
    else:
        before = tl.load(offsets + adapter)
        ranks = tl.load(offsets + adapter + 1) - before
        base = factors + before * columns
        rank_stride = wide(1) if BY_COLUMN else wide(columns)
        column_stride = ranks if BY_COLUMN else wide(1)
    return ranks, base, rank_stride, column_stride


@triton.jit
def factor_tile(base, rank_stride, column_stride, r, r_mask, c, c_mask):
    """(ranks, columns) of a factor."""
    at = (r * rank_stride)[:, None] + (c * column_stride)[None, :]
    return tl.load(base + at, mask=r_mask[:, None] & c_mask[None, :], other=0.0)


@triton.jit
def scaled(t, p, scale, adapter, width, r, r_mask):
    """A float32 tile (rows, ranks) times the factors of the ranks, ``scale * p``."""
    factor = scale
    if p is not None:
        factor = (scale * tl.load(p + adapter * width + r, mask=r_mask, other=0.0))[None, :]
    return t * factor


@triton.jit
def _parts(a, part: tl.constexpr):
    """Three numbers of `part` for each of a: of bfloat16 they hold 24 bits, and float32's range."""
    high = a.to(part)
    rest = a - high.to(tl.float32)
    middle = rest.to(part)
    return high, middle, (rest - middle.to(tl.float32)).to(part)


@triton.jit
def product(v, f, total, FULL: tl.constexpr, PARTS: tl.constexpr):
    """total + v f^T in float32, to float32's own precision: v rows of x or dy, f a factor. Of operands in one half
    precision that takes one pass; PARTS: f is split up into v's dtype, which costs half of what widening v does."""
    f = tl.trans(f)
    if v.dtype == f.dtype and v.dtype != tl.float32:
        total = tl.dot(v, f, total)
    elif PARTS:
        high, middle, low = _parts(f, v.dtype)
        total = tl.dot(v, high, tl.dot(v, middle, tl.dot(v, low, total)))
    else:
        total = tl.dot(v.to(tl.float32), f.to(tl.float32), total, input_precision=FULL)
    return total


@triton.jit
def turned(s, v, total, FULL: tl.constexpr, PARTS: tl.constexpr):
    """total + s^T v in float32, to float32's own precision: s in float32, v rows of x or dy."""
    s = tl.trans(s)
    if PARTS:
        high, middle, low = _parts(s, v.dtype)
        total = tl.dot(high, v, tl.dot(middle, v, tl.dot(low, v, total)))
    else:
        total = tl.dot(s, v.to(tl.float32), total, input_precision=FULL)
    return total


@triton.jit
def keep(seed, row, start, threshold, BLOCK_C: tl.constexpr):
    """(rows, BLOCK_C): what dropout keeps of columns from `start`, a multiple of 4, on: as
    `reference.lora_dropout_mask`, a counter of Philox for each four."""
    tl.static_assert(BLOCK_C % 4 == 0)
    row = wide(row)
    blank = tl.zeros((row.shape[0], BLOCK_C // 4), tl.uint32)
    group = blank + (start // 4 + tl.arange(0, BLOCK_C // 4)).to(tl.uint32)[None, :]
    low = blank + (row & 0xFFFFFFFF).to(tl.uint32)[:, None]
    high = blank + (row >> 32).to(tl.uint32)[:, None]
    first, second, third, fourth = tl.philox(tl.load(seed), group, blank, low, high)
    words = tl.join(tl.join(first, third), tl.join(second, fourth))
    return tl.reshape(words, (row.shape[0], BLOCK_C)) >= tl.full((), threshold, tl.uint32)
