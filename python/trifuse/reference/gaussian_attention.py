"""Gaussian-kernel attention written as its definition, with the whole (L, S) matrix of logits, in plain PyTorch."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor

__all__ = ["gaussian_attention"]


def gaussian_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    gamma: Tensor | None = None,
    center: Tensor | None = None,
    sigma: Tensor | None = None,
    attn_mask: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    scale: float | None = None,
    is_causal: bool = False,
    normalized: bool = True,
) -> tuple[Tensor, Tensor]:
    """Attention by distance (gamma), in a Gaussian window (sigma), or both: returns ``(out, lse)``.

    Args:
        q: ``(B, H, L, d)``.
        k, v: ``(B, Hk, S, d)``, ``(B, Hk, S, dv)`` with ``Hk`` dividing ``H``: head h reads ``h // (H / Hk)``.
        gamma: ``(H,)``: the logits are ``-gamma ||q - k||^2``; without it ``q . k * scale``.
        center, sigma: broadcastable to ``(B, H, L)``: ``-(j - center)^2 / (2 sigma^2)`` is added; the default of
            center is the query's own position.
        attn_mask: broadcastable to ``(B, H, L, S)``, bool (True takes part) or added to the logits.
        key_padding_mask: ``(B, S)`` bool, True is padding, which may hold anything.
        cu_seqlens_q, cu_seqlens_k: ``(n + 1,)`` offsets of n sequences packed into a batch of one.
        scale: of the dot products; ``1 / sqrt(d)`` if None.
        is_causal: position i sees the positions ``j <= i``.
        normalized: False: ``sum_j exp(logit) v``, not divided by the sum of the exponentials.

    Returns:
        ``out`` ``(B, H, L, dv)`` in q's dtype, and ``lse`` ``(B, H, L)``, the logsumexp of the logits, in float32
        (float64 for float64 q). A row without a key has output 0 and lse -inf.

    Source: Tsai et al., "Transformer Dissection", 2019 (attention as a kernel smoother, its kernel of distances);
    Yang et al., "Modeling Localness for Self-Attention Networks", 2018 (the Gaussian bias with centre P and width
    sigma).
    """
    batch, heads, queries, head_dim = q.shape
    keys, groups = k.shape[2], heads // max(k.shape[1], 1)
    acc = torch.promote_types(q.dtype, torch.float32)
    if scale is None:
        scale = 1 / math.sqrt(max(head_dim, 1))
    with torch.autocast(q.device.type, enabled=False):
        q_acc, k_acc, v_acc = q.to(acc), k.to(acc), v.to(acc)
        windows = [None if one is None else one.to(acc).expand(batch, heads, queries) for one in (center, sigma)]
        if attn_mask is not None:
            attn_mask = attn_mask.expand(batch, heads, queries, keys)

        def one_sequence(rows: slice, columns: slice) -> tuple[Tensor, Tensor]:
            kept = None if key_padding_mask is None else ~key_padding_mask[:, columns]
            qs, ks, vs = q_acc[:, :, rows], k_acc[:, :, columns], v_acc[:, :, columns]
            if kept is not None:  # padding may hold NaN, which no product with a weight of 0 takes away
                ks, vs = (torch.where(kept[:, None, :, None], one, 0) for one in (ks, vs))
            mask = None if attn_mask is None else attn_mask[:, :, rows, columns]
            window = [None if one is None else one[:, :, rows] for one in windows]
            logits = _similarity(qs, ks, gamma, scale, kept, groups) + _window(*window, ks.shape[2])
            logits = _masked(logits, mask, kept, is_causal)
            return _weighted_sum(logits, vs.repeat_interleave(groups, 1), normalized)

        if cu_seqlens_q is None:
            out, lse = one_sequence(slice(0, queries), slice(0, keys))
        else:
            offsets = [cu_seqlens_q.tolist(), (cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k).tolist()]
            rows, columns = ([slice(*one) for one in pairwise(bounds)] or [slice(0, 0)] for bounds in offsets)
            parts = [one_sequence(*one) for one in zip(rows, columns, strict=True)]
            out, lse = (torch.cat(part, 2) for part in zip(*parts, strict=True))
    return out.to(q.dtype), lse


def _similarity(q: Tensor, k: Tensor, gamma: Tensor | None, scale: float, kept: Tensor | None, groups: int) -> Tensor:
    """(B, H, L, S): scaled dot products, or -gamma times the squared distances."""
    if gamma is None:
        return q @ k.repeat_interleave(groups, 1).mT * scale
    # ||q||^2 + ||k||^2 - 2 q.k cancels far from the origin. Distances do not change when both are moved by the mean
    # key, whatever its rounding, so it is a constant to the gradients too.
    with torch.no_grad():
        counted = torch.ones_like(k[..., :1]) if kept is None else kept[:, None, :, None].to(k.dtype)
        total = torch.where(counted > 0, k, 0).sum(2, keepdim=True)
        mean = total / counted.sum(2, keepdim=True).clamp(min=1)
    k = (k - mean).repeat_interleave(groups, 1)
    q = q - mean.repeat_interleave(groups, 1)
    squared = q.square().sum(-1, keepdim=True) + k.square().sum(-1)[..., None, :] - 2 * (q @ k.mT)
    return -gamma.to(q.dtype)[:, None, None] * squared


def _window(center: Tensor | None, sigma: Tensor | None, keys: int) -> Tensor | float:
    """(B, H, L, S): the logarithm of the Gaussian window, without its factor; 0 where there is none."""
    if sigma is None:
        return 0.0
    positions = torch.arange(max(sigma.shape[2], keys), dtype=sigma.dtype, device=sigma.device)
    if center is None:
        center = positions[: sigma.shape[2]].expand(sigma.shape)
    # Divided before it is squared: the square of a narrow sigma is 0.
    return -((positions[:keys] - center[..., None]) / sigma[..., None]).square() / 2


def _masked(logits: Tensor, attn_mask: Tensor | None, kept: Tensor | None, is_causal: bool) -> Tensor:
    """The logits with -inf in the place of what takes no part."""
    if attn_mask is not None and attn_mask.dtype != torch.bool:
        logits = logits + attn_mask.to(logits.dtype)
    allowed = torch.ones(logits.shape[2:], dtype=torch.bool, device=logits.device)
    if is_causal:
        allowed = allowed.tril()
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        allowed = allowed & attn_mask
    if kept is not None:
        allowed = allowed & kept[:, None, None, :]
    return logits.masked_fill(~allowed, -math.inf)


def _weighted_sum(logits: Tensor, v: Tensor, normalized: bool) -> tuple[Tensor, Tensor]:
    """Over the keys, and the logsumexp of the logits. Rows without a key are kept out of softmax, which has neither a
    value nor a gradient for them."""
    alive = (logits != -math.inf).any(-1, keepdim=True)
    finite = torch.where(alive, logits, 0)
    lse = torch.where(alive[..., 0], torch.logsumexp(finite, -1), -math.inf)
    weights = torch.softmax(finite, -1) if normalized else torch.exp(finite)
    return torch.where(alive, weights, 0) @ v, lse
