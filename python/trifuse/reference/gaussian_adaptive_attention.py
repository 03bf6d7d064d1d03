"""Gaussian adaptive attention written as its definition: one Gaussian after another, in plain PyTorch."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["gaussian_adaptive_attention"]


def gaussian_adaptive_attention(
    x: Tensor,
    mean_offset: Tensor,
    width: Tensor,
    *,
    dim: int = -1,
    num_heads: int = 1,
    mask: Tensor | None = None,
    padding_value: float | None = None,
    eps: float = 1e-8,
    normalization: str = "stable",
) -> tuple[Tensor, Tensor]:
    """``x * w`` with ``w`` the normalised product of K Gaussians of ``x``: returns ``(out, weights)``.

    Args:
        x: any shape.
        mean_offset, width: ``(num_heads, K)`` or ``(K,)``.
        dim: the axis of the statistics and of the normalisation; heads are consecutive pieces of it.
        mask: bool, broadcastable to ``x``: where it is False an entry takes no part in anything.
        padding_value: entries of this value count as zeros in the mean and the variance, and are returned as they are.
        eps: added to the variance; with ``"clamped"`` also the least value of the sum of the products.
        normalization: ``"stable"`` or ``"clamped"``.

    Returns:
        ``out`` and ``weights``, both with the shape and dtype of ``x``.

    Source: Ioannides et al., "Gaussian Adaptive Attention is All You Need", 2024, equations 1 to 6.
    """
    acc = torch.promote_types(x.dtype, torch.float32)
    length = x.shape[dim]
    offsets, widths = (one.to(acc).expand(num_heads, one.shape[-1]) for one in (mean_offset, width))
    keep = torch.ones_like(x, dtype=torch.bool) if mask is None else mask.expand(x.shape)
    present = keep if padding_value is None else x != padding_value
    counted = keep if padding_value is None else torch.ones_like(keep)

    weights = []
    for h in range(num_heads):
        start = h * (length // num_heads)
        size = length // num_heads if h < num_heads - 1 else length - start
        head, kept, there, entries = (one.narrow(dim, start, size) for one in (x.to(acc), keep, present, counted))
        count = entries.sum(dim, keepdim=True)
        # What is left out may be NaN or infinite: it is replaced before anything is computed with it.
        values = torch.where(there, head, 0.0)
        mean = values.sum(dim, keepdim=True) / count.clamp(min=1)
        squares = torch.where(entries, values - mean, 0.0).square().sum(dim, keepdim=True)
        variance = squares / (count - 1).clamp(min=1) + eps
        weights.append(_weights(torch.where(kept, head, 0.0) - mean, kept, variance, offsets[h], widths[h], dim,
                                eps if normalization == "clamped" else None))  # fmt: skip
    w = torch.cat(weights, dim)
    out = torch.where(present, torch.where(present, x.to(acc), 0.0) * w, 0.0 if padding_value is None else x.to(acc))
    return out.to(x.dtype), w.to(x.dtype)


def _weights(distance: Tensor, kept: Tensor, variance: Tensor, offsets: Tensor, widths: Tensor, dim: int,
             least_sum: float | None) -> Tensor:  # fmt: skip
    """The normalised product of the Gaussians of one head; not below `least_sum` is what it is divided by."""
    exponents = []
    for offset, width in zip(offsets.unbind(), widths.unbind(), strict=True):
        exponents.append(-((distance - offset) ** 2) / (2 * variance * width**2))
    if least_sum is not None:
        product = torch.where(kept, 1.0, torch.zeros_like(distance))
        for exponent, width in zip(exponents, widths.unbind(), strict=True):
            product = product * (torch.exp(exponent) / torch.sqrt(2 * math.pi * width**2))
        return product / product.sum(dim, keepdim=True).clamp(min=least_sum)
    exponent = torch.stack(exponents).sum(0).masked_fill(~kept, -math.inf)
    # A slice of which nothing takes part has no largest exponent, and weights of zero.
    any_kept = kept.any(dim, keepdim=True)
    exponent = torch.where(any_kept, exponent, 0.0)
    return torch.where(kept, torch.softmax(exponent, dim), 0.0)
