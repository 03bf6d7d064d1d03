"""The causal depthwise convolution in Triton: forward and backward, with everything fused.

A program holds a tile of channels x positions and reads every tap of it from memory, of which the caches
keep what neighbours share. Backward, it computes the sums of the W - 1 positions after its own again, so
that nothing between dy and dx is stored.
"""

import torch
import triton
import triton.language as tl

from trifuse.triton_kernels import common
from trifuse.triton_kernels.causal_conv1d_tile import (
    convolved,
    initial_counts,
    last_run,
    places,
    silu,
    silu_slope,
    tap,
    tap_counts,
)
from trifuse.triton_kernels.causal_conv1d_update import causal_conv1d_update
from trifuse.triton_kernels.common import load_tile, store_tile, wide

__all__ = ["causal_conv1d_bwd", "causal_conv1d_fwd", "causal_conv1d_update"]


@triton.jit
def _tile(dim, n_blocks, n_tiles, BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr):
    """Batch item, channels and positions of a program."""
    tile = tl.program_id(0) % n_tiles
    block = (tl.program_id(0) // n_tiles) % n_blocks
    batch = wide(tl.program_id(0) // n_tiles // n_blocks)
    d = wide(block) * BLOCK_D + tl.arange(0, BLOCK_D)
    q = wide(tile) * BLOCK_T + tl.arange(0, BLOCK_T)
    return batch, d, d < dim, q, tile


@triton.jit
def _fwd_kernel(
    x, weight, bias, initial_states, seq_idx, sequence, cu_seqlens, y, x_strides, y_strides,
    dim, seqlen, n_blocks, n_tiles,
    SILU: tl.constexpr, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    batch, d, d_mask, q, _ = _tile(dim, n_blocks, n_tiles, BLOCK_D, BLOCK_T)
    there = q < seqlen
    row, start, _, ids = places(seq_idx, sequence, cu_seqlens, batch, q, there, seqlen)
    out = convolved(
        x, x_strides, weight, bias, initial_states, seq_idx, batch, d, d_mask, q, there, row, start, ids, dim, seqlen,
        WIDTH,
    )  # fmt: skip
    if SILU:
        out = silu(out)
    if seq_idx is not None:
        out = tl.where((ids >= 0)[None, :], out, 0.0)
    store_tile(y, y_strides, batch, d, q, d_mask[:, None] & there[None, :], out)


@triton.jit
def _gradient(
    dy, dy_strides, x, x_strides, weight, bias, initial_states, seq_idx, batch, d, d_mask, q, there, row, start, ids,
    dim, seqlen, SILU: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """The gradient of the convolution's sums at positions q."""
    live = there
    if seq_idx is not None:
        live = there & (ids >= 0)
    live = d_mask[:, None] & live[None, :]
    g = load_tile(dy, dy_strides, batch, d, q, live)
    if SILU:
        total = convolved(
            x, x_strides, weight, bias, initial_states, seq_idx, batch, d, d_mask, q, there, row, start, ids, dim,
            seqlen, WIDTH,
        )  # fmt: skip
        g = tl.where(live, g * silu_slope(total), 0.0)
    return g


@triton.jit
def _bwd_kernel(
    dy, dfinal_states, x, weight, bias, initial_states, seq_idx, sequence, cu_seqlens, runs, dx, partials,
    dy_strides, x_strides, dx_strides, dim, seqlen, n_blocks, n_tiles,
    SILU: tl.constexpr, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    batch, d, d_mask, q, tile = _tile(dim, n_blocks, n_tiles, BLOCK_D, BLOCK_T)
    there = q < seqlen
    row, start, end, ids = places(seq_idx, sequence, cu_seqlens, batch, q, there, seqlen)
    g = _gradient(
        dy, dy_strides, x, x_strides, weight, bias, initial_states, seq_idx, batch, d, d_mask, q, there, row, start,
        ids, dim, seqlen, SILU, WIDTH,
    )  # fmt: skip

    initial = None
    if initial_states is not None:
        initial = initial_counts(seq_idx, batch, q, start, ids, there, seqlen, WIDTH)
    sums = partials + (batch * n_tiles + tile) * (WIDTH + 1) * dim + d
    for w in tl.static_range(WIDTH):
        value = tap(
            x, x_strides, initial_states, seq_idx, batch, d, d_mask, q, there, row, start, ids, initial, dim, seqlen,
            WIDTH - 1 - w, WIDTH,
        )  # fmt: skip
        tl.store(sums + w * dim, tl.sum(g * value, 1), mask=d_mask)
    tl.store(sums + WIDTH * dim, tl.sum(g, 1), mask=d_mask)

    total = tl.load(weight + d * WIDTH + WIDTH - 1, mask=d_mask, other=0.0)[:, None] * g
    for k in tl.static_range(1, WIDTH):
        after = q + k
        there_after = after < seqlen
        row_after, start_after, _, ids_after = places(seq_idx, sequence, cu_seqlens, batch, after, there_after, seqlen)
        g_after = _gradient(
            dy, dy_strides, x, x_strides, weight, bias, initial_states, seq_idx, batch, d, d_mask, after, there_after,
            row_after, start_after, ids_after, dim, seqlen, SILU, WIDTH,
        )  # fmt: skip
        counts = tap_counts(seq_idx, batch, after, start_after, ids_after, there_after, seqlen, k)
        w_k = tl.load(weight + d * WIDTH + WIDTH - 1 - k, mask=d_mask, other=0.0)[:, None]
        total += tl.where(counts[None, :], w_k * g_after, 0.0)
    if dfinal_states is not None:
        first, last = last_run(runs, row, start, end, there)
        entry = q - last + WIDTH - 1
        final = there & (entry >= 0) & (q < last) & (q >= first)
        at = dfinal_states + (row[None, :] * dim + d[:, None]) * (WIDTH - 1) + entry[None, :]
        total += tl.load(at, mask=d_mask[:, None] & final[None, :], other=0.0).to(tl.float32)
    store_tile(dx, dx_strides, batch, d, q, d_mask[:, None] & there[None, :], total)


@triton.jit
def _runs_kernel(seq_idx, cu_seqlens, runs, seqlen, BLOCK_T: tl.constexpr):
    """Of every row, where its last run of one id that is not padding begins and ends."""
    row = wide(tl.program_id(0))
    start = wide(0)
    end = wide(0) + seqlen
    ids = seq_idx + row * seqlen
    if cu_seqlens is not None:
        start = tl.load(cu_seqlens + row)
        end = tl.load(cu_seqlens + row + 1)
        ids = seq_idx
    i = tl.arange(0, BLOCK_T)
    last = start
    for tile in range(tl.cdiv(end - start, BLOCK_T)):
        q = start + wide(tile) * BLOCK_T + i
        here = tl.load(ids + q, mask=q < end, other=-1)
        last = tl.maximum(last, tl.max(tl.where(here >= 0, q + 1, 0), 0))
    own = tl.load(ids + last - 1, mask=last > start, other=-1)
    first = start
    for tile in range(tl.cdiv(last - start, BLOCK_T)):
        q = start + wide(tile) * BLOCK_T + i
        here = tl.load(ids + q, mask=q < last, other=0)
        first = tl.maximum(first, tl.max(tl.where((q < last) & (here != own), q + 1, 0), 0))
    tl.store(runs + row * 2, first)
    tl.store(runs + row * 2 + 1, last)


@triton.jit
def _row(seq_idx, cu_seqlens, runs, dim, seqlen, n_blocks, BLOCK_D: tl.constexpr):
    """Row, batch item, channels, and of the row: start, end, and its last run."""
    row = wide(tl.program_id(0) // n_blocks)
    d = wide(tl.program_id(0) % n_blocks) * BLOCK_D + tl.arange(0, BLOCK_D)
    batch = row
    start = wide(0)
    end = wide(0) + seqlen
    if cu_seqlens is not None:
        batch = wide(0)
        start = tl.load(cu_seqlens + row)
        end = tl.load(cu_seqlens + row + 1)
    first, last = last_run(runs, row, start, end, row >= 0)
    return row, batch, d, d < dim, start, end, first, last


@triton.jit
def _final_kernel(
    x, initial_states, seq_idx, cu_seqlens, runs, final_states, x_strides, dim, seqlen, n_blocks,
    WIDTH: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    row, batch, d, d_mask, start, _, first, last = _row(seq_idx, cu_seqlens, runs, dim, seqlen, n_blocks, BLOCK_D)
    rows = (row * dim + d) * (WIDTH - 1)
    for j in tl.static_range(WIDTH - 1):
        q = d * 0 + last - (WIDTH - 1) + j
        at = x + batch * x_strides[0] + d * x_strides[1] + q * x_strides[2]
        value = tl.load(at, mask=d_mask & (q >= first), other=0.0)
        if initial_states is not None:
            left = d_mask & (q < start) & (d * 0 + first == start)
            value += tl.load(initial_states + rows + (WIDTH - 1 + q - start), mask=left, other=0.0)
        tl.store(final_states + rows + j, value, mask=d_mask)


@triton.jit
def _dinitial_kernel(
    dy, dfinal_states, x, weight, bias, initial_states, seq_idx, cu_seqlens, runs, dinitial_states,
    dy_strides, x_strides, dim, seqlen, n_blocks,
    SILU: tl.constexpr, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """From the first positions, whose taps read the initial states, and from the final states where the row is
    too short to have filled them."""
    row, batch, d, d_mask, start, end, first, last = _row(seq_idx, cu_seqlens, runs, dim, seqlen, n_blocks, BLOCK_D)
    i = tl.arange(0, BLOCK_T)
    q = start + i
    there = (q < end) & (i < WIDTH - 1)
    ids = (q * 0).to(tl.int32)
    if seq_idx is not None:
        ids = tl.load(seq_idx + batch * seqlen + q, mask=there, other=-1)
    starts = q * 0 + start
    there = initial_counts(seq_idx, batch, q, starts, ids, there, seqlen, WIDTH)
    g = _gradient(
        dy, dy_strides, x, x_strides, weight, bias, initial_states, seq_idx, batch, d, d_mask, q, there, q * 0 + row,
        starts, ids, dim, seqlen, SILU, WIDTH,
    )  # fmt: skip
    rows = (row * dim + d) * (WIDTH - 1)
    for j in tl.static_range(WIDTH - 1):
        # Entry j is read by tap W - 1 - j + i of position i, for i up to j.
        w = tl.load(weight + d[:, None] * WIDTH + (j - i)[None, :], mask=d_mask[:, None] & (i <= j)[None, :], other=0.0)
        total = tl.sum(w * g, 1)
        if dfinal_states is not None:
            entry = d * 0 + j - (last - start)
            left = d_mask & (entry >= 0) & (d * 0 + first == start)
            total += tl.load(dfinal_states + rows + entry, mask=left, other=0.0).to(tl.float32)
        tl.store(dinitial_states + rows + j, total.to(dinitial_states.dtype.element_ty), mask=d_mask)


def _sequences(cu_seqlens, seqlen):
    """The packed sequence of every position, int32 (L,)."""
    if cu_seqlens is None:
        return None
    places = torch.arange(seqlen, device=cu_seqlens.device)
    return torch.searchsorted(cu_seqlens[1:], places, right=True, out_int32=True)


def _blocks(x, most, width, edges):
    """Channels and positions of a tile of at most about `most` numbers, half as many for many taps and half as
    many where sequences have edges, which both take registers; longest along what is contiguous."""
    _, dim, seqlen = x.shape
    most >>= (width > 4) + edges
    if abs(x.stride(1)) < abs(x.stride(2)):
        block_d = common.power_of_2(dim, 1, 64)
        return block_d, common.power_of_2(seqlen, 1, max(most // block_d, 1))
    block_t = common.power_of_2(seqlen, 1, 256)
    return common.power_of_2(dim, 1, max(most // block_t, 1)), block_t


def _runs(seq_idx, cu_seqlens, rows, seqlen):
    """(rows, 2): where the last run of each row begins and ends; None where that is the sequence."""
    if seq_idx is None:
        return None
    runs = torch.empty((rows, 2), dtype=torch.int64, device=seq_idx.device)
    if rows > 0:
        block_t = common.power_of_2(seqlen, 16, 1024)
        common.launch(_runs_kernel, (rows,), seq_idx, cu_seqlens, runs, seqlen, BLOCK_T=block_t, num_warps=4)
    return runs


def causal_conv1d_fwd(x, weight, bias, initial_states, seq_idx, cu_seqlens, silu, bld, deterministic, return_final):
    from trifuse.registration.common import empty_sequence, state_rows

    batch, dim, seqlen = x.shape
    width = weight.shape[1]
    rows = state_rows(x, cu_seqlens)
    y = empty_sequence(x, bld)
    if y.numel() > 0:
        block_d, block_t = _blocks(x, 2048, width, seq_idx is not None or cu_seqlens is not None)
        n_blocks, n_tiles = triton.cdiv(dim, block_d), triton.cdiv(seqlen, block_t)
        common.launch(
            _fwd_kernel, (batch * n_blocks * n_tiles,),
            x, weight, bias, initial_states, seq_idx, _sequences(cu_seqlens, seqlen), cu_seqlens, y, x.stride(),
            y.stride(), dim, seqlen, n_blocks, n_tiles,
            SILU=silu, WIDTH=width, BLOCK_D=block_d, BLOCK_T=block_t, num_warps=4,
        )  # fmt: skip
    final_states = x.new_empty((rows, dim, width - 1) if return_final else (0,))
    if final_states.numel() > 0:
        block_d = common.power_of_2(dim, 1, 128)
        n_blocks = triton.cdiv(dim, block_d)
        common.launch(
            _final_kernel, (rows * n_blocks,),
            x, initial_states, seq_idx, cu_seqlens, _runs(seq_idx, cu_seqlens, rows, seqlen), final_states, x.stride(),
            dim, seqlen, n_blocks, WIDTH=width, BLOCK_D=block_d, num_warps=2,
        )  # fmt: skip
    return y, final_states


def causal_conv1d_bwd(
    dy, dfinal_states, x, weight, bias, initial_states, seq_idx, cu_seqlens, silu, bld, deterministic,
):  # fmt: skip
    from trifuse.registration.common import empty_sequence, state_rows

    batch, dim, seqlen = x.shape
    width = weight.shape[1]
    rows = state_rows(x, cu_seqlens)
    dfinal_states = None if dfinal_states is None else dfinal_states.contiguous()
    runs = None if dfinal_states is None else _runs(seq_idx, cu_seqlens, rows, seqlen)
    dx = empty_sequence(x, bld)
    partials = weight.new_empty((0, width + 1, dim))
    if dx.numel() > 0:
        block_d, block_t = _blocks(x, 1024, width, seq_idx is not None or cu_seqlens is not None)
        n_blocks, n_tiles = triton.cdiv(dim, block_d), triton.cdiv(seqlen, block_t)
        partials = weight.new_empty((batch * n_tiles, width + 1, dim))
        common.launch(
            _bwd_kernel, (batch * n_blocks * n_tiles,),
            dy, dfinal_states, x, weight, bias, initial_states, seq_idx, _sequences(cu_seqlens, seqlen), cu_seqlens,
            runs, dx, partials, dy.stride(), x.stride(), dx.stride(), dim, seqlen, n_blocks, n_tiles,
            SILU=silu, WIDTH=width, BLOCK_D=block_d, BLOCK_T=block_t, num_warps=4,
        )  # fmt: skip
    dinitial_states = x.new_empty((0,) if initial_states is None else (rows, dim, width - 1))
    if dinitial_states.numel() > 0:
        block_d = common.power_of_2(dim, 1, 64)
        n_blocks = triton.cdiv(dim, block_d)
        common.launch(
            _dinitial_kernel, (rows * n_blocks,),
            dy, dfinal_states, x, weight, bias, initial_states, seq_idx, cu_seqlens, runs, dinitial_states,
            dy.stride(), x.stride(), dim, seqlen, n_blocks,
            SILU=silu, WIDTH=width, BLOCK_D=block_d, BLOCK_T=8, num_warps=2,
        )  # fmt: skip
    sums = partials.sum(0)  # in a fixed order, so always deterministic
    dbias = weight.new_empty((0,)) if bias is None else sums[width].clone()
    return dx, sums[:width].t().contiguous(), dbias, dinitial_states
