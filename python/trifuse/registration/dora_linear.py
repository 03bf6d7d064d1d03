"""The torch ops behind ``dora_linear``: lora_linear's, put together with factors of the columns, and ``x Aᵀ``, of which
the norms are made."""

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
_NORM = "(Tensor weight, Tensor lora_A, Tensor lora_B, float scale, Tensor? p) -> Tensor"
_DOWN = "(Tensor x, Tensor lora_A) -> Tensor"
_FWD = (
    "(Tensor x, Tensor weight, Tensor? bias, Tensor lora_A, Tensor lora_B, Tensor factors, float scale, Tensor? p,"
    " float dropout, Tensor? seed, bool save) -> (Tensor y, Tensor plain, Tensor S)"
)
_BWD = (
    "(Tensor dy, Tensor x, Tensor weight, Tensor lora_A, Tensor lora_B, Tensor factors, Tensor plain, Tensor S,"
    " float scale, Tensor? p, float dropout, Tensor? seed, bool[] needs)"
    " -> (Tensor dx, Tensor dweight, Tensor dbias, Tensor dA, Tensor dB, Tensor dfactors, Tensor dp)"
)
_DOWN_BWD = "(Tensor dS, Tensor x, Tensor lora_A, bool x_grad, bool A_grad) -> (Tensor dx, Tensor dA)"


def _scale_fake(plain, factors, bias):
    return plain.new_empty(plain.shape)


def _scale_bwd_fake(dy, plain, factors, factors_grad):
    return plain.new_empty(plain.shape), factors.new_empty(factors.shape if factors_grad else (0,))


def _norm_fake(weight, lora_A, lora_B, scale, p):
    return weight.new_empty(weight.shape[:1], dtype=common.accumulation_dtype(weight))


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
    torch.library.register_autograd(f"trifuse::{_name}", common.no_second_derivative("dora_linear"), lib=LIB)

LIB.define("dora_norm_fwd" + _NORM)
torch.library.register_fake("trifuse::dora_norm_fwd", _norm_fake, lib=LIB)
torch.library.register_autograd("trifuse::dora_norm_fwd", common.no_second_derivative("dora_linear"), lib=LIB)
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


def _forward(suffix, x, weight, bias, lora_A, lora_B, factors, scale, p, dropout, seed, save):
    fwd = getattr(torch.ops.trifuse, f"lora_linear_fwd{suffix}").default
    rank = lora_A.shape[0]
    plain, S = fwd(x, weight, None, lora_A, lora_B, scale, p, rank, False, dropout, seed, False, save)
    return torch.ops.trifuse.dora_scale.default(plain, factors, bias), plain, S


def _backward(suffix, dy, x, weight, lora_A, lora_B, factors, plain, S, scale, p, dropout, seed, needs):
    bwd = getattr(torch.ops.trifuse, f"lora_linear_bwd{suffix}").default
    x_grad, weight_grad, bias_grad, A_grad, B_grad, factors_grad, p_grad = needs
    acc = common.accumulation_dtype(x)
    rest = (S, scale, p, lora_A.shape[0], False, dropout, seed, False)
    scaled, dfactors = torch.ops.trifuse.dora_scale_bwd.default(dy, plain, factors, factors_grad)
    if x.dtype == acc or not (A_grad or B_grad or p_grad):
        wanted = [x_grad, weight_grad, False, A_grad, B_grad, p_grad]
        dx, dweight, _, dA, dB, dp = bwd(scaled, x, weight, lora_A, lora_B, *rest, wanted)
    else:  # what is scaled has been rounded: good enough for the gradient of x, but not for the adapter's in float32
        wanted = [x_grad, weight_grad, False, False, False, False]
        dx, dweight, *_ = bwd(scaled, x, weight, lora_A, lora_B, *rest, wanted)
        wanted = [False, False, False, A_grad, B_grad, p_grad]
        column = factors[:, None]
        *_, dA, dB, dp = bwd(dy, x, weight, lora_A.to(acc), lora_B.to(acc) * column, *rest, wanted)
        dA = dA.to(lora_A.dtype)
        dB = (dB * column).to(lora_B.dtype) if B_grad else dB.to(lora_B.dtype)
    dbias = dy.sum(0) if bias_grad else dy.new_empty(0)
    return dx, dweight, dbias, dA, dB, dfactors, dp


def _fwd_fake(x, weight, bias, lora_A, lora_B, factors, scale, p, dropout, seed, save):
    rows, acc = x.shape[0], common.accumulation_dtype(x)
    y, plain = (x.new_empty((rows, weight.shape[0])) for _ in range(2))
    return y, plain, x.new_empty((rows if save else 0, lora_A.shape[0]), dtype=acc)


def _bwd_fake(dy, x, weight, lora_A, lora_B, factors, plain, S, scale, p, dropout, seed, needs):
    like = (x, weight, dy, lora_A, lora_B, factors, S)
    shapes = (x.shape, weight.shape, weight.shape[:1], lora_A.shape, lora_B.shape, factors.shape, lora_A.shape[:1])
    return tuple(one.new_empty(shape if need else (0,)) for one, shape, need in zip(like, shapes, needs, strict=True))


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    x, weight, bias, lora_A, lora_B, factors, scale, p, dropout, seed, _ = inputs
    ctx.save_for_backward(x, weight, lora_A, lora_B, factors, output[1], output[2], p, seed)
    ctx.mark_non_differentiable(output[1], output[2])
    ctx.scale, ctx.dropout, ctx.has_bias = scale, dropout, bias is not None
    ctx.set_materialize_grads(False)


def _gradients(bwd_name: str, ctx: Any, dy: Tensor | None, *_: Any) -> tuple:
    if dy is None:
        return (None,) * 11
    x, weight, lora_A, lora_B, factors, plain, S, p, seed = ctx.saved_tensors
    asked = ctx.needs_input_grad
    needs = [*asked[:2], ctx.has_bias and asked[2], *asked[3:6], p is not None and asked[7]]
    grads = common.call_eagerly(
        bwd_name, dy, x, weight, lora_A, lora_B, factors, plain, S, ctx.scale, p, ctx.dropout, seed, needs
    )
    *six, dp = (grad if need else None for grad, need in zip(grads, needs, strict=True))
    return *six, None, dp, None, None, None


_LINEAR = {}
for _suffix in common.SUFFIXES:
    _fwd, _bwd = f"dora_linear_fwd{_suffix}", f"dora_linear_bwd{_suffix}"
    for _name, _schema, _fake, _compute in (
        (_fwd, _FWD, _fwd_fake, _forward), (_bwd, _BWD, _bwd_fake, _backward),
    ):  # fmt: skip
        LIB.define(_name + _schema)
        torch.library.register_fake(f"trifuse::{_name}", _fake, lib=LIB)
        for _device in ("CPU", "CUDA"):
            LIB.impl(_name, functools.partial(_compute, _suffix), _device)
    _grads = functools.partial(_gradients, _bwd)
    torch.library.register_autograd(f"trifuse::{_fwd}", _grads, setup_context=_setup_context, lib=LIB)
    torch.library.register_autograd(f"trifuse::{_bwd}", common.no_second_derivative("dora_linear"), lib=LIB)
    _LINEAR[_suffix] = common.eager_function(_fwd, _setup_context, _grads)


_PLAIN = (
    "(Tensor x, Tensor weight, Tensor? bias, Tensor lora_A, Tensor lora_B, Tensor magnitude, float scale,"
    " float dropout, Tensor? seed, bool save, bool save_plain)"
    " -> (Tensor y, Tensor plain, Tensor S, Tensor norm, Tensor factors)"
)
_PLAIN_BWD = (
    "(Tensor dy, Tensor x, Tensor weight, Tensor lora_A, Tensor lora_B, Tensor S, Tensor plain, Tensor norm,"
    " Tensor factors, float scale, float dropout, Tensor? seed, bool[] needs)"
    " -> (Tensor dx, Tensor dweight, Tensor dbias, Tensor dA, Tensor dB, Tensor dmagnitude)"
)


def _plain_fake(x, weight, bias, lora_A, lora_B, magnitude, scale, dropout, seed, save, save_plain):
    rows, out = x.numel() // max(x.shape[-1], 1), weight.shape[0]
    S = x.new_empty((rows if save else 0, lora_A.shape[0]))
    plain = x.new_empty((rows if save_plain else 0, out))
    return x.new_empty((*x.shape[:-1], out)), plain, S, x.new_empty(out), x.new_empty(out)


def _plain_bwd_fake(dy, x, weight, lora_A, lora_B, S, plain, norm, factors, scale, dropout, seed, needs):
    like = (x, weight, dy, lora_A, lora_B, norm)
    shapes = (x.shape, weight.shape, weight.shape[:1], lora_A.shape, lora_B.shape, norm.shape)
    return tuple(one.new_empty(shape if need else (0,)) for one, shape, need in zip(like, shapes, needs, strict=True))


LIB.define("dora_linear_plain" + _PLAIN)
LIB.define("dora_linear_plain_bwd" + _PLAIN_BWD)
torch.library.register_fake("trifuse::dora_linear_plain", _plain_fake, lib=LIB)
torch.library.register_fake("trifuse::dora_linear_plain_bwd", _plain_bwd_fake, lib=LIB)
_plain_forward = common.bare("dora_linear_plain")
_plain_backward = common.bare("dora_linear_plain_bwd")
_BACKWARD = torch.ops.trifuse.dora_linear_bwd.default


class _Plain(torch.autograd.Function):
    """``dora_linear_plain`` and its gradients."""

    @staticmethod
    def forward(ctx, x, weight, bias, lora_A, lora_B, magnitude, scale, dropout, seed):
        save = lora_A.requires_grad or lora_B.requires_grad
        y, plain, S, norm, factors = _plain_forward(
            x, weight, bias, lora_A, lora_B, magnitude, scale, dropout, seed, save, magnitude.requires_grad
        )
        if not y.numel():
            raise common.RefusedError
        ctx.save_for_backward(x, weight, lora_A, lora_B, magnitude, S, plain, norm, factors, seed)
        ctx.rest = scale, dropout, bias is not None
        return y

    @staticmethod
    def backward(ctx, dy):
        x, weight, lora_A, lora_B, magnitude, S, plain, norm, factors, seed = ctx.saved_tensors
        scale, dropout, has_bias = ctx.rest
        asked = ctx.needs_input_grad
        needs = [asked[0], asked[1], has_bias and asked[2], asked[3], asked[4], asked[5]]
        if not torch.is_grad_enabled():
            grads = _plain_backward(dy, x, weight, lora_A, lora_B, S, plain, norm, factors, scale, dropout, seed, needs)
        else:  # a second derivative may be asked for, of the magnitude, too: the op that says it has none
            rows, dout = x.view(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
            there = norm > 0
            divisor = torch.where(there, norm, 1)
            if not needs[5]:
                plain = dout  # it was not kept, and is not read
            *grads, _ = _BACKWARD(
                dout, rows, weight, lora_A, lora_B, torch.where(there, magnitude / divisor, 0), plain, S, scale, None,
                dropout, seed, [*needs, False],
            )  # fmt: skip
            if needs[0]:
                grads[0] = grads[0].view(x.shape)
            if needs[5]:
                grads[5] = torch.where(there, grads[5] / divisor, 0)
        grads = [grad if need else None for grad, need in zip(grads, needs, strict=True)]
        return *grads, None, None, None


_apply = common.bare_apply(_Plain)


def plain(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_A: Tensor, lora_B: Tensor, magnitude: Tensor, scale: float,
    dropout: float, seed: Tensor | None,
) -> Tensor | None:  # fmt: skip
    """The output in one call, which looks at its arguments itself, the norm a constant to the backward pass; None where
    it does not take them."""
    if common.needs_grad((x, weight, bias, lora_A, lora_B, magnitude)):
        try:
            return _apply(x, weight, bias, lora_A, lora_B, magnitude, scale, dropout, seed)
        except common.RefusedError:
            return None
    y, *_ = _plain_forward(x, weight, bias, lora_A, lora_B, magnitude, scale, dropout, seed, False, False)
    return y if y.numel() else None


def linear(backend: str, call: Any, factors: Tensor) -> Tensor:
    """Run a checked call of ``dora_linear`` on a native backend, with the factors of its columns."""
    one = call.lora
    x = common.matrix(one.x)
    save = common.needs_grad((one.lora_A, one.lora_B, one.p))
    y, _, _ = _LINEAR["_triton" if backend == "triton" else ""](
        x, one.weight, call.bias, one.lora_A, one.lora_B, factors, one.scale, one.p, one.dropout, one.seed, save
    )
    return y.view(*one.x.shape[:-1], one.weight.shape[0])


def register_backends(op: Op) -> None:
    lora.register_backends(op)


_DOWN = {  # made here: a class is nothing that torch.compile could trace
    f"lora_down{suffix}": common.eager_function(
        f"lora_down{suffix}", _down_setup, functools.partial(_down_backward, f"lora_down_bwd{suffix}")
    )
    for suffix in common.SUFFIXES
}


def norm(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scale: float, p: Tensor | None) -> Tensor:
    """The norms on a CPU, where no gradient is asked of them."""
    with torch.no_grad():
        return common.call_eagerly("dora_norm_fwd", weight, lora_A, lora_B, scale, p)


def down(backend: str, x: Tensor, lora_A: Tensor) -> Tensor:
    """``x Aᵀ`` in the accumulation dtype, for A in that dtype or in the one of x."""
    return _DOWN["lora_down_triton" if backend == "triton" else "lora_down"](x, lora_A)
