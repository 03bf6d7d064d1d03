"""One step of AdamW of some ranks of many parameters, in Triton: for each, a launch counts the steps of its ranks, and
one steps its numbers."""

import math

import torch
import triton
import triton.language as tl

from trifuse.triton_kernels import common
from trifuse.triton_kernels.common import wide

__all__ = ["lora_adamw"]

NUMBERS = 1024  # of a program


@triton.jit
def _count(steps, factors, active, lr, log_beta1, log_beta2, BLOCK: tl.constexpr):
    """factors (active, 2): lr / (1 - beta1^t) and sqrt(1 - beta2^t), with t the steps counted so far."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    here = i < active
    t = tl.load(steps + i, mask=here, other=0.0) + 1.0
    tl.store(steps + i, t, mask=here)
    t = t.to(tl.float64)
    # In double precision: 1 - beta^t is small while t is.
    rate = lr / (1.0 - tl.exp(t * log_beta1))
    root = tl.sqrt(1.0 - tl.exp(t * log_beta2))
    tl.store(factors + 2 * i, rate.to(tl.float32), mask=here)
    tl.store(factors + 2 * i + 1, root.to(tl.float32), mask=here)


@triton.jit
def _step(
    param, grad, exp_avg, exp_avg_sq, factors, numbers, inner, ranks, first, active,
    decay, weight1, beta2, weight2, eps, sign,
    FROM_GRAD: tl.constexpr, WIDE: tl.constexpr, NUMBERS: tl.constexpr,
):  # fmt: skip
    number = tl.program_id(0).to(tl.int64) * NUMBERS + tl.arange(0, NUMBERS)
    here = number < numbers
    if not WIDE:
        number = number.to(tl.int32)
    run = number // inner
    rank = run % active
    at = ((wide(1) * (run // active)) * ranks + first + rank) * inner + number % inner
    x = tl.load(param + at, mask=here, other=0.0).to(tl.float32)
    g = sign * tl.load(grad + at, mask=here, other=0.0).to(tl.float32)
    m = tl.load(exp_avg + at, mask=here, other=0.0)
    v = tl.load(exp_avg_sq + at, mask=here, other=0.0)
    if FROM_GRAD:  # the shorter way to the new moment
        m = g + weight1 * (m - g)
    else:
        m += weight1 * (g - m)
    v = beta2 * v + weight2 * (g * g)
    rate = tl.load(factors + 2 * rank, mask=here, other=0.0)
    root = tl.load(factors + 2 * rank + 1, mask=here, other=1.0)
    x = x * decay - tl.div_rn(rate * m, tl.div_rn(tl.sqrt_rn(v), root) + eps)
    tl.store(param + at, x.to(param.dtype.element_ty), mask=here)
    tl.store(exp_avg + at, m, mask=here)
    tl.store(exp_avg_sq + at, v, mask=here)


def _logarithm(beta):
    return math.log(beta) if beta > 0 else -1e30  # beta^t is 0


def lora_adamw(
    params, grads, exp_avgs, exp_avg_sqs, steps, rank_dims, first, last, lrs, beta1, beta2, eps, weight_decay, maximize
):
    for at, (param, lr) in enumerate(zip(params, lrs, strict=True)):
        dim, begin, active = rank_dims[at], first[at], last[at] - first[at]
        ranks, inner = param.shape[dim], math.prod(param.shape[dim + 1 :])
        if active == 0:
            continue
        factors = torch.empty((active, 2), dtype=torch.float32, device=param.device)
        block = common.power_of_2(active, 16, 256)
        common.launch(
            _count, (triton.cdiv(active, block),), steps[at][begin:], factors, active, lr, _logarithm(beta1),
            _logarithm(beta2), BLOCK=block,
        )  # fmt: skip
        numbers = param.numel() // ranks * active
        if numbers == 0:
            continue
        common.launch(
            _step, (triton.cdiv(numbers, NUMBERS),), param, grads[at], exp_avgs[at], exp_avg_sqs[at], factors, numbers,
            inner, ranks, begin, active, 1 - lr * weight_decay, min(beta1, 1 - beta1), beta2, 1 - beta2, eps,
            -1.0 if maximize else 1.0, FROM_GRAD=beta1 <= 0.5, WIDE=numbers >= 2**31 - NUMBERS, NUMBERS=NUMBERS,
        )  # fmt: skip
