"""What the passes of lora_linear leave in parts, added up in a fixed order: products of rows and a factor in blocks of
columns, and gradients in chunks of rows."""

import torch
import triton
import triton.language as tl

from trifuse.triton_kernels import common
from trifuse.triton_kernels.common import power_of_2, wide
from trifuse.triton_kernels.lora_linear_tile import chunk_of, factors_of, row_of

__all__ = ["Gradient", "add_up", "join", "scale_gradient"]


@triton.jit
def scale_kernel(S, Z, grads, chunks, order, rows, width, chunk_rows, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr):
    """grads[chunk] = the sum of S o Z over its rows."""
    _, begin, end = chunk_of(chunks, tl.program_id(0), rows, chunk_rows)
    r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    r_mask = r < width
    total = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for start in range(begin, end, BLOCK_M):
        place = start + tl.arange(0, BLOCK_M)
        mask = place < end
        row = wide(row_of(order, place, mask))
        at = (row * width)[:, None] + r[None, :]
        mask = mask[:, None] & r_mask[None, :]
        total += tl.load(S + at, mask=mask, other=0.0) * tl.load(Z + at, mask=mask, other=0.0)
    tl.store(grads + wide(tl.program_id(0)) * width + r, tl.sum(total, 0), mask=r_mask)


@triton.jit
def join_kernel(
    partial, out, first_chunks, offsets, strides, scale, n, low, high, rank, width, columns,
    BLOCK_P: tl.constexpr, BLOCK_E: tl.constexpr, BY_COLUMN: tl.constexpr,
):  # fmt: skip
    """out = scale times the sum of partial (n, width, columns) over each adapter's chunks; 0 outside the ranks from
    `low` to `high`."""
    adapter = wide(tl.program_id(0))
    begin = wide(0)
    end = wide(n)
    if first_chunks is not None:
        begin = tl.load(first_chunks + adapter)
        end = tl.load(first_chunks + adapter + 1)
    ranks, base, rank_stride, column_stride = factors_of(out, strides, offsets, adapter, columns, rank, BY_COLUMN)
    e = wide(tl.program_id(1)) * BLOCK_E + tl.arange(0, BLOCK_E)
    r = e // columns
    c = e % columns
    summed = (r >= low) & (r < tl.minimum(ranks, high))
    total = tl.zeros((BLOCK_P, BLOCK_E), tl.float32)
    for start in range(begin, end, BLOCK_P):
        chunk = start + tl.arange(0, BLOCK_P)
        at = partial + (chunk * width * columns)[:, None] + e[None, :]
        total += tl.load(at, mask=(chunk < end)[:, None] & summed[None, :], other=0.0)
    value = (scale * tl.sum(total, 0)).to(out.dtype.element_ty)
    tl.store(base + r * rank_stride + c * column_stride, value, mask=r < ranks)


class Gradient:
    """Partial sums of a factor's gradient: (chunks, width, columns)."""

    def __init__(self, rows, factor, like):
        self.rows, self.factor = rows, factor
        self.partial = like.new_empty((rows.n, factor.width, factor.columns), dtype=torch.float32)


def add_up(z):
    """The sum of (blocks, rows, width) over its blocks, in their order."""
    total = z.new_empty(z.shape[1:])
    _launch_join(z, total, None, None, (z.shape[2], 1), 1.0, z.shape[0], 0, z.shape[1], z.shape[1])
    return total


def _launch_join(
    partial, target, first, offsets, strides, scale, n, low, high, rank, adapters=1, by_column=False
):  # fmt: skip
    width, columns = partial.shape[1:]
    common.launch(
        join_kernel, (adapters, triton.cdiv(rank * columns, 256)),
        partial, target, first, offsets, strides, scale, n, low, high, rank, width, columns,
        BLOCK_P=4, BLOCK_E=256, BY_COLUMN=by_column, num_warps=4,
    )  # fmt: skip


def join(gradient, target, low, high, adapters=1):
    """A gradient in its place and dtype: rows of dA, or columns of dB. Ranks outside `low` to `high` get 0."""
    factor, rows = gradient.factor, gradient.rows
    rank, strides = factor.width, (0, 0)
    if rows.offsets is None:
        strides = target.stride()[::-1] if factor.by_column else target.stride()
        rank = target.shape[1] if factor.by_column else target.shape[0]
    _launch_join(
        gradient.partial, target, rows.first, rows.offsets, strides, 1.0, rows.n, low, high, rank, adapters,
        factor.by_column,
    )  # fmt: skip


def scale_gradient(S, Z, target, scale, rows, low, high, offsets=None, adapters=1):
    """`scale` times the sum of S o Z over each adapter's rows, into `target`: (ranks,), or (adapters, width) by
    offsets. Ranks outside `low` to `high` get 0."""
    width = S.shape[1]
    partial = S.new_empty((rows.n, width, 1))
    block_r = power_of_2(width, 16, 64)
    common.launch(
        scale_kernel, (rows.n, triton.cdiv(width, block_r)),
        S, Z, partial, rows.chunks, rows.order, rows.rows, width, rows.size,
        BLOCK_M=rows.block, BLOCK_R=block_r, num_warps=4,
    )  # fmt: skip
    rank = target.shape[-1]
    _launch_join(partial, target, rows.first, offsets, (1, 1), scale, rows.n, low, high, rank, adapters)
