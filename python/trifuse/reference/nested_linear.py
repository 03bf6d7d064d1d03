"""Nested representations written as their definition, in plain PyTorch: one linear layer per width."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["nested_cross_entropy", "nested_linear"]


def nested_linear(x: Tensor, weight: Tensor, bias: Tensor | None, widths: Sequence[int]) -> Tensor:
    """``logits[i] = x[..., :w] weight[:, :w]ᵀ + bias`` with ``w = widths[i]``.

    Args:
        x: ``(..., K)``.
        weight: ``(N, K)``; bias: ``(N,)`` or None.
        widths: strictly increasing, from 1 to K.

    Returns:
        ``(len(widths), ..., N)`` in the dtype of x; computed in float32 (float64 for float64).

    Source: Kusupati et al., "Matryoshka Representation Learning", 2022 (arXiv 2205.13147), section 3, with the weights
    of all classifiers tied (MRL-E).
    """
    acc = torch.promote_types(x.dtype, torch.float32)
    with torch.autocast(x.device.type, enabled=False):
        x_, weight_, bias_ = x.to(acc), weight.to(acc), None if bias is None else bias.to(acc)
        logits = [F.linear(x_[..., :width], weight_[:, :width], bias_) for width in widths]
        return torch.stack(logits).to(x.dtype)


def nested_cross_entropy(
    logits: Tensor,
    target: Tensor,
    weights: Sequence[float] | Tensor | None = None,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    """``sum_i weights[i] cross_entropy(logits[i], target)``.

    Args:
        logits: ``(n, ..., C)``; target: ``(...)``, classes.
        weights: n numbers, by default 1.
        ignore_index, label_smoothing, reduction: as in ``torch.nn.functional.cross_entropy``.

    Returns:
        A scalar, or with ``reduction="none"`` ``(...)``: in float32 (float64 for float64).

    Source: Kusupati et al., "Matryoshka Representation Learning", 2022 (arXiv 2205.13147), equation 1.
    """
    acc = torch.promote_types(logits.dtype, torch.float32)
    total = 0.0
    for i, scores in enumerate(logits.to(acc)):
        loss = F.cross_entropy(
            scores.flatten(0, -2), target.flatten(), ignore_index=ignore_index, label_smoothing=label_smoothing,
            reduction=reduction,
        )  # fmt: skip
        total = total + (1.0 if weights is None else weights[i]) * loss
    return total.view(target.shape) if reduction == "none" else total
