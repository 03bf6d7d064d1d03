"""The causal depthwise convolution written as its definition: a window of inputs for every position.

Naive on purpose. It runs on every device torch has, in the accumulation precision of its inputs, and can be
differentiated any number of times. Every other backend is tested against it.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["causal_conv1d", "causal_conv1d_update"]


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    silu: bool = False,
) -> tuple[Tensor, Tensor]:
    """Causal depthwise convolution of ``x``: returns ``(y, final_states)``.

    Args:
        x: ``(B, D, L)``.
        weight: ``(D, W)``; ``weight[:, W - 1]`` meets the position itself.
        bias: ``(D,)``.
        initial_states: ``(B, D, W - 1)``, the inputs left of position 0; with ``cu_seqlens`` ``(S, D, W - 1)``.
        seq_idx: ``(B, L)``, the id of the sequence of every position; negative is padding.
        cu_seqlens: ``(S + 1,)`` offsets of S sequences packed into a batch of one.
        silu: pass the result through ``silu(z) = z * sigmoid(z)``.

    Returns:
        ``y`` ``(B, D, L)``, and ``final_states`` ``(B, D, W - 1)`` (``(S, D, W - 1)`` when packed), both in
        ``x``'s dtype.

    Source: Gu and Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces", 2023, section 3.4.
    """
    batch, dim, seqlen = x.shape
    before = weight.shape[1] - 1
    bounds = [0, seqlen] if cu_seqlens is None else cu_seqlens.tolist()
    ys, finals = [], []
    for s, (start, end) in enumerate(pairwise(bounds)):
        row = slice(None) if cu_seqlens is None else slice(s, s + 1)
        left = x.new_zeros(batch, dim, before) if initial_states is None else initial_states[row].to(x.dtype)
        ids = None if seq_idx is None else seq_idx[:, start:end]
        padded = torch.cat([left, x[:, :, start:end]], dim=2)
        ys.append(_windows(padded, weight, bias, ids, silu))
        finals.append(_last_inputs(padded, before, ids))
    y = torch.cat(ys, dim=2) if ys else x.clone()  # of no steps
    return y, torch.cat(finals) if finals else x.new_zeros(0, dim, before)


def _windows(padded: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor | None, silu: bool) -> Tensor:
    """One sequence with its W - 1 inputs of before: every position's window times the weights."""
    acc = torch.float64 if padded.dtype == torch.float64 else torch.float32
    width = weight.shape[1]
    seqlen = padded.shape[2] - (width - 1)
    y = torch.zeros(padded.shape[0], padded.shape[1], seqlen, dtype=acc, device=padded.device)
    for w in range(width):
        tap = padded[:, :, w : w + seqlen].to(acc)
        if ids is not None:  # chosen, not multiplied by zero: a NaN stays in its own sequence
            counts = _counts(ids, width - 1 - w) & (ids >= 0)  # of padding nothing, or its NaN would have gradients
            tap = torch.where(counts[:, None, :], tap, 0)
        y = y + weight[:, w, None].to(acc) * tap
    if bias is not None:
        y = y + bias.to(acc)[:, None]
    if silu:
        y = F.silu(y)
    if ids is not None:
        y = torch.where((ids >= 0)[:, None, :], y, 0)
    return y.to(padded.dtype)


def _counts(ids: Tensor, distance: int) -> Tensor:
    """Which positions see the input `distance` to their left: one of the same id, or, left of position 0, an
    initial state, which belongs to the ids that have not changed since position 0."""
    seqlen = ids.shape[1]
    unbroken = torch.cumprod(ids == ids[:, :1], dim=1).bool()
    same = ids[:, distance:] == ids[:, : max(seqlen - distance, 0)]
    return torch.cat([unbroken[:, :distance], same], dim=1)


def _last_inputs(padded: Tensor, before: int, ids: Tensor | None) -> Tensor:
    """The last W - 1 inputs of the last run of one id, padding passed over: what is left of the run is the initial
    states if the run starts at position 0, and zero otherwise."""
    seqlen = padded.shape[2] - before
    if ids is None:
        return padded[:, :, seqlen:].clone()
    rows = []
    for b, row in enumerate(ids.tolist()):
        end = seqlen
        while end > 0 and row[end - 1] < 0:
            end -= 1
        first = end
        while first > 0 and row[first - 1] == row[end - 1]:
            first -= 1
        position = torch.arange(end - before, end, device=padded.device)
        own = position >= (first if first > 0 else -before)
        rows.append(torch.where(own, padded[b, :, end : end + before], 0))
    return torch.stack(rows) if rows else padded[:, :, seqlen:].clone()


def causal_conv1d_update(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    silu: bool = False,
    cache_seqlens: Tensor | None = None,
    conv_state_indices: Tensor | None = None,
) -> Tensor:
    """The next tokens of a causal convolution; ``conv_state`` is changed in place and the output returned.

    Args:
        x: ``(B, D, L)``, the next L inputs.
        conv_state: ``(R, D, K)``, K at least W - 1: the last K inputs, the newest last; with ``cache_seqlens`` a
            circular buffer, in which input number i stands at i % K.
        weight: ``(D, W)``.
        bias: ``(D,)``.
        silu: pass the result through silu.
        cache_seqlens: ``(B,)``, how many inputs each item has had.
        conv_state_indices: ``(B,)``, the row of ``conv_state`` of each item; negative is padding.
    """
    batch, _, seqlen = x.shape
    size, before = conv_state.shape[2], weight.shape[1] - 1
    device = x.device
    rows = torch.arange(batch, device=device) if conv_state_indices is None else conv_state_indices.long()
    live = rows >= 0
    state = conv_state[rows.clamp(min=0)]
    if cache_seqlens is not None:  # the oldest first, as without it
        oldest = cache_seqlens.long()[:, None] + torch.arange(size, device=device)
        state = torch.gather(state, 2, (oldest % size)[:, None, :].expand_as(state))
    wide = torch.promote_types(x.dtype, state.dtype)
    inputs = torch.cat([state.to(wide), x.to(wide)], dim=2)
    y = _windows(inputs[:, :, size - before :], weight, bias, None, silu)
    state = inputs[:, :, seqlen:].to(conv_state.dtype)
    if cache_seqlens is not None:
        where = cache_seqlens.long()[:, None] + seqlen + torch.arange(size, device=device)
        state = torch.empty_like(state).scatter_(2, (where % size)[:, None, :].expand_as(state), state)
    conv_state[rows[live]] = state[live]
    return torch.where(live[:, None, None], y, 0).to(x.dtype)
