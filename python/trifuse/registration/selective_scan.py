"""The torch ops behind ``selective_scan``: schemas, fake kernels, autograd, and who can serve what."""

from __future__ import annotations

import functools
import importlib.util
import os
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from trifuse import _library
from trifuse._library import LIB
from trifuse.backends import Op

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

# The compiled op has a CPU and a CUDA kernel under one name; Triton's has its own, so that a
# machine can have both.
_SUFFIXES = ("", "_triton")
_N_TENSORS = 10
_TRITON_INSTALLED = importlib.util.find_spec("triton") is not None


def accumulation_dtype(call_or_u: Tensor, complex: bool = False) -> torch.dtype:
    if call_or_u.dtype == torch.float64:
        return torch.complex128 if complex else torch.float64
    return torch.complex64 if complex else torch.float32


def empty_sequence(like: Tensor, bld: bool) -> Tensor:
    """An uninitialised (B, D, L) tensor, in memory (B, L, D) if `bld`."""
    batch, dim, seqlen = like.shape
    # A transposed tensor would be a view, which autograd forbids to change in place when an op returns it.
    return like.new_empty_strided((batch, dim, seqlen), (dim * seqlen, 1, dim) if bld else (dim * seqlen, seqlen, 1))


def empty_coefficient(coef: Tensor, dtype: torch.dtype, bld: bool) -> Tensor:
    """An uninitialised gradient of B or C: (D, N), or (B, G, N, L) in memory (B, L, G, N) if `bld`."""
    if coef.dim() == 2 or not bld:
        return torch.empty(coef.shape, dtype=dtype, device=coef.device)
    batch, groups, dstate, seqlen = coef.shape
    return torch.empty((batch, seqlen, groups, dstate), dtype=dtype, device=coef.device).permute(0, 2, 3, 1)


def state_rows(u: Tensor, cu_seqlens: Tensor | None) -> int:
    return u.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1


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


def _no_second_derivative(ctx: Any, *grads: Tensor | None) -> tuple:
    raise RuntimeError(
        "selective_scan: a native kernel has no second derivative; compute the forward pass under "
        'trifuse.backend("reference"), which can be differentiated any number of times'
    )


for _suffix in _SUFFIXES:
    fwd, bwd, update = (f"selective_{part}{_suffix}" for part in ("scan_fwd", "scan_bwd", "state_update"))
    LIB.define(fwd + _FWD)
    LIB.define(bwd + _BWD)
    LIB.define(update + _UPDATE)
    torch.library.register_fake(f"trifuse::{fwd}", _fwd_fake, lib=LIB)
    torch.library.register_fake(f"trifuse::{bwd}", _bwd_fake, lib=LIB)
    torch.library.register_fake(f"trifuse::{update}", _update_fake, lib=LIB)
    torch.library.register_autograd(
        f"trifuse::{fwd}", functools.partial(_backward, bwd), setup_context=_setup_context, lib=LIB
    )
    torch.library.register_autograd(f"trifuse::{bwd}", _no_second_derivative, lib=LIB)


def _triton(name: str):
    """Triton's launcher of that name, imported at its first use: importing triton takes a second."""

    def call(*args):
        from trifuse.triton_kernels import selective_scan as kernels

        return getattr(kernels, name)(*args)

    return call


for _name in ("selective_scan_fwd", "selective_scan_bwd", "selective_state_update"):
    LIB.impl(f"{_name}_triton", _triton(_name), "CUDA")
    LIB.impl(f"{_name}_triton", _triton(_name), "CPU")


def interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def _cpp_refusals(call: Any) -> list[str]:
    reasons = []
    if call.device_type != "cpu":
        reasons.append(f"it computes on CPU tensors, and these are on {call.device_type}")
    elif _library.wrong_isa is not None:
        raise ValueError(_library.wrong_isa)
    if _library.missing("cpp") is not None:
        reasons.append(_library.missing("cpp"))
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
    reasons = []
    if call.device_type != "cuda":
        reasons.append(f"it computes on CUDA tensors, and these are on {call.device_type}")
    if _library.missing("cuda") is not None:
        reasons.append(_library.missing("cuda"))
    return reasons + _gpu_refusals(call, "cuda")


def _triton_refusals(call: Any) -> list[str]:
    reasons = []
    if not _TRITON_INSTALLED:
        reasons.append("the package triton is not installed")
    if call.device_type == "cpu":
        if not interpreting():
            reasons.append("it computes on CUDA tensors (on CPU tensors only with TRITON_INTERPRET=1, for tests)")
        elif call[1].dtype == torch.bfloat16:
            reasons.append("Triton's interpreter computes bfloat16 wrongly")
    elif call.device_type != "cuda":
        reasons.append(f"it computes on CUDA tensors, and these are on {call.device_type}")
    return reasons + _gpu_refusals(call, "triton")


def register_backends(op: Op) -> None:
    op.backend("cpp", _cpp_refusals)
    op.backend("cuda", _cuda_refusals)
    op.backend("triton", _triton_refusals)


# Steps of time between two saved states, per backend.
CHUNK_SIZE = {"cpp": 64, "cuda": 32, "triton": 128}


def _needs_grad(call: Any) -> bool:
    return torch.is_grad_enabled() and any(isinstance(one, Tensor) and one.requires_grad for one in call)


def _refuse_forward_mode(call: Any) -> None:
    """A tangent would be dropped in silence: torch gives ops of a library no forward-mode derivative."""
    if forward_ad._current_level < 0:
        return
    if any(isinstance(one, Tensor) and forward_ad.unpack_dual(one).tangent is not None for one in call):
        raise RuntimeError(
            "selective_scan: a native kernel has no forward-mode derivative; compute it under "
            'trifuse.backend("reference")'
        )


def scan(backend: str, call: Any) -> tuple[Tensor, Tensor]:
    """Run a checked call of ``selective_scan`` on a native backend."""
    _refuse_forward_mode(call)
    ops = torch.ops.trifuse
    op = ops.selective_scan_fwd_triton if backend == "triton" else ops.selective_scan_fwd
    # An exported program mostly runs without gradients, and a number of chunks that depends on the length
    # would bind it to lengths of one chunk or of several: its backward pass computes the states again.
    save = _needs_grad(call) and not torch.compiler.is_exporting()
    out, last_state, _ = op(*call, CHUNK_SIZE[backend] if save else 0)
    return out, last_state


def update(backend: str, call: Any) -> Tensor:
    """Run a checked call of ``selective_state_update`` on a native backend."""
    ops = torch.ops.trifuse
    return (ops.selective_state_update_triton if backend == "triton" else ops.selective_state_update)(*call)
