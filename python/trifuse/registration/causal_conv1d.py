"""The torch ops behind ``causal_conv1d``: schemas, fake kernels, autograd, and who can serve what."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from trifuse._library import LIB
from trifuse.backends import Op
from trifuse.registration import common
from trifuse.registration.common import accumulation_dtype, empty_sequence, state_rows

_INPUTS = "Tensor x, Tensor weight, Tensor? bias, Tensor? initial_states, Tensor? seq_idx, Tensor? cu_seqlens"
_FLAGS = "bool silu, bool bld, bool deterministic"
_FWD = f"({_INPUTS}, {_FLAGS}, bool return_final) -> (Tensor y, Tensor final_states)"
_BWD = (
    f"(Tensor dy, Tensor? dfinal_states, {_INPUTS}, {_FLAGS}) -> "
    "(Tensor dx, Tensor dweight, Tensor dbias, Tensor dinitial_states)"
)
_UPDATE = (
    "(Tensor x, Tensor(a!) conv_state, Tensor weight, Tensor? bias, bool silu, Tensor? cache_seqlens, "
    "Tensor? conv_state_indices) -> Tensor"
)

_N_TENSORS = 6
_NAME = "causal_conv1d"


def _fwd_fake(x, weight, bias, initial_states, seq_idx, cu_seqlens, silu, bld, deterministic, return_final):
    final = (state_rows(x, cu_seqlens), x.shape[1], weight.shape[1] - 1) if return_final else (0,)
    return empty_sequence(x, bld), x.new_empty(final)


def _bwd_fake(dy, dfinal_states, x, weight, bias, initial_states, seq_idx, cu_seqlens, silu, bld, deterministic):
    acc = accumulation_dtype(x)
    return (
        empty_sequence(x, bld), x.new_empty(weight.shape, dtype=acc),
        x.new_empty((0,) if bias is None else bias.shape, dtype=acc),
        x.new_empty((0,) if initial_states is None else initial_states.shape),
    )  # fmt: skip


def _update_fake(x, conv_state, weight, bias, silu, cache_seqlens, conv_state_indices):
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.save_for_backward(*inputs[:_N_TENSORS])
    ctx.flags = inputs[_N_TENSORS:]
    ctx.set_materialize_grads(False)


def _backward(bwd_name: str, ctx: Any, dy: Tensor | None, dfinal_states: Tensor | None) -> tuple:
    nothing = (None,) * (_N_TENSORS + len(ctx.flags))
    silu, bld, deterministic, return_final = ctx.flags
    if not return_final:
        dfinal_states = None
    if dy is None and dfinal_states is None:
        return nothing
    tensors = ctx.saved_tensors  # once: a checkpoint computes them anew
    x, _, bias, initial_states, _, _ = tensors
    if dy is None:
        dy = torch.zeros((), dtype=x.dtype, device=x.device).expand(x.shape)
    bwd = getattr(torch.ops.trifuse, bwd_name)
    dx, dweight, dbias, dinitial_states = bwd(dy, dfinal_states, *tensors, silu, bld, deterministic)
    return (
        dx, dweight, None if bias is None else dbias, None if initial_states is None else dinitial_states, *nothing[4:],
    )  # fmt: skip


common.define("causal_conv1d_fwd", _FWD, _fwd_fake)
common.define("causal_conv1d_bwd", _BWD, _bwd_fake)
common.define("causal_conv1d_update", _UPDATE, _update_fake)
for _suffix in common.SUFFIXES:
    fwd, bwd = f"causal_conv1d_fwd{_suffix}", f"causal_conv1d_bwd{_suffix}"
    torch.library.register_autograd(
        f"trifuse::{fwd}", functools.partial(_backward, bwd), setup_context=_setup_context, lib=LIB
    )
    torch.library.register_autograd(f"trifuse::{bwd}", common.no_second_derivative(_NAME), lib=LIB)
common.implement_triton(_NAME, "causal_conv1d_fwd", "causal_conv1d_bwd", "causal_conv1d_update")


def _state_refusals(call: Any) -> list[str]:
    state = getattr(call, "conv_state", None)
    if state is not None and (state.dtype == torch.float64) != (call.x.dtype == torch.float64):
        return [f"it takes float64 beside float64 only, and conv_state is {state.dtype} and x {call.x.dtype}"]
    return []


def _gpu_refusals(call: Any) -> list[str]:
    state = getattr(call, "conv_state", call.x)
    if torch.float64 in (call.x.dtype, state.dtype):
        return ["it computes in float32, and the inputs are float64"]
    return []


def _cpp_refusals(call: Any) -> list[str]:
    return common.cpp_refusals(call) + _state_refusals(call)


def _cuda_refusals(call: Any) -> list[str]:
    return common.cuda_refusals(call) + _gpu_refusals(call)


def _triton_refusals(call: Any) -> list[str]:
    return common.triton_refusals(call, call.x) + _gpu_refusals(call)


def register_backends(op: Op) -> None:
    op.backend("cpp", _cpp_refusals)
    op.backend("cuda", _cuda_refusals)
    op.backend("triton", _triton_refusals)


def conv(backend: str, call: Any, return_final: bool) -> tuple[Tensor, Tensor]:
    """Run a checked call of ``causal_conv1d`` on a native backend."""
    common.refuse_forward_mode(_NAME, call)
    ops = torch.ops.trifuse
    op = ops.causal_conv1d_fwd_triton if backend == "triton" else ops.causal_conv1d_fwd
    return op(*call, return_final)


def update(backend: str, call: Any) -> Tensor:
    """Run a checked call of ``causal_conv1d_update`` on a native backend."""
    ops = torch.ops.trifuse
    return (ops.causal_conv1d_update_triton if backend == "triton" else ops.causal_conv1d_update)(*call)
