"""The backward pass of the SSD in Triton, between `dstates_kernel` and the sums over windows.

With W[t, s] the share of the pair (t, s) in sum(dy * y), the step size of k reaches the loss through the decay of
every pair with s < k <= t. Those inside a part are summed as such, never as a difference of sums that hold the
pairs s = t: where decay is strong, these are all there is to see. Pairs that reach out of a part come from
its states: what enters it is felt at k by the rows from k on (`felt`), what leaves it by the rows before k (`left`).

Sums over the heads of a group and over windows are taken in a fixed order, by one program or by torch.
"""

import triton
import triton.language as tl

from trifuse.triton_kernels.common import sigmoid, wide
from trifuse.triton_kernels.ssd_chunk import step_tile
from trifuse.triton_kernels.ssd_tile import (
    add_restarting,
    decays,
    dot,
    ends_at,
    load_dout,
    load_rows,
    load_square,
    load_states,
    pair_decays,
    rough_dot,
    square_offset,
    step_sizes,
    store_rows,
)

__all__ = ["coefficient_kernel", "dt_kernel", "dx_kernel", "pairs_kernel"]


@triton.jit
def _dx_part(
    dout, B, D, z, steps, products, dstates, dfinal, leave, dx, dout_strides, B_strides, D_strides, z_strides,
    dx_strides, batch, window, head, p, lo, hi, heads, groups, seqlen, headdim, dstate, n_windows, plane, inside,
    RUNS: tl.constexpr, CHUNK: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    t = lo // CHUNK * CHUNK + tl.arange(0, BLOCK_T)
    mask, p_mask = (t >= lo) & (t < hi), p < headdim
    row, group = (batch * heads + head) * seqlen, head // (heads // groups)
    grad = tl.zeros((BLOCK_T, p.shape[0]), tl.float32)
    if (dstates is not None) or (dfinal is not None):
        for start in range(0, dstate, BLOCK_N):
            n = start + tl.arange(0, BLOCK_N)
            b = load_rows(B, B_strides, batch, t, group, n, mask, n < dstate)
            state = load_states(
                dstates, dfinal, lo, leave, window, n_windows, batch, head, heads, seqlen, p[None, :], n[:, None],
                p_mask[None, :] & (n < dstate)[:, None], headdim, dstate, inside, RUNS,
            )  # fmt: skip
            grad += rough_dot(b, state, dx, FULL)
        decay, _ = decays(steps, row, plane, t, hi, mask, False)
        grad *= decay[:, None]
    decay, valid = pair_decays(steps, row, plane, t, mask)
    square = load_square(products, square_offset(batch, window, n_windows, group, groups, BLOCK_T), valid, BLOCK_T)
    weight = tl.where(valid, square * decay, 0.0)
    dy = load_dout(dout, dout_strides, z, z_strides, batch, t, head, p, mask, p_mask)
    grad += rough_dot(tl.trans(weight), dy, dx, FULL)
    grad *= step_sizes(steps, row, t, mask)[:, None]
    if D is not None:
        skip = tl.load(D + head * D_strides[0] + p * D_strides[1], mask=p_mask, other=0.0)
        grad += skip[None, :] * dy.to(tl.float32)
    store_rows(dx, dx_strides, batch, t, head, p, mask, p_mask, grad)


@triton.jit
def dx_kernel(
    dout, x, B, D, z, steps, products, dstates, dfinal, ends, leave, dx, dD, dout_strides, x_strides, B_strides,
    D_strides, z_strides, dx_strides, heads, groups, seqlen, headdim, dstate, n_windows, n_blocks, plane,
    RUNS: tl.constexpr, CHUNK: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
    FULL: tl.constexpr,
):  # fmt: skip
    """The gradient of x, and the window's share of that of D, of one window, head and block of channels."""
    program = wide(tl.program_id(0))
    head = program // n_blocks % heads
    window, batch = program // n_blocks // heads % n_windows, program // n_blocks // heads // n_windows
    p = program % n_blocks * BLOCK_P + tl.arange(0, BLOCK_P)
    first = window * CHUNK
    last = tl.minimum(first + CHUNK, seqlen)
    if RUNS:
        lo = first
        while lo < last:
            hi = ends_at(ends, batch * seqlen + lo, last)
            inside = tl.load(ends + batch * seqlen + lo) <= last
            _dx_part(
                dout, B, D, z, steps, products, dstates, dfinal, leave, dx, dout_strides, B_strides, D_strides,
                z_strides, dx_strides, batch, window, head, p, lo, hi, heads, groups, seqlen, headdim, dstate,
                n_windows, plane, inside, RUNS, CHUNK, BLOCK_T, BLOCK_N, FULL,
            )  # fmt: skip
            lo = hi
    else:
        _dx_part(
            dout, B, D, z, steps, products, dstates, dfinal, leave, dx, dout_strides, B_strides, D_strides, z_strides,
            dx_strides, batch, window, head, p, first, last, heads, groups, seqlen, headdim, dstate, n_windows, plane,
            False, RUNS, CHUNK, BLOCK_T, BLOCK_N, FULL,
        )  # fmt: skip
    if D is not None:
        t = first + tl.arange(0, BLOCK_T)
        dy = load_dout(dout, dout_strides, z, z_strides, batch, t, head, p, t < last, p < headdim).to(tl.float32)
        rows = load_rows(x, x_strides, batch, t, head, p, t < last, p < headdim).to(tl.float32)
        tl.store(
            dD + ((batch * n_windows + window) * heads + head) * headdim + p, tl.sum(dy * rows, 0), mask=p < headdim
        )


@triton.jit
def _pairs_part(
    dout, x, z, steps, products, dproducts, own, crossing, dout_strides, x_strides, z_strides, batch, window, group,
    first_head, last_head, slab, lo, hi, heads, groups, seqlen, headdim, n_windows, plane,
    CHUNK: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_P: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    i = tl.arange(0, BLOCK_T)
    t = lo // CHUNK * CHUNK + i
    mask = (t >= lo) & (t < hi)
    at = square_offset(batch, window, n_windows, group, groups, BLOCK_T)
    total = tl.zeros((BLOCK_T, BLOCK_T), tl.float32)
    for head in range(first_head, last_head):
        row = (batch * heads + head) * seqlen
        share = tl.zeros((BLOCK_T, BLOCK_T), tl.float32)
        for start in range(0, headdim, BLOCK_P):
            p = start + tl.arange(0, BLOCK_P)
            dy = load_dout(dout, dout_strides, z, z_strides, batch, t, head, p, mask, p < headdim)
            rows = load_rows(x, x_strides, batch, t, head, p, mask, p < headdim)
            share += dot(dy, tl.trans(rows), FULL)
        decay, valid = pair_decays(steps, row, plane, t, mask)
        step = step_sizes(steps, row, t, mask)
        share = tl.where(valid, share * decay, 0.0)
        total += share * step[None, :]
        share *= load_square(products, at, valid, BLOCK_T)
        tl.store(own + row + t, tl.sum(share, 0), mask=mask)
        # Over s <= k, then over t > k: what crosses from k to k + 1.
        reach = tl.cumsum(share * step[None, :], 1)
        tl.store(crossing + row + t, tl.sum(tl.where(t[:, None] > t[None, :], reach, 0.0), 0), mask=mask)
    tl.store(dproducts + slab + at + i[:, None] * BLOCK_T + i[None, :], total, mask=mask[:, None])


@triton.jit
def pairs_kernel(
    dout, x, z, steps, products, ends, dproducts, own, crossing, dout_strides, x_strides, z_strides, slab_stride,
    heads, groups, seqlen, headdim, n_windows, n_slabs, heads_each, plane,
    RUNS: tl.constexpr, CHUNK: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_P: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """Over the pairs of one window and the heads of a group, or a slab of them: the gradient of C B^T, and per
    position and head that of the input's step size (`own`) and the pairs that its decay is between (`crossing`)."""
    program = wide(tl.program_id(0))
    slab, group = program % n_slabs, program // n_slabs % groups
    window, batch = program // n_slabs // groups % n_windows, program // n_slabs // groups // n_windows
    per_group = heads // groups
    first_head = group * per_group + slab * heads_each
    last_head = tl.minimum(first_head + heads_each, (group + 1) * per_group)
    lo = window * CHUNK
    last = tl.minimum(lo + CHUNK, seqlen)
    if RUNS:
        while lo < last:
            hi = ends_at(ends, batch * seqlen + lo, last)
            _pairs_part(
                dout, x, z, steps, products, dproducts, own, crossing, dout_strides, x_strides, z_strides, batch,
                window, group, first_head, last_head, slab * slab_stride, lo, hi, heads, groups, seqlen, headdim,
                n_windows, plane, CHUNK, BLOCK_T, BLOCK_P, FULL,
            )  # fmt: skip
            lo = hi
    else:
        _pairs_part(
            dout, x, z, steps, products, dproducts, own, crossing, dout_strides, x_strides, z_strides, batch, window,
            group, first_head, last_head, slab * slab_stride, lo, last, heads, groups, seqlen, headdim, n_windows,
            plane, CHUNK, BLOCK_T, BLOCK_P, FULL,
        )  # fmt: skip


@triton.jit
def _coefficient_part(
    rows, z, mine, other, steps, dproducts, states, outer, position_rows, back, back_outer, back_rows, reach, grad,
    rows_strides, z_strides, mine_strides, other_strides, grad_strides, batch, window, group, n, lo, hi, heads, groups,
    seqlen, headdim, dstate, n_windows, plane, inside, back_inside,
    FOR_C: tl.constexpr, RUNS: tl.constexpr, CHUNK: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_P: tl.constexpr,
    FULL: tl.constexpr,
):  # fmt: skip
    t = lo // CHUNK * CHUNK + tl.arange(0, BLOCK_T)
    mask, n_mask = (t >= lo) & (t < hi), n < dstate
    total = tl.zeros((BLOCK_T, n.shape[0]), tl.float32)
    if (states is not None) or (outer is not None):
        coef = load_rows(mine, mine_strides, batch, t, group, n, mask, n_mask).to(tl.float32)
        per_group = heads // groups
        for head in range(group * per_group, (group + 1) * per_group):
            row = (batch * heads + head) * seqlen
            decay, whole = decays(steps, row, plane, t, hi, mask, FOR_C)
            part = tl.zeros((BLOCK_T, n.shape[0]), tl.float32)
            both = tl.zeros((1,), tl.float32)
            for start in range(0, headdim, BLOCK_P):
                p = start + tl.arange(0, BLOCK_P)
                state_mask = (p < headdim)[:, None] & n_mask[None, :]
                state = load_states(
                    states, outer, lo, position_rows, window, n_windows, batch, head, heads, seqlen, p[:, None],
                    n[None, :], state_mask, headdim, dstate, inside, RUNS,
                )  # fmt: skip
                if FOR_C:
                    side = load_dout(rows, rows_strides, z, z_strides, batch, t, head, p, mask, p < headdim)
                    if (back is not None) or (back_outer is not None):
                        returning = load_states(
                            back, back_outer, lo, back_rows, window, n_windows, batch, head, heads, seqlen,
                            p[:, None], n[None, :], state_mask, headdim, dstate, back_inside, RUNS,
                        )  # fmt: skip
                        both += tl.sum(state * returning)
                else:
                    side = load_rows(rows, rows_strides, batch, t, head, p, mask, p < headdim)
                part += dot(side, state, FULL)
            part *= decay[:, None]
            felt = tl.sum(part * coef, 1)
            if FOR_C:  # what enters and leaves the part again is felt by all its rows: from the last one on
                felt += tl.where(t == hi - 1, whole * both, 0.0)
                total += part
            else:
                total += part * step_sizes(steps, row, t, mask)[:, None]
            tl.store(reach + row + t, felt, mask=mask)
    square = load_square(
        dproducts,
        square_offset(batch, window, n_windows, group, groups, BLOCK_T),
        mask[:, None] & mask[None, :],
        BLOCK_T,
    )
    if not FOR_C:
        square = tl.trans(square)
    coef = load_rows(other, other_strides, batch, t, group, n, mask, n_mask)
    total += rough_dot(square, coef, grad, FULL)
    store_rows(grad, grad_strides, batch, t, group, n, mask, n_mask, total)


@triton.jit
def coefficient_kernel(
    rows, z, mine, other, steps, dproducts, states, outer, position_rows, back, back_outer, back_rows, starts, ends,
    reach, grad, rows_strides, z_strides, mine_strides, other_strides, grad_strides, heads, groups, seqlen, headdim,
    dstate, n_windows, n_blocks, plane,
    FOR_C: tl.constexpr, RUNS: tl.constexpr, CHUNK: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """The gradient of C (`rows` dout, `mine` C, `other` B, `states` those that enter, `back` the gradients that come
    back) or of B (x, B, C, the gradients that come back, None) of one window, group and block of states; and `reach`,
    per position and head what its decay does to the states: one sum per block of states."""
    program = wide(tl.program_id(0))
    block, group = program % n_blocks, program // n_blocks % groups
    window, batch = program // n_blocks // groups % n_windows, program // n_blocks // groups // n_windows
    n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    if reach is not None:
        reach += block * plane
    lo = window * CHUNK
    last = tl.minimum(lo + CHUNK, seqlen)
    if RUNS:
        while lo < last:
            at = batch * seqlen + lo
            hi = ends_at(ends, at, last)
            begins, finishes = tl.load(starts + at) >= window * CHUNK, tl.load(ends + at) <= last
            _coefficient_part(
                rows, z, mine, other, steps, dproducts, states, outer, position_rows, back, back_outer, back_rows,
                reach, grad, rows_strides, z_strides, mine_strides, other_strides, grad_strides, batch, window, group,
                n, lo, hi, heads, groups, seqlen, headdim, dstate, n_windows, plane,
                begins if FOR_C else finishes, finishes, FOR_C, RUNS, CHUNK, BLOCK_T, BLOCK_P, FULL,
            )  # fmt: skip
            lo = hi
    else:
        _coefficient_part(
            rows, z, mine, other, steps, dproducts, states, outer, position_rows, back, back_outer, back_rows, reach,
            grad, rows_strides, z_strides, mine_strides, other_strides, grad_strides, batch, window, group, n, lo, last,
            heads, groups, seqlen, headdim, dstate, n_windows, plane, False, False, FOR_C, RUNS, CHUNK, BLOCK_T,
            BLOCK_P, FULL,
        )  # fmt: skip


@triton.jit
def _sum_blocks(ptr, at, mask, blocks, plane):
    total = tl.zeros(mask.shape, tl.float32)
    for block in range(blocks):
        total += tl.load(ptr + wide(block) * plane + at, mask=mask, other=0.0)
    return total


@triton.jit
def dt_kernel(
    dt, A, bias, starts, ends, steps, own, crossing, felt, left, ddt, dA, dbias, dt_strides, ddt_strides, heads, seqlen,
    n_windows, n_blocks, reach_blocks, plane, dt_min, dt_max,
    SOFTPLUS: tl.constexpr, RUNS: tl.constexpr, CHUNK: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """The gradient of dt, and the window's share of those of A and the bias, of one window and a block of heads."""
    program = wide(tl.program_id(0))
    window, batch = program // n_blocks % n_windows, program // n_blocks // n_windows
    i = tl.arange(0, BLOCK_T)
    t = window * CHUNK + i
    t_mask = (i < CHUNK) & (t < seqlen)
    head = program % n_blocks * BLOCK_H + tl.arange(0, BLOCK_H)
    head_mask = head < heads
    mask = head_mask[:, None] & t_mask[None, :]
    begin, last = i == 0, (i == CHUNK - 1) | (t == seqlen - 1)
    if RUNS:
        begin = begin | (tl.load(starts + batch * seqlen + t, mask=t_mask, other=0) == t)
        last = last | (tl.load(ends + batch * seqlen + t, mask=t_mask, other=0) == t + 1)
    at = ((batch * heads + head) * seqlen)[:, None] + t[None, :]
    before = mask & (begin == 0)[None, :]
    ddecay = tl.load(crossing + at - 1, mask=before, other=0.0)
    dstep = tl.load(own + at, mask=mask, other=0.0)
    if felt is not None:  # by the rows from this one on
        value = _sum_blocks(felt, at, mask, reach_blocks, plane)
        if RUNS:
            flags = tl.broadcast_to(last.to(tl.int32)[None, :], mask.shape)
            _, value = tl.associative_scan((flags, value), 1, add_restarting, reverse=True)
        else:
            value = tl.cumsum(value, 1, reverse=True)
        ddecay += value
    if left is not None:  # by the rows before this one
        dstep += _sum_blocks(left, at, mask, reach_blocks, plane)
        value = _sum_blocks(left, at - 1, before, reach_blocks, plane)
        value *= tl.load(steps + at - 1, mask=before, other=0.0)
        if RUNS:
            flags = tl.broadcast_to(begin.to(tl.int32)[None, :], mask.shape)
            _, value = tl.associative_scan((flags, value), 1, add_restarting)
        else:
            value = tl.cumsum(value, 1)
        ddecay += value
    step, raw, held = step_tile(dt, dt_strides, bias, batch, t, head, t_mask, head_mask, dt_min, dt_max, SOFTPLUS)
    rate = tl.load(A + head, mask=head_mask, other=0.0)
    dstep += rate[:, None] * ddecay
    dstep = tl.where(held, 0.0, dstep)
    if SOFTPLUS:
        dstep *= sigmoid(raw)
    tl.store(
        ddt + batch * ddt_strides[0] + (t * ddt_strides[1])[None, :] + (head * ddt_strides[2])[:, None],
        dstep.to(ddt.dtype.element_ty),
        mask=mask,
    )
    share = (batch * n_windows + window) * heads + head
    tl.store(dA + share, tl.sum(tl.where(mask, ddecay * step, 0.0), 1), mask=head_mask)
    if bias is not None:
        tl.store(dbias + share, tl.sum(tl.where(mask, dstep, 0.0), 1), mask=head_mask)
