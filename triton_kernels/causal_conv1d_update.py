"""The next tokens of the causal convolution in Triton, for decoding: the state is changed in place."""

import torch
import triton
import triton.language as tl

from trifuse.triton_kernels import common
from trifuse.triton_kernels.common import sigmoid, wide

__all__ = ["causal_conv1d_update"]


@triton.jit
def _place(state, stride, i, first, state_len):
    """Where a row's i-th input stands, the oldest first."""
    at = first + i
    return state + tl.where(at < state_len, at, at - state_len) * stride


@triton.jit
def _update_kernel(
    x, conv_state, weight, bias, cache_seqlens, conv_state_indices, y, x_strides, state_strides, y_strides,
    dim, seqlen, state_len, n_blocks,
    SILU: tl.constexpr, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    batch = wide(tl.program_id(0) // n_blocks)
    d = wide(tl.program_id(0) % n_blocks) * BLOCK_D + tl.arange(0, BLOCK_D)
    d_mask = d < dim
    row = batch
    live = d_mask
    if conv_state_indices is not None:  # a negative row is padding
        row = tl.load(conv_state_indices + batch)
        live = d_mask & (d * 0 + row >= 0)
    first = wide(0)
    if cache_seqlens is not None:
        first = (tl.load(cache_seqlens + batch) % state_len + state_len) % state_len  # as of a negative number too
    x += batch * x_strides[0] + d * x_strides[1]
    y += batch * y_strides[0] + d * y_strides[1]
    state = conv_state + row * state_strides[0] + d * state_strides[1]

    # Input i: of the state, the oldest first, then the new ones.
    for t in range(seqlen):
        total = tl.zeros((BLOCK_D,), tl.float32)
        if bias is not None:
            total += tl.load(bias + d, mask=d_mask, other=0.0)
        for w in tl.static_range(WIDTH):
            i = d * 0 + state_len - (WIDTH - 1) + w + t
            old = tl.load(
                _place(state, state_strides[2], i, first, state_len), mask=live & (i < state_len), other=0.0
            ).to(tl.float32)
            new = tl.load(x + (i - state_len) * x_strides[2], mask=live & (i >= state_len), other=0.0).to(tl.float32)
            total += tl.load(weight + d * WIDTH + w, mask=d_mask, other=0.0) * (old + new)
        if SILU:
            total = total * sigmoid(total)
        total = tl.where(live, total, 0.0)
        tl.store(y + wide(t) * y_strides[2], total.to(y.dtype.element_ty), mask=d_mask)

    # Each thread moves its own channels, the oldest input first: what it overwrites it has already read.
    for n in range(state_len):
        i = d * 0 + n + seqlen
        old = tl.load(_place(state, state_strides[2], i, first, state_len), mask=live & (i < state_len), other=0.0).to(
            tl.float32
        )
        new = tl.load(x + (i - state_len) * x_strides[2], mask=live & (i >= state_len), other=0.0).to(tl.float32)
        value = (old + new).to(conv_state.dtype.element_ty)
        if cache_seqlens is None:
            tl.store(state + n * state_strides[2], value, mask=live)
        else:  # the new inputs take the places of the oldest; the others stay where they are
            to = (first + i) % state_len
            tl.store(state + to * state_strides[2], value, mask=live & (i >= state_len))


def causal_conv1d_update(x, conv_state, weight, bias, silu, cache_seqlens, conv_state_indices):
    batch, dim, seqlen = x.shape
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    block_d = 128  # at least one channel per thread, so that no two threads have the same
    n_blocks = triton.cdiv(dim, block_d)
    common.launch(
        _update_kernel, (batch * n_blocks,),
        x, conv_state, weight, bias, cache_seqlens, conv_state_indices, y, x.stride(), conv_state.stride(), y.stride(),
        dim, seqlen, conv_state.shape[2], n_blocks,
        SILU=silu, WIDTH=weight.shape[1], BLOCK_D=block_d, num_warps=2,
    )  # fmt: skip
    return y
