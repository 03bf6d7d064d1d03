"""One token of the selective scan in Triton, for decoding: the state is changed in place."""

import torch
import triton
import triton.language as tl

from trifuse.triton_kernels import common
from trifuse.triton_kernels.common import LOG2E, sigmoid, softplus, wide

__all__ = ["selective_state_update"]


@triton.jit
def _update_kernel(
    state, x, dt, A, B, C, D, z, dt_bias, state_batch_indices, out,
    state_strides, x_strides, dt_strides, z_strides, out_strides, A_strides, B_strides, C_strides, D_strides,
    bias_strides,
    heads, headdim, dstate, n_blocks, heads_per_B, heads_per_C,
    SOFTPLUS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0) % n_blocks
    head = wide((tl.program_id(0) // n_blocks) % heads)
    batch = wide(tl.program_id(0) // n_blocks // heads)
    p = wide(block) * BLOCK_P + tl.arange(0, BLOCK_P)
    n = wide(0) + tl.arange(0, BLOCK_N)
    in_head, n_mask = p < headdim, n < dstate
    p_mask = in_head
    mask = in_head[:, None] & n_mask[None, :]
    row = batch
    if state_batch_indices is not None:  # a negative row is padding
        row = tl.load(state_batch_indices + batch)
        live = tl.full((BLOCK_P,), 0, tl.int64) + row >= 0
        p_mask = p_mask & live
        mask = mask & live[:, None]

    x += batch * x_strides[0] + head * x_strides[1]
    dt += batch * dt_strides[0] + head * dt_strides[1]
    xp = tl.load(x + p * x_strides[2], mask=p_mask, other=0.0).to(tl.float32)
    step = tl.load(dt + p * dt_strides[2], mask=p_mask, other=0.0).to(tl.float32)
    if dt_bias is not None:
        step += tl.load(dt_bias + head * bias_strides[0] + p * bias_strides[1], mask=p_mask, other=0.0)
    if SOFTPLUS:
        step = softplus(step)

    A += head * A_strides[0]
    decay = tl.load(A + p[:, None] * A_strides[1] + n[None, :] * A_strides[2], mask=mask, other=0.0)
    b_at = B + batch * B_strides[0] + (head // heads_per_B) * B_strides[1] + n * B_strides[2]
    c_at = C + batch * C_strides[0] + (head // heads_per_C) * C_strides[1] + n * C_strides[2]
    b = tl.load(b_at, mask=n_mask, other=0.0).to(tl.float32)
    c = tl.load(c_at, mask=n_mask, other=0.0).to(tl.float32)
    state += row * state_strides[0] + head * state_strides[1]
    state_at = state + p[:, None] * state_strides[2] + n[None, :] * state_strides[3]
    h = tl.load(state_at, mask=mask, other=0.0).to(tl.float32)
    h = tl.exp2(step[:, None] * (decay * LOG2E)) * h + (step * xp)[:, None] * b[None, :]
    tl.store(state_at, h.to(state.dtype.element_ty), mask=mask)

    y = tl.sum(tl.where(n_mask[None, :], h * c[None, :], 0.0), 1)
    if D is not None:
        y += tl.load(D + head * D_strides[0] + p * D_strides[1], mask=p_mask, other=0.0) * xp
    if z is not None:
        z += batch * z_strides[0] + head * z_strides[1]
        gate = tl.load(z + p * z_strides[2], mask=p_mask, other=0.0).to(tl.float32)
        y *= gate * sigmoid(gate)
    if state_batch_indices is not None:
        y = tl.where(live, y, 0.0)
    out += batch * out_strides[0] + head * out_strides[1]
    tl.store(out + p * out_strides[2], y.to(out.dtype.element_ty), mask=in_head)


def selective_state_update(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, state_batch_indices):
    batch, heads, headdim = x.shape
    dstate = A.shape[2]
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    block_n = triton.next_power_of_2(max(dstate, 1))
    block_p = common.power_of_2(headdim, 1, max(512 // block_n, 1))
    n_blocks = triton.cdiv(headdim, block_p)
    common.launch(
        _update_kernel, (batch * heads * n_blocks,),
        state, x, dt, A, B, C, D, z, dt_bias, state_batch_indices, out,
        state.stride(), x.stride(), dt.stride(), (x if z is None else z).stride(), out.stride(), A.stride(), B.stride(),
        C.stride(), (0, 0) if D is None else D.stride(), (0, 0) if dt_bias is None else dt_bias.stride(),
        heads, headdim, dstate, n_blocks, heads // B.shape[1], heads // C.shape[1],
        SOFTPLUS=dt_softplus, BLOCK_P=block_p, BLOCK_N=block_n, num_warps=2,
    )  # fmt: skip
    return out
