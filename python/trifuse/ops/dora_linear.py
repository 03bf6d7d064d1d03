"""``dora_linear`` and ``dora_norm``: arguments, checks, and the choice of a kernel."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from trifuse import reference
from trifuse.backends import Op
from trifuse.ops import _checks as check
from trifuse.ops.lora_linear import Call as LoraCall
from trifuse.ops.lora_linear import dropout_seed, is_plain, rows
from trifuse.ops.lora_linear import prepare as prepare_lora
from trifuse.registration import common
from trifuse.registration import dora_linear as kernels

__all__ = ["dora_linear", "dora_norm"]


class Call(NamedTuple):
    """A checked call: lora_linear's without the bias, and what is added to it."""

    lora: LoraCall
    bias: Tensor | None
    magnitude: Tensor
    detach_norm: bool

    @property
    def device_type(self) -> str:
        return self.lora.device_type

    @property
    def x(self) -> Tensor:
        return self.lora.x

    def summary(self) -> str:
        return self.lora.summary() + ("" if self.detach_norm else ", gradient of the norm")


def dora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    magnitude: Tensor,
    scale: float | Tensor = 1.0,
    *,
    dropout: float = 0.0,
    seed: int | Tensor | None = None,
    training: bool = True,
    detach_norm: bool = True,
) -> Tensor:
    """A linear layer whose adapted weight keeps a magnitude of its own per row:
    ``magnitude / ‖W + scale B A‖ * (x Wᵀ + scale dropout(x) Aᵀ Bᵀ) + bias``.

    The norms come from the factors: nothing of the size of W is made, forward or backward, unless W has a gradient.
    Kept for the backward pass are x, ``dropout(x) Aᵀ``, the seed, and the product that the magnitude scales. Where the
    norm is 0 so is the output, but for the bias. The factored norm loses digits where ``scale B A`` all but cancels a
    row of W.

    Args:
        x: ``(..., K)``: float32, float16, bfloat16 or float64. Any strides.
        weight: ``(N, K)`` in the dtype of x; bias: ``(N,)`` or None. Under autocast x, weight and bias are cast as
            ``torch.nn.functional.linear`` casts them.
        lora_A: ``(r, K)``; lora_B: ``(N, r)``: in the dtype of x, or in float32 beside half precision.
        magnitude: ``(N,)`` in one of those dtypes. Differentiable, as all of the above.
        scale: a number, or ``(r,)``, one per rank.
        dropout, seed, training: as in ``trifuse.lora_linear``. The base product sees x without dropout; PEFT's layers
            drop there, too.
        detach_norm: the norm is a constant to the backward pass, as the paper and PEFT have it; False gives the full
            gradient.

    Returns:
        ``(..., N)`` in the dtype of x.

    Raises:
        TypeError, ValueError: naming the argument, what it was and what it must be.
        BackendUnavailable: a backend was forced that cannot serve the call.
        RuntimeError: a second or a forward-mode derivative was asked of a native kernel.

    Source: Liu et al., "DoRA: Weight-Decomposed Low-Rank Adaptation", 2024 (arXiv 2402.09353), equation 5 and section
    4.3.
    """
    if (
        detach_norm and type(magnitude) in common.PLAIN and magnitude.is_cpu
        and is_plain(x, weight, bias, lora_A, lora_B, scale, dropout, seed, training)
    ):  # fmt: skip
        rate = 0.0
        if dropout and training:
            rate, seed = float(dropout), dropout_seed("dora_linear", x, dropout, seed, True)
        y = kernels.plain(x, weight, bias, lora_A, lora_B, magnitude, float(scale), rate, seed)
        if y is not None:
            return y
    call = prepare(
        x, weight, bias, lora_A, lora_B, magnitude, scale, dropout=dropout, seed=seed, training=training,
        detach_norm=detach_norm,
    )  # fmt: skip
    name = DORA.choose(call, call.device_type, call.x.numel())
    one = call.lora
    if name == "reference":
        return reference.dora_linear(
            one.x, one.weight, call.bias, one.lora_A, one.lora_B, call.magnitude, one.scale if one.p is None else one.p,
            dropout=one.dropout, seed=one.seed, detach_norm=detach_norm,
        )  # fmt: skip
    common.refuse_forward_mode("dora_linear", (*one, call.bias, call.magnitude))
    with torch.autocast(call.device_type, enabled=False):
        if detach_norm:
            with torch.no_grad():
                norm = _norm(name, one)
        else:
            norm = _norm(name, one)
        there = norm > 0
        factors = torch.where(there, call.magnitude.to(norm.dtype) / torch.where(there, norm, 1), 0)
        return kernels.linear(name, call, factors)


def dora_norm(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scale: float | Tensor = 1.0) -> Tensor:
    """The norm of every row of ``weight + scale B A``, from the factors: nothing of the size of the weight is made.

    ``‖w‖² + 2 b·(A w) + b (A Aᵀ) bᵀ`` for each row w, with b that row of ``scale B``.

    Args:
        weight: ``(N, K)``: float32, float16, bfloat16 or float64.
        lora_A: ``(r, K)``; lora_B: ``(N, r)``: in the dtype of weight, or in float32 beside half precision.
        scale: a number, or ``(r,)``, one per rank. Everything is differentiable once; autocast changes nothing.

    Returns:
        ``(N,)`` in float32 (float64 for float64): the magnitude that a ``dora_linear`` starts from.

    Raises:
        TypeError, ValueError: naming the argument, what it was and what it must be.
    """
    check.tensors("dora_norm", weight=weight)
    check.rank("dora_norm", "weight", weight, 2, "(N, K)")
    check.dtype("dora_norm", "weight", weight, check.SEQUENCE_DTYPES)
    with torch.autocast(weight.device.type, enabled=False):
        call = prepare_lora(weight[:0], weight, None, lora_A, lora_B, scale, op="dora_norm")
        name = DORA.choose(Call(call, None, weight, True), call.device_type, weight.numel())
        if name == "reference":
            return reference.dora_norm(weight, call.lora_A, call.lora_B, call.scale if call.p is None else call.p)
        common.refuse_forward_mode("dora_norm", call)
        return _norm(name, call)


def _norm(backend: str, call: LoraCall) -> Tensor:
    weight = call.weight
    if backend == "cpp" and not common.needs_grad((weight, call.lora_A, call.lora_B, call.p)):
        return kernels.norm(rows(weight), call.lora_A, call.lora_B, call.scale, call.p)
    acc = common.accumulation_dtype(weight)
    factor = call.scale if call.p is None else call.p
    A, B = call.lora_A.to(acc), call.lora_B.to(acc) * factor
    mixed = kernels.down(backend, rows(weight), call.lora_A)  # (N, r)
    squares = torch.linalg.vector_norm(weight, dim=1, dtype=acc).square()
    total = squares + (B * (2 * mixed + B @ (A @ A.T))).sum(1)
    return total.clamp_min(0).sqrt()


def prepare(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    magnitude: Tensor,
    scale: float | Tensor = 1.0,
    *,
    dropout: float = 0.0,
    seed: int | Tensor | None = None,
    training: bool = True,
    detach_norm: bool = True,
) -> Call:
    """Check the arguments of ``dora_linear`` and bring them to one form."""
    op = "dora_linear"
    x, weight, bias = check.linear(op, x, weight, bias)
    with torch.autocast(x.device.type, enabled=False):
        call = prepare_lora(
            x, weight, None, lora_A, lora_B, scale, dropout=dropout, seed=seed, training=training, op=op
        )
    check.tensors(op, magnitude=magnitude)
    check.shape(op, "magnitude", magnitude, (weight.shape[0],), "(N,)")
    check.weight_dtype(op, "magnitude", magnitude, x)
    check.same_device(op, x, magnitude=magnitude)
    return Call(call, bias, magnitude, bool(detach_norm))


DORA = Op("dora_linear", prepare, {"cpu": ("cpp", "reference"), "cuda": ("cuda", "triton", "reference")})
DORA.backend("reference", lambda call: [])
kernels.register_backends(DORA)
