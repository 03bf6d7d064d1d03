"""The torch ops behind ``ssd``: schemas, fake kernels, autograd, and who can serve what."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from trifuse._library import LIB
from trifuse.backends import Op
from trifuse.registration import common
from trifuse.registration.common import state_rows

_INPUTS = (
    "Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? dt_bias, "
    "Tensor? initial_states, Tensor? seq_idx, Tensor? cu_seqlens"
)
_STEPS = "bool dt_softplus, float dt_min, float dt_max, bool deterministic"
_FWD = (
    f"({_INPUTS}, {_STEPS}, bool return_final, int chunk_size, bool save) -> "
    "(Tensor out, Tensor final_states, Tensor chunk_states)"
)
_BWD = (
    f"(Tensor dout, Tensor? dfinal_states, {_INPUTS}, Tensor chunk_states, {_STEPS}, int chunk_size) -> "
    "(Tensor dx, Tensor ddt, Tensor dA, Tensor dB, Tensor dC, Tensor dD, Tensor dz, Tensor ddt_bias, "
    "Tensor dinitial_states)"
)

_N_TENSORS = 11


def _fwd_fake(x, dt, A, B, C, D, z, dt_bias, initial_states, seq_idx, cu_seqlens, dt_softplus, dt_min, dt_max,
              deterministic, return_final, chunk_size, save):  # fmt: skip
    batch, seqlen, heads, headdim = x.shape
    rows = state_rows(x, cu_seqlens) if return_final else 0
    chunks = (seqlen + chunk_size - 1) // chunk_size if save and seqlen > chunk_size else 0
    sizes = (heads, headdim, B.shape[3])
    return x.new_empty(x.shape), A.new_empty((rows, *sizes)), A.new_empty((batch, chunks, *sizes))


def _bwd_fake(dout, dfinal_states, x, dt, A, B, C, D, z, dt_bias, initial_states, seq_idx, cu_seqlens, chunk_states,
              dt_softplus, dt_min, dt_max, deterministic, chunk_size):  # fmt: skip
    def like(tensor: Tensor | None) -> Tensor:
        return A.new_empty((0,)) if tensor is None else tensor.new_empty(tensor.shape)

    return tuple(like(tensor) for tensor in (x, dt, A, B, C, D, z, dt_bias, initial_states))


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    chunk_states = output[2]
    ctx.save_for_backward(*inputs[:_N_TENSORS], chunk_states)
    ctx.flags = inputs[_N_TENSORS:]
    ctx.mark_non_differentiable(chunk_states)
    ctx.set_materialize_grads(False)


def _backward(bwd_name: str, ctx: Any, dout: Tensor | None, dfinal_states: Tensor | None, _: Tensor | None) -> tuple:
    nothing = (None,) * (_N_TENSORS + len(ctx.flags))
    if dout is None and dfinal_states is None:
        return nothing
    *tensors, chunk_states = ctx.saved_tensors
    *steps, _, chunk_size, save = ctx.flags
    x = tensors[0]
    if dout is None:
        dout = torch.zeros((), dtype=x.dtype, device=x.device).expand(x.shape)
    if dfinal_states is not None and dfinal_states.shape[0] == 0:
        dfinal_states = None  # of states that were not asked for
    if not save:  # an exported program that is trained after all
        fwd = getattr(torch.ops.trifuse, bwd_name.replace("ssd_bwd", "ssd_fwd"))
        with torch.no_grad():
            chunk_states = fwd(*tensors, *steps, False, chunk_size, True)[2]
    bwd = getattr(torch.ops.trifuse, bwd_name)
    grads = bwd(dout, dfinal_states, *tensors, chunk_states, *steps, chunk_size)
    present = tensors[:9]
    return (
        *(grad if tensor is not None else None for grad, tensor in zip(grads, present, strict=True)),
        *nothing[len(present):],
    )  # fmt: skip


common.define("ssd_fwd", _FWD, _fwd_fake)
common.define("ssd_bwd", _BWD, _bwd_fake)
for _suffix in common.SUFFIXES:
    fwd, bwd = f"ssd_fwd{_suffix}", f"ssd_bwd{_suffix}"
    torch.library.register_autograd(
        f"trifuse::{fwd}", functools.partial(_backward, bwd), setup_context=_setup_context, lib=LIB
    )
    torch.library.register_autograd(f"trifuse::{bwd}", common.no_second_derivative("ssd"), lib=LIB)
common.implement_triton("ssd", "ssd_fwd", "ssd_bwd")


def _cuda_refusals(call: Any) -> list[str]:
    return [
        "ssd has no cuda kernel for whole sequences; on CUDA tensors triton computes them, and a decode step is "
        "selective_state_update with heads, which has one"
    ]


def _triton_refusals(call: Any) -> list[str]:
    reasons = common.triton_refusals(call, call.x)
    if torch.float64 in (call.x.dtype, call.dt.dtype):
        reasons.append("it computes in float32, and the inputs are float64")
    return reasons


def register_backends(op: Op) -> None:
    op.backend("cpp", common.cpp_refusals)
    op.backend("cuda", _cuda_refusals)
    op.backend("triton", _triton_refusals)


# Positions that are one matrix product, and between two saved states, per backend: what it takes when it may
# choose, and the sizes that it serves.
CHUNK_SIZE = {"cpp": 128, "triton": 64}
CHUNK_SIZES = {"cpp": (16, 256), "triton": (16, 64)}


def chunk_size(backend: str, asked: int) -> int:
    """A power of two within what the backend serves, next to the size that was asked for (0: its own choice)."""
    smallest, largest = CHUNK_SIZES[backend]
    power = 1 << (max(asked, 1) - 1).bit_length()
    return min(max(power, smallest), largest) if asked else CHUNK_SIZE[backend]


def ssd(backend: str, call: Any) -> tuple[Tensor, Tensor]:
    """Run a checked call of ``ssd`` on a native backend."""
    common.refuse_forward_mode("ssd", call)
    ops = torch.ops.trifuse
    op = ops.ssd_fwd_triton if backend == "triton" else ops.ssd_fwd
    # An exported program mostly runs without gradients, and a number of chunks that depends on the length
    # would bind it to lengths of one chunk or of several: its backward pass computes the states again.
    save = common.needs_grad(call) and not torch.compiler.is_exporting()
    out, final_states, _ = op(*call[:-1], chunk_size(backend, call.chunk_size), save)
    return out, final_states
