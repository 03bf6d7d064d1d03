"""The states that each chunk of a sequence adds, as plain torch.

``trifuse.ssd`` computes none of these by themselves; they are here for code that puts SSD together from its parts.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["chunk_state", "chunk_state_ref", "chunk_state_varlen"]


def _chunk_cumsum_fwd(
    dt: Tensor,
    A: Tensor,
    chunk_size: int,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, math.inf),
) -> tuple[Tensor, Tensor]:
    """``(dA_cumsum, dt)``, each ``(B, H, chunks, chunk_size)`` float32; zero steps fill the last chunk."""
    dt = dt.float()
    if dt_bias is not None:
        dt = dt + dt_bias.float()
    if dt_softplus:
        dt = F.softplus(dt)
    dt = _chunked(dt.clamp(*dt_limit), chunk_size).permute(0, 3, 1, 2)
    return torch.cumsum(dt * A.float()[:, None, None], dim=-1), dt


def chunk_state(B: Tensor, x: Tensor, dt: Tensor, dA_cumsum: Tensor, states_in_fp32: bool = True) -> Tensor:
    """The state that each chunk leaves when it starts from zero.

    Args:
        B: ``(B, L, G, N)``; x: ``(B, L, H, P)``.
        dt, dA_cumsum: ``(B, H, chunks, chunk_size)``, steps and their running sum times A within each chunk.
        states_in_fp32: in float32, or in B's dtype.

    Returns:
        ``(B, chunks, H, P, N)``.
    """
    return _chunk_state_fwd(B, x, dt, dA_cumsum, states_in_fp32=states_in_fp32)


def chunk_state_ref(B: Tensor, x: Tensor, dt: Tensor, dA_cumsum: Tensor) -> Tensor:
    """``chunk_state`` in x's dtype."""
    return _chunk_state_fwd(B, x, dt, dA_cumsum).to(x.dtype)


def _chunk_state_fwd(
    B: Tensor,
    x: Tensor,
    dt: Tensor,
    dA_cumsum: Tensor,
    seq_idx: Tensor | None = None,
    states: Tensor | None = None,
    states_in_fp32: bool = True,
) -> Tensor:
    """``chunk_state`` of the sequence that each chunk ends in; written to `states`, if given."""
    chunk_size = dt.shape[-1]
    weight = torch.exp(dA_cumsum[..., -1:] - dA_cumsum) * dt  # (B, H, chunks, chunk_size)
    if seq_idx is not None:
        length = seq_idx.shape[1]
        last = seq_idx[:, chunk_ends(length, chunk_size, dt.shape[2], seq_idx.device)]
        own = _chunked(seq_idx[..., None], chunk_size)[..., 0] == last[:, :, None]
        weight = weight * own[:, None]
    heads = x.shape[2]
    x, B = _chunked(x.float(), chunk_size), _chunked(B.float(), chunk_size)
    weighted = (x * weight.permute(0, 2, 3, 1)[..., None]).unflatten(3, (B.shape[3], -1))  # heads by group
    result = torch.einsum("bclghp,bclgn->bcghpn", weighted, B).flatten(2, 3)
    assert result.shape[2] == heads
    if states is not None:
        return states.copy_(result)
    return result if states_in_fp32 else result.to(B.dtype)


def chunk_state_varlen(
    B: Tensor, x: Tensor, dt: Tensor, dA_cumsum: Tensor, cu_seqlens: Tensor, chunk_states: Tensor
) -> Tensor:
    """The last state of each of S packed sequences.

    Args:
        B: ``(T, G, N)``; x: ``(T, H, P)``, the sequences one after another.
        dt, dA_cumsum: ``(H, chunks, chunk_size)``.
        cu_seqlens: ``(S + 1,)`` offsets.
        chunk_states: ``(chunks, H, P, N)``, the state with which each chunk begins.

    Returns:
        ``(S, H, P, N)`` in the dtype of ``chunk_states``.
    """
    heads, _, chunk_size = dt.shape
    groups = B.shape[1]
    dt, dA_cumsum = dt.flatten(1), dA_cumsum.flatten(1)  # (H, T)
    states = []
    for start, end in pairwise(cu_seqlens.tolist()):
        chunk = max(end - 1, 0) // chunk_size
        first = max(start, chunk * chunk_size)
        reached = dA_cumsum[:, end - 1, None]
        weight = torch.exp(reached - dA_cumsum[:, first:end]) * dt[:, first:end]
        weighted = (x[first:end].float() * weight.t()[..., None]).unflatten(1, (groups, -1))
        state = torch.einsum("lghp,lgn->ghpn", weighted, B[first:end].float()).flatten(0, 1)
        if start < chunk * chunk_size:
            state = state + torch.exp(reached)[:, :, None] * chunk_states[chunk].float()
        states.append(state)
    if not states:
        return chunk_states.new_zeros(0, heads, *chunk_states.shape[2:])
    return torch.stack(states).to(chunk_states.dtype)


def chunk_ends(length: int, chunk_size: int, chunks: int, device: torch.device) -> Tensor:
    """The last position of each chunk, ``(chunks,)``."""
    return (torch.arange(1, chunks + 1, device=device) * chunk_size).clamp(max=length) - 1


def _chunked(sequence: Tensor, chunk_size: int) -> Tensor:
    """(B, L, ...) as (B, chunks, chunk_size, ...), filled up with zeros."""
    missing = -sequence.shape[1] % chunk_size
    padded = F.pad(sequence, (0, 0) * (sequence.dim() - 2) + (0, missing))
    return padded.unflatten(1, (-1, chunk_size))
