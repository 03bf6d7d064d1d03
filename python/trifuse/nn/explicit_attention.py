"""Gaussian attention that stores its (L, S) weights, which a tiled kernel never has: to show them, or to drop some."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["attend", "similarity"]


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gamma: Tensor | None,
    sigma: Tensor | None,
    attn_mask: Tensor | None,
    key_padding_mask: Tensor | None,
    is_causal: bool,
    added: int,
    dropout: float,
) -> tuple[Tensor, Tensor]:
    """``trifuse.gaussian_attention``'s result by its definition, and the weights.

    Args:
        q: ``(B, H, L, d)``.
        k: ``(B, H, S + added, d)``; window, masks and causal order do not touch the last ``added`` keys.
        v: ``(B, H, S + added, dv)``.
        gamma, sigma: ``(H,)`` of the accumulation dtype, or None.
        attn_mask: broadcastable to ``(B, H, L, S)``, bool (True takes part) or floating (added).
        key_padding_mask: ``(B, S)`` bool, True is padding, which may hold anything.
        is_causal: query i sees the keys ``j <= i``.
        added: see k.
        dropout: probability of dropping a weight.

    Returns:
        ``(B, H, L, dv)`` and ``(B, H, L, S + added)``, of q's dtype. A query without any key has weights 0.
    """
    acc = torch.promote_types(q.dtype, torch.float32)
    queries, keys = q.shape[2], k.shape[2] - added
    # Products of half precision would lose what centring gains; softmax would come back in float32 anyway.
    with torch.autocast(q.device.type, enabled=False):
        bias = _bias(queries, keys, sigma, attn_mask, key_padding_mask, is_causal, acc, q.device)
        kept = None
        if key_padding_mask is not None:  # NaN times a weight of 0 is NaN, and the mean is of the keys that count
            kept = F.pad(~key_padding_mask, (0, added), value=True)[:, None, :, None]
            k, v = (torch.where(kept, one, 0) for one in (k, v))
        logits = _scores(q.to(acc), k.to(acc), gamma, kept)
        if bias is not None:
            logits = logits + (F.pad(bias, (0, added)) if added else bias)
        if attn_mask is None and key_padding_mask is None:
            weights = torch.softmax(logits, -1)
        else:  # softmax of nothing but -inf is NaN, in its gradient too
            empty = (logits == -math.inf).all(-1, keepdim=True)
            weights = torch.softmax(logits.masked_fill(empty, 0.0), -1).masked_fill(empty, 0.0)
        weights = F.dropout(weights, dropout) if dropout else weights
        weights = weights.to(q.dtype)
        return weights @ v, weights


def similarity(q: Tensor, key: Tensor, gamma: Tensor | None) -> Tensor:
    """Logits ``(B, H, L)`` of q ``(B, H, L, d)`` and one key, broadcastable to it."""
    if gamma is None:
        return (q * key).sum(-1) / math.sqrt(max(q.shape[-1], 1))
    return -gamma[:, None] * (q - key).square().sum(-1)


def _scores(q: Tensor, k: Tensor, gamma: Tensor | None, kept: Tensor | None) -> Tensor:
    if gamma is None:
        return (q / math.sqrt(max(q.shape[-1], 1))) @ k.mT
    # What is common to the keys of a query cancels, so ||q||^2 is left out. Nearer to the keys' mean the square of a
    # key and its product differ by less; the mean's own gradient is zero, as moving q and k alike changes nothing.
    if k.shape[2]:
        total = k.detach().sum(2, keepdim=True)
        mean = total / (k.shape[2] if kept is None else kept.sum(2, keepdim=True).clamp(min=1))
        q, k = q - mean, k - mean
    gamma = gamma[:, None, None]
    return (2 * gamma * q) @ k.mT - gamma * k.square().sum(-1)[:, :, None]


def _bias(
    queries: int, keys: int, sigma: Tensor | None, attn_mask: Tensor | None, key_padding_mask: Tensor | None,
    is_causal: bool, acc: torch.dtype, device: torch.device,
) -> Tensor | None:  # fmt: skip
    """Everything that is added to the scores, broadcastable to (B, H, L, S) with its last axis in full, or None."""
    bias = None
    away = torch.arange(keys, device=device) - torch.arange(queries, device=device)[:, None]
    if sigma is not None:
        bias = -(away / sigma[:, None, None]).square() / 2  # 1 / sigma^4, of a gradient otherwise, overflows early
    shut = away > 0 if is_causal else None
    if key_padding_mask is not None:
        padding = key_padding_mask[:, None, None]
        shut = padding if shut is None else shut | padding
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        shut = ~attn_mask if shut is None else shut | ~attn_mask
    elif attn_mask is not None:
        attn_mask = attn_mask.expand(*attn_mask.shape[:-1], keys)
        bias = attn_mask if bias is None else bias + attn_mask
    if shut is None:
        return bias
    if bias is None:
        bias = torch.zeros((), dtype=acc, device=device)
    return torch.where(shut, -math.inf, bias)
