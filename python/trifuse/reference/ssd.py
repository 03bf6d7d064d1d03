"""The state-space dual of Mamba-2 written as its definition: one step of time after another, in plain PyTorch.

Naive on purpose, like ``reference.selective_scan``: every kernel is tested against it.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["ssd"]


def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The recurrence of Mamba-2 over ``x``: returns ``(out, final_states)``.

    Args:
        x, z: ``(B, L, H, P)``.
        dt: ``(B, L, H)``, clamped to ``dt_limit`` after ``dt_bias`` and softplus.
        A, dt_bias: ``(H,)``.
        B, C: ``(B, L, G, N)`` with ``G`` dividing ``H``.
        D: ``(H,)`` or ``(H, P)``.
        initial_states: ``(B, H, P, N)``; with ``cu_seqlens`` ``(S, H, P, N)``.
        seq_idx: ``(B, L)``: the state restarts from zero where it changes.
        cu_seqlens: ``(S + 1,)`` offsets of S sequences packed into a batch of one.

    Returns:
        ``out`` ``(B, L, H, P)`` in ``x``'s dtype, and ``final_states`` in float32 (float64 for float64 ``x``).

    Source: Dao and Gu, "Transformers are SSMs", 2024, equation 1 with the scalar-times-identity A of section 6.
    """
    acc = torch.float64 if x.dtype == torch.float64 else torch.float32
    seqlen, heads = x.shape[1], x.shape[2]
    step = dt.to(acc)
    if dt_bias is not None:
        step = step + dt_bias.to(acc)
    if dt_softplus:
        step = F.softplus(step)
    step = step.clamp(*dt_limit)
    inputs = x.to(acc)
    B, C = (coef.to(acc).repeat_interleave(heads // coef.shape[2], dim=2) for coef in (B, C))
    # Taken apart once: the gradient of one position of a tensor is as large as all of it.
    decays = torch.exp(step * A.to(acc))[..., None, None].unbind(1)
    news = (step[..., None] * inputs)[..., None].unbind(1)
    Bs, Cs = (coef[:, :, :, None, :].unbind(1) for coef in (B, C))

    def one_sequence(start: int, end: int, state: Tensor) -> tuple[list[Tensor], Tensor]:
        ys = []
        for t in range(start, end):
            if seq_idx is not None and t > start:
                same = seq_idx[:, t] == seq_idx[:, t - 1]
                state = torch.where(same[:, None, None, None], state, torch.zeros_like(state))
            state = decays[t] * state + news[t] * Bs[t]
            ys.append((state * Cs[t]).sum(-1))
        return ys, state

    bounds = [0, seqlen] if cu_seqlens is None else cu_seqlens.tolist()
    rows = x.shape[0] if cu_seqlens is None else 1
    zero = inputs.new_zeros((rows, *x.shape[2:], B.shape[3]))
    ys, finals = [], []
    for s, (start, end) in enumerate(pairwise(bounds)):
        state = zero if initial_states is None else initial_states[s * rows : (s + 1) * rows].to(acc)
        y, state = one_sequence(start, end, state)
        ys.extend(y)
        finals.append(state)
    final_states = torch.cat(finals) if finals else zero[:0]

    y = torch.stack(ys, dim=1) if ys else inputs.clone()  # of no steps
    if D is not None:
        y = y + (D if D.dim() == 2 else D[:, None]).to(acc) * inputs
    if z is not None:
        y = y * F.silu(z.to(acc))
    return y.to(x.dtype), final_states.clone()  # the caller may change it in place; initial_states may not
