"""The torch ops behind ``gaussian_adaptive_attention``: schemas, fake kernels, autograd, and who can serve what."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from trifuse._library import LIB
from trifuse.backends import Op
from trifuse.registration import common

_FWD = (
    "(Tensor x, Tensor mean_offset, Tensor width, Tensor? mask, float? padding_value, float eps, bool clamped, "
    "bool return_weights) -> (Tensor out, Tensor weights, Tensor stats)"
)
_BWD = (
    "(Tensor? dout, Tensor? dweights, Tensor x, Tensor mean_offset, Tensor width, Tensor? mask, Tensor stats, "
    "float? padding_value, float eps, bool clamped) -> (Tensor dx, Tensor dmean_offset, Tensor dwidth)"
)


def _fwd_fake(x, mean_offset, width, mask, padding_value, eps, clamped, return_weights):
    outer, _, inner = x.shape
    weights = x.new_empty(x.shape if return_weights else (0,))
    stats = x.new_empty((3, width.shape[0], outer, inner), dtype=common.accumulation_dtype(x))
    return x.new_empty(x.shape), weights, stats


def _bwd_fake(dout, dweights, x, mean_offset, width, mask, stats, padding_value, eps, clamped):
    return x.new_empty(x.shape), torch.empty_like(mean_offset), torch.empty_like(width)


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    x, mean_offset, width, mask, *ctx.options, _ = inputs
    ctx.save_for_backward(x, mean_offset, width, mask, output[2])
    ctx.set_materialize_grads(False)


def _backward(bwd_name: str, ctx: Any, dout: Tensor | None, dweights: Tensor | None, dstats: Tensor | None) -> tuple:
    if dout is None and dweights is None:
        return (None,) * 8
    x, mean_offset, width, mask, stats = ctx.saved_tensors
    bwd = getattr(torch.ops.trifuse, bwd_name)
    dx, dmean_offset, dwidth = bwd(dout, dweights, x, mean_offset, width, mask, stats, *ctx.options)
    return dx, dmean_offset, dwidth, None, None, None, None, None


common.define("gaussian_adaptive_attention_fwd", _FWD, _fwd_fake)
common.define("gaussian_adaptive_attention_bwd", _BWD, _bwd_fake)
for _suffix in common.SUFFIXES:
    fwd, bwd = f"gaussian_adaptive_attention_fwd{_suffix}", f"gaussian_adaptive_attention_bwd{_suffix}"
    torch.library.register_autograd(
        f"trifuse::{fwd}", functools.partial(_backward, bwd), setup_context=_setup_context, lib=LIB
    )
    torch.library.register_autograd(
        f"trifuse::{bwd}", common.no_second_derivative("gaussian_adaptive_attention"), lib=LIB
    )
common.implement_triton(
    "gaussian_adaptive_attention", "gaussian_adaptive_attention_fwd", "gaussian_adaptive_attention_bwd"
)


def _triton_refusals(call: Any) -> list[str]:
    return common.triton_refusals(call, call.x)


def register_backends(op: Op) -> None:
    op.backend("cpp", common.cpp_refusals)
    op.backend("cuda", common.cuda_refusals)
    op.backend("triton", _triton_refusals)


def attend(backend: str, call: Any) -> tuple[Tensor, Tensor]:
    """Run a checked call on a native backend: (out, weights), both (outer, axis, inner)."""
    common.refuse_forward_mode("gaussian_adaptive_attention", call)
    ops = torch.ops.trifuse
    fwd = ops.gaussian_adaptive_attention_fwd_triton if backend == "triton" else ops.gaussian_adaptive_attention_fwd
    out, weights, _ = fwd(*call[:8])
    return out, weights
