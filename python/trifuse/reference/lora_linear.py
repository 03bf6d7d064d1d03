"""Low-rank adapters written as their formula, in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from trifuse.reference.philox import philox_words

__all__ = ["lora_dropout_mask", "lora_linear", "lora_linear_multi"]


def lora_dropout_mask(seed: int | Tensor, rows: int, columns: int, rate: float, device=None) -> Tensor:
    """Which elements of a ``(rows, columns)`` matrix dropout keeps: a function of seed, row and column alone.

    Philox4x32-10 with the seed as key and the counter (column // 4, 0, row low, row high): its word column % 4 is
    compared with ``rate * 2**32``.

    Args:
        seed: a whole number, or an int64 tensor of one element.
        rows, columns: the size of the mask.
        rate: the share of elements that are dropped, in [0, 1).

    Returns:
        ``(rows, columns)`` bool, True = kept.

    Source: Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", 2011.
    """
    word = philox_words(seed, rows, columns, device)
    return word >= min(int(rate * 2**32 + 0.5), 2**32 - 1)


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scale: float | Tensor = 1.0,
    *,
    active_rank: int | None = None,
    frozen: bool = False,
    dropout: float = 0.0,
    seed: int | Tensor | None = None,
) -> Tensor:
    """``x Wᵀ + bias + ((dropout(x) Aᵀ) * scale) Bᵀ`` with the first ``active_rank`` ranks.

    Args:
        x: ``(..., K)``.
        weight: ``(N, K)``; bias: ``(N,)`` or None.
        lora_A: ``(r, K)``; lora_B: ``(N, r)``.
        scale: a number, or ``(r,)``: one per rank.
        active_rank: 1 to r, by default r.
        frozen: only the last active row of A and column of B get a gradient.
        dropout, seed: the mask is ``lora_dropout_mask(seed, rows of x, K, dropout)``; without a seed, none.

    Returns:
        ``(..., N)`` in the dtype of x; computed in float32 (float64 for float64).

    Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021 (arXiv 2106.09685); Valipour et al.,
    "DyLoRA: Parameter-Efficient Tuning of Pre-trained Models using Dynamic Search-Free Low-Rank Adaptation", 2022
    (arXiv 2210.07558).
    """
    acc = torch.promote_types(x.dtype, torch.float32)
    rank = lora_A.shape[0] if active_rank is None else active_rank
    A, B = lora_A[:rank].to(acc), lora_B[:, :rank].to(acc)
    if frozen:
        A = torch.cat((A[:-1].detach(), A[-1:]))
        B = torch.cat((B[:, :-1].detach(), B[:, -1:]), 1)
    factor = scale[:rank].to(acc) if isinstance(scale, Tensor) and scale.dim() else scale
    with torch.autocast(x.device.type, enabled=False):
        wide = x.to(acc)
        y = F.linear(wide, weight.to(acc), None if bias is None else bias.to(acc))
        if dropout > 0 and seed is not None:
            rows = wide.numel() // max(wide.shape[-1], 1)
            mask = lora_dropout_mask(seed, rows, wide.shape[-1], dropout, x.device).view(wide.shape)
            wide = wide * mask / (1 - dropout)
        return (y + F.linear(F.linear(wide, A) * factor, B)).to(x.dtype)


def lora_linear_multi(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A_list: list[Tensor],
    B_list: list[Tensor],
    scales: list[float | Tensor],
    index: Tensor,
) -> Tensor:
    """``lora_linear`` where each row of x has an adapter of its own: a loop over the adapters.

    Args:
        x: ``(..., K)``; weight: ``(N, K)``; bias: ``(N,)`` or None.
        A_list, B_list: the adapters, ``(r_i, K)`` and ``(N, r_i)``; scales: a number or ``(r_i,)`` for each.
        index: ``x.shape[:-1]``, int64: which adapter a row has; negative: none.

    Returns:
        ``(..., N)`` in the dtype of x.
    """
    acc = torch.promote_types(x.dtype, torch.float32)
    with torch.autocast(x.device.type, enabled=False):
        wide = x.to(acc)
        y = F.linear(wide, weight.to(acc), None if bias is None else bias.to(acc))
        for i, (A, B, scale) in enumerate(zip(A_list, B_list, scales, strict=True)):
            factor = scale.to(acc) if isinstance(scale, Tensor) else scale
            update = F.linear(F.linear(wide, A.to(acc)) * factor, B.to(acc))
            y = torch.where((index == i)[..., None], y + update, y)
        return y.to(x.dtype)
