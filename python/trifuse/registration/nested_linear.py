"""The torch ops behind ``nested_linear``, and what they compute: products of torch's own, on any device.

All arithmetic here is matrix products, which belong to BLAS and cuBLAS; what is ours is that each column of the weight
is multiplied once however many widths contain it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from trifuse._library import LIB
from trifuse.backends import COMPOSITE, Op
from trifuse.registration import common

__all__ = ["logits", "register_backends"]

_FWD = "(Tensor x, Tensor weight, Tensor? bias, int[] widths) -> Tensor"
_BWD = "(Tensor dout, Tensor x, Tensor weight, int[] widths, bool[] needs) -> (Tensor dx, Tensor dweight, Tensor dbias)"


def _pieces(widths: Sequence[int]) -> list[tuple[int, int]]:
    """The columns that each width adds to the one before."""
    return list(zip([0, *widths[:-1]], widths, strict=True))


def _fwd(x: Tensor, weight: Tensor, bias: Tensor | None, widths: Sequence[int]) -> Tensor:
    """x (M, K), weight (N, K), bias (N,) -> (len(widths), M, N).

    In float32 and float64 BLAS adds each product to the logits before it. In half precision that would round the
    logits of a width once for every width before it, so the sum is kept in float32: one rounding of every product.
    """
    out = _fwd_fake(x, weight, bias, widths)
    if common.accumulation_dtype(x) == x.dtype:
        before = bias
        for logits, (start, end) in zip(out, _pieces(widths), strict=True):
            columns, block = x[:, start:end], weight[:, start:end].t()
            if before is None:
                torch.mm(columns, block, out=logits)
            else:
                torch.addmm(before, columns, block, out=logits)
            before = logits
        return out
    total = torch.zeros(out.shape[1:], dtype=torch.float32, device=x.device)
    if bias is not None:
        total += bias
    for logits, (start, end) in zip(out, _pieces(widths), strict=True):
        torch.mm(x[:, start:end], weight[:, start:end].t(), out=logits)
        total += logits
        logits.copy_(total)
    return out


def _bwd(
    dout: Tensor, x: Tensor, weight: Tensor, widths: Sequence[int], needs: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """dout (len(widths), M, N): the logits of every width that has a column pass their gradient on to it."""
    dx, dweight, dbias = _bwd_fake(dout, x, weight, widths, needs)
    for grad in (dx, dweight):
        if grad.dim() == 2:
            grad[:, widths[-1] :] = 0
    for (start, end), total in zip(reversed(_pieces(widths)), _suffix_sums(dout), strict=True):
        # A kernel of half precision takes both factors in it.
        factor = total.to(dout.dtype)
        if needs[0]:
            torch.mm(factor, weight[:, start:end], out=dx[:, start:end])
        if needs[1]:
            torch.mm(factor.t(), x[:, start:end], out=dweight[:, start:end])
    if needs[2]:
        dbias.copy_(total.sum(0))
    return dx, dweight, dbias


def _suffix_sums(dout: Tensor) -> Iterator[Tensor]:
    """(M, N) in the accumulation dtype for each width, the last first: its gradient and those of all wider ones."""
    total = dout[-1].to(common.accumulation_dtype(dout))
    yield total
    for i in range(len(dout) - 2, -1, -1):
        # The first sum is a new tensor, and no longer dout's.
        total = total + dout[i] if i == len(dout) - 2 else total.add_(dout[i])
        yield total


def _fwd_fake(x: Tensor, weight: Tensor, bias: Tensor | None, widths: Sequence[int]) -> Tensor:
    return x.new_empty((len(widths), x.shape[0], weight.shape[0]))


def _bwd_fake(
    dout: Tensor, x: Tensor, weight: Tensor, widths: Sequence[int], needs: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    shapes = (x.shape, weight.shape, weight.shape[:1])
    return tuple(x.new_empty(shape if need else (0,)) for shape, need in zip(shapes, needs, strict=True))


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, weight, bias, ctx.widths = inputs
    ctx.save_for_backward(x, weight)
    ctx.has_bias = bias is not None
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dout: Tensor | None) -> tuple:
    if dout is None:
        return (None,) * 4
    asked = ctx.needs_input_grad
    needs = [asked[0], asked[1], ctx.has_bias and asked[2]]
    grads = torch.ops.trifuse.nested_linear_bwd(dout, *ctx.saved_tensors, ctx.widths, needs)
    return *(grad if need else None for grad, need in zip(grads, needs, strict=True)), None


def _define(name: str, schema: str, call: Callable[..., Any], fake: Callable[..., Any]) -> None:
    LIB.define(name + schema)
    LIB.impl(name, call, "CompositeExplicitAutograd")
    torch.library.register_fake(f"trifuse::{name}", fake, lib=LIB)


_define("nested_linear_fwd", _FWD, _fwd, _fwd_fake)
_define("nested_linear_bwd", _BWD, _bwd, _bwd_fake)
torch.library.register_autograd("trifuse::nested_linear_fwd", _backward, setup_context=_setup_context, lib=LIB)
torch.library.register_autograd("trifuse::nested_linear_bwd", common.no_second_derivative("nested_linear"), lib=LIB)


def register_backends(op: Op) -> None:
    op.backend(COMPOSITE, lambda call: [])
    for name in ("cpp", "cuda", "triton"):
        op.backend(name, lambda call: ["it has no kernel of this op, which is matrix products of torch's own"])


def logits(call: Any) -> Tensor:
    """Run a checked call of ``nested_linear``: ``(len(widths), M, N)`` for x ``(M, K)``."""
    common.refuse_forward_mode("nested_linear", call)
    return torch.ops.trifuse.nested_linear_fwd(*call)
