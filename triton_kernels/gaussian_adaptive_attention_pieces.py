"""Gaussian adaptive attention in Triton where a slice is too long for one program to hold.

Slices are cut into pieces, a program each, which walk them tile after tile; the cuts depend on the shape alone. Going
forward one launch finds the moments of every piece, one the nearest entry and the sum of the weights relative to
it, and one writes. Going backward one launch finds six sums of every piece and one writes. Every program joins the
pieces' results for itself, in a fixed order.
"""

import torch
import triton
import triton.language as tl

from trifuse.triton_kernels import common, slices
from trifuse.triton_kernels import gaussian_adaptive_attention_tile as tiles
from trifuse.triton_kernels.common import wide

PROGRAMS = 512  # what fills a large GPU; fewer slices than that are cut
CHUNK = 2048  # entries of a tile of four warps; half as many in float64
LEAST_CHUNKS = 8  # in a piece


@triton.jit
def _of_pieces(ptr, item, slot, ok, slots, pieces, PIECES: tl.constexpr):
    """What every piece of a tile's slices left as its `item`, (slices, pieces), and which exist."""
    p = tl.arange(0, PIECES)
    exists = ok[:, None] & (p < pieces)[None, :]
    at = ((wide(item) * pieces + p) * slots)[None, :] + slot[:, None]
    return tl.load(ptr + at, mask=exists, other=0.0), exists


@triton.jit
def _leave(ptr, item, slot, ok, slots, value):
    at = (wide(item) * tl.num_programs(1) + tl.program_id(1)) * slots + slot
    tl.store(ptr + at, value, mask=ok)


@triton.jit
def _join_moments(moments, slot, ok, slots, EPS: tl.constexpr, ACC: tl.constexpr, PIECES: tl.constexpr):
    """Of whole slices: the mean in two parts, and 1 / v."""
    n, _ = _of_pieces(moments, 0, slot, ok, slots, tl.num_programs(1), PIECES)
    means, _ = _of_pieces(moments, 1, slot, ok, slots, tl.num_programs(1), PIECES)
    squares, _ = _of_pieces(moments, 2, slot, ok, slots, tl.num_programs(1), PIECES)
    count = tl.sum(n, 1)
    mean = tl.sum(n * means, 1) / tl.maximum(count, 1.0)
    apart = means - mean[:, None]
    inverse = tiles.inverse_variance(count, tl.sum(squares + n * apart * apart, 1), EPS)
    high = mean.to(ACC)
    return high, (mean - high.to(tl.float64)).to(ACC), inverse.to(ACC)


@triton.jit
def _moments(
    x, mask, moments, x_strides, mask_strides, heads, outer, inner, part, last_part, piece_length,
    PADDING: tl.constexpr, ACC: tl.constexpr, COLUMNS: tl.constexpr, SLICES: tl.constexpr, LENGTH: tl.constexpr,
):  # fmt: skip
    head, tile = tl.program_id(0) % heads, tl.program_id(0) // heads
    o, i, slot, ok, begin, length = slices.place(tile, head, heads, outer, inner, part, last_part, SLICES, COLUMNS)
    first = wide(tl.program_id(1)) * piece_length
    end = tl.minimum(first + piece_length, length)
    count, mean = tl.zeros((SLICES,), tl.float64), tl.zeros((SLICES,), tl.float64)
    squares = tl.zeros((SLICES,), tl.float64)
    for k in range(tl.cdiv(end - first, LENGTH)):
        n = first + wide(k) * LENGTH + tl.arange(0, LENGTH)
        here = ok[:, None] & (n < end)[None, :]
        raw, counted, takes_part = tiles.entries(x, x_strides, mask, mask_strides, o, i, begin + n, here, PADDING, ACC)
        more, mean_of_more, rest, squares_of_more = tiles.moments(raw, counted, takes_part, ACC)
        count, mean, squares = slices.join(count, mean, squares, more, mean_of_more, rest, squares_of_more)
    slots = wide(heads) * outer * inner
    _leave(moments, 0, slot, ok, slots, count)
    _leave(moments, 1, slot, ok, slots, mean)
    _leave(moments, 2, slot, ok, slots, squares)


@triton.jit
def _measure(
    x, mask, mean_offset, width, moments, measures, x_strides, mask_strides,
    heads, outer, inner, part, last_part, K, piece_length,
    PADDING: tl.constexpr, EPS: tl.constexpr, COLUMNS: tl.constexpr, SLICES: tl.constexpr, LENGTH: tl.constexpr,
    BLOCK_K: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    """Each piece's nearest entry, and its sum of the weights relative to it: zero where nothing takes part."""
    ACC: tl.constexpr = measures.dtype.element_ty
    head, tile = tl.program_id(0) % heads, tl.program_id(0) // heads
    o, i, slot, ok, begin, length = slices.place(tile, head, heads, outer, inner, part, last_part, SLICES, COLUMNS)
    slots = wide(heads) * outer * inner
    a64, b64, _e, _logs = tiles.coefficients(mean_offset, width, head, K, BLOCK_K)
    a, b, centre = a64.to(ACC), b64.to(ACC), (b64 / a64).to(ACC)
    mean, rest, inverse = _join_moments(moments, slot, ok, slots, EPS, ACC, PIECES)
    first = wide(tl.program_id(1)) * piece_length
    end = tl.minimum(first + piece_length, length)
    best, total = tl.zeros((SLICES,), ACC), tl.zeros((SLICES,), ACC)
    least = tl.full((SLICES,), float("inf"), ACC)
    for k in range(tl.cdiv(end - first, LENGTH)):
        n = first + wide(k) * LENGTH + tl.arange(0, LENGTH)
        here = ok[:, None] & (n < end)[None, :]
        raw, _, takes_part = tiles.entries(x, x_strides, mask, mask_strides, o, i, begin + n, here, PADDING, ACC)
        found, deviation, distance = tiles.nearest(raw, takes_part, mean, rest, centre)
        nearer = distance < least
        # What was nearest so far is one entry more, of the weight of all it stands for.
        deviation = tl.where(nearer, deviation, best - mean - rest)
        found = tl.where(nearer, found, best)
        before, _, _ = tiles.exponentials(best[:, None], (total > 0)[:, None], found, deviation, inverse, a, b)
        ratio, _, _ = tiles.exponentials(raw, takes_part, found, deviation, inverse, a, b)
        total = total * tl.sum(before, 1) + tl.sum(ratio, 1)
        best, least = found, tl.minimum(least, distance)
    _leave(measures, 0, slot, ok, slots, best)
    _leave(measures, 1, slot, ok, slots, total)


@triton.jit
def _write(
    x, mask, mean_offset, width, moments, measures, out, weights, stats, x_strides, mask_strides, out_strides,
    heads, outer, inner, part, last_part, K, piece_length,
    PADDING: tl.constexpr, EPS: tl.constexpr, LOG_EPS: tl.constexpr, CLAMPED: tl.constexpr, COLUMNS: tl.constexpr,
    SLICES: tl.constexpr, LENGTH: tl.constexpr, BLOCK_K: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    ACC: tl.constexpr = measures.dtype.element_ty
    head, tile = tl.program_id(0) % heads, tl.program_id(0) // heads
    o, i, slot, ok, begin, length = slices.place(tile, head, heads, outer, inner, part, last_part, SLICES, COLUMNS)
    slots = wide(heads) * outer * inner
    a64, b64, e, logs = tiles.coefficients(mean_offset, width, head, K, BLOCK_K)
    a, b = a64.to(ACC), b64.to(ACC)
    mean, rest, inverse = _join_moments(moments, slot, ok, slots, EPS, ACC, PIECES)
    bests, _exists = _of_pieces(measures, 0, slot, ok, slots, tl.num_programs(1), PIECES)
    totals, exists = _of_pieces(measures, 1, slot, ok, slots, tl.num_programs(1), PIECES)
    exists = exists & (totals != 0)
    best, deviation, _least = tiles.nearest(bests, exists, mean, rest, (b64 / a64).to(ACC))
    shares, _u, _slope = tiles.exponentials(bests, exists, best, deviation, inverse, a, b)
    total = tl.sum(tl.where(exists, shares * totals, 0.0), 1)
    scale = 1.0 / tl.where(total == 0, 1.0, total)
    sign = tl.full((SLICES,), 1.0, ACC)
    if CLAMPED:
        clamped = tiles.clamped_scale(deviation, inverse, a64, b64, e, logs, LOG_EPS).to(ACC)
        acts = total * clamped < 1
        scale = tl.where(acts, clamped, scale)
        sign = tl.where(acts, -sign, sign)
    first = wide(tl.program_id(1)) * piece_length
    end = tl.minimum(first + piece_length, length)
    for k in range(tl.cdiv(end - first, LENGTH)):
        n = first + wide(k) * LENGTH + tl.arange(0, LENGTH)
        here = ok[:, None] & (n < end)[None, :]
        raw, counted, takes_part = tiles.entries(x, x_strides, mask, mask_strides, o, i, begin + n, here, PADDING, ACC)
        ratio, _, _ = tiles.exponentials(raw, takes_part, best, deviation, inverse, a, b)
        w = ratio * scale[:, None]
        y = tl.where(takes_part, raw * w, 0.0)
        if PADDING is not None:
            y = tl.where(counted, y, raw)
        slices.store(out, out_strides, o, i, begin + n, here, y)
        if weights is not None:
            slices.store(weights, out_strides, o, i, begin + n, here, w)
    if tl.program_id(1) == 0:
        tl.store(stats + slot, best, mask=ok)
        tl.store(stats + slots + slot, deviation, mask=ok)
        tl.store(stats + 2 * slots + slot, inverse * sign, mask=ok)


@triton.jit
def _sums(
    dout, dweights, x, mask, mean_offset, width, stats, sums,
    dout_strides, dweights_strides, x_strides, mask_strides, heads, outer, inner, part, last_part, K, piece_length,
    PADDING: tl.constexpr, COLUMNS: tl.constexpr, SLICES: tl.constexpr, LENGTH: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Each piece's sums over its entries, e their weights relative to the nearest entry's and G their weights'
    gradients: of 1, e, e G, e u, e u^2, e G u and e G u^2."""
    ACC: tl.constexpr = stats.dtype.element_ty
    head, tile = tl.program_id(0) % heads, tl.program_id(0) // heads
    o, i, slot, ok, begin, length = slices.place(tile, head, heads, outer, inner, part, last_part, SLICES, COLUMNS)
    slots = wide(heads) * outer * inner
    a64, b64, _e, _logs = tiles.coefficients(mean_offset, width, head, K, BLOCK_K)
    a, b = a64.to(ACC), b64.to(ACC)
    best = tl.load(stats + slot, mask=ok, other=0.0)
    deviation = tl.load(stats + slots + slot, mask=ok, other=0.0)
    inverse = tl.abs(tl.load(stats + 2 * slots + slot, mask=ok, other=1.0))
    first = wide(tl.program_id(1)) * piece_length
    end = tl.minimum(first + piece_length, length)
    zero = tl.zeros((SLICES,), tl.float64)
    count, e0, eg0, e1, e2, eg1, eg2 = zero, zero, zero, zero, zero, zero, zero
    for k in range(tl.cdiv(end - first, LENGTH)):
        n = first + wide(k) * LENGTH + tl.arange(0, LENGTH)
        here = ok[:, None] & (n < end)[None, :]
        raw, counted, takes_part = tiles.entries(x, x_strides, mask, mask_strides, o, i, begin + n, here, PADDING, ACC)
        _, dw = tiles.gradient_of_log(
            dout, dout_strides, dweights, dweights_strides, raw, counted, takes_part, o, i, begin + n, here, ACC
        )
        ratio, u, _ = tiles.exponentials(raw, takes_part, best, deviation, inverse, a, b)
        total = tl.sum(ratio, 1)
        with_gradient = tl.sum(ratio * dw, 1)
        # Of the gradients what they differ by from this tile's mean: the sums lose nothing where all are alike.
        middle = with_gradient / tl.where(total == 0, 1.0, total)
        u1 = ratio * u
        g1 = tl.sum(u1 * (dw - middle[:, None]), 1).to(tl.float64)
        g2 = tl.sum(u1 * u * (dw - middle[:, None]), 1).to(tl.float64)
        m1, m2 = tl.sum(u1, 1).to(tl.float64), tl.sum(u1 * u, 1).to(tl.float64)
        count += tl.sum(takes_part.to(ACC), 1)
        e0 += total
        eg0 += with_gradient
        e1 += m1
        e2 += m2
        eg1 += g1 + middle * m1
        eg2 += g2 + middle * m2
    _leave(sums, 0, slot, ok, slots, count)
    _leave(sums, 1, slot, ok, slots, e0)
    _leave(sums, 2, slot, ok, slots, eg0)
    _leave(sums, 3, slot, ok, slots, e1)
    _leave(sums, 4, slot, ok, slots, e2)
    _leave(sums, 5, slot, ok, slots, eg1)
    _leave(sums, 6, slot, ok, slots, eg2)


@triton.jit
def _sum_of_pieces(sums, item, slot, ok, slots, PIECES: tl.constexpr):
    values, _ = _of_pieces(sums, item, slot, ok, slots, tl.num_programs(1), PIECES)
    return tl.sum(values, 1)


@triton.jit
def _write_gradients(
    dout, dweights, x, mask, mean_offset, width, stats, sums, dx, partials,
    dout_strides, dweights_strides, x_strides, mask_strides, dx_strides,
    heads, outer, inner, part, last_part, K, piece_length, n_tiles,
    PADDING: tl.constexpr, LOG_EPS: tl.constexpr, CLAMPED: tl.constexpr, COLUMNS: tl.constexpr,
    SLICES: tl.constexpr, LENGTH: tl.constexpr, BLOCK_K: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    ACC: tl.constexpr = stats.dtype.element_ty
    head, tile = tl.program_id(0) % heads, tl.program_id(0) // heads
    o, i, slot, ok, begin, length = slices.place(tile, head, heads, outer, inner, part, last_part, SLICES, COLUMNS)
    slots = wide(heads) * outer * inner
    a64, b64, e64, logs = tiles.coefficients(mean_offset, width, head, K, BLOCK_K)
    a, b, e = a64.to(ACC), b64.to(ACC), e64.to(ACC)
    best = tl.load(stats + slot, mask=ok, other=0.0)
    deviation = tl.load(stats + slots + slot, mask=ok, other=0.0)
    signed = tl.load(stats + 2 * slots + slot, mask=ok, other=1.0)
    inverse = tl.abs(signed)

    count = _sum_of_pieces(sums, 0, slot, ok, slots, PIECES).to(ACC)
    total = _sum_of_pieces(sums, 1, slot, ok, slots, PIECES)
    scale = 1.0 / tl.where(total == 0, 1.0, total)
    gradient = _sum_of_pieces(sums, 2, slot, ok, slots, PIECES)
    subtracted = gradient * scale
    through_clamp = tl.zeros((SLICES,), ACC)
    if CLAMPED:
        acts = signed < 0
        clamped = tiles.clamped_scale(deviation, inverse, a64, b64, e64, logs, LOG_EPS)
        scale = tl.where(acts, clamped, scale)
        subtracted = tl.where(acts, 0.0, subtracted)
        through_clamp = tl.where(acts, gradient * clamped, 0.0).to(ACC)
    e1 = _sum_of_pieces(sums, 3, slot, ok, slots, PIECES)
    e2 = _sum_of_pieces(sums, 4, slot, ok, slots, PIECES)
    m1 = ((_sum_of_pieces(sums, 5, slot, ok, slots, PIECES) - subtracted * e1) * scale).to(ACC)
    m2 = ((_sum_of_pieces(sums, 6, slot, ok, slots, PIECES) - subtracted * e2) * scale).to(ACC)
    scale, subtracted = scale.to(ACC), subtracted.to(ACC)
    slope = b - a * deviation
    t_mean, pull = tiles.through_statistics(through_clamp, m1, m2, deviation, slope, inverse, count, a, b, e)

    first = wide(tl.program_id(1)) * piece_length
    end = tl.minimum(first + piece_length, length)
    for k in range(tl.cdiv(end - first, LENGTH)):
        n = first + wide(k) * LENGTH + tl.arange(0, LENGTH)
        here = ok[:, None] & (n < end)[None, :]
        raw, counted, takes_part = tiles.entries(x, x_strides, mask, mask_strides, o, i, begin + n, here, PADDING, ACC)
        g, dw = tiles.gradient_of_log(
            dout, dout_strides, dweights, dweights_strides, raw, counted, takes_part, o, i, begin + n, here, ACC
        )
        ratio, u, _ = tiles.exponentials(raw, takes_part, best, deviation, inverse, a, b)
        w = ratio * scale[:, None]
        s = tl.where(takes_part, w * (dw - subtracted[:, None]), 0.0)
        grad = tiles.gradient_of_entries(
            g, w, s, u, counted, takes_part, deviation, slope, inverse, a, count, t_mean, pull, PADDING
        )
        slices.store(dx, dx_strides, o, i, begin + n, here, grad)
    if tl.program_id(1) == 0:
        tiles.store_shares(partials, head, heads, tile, n_tiles, ok, through_clamp, m1, m2, deviation, inverse)


class _Pieces:
    """How the slices of a call are cut, and the meta arguments of the kernels that walk them."""

    def __init__(self, cut):
        self.slices = common.power_of_2(cut.inner, 8, 32) if cut.columns else 1
        self.length = max(min(CHUNK // cut.halves // self.slices, cut.length), 16)
        across = triton.cdiv(cut.inner, self.slices) if cut.columns else cut.inner
        self.tiles = cut.outer * across
        programs = cut.heads * self.tiles
        pieces = max(min(triton.cdiv(PROGRAMS, programs), cut.last_part // (LEAST_CHUNKS * self.length)), 1)
        self.piece_length = triton.cdiv(triton.cdiv(cut.last_part, pieces), self.length) * self.length
        self.count = triton.cdiv(cut.last_part, self.piece_length)
        self.slots = cut.heads * cut.outer * cut.inner
        self.grid = (programs, self.count)
        self.walk = {name: cut.meta[name] for name in ("PADDING", "COLUMNS")}
        self.walk |= {"SLICES": self.slices, "LENGTH": self.length, "num_warps": 4}
        self.joined = {"BLOCK_K": cut.meta["BLOCK_K"], "PIECES": triton.next_power_of_2(self.count)}


def forward(cut, x, mask, mean_offset, width, out, weights, stats):
    cuts = _Pieces(cut)
    moments = stats.new_empty((3, cuts.count, cuts.slots), dtype=torch.float64)
    measures = stats.new_empty((2, cuts.count, cuts.slots))
    views = (x.stride(), cut.mask_strides)
    eps = {name: cut.meta[name] for name in ("EPS",)}
    clamp = {name: cut.meta[name] for name in ("LOG_EPS", "CLAMPED")}
    acc = tl.float64 if stats.dtype == torch.float64 else tl.float32
    common.launch(
        _moments, cuts.grid, x, mask, moments, *views, *cut.sizes[:5], cuts.piece_length, ACC=acc, **cuts.walk
    )
    common.launch(
        _measure, cuts.grid, x, mask, mean_offset, width, moments, measures, *views, *cut.sizes, cuts.piece_length,
        **eps, **cuts.walk, **cuts.joined,
    )  # fmt: skip
    common.launch(
        _write, cuts.grid, x, mask, mean_offset, width, moments, measures, out, weights, stats, *views, out.stride(),
        *cut.sizes, cuts.piece_length, **eps, **clamp, **cuts.walk, **cuts.joined,
    )  # fmt: skip


def backward(cut, dout, dweights, x, mask, mean_offset, width, stats, dx, strides):
    cuts = _Pieces(cut)
    sums = stats.new_empty((7, cuts.count, cuts.slots), dtype=torch.float64)
    partials = stats.new_empty((4, cut.heads, cuts.tiles), dtype=torch.float64)
    views = (*strides, x.stride(), cut.mask_strides)
    clamp = {name: cut.meta[name] for name in ("LOG_EPS", "CLAMPED")}
    common.launch(
        _sums, cuts.grid, dout, dweights, x, mask, mean_offset, width, stats, sums, *views, *cut.sizes,
        cuts.piece_length, BLOCK_K=cut.meta["BLOCK_K"], **cuts.walk,
    )  # fmt: skip
    common.launch(
        _write_gradients, cuts.grid, dout, dweights, x, mask, mean_offset, width, stats, sums, dx, partials, *views,
        dx.stride(), *cut.sizes, cuts.piece_length, cuts.tiles, **clamp, **cuts.walk, **cuts.joined,
    )  # fmt: skip
    return partials
