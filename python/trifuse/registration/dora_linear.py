"""The torch ops that ``dora_linear`` puts together with lora_linear's: the factors of the columns of a matrix, and
``x Aᵀ``, of which the norms are made."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from trifuse._library import LIB
from trifuse.backends import Op
from trifuse.registration import common
from trifuse.registration import lora_linear as lora

_SCALE = "(Tensor plain, Tensor factors, Tensor? bias) -> Tensor"
_SCALE_BWD = "(Tensor dy, Tensor plain, Tensor factors, bool factors_grad) -> (Tensor dplain, Tensor dfactors)"
_DOWN = "(Tensor x, Tensor lora_A) -> Tensor"
_DOWN_BWD = "(Tensor dS, Tensor x, Tensor lora_A, bool x_grad, bool A_grad) -> (Tensor dx, Tensor dA)"


def _scale_fake(plain, factors, bias):
    return plain.new_empty(plain.shape)


def _scale_bwd_fake(dy, plain, factors, factors_grad):
    return plain.new_empty(plain.shape), factors.new_empty(factors.shape if factors_grad else (0,))


def _scale_setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    plain, factors, bias = inputs
    ctx.save_for_backward(plain, factors)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _scale_backward(ctx: Any, dy: Tensor) -> tuple:
    plain, factors = ctx.saved_tensors
    plain_grad, factors_grad, bias_grad = ctx.needs_input_grad
    dplain, dfactors = common.call_eagerly("dora_scale_bwd", dy, plain, factors, factors_grad)
    dbias = dy.sum(0).to(ctx.bias_dtype) if ctx.bias_dtype is not None and bias_grad else None
    return dplain if plain_grad else None, dfactors if factors_grad else None, dbias


def _down_fake(x, lora_A):
    return x.new_empty((x.shape[0], lora_A.shape[0]), dtype=common.accumulation_dtype(x))


def _down_bwd_fake(dS, x, lora_A, x_grad, A_grad):
    return x.new_empty(x.shape if x_grad else (0,)), lora_A.new_empty(lora_A.shape if A_grad else (0,))


def _down_setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _down_backward(bwd_name: str, ctx: Any, dS: Tensor) -> tuple:
    x_grad, A_grad = ctx.needs_input_grad
    dx, dA = common.call_eagerly(bwd_name, dS, *ctx.saved_tensors, x_grad, A_grad)
    return dx if x_grad else None, dA if A_grad else None


common.SCHEMAS.update(dora_scale=_SCALE, dora_scale_bwd=_SCALE_BWD)
for _name, _schema, _fake in (("dora_scale", _SCALE, _scale_fake), ("dora_scale_bwd", _SCALE_BWD, _scale_bwd_fake)):
    LIB.define(_name + _schema)
    torch.library.register_fake(f"trifuse::{_name}", _fake, lib=LIB)
torch.library.register_autograd("trifuse::dora_scale", _scale_backward, setup_context=_scale_setup, lib=LIB)
torch.library.register_autograd("trifuse::dora_scale_bwd", common.no_second_derivative("dora_linear"), lib=LIB)

common.define("lora_down", _DOWN, _down_fake)
common.define("lora_down_bwd", _DOWN_BWD, _down_bwd_fake)
for _suffix in common.SUFFIXES:
    torch.library.register_autograd(
        f"trifuse::lora_down{_suffix}", functools.partial(_down_backward, f"lora_down_bwd{_suffix}"),
        setup_context=_down_setup, lib=LIB,
    )  # fmt: skip
    torch.library.register_autograd(
        f"trifuse::lora_down_bwd{_suffix}", common.no_second_derivative("dora_linear"), lib=LIB
    )
common.implement_triton("lora_linear", "lora_down", "lora_down_bwd")


def _scale_on_gpu(plain: Tensor, factors: Tensor, bias: Tensor | None) -> Tensor:
    y = plain * factors
    return (y if bias is None else y + bias).to(plain.dtype)


def _scale_bwd_on_gpu(dy: Tensor, plain: Tensor, factors: Tensor, factors_grad: bool) -> tuple[Tensor, Tensor]:
    dplain = (dy * factors).to(plain.dtype)
    if not factors_grad:
        return dplain, factors.new_empty(0)
    return dplain, (dy.to(factors.dtype) * plain).sum(0)


LIB.impl("dora_scale", _scale_on_gpu, "CUDA")
LIB.impl("dora_scale_bwd", _scale_bwd_on_gpu, "CUDA")


def register_backends(op: Op) -> None:
    lora.register_backends(op)


_scale = common.eager_function("dora_scale", _scale_setup, _scale_backward)


_DOWN = {  # made here: a class is nothing that torch.compile could trace
    f"lora_down{suffix}": common.eager_function(
        f"lora_down{suffix}", _down_setup, functools.partial(_down_backward, f"lora_down_bwd{suffix}")
    )
    for suffix in common.SUFFIXES
}


def scale(plain: Tensor, factors: Tensor, bias: Tensor | None) -> Tensor:
    """``plain * factors + bias`` of a ``(..., N)`` matrix."""
    return _scale(common.matrix(plain), factors, bias).view(plain.shape)


def down(backend: str, x: Tensor, lora_A: Tensor) -> Tensor:
    """``x Aᵀ`` in the accumulation dtype, for A in that dtype or in the one of x."""
    return _DOWN["lora_down_triton" if backend == "triton" else "lora_down"](x, lora_A)
