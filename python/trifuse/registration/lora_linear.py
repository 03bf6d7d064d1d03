"""The torch ops behind ``lora_linear``: schemas, fake kernels, autograd, and who can serve what."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from trifuse._library import LIB
from trifuse.backends import Op
from trifuse.registration import common

_FWD = (
    "(Tensor x, Tensor weight, Tensor? bias, Tensor lora_A, Tensor lora_B, float scale, Tensor? p, SymInt active_rank,"
    " bool frozen, float dropout, Tensor? seed, bool merged, bool save) -> (Tensor y, Tensor S)"
)
_BWD = (
    "(Tensor dy, Tensor x, Tensor weight, Tensor lora_A, Tensor lora_B, Tensor S, float scale, Tensor? p,"
    " SymInt active_rank, bool frozen, float dropout, Tensor? seed, bool merged, bool[] needs)"
    " -> (Tensor dx, Tensor dweight, Tensor dbias, Tensor dA, Tensor dB, Tensor dp)"
)


def _fwd_fake(x, weight, bias, lora_A, lora_B, scale, p, active_rank, frozen, dropout, seed, merged, save):
    rows, acc = x.shape[0], common.accumulation_dtype(x)
    return x.new_empty((rows, weight.shape[0])), x.new_empty((rows if save else 0, active_rank), dtype=acc)


def _bwd_fake(
    dy, x, weight, lora_A, lora_B, S, scale, p, active_rank, frozen, dropout, seed, merged, needs
):  # fmt: skip
    like = (x, weight, dy, lora_A, lora_B, S)
    shapes = (x.shape, weight.shape, weight.shape[:1], lora_A.shape, lora_B.shape, lora_A.shape[:1])
    return tuple(one.new_empty(shape if need else (0,)) for one, shape, need in zip(like, shapes, needs, strict=True))


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    x, weight, bias, lora_A, lora_B, scale, p, active_rank, frozen, dropout, seed, merged, _ = inputs
    ctx.save_for_backward(x, weight, lora_A, lora_B, output[1], p, seed)
    ctx.mark_non_differentiable(output[1])
    ctx.scale, ctx.active_rank, ctx.frozen, ctx.dropout, ctx.merged = scale, active_rank, frozen, dropout, merged
    ctx.has_bias = bias is not None
    ctx.set_materialize_grads(False)


def _backward(bwd_name: str, ctx: Any, dy: Tensor | None, _: Any) -> tuple:
    if dy is None:
        return (None,) * 13
    x, weight, lora_A, lora_B, S, p, seed = ctx.saved_tensors
    asked = ctx.needs_input_grad
    needs = [asked[0], asked[1], ctx.has_bias and asked[2], asked[3], asked[4], p is not None and asked[6]]
    grads = common.call_eagerly(
        bwd_name, dy, x, weight, lora_A, lora_B, S, ctx.scale, p, ctx.active_rank, ctx.frozen, ctx.dropout, seed,
        ctx.merged, needs,
    )  # fmt: skip
    dx, dweight, dbias, dA, dB, dp = (grad if need else None for grad, need in zip(grads, needs, strict=True))
    return dx, dweight, dbias, dA, dB, None, dp, None, None, None, None, None, None


_PLAIN = (
    "(Tensor x, Tensor weight, Tensor? bias, Tensor lora_A, Tensor lora_B, float scale, SymInt active_rank,"
    " float dropout, Tensor? seed, bool merged, bool save) -> (Tensor y, Tensor S)"
)


_PLAIN_BWD = (
    "(Tensor dy, Tensor x, Tensor weight, Tensor lora_A, Tensor lora_B, Tensor S, float scale, SymInt active_rank,"
    " bool frozen, float dropout, Tensor? seed, bool merged, bool[] needs)"
    " -> (Tensor dx, Tensor dweight, Tensor dbias, Tensor dA, Tensor dB)"
)


def _plain_fake(x, weight, bias, lora_A, lora_B, scale, active_rank, dropout, seed, merged, save):
    rows = x.numel() // max(x.shape[-1], 1) if save else 0
    S = x.new_empty((rows, active_rank), dtype=common.accumulation_dtype(x))
    return x.new_empty((*x.shape[:-1], weight.shape[0])), S


def _plain_bwd_fake(dy, x, weight, lora_A, lora_B, S, scale, active_rank, frozen, dropout, seed, merged, needs):
    like = (x, weight, dy, lora_A, lora_B)
    shapes = (x.shape, weight.shape, weight.shape[:1], lora_A.shape, lora_B.shape)
    return tuple(one.new_empty(shape if need else (0,)) for one, shape, need in zip(like, shapes, needs, strict=True))


common.define("lora_linear_fwd", _FWD, _fwd_fake)
common.define("lora_linear_bwd", _BWD, _bwd_fake)
for _suffix in common.SUFFIXES:
    fwd, bwd = f"lora_linear_fwd{_suffix}", f"lora_linear_bwd{_suffix}"
    torch.library.register_autograd(
        f"trifuse::{fwd}", functools.partial(_backward, bwd), setup_context=_setup_context, lib=LIB
    )
    torch.library.register_autograd(f"trifuse::{bwd}", common.no_second_derivative("lora_linear"), lib=LIB)
LIB.define("lora_linear_plain" + _PLAIN)
LIB.define("lora_linear_plain_bwd" + _PLAIN_BWD)
torch.library.register_fake("trifuse::lora_linear_plain", _plain_fake, lib=LIB)
torch.library.register_fake("trifuse::lora_linear_plain_bwd", _plain_bwd_fake, lib=LIB)
common.implement_triton("lora_linear", "lora_linear_fwd", "lora_linear_bwd")


def _cuda_refusals(call: Any) -> list[str]:
    reasons = common.cuda_refusals(call)
    if call.x.dtype == torch.float64:
        reasons.append("it computes in float32, and the inputs are float64")
    return reasons


def _triton_refusals(call: Any) -> list[str]:
    reasons = common.triton_refusals(call, call.x)
    if call.x.dtype == torch.float64:
        reasons.append("it computes in float32, and the inputs are float64")
    return reasons


def register_backends(op: Op) -> None:
    op.backend("cpp", common.cpp_refusals)
    op.backend("cuda", _cuda_refusals)
    op.backend("triton", _triton_refusals)


# What the adapter's own passes cost on two AVX-512 cores, in seconds: a multiply-add of the factors, a number of W
# that is merged. Only their ratio matters. Of 84 measured pairs (forward and training, three shapes, ranks 8 to 64, 256
# to 4096 rows) they choose the faster form in 79, and are 0.2 to 8 % off in the others.
_FACTOR = 1.0 / 60e9
_MERGED = 1.0 / 1.5e9


def merged_is_cheaper(rows: int, columns: int, out: int, rank: int, training: bool) -> bool:
    """Whether ``x (W + s B A)ᵀ`` costs less than the factors, on a CPU. In training S is made in either form, and the
    backward pass merges again."""
    saved = rows * rank * (out if training else columns + out) * _FACTOR
    if training:
        saved += rows * rank * columns * _FACTOR
    return saved > (2 if training else 1) * columns * out * (_MERGED + rank * _FACTOR)


def _certainly(condition: bool) -> bool:
    """A condition on sizes; while a graph is made, False where it holds for some of the sizes that the graph serves."""
    if torch.compiler.is_compiling():
        from torch.fx.experimental.symbolic_shapes import statically_known_true

        return statically_known_true(condition)
    return condition


_FORWARD = {  # made here: a class is nothing that torch.compile could trace
    f"lora_linear_fwd{suffix}": common.eager_function(
        f"lora_linear_fwd{suffix}", _setup_context, functools.partial(_backward, f"lora_linear_bwd{suffix}")
    )
    for suffix in common.SUFFIXES
}


_plain_forward = common.bare("lora_linear_plain")
_plain_backward = common.bare("lora_linear_plain_bwd")
_BACKWARD = torch.ops.trifuse.lora_linear_bwd.default


class _Plain(torch.autograd.Function):
    """``lora_linear_plain`` and its gradients."""

    @staticmethod
    def forward(ctx, x, weight, bias, lora_A, lora_B, scale, active_rank, frozen, dropout, seed, merged):
        save = lora_A.requires_grad or lora_B.requires_grad
        y, S = _plain_forward(x, weight, bias, lora_A, lora_B, scale, active_rank, dropout, seed, merged, save)
        if not y.numel():
            raise common.RefusedError
        ctx.save_for_backward(x, weight, lora_A, lora_B, S, seed)
        ctx.rest = scale, active_rank, frozen, dropout, merged, bias is not None
        return y

    @staticmethod
    def backward(ctx, dy):
        x, weight, lora_A, lora_B, S, seed = ctx.saved_tensors
        scale, active_rank, frozen, dropout, merged, has_bias = ctx.rest
        asked = ctx.needs_input_grad
        needs = [asked[0], asked[1], has_bias and asked[2], asked[3], asked[4]]
        if not torch.is_grad_enabled():
            grads = _plain_backward(
                dy, x, weight, lora_A, lora_B, S, scale, active_rank, frozen, dropout, seed, merged, needs
            )
        else:  # a second derivative may be asked for: the op that says it has none
            rows, dout = x.view(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
            *grads, _ = _BACKWARD(
                dout, rows, weight, lora_A, lora_B, S, scale, None, active_rank, frozen, dropout, seed, merged,
                [*needs, False],
            )  # fmt: skip
            if needs[0]:
                grads[0] = grads[0].view(x.shape)
        grads = [grad if need else None for grad, need in zip(grads, needs, strict=True)]
        return *grads, None, None, None, None, None, None


_apply = common.bare_apply(_Plain)


def plain(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_A: Tensor, lora_B: Tensor, scale: float, active_rank: int,
    frozen: bool, dropout: float, seed: Tensor | None,
) -> Tensor | None:  # fmt: skip
    """The output in one call, which looks at its arguments itself; None where it does not take them."""
    recorded = torch.is_grad_enabled()
    save = recorded and (lora_A.requires_grad or lora_B.requires_grad)
    merged = False
    if seed is None and x.dim() > 0 and x.numel() > 64 * x.shape[-1] and x.dtype in _WIDE and weight.dim() == 2:
        rows = x.numel() // x.shape[-1]
        merged = merged_is_cheaper(rows, weight.shape[1], weight.shape[0], active_rank, save)
    if save or (recorded and common.needs_grad((x, weight, bias))):
        try:
            return _apply(x, weight, bias, lora_A, lora_B, scale, active_rank, frozen, dropout, seed, merged)
        except common.RefusedError:
            return None
    y, _ = _plain_forward(x, weight, bias, lora_A, lora_B, scale, active_rank, dropout, seed, merged, False)
    return y if y.numel() else None


_WIDE = (torch.float32, torch.float64)


def linear(backend: str, call: Any) -> Tensor:
    """Run a checked call of ``lora_linear`` on a native backend."""
    common.refuse_forward_mode("lora_linear", call)
    x = common.matrix(call.x)
    save = torch.is_grad_enabled() and any(
        one is not None and one.requires_grad for one in (call.lora_A, call.lora_B, call.p)
    )
    merged = (
        backend == "cpp" and call.seed is None and call.weight.dtype == common.accumulation_dtype(x)
        and _certainly(merged_is_cheaper(x.shape[0], *call.weight.shape[::-1], call.active_rank, save))
    )  # fmt: skip
    y, _ = _FORWARD["lora_linear_fwd_triton" if backend == "triton" else "lora_linear_fwd"](
        x, call.weight, call.bias, call.lora_A, call.lora_B, call.scale, call.p, call.active_rank, call.frozen,
        call.dropout, call.seed, merged, save,
    )  # fmt: skip
    return y.view(*call.x.shape[:-1], call.weight.shape[0])
