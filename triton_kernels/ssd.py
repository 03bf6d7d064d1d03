"""The state-space dual of Mamba-2 in Triton: chunks as matrix products on tensor cores, states between them.

Time is cut into windows of `chunk_size`; a window is one tile. Forward: step sizes and the sums that decay
(`steps_kernel`), C B^T per group (`products_kernel`), the state before each window (`states_kernel`), the output
(`out_kernel`). One window with no state asked for builds no state. Backward the mirror image, see ssd_bwd.py.
Everything is deterministic: no program adds to what another writes.

Precision. Sequences of half precision give float32 gradients of A, D, dt_bias and the states, and what leads
there is computed to 24 bits; what ends in a sequence dtype takes one pass in it (see `dot` and `rough_dot`).
Products of float32 are "tf32x3" on NVIDIA: its 22 bits keep an error of about 2 ulp of the largest element, which
the recurrence itself exceeds, and "ieee" would leave the tensor cores. AMD's matrix cores take float32 as it is.
"""

import torch
import triton

from trifuse.registration.common import interpreting, state_rows
from trifuse.triton_kernels import common
from trifuse.triton_kernels.ssd_bwd import coefficient_kernel, dt_kernel, dx_kernel, pairs_kernel
from trifuse.triton_kernels.ssd_chunk import out_kernel, products_kernel, steps_kernel
from trifuse.triton_kernels.ssd_states import dstates_kernel, states_kernel

__all__ = ["ssd_bwd", "ssd_fwd"]

PROGRAMS = 528  # four for each of 132 multiprocessors: as many as the sums over heads are cut up for
HEADS = 8  # per tile of the kernels that take (heads, positions)


# Kernel: BLOCK_P, BLOCK_N and warps, for float32 and for half precision.
TILES = {
    "products": ((64, 32, 4), (64, 64, 4)),
    "states": ((32, 64, 8), (32, 64, 8)),
    "dstates": ((32, 64, 8), (32, 64, 8)),
    "out": ((64, 32, 8), (64, 64, 8)),
    "dx": ((32, 32, 8), (64, 64, 8)),
    "pairs": ((32, 32, 8), (32, 32, 8)),
    "coefficient": ((32, 64, 8), (32, 64, 8)),
}
# Where matrix cores read both operands from registers: NVIDIA's but for Hopper and the Blackwell of data centres.
SMALL_TILES = TILES | {
    "out": ((32, 32, 8), (64, 64, 8)),
    "dx": ((16, 32, 8), (64, 64, 8)),
    "pairs": ((16, 32, 8), (32, 32, 8)),
    "coefficient": ((32, 16, 8), (32, 32, 8)),
}


def _machine():
    """How tl.dot multiplies float32 to nearly its own precision on the matrix cores of this GPU, and the tiles
    whose registers suffice there (as compiled; not yet measured on a GPU)."""
    if interpreting():
        return "ieee", TILES
    target = triton.runtime.driver.active.get_current_target()
    if target.backend != "cuda":
        return "ieee", TILES
    return "tf32x3", TILES if 90 <= target.arch < 120 else SMALL_TILES


def _runs(x, seq_idx, cu_seqlens):
    """Per position, the start and the end of its run of one sequence, and the rows of `initial_states` that
    enter it and of `final_states` that it ends in (-1: none); Nones where each batch item is one run."""
    if seq_idx is None and cu_seqlens is None:
        return None, None, None, None
    batch, seqlen = x.shape[:2]
    position = torch.arange(seqlen, device=x.device)
    first = (position == 0).expand(batch, seqlen)
    row, row_start, row_end = torch.arange(batch, device=x.device)[:, None], 0, seqlen
    if cu_seqlens is not None:
        row = torch.searchsorted(cu_seqlens, position, right=True) - 1  # never an empty sequence
        row_start, row_end = cu_seqlens[row], cu_seqlens[row + 1]
        first = first | (position == row_start)
    if seq_idx is not None:
        changes = torch.zeros((batch, seqlen), dtype=torch.bool, device=x.device)
        changes[:, 1:] = seq_idx[:, 1:] != seq_idx[:, :-1]
        first = first | changes
    starts = torch.where(first, position, 0).cummax(1).values
    last = torch.ones((batch, seqlen), dtype=torch.bool, device=x.device)
    last[:, :-1] = first[:, 1:]
    ends = torch.where(last, position + 1, seqlen).flip(1).cummin(1).values.flip(1)
    entry = torch.where(starts == row_start, row, -1)
    leave = torch.where(ends == row_end, row, -1)
    dtype = torch.int32 if seqlen < 2**31 else torch.int64
    return starts.to(dtype), ends.to(dtype), entry.to(torch.int32).contiguous(), leave.to(torch.int32).contiguous()


class _Windows:
    """What the kernels of both passes are given alike."""

    def __init__(self, x, dt, A, B, C, D, z, dt_bias, seq_idx, cu_seqlens, dt_softplus, dt_min, dt_max, chunk_size):
        self.batch, self.seqlen, self.heads, self.headdim = x.shape
        self.groups, self.dstate = B.shape[2:]
        block_t = common.power_of_2(self.seqlen, 16, triton.next_power_of_2(max(chunk_size, 16)))
        self.chunk, self.n_windows = min(chunk_size, block_t), triton.cdiv(self.seqlen, chunk_size)
        self.full, self.tiles = _machine()
        self.starts, self.ends, self.entry, self.leave = _runs(x, seq_idx, cu_seqlens)
        self.block_t, self.runs = block_t, self.starts is not None
        self.plane = self.batch * self.heads * self.seqlen
        self.D_strides = (0, 0) if D is None else (D.stride(0), D.stride(1) if D.dim() == 2 else 0)
        self.meta = {"CHUNK": self.chunk, "BLOCK_T": block_t}

        self.steps = x.new_empty((3, self.batch, self.heads, self.seqlen), dtype=torch.float32)
        h_blocks = triton.cdiv(self.heads, HEADS)
        common.launch(
            steps_kernel, (self.batch * self.n_windows * h_blocks,),
            dt, A, dt_bias, self.starts, self.steps, dt.stride(), self.heads, self.seqlen, self.n_windows, h_blocks,
            self.plane, dt_min, dt_max,
            SOFTPLUS=dt_softplus, RUNS=self.runs, BLOCK_H=HEADS, num_warps=4, **self.meta,
        )  # fmt: skip
        self.products = self.squares(x)
        _, block_n, warps = self.tile("products", x)
        common.launch(
            products_kernel, (self.batch * self.n_windows * self.groups,),
            B, C, self.products, B.stride(), C.stride(), self.groups, self.seqlen, self.dstate, self.n_windows,
            BLOCK_N=block_n, FULL=self.full, num_warps=warps, **self.meta,
        )  # fmt: skip

    def tile(self, kernel, x):
        """BLOCK_P, BLOCK_N and num_warps of a kernel."""
        block_p, block_n, warps = self.tiles[kernel][x.dtype != torch.float32]
        return common.power_of_2(self.headdim, 16, block_p), common.power_of_2(self.dstate, 16, block_n), warps

    def squares(self, x, *slabs):
        size = (*slabs, self.batch, self.n_windows, self.groups, self.block_t, self.block_t)
        return x.new_empty(size, dtype=torch.float32)

    def states(self, x):
        size = (self.batch, self.n_windows, self.heads, self.headdim, self.dstate)
        return x.new_empty(size, dtype=torch.float32)

    def state_programs(self, rows, block_p, block_n):
        return (rows * self.heads * triton.cdiv(self.headdim, block_p) * triton.cdiv(self.dstate, block_n),)


def _out(windows, x, C, D, z, states, initial, dout, out):
    """The output into `out`, or with `dout` the gradient of z."""
    w = windows
    block_p, block_n, warps = w.tile("out", x)
    blocks = triton.cdiv(w.headdim, block_p)
    common.launch(
        out_kernel, (w.batch * w.n_windows * w.heads * blocks,),
        x, C, D, z, w.steps, w.products, states, initial, w.starts, w.ends, w.entry, dout, out,
        x.stride(), C.stride(), w.D_strides, (x if z is None else z).stride(), (x if dout is None else dout).stride(),
        out.stride(), w.heads, w.groups, w.seqlen, w.headdim, w.dstate, w.n_windows, blocks, w.plane,
        RUNS=w.runs, BLOCK_P=block_p, BLOCK_N=block_n, FULL=w.full, num_warps=warps, **w.meta,
    )  # fmt: skip


def ssd_fwd(
    x, dt, A, B, C, D, z, dt_bias, initial_states, seq_idx, cu_seqlens, dt_softplus, dt_min, dt_max, deterministic,
    return_final, chunk_size, save,
):  # fmt: skip
    batch, seqlen, heads, headdim = x.shape
    sizes = (heads, headdim, B.shape[3])
    rows = state_rows(x, cu_seqlens)
    out = x.new_empty(x.shape)
    final = A.new_empty((rows if return_final else 0, *sizes))
    n_windows = triton.cdiv(seqlen, chunk_size)
    saved = A.new_empty((batch, n_windows if save and n_windows > 1 else 0, *sizes))
    if out.numel() == 0:
        if return_final:
            final = torch.zeros_like(final) if initial_states is None else initial_states.clone()
        return out, final, saved

    w = _Windows(x, dt, A, B, C, D, z, dt_bias, seq_idx, cu_seqlens, dt_softplus, dt_min, dt_max, chunk_size)
    states = None
    if n_windows > 1:
        states = saved if saved.numel() else w.states(x)
    # One window reads its states, if any, from initial_states.
    outer = initial_states if states is None or w.runs else None
    if (states is not None or return_final) and w.dstate > 0:
        block_p, block_n, warps = w.tile("states", x)
        common.launch(
            states_kernel, w.state_programs(rows, block_p, block_n),
            x, B, w.steps, initial_states, w.starts, w.ends, cu_seqlens, states, final if return_final else None,
            x.stride(), B.stride(), heads, w.groups, seqlen, headdim, w.dstate, n_windows, w.plane,
            RUNS=w.runs, BLOCK_P=block_p, BLOCK_N=block_n, FULL=w.full, num_warps=warps, **w.meta,
        )  # fmt: skip
    if states is None and not w.runs:
        states, outer = outer, None
    _out(w, x, C, D, z, states, outer, None, out)
    return out, final, saved


def ssd_bwd(
    dout, dfinal_states, x, dt, A, B, C, D, z, dt_bias, initial_states, seq_idx, cu_seqlens, chunk_states, dt_softplus,
    dt_min, dt_max, deterministic, chunk_size,
):  # fmt: skip
    none = A.new_empty((0,))
    dx, ddt, dB, dC = (tensor.new_empty(tensor.shape) for tensor in (x, dt, B, C))
    dz = none if z is None else z.new_empty(z.shape)
    if dfinal_states is not None:
        dfinal_states = dfinal_states.contiguous()
    dinitial = torch.empty_like(none) if initial_states is None else torch.empty_like(initial_states)
    if x.numel() == 0:
        if initial_states is not None:
            dinitial = torch.zeros_like(dinitial) if dfinal_states is None else dfinal_states.clone()
        zeros = [none if tensor is None else torch.zeros_like(tensor) for tensor in (A, B, C, D, dt_bias)]
        return dx, torch.zeros_like(ddt), *zeros[:4], dz, zeros[4], dinitial

    w = _Windows(x, dt, A, B, C, D, z, dt_bias, seq_idx, cu_seqlens, dt_softplus, dt_min, dt_max, chunk_size)
    states, outer, dstates, douter = _entering_and_returning(w, x, initial_states, dfinal_states, chunk_states)
    gate_strides = (x if z is None else z).stride()
    if z is not None:
        _out(w, x, C, D, z, states, outer, dout, dz)
    if (dstates is not None and dstates is not dfinal_states) or initial_states is not None:
        rows = state_rows(x, cu_seqlens)
        block_p, block_n, warps = w.tile("dstates", x)
        common.launch(
            dstates_kernel, w.state_programs(rows, block_p, block_n),
            dout, C, z, w.steps, dfinal_states, w.starts, w.ends, cu_seqlens,
            None if dstates is dfinal_states else dstates, None if initial_states is None else dinitial,
            dout.stride(), C.stride(), gate_strides, w.heads, w.groups, w.seqlen, w.headdim, w.dstate, w.n_windows,
            w.plane, RUNS=w.runs, BLOCK_P=block_p, BLOCK_N=block_n, FULL=w.full, num_warps=warps, **w.meta,
        )  # fmt: skip
    dD = _dx(w, dout, x, B, D, z, dstates, douter, dx)
    dproducts, own, crossing = _pairs(w, dout, x, z)
    felt = _coefficient(w, True, dout, z, C, B, dproducts, (states, outer, w.entry), (dstates, douter, w.leave), dC)
    left = _coefficient(w, False, x, None, B, C, dproducts, (dstates, douter, w.leave), (None, None, None), dB)

    shares = [A.new_empty((w.batch * w.n_windows, w.heads)) for _ in range(2)]
    h_blocks = triton.cdiv(w.heads, HEADS)
    common.launch(
        dt_kernel, (w.batch * w.n_windows * h_blocks,),
        dt, A, dt_bias, w.starts, w.ends, w.steps, own, crossing, felt, left, ddt, *shares, dt.stride(), ddt.stride(),
        w.heads, w.seqlen, w.n_windows, h_blocks, triton.cdiv(w.dstate, w.tile("coefficient", x)[1]), w.plane, dt_min,
        dt_max, SOFTPLUS=dt_softplus, RUNS=w.runs, BLOCK_H=HEADS, num_warps=4, **w.meta,
    )  # fmt: skip
    dbias = torch.empty_like(none) if dt_bias is None else shares[1].sum(0)
    return dx, ddt, shares[0].sum(0), dB, dC, dD, dz, dbias, dinitial


def _entering_and_returning(windows, x, initial_states, dfinal_states, chunk_states):
    """Where the kernels find the states before the windows and the gradients after them: per window, and per
    row for what begins or ends inside one. A single window without runs finds them in the rows."""
    w = windows
    if w.dstate == 0:
        return None, None, None, None
    if w.n_windows > 1:
        inside = (initial_states, dfinal_states) if w.runs else (None, None)
        return chunk_states, inside[0], w.states(x), inside[1]
    if w.runs:
        return None, initial_states, None, dfinal_states
    return initial_states, None, dfinal_states, None


def _dx(windows, dout, x, B, D, z, dstates, douter, dx):
    """The gradient of x into `dx`; returns that of D."""
    w = windows
    block_p, block_n, warps = w.tile("dx", x)
    blocks = triton.cdiv(w.headdim, block_p)
    shares = None
    if D is not None:
        shares = D.new_empty((w.batch * w.n_windows, w.heads, w.headdim))
    common.launch(
        dx_kernel, (w.batch * w.n_windows * w.heads * blocks,),
        dout, x, B, D, z, w.steps, w.products, dstates, douter, w.ends, w.leave, dx, shares,
        dout.stride(), x.stride(), B.stride(), w.D_strides, (x if z is None else z).stride(), dx.stride(),
        w.heads, w.groups, w.seqlen, w.headdim, w.dstate, w.n_windows, blocks, w.plane,
        RUNS=w.runs, BLOCK_P=block_p, BLOCK_N=block_n, FULL=w.full, num_warps=warps, **w.meta,
    )  # fmt: skip
    if D is None:
        return x.new_empty((0,), dtype=torch.float32)
    dD = shares.sum(0)
    return dD if D.dim() == 2 else dD.sum(1)


def _pairs(windows, dout, x, z):
    """The gradient of C B^T, and per head and position those of the pairs inside the parts."""
    w = windows
    per_group, programs = w.heads // w.groups, w.batch * w.n_windows * w.groups
    heads_each = triton.cdiv(per_group, min(per_group, triton.cdiv(PROGRAMS, programs)))
    slabs = triton.cdiv(per_group, heads_each)
    dproducts = w.squares(x, slabs)
    own, crossing = (torch.empty_like(w.steps[0]) for _ in range(2))
    block_p, _, warps = w.tile("pairs", x)
    common.launch(
        pairs_kernel, (programs * slabs,),
        dout, x, z, w.steps, w.products, w.ends, dproducts, own, crossing, dout.stride(), x.stride(),
        (x if z is None else z).stride(), dproducts.stride(0), w.heads, w.groups, w.seqlen, w.headdim, w.n_windows,
        slabs, heads_each, w.plane, RUNS=w.runs, BLOCK_P=block_p, FULL=w.full, num_warps=warps, **w.meta,
    )  # fmt: skip
    return dproducts.sum(0) if slabs > 1 else dproducts[0], own, crossing


def _coefficient(windows, for_C, rows, z, mine, other, dproducts, entering, returning, grad):
    """The gradient of C or B into `grad`; returns what the decays do to the states, per block of states."""
    w = windows
    block_p, block_n, warps = w.tile("coefficient", rows)
    blocks = triton.cdiv(w.dstate, block_n)
    stateful = entering[0] is not None or entering[1] is not None
    reach = w.steps.new_empty((blocks, *w.steps.shape[1:])) if stateful else None
    if blocks > 0:
        common.launch(
            coefficient_kernel, (w.batch * w.n_windows * w.groups * blocks,),
            rows, z, mine, other, w.steps, dproducts, *entering, *returning, w.starts, w.ends, reach, grad,
            rows.stride(), (rows if z is None else z).stride(), mine.stride(), other.stride(), grad.stride(),
            w.heads, w.groups, w.seqlen, w.headdim, w.dstate, w.n_windows, blocks, w.plane,
            FOR_C=for_C, RUNS=w.runs, BLOCK_P=block_p, BLOCK_N=block_n, FULL=w.full, num_warps=warps, **w.meta,
        )  # fmt: skip
    return reach
