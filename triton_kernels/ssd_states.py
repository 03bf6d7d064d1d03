"""Between the chunks of the SSD, in Triton: states handed on, and their gradients handed back.

A program holds a block of one head's (P, N) state and walks through one sequence. Nothing but the state before
each window (or the gradient after it) is written, so the parts of a window can be computed side by side.
"""

import triton
import triton.language as tl

from trifuse.triton_kernels.common import wide
from trifuse.triton_kernels.ssd_tile import (
    decays,
    dot,
    ends_at,
    load_dout,
    load_rows,
    only_if,
    state_offsets,
    step_sizes,
)

__all__ = ["dstates_kernel", "states_kernel"]


@triton.jit
def _block(heads, headdim, dstate, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr):
    """Sequence, head, channels and states of this program; blocks of states follow one another."""
    program = wide(tl.program_id(0))
    n_blocks, p_blocks = tl.cdiv(dstate, BLOCK_N), tl.cdiv(headdim, BLOCK_P)
    n = program % n_blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    p = program // n_blocks % p_blocks * BLOCK_P + tl.arange(0, BLOCK_P)
    program = program // n_blocks // p_blocks
    return program // heads, program % heads, p, n


@triton.jit
def _extent(cu_seqlens, row, seqlen):
    """The batch item of a sequence, where the sequence begins, and where it ends."""
    if cu_seqlens is not None:
        return row * 0, tl.load(cu_seqlens + row), tl.load(cu_seqlens + row + 1)
    else:
        return row, row * 0, row * 0 + seqlen


@triton.jit
def _load_outer(ptr, row, head, heads, p, n, mask, headdim, dstate):
    if ptr is not None:
        at = state_offsets(row * heads + head, p[:, None], n[None, :], headdim, dstate)
        return tl.load(ptr + at, mask=mask, other=0.0)
    else:
        return tl.zeros(mask.shape, tl.float32)


@triton.jit
def _advance(
    state, x, B, steps, states, x_strides, B_strides, batch, head, group, p, n, mask, lo, hi, heads, seqlen, headdim,
    dstate, n_windows, plane, CHUNK: tl.constexpr, BLOCK_T: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """The state after a part, of which the one before it is stored if the part begins a window."""
    window = lo // CHUNK
    if states is not None:
        saved = (batch * n_windows + window) * heads + head
        at = states + state_offsets(saved, p[:, None], n[None, :], headdim, dstate)
        tl.store(at, state, mask=only_if(mask, lo == window * CHUNK))
    t = window * CHUNK + tl.arange(0, BLOCK_T)
    t_mask = (t >= lo) & (t < hi)
    row = (batch * heads + head) * seqlen
    decay, whole = decays(steps, row, plane, t, hi, t_mask, False)
    weight = decay * step_sizes(steps, row, t, t_mask)
    rows = load_rows(x, x_strides, batch, t, head, p, t_mask, p < headdim).to(tl.float32) * weight[:, None]
    coef = load_rows(B, B_strides, batch, t, group, n, t_mask, n < dstate)
    return whole * state + dot(tl.trans(rows), coef, FULL)


@triton.jit
def states_kernel(
    x, B, steps, initial, starts, ends, cu_seqlens, states, final, x_strides, B_strides, heads, groups, seqlen, headdim,
    dstate, n_windows, plane,
    RUNS: tl.constexpr, CHUNK: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
    FULL: tl.constexpr,
):  # fmt: skip
    """The state before each window, and the last one of the sequence."""
    sequence, head, p, n = _block(heads, headdim, dstate, BLOCK_P, BLOCK_N)
    mask = (p < headdim)[:, None] & (n < dstate)[None, :]
    group = head // (heads // groups)
    batch, start, end = _extent(cu_seqlens, sequence, seqlen)
    state = _load_outer(initial, sequence, head, heads, p, n, mask, headdim, dstate)
    if RUNS:
        lo = start
        while lo < end:
            at = batch * seqlen + lo
            hi = ends_at(ends, at, tl.minimum(end, (lo // CHUNK + 1) * CHUNK))
            restarts = (lo > start) & (tl.load(starts + at) == lo)
            state = tl.where(restarts, 0.0, state)
            state = _advance(
                state, x, B, steps, states, x_strides, B_strides, batch, head, group, p, n, mask, lo, hi, heads, seqlen,
                headdim, dstate, n_windows, plane, CHUNK, BLOCK_T, FULL,
            )  # fmt: skip
            lo = hi
    else:
        for window in range(n_windows):
            lo = wide(window) * CHUNK
            state = _advance(
                state, x, B, steps, states, x_strides, B_strides, batch, head, group, p, n, mask, lo,
                tl.minimum(lo + CHUNK, end), heads, seqlen, headdim, dstate, n_windows, plane, CHUNK, BLOCK_T, FULL,
            )  # fmt: skip
    if final is not None:
        tl.store(
            final + state_offsets(sequence * heads + head, p[:, None], n[None, :], headdim, dstate), state, mask=mask
        )


@triton.jit
def _retreat(
    grad, dout, C, z, steps, dstates, dout_strides, C_strides, z_strides, batch, head, group, p, n, mask, lo, hi, heads,
    seqlen, headdim, dstate, n_windows, plane, CHUNK: tl.constexpr, BLOCK_T: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """The gradient of the state before a part, of which the one after it is stored if the part ends a window."""
    window = lo // CHUNK
    if dstates is not None:
        saved = (batch * n_windows + window) * heads + head
        at = dstates + state_offsets(saved, p[:, None], n[None, :], headdim, dstate)
        tl.store(at, grad, mask=only_if(mask, hi == tl.minimum((window + 1) * CHUNK, seqlen)))
    t = window * CHUNK + tl.arange(0, BLOCK_T)
    t_mask = (t >= lo) & (t < hi)
    row = (batch * heads + head) * seqlen
    decay, whole = decays(steps, row, plane, t, hi, t_mask, True)
    dy = load_dout(dout, dout_strides, z, z_strides, batch, t, head, p, t_mask, p < headdim)
    coef = load_rows(C, C_strides, batch, t, group, n, t_mask, n < dstate)
    return whole * grad + dot(tl.trans(dy.to(tl.float32) * decay[:, None]), coef, FULL)


@triton.jit
def dstates_kernel(
    dout, C, z, steps, dfinal, starts, ends, cu_seqlens, dstates, dinitial, dout_strides, C_strides, z_strides, heads,
    groups, seqlen, headdim, dstate, n_windows, plane,
    RUNS: tl.constexpr, CHUNK: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
    FULL: tl.constexpr,
):  # fmt: skip
    """The gradient of the state after each window, and that of the sequence's first one."""
    sequence, head, p, n = _block(heads, headdim, dstate, BLOCK_P, BLOCK_N)
    mask = (p < headdim)[:, None] & (n < dstate)[None, :]
    group = head // (heads // groups)
    batch, start, end = _extent(cu_seqlens, sequence, seqlen)
    grad = _load_outer(dfinal, sequence, head, heads, p, n, mask, headdim, dstate)
    if RUNS:
        hi = end
        while hi > start:
            at = batch * seqlen + hi - 1
            lo = tl.maximum(tl.load(starts + at).to(tl.int64), (hi - 1) // CHUNK * CHUNK)
            restarts = (hi < end) & (tl.load(ends + at) == hi)
            grad = tl.where(restarts, 0.0, grad)
            grad = _retreat(
                grad, dout, C, z, steps, dstates, dout_strides, C_strides, z_strides, batch, head, group, p, n, mask,
                lo, hi, heads, seqlen, headdim, dstate, n_windows, plane, CHUNK, BLOCK_T, FULL,
            )  # fmt: skip
            hi = lo
    else:
        for step in range(n_windows):
            lo = wide(n_windows - 1 - step) * CHUNK
            grad = _retreat(
                grad, dout, C, z, steps, dstates, dout_strides, C_strides, z_strides, batch, head, group, p, n, mask,
                lo, tl.minimum(lo + CHUNK, end), heads, seqlen, headdim, dstate, n_windows, plane, CHUNK, BLOCK_T, FULL,
            )  # fmt: skip
    if dinitial is not None:
        at = dinitial + state_offsets(sequence * heads + head, p[:, None], n[None, :], headdim, dstate)
        tl.store(at, grad, mask=mask)
