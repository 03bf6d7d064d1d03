"""The torch ops behind ``lora_linear_multi``: schemas, fake kernels, autograd, and who can serve what."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from trifuse._library import LIB
from trifuse.backends import Op
from trifuse.registration import common

_FWD = (
    "(Tensor x, Tensor weight, Tensor? bias, Tensor[] A, Tensor[] B, Tensor scales, Tensor index, bool save)"
    " -> (Tensor y, Tensor S)"
)
_BWD = (
    "(Tensor dy, Tensor x, Tensor weight, Tensor[] A, Tensor[] B, Tensor S, Tensor scales, Tensor index, bool[] needs)"
    " -> (Tensor dx, Tensor dweight, Tensor dbias, Tensor[] dA, Tensor[] dB, Tensor dscales)"
)


def _fwd_fake(x, weight, bias, A, B, scales, index, save):
    rows, acc = x.shape[0], common.accumulation_dtype(x)
    return x.new_empty((rows, weight.shape[0])), x.new_empty((rows if save else 0, scales.shape[1]), dtype=acc)


def _bwd_fake(dy, x, weight, A, B, S, scales, index, needs):
    def like(one: Tensor, need: bool) -> Tensor:
        return one.new_empty(one.shape if need else (0,))

    dbias = dy.new_empty(weight.shape[:1] if needs[2] else (0,))
    dA, dB = [like(one, needs[3]) for one in A], [like(one, needs[4]) for one in B]
    return like(x, needs[0]), like(weight, needs[1]), dbias, dA, dB, like(scales, needs[5])


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    x, weight, bias, A, B, scales, index, _ = inputs
    ctx.save_for_backward(x, weight, output[1], scales, index, *A, *B)
    ctx.mark_non_differentiable(output[1])
    ctx.has_bias = bias is not None
    ctx.set_materialize_grads(False)


def _backward(bwd_name: str, ctx: Any, dy: Tensor | None, _: Any) -> tuple:
    x, weight, S, scales, index, *factors = ctx.saved_tensors
    n = len(factors) // 2
    if dy is None:
        return None, None, None, [None] * n, [None] * n, None, None, None
    asked = ctx.needs_input_grad
    needs = [asked[0], asked[1], ctx.has_bias and asked[2], any(asked[3]), any(asked[4]), asked[5]]
    dx, dweight, dbias, dA, dB, dscales = common.call_eagerly(
        bwd_name, dy, x, weight, factors[:n], factors[n:], S, scales, index, needs
    )
    ones = (grad if need else None for grad, need in zip((dx, dweight, dbias), needs[:3], strict=True))
    dA = [grad if need else None for grad, need in zip(dA, asked[3], strict=True)]
    dB = [grad if need else None for grad, need in zip(dB, asked[4], strict=True)]
    return *ones, dA, dB, dscales if needs[5] else None, None, None


common.define("lora_linear_multi_fwd", _FWD, _fwd_fake)
common.define("lora_linear_multi_bwd", _BWD, _bwd_fake)
for _suffix in common.SUFFIXES:
    fwd, bwd = f"lora_linear_multi_fwd{_suffix}", f"lora_linear_multi_bwd{_suffix}"
    torch.library.register_autograd(
        f"trifuse::{fwd}", functools.partial(_backward, bwd), setup_context=_setup_context, lib=LIB
    )
    torch.library.register_autograd(f"trifuse::{bwd}", common.no_second_derivative("lora_linear_multi"), lib=LIB)
common.implement_triton("lora_linear_multi", "lora_linear_multi_fwd", "lora_linear_multi_bwd")


def _cuda_refusals(call: Any) -> list[str]:
    return ["it has no kernel of this op, whose kernel for GPUs is Triton's"]


def _triton_refusals(call: Any) -> list[str]:
    reasons = common.triton_refusals(call, call.x)
    if call.x.dtype == torch.float64:
        reasons.append("it computes in float32, and the inputs are float64")
    return reasons


def register_backends(op: Op) -> None:
    op.backend("cpp", common.cpp_refusals)
    op.backend("cuda", _cuda_refusals)
    op.backend("triton", _triton_refusals)


LIB.define(
    "lora_linear_multi_plain(Tensor x, Tensor weight, Tensor? bias, Tensor[] A, Tensor[] B, float[] scales,"
    " Tensor index) -> Tensor"
)
_plain = common.bare("lora_linear_multi_plain")


def _plain_fake(x, weight, bias, A, B, scales, index):
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


torch.library.register_fake("trifuse::lora_linear_multi_plain", _plain_fake, lib=LIB)


def plain(
    x: Tensor, weight: Tensor, bias: Tensor | None, A: list[Tensor], B: list[Tensor], scales: list[float], index: Tensor
) -> Tensor | None:
    """The output in one call, which looks at its arguments itself; None where it does not take them."""
    y = _plain(x, weight, bias, A, B, scales, index)
    return y if y.numel() else None


def linear(backend: str, call: Any) -> Tensor:
    """Run a checked call of ``lora_linear_multi`` on a native backend."""
    x, weight, bias, A, B, scales, index = call
    common.refuse_forward_mode("lora_linear_multi", (x, weight, bias, *A, *B, scales))
    rows = common.matrix(x)
    save = common.needs_grad((*A, *B, scales))
    name = "lora_linear_multi_fwd" + ("_triton" if backend == "triton" else "")
    arguments = (rows, weight, bias, A, B, scales, index.reshape(-1), save)
    tensors = (rows, weight, bias, *A, *B, scales)
    if common.is_eager(tensors) and not common.needs_grad(tensors):
        with torch._C._AutoDispatchBelowAutograd():
            y, _ = getattr(torch.ops.trifuse, name).default(*arguments)
    else:
        y, _ = getattr(torch.ops.trifuse, name)(*arguments)
    return y.view(*x.shape[:-1], weight.shape[0])
