"""Gaussian adaptive attention in Triton, forward and backward.

A program takes a tile of slices, as many as fill it, and holds it: everything is read and written once. The tiles'
shares of the gradients of the parameters are added by a last small kernel, in a fixed order. Slices too long for a
tile are cut in pieces (gaussian_adaptive_attention_pieces.py). What is done to a tile is the same in both
(gaussian_adaptive_attention_tile.py).
"""

import math

import torch
import triton
import triton.language as tl

from trifuse.triton_kernels import common, slices
from trifuse.triton_kernels import gaussian_adaptive_attention_tile as tiles
from trifuse.triton_kernels.common import wide

__all__ = ["gaussian_adaptive_attention_bwd", "gaussian_adaptive_attention_fwd"]

TILE = 2048  # entries of a program of four warps; half as many in float64
LONGEST = {"forward": 16384, "backward": 8192}  # what a program of sixteen warps holds
COLUMNS = (8, 32)  # neighbouring columns that a program takes at least and at most


@triton.jit
def _forward(
    x, mask, mean_offset, width, out, weights, stats, x_strides, mask_strides, out_strides,
    heads, outer, inner, part, last_part, K,
    PADDING: tl.constexpr, EPS: tl.constexpr, LOG_EPS: tl.constexpr, CLAMPED: tl.constexpr, WHOLE: tl.constexpr,
    COLUMNS: tl.constexpr, SLICES: tl.constexpr, LENGTH: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    ACC: tl.constexpr = stats.dtype.element_ty
    head, tile = tl.program_id(0) % heads, tl.program_id(0) // heads
    o, i, slot, ok, begin, length = slices.place(tile, head, heads, outer, inner, part, last_part, SLICES, COLUMNS)
    n = tl.arange(0, LENGTH)
    here = ok[:, None] & (n >= 0 if WHOLE else n < length)[None, :]
    n = n + begin
    raw, counted, takes_part = tiles.entries(x, x_strides, mask, mask_strides, o, i, n, here, PADDING, ACC)
    a64, b64, e, logs = tiles.coefficients(mean_offset, width, head, K, BLOCK_K)
    a, b = a64.to(ACC), b64.to(ACC)

    count, mean, rest, squares = tiles.moments(raw, counted, takes_part, ACC)
    inverse = tiles.inverse_variance(count, squares, EPS)
    best, deviation, _ = tiles.nearest(raw, takes_part, mean, rest, (b64 / a64).to(ACC))
    ratio, _, _ = tiles.exponentials(raw, takes_part, best, deviation, inverse, a, b)
    total = tl.sum(ratio, 1)
    scale = 1.0 / tl.where(total == 0, 1.0, total)
    sign = tl.full((SLICES,), 1.0, ACC)
    if CLAMPED:
        clamped = tiles.clamped_scale(deviation, inverse, a64, b64, e, logs, LOG_EPS).to(ACC)
        acts = total * clamped < 1
        scale = tl.where(acts, clamped, scale)
        sign = tl.where(acts, -sign, sign)
    w = ratio * scale[:, None]
    y = tl.where(takes_part, raw * w, 0.0)
    if PADDING is not None:
        y = tl.where(counted, y, raw)
    slices.store(out, out_strides, o, i, n, here, y)
    if weights is not None:
        slices.store(weights, out_strides, o, i, n, here, w)
    step = wide(heads) * outer * inner
    tl.store(stats + slot, best, mask=ok)
    tl.store(stats + step + slot, deviation, mask=ok)
    tl.store(stats + 2 * step + slot, inverse * sign, mask=ok)


@triton.jit
def _backward(
    dout, dweights, x, mask, mean_offset, width, stats, dx, partials,
    dout_strides, dweights_strides, x_strides, mask_strides, dx_strides,
    heads, outer, inner, part, last_part, K, n_tiles,
    PADDING: tl.constexpr, EPS: tl.constexpr, LOG_EPS: tl.constexpr, CLAMPED: tl.constexpr, WHOLE: tl.constexpr,
    COLUMNS: tl.constexpr, SLICES: tl.constexpr, LENGTH: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    ACC: tl.constexpr = stats.dtype.element_ty
    head, tile = tl.program_id(0) % heads, tl.program_id(0) // heads
    o, i, slot, ok, begin, length = slices.place(tile, head, heads, outer, inner, part, last_part, SLICES, COLUMNS)
    n = tl.arange(0, LENGTH)
    here = ok[:, None] & (n >= 0 if WHOLE else n < length)[None, :]
    n = n + begin
    raw, counted, takes_part = tiles.entries(x, x_strides, mask, mask_strides, o, i, n, here, PADDING, ACC)
    g, dw = tiles.gradient_of_log(
        dout, dout_strides, dweights, dweights_strides, raw, counted, takes_part, o, i, n, here, ACC
    )
    a64, b64, e64, logs = tiles.coefficients(mean_offset, width, head, K, BLOCK_K)
    a, b, e = a64.to(ACC), b64.to(ACC), e64.to(ACC)
    step = wide(heads) * outer * inner
    best = tl.load(stats + slot, mask=ok, other=0.0)
    deviation = tl.load(stats + step + slot, mask=ok, other=0.0)
    signed = tl.load(stats + 2 * step + slot, mask=ok, other=1.0)
    inverse = tl.abs(signed)

    ratio, u, slope = tiles.exponentials(raw, takes_part, best, deviation, inverse, a, b)
    total = tl.sum(ratio, 1)
    scale = 1.0 / tl.where(total == 0, 1.0, total)
    mean_gradient = tl.sum(ratio * dw, 1) * scale
    through_clamp = tl.zeros((SLICES,), ACC)
    if CLAMPED:
        acts = signed < 0
        clamped = tiles.clamped_scale(deviation, inverse, a64, b64, e64, logs, LOG_EPS).to(ACC)
        scale = tl.where(acts, clamped, scale)
        through_clamp = tl.where(acts, mean_gradient * total * clamped, 0.0)
        mean_gradient = tl.where(acts, 0.0, mean_gradient)
    w = ratio * scale[:, None]
    s = tl.where(takes_part, w * (dw - mean_gradient[:, None]), 0.0)
    first, second = tl.sum(s * u, 1), tl.sum(s * u * u, 1)
    count = tl.sum(takes_part.to(ACC), 1)
    t_mean, pull = tiles.through_statistics(through_clamp, first, second, deviation, slope, inverse, count, a, b, e)
    grad = tiles.gradient_of_entries(
        g, w, s, u, counted, takes_part, deviation, slope, inverse, a, count, t_mean, pull, PADDING
    )
    slices.store(dx, dx_strides, o, i, n, here, grad)
    tiles.store_shares(partials, head, heads, tile, n_tiles, ok, through_clamp, first, second, deviation, inverse)


@triton.jit
def _finish(partials, mean_offset, width, dmean_offset, dwidth, heads, n_tiles, K, BLOCK: tl.constexpr,
            BLOCK_K: tl.constexpr):  # fmt: skip
    """The gradients of one head's parameters from the shares of all tiles."""
    head = tl.program_id(0)
    step = wide(heads) * n_tiles
    i = tl.arange(0, BLOCK)
    da, db = tl.zeros((BLOCK,), tl.float64), tl.zeros((BLOCK,), tl.float64)
    de, dlogs = tl.zeros((BLOCK,), tl.float64), tl.zeros((BLOCK,), tl.float64)
    for block in range(tl.cdiv(n_tiles, BLOCK)):
        exists = wide(block) * BLOCK + i < n_tiles
        at = partials + wide(head) * n_tiles + wide(block) * BLOCK + i
        da += tl.load(at, mask=exists, other=0.0)
        db += tl.load(at + step, mask=exists, other=0.0)
        de += tl.load(at + 2 * step, mask=exists, other=0.0)
        dlogs += tl.load(at + 3 * step, mask=exists, other=0.0)
    sa, sb, se, sl = tl.sum(da, 0), tl.sum(db, 0), tl.sum(de, 0), tl.sum(dlogs, 0)
    k = tl.arange(0, BLOCK_K)
    exists = k < K
    c = tl.load(width + wide(head) * K + k, mask=exists, other=1.0).to(tl.float64)
    delta = tl.load(mean_offset + wide(head) * K + k, mask=exists, other=0.0).to(tl.float64)
    r = 1.0 / (c * c)
    d_offset = r * (sb + 2.0 * delta * se)
    d_width = -2.0 * r / c * (sa + delta * (sb + delta * se)) - sl / c
    tl.store(dmean_offset + wide(head) * K + k, d_offset.to(dmean_offset.dtype.element_ty), mask=exists)
    tl.store(dwidth + wide(head) * K + k, d_width.to(dwidth.dtype.element_ty), mask=exists)


class Cut:
    """How a call is cut into tiles, and the arguments that every kernel of it takes."""

    def __init__(self, way, x, mean_offset, mask, padding_value, eps, clamped):
        self.outer, size, self.inner = x.shape
        self.heads, self.gaussians = mean_offset.shape
        self.part = size // self.heads
        self.last_part = size - (self.heads - 1) * self.part
        self.columns = self.inner >= COLUMNS[0] and x.stride(2) == 1
        self.halves = 2 if x.dtype == torch.float64 else 1
        self.length = triton.next_power_of_2(self.last_part)
        self.held = self.length * (COLUMNS[0] if self.columns else 1) <= LONGEST[way] // self.halves
        fitting = TILE // self.halves // self.length
        if self.columns:
            least, most = COLUMNS
            self.slices = common.power_of_2(self.inner, least, max(least, min(most, fitting)))
            self.tiles = self.outer * triton.cdiv(self.inner, self.slices)
        else:
            self.slices = common.power_of_2(self.outer * self.inner, 1, max(1, min(fitting, TILE // 16)))
            self.tiles = triton.cdiv(self.outer * self.inner, self.slices)
        self.sizes = (self.heads, self.outer, self.inner, self.part, self.last_part, self.gaussians)
        if padding_value is not None:
            padding_value = torch.tensor(padding_value, dtype=x.dtype).item()
        self.meta = {
            "PADDING": padding_value, "EPS": eps, "LOG_EPS": math.log(eps) if eps > 0 else -math.inf,
            "CLAMPED": clamped, "COLUMNS": self.columns, "BLOCK_K": triton.next_power_of_2(self.gaussians),
        }  # fmt: skip
        # Columns with masks going backward are what registers are short for.
        self.more_threads = 2 if way == "backward" and self.columns and (mask is not None or clamped) else 1
        self.mask_strides = (0, 0, 0) if mask is None else mask.stride()

    def tile(self):
        """The meta arguments of a kernel that holds whole slices."""
        warps = max(self.slices * self.length * self.halves * 4 * self.more_threads // TILE, 1)
        whole = self.part == self.last_part == self.length
        return self.meta | {"SLICES": self.slices, "LENGTH": self.length, "WHOLE": whole, "num_warps": min(warps, 16)}


def gaussian_adaptive_attention_fwd(x, mean_offset, width, mask, padding_value, eps, clamped, return_weights):
    from trifuse.triton_kernels import gaussian_adaptive_attention_pieces as pieces

    acc = torch.promote_types(x.dtype, torch.float32)
    out = x.new_empty(x.shape)
    weights = x.new_empty(x.shape if return_weights else (0,))
    stats = x.new_empty((3, mean_offset.shape[0], x.shape[0], x.shape[2]), dtype=acc)
    asked = weights if return_weights else None
    if x.numel() == 0:
        return out, weights, stats
    cut = Cut("forward", x, mean_offset, mask, padding_value, eps, clamped)
    if cut.held:
        common.launch(
            _forward, (cut.heads * cut.tiles,), x, mask, mean_offset, width, out, asked, stats,
            x.stride(), cut.mask_strides, out.stride(), *cut.sizes, **cut.tile(),
        )  # fmt: skip
    else:
        pieces.forward(cut, x, mask, mean_offset, width, out, asked, stats)
    return out, weights, stats


def gaussian_adaptive_attention_bwd(dout, dweights, x, mean_offset, width, mask, stats, padding_value, eps, clamped):
    from trifuse.triton_kernels import gaussian_adaptive_attention_pieces as pieces

    dx = x.new_empty(x.shape)
    dmean_offset, dwidth = torch.empty_like(mean_offset), torch.empty_like(width)
    if x.numel() == 0:
        return dx, dmean_offset.zero_(), dwidth.zero_()
    cut = Cut("backward", x, mean_offset, mask, padding_value, eps, clamped)
    strides = [(0, 0, 0) if one is None else one.stride() for one in (dout, dweights)]
    if cut.held:
        partials = stats.new_empty((4, cut.heads, cut.tiles), dtype=torch.float64)
        common.launch(
            _backward, (cut.heads * cut.tiles,), dout, dweights, x, mask, mean_offset, width, stats, dx, partials,
            *strides, x.stride(), cut.mask_strides, dx.stride(), *cut.sizes, cut.tiles, **cut.tile(),
        )  # fmt: skip
    else:
        partials = pieces.backward(cut, dout, dweights, x, mask, mean_offset, width, stats, dx, strides)
    common.launch(
        _finish, (cut.heads,), partials, mean_offset, width, dmean_offset, dwidth, cut.heads, partials.shape[2],
        cut.gaussians, BLOCK=common.power_of_2(partials.shape[2], 16, 1024), BLOCK_K=cut.meta["BLOCK_K"],
    )  # fmt: skip
    return dx, dmean_offset, dwidth
