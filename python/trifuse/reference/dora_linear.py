"""Weight-decomposed low-rank adapters written as their formula, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from trifuse.reference.lora_linear import lora_linear

__all__ = ["dora_linear", "dora_norm"]


def dora_norm(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scale: float | Tensor = 1.0) -> Tensor:
    """``‖weight + (lora_B * scale) lora_A‖`` of every row, ``(N,)`` in float32 (float64 for float64).

    Args:
        weight: ``(N, K)``; lora_A: ``(r, K)``; lora_B: ``(N, r)``; scale: a number or ``(r,)``.
    """
    acc = torch.promote_types(weight.dtype, torch.float32)
    with torch.autocast(weight.device.type, enabled=False):
        factor = scale.to(acc) if isinstance(scale, Tensor) else scale
        return (weight.to(acc) + (lora_B.to(acc) * factor) @ lora_A.to(acc)).norm(dim=1)


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
    detach_norm: bool = True,
) -> Tensor:
    """``lora_linear(x)`` without its bias, times ``magnitude / dora_norm(...)`` by columns, plus bias.

    Where the norm is 0 the factor is 0.

    Args:
        x: ``(..., K)``; weight: ``(N, K)``; bias: ``(N,)`` or None; lora_A: ``(r, K)``; lora_B: ``(N, r)``.
        magnitude: ``(N,)``.
        scale, dropout, seed: as in ``lora_linear``; the base product sees x without dropout.
        detach_norm: the norm is a constant to the backward pass.

    Returns:
        ``(..., N)`` in the dtype of x.

    Source: Liu et al., "DoRA: Weight-Decomposed Low-Rank Adaptation", 2024 (arXiv 2402.09353), equation 5, and section
    4.3 on the constant norm.
    """
    acc = torch.promote_types(x.dtype, torch.float32)
    norm = dora_norm(weight, lora_A, lora_B, scale)
    norm = norm.detach() if detach_norm else norm
    factors = torch.where(norm > 0, magnitude.to(acc) / torch.where(norm > 0, norm, 1), 0)
    plain = lora_linear(
        x.to(acc), weight.to(acc), None, lora_A.to(acc), lora_B.to(acc), scale, dropout=dropout, seed=seed
    )
    y = plain * factors
    return (y if bias is None else y + bias.to(acc)).to(x.dtype)
