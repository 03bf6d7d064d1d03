"""The torch ops behind ``linear_scan``: schemas, fake kernels, autograd, and who can serve what."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from trifuse._library import LIB
from trifuse.backends import Op
from trifuse.registration import common
from trifuse.registration.common import empty_sequence, state_rows

_FLAGS = "Tensor? initial_state, Tensor? cu_seqlens, bool reverse, bool bld"
_FWD = f"(Tensor a, Tensor b, {_FLAGS}) -> (Tensor h, Tensor last_state)"
_BWD = (
    f"(Tensor dh, Tensor? dlast_state, Tensor a, Tensor h, {_FLAGS}) -> (Tensor da, Tensor db, Tensor dinitial_state)"
)


def _fwd_fake(a, b, initial_state, cu_seqlens, reverse, bld):
    acc = torch.promote_types(b.dtype, torch.float32)
    return empty_sequence(b, bld), b.new_empty((state_rows(b, cu_seqlens), b.shape[1]), dtype=acc)


def _bwd_fake(dh, dlast_state, a, h, initial_state, cu_seqlens, reverse, bld):
    acc = torch.promote_types(h.dtype, torch.float32)
    dinitial_state = h.new_empty((0,), dtype=acc) if initial_state is None else torch.empty_like(initial_state)
    return empty_sequence(a, bld), empty_sequence(h, bld), dinitial_state


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    a, _, initial_state, cu_seqlens, *ctx.flags = inputs
    ctx.save_for_backward(a, output[0], initial_state, cu_seqlens)
    ctx.set_materialize_grads(False)


def _backward(bwd_name: str, ctx: Any, dh: Tensor | None, dlast_state: Tensor | None) -> tuple:
    if dh is None and dlast_state is None:
        return (None,) * 6
    a, h, initial_state, cu_seqlens = ctx.saved_tensors
    if dh is None:
        dh = torch.zeros((), dtype=h.dtype, device=h.device).expand(h.shape)
    bwd = getattr(torch.ops.trifuse, bwd_name)
    da, db, dinitial = bwd(dh, dlast_state, a, h, initial_state, cu_seqlens, *ctx.flags)
    return da, db, None if initial_state is None else dinitial, None, None, None


common.define("linear_scan_fwd", _FWD, _fwd_fake)
common.define("linear_scan_bwd", _BWD, _bwd_fake)
for _suffix in common.SUFFIXES:
    fwd, bwd = f"linear_scan_fwd{_suffix}", f"linear_scan_bwd{_suffix}"
    torch.library.register_autograd(
        f"trifuse::{fwd}", functools.partial(_backward, bwd), setup_context=_setup_context, lib=LIB
    )
    torch.library.register_autograd(f"trifuse::{bwd}", common.no_second_derivative("linear_scan"), lib=LIB)
common.implement_triton("linear_scan", "linear_scan_fwd", "linear_scan_bwd")


def _gpu_refusals(call: Any) -> list[str]:
    if call.b.dtype in (torch.float64, torch.complex128):
        return [f"it computes in float32, and the inputs are {str(call.b.dtype).removeprefix('torch.')}"]
    return []


def _cuda_refusals(call: Any) -> list[str]:
    return common.cuda_refusals(call) + _gpu_refusals(call)


def _triton_refusals(call: Any) -> list[str]:
    return common.triton_refusals(call, call.b) + _gpu_refusals(call)


def register_backends(op: Op) -> None:
    op.backend("cpp", common.cpp_refusals)
    op.backend("cuda", _cuda_refusals)
    op.backend("triton", _triton_refusals)


def scan(backend: str, call: Any) -> tuple[Tensor, Tensor]:
    """Run a checked call of ``linear_scan`` on a native backend."""
    common.refuse_forward_mode("linear_scan", call)
    ops = torch.ops.trifuse
    return (ops.linear_scan_fwd_triton if backend == "triton" else ops.linear_scan_fwd)(*call)
