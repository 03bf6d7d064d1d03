"""The step of ``trifuse.optim.LowRankAdamW``: checks, and the choice of a kernel. The optimizer makes its calls itself:
it checks what it is given once, and not in every step."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from trifuse import reference
from trifuse.backends import Op
from trifuse.ops import _checks as check
from trifuse.registration import lora_adamw as kernels

__all__ = ["Call", "run"]


class Call(NamedTuple):
    """A checked call: parameters on one device, with dense contiguous gradients and states."""

    params: list[Tensor]
    grads: list[Tensor]
    exp_avgs: list[Tensor]
    exp_avg_sqs: list[Tensor]
    steps: list[Tensor]
    rank_dims: list[int]
    first: list[int]
    last: list[int]
    lrs: list[float]
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    maximize: bool

    @property
    def device_type(self) -> str:
        return self.params[0].device.type

    @property
    def numel(self) -> int:
        return sum(param.numel() for param in self.params)

    def summary(self) -> str:
        dtypes = ", ".join(sorted({check.dtype_name(param.dtype) for param in self.params}))
        ranks = sum(last - first for first, last in zip(self.first, self.last, strict=True))
        return f"{len(self.params)} parameters, {self.numel} numbers, {ranks} ranks, {dtypes}, {self.params[0].device}"


def run(call: Call) -> None:
    """Make a step, in place."""
    name = ADAMW.choose(call, call.device_type, call.numel)
    if name != "reference":
        kernels.step(name, call)
        return
    each = zip(*call[:9], strict=True)
    for param, grad, exp_avg, exp_avg_sq, steps, rank_dim, first, last, lr in each:
        reference.lora_adamw(
            param, grad, exp_avg, exp_avg_sq, steps, rank_dim=rank_dim, active=(first, last), lr=lr, beta1=call.beta1,
            beta2=call.beta2, eps=call.eps, weight_decay=call.weight_decay, maximize=call.maximize,
        )  # fmt: skip


def prepare(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
    rank_dims: list[int],
    active: list[tuple[int, int]],
    lrs: list[float],
    *,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
    maximize: bool = False,
) -> Call:
    """Check a step of AdamW.

    Args:
        params, grads: of one device, each gradient with the shape and the dtype of its parameter.
        exp_avgs, exp_avg_sqs: in float32, float64 for float64, contiguous.
        steps: ``(r,)`` float32 for each parameter: how often each of its ranks was stepped.
        rank_dims: the axis of each parameter along which its ranks lie.
        active: for each parameter the first rank that is stepped and the first after it that is not.
        lrs: the learning rate of each parameter.
    """
    op = "lora_adamw"
    if not params:
        raise ValueError(f"{op}: params is empty; there must be one at least")
    rows = zip(params, grads, exp_avgs, exp_avg_sqs, steps, rank_dims, active, strict=True)
    for at, (param, grad, exp_avg, exp_avg_sq, step, rank_dim, (first, last)) in enumerate(rows):
        name = f"params[{at}]"
        check.dtype(op, name, param, check.SEQUENCE_DTYPES)
        check.same_shape(op, f"grads[{at}]", grad, name, param)
        check.same_dtype(op, f"grads[{at}]", grad, name, param)
        acc = torch.promote_types(param.dtype, torch.float32)
        ranks = param.shape[rank_dim]
        for part, state in (("exp_avgs", exp_avg), ("exp_avg_sqs", exp_avg_sq)):
            check.same_shape(op, f"{part}[{at}]", state, name, param)
            if state.dtype != acc or not state.is_contiguous():
                raise ValueError(f"{op}: {part}[{at}] must be contiguous, in {check.dtype_name(acc)}")
        check.shape(op, f"steps[{at}]", step, (ranks,), "(r,)")
        check.dtype(op, f"steps[{at}]", step, (torch.float32,))
        if not 0 <= first <= last <= ranks:
            raise ValueError(f"{op}: active[{at}] is ({first}, {last}); it must lie in the {ranks} ranks of {name}")
        for one in (param, grad, exp_avg, exp_avg_sq, step):
            if one.device != params[0].device:
                raise ValueError(f"{op}: {name} and its state must be on {params[0].device} like params[0]")
    grads = [grad if grad.is_contiguous() else grad.contiguous() for grad in grads]
    first, last = [list(bound) for bound in zip(*active, strict=True)]
    return Call(
        params, grads, exp_avgs, exp_avg_sqs, steps, rank_dims, first, last, lrs, beta1, beta2, eps, weight_decay,
        maximize,
    )  # fmt: skip


ADAMW = Op("lora_adamw", prepare, {"cpu": ("cpp", "reference"), "cuda": ("cuda", "triton", "reference")})
ADAMW.backend("reference", lambda call: [])
kernels.register_backends(ADAMW)
