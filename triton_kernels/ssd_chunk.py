"""Inside a chunk of the SSD, in Triton: step sizes and their sums, C B^T, and the output."""

import triton
import triton.language as tl

from trifuse.triton_kernels.common import LOG2E, sigmoid, softplus, wide
from trifuse.triton_kernels.ssd_tile import (
    add_restarting,
    decays,
    dot,
    ends_at,
    load_rows,
    load_square,
    load_states,
    pair_decays,
    rough_dot,
    square_offset,
    step_sizes,
    store_rows,
)

__all__ = ["out_kernel", "products_kernel", "step_tile", "steps_kernel"]


@triton.jit
def step_tile(dt, strides, bias, batch, t, head, t_mask, head_mask, dt_min, dt_max, SOFTPLUS: tl.constexpr):
    """Of a (heads, positions) tile: the step sizes, what they were before the softplus, and which of them the
    limits hold. Comparisons, not minima, which lose NaN."""
    at = batch * strides[0] + (t * strides[1])[None, :] + (head * strides[2])[:, None]
    raw = tl.load(dt + at, mask=head_mask[:, None] & t_mask[None, :], other=0.0).to(tl.float32)
    if bias is not None:
        raw += tl.load(bias + head, mask=head_mask, other=0.0)[:, None]
    step = raw
    if SOFTPLUS:
        step = softplus(raw)
    below, above = step < dt_min, step > dt_max
    return tl.where(above, dt_max, tl.where(below, dt_min, step)), raw, below | above


@triton.jit
def steps_kernel(
    dt, A, bias, starts, steps, dt_strides, heads, seqlen, n_windows, n_blocks, plane, dt_min, dt_max,
    SOFTPLUS: tl.constexpr, RUNS: tl.constexpr, CHUNK: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """One window of a block of heads."""
    program = wide(tl.program_id(0))
    window, batch = program // n_blocks % n_windows, program // n_blocks // n_windows
    i = tl.arange(0, BLOCK_T)
    t = window * CHUNK + i
    t_mask = (i < CHUNK) & (t < seqlen)
    head = program % n_blocks * BLOCK_H + tl.arange(0, BLOCK_H)
    head_mask = head < heads
    step, _, _ = step_tile(dt, dt_strides, bias, batch, t, head, t_mask, head_mask, dt_min, dt_max, SOFTPLUS)
    rate = tl.load(A + head, mask=head_mask, other=0.0).to(tl.float64) * LOG2E
    exponent = step.to(tl.float64) * rate[:, None]
    # 2 ** -300 is 0 in float32, as is everything below: no part's sum is infinite, whose differences are NaN.
    exponent = tl.where(exponent < -300.0, -300.0, exponent)
    if RUNS:
        first = (tl.load(starts + batch * seqlen + t, mask=t_mask, other=0) == t).to(tl.int32)
        first = tl.broadcast_to(first[None, :], (BLOCK_H, BLOCK_T))
        _, total = tl.associative_scan((first, exponent), 1, add_restarting)
    else:
        total = tl.cumsum(exponent, 1)
    high = total.to(tl.float32)
    at = steps + ((batch * heads + head) * seqlen)[:, None] + t[None, :]
    mask = head_mask[:, None] & t_mask[None, :]
    tl.store(at, step, mask=mask)
    tl.store(at + plane, high, mask=mask)
    tl.store(at + plane + plane, (total - high.to(tl.float64)).to(tl.float32), mask=mask)


@triton.jit
def products_kernel(
    B, C, products, B_strides, C_strides, groups, seqlen, dstate, n_windows,
    CHUNK: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """C B^T of one window and group, over all pairs of rows: which of them count, the readers decide."""
    program = wide(tl.program_id(0))
    group, window, batch = program % groups, program // groups % n_windows, program // groups // n_windows
    i = tl.arange(0, BLOCK_T)
    t = window * CHUNK + i
    t_mask = (i < CHUNK) & (t < seqlen)
    total = tl.zeros((BLOCK_T, BLOCK_T), tl.float32)
    for start in range(0, dstate, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        c = load_rows(C, C_strides, batch, t, group, n, t_mask, n < dstate)
        b = load_rows(B, B_strides, batch, t, group, n, t_mask, n < dstate)
        total += dot(c, tl.trans(b), FULL)
    at = products + square_offset(batch, window, n_windows, group, groups, BLOCK_T)
    tl.store(at + i[:, None] * BLOCK_T + i[None, :], total)


@triton.jit
def _out_part(
    x, C, D, z, steps, products, states, initial, entry, dout, out, x_strides, C_strides, D_strides, z_strides,
    dout_strides, out_strides, batch, window, head, p, lo, hi, heads, groups, seqlen, headdim, dstate, n_windows, plane,
    inside, RUNS: tl.constexpr, CHUNK: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    t = lo // CHUNK * CHUNK + tl.arange(0, BLOCK_T)
    mask, p_mask = (t >= lo) & (t < hi), p < headdim
    row, group = (batch * heads + head) * seqlen, head // (heads // groups)
    y = tl.zeros((BLOCK_T, p.shape[0]), tl.float32)
    if (states is not None) or (initial is not None):
        for start in range(0, dstate, BLOCK_N):
            n = start + tl.arange(0, BLOCK_N)
            c = load_rows(C, C_strides, batch, t, group, n, mask, n < dstate)
            # (states, channels): the product's second operand as it comes.
            state = load_states(
                states, initial, lo, entry, window, n_windows, batch, head, heads, seqlen, p[None, :], n[:, None],
                p_mask[None, :] & (n < dstate)[:, None], headdim, dstate, inside, RUNS,
            )  # fmt: skip
            y += rough_dot(c, state, x, FULL)
        decay, _ = decays(steps, row, plane, t, hi, mask, True)
        y *= decay[:, None]

    decay, valid = pair_decays(steps, row, plane, t, mask)
    square = load_square(products, square_offset(batch, window, n_windows, group, groups, BLOCK_T), valid, BLOCK_T)
    weight = tl.where(valid, square * decay * step_sizes(steps, row, t, mask)[None, :], 0.0)
    rows = load_rows(x, x_strides, batch, t, head, p, mask, p_mask)
    y += rough_dot(weight, rows, x, FULL)
    if D is not None:
        skip = tl.load(D + head * D_strides[0] + p * D_strides[1], mask=p_mask, other=0.0)
        y += skip[None, :] * rows.to(tl.float32)
    if z is not None:
        gate = load_rows(z, z_strides, batch, t, head, p, mask, p_mask).to(tl.float32)
        slope = sigmoid(gate)
        if dout is not None:  # the gradient of z instead
            y *= load_rows(dout, dout_strides, batch, t, head, p, mask, p_mask).to(tl.float32)
            y *= slope * (1.0 + gate * (1.0 - slope))
        else:
            y *= gate * slope
    store_rows(out, out_strides, batch, t, head, p, mask, p_mask, y)


@triton.jit
def out_kernel(
    x, C, D, z, steps, products, states, initial, starts, ends, entry, dout, out, x_strides, C_strides, D_strides,
    z_strides, dout_strides, out_strides, heads, groups, seqlen, headdim, dstate, n_windows, n_blocks, plane,
    RUNS: tl.constexpr, CHUNK: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
    FULL: tl.constexpr,
):  # fmt: skip
    """The output, or with `dout` the gradient of z, of one window, head and block of channels."""
    program = wide(tl.program_id(0))
    head = program // n_blocks % heads
    window, batch = program // n_blocks // heads % n_windows, program // n_blocks // heads // n_windows
    p = program % n_blocks * BLOCK_P + tl.arange(0, BLOCK_P)
    lo = window * CHUNK
    last = tl.minimum(lo + CHUNK, seqlen)
    if RUNS:
        while lo < last:
            hi = ends_at(ends, batch * seqlen + lo, last)
            inside = tl.load(starts + batch * seqlen + lo) >= window * CHUNK
            _out_part(
                x, C, D, z, steps, products, states, initial, entry, dout, out, x_strides, C_strides, D_strides,
                z_strides, dout_strides, out_strides, batch, window, head, p, lo, hi, heads, groups, seqlen, headdim,
                dstate, n_windows, plane, inside, RUNS, CHUNK, BLOCK_T, BLOCK_N, FULL,
            )  # fmt: skip
            lo = hi
    else:
        _out_part(
            x, C, D, z, steps, products, states, initial, entry, dout, out, x_strides, C_strides, D_strides, z_strides,
            dout_strides, out_strides, batch, window, head, p, lo, last, heads, groups, seqlen, headdim, dstate,
            n_windows, plane, False, RUNS, CHUNK, BLOCK_T, BLOCK_N, FULL,
        )  # fmt: skip
