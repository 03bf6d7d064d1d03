"""The low-rank update of a weight with one rounding, in Triton.

A program takes a tile of the weight, adds the ranks in order, and leaves its share of the sums of squares. A weight
whose rows and not whose columns are contiguous is updated as its transpose, with A and B in each other's place.
"""

import torch
import triton
import triton.language as tl

from trifuse.triton_kernels import common
from trifuse.triton_kernels.common import wide

__all__ = ["lora_update"]

ROWS, COLUMNS = 32, 128  # of a tile


@triton.jit
def _words(seed, row, column, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TRANSPOSED: tl.constexpr):
    """The random words of a tile; row and column, int64, are the first ones, multiples of four."""
    # A counter for four neighbours of a row of the weight, which lie along a column of its transpose.
    if TRANSPOSED:
        group = (row // 4 + tl.arange(0, ROWS // 4))[:, None] + tl.zeros((ROWS // 4, COLUMNS), tl.int64)
        line = (column + tl.arange(0, COLUMNS))[None, :] + tl.zeros((ROWS // 4, COLUMNS), tl.int64)
    else:
        group = (column // 4 + tl.arange(0, COLUMNS // 4))[None, :] + tl.zeros((ROWS, COLUMNS // 4), tl.int64)
        line = (row + tl.arange(0, ROWS))[:, None] + tl.zeros((ROWS, COLUMNS // 4), tl.int64)
    low, high = (line & 0xFFFFFFFF).to(tl.uint32), (line >> 32).to(tl.uint32)
    group = (group & 0xFFFFFFFF).to(tl.uint32)
    a, b, c, d = tl.philox(tl.load(seed), group, tl.zeros(group.shape, tl.uint32), low, high)
    words = tl.join(tl.join(a, c), tl.join(b, d))  # the four are the last two axes, in order
    if TRANSPOSED:
        words = tl.permute(words, (0, 2, 3, 1))
    return tl.reshape(words, (ROWS, COLUMNS))


@triton.jit
def _round(value, words, dtype: tl.constexpr):
    """Up in size with the probability of what is cut off, see ``trifuse.reference.round_stochastically``."""
    bits = value.to(tl.uint32, bitcast=True)
    size = bits & 0x7FFFFFFF
    if dtype == tl.bfloat16:
        rounded = (bits + (words & 0xFFFF)) >> 16
        plain = size < 0x7F800000
    else:
        small = size < 0x38800000
        steps = (tl.where(small, tl.abs(value), 0.0) * 137438953472.0).to(tl.int32).to(tl.uint32)  # 2 ** 37
        whole = tl.where(small, steps, size - 0x38000000)
        rounded = ((bits >> 16) & 0x8000) | ((whole + (words & 0x1FFF)) >> 13)
        plain = size < 0x47800000
    return tl.where(plain, rounded.to(tl.uint16).to(dtype, bitcast=True), value.to(dtype))


@triton.jit
def _update(
    weight, out, A, B, p, seed, partials, weight_row, out_row, A_row, A_column, B_row, B_column,
    rows, columns, rank, scale,
    TRANSPOSED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    across = tl.cdiv(columns, COLUMNS)
    row, column = wide(tl.program_id(0) // across) * ROWS, wide(tl.program_id(0) % across) * COLUMNS
    n, k = row + tl.arange(0, ROWS), column + tl.arange(0, COLUMNS)
    here_n, here_k = n < rows, k < columns
    update = tl.zeros((ROWS, COLUMNS), tl.float32)
    for i in range(rank):
        b = tl.load(B + n * B_row + wide(i) * B_column, mask=here_n, other=0.0).to(tl.float32)
        a = tl.load(A + wide(i) * A_row + k * A_column, mask=here_k, other=0.0).to(tl.float32)
        factor = scale
        if p is not None:
            factor = scale * tl.load(p + i)
        update += (factor * b)[:, None] * a[None, :]
    here = here_n[:, None] & here_k[None, :]
    before = tl.load(weight + (n * weight_row)[:, None] + k[None, :], mask=here, other=0.0).to(tl.float32)
    dtype: tl.constexpr = out.dtype.element_ty
    value = before + update
    if seed is not None:
        after = _round(value, _words(seed, row, column, ROWS, COLUMNS, TRANSPOSED), dtype)
    else:
        after = value.to(dtype)
    tl.store(out + (n * out_row)[:, None] + k[None, :], after, mask=here)
    if partials is not None:
        lost = tl.where(here, (after.to(tl.float32) - before) - update, 0.0)
        update = tl.where(here, update, 0.0)
        at = partials + 2 * wide(tl.program_id(0))
        tl.store(at, tl.sum(tl.sum(update * update, 1), 0).to(tl.float64))
        tl.store(at + 1, tl.sum(tl.sum(lost * lost, 1), 0).to(tl.float64))


def _lies_plain(matrix):
    rows, columns = matrix.shape
    return (columns <= 1 or matrix.stride(1) == 1) and (rows <= 1 or matrix.stride(0) >= columns)


def lora_update(out, weight, lora_A, lora_B, scale, p, active_rank, seed, measure):
    weight = out if weight is None else weight
    transposed = not (_lies_plain(out) and _lies_plain(weight))
    A, B = lora_A, lora_B
    if transposed:
        out, weight, A, B = out.t(), weight.t(), lora_B.t(), lora_A.t()
    rows, columns = out.shape
    tiles = triton.cdiv(rows, ROWS) * triton.cdiv(columns, COLUMNS)
    partials = out.new_empty((tiles, 2), dtype=torch.float64) if measure else None
    random = seed if out.dtype != torch.float32 else None
    if tiles:
        common.launch(
            _update, (tiles,), weight, out, A, B, p, random, partials, weight.stride(0), out.stride(0), *A.stride(),
            *B.stride(), rows, columns, active_rank, scale, TRANSPOSED=transposed, ROWS=ROWS, COLUMNS=COLUMNS,
        )  # fmt: skip
    return partials.sum(0) if measure else out.new_empty((0,), dtype=torch.float64)
