"""What the Triton kernels of gaussian_adaptive_attention do to a tile of slices x entries.

The product of the Gaussians is one Gaussian over the deviations d = x - mu, of precision a / v and of centre b / a,
with a = sum 1/c^2 and b = sum delta/c^2. Weights are taken relative to that of the entry nearest to the centre, which
is the largest: with u the difference of an entry from it and r its own deviation,
    log w - log w_nearest = u (-a u / 2 + b - a r) / v,
in which nothing large cancels, wherever the centre and the slice lie. So what a slice saves for the backward pass is
its nearest entry, that entry's deviation from the mean, and 1 / v: negative where the clamp acts.

An entry `takes part` if it has a weight; it is `counted` if the mean and the variance are made of it. The two differ
for entries equal to PADDING, which the variance takes for zeros.
"""

import triton
import triton.language as tl

from trifuse.triton_kernels import slices
from trifuse.triton_kernels.common import LOG2E, wide

LOG_ROOT_2PI = tl.constexpr(0.9189385332046727)


@triton.jit
def entries(x, x_strides, mask, mask_strides, o, i, n, here, PADDING: tl.constexpr, ACC: tl.constexpr):
    """The entries of a tile, which of them are counted, and which take part."""
    raw = slices.load(x, x_strides, o, i, n, here).to(ACC)
    takes_part = slices.taking_part(mask, mask_strides, o, i, n, here)
    counted = takes_part
    if PADDING is not None:
        counted = takes_part & (raw != PADDING)
    return raw, counted, takes_part


@triton.jit
def coefficients(mean_offset, width, head, K, BLOCK_K: tl.constexpr):
    """a, b, e = sum delta^2/c^2 and the logarithm of what the Gaussians are divided by but for v, in float64."""
    k = tl.arange(0, BLOCK_K)
    exists = k < K
    c = tl.load(width + wide(head) * K + k, mask=exists, other=1.0).to(tl.float64)
    delta = tl.load(mean_offset + wide(head) * K + k, mask=exists, other=0.0).to(tl.float64)
    r = tl.where(exists, 1.0 / (c * c), 0.0)
    logs = tl.sum(tl.where(exists, tl.log(tl.abs(c)) + LOG_ROOT_2PI, 0.0), 0)
    return tl.sum(r, 0), tl.sum(r * delta, 0), tl.sum(r * delta * delta, 0), logs


@triton.jit
def moments(raw, counted, takes_part, ACC: tl.constexpr):
    """How many entries of each slice of a tile the variance is made of, their mean in two parts, and the sum of the
    squares of their deviations."""
    values = tl.where(counted, raw, 0.0)
    n = tl.sum(takes_part.to(ACC), 1)
    some = tl.maximum(n, 1.0)
    mean = tl.sum(values, 1) / some
    d = tl.where(takes_part, values - mean[:, None], 0.0)
    rest = tl.sum(d, 1) / some
    return n, mean, rest, tl.maximum(tl.sum(d * d, 1) - n * rest * rest, 0.0)


@triton.jit
def inverse_variance(n, squares, EPS: tl.constexpr):
    return 1.0 / (tl.where(n >= 2, squares / tl.maximum(n - 1.0, 1.0), 0.0) + EPS)


@triton.jit
def nearest(raw, takes_part, mean, rest, centre):
    """Of each slice: the entry nearest to the centre, its deviation from the mean, and its distance; infinity, and
    zeros, where nothing takes part."""
    distance = tl.where(takes_part, tl.abs(raw - mean[:, None] - rest[:, None] - centre), float("inf"))
    least = tl.min(distance, 1)
    best = tl.max(tl.where(takes_part & (distance == least[:, None]), raw, float("-inf")), 1)
    any_one = least < float("inf")
    best = tl.where(any_one, best, 0.0)
    return best, tl.where(least == float("inf"), 0.0, best - mean - rest), least


@triton.jit
def exponentials(raw, takes_part, best, deviation, inverse, a, b):
    """Weights relative to the nearest entry's, differences from it, and b - a r."""
    u = tl.where(takes_part, raw - best[:, None], 0.0)
    slope = b - a * deviation
    log2 = u * (u * (a * inverse * (-0.5 * LOG2E))[:, None] + (slope * inverse * LOG2E)[:, None])
    return tl.where(takes_part, tl.exp2(log2), 0.0), u, slope


@triton.jit
def clamped_scale(deviation, inverse, a, b, e, logs, LOG_EPS: tl.constexpr):
    """exp(l + c0) / eps of the nearest entry."""
    r = deviation.to(tl.float64)
    return tl.exp(-0.5 * ((a * r - 2.0 * b) * r + e) * inverse.to(tl.float64) - logs - LOG_EPS)


@triton.jit
def store_shares(partials, head, heads, tile, tiles, ok, total, first, second, deviation, inverse):
    """A tile's share of the gradients of a, b, e and of the logarithms: partials is (4, heads, tiles) in float64.

    `total`, `first` and `second` are the sums of ds, ds u and ds u^2, ds being the gradient of log w; in float64, for
    where the centre is far from the mean, da and delta db cancel."""
    r, v = deviation.to(tl.float64), inverse.to(tl.float64)
    t, p, q = total.to(tl.float64), first.to(tl.float64), second.to(tl.float64)
    at = partials + wide(head) * tiles + tile
    step = wide(heads) * tiles
    tl.store(at, tl.sum(tl.where(ok, -0.5 * v * (q + 2.0 * r * p + r * r * t), 0.0), 0))
    tl.store(at + step, tl.sum(tl.where(ok, v * (p + r * t), 0.0), 0))
    tl.store(at + 2 * step, tl.sum(tl.where(ok, -0.5 * v * t, 0.0), 0))
    tl.store(at + 3 * step, tl.sum(tl.where(ok, t, 0.0), 0))


@triton.jit
def gradient_of_log(dout, dout_strides, dweights, dweights_strides, raw, counted, takes_part, o, i, n, here,
                    ACC: tl.constexpr):  # fmt: skip
    """The gradients of the outputs' entries that are multiplied, as they came, and those of the weights."""
    g = tl.zeros(raw.shape, ACC)
    weight_gradient = g
    if dout is not None:
        g = slices.load(dout, dout_strides, o, i, n, here).to(ACC)
        weight_gradient = tl.where(counted, g * raw, 0.0)
    if dweights is not None:
        more = slices.load(dweights, dweights_strides, o, i, n, here).to(ACC)
        weight_gradient = tl.where(takes_part, weight_gradient + more, 0.0)
    return g, weight_gradient


@triton.jit
def through_statistics(total, first, second, deviation, slope, inverse, n, a, b, e):
    """What the mean takes from every entry's gradient, and what the variance adds per unit of its deviation."""
    t_mean = (slope * total - a * first) * inverse / tl.maximum(n, 1.0)
    square = (a * deviation - 2.0 * b) * deviation + e
    dv = 0.5 * inverse * inverse * (a * second - 2.0 * slope * first + total * square)
    return t_mean, 2.0 * dv / tl.maximum(n - 1.0, 1.0)


@triton.jit
def gradient_of_entries(g, w, s, u, counted, takes_part, deviation, slope, inverse, a, n, t_mean, pull,
                        PADDING: tl.constexpr):  # fmt: skip
    """dx of a tile: through x w, through each entry's own deviation, through the mean and through the variance. A
    single entry is its own mean, whatever it is."""
    own = s * (slope[:, None] - a * u) * inverse[:, None]
    common = own - t_mean[:, None] + (u + deviation[:, None]) * pull[:, None]
    dx = g * w + tl.where((n >= 2)[:, None], common, 0.0)
    if PADDING is not None:
        dx = tl.where(counted, dx, g + own)
    return tl.where(takes_part, dx, 0.0)
