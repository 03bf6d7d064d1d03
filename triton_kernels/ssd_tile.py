"""The pieces of a tile that the kernels of the SSD share, in Triton.

Time is cut into fixed windows of CHUNK positions; a window is one tile of BLOCK_T rows. Where sequences
meet inside a window it falls into parts, runs of one sequence, which a kernel takes one after another:
no operand of a product ever holds rows of two sequences, so NaN in one cannot reach the other.

`steps` holds three planes (batch, head, position): the step size, and the sum of step * A * log2(e) since the
start of the part in two float32, whose differences keep their relative precision however long the sum.
"""

import triton
import triton.language as tl

from trifuse.triton_kernels.common import sigmoid, wide

__all__ = [
    "add_restarting", "decays", "dot", "ends_at", "load_dout", "load_rows", "load_square", "load_states", "log2_sums",
    "only_if", "pair_decays", "rough_dot", "row_offsets", "square_offset", "state_offsets", "step_sizes", "store_rows",
]  # fmt: skip


@triton.jit
def dot(a, b, FULL: tl.constexpr):
    """a @ b as exact as float32 allows. Operands of half precision hold exact values: two of one dtype need
    one pass, a bfloat16 beside a float32 three, for the 24 bits of the other split into three bfloat16."""
    if a.dtype == b.dtype:
        if a.dtype == tl.float32:
            return tl.dot(a, b, input_precision=FULL)
        else:
            return tl.dot(a, b)
    elif a.dtype == tl.bfloat16:
        high, middle, low = split(b)
        return tl.dot(a, high, tl.dot(a, middle, tl.dot(a, low)))
    elif b.dtype == tl.bfloat16:
        high, middle, low = split(a)
        return tl.dot(high, b, tl.dot(middle, b, tl.dot(low, b)))
    else:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision=FULL)


@triton.jit
def split(x):
    high = x.to(tl.bfloat16)
    rest = x - high.to(tl.float32)
    middle = rest.to(tl.bfloat16)
    return high, middle, (rest - middle.to(tl.float32)).to(tl.bfloat16)


@triton.jit
def rough_dot(a, b, like, FULL: tl.constexpr):
    """a @ b for a result that will be rounded to the dtype `like` points to: its precision is enough.
    For float16 that of TF32, which has the same 11 bits, because float16 has not the range."""
    if like.dtype.element_ty == tl.bfloat16:
        return tl.dot(a.to(tl.bfloat16), b.to(tl.bfloat16))
    elif like.dtype.element_ty == tl.float16 and FULL == "tf32x3":
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="tf32")
    else:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision=FULL)


@triton.jit
def add_restarting(first1, sum1, first2, sum2):
    """Sums that start again at rows marked `first`. Selected, not multiplied by zero: NaN stays behind."""
    return first1 | first2, tl.where(first2 != 0, sum2, sum1 + sum2)


@triton.jit
def only_if(mask, condition):
    """The mask, or nothing. (A scalar condition widens to an integer in the interpreter.)"""
    return mask & ((tl.zeros(mask.shape, tl.int32) + condition.to(tl.int32)) != 0)


@triton.jit
def ends_at(ends, row, last):
    """The end of the run that starts or goes on at a position, no later than `last`; `row` is batch * L."""
    return tl.minimum(tl.load(ends + row).to(tl.int64), last)


@triton.jit
def row_offsets(strides, batch, t, at, i):
    """Of a tile of rows t and columns i (channels or states) of head or group `at`, in (B, L, H, P) strides."""
    return (batch * strides[0] + at * strides[2]) + (t * strides[1])[:, None] + (wide(i) * strides[3])[None, :]


@triton.jit
def load_rows(ptr, strides, batch, t, at, i, t_mask, i_mask):
    mask = t_mask[:, None] & i_mask[None, :]
    return tl.load(ptr + row_offsets(strides, batch, t, at, i), mask=mask, other=0.0)


@triton.jit
def store_rows(ptr, strides, batch, t, at, i, t_mask, i_mask, value):
    mask = t_mask[:, None] & i_mask[None, :]
    tl.store(ptr + row_offsets(strides, batch, t, at, i), value.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def load_dout(dout, dout_strides, z, z_strides, batch, t, head, p, t_mask, p_mask):
    """The gradient of the output before its gate; of dout's own dtype, an exact one, where there is no gate."""
    dy = load_rows(dout, dout_strides, batch, t, head, p, t_mask, p_mask)
    if z is not None:
        gate = load_rows(z, z_strides, batch, t, head, p, t_mask, p_mask).to(tl.float32)
        dy = dy.to(tl.float32) * (gate * sigmoid(gate))
    return dy


@triton.jit
def step_sizes(steps, row, t, mask):
    """Step sizes of a part; `row` is (batch * H + head) * L."""
    return tl.load(steps + row + t, mask=mask, other=0.0)


@triton.jit
def log2_sums(steps, row, plane, t, mask):
    """What decays: the sums as a pair of float32 tiles."""
    base = steps + plane + row + t
    return tl.load(base, mask=mask, other=0.0), tl.load(base + plane, mask=mask, other=0.0)


@triton.jit
def decays(steps, row, plane, t, hi, mask, FROM_START: tl.constexpr):
    """The decay from the state before a part to each of its rows, or from each row to the state after the part,
    and the decay of the whole part."""
    high, low = log2_sums(steps, row, plane, t, mask)
    total_high = tl.load(steps + plane + row + hi - 1)
    total_low = tl.load(steps + plane + plane + row + hi - 1)
    exponent = high + low if FROM_START else (total_high - high) + (total_low - low)
    return tl.where(mask, tl.exp2(exponent), 0.0), tl.exp2(total_high + total_low)


@triton.jit
def pair_decays(steps, row, plane, t, mask):
    """The decays from each row s of a part (columns) to each row t not before it, and which those are."""
    high, low = log2_sums(steps, row, plane, t, mask)
    valid = (t[:, None] >= t[None, :]) & mask[:, None] & mask[None, :]
    exponent = (high[:, None] - high[None, :]) + (low[:, None] - low[None, :])
    return tl.exp2(tl.where(valid, exponent, 0.0)), valid


@triton.jit
def square_offset(batch, window, n_windows, group, groups, BLOCK_T: tl.constexpr):
    """Where the (BLOCK_T, BLOCK_T) matrix of a window and group lies."""
    return ((batch * n_windows + window) * groups + group) * (BLOCK_T * BLOCK_T)


@triton.jit
def load_square(ptr, offset, mask, BLOCK_T: tl.constexpr):
    """A window's matrix where `mask` holds, and 0 elsewhere."""
    i = tl.arange(0, BLOCK_T)
    return tl.load(ptr + offset + i[:, None] * BLOCK_T + i[None, :], mask=mask, other=0.0)


@triton.jit
def state_offsets(row, p, n, headdim, dstate):
    """Of rows p and columns n of a state; `row` counts (P, N) matrices."""
    return row * headdim * dstate + p * dstate + n


@triton.jit
def load_states(
    states, outer, position, rows, window, n_windows, batch, head, heads, seqlen, p, n, mask, headdim, dstate,
    inside, RUNS: tl.constexpr,
):  # fmt: skip
    """The state that enters a part, or the gradient that comes back to it, at p and n (of one shape together).

    What crosses a window's border is in `states`; with runs, what begins or ends inside comes from the row
    rows[position] of `outer`, if there is one. `inside`: this part does not reach across the border."""
    row = batch * n_windows + window
    if RUNS:
        if outer is not None:
            from_row = wide(tl.load(rows + batch * seqlen + position))
            there = from_row >= 0
            if states is not None:
                there = there | (inside == 0)
                row = tl.where(inside, from_row, row)
                states = tl.where(inside, outer, states)
            else:
                there = there & (inside != 0)
                row = from_row
                states = outer
            mask = only_if(mask, there)
        else:
            mask = only_if(mask, inside == 0)
    at = state_offsets(row * heads + head, p, n, headdim, dstate)
    return tl.load(states + at, mask=mask, other=0.0)
