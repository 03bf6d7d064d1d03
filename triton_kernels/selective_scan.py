"""The selective scan in Triton: forward, backward, and the one-token update, for real A.

A program holds a tile of channels x time in registers, with several consecutive steps in each lane.
States are taken one at a time: for each of the N, the tile's decays and inputs are composed by one
associative scan, so nothing of size (B, D, L, N) ever exists and N may be anything. Tiles follow one
another in processing order inside the program and hand the state on through `carry` in memory;
batch x channel blocks give the parallelism.

Everything inside runs in processing order: with `reverse`, step s reads place L - 1 - s of u, delta, z
and out, and the launcher lays B and C out by step. "First", "last", "before" and "after" mean that order.
"""

import math

import torch
import triton
import triton.language as tl

from trifuse.triton_kernels import common
from trifuse.triton_kernels.common import LN2, LOG2E, add, channels, load_tile, reverse_rows, sigmoid, store_tile, wide
from trifuse.triton_kernels.selective_scan_tile import (
    accumulate,
    boundaries,
    column,
    group,
    load_channel,
    load_coefficient,
    load_step,
    place,
    scan_rows,
)
from trifuse.triton_kernels.selective_state_update import selective_state_update

__all__ = ["selective_scan_bwd", "selective_scan_fwd", "selective_state_update"]


@triton.jit
def _fwd_kernel(
    u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens, sequence, out, last_state, carry, chunk_states,
    u_strides, delta_strides, z_strides, out_strides, B_strides, C_strides,
    dim, seqlen, dstate, n_blocks, n_chunks, span, B_span, C_span,
    B_VARIES: tl.constexpr, C_VARIES: tl.constexpr, SOFTPLUS: tl.constexpr, REVERSE: tl.constexpr,
    EVEN_T: tl.constexpr, EVEN_D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    PACKED: tl.constexpr = cu_seqlens is not None
    i = tl.arange(0, BLOCK_T)
    first, last = i == 0, i == BLOCK_T - 1
    batch = wide(tl.program_id(0) // n_blocks)
    d, d_mask = channels(tl.program_id(0) % n_blocks, span, BLOCK_D, EVEN_D)
    B_base = group(B, B_strides, batch, d, B_span, B_VARIES)
    C_base = group(C, C_strides, batch, d, C_span, C_VARIES)
    skip = load_channel(D, d, d_mask)
    bias = load_channel(delta_bias, d, d_mask)
    carry_rows = carry + (batch * dim + d) * dstate

    for chunk in range(n_chunks):
        s = wide(chunk) * BLOCK_T + i
        s_mask = i >= 0 if EVEN_T else s < seqlen
        t = place(s, seqlen, REVERSE)
        mask = d_mask[:, None] & s_mask[None, :]
        x = load_tile(u, u_strides, batch, d, t, mask)
        dt, _ = load_step(delta, delta_strides, bias, batch, d, t, mask, SOFTPLUS)
        y = tl.zeros((BLOCK_D, BLOCK_T), tl.float32)
        if D is not None:
            y = skip[:, None] * x
        x = x * dt
        if PACKED:
            seq, starts, ends = boundaries(sequence, cu_seqlens, t, s_mask, REVERSE)
            rows = (seq[None, :] * dim + d[:, None]) * dstate

        for n in range(dstate):
            log2_decay = tl.load(A + d * dstate + n, mask=d_mask, other=0.0) * LOG2E
            a = tl.exp2(dt * log2_decay[:, None])
            b = load_coefficient(B_base, B_strides, n, d, dstate, s, d_mask, s_mask, B_VARIES) * x
            if not EVEN_T:  # steps that do not exist keep the state, whatever A and B are
                a = tl.where(s_mask[None, :], a, 1.0)
                b = tl.where(s_mask[None, :], b, 0.0)
            state = tl.load(carry_rows + n, mask=d_mask, other=0.0)
            if chunk_states is not None:
                saved = chunk_states + ((batch * n_chunks + chunk) * dstate + n) * dim + d
                tl.store(saved, state, mask=d_mask)
            if PACKED:
                if initial_state is not None:
                    h0 = tl.load(initial_state + rows + n, mask=d_mask[:, None] & starts[None, :], other=0.0)
                    b = tl.where(starts[None, :], a * h0 + b, b)
                b = tl.where((first & ~starts)[None, :], a * state[:, None] + b, b)
                a = tl.where(starts[None, :], -1.0, a)
            else:
                b = tl.where(first[None, :], a * state[:, None] + b, b)
            h = scan_rows(a, b, PACKED)
            y += h * load_coefficient(C_base, C_strides, n, d, dstate, s, d_mask, s_mask, C_VARIES)
            tl.store(carry_rows + n, column(h, last), mask=d_mask)
            if PACKED:
                tl.store(last_state + rows + n, h, mask=d_mask[:, None] & ends[None, :])

        if z is not None:
            gate = load_tile(z, z_strides, batch, d, t, mask)
            y *= gate * sigmoid(gate)
        store_tile(out, out_strides, batch, d, t, mask, y)
        tl.debug_barrier()  # the thread that reads a carry is not the one that wrote it


@triton.jit
def _bwd_kernel(
    dout, dlast_state, u, delta, A, B, C, C_back, D, z, delta_bias, initial_state, cu_seqlens, sequence, chunk_states,
    du, ddelta, dA, dB, dC, dD, dz, ddelta_bias, dinitial_state, carry,
    dout_strides, u_strides, delta_strides, z_strides, out_strides, B_strides, C_strides, C_back_strides,
    dB_strides, dC_strides,
    dim, seqlen, dstate, n_blocks, n_chunks, span, B_span, C_span, blocks_each, programs_each,
    B_VARIES: tl.constexpr, C_VARIES: tl.constexpr, SOFTPLUS: tl.constexpr, REVERSE: tl.constexpr,
    ATOMIC: tl.constexpr, EVEN_T: tl.constexpr, EVEN_D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr,
    STEPS: tl.constexpr,
):  # fmt: skip
    """Gradients of `blocks_each` blocks of channels, one after another.

    With g the gradient of h (its own, and what comes from the steps after), the two recurrences are
    P = a (h before) = a (P before + b before) and g = C dy + (a after)(g after). Reading delta and u
    one step to either side gives both without dividing or subtracting states from one another.
    `carry` holds a g of the first step of the tile that was processed just before, the one after."""
    PACKED: tl.constexpr = cu_seqlens is not None
    i = tl.arange(0, BLOCK_T)
    first = i == 0
    batch = wide(tl.program_id(0) // programs_each)
    program = tl.program_id(0) % programs_each

    for block in range(program * blocks_each, tl.minimum((program + 1) * blocks_each, n_blocks)):
        d, d_mask = channels(block, span, BLOCK_D, EVEN_D)
        B_base = group(B, B_strides, batch, d, B_span, B_VARIES)
        C_base = group(C, C_strides, batch, d, C_span, C_VARIES)
        C_back_base = group(C_back, C_back_strides, batch, d, C_span, C_VARIES)
        dB_base = group(dB, dB_strides, batch, d, B_span, B_VARIES)
        dC_base = group(dC, dC_strides, batch, d, C_span, C_VARIES)
        if not ATOMIC:  # each program adds into a slab of its own: the programs of a group, counted from 0
            blocks = tl.cdiv(span, BLOCK_D)
            if B_VARIES:
                first_block = tl.min(d, 0) // B_span * (B_span // span * blocks)
                dB_base += (program - first_block // blocks_each) * dB_strides[5]
            if C_VARIES:
                first_block = tl.min(d, 0) // C_span * (C_span // span * blocks)
                dC_base += (program - first_block // blocks_each) * dC_strides[5]
        skip = load_channel(D, d, d_mask)
        bias = load_channel(delta_bias, d, d_mask)
        sum_D = tl.zeros((BLOCK_D,), tl.float32)
        sum_bias = tl.zeros((BLOCK_D,), tl.float32)
        weights = (batch * dim + d) * dstate  # rows of the (batch, D, N) sums, and of carry

        for step in range(n_chunks):
            chunk = n_chunks - 1 - step
            s = wide(chunk) * BLOCK_T + i
            s_mask = i >= 0 if EVEN_T else s < seqlen
            t = place(s, seqlen, REVERSE)
            mask = d_mask[:, None] & s_mask[None, :]
            dt, _ = load_step(delta, delta_strides, bias, batch, d, t, mask, SOFTPLUS)
            x = dt * load_tile(u, u_strides, batch, d, t, mask)
            t_before, s_mask_before = place(s - 1, seqlen, REVERSE), s_mask & ~first
            mask_before = d_mask[:, None] & s_mask_before[None, :]
            x_before, _ = load_step(delta, delta_strides, bias, batch, d, t_before, mask_before, SOFTPLUS)
            x_before *= load_tile(u, u_strides, batch, d, t_before, mask_before)
            # The tile once more, backwards, for the recurrence that runs that way: column i is step s_back, the
            # i_back-th from the end of the last tile.
            i_back = wide(step) * BLOCK_T + i
            s_back = wide(n_chunks) * BLOCK_T - 1 - i_back
            back_mask = i >= 0 if EVEN_T else s_back < seqlen
            after_mask = i > 0 if EVEN_T else s_back + 1 < seqlen
            t_after = place(s_back + 1, seqlen, REVERSE)
            mask_after = d_mask[:, None] & after_mask[None, :]
            dt_after, _ = load_step(delta, delta_strides, bias, batch, d, t_after, mask_after, SOFTPLUS)
            dy = load_tile(dout, dout_strides, batch, d, t, mask)
            if z is not None:
                gate = load_tile(z, z_strides, batch, d, t, mask)
                dy *= gate * sigmoid(gate)
            dy_back = reverse_rows(dy, STEPS)
            y = tl.zeros((BLOCK_D, BLOCK_T), tl.float32)  # stays zero, and costs nothing, without z
            dx = tl.zeros((BLOCK_D, BLOCK_T), tl.float32)
            ddt = tl.zeros((BLOCK_D, BLOCK_T), tl.float32)
            if PACKED:
                seq, starts, _ = boundaries(sequence, cu_seqlens, t, s_mask, REVERSE)
                rows = (seq[None, :] * dim + d[:, None]) * dstate
                t_back = place(s_back, seqlen, REVERSE)
                seq_back, _, ends = boundaries(sequence, cu_seqlens, t_back, back_mask, REVERSE)
                rows_back = (seq_back[None, :] * dim + d[:, None]) * dstate

            for n in range(dstate):
                log2_decay = tl.load(A + d * dstate + n, mask=d_mask, other=0.0)[:, None] * LOG2E
                arriving = tl.load(carry + weights + n, mask=d_mask, other=0.0)
                a_after = tl.exp2(dt_after * log2_decay)
                c_back = load_coefficient(
                    C_back_base, C_back_strides, n, d, dstate, i_back, d_mask, back_mask, C_VARIES
                )
                g = c_back * dy_back
                if not EVEN_T:
                    a_after = tl.where(after_mask[None, :], a_after, 1.0)
                    g = tl.where(back_mask[None, :], g, 0.0)
                if PACKED:
                    g = tl.where((first & ~ends)[None, :], g + arriving[:, None], g)
                    if dlast_state is not None:
                        g += tl.load(dlast_state + rows_back + n, mask=d_mask[:, None] & ends[None, :], other=0.0)
                    a_after = tl.where(ends[None, :], -1.0, a_after)
                else:
                    g = tl.where(first[None, :], g + arriving[:, None], g)
                g = reverse_rows(scan_rows(a_after, g, PACKED), STEPS)

                b_before = load_coefficient(B_base, B_strides, n, d, dstate, s - 1, d_mask, s_mask_before, B_VARIES)
                state = tl.load(
                    chunk_states + ((batch * n_chunks + chunk) * dstate + n) * dim + d, mask=d_mask, other=0.0
                )
                a = tl.exp2(dt * log2_decay)
                if not EVEN_T:
                    a = tl.where(s_mask[None, :], a, 1.0)
                ga = g * a
                tl.store(carry + weights + n, column(ga, first), mask=d_mask)
                h = tl.where(first[None, :], state[:, None], b_before * x_before)
                if PACKED:
                    h0 = tl.zeros((BLOCK_D, BLOCK_T), tl.float32)
                    if initial_state is not None:
                        h0 = tl.load(initial_state + rows + n, mask=d_mask[:, None] & starts[None, :], other=0.0)
                        tl.store(dinitial_state + rows + n, ga, mask=d_mask[:, None] & starts[None, :])
                    h = tl.where(starts[None, :], h0, h)
                    h = scan_rows(tl.where(starts[None, :], -1.0, a), a * h, True)
                else:
                    h = scan_rows(a, a * h, False)
                b = load_coefficient(B_base, B_strides, n, d, dstate, s, d_mask, s_mask, B_VARIES)
                gh = g * h
                ddt += gh * log2_decay
                add(dA + weights + n, tl.sum(gh * dt, 1), d_mask)
                h += b * x
                dx += g * b
                if z is not None:
                    y += h * load_coefficient(C_base, C_strides, n, d, dstate, s, d_mask, s_mask, C_VARIES)
                g *= x
                h *= dy
                if not EVEN_D:
                    g = tl.where(d_mask[:, None], g, 0.0)
                    h = tl.where(d_mask[:, None], h, 0.0)
                if B_VARIES:
                    accumulate(dB_base, dB_strides, n, tl.sum(g, 0), s, s_mask, ATOMIC)
                if C_VARIES:
                    accumulate(dC_base, dC_strides, n, tl.sum(h, 0), s, s_mask, ATOMIC)
                if not B_VARIES:
                    add(dB + weights + n, tl.sum(tl.where(s_mask[None, :], g, 0.0), 1), d_mask)
                if not C_VARIES:
                    add(dC + weights + n, tl.sum(tl.where(s_mask[None, :], h, 0.0), 1), d_mask)

            # Read again what the loop over states did not need: registers are what it is short of.
            ut = load_tile(u, u_strides, batch, d, t, mask)
            dut = dx * dt
            if D is not None:
                y += skip[:, None] * ut
                dut += skip[:, None] * dy
                sum_D += tl.sum(dy * ut, 1)
            store_tile(du, out_strides, batch, d, t, mask, dut)
            if z is not None:
                gate = load_tile(z, z_strides, batch, d, t, mask)
                sg = sigmoid(gate)
                dgate = load_tile(dout, dout_strides, batch, d, t, mask) * y
                store_tile(dz, out_strides, batch, d, t, mask, dgate * sg * (1.0 + gate * (1.0 - sg)))
            ddt = dx * ut + ddt * LN2
            if SOFTPLUS:
                _, raw = load_step(delta, delta_strides, bias, batch, d, t, mask, False)
                ddt *= sigmoid(raw)
            store_tile(ddelta, out_strides, batch, d, t, mask, ddt)
            sum_bias += tl.sum(tl.where(mask, ddt, 0.0), 1)
            tl.debug_barrier()  # the thread that reads a carry or a sum is not the one that wrote it

        if D is not None:
            tl.store(dD + batch * dim + d, sum_D, mask=d_mask)
        if delta_bias is not None:
            tl.store(ddelta_bias + batch * dim + d, sum_bias, mask=d_mask)


MAX_SLABS = 64  # deterministic sums of dB and dC: programs per batch item, each with its own (G, N, L) sums


def _span(dim, coefs):
    """Channels in a row that read one group of B and one of C, and the same for B and for C alone."""
    spans = [dim // coef.shape[1] if coef.dim() == 4 else dim for coef in coefs]
    return math.gcd(*spans), *spans


def _tile(rows, span, seqlen, chunk_size, per_warp):
    """Channels and steps per program, and warps: `per_warp` channels of 128 steps fill a warp's registers.
    More warps share loads (and sectors, with channels side by side) and meet fewer times at an atomic;
    fewer make more programs, which a GPU of 132 multiprocessors needs two of each when rows are few."""
    warps = next((w for w in (4, 2) if rows >= 264 * w * per_warp), 1)
    block_d = common.power_of_2(span, 1, warps * per_warp)
    block_t = min(chunk_size, common.power_of_2(seqlen, 16, chunk_size))
    return block_d, block_t, max(block_d // per_warp, 1)


def _by_step(coef, u, reverse):
    """B or C with its strides (batch, group, state, step, and where step 0 is).

    Copied into aligned rows along the steps, if it does not lie so already and is not larger than u: its
    loads lead the layout of the kernel (see load_coefficient), and all channels of a group read the same."""
    if coef.dim() == 2:
        return coef, (0, 0, 0, 0, 0)
    batch, groups, dstate, seqlen = coef.shape
    strides = coef.stride()
    aligned = strides[3] == 1 and all(stride % 16 == 0 for stride in strides[:3]) and coef.data_ptr() % 16 == 0
    if coef.numel() <= u.numel() and (reverse or not aligned):
        rows = coef.new_empty((batch, groups, dstate, triton.cdiv(seqlen, 16) * 16))
        rows[..., :seqlen] = coef.flip(3) if reverse else coef
        return rows, (*rows.stride(), 0)
    if reverse:
        return coef, (*strides[:3], -strides[3], (seqlen - 1) * strides[3])
    return coef, (*strides, 0)


def _backwards(coef, strides, u, steps):
    """A coefficient laid out by step, read from the end of the last of `steps` steps (not all of which exist)."""
    if coef.dim() == 2:
        return coef, strides
    if coef.numel() > u.numel():
        return coef, (*strides[:3], -strides[3], strides[4] + (steps - 1) * strides[3])
    batch, groups, dstate, seqlen = (*coef.shape[:3], u.shape[2])
    rows = coef.new_empty((batch, groups, dstate, steps))
    rows[..., steps - seqlen :] = coef[..., :seqlen].flip(3)
    return rows, (*rows.stride(), 0)


def _sequences(cu_seqlens, seqlen):
    """The packed sequence that each position belongs to (never an empty one)."""
    if cu_seqlens is None:
        return None
    positions = torch.arange(seqlen, device=cu_seqlens.device)
    return torch.searchsorted(cu_seqlens, positions, right=True, out_int32=True) - 1


def _copy_or_zeros(state, rows, A):
    return A.new_zeros((rows, *A.shape)) if state is None else state.clone()


def selective_scan_fwd(
    u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens, delta_softplus, reverse, bld, deterministic,
    chunk_size,
):  # fmt: skip
    from trifuse.registration.selective_scan import CHUNK_SIZE, empty_sequence, state_rows

    batch, dim, seqlen = u.shape
    dstate = A.shape[1]
    out = empty_sequence(u, bld)
    # Without packing, last_state is where tiles hand the state on; empty sequences keep their first one.
    last_state = _copy_or_zeros(initial_state, state_rows(u, cu_seqlens), A)
    n_chunks = triton.cdiv(seqlen, chunk_size or CHUNK_SIZE["triton"])
    chunk_states = A.new_empty((batch, n_chunks if chunk_size else 0, dstate, dim))
    if out.numel() == 0:
        return out, last_state, chunk_states

    span, B_span, C_span = _span(dim, (B, C))
    B, B_strides = _by_step(B, u, reverse)
    C, C_strides = _by_step(C, u, reverse)
    rows = batch * dim
    block_d, block_t, warps = _tile(rows, span, seqlen, chunk_size or CHUNK_SIZE["triton"], 4 if rows >= 8192 else 2)
    n_blocks = dim // span * triton.cdiv(span, block_d)
    common.launch(
        _fwd_kernel, (batch * n_blocks,),
        u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens, _sequences(cu_seqlens, seqlen), out, last_state,
        last_state if cu_seqlens is None else A.new_zeros((1, dim, dstate)), chunk_states if chunk_size else None,
        u.stride(), delta.stride(), (u if z is None else z).stride(), out.stride(), B_strides, C_strides,
        dim, seqlen, dstate, n_blocks, n_chunks, span, B_span, C_span,
        B_VARIES=B.dim() == 4, C_VARIES=C.dim() == 4, SOFTPLUS=delta_softplus, REVERSE=reverse,
        EVEN_T=seqlen % block_t == 0, EVEN_D=span % block_d == 0, BLOCK_D=block_d, BLOCK_T=block_t, num_warps=warps,
    )  # fmt: skip
    return out, last_state, chunk_states


def selective_scan_bwd(
    dout, dlast_state, u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens, chunk_states, delta_softplus,
    reverse, bld, deterministic, chunk_size,
):  # fmt: skip
    from trifuse.registration.selective_scan import empty_coefficient, empty_sequence, state_rows

    batch, dim, seqlen = u.shape
    dstate = A.shape[1]
    dlast_state = None if dlast_state is None else dlast_state.contiguous()
    du, ddelta = empty_sequence(u, bld), empty_sequence(u, bld)
    dz = u.new_empty((0,)) if z is None else empty_sequence(u, bld)
    # Like last_state going forward; its start is what comes in from outside.
    carry = _copy_or_zeros(dlast_state, state_rows(u, cu_seqlens), A)
    dinitial_state = carry
    if cu_seqlens is not None:
        carry = A.new_zeros((1, dim, dstate))
    sums = [A.new_zeros((batch, dim, dstate)), None, None]  # of A, and of B and C
    weights = [A.new_zeros((batch, dim)) for _ in range(2)]  # of D and delta_bias

    span, B_span, C_span = _span(dim, (B, C))
    per_warp = 2 if cu_seqlens is None else 1  # packing takes registers too
    block_d, block_t, warps = _tile(batch * dim, span, seqlen, chunk_size, per_warp)
    blocks_per_span = triton.cdiv(span, block_d)
    n_blocks = dim // span * blocks_per_span
    varies = B.dim() == 4 or C.dim() == 4
    blocks_each = triton.cdiv(n_blocks, MAX_SLABS) if deterministic and varies else 1
    for k, (coef, coef_span) in enumerate(((B, B_span), (C, C_span)), start=1):
        blocks = coef_span // span * blocks_per_span
        if coef.dim() == 2:
            sums[k] = torch.zeros_like(sums[0])
        else:
            slabs = triton.cdiv(blocks, blocks_each) + (n_blocks > blocks) if deterministic else 1
            sums[k] = A.new_zeros((slabs, *coef.shape))

    if du.numel() > 0:
        programs, n_chunks = triton.cdiv(n_blocks, blocks_each), triton.cdiv(seqlen, chunk_size)
        B_steps, B_strides = _by_step(B, u, reverse)
        C_steps, C_strides = _by_step(C, u, reverse)
        C_back, C_back_strides = _backwards(C_steps, C_strides, u, n_chunks * block_t)
        common.launch(
            _bwd_kernel, (batch * programs,),
            dout, dlast_state, u, delta, A, B_steps, C_steps, C_back, D, z, delta_bias, initial_state, cu_seqlens,
            _sequences(cu_seqlens, seqlen), chunk_states, du, ddelta, *sums, weights[0], dz, weights[1],
            dinitial_state, carry, dout.stride(), u.stride(), delta.stride(), (u if z is None else z).stride(),
            du.stride(), B_strides, C_strides, C_back_strides, _sum_strides(sums[1]), _sum_strides(sums[2]),
            dim, seqlen, dstate, n_blocks, n_chunks, span, B_span, C_span, blocks_each, programs,
            B_VARIES=B.dim() == 4, C_VARIES=C.dim() == 4, SOFTPLUS=delta_softplus, REVERSE=reverse,
            ATOMIC=not deterministic, EVEN_T=seqlen % block_t == 0, EVEN_D=span % block_d == 0,
            BLOCK_D=block_d, BLOCK_T=block_t, STEPS=block_t.bit_length() - 1, num_warps=warps,
        )  # fmt: skip

    none = A.new_empty((0,))
    dB, dC = (empty_coefficient(coef, coef.dtype, bld) for coef in (B, C))
    for grad, total in ((dB, sums[1]), (dC, sums[2])):
        total = total.sum(0)
        grad.copy_(total.flip(3) if reverse and grad.dim() == 4 else total)
    return (
        du, ddelta, sums[0].sum(0), dB, dC, none if D is None else weights[0].sum(0), dz,
        torch.empty_like(none) if delta_bias is None else weights[1].sum(0),
        torch.empty_like(none) if initial_state is None else dinitial_state,
    )  # fmt: skip


def _sum_strides(sums):
    """(batch, group, state, step, where step 0 is, slab) of the sums of a variable coefficient."""
    return (*sums.stride()[1:], 0, sums.stride(0)) if sums.dim() == 5 else (0, 0, 0, 0, 0, 0)
