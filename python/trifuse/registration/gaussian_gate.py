"""The torch ops behind ``gaussian_gate``: schemas, fake kernels, autograd, and who can serve what."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from trifuse._library import LIB
from trifuse.backends import Op
from trifuse.registration import common

# gate = exp(-z^2 / 2) without `alpha`, with the variance v biased; with it v is unbiased and the gate
# 1 + alpha[row] mean_k exp(-z_k^2 / 2) / sqrt(2 pi). z_k = (x - mean - offset[row, k]) / (width[row, k] sqrt(v)); v
# counts eps, and `squared` puts the square root of the width in its place. x is (outer, axis, inner). The row of an
# entry is its head, a piece of the axis, where there is more than one; otherwise index // share % rows, the index of
# its slice among the outer ones if `outer`, among the inner ones elsewhere.
_PARAMETERS = "Tensor x, Tensor offset, Tensor width, Tensor? alpha, Tensor? mask"
_FLAGS = "int heads, int share, bool outer, float eps, bool squared, bool multiply"
_FWD = f"({_PARAMETERS}, {_FLAGS}) -> (Tensor out, Tensor stats)"
_BWD = (
    f"(Tensor dout, {_PARAMETERS}, Tensor stats, {_FLAGS}) -> (Tensor dx, Tensor doffset, Tensor dwidth, Tensor dalpha)"
)


def _fwd_fake(x, offset, width, alpha, mask, heads, share, outer, eps, squared, multiply):
    # stats: of every slice the mean, what its rounding left of it, and 1 / sqrt(v)
    return x.new_empty(x.shape), offset.new_empty((3, heads, x.shape[0], x.shape[2]))


def _bwd_fake(dout, x, offset, width, alpha, mask, stats, heads, share, outer, eps, squared, multiply):
    dalpha = offset.new_empty((0 if alpha is None else offset.shape[0],))
    return x.new_empty(x.shape), torch.empty_like(offset), torch.empty_like(width), dalpha


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    *tensors, heads, share, outer, eps, squared, multiply = inputs
    ctx.flags = (heads, share, outer, eps, squared, multiply)
    ctx.save_for_backward(*tensors, output[1])
    ctx.mark_non_differentiable(output[1])


def _backward(bwd_name: str, ctx: Any, dout: Tensor, dstats: Tensor) -> tuple:
    *tensors, stats = ctx.saved_tensors
    dx, doffset, dwidth, dalpha = getattr(torch.ops.trifuse, bwd_name)(dout, *tensors, stats, *ctx.flags)
    return dx, doffset, dwidth, None if tensors[3] is None else dalpha, *(None,) * 7


common.define("gaussian_gate_fwd", _FWD, _fwd_fake)
common.define("gaussian_gate_bwd", _BWD, _bwd_fake)
for _suffix in common.SUFFIXES:
    fwd, bwd = f"gaussian_gate_fwd{_suffix}", f"gaussian_gate_bwd{_suffix}"
    torch.library.register_autograd(
        f"trifuse::{fwd}", functools.partial(_backward, bwd), setup_context=_setup_context, lib=LIB
    )
    torch.library.register_autograd(f"trifuse::{bwd}", common.no_second_derivative("gaussian_gate"), lib=LIB)
common.implement_triton("gaussian_gate", "gaussian_gate_fwd", "gaussian_gate_bwd")


def _gpu_refusals(call: Any) -> list[str]:
    return ["it computes in float32, and x is float64"] if call.x.dtype == torch.float64 else []


def _cuda_refusals(call: Any) -> list[str]:
    return common.cuda_refusals(call) + _gpu_refusals(call)


def _triton_refusals(call: Any) -> list[str]:
    return common.triton_refusals(call, call.x) + _gpu_refusals(call)


def register_backends(op: Op) -> None:
    op.backend("cpp", common.cpp_refusals)
    op.backend("cuda", _cuda_refusals)
    op.backend("triton", _triton_refusals)


def gate(backend: str, call: Any, arguments: tuple) -> Tensor:
    """Run a checked call of ``gaussian_gate`` on a native backend: a dense (outer, axis, inner) result."""
    common.refuse_forward_mode("gaussian_gate", call)
    ops = torch.ops.trifuse
    return (ops.gaussian_gate_fwd_triton if backend == "triton" else ops.gaussian_gate_fwd)(*arguments)[0]
