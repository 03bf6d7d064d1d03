"""What Triton kernels of several ops share: elementwise math, addressing, and the launch itself."""

import triton
import triton.language as tl

__all__ = [
    "LN2", "LOG2E", "OPTIONS", "add", "channels", "compose", "compose_restarting", "launch", "load_tile", "power_of_2",
    "reverse_rows", "sigmoid", "softplus", "store_tile", "wide",
]  # fmt: skip

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def softplus(x):
    """log(1 + exp x), to a few ulp also where it is tiny (the hardware's log2 is not, near 1)."""
    f = tl.exp(-tl.abs(x))
    s = f / (2.0 + f)
    q = s * s
    # log(1 + f) = 2 atanh s = 2 s + s q p(q) = f - s (f - q p(q)), with f exact; p to 4e-9 of the whole on
    # s <= 1/3, by interpolation at Chebyshev nodes.
    p = 0.27965158 + q * 0.28157780
    p = 0.66666323 + q * (0.40024596 + q * p)
    return tl.maximum(x, 0.0) + (f - s * (f - q * p))


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def compose(a1, b1, a2, b2):
    """h -> a1 h + b1, then h -> a2 h + b2."""
    return a1 * a2, a2 * b1 + b2


@triton.jit
def compose_restarting(a1, b1, a2, b2):
    """Like `compose`, where a negative a marks a step that forgets the state before it.

    Selected, not multiplied by zero: NaN or Inf in one sequence must not reach the next."""
    a = tl.where(a2 < 0, a2, tl.where(a1 < 0, a1, a1 * a2))
    return a, tl.where(a2 < 0, b2, a2 * b1 + b2)


@triton.jit
def reverse_rows(x, STEPS: tl.constexpr):
    """The rows of a float32 tile of 2 ** STEPS columns, backwards: one shuffle per bit of the lane and
    nothing else. (A scan with reverse=True turns four tensors, in Triton 3.6 with a shuffle per bit each.)"""
    y = tl.reshape(x.to(tl.int32, bitcast=True), x.shape[:1] + [2] * STEPS)
    for k in tl.static_range(STEPS):
        # (a + b) - a, exact in integers. To 64 bits and back: the interpreter's sums widen.
        y = (tl.sum(y, 1 + k, keep_dims=True) - y).to(tl.int64).to(tl.int32)
    return tl.reshape(y, x.shape).to(tl.float32, bitcast=True)


@triton.jit
def channels(block, span, BLOCK_D: tl.constexpr, EVEN_D: tl.constexpr):
    """The channels of a block, int64, and which of them exist. No block leaves its span of channels
    (all channels of a span read the same groups of B and C); EVEN_D: blocks fill their span."""
    i = tl.arange(0, BLOCK_D)
    per_span = tl.cdiv(span, BLOCK_D)
    local = (block % per_span) * BLOCK_D + i
    return wide(block // per_span) * span + local, i >= 0 if EVEN_D else local < span


@triton.jit
def wide(n):
    """n in 64 bits: sizes and strides arrive as 32-bit integers when they fit."""
    return tl.full((), 1, tl.int64) * n


@triton.jit
def tile_offsets(strides, batch, d, t):
    return (batch * strides[0] + d * strides[1])[:, None] + (t * strides[2])[None, :]


@triton.jit
def load_tile(ptr, strides, batch, d, t, mask):
    return tl.load(ptr + tile_offsets(strides, batch, d, t), mask=mask, other=0.0).to(tl.float32)


@triton.jit
def store_tile(ptr, strides, batch, d, t, mask, value):
    tl.store(ptr + tile_offsets(strides, batch, d, t), value.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def add(ptr, value, mask):
    """Read, add, write: only for memory that this program alone touches."""
    tl.store(ptr, tl.load(ptr, mask=mask, other=0.0) + value, mask=mask)


# Whether multiply and add are fused by default depends on Triton's version. One stage: a loop that reads
# what its last round wrote must not have its loads moved up.
OPTIONS = {"enable_fp_fusion": True, "num_stages": 1}


def launch(kernel, grid, *args, **meta):
    """Every launch goes through here."""
    kernel[grid](*args, **OPTIONS, **meta)


def power_of_2(n, low, high):
    """The power of two at or above n, between two others."""
    return min(max(triton.next_power_of_2(n), low), high)
