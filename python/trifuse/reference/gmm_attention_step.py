"""One step of Gaussian mixture attention written as its definition, in plain PyTorch."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["gmm_attention_step"]


def gmm_attention_step(
    values: Tensor,
    weight: Tensor,
    delta: Tensor,
    sigma: Tensor,
    mean: Tensor,
    key_padding_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """``alignment[b, j] = sum_k weight[b, k] N(j; mean_new[b, k], sigma[b, k])``, ``context = alignment @ values``.

    Args:
        values: ``(B, T, E)``.
        weight, delta, sigma, mean: ``(B, K)``; ``mean_new = mean + softplus(delta)``.
        key_padding_mask: ``(B, T)`` bool, True = padding.

    Returns:
        ``context`` ``(B, E)`` in the dtype of values; ``mean_new`` ``(B, K)`` and ``alignment`` ``(B, T)`` in the
        accumulation dtype: float32 for half precision, otherwise that of values. Padding, and positions where every
        density is 0 in that dtype, take no part: their alignment is 0 and their values do not matter.

    Source: Graves, "Generating Sequences With Recurrent Neural Networks", 2013, section 5; with the normalised
    densities of Battenberg et al., "Location-Relative Attention Mechanisms for Robust Long-Form Speech Synthesis",
    2020 (GMMv2).
    """
    acc = torch.promote_types(values.dtype, torch.float32)
    weight, delta, sigma, mean = (x.to(acc) for x in (weight, delta, sigma, mean))
    mean_new = mean + F.softplus(delta)
    position = torch.arange(values.shape[1], dtype=acc, device=values.device)
    z = (position[None, :, None] - mean_new[:, None, :]) / sigma[:, None, :]
    density = torch.exp(-0.5 * z * z) / (math.sqrt(2 * math.pi) * sigma[:, None, :])
    nothing = ~(density != 0).any(-1)
    if key_padding_mask is not None:
        nothing = nothing | key_padding_mask
    alignment = (weight[:, None, :] * density).sum(-1).masked_fill(nothing, 0)
    taken = values.to(acc).masked_fill(nothing[:, :, None], 0)
    context = (alignment[:, :, None] * taken).sum(1)  # autocast would make half precision of a matrix product
    return context.to(values.dtype), mean_new, alignment
