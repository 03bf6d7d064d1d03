"""The torch ops behind ``selective_scan``: schemas, fake kernels, autograd, and who can serve what."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from trifuse._library import LIB
from trifuse.backends import Op
from trifuse.registration import common
from trifuse.registration.common import empty_sequence, state_rows

_INPUTS = (
    "Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? delta_bias, "
    "Tensor? initial_state, Tensor? cu_seqlens"
)
_FLAGS = "bool delta_softplus, bool reverse, bool bld, bool deterministic, int chunk_size"
_FWD = f"({_INPUTS}, {_FLAGS}) -> (Tensor out, Tensor last_state, Tensor chunk_states)"
_BWD = (
    f"(Tensor dout, Tensor? dlast_state, {_INPUTS}, Tensor chunk_states, {_FLAGS}) -> "
    "(Tensor du, Tensor ddelta, Tensor dA, Tensor dB, Tensor dC, Tensor dD, Tensor dz, Tensor ddelta_bias, "
    "Tensor dinitial_state)"
)
_UPDATE = (
    "(Tensor(a!) state, Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, "
    "Tensor? dt_bias, bool dt_softplus, Tensor? state_batch_indices) -> Tensor"
)

_N_TENSORS = 10


def empty_coefficient(coef: Tensor, dtype: torch.dtype, bld: bool) -> Tensor:
    """An uninitialised gradient of B or C: (D, N), or (B, G, N, L) in memory (B, L, G, N) if `bld`."""
    if coef.dim() == 2 or not bld:
        return torch.empty(coef.shape, dtype=dtype, device=coef.device)
    batch, groups, dstate, seqlen = coef.shape
    return torch.empty((batch, seqlen, groups, dstate), dtype=dtype, device=coef.device).permute(0, 2, 3, 1)


def _fwd_fake(u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens, delta_softplus, reverse, bld,
              deterministic, chunk_size):  # fmt: skip
    batch, dim, seqlen = u.shape
    dstate = A.shape[1]
    last_state = A.new_empty((state_rows(u, cu_seqlens), dim, dstate))
    n_chunks = (seqlen + chunk_size - 1) // chunk_size if chunk_size else 0
    return empty_sequence(u, bld), last_state, A.new_empty((batch, n_chunks, dstate, dim))


def _bwd_fake(dout, dlast_state, u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens, chunk_states,
              delta_softplus, reverse, bld, deterministic, chunk_size):  # fmt: skip
    def like(tensor: Tensor | None) -> Tensor:
        return A.new_empty((0,)) if tensor is None else torch.empty_like(tensor, memory_format=torch.contiguous_format)

    dB = empty_coefficient(B, B.dtype, bld)
    dC = empty_coefficient(C, C.dtype, bld)
    dz = u.new_empty((0,)) if z is None else empty_sequence(u, bld)
    return (
        empty_sequence(u, bld), empty_sequence(u, bld), like(A), dB, dC, like(D), dz, like(delta_bias),
        like(initial_state),
    )  # fmt: skip


def _update_fake(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, state_batch_indices):
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    chunk_states = output[2]
    ctx.save_for_backward(*inputs[:_N_TENSORS], chunk_states)
    ctx.flags = inputs[_N_TENSORS:]
    ctx.mark_non_differentiable(chunk_states)
    ctx.set_materialize_grads(False)


def _backward(bwd_name: str, ctx: Any, dout: Tensor | None, dlast_state: Tensor | None, _: Tensor | None) -> tuple:
    nothing = (None,) * (_N_TENSORS + len(ctx.flags))
    if dout is None and dlast_state is None:
        return nothing
    *tensors, chunk_states = ctx.saved_tensors
    u, D, z, delta_bias, initial_state = (tensors[i] for i in (0, 5, 6, 7, 8))
    if dout is None:
        dout = torch.zeros((), dtype=u.dtype, device=u.device).expand(u.shape)
    *flags, chunk_size = ctx.flags
    if chunk_size == 0:  # an exported program that is trained after all
        backend = "triton" if bwd_name.endswith("_triton") else "cuda" if u.is_cuda else "cpp"
        chunk_size = CHUNK_SIZE[backend]
        fwd = getattr(torch.ops.trifuse, bwd_name.replace("scan_bwd", "scan_fwd"))
        with torch.no_grad():
            chunk_states = fwd(*tensors, *flags, chunk_size)[2]
    grads = getattr(torch.ops.trifuse, bwd_name)(dout, dlast_state, *tensors, chunk_states, *flags, chunk_size)
    du, ddelta, dA, dB, dC, dD, dz, ddelta_bias, dinitial_state = grads
    return (
        du, ddelta, dA, dB, dC,
        None if D is None else dD, None if z is None else dz,
        None if delta_bias is None else ddelta_bias, None if initial_state is None else dinitial_state,
        *nothing[_N_TENSORS - 1:],
    )  # fmt: skip


common.define("selective_scan_fwd", _FWD, _fwd_fake)
common.define("selective_scan_bwd", _BWD, _bwd_fake)
common.define("selective_state_update", _UPDATE, _update_fake)
for _suffix in common.SUFFIXES:
    fwd, bwd = f"selective_scan_fwd{_suffix}", f"selective_scan_bwd{_suffix}"
    torch.library.register_autograd(
        f"trifuse::{fwd}", functools.partial(_backward, bwd), setup_context=_setup_context, lib=LIB
    )
    torch.library.register_autograd(f"trifuse::{bwd}", common.no_second_derivative("selective_scan"), lib=LIB)
common.implement_triton("selective_scan", "selective_scan_fwd", "selective_scan_bwd", "selective_state_update")


def _cpp_refusals(call: Any) -> list[str]:
    reasons = common.cpp_refusals(call)
    state = getattr(call, "state", None)
    if state is not None and (state.dtype == torch.float64) != (call.x.dtype == torch.float64):
        reasons.append(f"it takes float64 beside float64 only, and state is {state.dtype} and x {call.x.dtype}")
    return reasons


def _gpu_refusals(call: Any, backend: str) -> list[str]:
    reasons = []
    if call.A.is_complex():
        reasons.append(f"its {backend} kernels take real A, and A is complex; the reference serves complex A")
    if torch.float64 in (call[0].dtype, call[1].dtype):
        reasons.append("it computes in float32, and the inputs are float64")
    return reasons


def _cuda_refusals(call: Any) -> list[str]:
    return common.cuda_refusals(call) + _gpu_refusals(call, "cuda")


def _triton_refusals(call: Any) -> list[str]:
    return common.triton_refusals(call, call[1]) + _gpu_refusals(call, "triton")


def register_backends(op: Op) -> None:
    op.backend("cpp", _cpp_refusals)
    op.backend("cuda", _cuda_refusals)
    op.backend("triton", _triton_refusals)


# Steps of time between two saved states, per backend.
CHUNK_SIZE = {"cpp": 64, "cuda": 32, "triton": 128}


def scan(backend: str, call: Any) -> tuple[Tensor, Tensor]:
    """Run a checked call of ``selective_scan`` on a native backend."""
    common.refuse_forward_mode("selective_scan", call)
    ops = torch.ops.trifuse
    op = ops.selective_scan_fwd_triton if backend == "triton" else ops.selective_scan_fwd
    # An exported program mostly runs without gradients, and a number of chunks that depends on the length
    # would bind it to lengths of one chunk or of several: its backward pass computes the states again.
    save = common.needs_grad(call) and not torch.compiler.is_exporting()
    out, last_state, _ = op(*call, CHUNK_SIZE[backend] if save else 0)
    return out, last_state


def update(backend: str, call: Any) -> Tensor:
    """Run a checked call of ``selective_state_update`` on a native backend."""
    ops = torch.ops.trifuse
    return (ops.selective_state_update_triton if backend == "triton" else ops.selective_state_update)(*call)
