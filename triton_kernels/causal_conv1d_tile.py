"""The pieces of a tile that the forward and the backward causal convolution share, in Triton.

A tile is (channels, positions). Tap k of position q reads x[q - k] and meets weight[width - 1 - k].
"""

import triton
import triton.language as tl

from trifuse.triton_kernels.common import load_tile, sigmoid

__all__ = ["convolved", "last_run", "places", "silu", "silu_slope", "tap", "tap_counts"]


@triton.jit
def silu(x):
    return x * sigmoid(x)


@triton.jit
def silu_slope(x):
    s = sigmoid(x)
    return s * (1.0 + x * (1.0 - s))


@triton.jit
def places(seq_idx, sequence, cu_seqlens, batch, q, there, seqlen):
    """Of positions q: the row of their states, where their sequence begins and ends, and their id."""
    row = q * 0 + batch
    start = q * 0
    end = q * 0 + seqlen
    ids = (q * 0).to(tl.int32)
    if cu_seqlens is not None:
        row = tl.load(sequence + q, mask=there, other=0).to(tl.int64)
        start = tl.load(cu_seqlens + row, mask=there, other=0)
        end = tl.load(cu_seqlens + row + 1, mask=there, other=0)
    if seq_idx is not None:
        ids = tl.load(seq_idx + batch * seqlen + q, mask=there, other=-1)
    return row, start, end, ids


@triton.jit
def tap_counts(seq_idx, batch, q, start, ids, there, seqlen, k: tl.constexpr):
    """Which of the positions read x by their tap k."""
    counts = there & (q - k >= start)
    if seq_idx is not None:
        counts = counts & (ids >= 0)
        if k > 0:
            counts = counts & (tl.load(seq_idx + batch * seqlen + q - k, mask=counts, other=-1) == ids)
    return counts


@triton.jit
def initial_counts(seq_idx, batch, q, start, ids, there, seqlen, WIDTH: tl.constexpr):
    """Which of the positions may read the initial states: those whose id has not changed since the start."""
    counts = there & (q - start < WIDTH - 1)
    if seq_idx is not None:
        counts = counts & (ids >= 0)
        for j in tl.static_range(1, WIDTH - 1):
            inside = counts & (q - j >= start)
            counts = counts & (~inside | (tl.load(seq_idx + batch * seqlen + q - j, mask=inside, other=-1) == ids))
    return counts


@triton.jit
def tap(
    x, x_strides, initial_states, seq_idx, batch, d, d_mask, q, there, row, start, ids, initial, dim, seqlen,
    k: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """What tap k of the positions reads, zero where it does not count. Selected, never multiplied by zero: NaN or
    Inf in one sequence must not reach the next. `initial`: initial_counts, or None where nobody reads them."""
    counts = tap_counts(seq_idx, batch, q, start, ids, there, seqlen, k)
    value = load_tile(x, x_strides, batch, d, q - k, d_mask[:, None] & counts[None, :])
    if initial is not None and k > 0:
        left = initial & (q - k < start)
        entry = WIDTH - 1 - k + q - start
        at = initial_states + (row[None, :] * dim + d[:, None]) * (WIDTH - 1) + entry[None, :]
        value += tl.load(at, mask=d_mask[:, None] & left[None, :], other=0.0).to(tl.float32)
    return value


@triton.jit
def convolved(
    x, x_strides, weight, bias, initial_states, seq_idx, batch, d, d_mask, q, there, row, start, ids, dim, seqlen,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """The convolution's sums at positions q."""
    initial = None
    if initial_states is not None:
        initial = initial_counts(seq_idx, batch, q, start, ids, there, seqlen, WIDTH)
    total = tl.zeros((d.shape[0], q.shape[0]), tl.float32)
    if bias is not None:
        total += tl.load(bias + d, mask=d_mask, other=0.0)[:, None]
    for i in tl.static_range(WIDTH):
        value = tap(
            x, x_strides, initial_states, seq_idx, batch, d, d_mask, q, there, row, start, ids, initial, dim, seqlen,
            WIDTH - 1 - i, WIDTH,
        )  # fmt: skip
        total += tl.load(weight + d * WIDTH + i, mask=d_mask, other=0.0)[:, None] * value
    return total


@triton.jit
def last_run(runs, row, start, end, there):
    """Where the last run of one id of each row begins and ends; without ids that is the sequence."""
    if runs is not None:
        start = tl.load(runs + row * 2, mask=there, other=0)
        end = tl.load(runs + row * 2 + 1, mask=there, other=0)
    return start, end
