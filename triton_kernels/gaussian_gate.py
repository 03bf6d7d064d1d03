"""The Gaussian gates in Triton, forward and backward.

A program takes a tile of slices, as many as fill it. Slices that fit into a tile are held in it, so that everything is
read once; longer ones are walked twice, tile after tile. Every program leaves its share of the gradients of the
parameters, which are added in a fixed order.
"""

import torch
import triton
import triton.language as tl

from trifuse.triton_kernels import common, slices
from trifuse.triton_kernels.common import LOG2E, wide

__all__ = ["gaussian_gate_bwd", "gaussian_gate_fwd"]

TILE = 2048  # entries of a program of four warps
LONGEST = 8192  # entries that a program of sixteen warps holds
COLUMNS = (8, 32)  # neighbouring columns that a program takes at least and at most
ROOT_2PI = 2.5066282746310002


@triton.jit
def _rows(head, heads, o, i, share, rows, OUTER_ROWS: tl.constexpr):
    """The row of parameters of each slice of a tile."""
    index = o if OUTER_ROWS else i
    return tl.where(heads > 1, wide(head) + 0 * index, index // share % rows)


@triton.jit
def _gaussian(offset, width, row, k, K, inverse, exists, SQUARED: tl.constexpr):
    """The k-th Gaussian of each slice: its offset, and 1 / (width sqrt(v))."""
    at = row * K + k
    w = tl.load(width + at, mask=exists, other=1.0)
    q = tl.div_rn(inverse, tl.sqrt_rn(w) if SQUARED else w)
    return tl.load(offset + at, mask=exists, other=0.0), q


@triton.jit
def _bell(z):
    return tl.exp2(z * z * (-0.5 * LOG2E))


@triton.jit
def _height(alpha, row, exists, SCALE: tl.constexpr):
    """What the sum of the bells is multiplied by, and what is added."""
    if alpha is not None:
        height = tl.load(alpha + row, mask=exists, other=0.0) * SCALE
        base = 1.0
    else:
        height = tl.where(exists, 1.0, 0.0)
        base = 0.0
    return height, base


@triton.jit
def _forward(
    x, mask, offset, width, alpha, out, stats, x_strides, mask_strides, out_strides,
    heads, outer, inner, part, last_part, rows, K, share, eps,
    SCALE: tl.constexpr, SQUARED: tl.constexpr, MULTIPLY: tl.constexpr, OUTER_ROWS: tl.constexpr,
    HELD: tl.constexpr, COLUMNS: tl.constexpr, SLICES: tl.constexpr, LENGTH: tl.constexpr,
):  # fmt: skip
    head, tile = tl.program_id(0) % heads, tl.program_id(0) // heads
    o, i, slot, exists, begin, length = slices.place(tile, head, heads, outer, inner, part, last_part, SLICES, COLUMNS)
    row = _rows(head, heads, o, i, share, rows, OUTER_ROWS)
    e = tl.arange(0, LENGTH)
    here = exists[:, None] & (e < length)[None, :]
    keep = slices.taking_part(mask, mask_strides, o, i, begin + e, here)
    entries = tl.where(keep, slices.load(x, x_strides, o, i, begin + e, here).to(tl.float32), 0.0)
    some, mean, rest, squares_here = slices.moments(entries, keep)
    count, squares = some.to(tl.float64), squares_here.to(tl.float64)
    if not HELD:
        middle = mean.to(tl.float64) + rest
        for first in range(LENGTH, length, LENGTH):
            n = wide(first) + e
            here = exists[:, None] & (n < length)[None, :]
            keep = slices.taking_part(mask, mask_strides, o, i, begin + n, here)
            entries = tl.where(keep, slices.load(x, x_strides, o, i, begin + n, here).to(tl.float32), 0.0)
            more, its_mean, its_rest, its_squares = slices.moments(entries, keep)
            count, middle, squares = slices.join(count, middle, squares, more, its_mean, its_rest, its_squares)
        mean = middle.to(tl.float32)
        rest = (middle - mean.to(tl.float64)).to(tl.float32)
    unbiased = 0 if alpha is None else 1
    v = (squares / tl.maximum(count - unbiased, 1.0) + eps).to(tl.float32)
    inverse = tl.div_rn(tl.full((SLICES,), 1.0, tl.float32), tl.sqrt_rn(v))
    step = wide(heads) * outer * inner
    tl.store(stats + slot, mean, mask=exists)
    tl.store(stats + step + slot, rest, mask=exists)
    tl.store(stats + 2 * step + slot, inverse, mask=exists)

    height, base = _height(alpha, row, exists, SCALE)
    for first in range(0, LENGTH if HELD else length, LENGTH):
        n = wide(first) + e
        if not HELD:
            here = exists[:, None] & (n < length)[None, :]
            keep = slices.taking_part(mask, mask_strides, o, i, begin + n, here)
            entries = tl.where(keep, slices.load(x, x_strides, o, i, begin + n, here).to(tl.float32), 0.0)
        d = entries - mean[:, None] - rest[:, None]
        total = tl.zeros((SLICES, LENGTH), tl.float32)
        for k in range(K):
            delta, q = _gaussian(offset, width, row, k, K, inverse, exists, SQUARED)
            total += _bell((d - delta[:, None]) * q[:, None])
        gate = base + height[:, None] * total
        y = tl.where(keep, entries * gate if MULTIPLY else gate, 0.0)
        slices.store(out, out_strides, o, i, begin + n, here, y)


@triton.jit
def _leave(at, value, here, exists, PER_SLICE: tl.constexpr):
    """Shares of gradients, (slices, Gaussians): of each slice, or of the tile."""
    if PER_SLICE:
        tl.store(at, value, mask=exists[:, None] & here[None, :])
    else:
        tl.store(at, tl.sum(tl.where(exists[:, None], value, 0.0), 0)[None, :], mask=here[None, :])


@triton.jit
def _tile_of_both(x, dout, mask, x_strides, dout_strides, mask_strides, o, i, n, here):
    keep = slices.taking_part(mask, mask_strides, o, i, n, here)
    entries = tl.where(keep, slices.load(x, x_strides, o, i, n, here).to(tl.float32), 0.0)
    return keep, entries, tl.where(keep, slices.load(dout, dout_strides, o, i, n, here).to(tl.float32), 0.0)


@triton.jit
def _backward(
    dout, x, mask, offset, width, alpha, stats, dx, partials,
    dout_strides, x_strides, mask_strides, dx_strides,
    heads, outer, inner, part, last_part, rows, K, share, per_item,
    SCALE: tl.constexpr, SQUARED: tl.constexpr, MULTIPLY: tl.constexpr, OUTER_ROWS: tl.constexpr,
    PER_SLICE: tl.constexpr, HELD: tl.constexpr, COLUMNS: tl.constexpr, SLICES: tl.constexpr, LENGTH: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """With G the gradient of the gate, u = d - offset_k, z = u q_k and w = -G height bell(z) z that of z,
    dx = dout gate + s - mean(s) - d Q / (v M), s = sum_k w q_k, Q = sum_k q_k sum w u, M the divisor of the variance.
    partials: for every k the gradients of offset and of width, and last that of alpha."""
    head, tile = tl.program_id(0) % heads, tl.program_id(0) // heads
    o, i, slot, exists, begin, length = slices.place(tile, head, heads, outer, inner, part, last_part, SLICES, COLUMNS)
    row = _rows(head, heads, o, i, share, rows, OUTER_ROWS)
    step = wide(heads) * outer * inner
    mean = tl.load(stats + slot, mask=exists, other=0.0)
    rest = tl.load(stats + step + slot, mask=exists, other=0.0)
    inverse = tl.load(stats + 2 * step + slot, mask=exists, other=0.0)
    height, base = _height(alpha, row, exists, SCALE)
    e = tl.arange(0, LENGTH)
    here = exists[:, None] & (e < length)[None, :]
    keep, entries, g = _tile_of_both(x, dout, mask, x_strides, dout_strides, mask_strides, o, i, begin + e, here)
    d = entries - mean[:, None] - rest[:, None]
    s, gate = tl.zeros((SLICES, LENGTH), tl.float32), tl.zeros((SLICES, LENGTH), tl.float32)

    kk = tl.arange(0, BLOCK_K)
    sums_w, sums_wu = tl.zeros((SLICES, BLOCK_K), tl.float32), tl.zeros((SLICES, BLOCK_K), tl.float32)
    count, bells = tl.zeros((SLICES,), tl.float32), tl.zeros((SLICES,), tl.float32)
    for first in range(0, LENGTH if HELD else length, LENGTH):
        if not HELD:
            n = wide(first) + e
            here = exists[:, None] & (n < length)[None, :]
            keep, entries, g = _tile_of_both(
                x, dout, mask, x_strides, dout_strides, mask_strides, o, i, begin + n, here
            )
            d = entries - mean[:, None] - rest[:, None]
        count += tl.sum(keep.to(tl.float32), 1)
        for k in range(K):
            delta, q = _gaussian(offset, width, row, k, K, inverse, exists, SQUARED)
            u = d - delta[:, None]
            z = u * q[:, None]
            bell = _bell(z)
            ours = (g * entries if MULTIPLY else g) * bell
            w = -ours * height[:, None] * z
            sums_w += tl.where((kk == k)[None, :], tl.sum(w, 1)[:, None], 0.0)
            sums_wu += tl.where((kk == k)[None, :], tl.sum(w * u, 1)[:, None], 0.0)
            bells += tl.sum(ours, 1)
            if HELD:
                s += w * q[:, None]
                gate += bell

    here_k = kk < K
    at = (row * K)[:, None] + kk[None, :]
    ws = tl.load(width + at, mask=exists[:, None] & here_k[None, :], other=1.0)
    qs = tl.div_rn(inverse[:, None] + tl.zeros(ws.shape, tl.float32), tl.sqrt_rn(ws) if SQUARED else ws)
    per_slice = slot[:, None] if PER_SLICE else wide(head) * (tl.num_programs(0) // heads) + tile
    at = partials + per_slice + (2 * wide(kk) * per_item)[None, :]
    _leave(at, -qs * sums_w, here_k, exists, PER_SLICE)
    _leave(at + per_item, -qs * sums_wu * (0.5 if SQUARED else 1.0) / ws, here_k, exists, PER_SLICE)
    if alpha is not None:
        last = partials + per_slice + 2 * wide(K) * per_item + (0 * kk)[None, :]
        _leave(last, (bells * SCALE)[:, None] + tl.zeros((SLICES, BLOCK_K), tl.float32), kk == 0, exists, PER_SLICE)
    push, pull = tl.sum(qs * sums_w, 1), tl.sum(qs * sums_wu, 1)
    unbiased = 0 if alpha is None else 1
    shift = push / tl.maximum(count, 1.0)
    slope = pull * inverse * inverse / tl.maximum(count - unbiased, 1.0)
    for first in range(0, LENGTH if HELD else length, LENGTH):
        n = wide(first) + e
        here = exists[:, None] & (n < length)[None, :]
        if not HELD:
            keep, entries, g = _tile_of_both(
                x, dout, mask, x_strides, dout_strides, mask_strides, o, i, begin + n, here
            )
            d = entries - mean[:, None] - rest[:, None]
            s, gate = tl.zeros((SLICES, LENGTH), tl.float32), tl.zeros((SLICES, LENGTH), tl.float32)
            for k in range(K):
                delta, q = _gaussian(offset, width, row, k, K, inverse, exists, SQUARED)
                z = (d - delta[:, None]) * q[:, None]
                bell = _bell(z)
                s -= (g * entries if MULTIPLY else g) * bell * height[:, None] * z * q[:, None]
                gate += bell
        grad = (s - shift[:, None]) - d * slope[:, None]
        if MULTIPLY:
            grad += g * (base + height[:, None] * gate)
        slices.store(dx, dx_strides, o, i, begin + n, here, tl.where(keep, grad, 0.0))


class _Cut:
    """How a call is cut into tiles, and the arguments that both kernels take."""

    def __init__(self, x, offset, alpha, mask, heads, share, outer, squared, multiply):
        self.outer, size, self.inner = x.shape
        self.rows, self.gaussians = offset.shape
        part = size // heads
        last_part = size - (heads - 1) * part
        columns = self.inner >= COLUMNS[0] and x.stride(2) == 1
        length = triton.next_power_of_2(last_part)
        held = length * (COLUMNS[0] if columns else 1) <= LONGEST
        if columns:
            most = max(COLUMNS[0], min(COLUMNS[1], TILE // length))
            taken = common.power_of_2(self.inner, COLUMNS[0], most if held else COLUMNS[1])
            self.tiles = self.outer * triton.cdiv(self.inner, taken)
        else:
            taken = common.power_of_2(self.outer * self.inner, 1, max(1, min(TILE // length, TILE // 16)))
            self.tiles = triton.cdiv(self.outer * self.inner, taken)
        length = length if held else TILE // taken
        self.heads = heads
        self.sizes = (heads, self.outer, self.inner, part, last_part, self.rows, self.gaussians, share)
        self.mask_strides = (0, 0, 0) if mask is None else mask.stride()
        self.meta = {
            "SCALE": 1 / (self.gaussians * ROOT_2PI), "SQUARED": squared, "MULTIPLY": multiply, "OUTER_ROWS": outer,
            "HELD": held, "COLUMNS": columns, "SLICES": taken, "LENGTH": length,
            "num_warps": min(max(4 * taken * length // TILE, 1), 16) if held else 8,
        }  # fmt: skip


def gaussian_gate_fwd(x, offset, width, alpha, mask, heads, share, outer, eps, squared, multiply):
    out = x.new_empty(x.shape)
    stats = offset.new_empty((3, heads, x.shape[0], x.shape[2]))
    if x.numel() == 0:
        return out, stats
    cut = _Cut(x, offset, alpha, mask, heads, share, outer, squared, multiply)
    common.launch(
        _forward, (heads * cut.tiles,), x, mask, offset, width, alpha, out, stats,
        x.stride(), cut.mask_strides, out.stride(), *cut.sizes, eps, **cut.meta,
    )  # fmt: skip
    return out, stats


def gaussian_gate_bwd(dout, x, offset, width, alpha, mask, stats, heads, share, outer, eps, squared, multiply):
    dx = x.new_empty(x.shape)
    if x.numel() == 0:
        dalpha = offset.new_zeros((0 if alpha is None else offset.shape[0],))
        return dx, torch.zeros_like(offset), torch.zeros_like(width), dalpha
    cut = _Cut(x, offset, alpha, mask, heads, share, outer, squared, multiply)
    per_slice = heads == 1 and cut.rows > 1
    items, per_item = (
        2 * cut.gaussians + (alpha is not None),
        (cut.outer * cut.inner if per_slice else cut.tiles) * heads,
    )
    partials = stats.new_empty((items, per_item))
    common.launch(
        _backward, (heads * cut.tiles,), dout, x, mask, offset, width, alpha, stats, dx, partials,
        dout.stride(), x.stride(), cut.mask_strides, dx.stride(), *cut.sizes, per_item,
        PER_SLICE=per_slice, BLOCK_K=triton.next_power_of_2(cut.gaussians), **cut.meta,
    )  # fmt: skip
    # (items, sharing slices before, rows, sharing slices after): one reduction, in an order of its own choice, not in
    # that of the programs' ends.
    if not per_slice:
        shape = (items, 1, cut.rows, cut.tiles)
    elif outer:
        shape = (items, cut.outer // (cut.rows * share), cut.rows, share * cut.inner)
    else:
        shape = (items, cut.outer * cut.inner // (cut.rows * share), cut.rows, share)
    sums = partials.view(shape).sum((1, 3), dtype=torch.float64).to(offset.dtype)
    gaussians = sums[: 2 * cut.gaussians].view(cut.gaussians, 2, cut.rows)
    doffset, dwidth = (torch.empty_like(width).copy_(gaussians[:, one].T) for one in (0, 1))
    return dx, doffset, dwidth, offset.new_empty((0,)) if alpha is None else sums[-1].clone()
