"""The pieces of a tile that the forward and the backward selective scan share, in Triton.

A tile is (channels, steps), its steps in processing order; place t of the sequence is where step s reads.
"""

import triton
import triton.language as tl

from trifuse.triton_kernels.common import add, compose, compose_restarting, load_tile, softplus, wide

__all__ = [
    "accumulate",
    "boundaries",
    "column",
    "group",
    "load_channel",
    "load_coefficient",
    "load_step",
    "place",
    "scan_rows",
]


@triton.jit
def scan_rows(a, b, RESTARTS: tl.constexpr):
    """h = a * (h before) + b along each row, from zero."""
    if RESTARTS:
        _, h = tl.associative_scan((a, b), 1, compose_restarting)
    else:
        _, h = tl.associative_scan((a, b), 1, compose)
    return h


@triton.jit
def place(s, seqlen, REVERSE: tl.constexpr):
    if REVERSE:
        return seqlen - 1 - s
    else:
        return s


@triton.jit
def boundaries(sequence, cu_seqlens, t, t_mask, REVERSE: tl.constexpr):
    """The packed sequence of each place, and where one starts and ends (in processing order)."""
    seq = tl.load(sequence + t, mask=t_mask, other=0).to(tl.int64)
    low = tl.load(cu_seqlens + seq, mask=t_mask, other=-1)
    high = tl.load(cu_seqlens + seq + 1, mask=t_mask, other=0) - 1
    if REVERSE:
        return seq, (t == high) & t_mask, (t == low) & t_mask
    else:
        return seq, (t == low) & t_mask, (t == high) & t_mask


@triton.jit
def load_step(delta, strides, bias, batch, d, t, mask, SOFTPLUS: tl.constexpr):
    """delta as the recurrence reads it (zero outside the mask), and as it was before the softplus."""
    raw = load_tile(delta, strides, batch, d, t, mask) + bias[:, None]
    dt = raw
    if SOFTPLUS:
        dt = softplus(raw)
    return tl.where(mask, dt, 0.0), raw


@triton.jit
def load_channel(ptr, d, d_mask):
    if ptr is not None:
        return tl.load(ptr + d, mask=d_mask, other=0.0)
    else:
        return tl.zeros(d.shape, tl.float32)


@triton.jit
def group(coef, strides, batch, d, span, VARIES: tl.constexpr):
    """Where the B or C of these channels (all of one span) begins."""
    if VARIES:
        return coef + batch * strides[0] + (tl.min(d, 0) // span) * strides[1] + strides[4]
    else:
        return coef


@triton.jit
def load_coefficient(base, strides, n, d, dstate, s, d_mask, s_mask, VARIES: tl.constexpr):
    """State n of B or C at steps s, as something that broadcasts over the tile.

    A variable one is loaded once per channel row on purpose: an aligned load of the tile's shape is
    what makes the compiler give each lane consecutive steps, on which the cost of the scan hangs."""
    if VARIES:
        offsets = wide(n) * strides[2] + (s * strides[3])[None, :] + (d * 0)[:, None]
        return tl.load(base + offsets, mask=s_mask[None, :] & d_mask[:, None], other=0.0).to(tl.float32)
    else:
        return tl.load(base + d * dstate + n, mask=d_mask, other=0.0)[:, None]


@triton.jit
def column(tile, at):
    """The one column of a tile that `at` marks."""
    return tl.sum(tl.where(at[None, :], tile, 0.0), 1)


@triton.jit
def accumulate(base, strides, n, value, s, s_mask, ATOMIC: tl.constexpr):
    """Add what a block of channels gives to the gradient of state n of B or C, per step."""
    at = base + wide(n) * strides[2] + s * strides[3]
    if ATOMIC:
        tl.atomic_add(at, value, mask=s_mask, sem="relaxed")
    else:
        add(at, value, s_mask)
