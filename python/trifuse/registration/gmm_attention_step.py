"""The torch ops behind ``gmm_attention_step``: schemas, fake kernels, autograd, and who can serve what."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from trifuse._library import LIB
from trifuse.backends import Op
from trifuse.registration import common

_FWD = (
    "(Tensor values, Tensor weight, Tensor delta, Tensor sigma, Tensor mean, Tensor? key_padding_mask)"
    " -> (Tensor context, Tensor mean_new, Tensor alignment)"
)
_BWD = (
    "(Tensor? dcontext, Tensor? dmean_new, Tensor? dalignment, Tensor values, Tensor weight, Tensor delta,"
    " Tensor sigma, Tensor mean_new, Tensor alignment, Tensor? key_padding_mask, bool values_grad)"
    " -> (Tensor dvalues, Tensor dweight, Tensor ddelta, Tensor dsigma, Tensor dmean)"
)


def _fwd_fake(values, weight, delta, sigma, mean, key_padding_mask):
    batch, length, width = values.shape
    components = weight.shape[1]
    return values.new_empty((batch, width)), weight.new_empty((batch, components)), weight.new_empty((batch, length))


def _bwd_fake(
    dcontext, dmean_new, dalignment, values, weight, delta, sigma, mean_new, alignment, key_padding_mask, values_grad
):
    dvalues = values.new_empty(values.shape if values_grad else (0,))
    return dvalues, *(weight.new_empty(weight.shape) for _ in range(4))


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    values, weight, delta, sigma, _, key_padding_mask = inputs
    _, mean_new, alignment = output
    ctx.save_for_backward(values, weight, delta, sigma, mean_new, alignment, key_padding_mask)
    ctx.set_materialize_grads(False)


def _backward(
    bwd_name: str, ctx: Any, dcontext: Tensor | None, dmean_new: Tensor | None, dalignment: Tensor | None
) -> tuple:
    if dcontext is None and dmean_new is None and dalignment is None:
        return (None,) * 6
    values_grad = ctx.needs_input_grad[0] and dcontext is not None
    bwd = getattr(torch.ops.trifuse, bwd_name)
    dvalues, *dmixture = bwd(dcontext, dmean_new, dalignment, *ctx.saved_tensors, values_grad)
    return dvalues if values_grad else None, *dmixture, None


common.define("gmm_attention_step_fwd", _FWD, _fwd_fake)
common.define("gmm_attention_step_bwd", _BWD, _bwd_fake)
for _suffix in common.SUFFIXES:
    fwd, bwd = f"gmm_attention_step_fwd{_suffix}", f"gmm_attention_step_bwd{_suffix}"
    torch.library.register_autograd(
        f"trifuse::{fwd}", functools.partial(_backward, bwd), setup_context=_setup_context, lib=LIB
    )
    torch.library.register_autograd(f"trifuse::{bwd}", common.no_second_derivative("gmm_attention_step"), lib=LIB)
common.implement_triton("gmm_attention_step", "gmm_attention_step_fwd", "gmm_attention_step_bwd")


def _cuda_refusals(call: Any) -> list[str]:
    return ["it has no kernel of this op, whose kernel for GPUs is Triton's"]


def _triton_refusals(call: Any) -> list[str]:
    reasons = common.triton_refusals(call, call.values)
    if call.values.dtype == torch.float64:
        reasons.append("it computes in float32, and the inputs are float64")
    return reasons


def register_backends(op: Op) -> None:
    op.backend("cpp", common.cpp_refusals)
    op.backend("cuda", _cuda_refusals)
    op.backend("triton", _triton_refusals)


def step(backend: str, call: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Run a checked call of ``gmm_attention_step`` on a native backend."""
    common.refuse_forward_mode("gmm_attention_step", call)
    ops = torch.ops.trifuse
    return (ops.gmm_attention_step_fwd_triton if backend == "triton" else ops.gmm_attention_step_fwd)(*call)
