"""AdamW of some ranks of low-rank factors, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["lora_adamw"]


@torch.no_grad()
def lora_adamw(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    steps: Tensor,
    *,
    rank_dim: int,
    active: tuple[int, int],
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    maximize: bool,
) -> None:
    """One step of AdamW, in place, of the ranks ``active[0] <= i < active[1]``; of the others nothing is touched.

    ``m = m + (1 - beta1) (g - m)``, ``v = beta2 v + (1 - beta2) g²``, ``param = (1 - lr weight_decay) param -
    lr / (1 - beta1^t) m / (sqrt(v / (1 - beta2^t)) + eps)``, where t counts the steps of a rank by itself.

    Args:
        param, grad: of one shape and dtype; ranks lie along the axis ``rank_dim``.
        exp_avg, exp_avg_sq: m and v: that shape, in float32 (float64 for float64).
        steps: ``(r,)`` float32: how often a rank was stepped.
        active: the first rank that is stepped, and the first after it that is not.

    Source: Loshchilov and Hutter, "Decoupled Weight Decay Regularization", 2019 (arXiv 1711.05101), algorithm 2.
    """
    first, count = active[0], active[1] - active[0]
    param, grad, m, v = (one.narrow(rank_dim, first, count) for one in (param, grad, exp_avg, exp_avg_sq))
    steps = steps[first : first + count]
    steps += 1
    along_ranks = [1] * param.dim()
    along_ranks[rank_dim] = count
    t = steps.double().view(along_ranks)
    g = grad.to(m.dtype)
    g = -g if maximize else g
    m.lerp_(g, 1 - beta1)
    v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
    step_size = (lr / (1 - beta1**t)).to(m.dtype)
    correction = (1 - beta2**t).sqrt().to(m.dtype)
    decayed = param.to(m.dtype) * (1 - lr * weight_decay)
    param.copy_(decayed - step_size * m / (v.sqrt() / correction + eps))
