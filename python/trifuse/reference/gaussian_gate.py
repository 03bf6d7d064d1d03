"""The Gaussian gates written as their definitions, in plain PyTorch."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["gaussian_gate"]

FEATURE_FLOOR = 1e-5


def gaussian_gate(
    x: Tensor,
    mean_offset: Tensor | None,
    width: Tensor,
    *,
    kind: str = "feature",
    dim: int = -1,
    feature_dim: int = -1,
    num_heads: int = 1,
    alpha: Tensor | None = None,
    mask: Tensor | None = None,
    eps: float = 1e-8,
    multiply: bool = True,
) -> Tensor:
    """``x`` times a Gaussian of its distance from the mean of its slice along `dim`, or that gate itself.

    Args:
        x: any shape.
        mean_offset: ``(F,)`` ("feature"), ``(H, K)`` ("density"), or None: zero.
        width: ``(F,)``, ``()`` ("context") or ``(H, K)``.
        kind: ``"feature"``, ``"context"`` or ``"density"``.
        dim: the axis of the statistics.
        feature_dim: the axis that the parameters of "feature" belong to.
        num_heads: consecutive pieces of `dim` with statistics of their own; the last takes the remainder.
        alpha: ``(H,)``, of "density"; one if None.
        mask: bool, of a shape that broadcasts to that of `x`: entries that are False take no part, their gate is 0.
        eps: added to the variance.
        multiply: return ``x * gate``.

    Returns:
        A tensor like ``x``; computed in float32 for half precision.

    Source: Ioannides et al., "Gaussian Adaptive Attention Is All You Need", 2024 ("feature"); Ruan et al., "Gaussian
    Context Transformer", CVPR 2021 ("context"); Ioannides et al., "Density Adaptive Attention", 2024 ("density").
    """
    acc = torch.promote_types(x.dtype, torch.float32)
    dim, feature_dim = dim % x.dim(), feature_dim % x.dim()
    entries = x.to(acc).movedim(dim, -1)
    keep = torch.ones_like(entries, dtype=torch.bool)
    if mask is not None:
        keep = mask.expand(x.shape).movedim(dim, -1)
    width = width.to(acc)
    offset = torch.zeros_like(width) if mean_offset is None else mean_offset.to(acc)
    if kind == "feature":  # the axes of `entries` are those of x without `dim`, and `dim` last
        axis = feature_dim - (feature_dim > dim)
        shape = [-1 if one == axis else 1 for one in range(x.dim())]
        offset, width = offset.reshape(shape), width.reshape(shape)

    piece, gates = entries.shape[-1] // num_heads, []
    for h in range(num_heads):
        part = slice(h * piece, None if h == num_heads - 1 else (h + 1) * piece)
        ours, kept = entries[..., part], keep[..., part]
        d, v = _moments(ours, kept, eps, unbiased=kind == "density")
        if kind == "feature":
            gate = torch.exp(-(((d - offset) / torch.sqrt(v + FEATURE_FLOOR)) ** 2) / (2 * width))
        elif kind == "context":
            gate = torch.exp(-((d / torch.sqrt(v)) ** 2) / (2 * width**2))
        else:
            z = (d[..., None] - offset[h]) / (torch.sqrt(v)[..., None] * width[h])
            log_density = -(z**2) / 2 - math.log(2 * math.pi) / 2
            mean = torch.exp(torch.logsumexp(log_density, -1) - math.log(width.shape[-1]))
            gate = 1 + (1 if alpha is None else alpha[h].to(acc)) * mean
        gates.append(torch.where(kept, gate, 0))
    gate = torch.cat(gates, -1).movedim(-1, dim)
    out = torch.where(keep.movedim(-1, dim), x.to(acc), 0) * gate if multiply else gate
    return out.to(x.dtype)


def _moments(entries: Tensor, kept: Tensor, eps: float, unbiased: bool) -> tuple[Tensor, Tensor]:
    """Distances from the mean of the kept entries (0 elsewhere), and their variance plus `eps`, along the last axis."""
    count = kept.sum(-1, keepdim=True)
    mean = torch.where(kept, entries, 0).sum(-1, keepdim=True) / count.clamp(min=1)
    d = torch.where(kept, entries - mean, 0)
    v = (d**2).sum(-1, keepdim=True) / (count - 1 if unbiased else count).clamp(min=1)
    return d, v + eps
