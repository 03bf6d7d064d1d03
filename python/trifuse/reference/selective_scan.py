"""The selective scan written as its definition: one step of time after another, in plain PyTorch.

Naive on purpose. It runs on every device torch has, in the accumulation precision of its inputs,
and can be differentiated any number of times. Every other backend is tested against it.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["selective_scan", "selective_state_update"]


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    *,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    reverse: bool = False,
) -> tuple[Tensor, Tensor]:
    """Selective scan of ``u``: returns ``(out, last_state)``.

    Args:
        u, delta, z: ``(B, D, L)``.
        A: ``(D, N)``, real or complex.
        B, C: constant ``(D, N)``, or variable ``(B, G, N, L)`` with ``G`` dividing ``D``.
        D, delta_bias: ``(D,)``.
        initial_state: ``(B, D, N)``; with ``cu_seqlens`` ``(S, D, N)``.
        cu_seqlens: ``(S + 1,)`` offsets of S sequences packed into a batch of one.
        reverse: run time backwards inside each sequence.

    Returns:
        ``out`` ``(B, D, L)`` in ``u``'s dtype, and ``last_state`` ``(B, D, N)`` (``(S, D, N)`` when
        packed) in the accumulation dtype: float64 for float64 inputs, float32 otherwise, or the
        complex dtype of that precision.

    Source: Gu and Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces", 2023,
    equations 2a and 2b with the discretization of section 2 (zero-order hold for A, Euler for B).
    """
    real = torch.float64 if u.dtype == torch.float64 else torch.float32
    acc = (torch.complex128 if real == torch.float64 else torch.complex64) if A.is_complex() else real
    batch, dim, seqlen = u.shape

    dt = delta.to(real)
    if delta_bias is not None:
        dt = dt + delta_bias.to(real)[:, None]
    if delta_softplus:
        dt = F.softplus(dt)
    x = u.to(real)
    A = A.to(acc)
    B = _per_channel(B.to(acc), dim)
    C = _per_channel(C.to(acc), dim)

    def one_sequence(row: slice, start: int, end: int, state: Tensor) -> tuple[list[Tensor], Tensor]:
        ys = []
        for t in reversed(range(start, end)) if reverse else range(start, end):
            decay = torch.exp(dt[row, :, t, None] * A)
            state = decay * state + (dt[row, :, t] * x[row, :, t])[..., None] * _at(B, row, t)
            y = (_at(C, row, t) * state).sum(-1)
            ys.append(2 * y.real if y.is_complex() else y)
        return (ys[::-1] if reverse else ys), state

    def first_state(row: slice, rows: int) -> Tensor:
        if initial_state is None:
            return torch.zeros(rows, dim, A.shape[1], dtype=acc, device=u.device)
        return initial_state[row].to(acc)

    if cu_seqlens is None:
        ys, last_state = one_sequence(slice(None), 0, seqlen, first_state(slice(None), batch))
    else:
        bounds, ys, states = cu_seqlens.tolist(), [], []
        for s, (start, end) in enumerate(pairwise(bounds)):
            y, state = one_sequence(slice(None), start, end, first_state(slice(s, s + 1), 1))
            ys.extend(y)
            states.append(state)
        last_state = torch.cat(states) if states else torch.zeros(0, dim, A.shape[1], dtype=acc, device=u.device)

    y = torch.stack(ys, dim=-1) if ys else x.clone()  # of no steps
    if D is not None:
        y = y + D.to(real)[:, None] * x
    if z is not None:
        y = y * F.silu(z.to(real))
    return y.to(u.dtype), last_state.clone()  # the caller may change it in place; the graph, or initial_state, may not


def _per_channel(coef: Tensor, dim: int) -> Tensor:
    """A variable coefficient (B, G, N, L) as (B, D, N, L): channel d reads group d // (D / G)."""
    if coef.dim() == 2:
        return coef
    return coef.repeat_interleave(dim // coef.shape[1], dim=1) if coef.shape[1] > 1 else coef


def _at(coef: Tensor, row: slice, t: int) -> Tensor:
    return coef if coef.dim() == 2 else coef[row, :, :, t]


def selective_state_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    state_batch_indices: Tensor | None = None,
) -> Tensor:
    """One token of the selective scan; ``state`` is changed in place and the output returned.

    Args:
        state: ``(R, H, P, N)``, any real floating dtype.
        x, dt, z: ``(B, H, P)``.
        A: ``(H, P, N)``.
        B, C: ``(B, G, N)`` with ``G`` dividing ``H``.
        D, dt_bias: ``(H, P)``.
        state_batch_indices: ``(B,)``, the row of ``state`` of each item; negative is padding.
    """
    acc = torch.float64 if x.dtype == torch.float64 else torch.float32
    batch, heads, _ = x.shape
    rows = torch.arange(batch, device=x.device) if state_batch_indices is None else state_batch_indices.long()
    live = rows >= 0
    dt = dt.to(acc)
    if dt_bias is not None:
        dt = dt + dt_bias.to(acc)
    if dt_softplus:
        dt = F.softplus(dt)
    B = B.to(acc).repeat_interleave(heads // B.shape[1], dim=1)[:, :, None, :]
    C = C.to(acc).repeat_interleave(heads // C.shape[1], dim=1)[:, :, None, :]
    h = state[rows.clamp(min=0)].to(acc)
    h = torch.exp(dt[..., None] * A.to(acc)) * h + (dt * x.to(acc))[..., None] * B
    state[rows[live]] = h[live].to(state.dtype)
    y = (h * C).sum(-1)
    if D is not None:
        y = y + D.to(acc) * x.to(acc)
    if z is not None:
        y = y * F.silu(z.to(acc))
    return torch.where(live[:, None, None], y, 0).to(x.dtype)
