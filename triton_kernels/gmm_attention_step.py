"""gmm_attention_step in Triton: values summed with the density of a mixture of Gaussians at their positions.

Forward, a program sums one piece of a sequence for a block of columns: tile after tile of positions it adds up the
densities of all components in registers, and loads the values of the positions that one of them reaches. Where pieces
are several, a second kernel adds them. Backward, a program takes one tile of positions through all columns, which
gives the alignment's gradient and that of the values, and sums what each component gets of it; a second kernel adds
the tiles. The cuts depend on the shape alone, and nothing is added atomically.
"""

import torch
import triton
import triton.language as tl

from trifuse.triton_kernels import common
from trifuse.triton_kernels.common import power_of_2, wide

__all__ = ["gmm_attention_step_bwd", "gmm_attention_step_fwd"]

TILE = 4096  # values in a tile
PROGRAMS = 512  # what fills a large GPU; fewer sequences than that are cut into pieces
LEAST_TILES = 2  # in a piece

HALF_LOG2E = tl.constexpr(0.7213475204444817)  # exp(-z^2 / 2) = 2^(-HALF_LOG2E z^2)
BELL_HEIGHT = tl.constexpr(0.3989422804014327)  # 1 / sqrt(2 pi)
REACH = tl.constexpr(151.0)  # an exponent of two beyond it gives 0 in float32


@triton.jit
def _mixture(ptr, strides, b, k, mask, other):
    return tl.load(ptr + b * strides[0] + k * strides[1], mask=mask, other=other)


@triton.jit
def _bells(t, mean, sigma):
    """z and exp(-z^2 / 2) of positions x components, and where that is not 0. Far out the exponent is lifted, and the
    result lowered by a multiplication, which rounds subnormal numbers as it should."""
    z = tl.math.div_rn(t.to(tl.float32)[:, None] - mean[None, :], tl.broadcast_to(sigma[None, :], t.shape + mean.shape))
    x = HALF_LOG2E * (z * z)
    far = x > 64.0
    e = tl.exp2(tl.where(far, 64.0 - x, -x)) * tl.where(far, 5.421010862427522e-20, 1.0)
    within = ~(x > REACH)  # a NaN is
    return z, tl.where(within, e, 0.0), within


@triton.jit
def _taken(within, k_mask):
    """Whether a component reaches a position, as 0 or 1."""
    return tl.max((within & k_mask[None, :]).to(tl.int32), 1)


@triton.jit
def _padding(padding, strides, b, t, t_mask):
    return tl.load(padding + b * strides[0] + t * strides[1], mask=t_mask, other=1) != 0


@triton.jit
def _forward(
    values, weight, delta, sigma, mean, padding, partial, mean_new, alignment,
    values_strides, weight_strides, delta_strides, sigma_strides, mean_strides, padding_strides,
    length, width, components, pieces, piece_length,
    BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    b = wide(tl.program_id(0) // pieces)
    piece = tl.program_id(0) % pieces
    e = wide(tl.program_id(1)) * BLOCK_E + tl.arange(0, BLOCK_E)
    e_mask = e < width
    total = tl.zeros((BLOCK_T, BLOCK_E), tl.float32)
    end = tl.minimum((piece + 1) * piece_length, length)
    for start in range(piece * piece_length, end, BLOCK_T):
        t = wide(start) + tl.arange(0, BLOCK_T)
        t_mask = t < length
        aligned = tl.zeros((BLOCK_T,), tl.float32)
        taken = tl.zeros((BLOCK_T,), tl.int32)
        for first in range(0, components, BLOCK_K):
            k = first + tl.arange(0, BLOCK_K)
            k_mask = k < components
            s = _mixture(sigma, sigma_strides, b, k, k_mask, 1.0)
            w = _mixture(weight, weight_strides, b, k, k_mask, 0.0)
            step = common.softplus(_mixture(delta, delta_strides, b, k, k_mask, 0.0))
            m = _mixture(mean, mean_strides, b, k, k_mask, 0.0) + step
            _, bell, within = _bells(t, m, s)
            height = tl.where(k_mask, w * (BELL_HEIGHT / s), 0.0)
            aligned += tl.sum(tl.where(k_mask[None, :], bell * height[None, :], 0.0), 1)
            taken = tl.maximum(taken, _taken(within, k_mask))
        part = (taken != 0) & t_mask
        if padding is not None:
            part = part & ~_padding(padding, padding_strides, b, t, t_mask)
        aligned = tl.where(part, aligned, 0.0)
        if tl.program_id(1) == 0:
            tl.store(alignment + b * length + t, aligned, mask=t_mask)
        at = b * values_strides[0] + (t * values_strides[1])[:, None] + (e * values_strides[2])[None, :]
        v = tl.load(values + at, mask=part[:, None] & e_mask[None, :], other=0.0).to(tl.float32)
        total += aligned[:, None] * v
    row = wide(tl.program_id(0)) * width
    tl.store(partial + row + e, tl.sum(total, 0).to(partial.dtype.element_ty), mask=e_mask)
    if (piece == 0) & (tl.program_id(1) == 0):
        for first in range(0, components, BLOCK_K):
            k = first + tl.arange(0, BLOCK_K)
            k_mask = k < components
            step = common.softplus(_mixture(delta, delta_strides, b, k, k_mask, 0.0))
            m = _mixture(mean, mean_strides, b, k, k_mask, 0.0) + step
            tl.store(mean_new + b * components + k, m, mask=k_mask)


@triton.jit
def _join(partial, context, width, pieces, BLOCK_E: tl.constexpr):
    b = wide(tl.program_id(0))
    e = wide(tl.program_id(1)) * BLOCK_E + tl.arange(0, BLOCK_E)
    total = tl.zeros((BLOCK_E,), tl.float32)
    for piece in range(pieces):
        total += tl.load(partial + (b * pieces + piece) * width + e, mask=e < width, other=0.0)
    tl.store(context + b * width + e, total.to(context.dtype.element_ty), mask=e < width)


@triton.jit
def _backward_tile(
    dcontext, dalignment, values, sigma, mean_new, alignment, padding, dvalues, sums,
    dcontext_strides, dalignment_strides, values_strides, sigma_strides, padding_strides,
    length, width, components, tiles,
    BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    b = wide(tl.program_id(0) // tiles)
    tile = tl.program_id(0) % tiles
    t = wide(tile) * BLOCK_T + tl.arange(0, BLOCK_T)
    t_mask = t < length
    taken = tl.zeros((BLOCK_T,), tl.int32)
    for first in range(0, components, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        k_mask = k < components
        m = tl.load(mean_new + b * components + k, mask=k_mask, other=0.0)
        _, _, within = _bells(t, m, _mixture(sigma, sigma_strides, b, k, k_mask, 1.0))
        taken = tl.maximum(taken, _taken(within, k_mask))
    part = (taken != 0) & t_mask
    if padding is not None:
        part = part & ~_padding(padding, padding_strides, b, t, t_mask)

    g = tl.zeros((BLOCK_T,), tl.float32)
    if dcontext is not None:
        aligned = tl.load(alignment + b * length + t, mask=t_mask, other=0.0)
        products = tl.zeros((BLOCK_T, BLOCK_E), tl.float32)
        for start in range(0, width, BLOCK_E):
            e = wide(start) + tl.arange(0, BLOCK_E)
            e_mask = e < width
            dc = tl.load(dcontext + b * dcontext_strides[0] + e * dcontext_strides[1], mask=e_mask, other=0.0)
            dc = dc.to(tl.float32)[None, :]
            at = b * values_strides[0] + (t * values_strides[1])[:, None] + (e * values_strides[2])[None, :]
            v = tl.load(values + at, mask=part[:, None] & e_mask[None, :], other=0.0).to(tl.float32)
            products += tl.where(part[:, None], v * dc, 0.0)
            if dvalues is not None:
                dv = tl.where(part[:, None], aligned[:, None] * dc, 0.0).to(dvalues.dtype.element_ty)
                place = ((b * length + t) * width)[:, None] + e[None, :]
                tl.store(dvalues + place, dv, mask=t_mask[:, None] & e_mask[None, :])
        g = tl.sum(products, 1)
    if dalignment is not None:
        g += tl.load(dalignment + b * dalignment_strides[0] + t * dalignment_strides[1], mask=part, other=0.0)
    g = tl.where(part, g, 0.0)

    for first in range(0, components, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        k_mask = k < components
        m = tl.load(mean_new + b * components + k, mask=k_mask, other=0.0)
        z, bell, within = _bells(t, m, _mixture(sigma, sigma_strides, b, k, k_mask, 1.0))
        z = tl.where(within, z, 0.0)  # where it overflows its square would be infinite
        weighted = tl.where(part[:, None], g[:, None] * bell, 0.0)
        to = sums + (wide(tl.program_id(0)) * 3) * components + k
        tl.store(to, tl.sum(weighted, 0), mask=k_mask)
        tl.store(to + components, tl.sum(weighted * z, 0), mask=k_mask)
        tl.store(to + 2 * components, tl.sum(weighted * (z * z - 1.0), 0), mask=k_mask)


@triton.jit
def _backward_mixture(
    dmean_new, weight, delta, sigma, sums, dweight, ddelta, dsigma, dmean,
    dmean_new_strides, weight_strides, delta_strides, sigma_strides, components, tiles,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    b = wide(tl.program_id(0))
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    mask = k < components
    plain = tl.zeros((BLOCK_K,), tl.float32)
    slope = tl.zeros((BLOCK_K,), tl.float32)
    spread = tl.zeros((BLOCK_K,), tl.float32)
    for tile in range(tiles):
        at = sums + ((b * tiles + tile) * 3) * components + k
        plain += tl.load(at, mask=mask, other=0.0)
        slope += tl.load(at + components, mask=mask, other=0.0)
        spread += tl.load(at + 2 * components, mask=mask, other=0.0)
    w = _mixture(weight, weight_strides, b, k, mask, 0.0)
    s = _mixture(sigma, sigma_strides, b, k, mask, 1.0)
    height = BELL_HEIGHT / s
    moved = w * (height / s) * slope
    if dmean_new is not None:
        moved += _mixture(dmean_new, dmean_new_strides, b, k, mask, 0.0)
    at = b * components + k
    tl.store(dweight + at, height * plain, mask=mask)
    tl.store(dsigma + at, w * (height / s) * spread, mask=mask)
    tl.store(dmean + at, moved, mask=mask)
    d = _mixture(delta, delta_strides, b, k, mask, 0.0)
    f = tl.exp(-tl.abs(d))  # sigmoid by exp(-d) would be 0 while exp(d) is a number
    tl.store(ddelta + at, moved * (tl.where(d > 0, 1.0, f) / (1.0 + f)), mask=mask)


def _bytes(key_padding_mask):
    """The mask as the kernels take it, and its strides."""
    if key_padding_mask is None:
        return None, (0, 0)
    return key_padding_mask.view(torch.uint8), key_padding_mask.stride()


def _strides(x):
    return (0, 0) if x is None else x.stride()


def gmm_attention_step_fwd(values, weight, delta, sigma, mean, key_padding_mask):
    batch, length, width = values.shape
    components = weight.shape[1]
    context = values.new_empty((batch, width))
    mean_new, alignment = weight.new_empty((batch, components)), weight.new_empty((batch, length))
    if batch == 0:
        return context, mean_new, alignment
    block_e = power_of_2(max(width, 1), 16, 128)
    block_t = power_of_2(max(length, 1), 16, max(TILE // block_e, 16))
    n_blocks = max(triton.cdiv(width, block_e), 1)
    pieces = max(min(triton.cdiv(PROGRAMS, batch * n_blocks), length // (LEAST_TILES * block_t)), 1)
    piece_length = triton.cdiv(triton.cdiv(max(length, 1), pieces), block_t) * block_t
    pieces = triton.cdiv(max(length, 1), piece_length)
    partial = context if pieces == 1 else weight.new_empty((batch * pieces, width))
    padding, padding_strides = _bytes(key_padding_mask)
    common.launch(
        _forward, (batch * pieces, n_blocks),
        values, weight, delta, sigma, mean, padding, partial, mean_new, alignment,
        values.stride(), weight.stride(), delta.stride(), sigma.stride(), mean.stride(), padding_strides,
        length, width, components, pieces, piece_length,
        BLOCK_T=block_t, BLOCK_E=block_e, BLOCK_K=power_of_2(max(components, 1), 2, 16), num_warps=4,
    )  # fmt: skip
    if pieces > 1:
        common.launch(_join, (batch, n_blocks), partial, context, width, pieces, BLOCK_E=block_e, num_warps=4)
    return context, mean_new, alignment


def gmm_attention_step_bwd(
    dcontext, dmean_new, dalignment, values, weight, delta, sigma, mean_new, alignment, key_padding_mask, values_grad
):
    batch, length, width = values.shape
    components = weight.shape[1]
    dvalues = values.new_empty(values.shape if values_grad else (0,))
    grads = [weight.new_empty((batch, components)) for _ in range(4)]
    if batch == 0:
        return dvalues, *grads
    block_e = power_of_2(max(width, 1), 16, 128)
    block_t = 16 if batch * length < 16 * PROGRAMS else 32
    tiles = triton.cdiv(length, block_t)
    block_k = power_of_2(max(components, 1), 2, 16)
    sums = weight.new_empty((batch * tiles, 3, components))
    padding, padding_strides = _bytes(key_padding_mask)
    if tiles:
        common.launch(
            _backward_tile, (batch * tiles,),
            dcontext, dalignment, values, sigma, mean_new, alignment, padding, dvalues if values_grad else None, sums,
            _strides(dcontext), _strides(dalignment), values.stride(), sigma.stride(), padding_strides,
            length, width, components, tiles,
            BLOCK_T=block_t, BLOCK_E=block_e, BLOCK_K=block_k, num_warps=4,
        )  # fmt: skip
    if components:
        common.launch(
            _backward_mixture, (batch, triton.cdiv(components, block_k)),
            dmean_new, weight, delta, sigma, sums, *grads,
            _strides(dmean_new), weight.stride(), delta.stride(), sigma.stride(), components, tiles,
            BLOCK_K=block_k, num_warps=1,
        )  # fmt: skip
    return dvalues, *grads
