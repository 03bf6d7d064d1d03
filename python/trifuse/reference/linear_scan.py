"""The linear scan written as its definition: one step of time after another, in plain PyTorch."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

__all__ = ["linear_scan"]


def linear_scan(
    a: Tensor,
    b: Tensor,
    initial_state: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    reverse: bool = False,
) -> tuple[Tensor, Tensor]:
    """``h[t] = a[t] * h[t - 1] + b[t]``: returns ``(h, last_state)``.

    Args:
        a: ``(B, D, T)``, real or complex.
        b: ``(B, D, T)``; complex where ``a`` is.
        initial_state: ``(B, D)``; with ``cu_seqlens`` ``(S, D)``; zero if None.
        cu_seqlens: ``(S + 1,)`` offsets of S sequences packed into a batch of one.
        reverse: run time backwards inside each sequence.

    Returns:
        ``h`` ``(B, D, T)`` in ``b``'s dtype, and ``last_state`` ``(B, D)`` (``(S, D)`` when packed) in the
        accumulation dtype: float32 for half precision, otherwise ``b``'s.

    Source: Blelloch, "Prefix Sums and Their Applications", 1990, section 1.4.1 (first-order recurrences).
    """
    acc = torch.promote_types(b.dtype, torch.float32)
    batch, dim, seqlen = b.shape
    # Taken apart once: indexing every step would give autograd a gradient of the full length per step.
    factors, term = a.to(torch.promote_types(a.dtype, torch.float32)).unbind(2), b.to(acc)
    terms = term.unbind(2)

    def one_sequence(start: int, end: int, state: Tensor) -> tuple[list[Tensor], Tensor]:
        states = []
        for t in reversed(range(start, end)) if reverse else range(start, end):
            state = factors[t] * state + terms[t]
            states.append(state)
        return (states[::-1] if reverse else states), state

    def first_state(rows: slice, count: int) -> Tensor:
        if initial_state is None:
            return torch.zeros(count, dim, dtype=acc, device=b.device)
        return initial_state[rows].to(acc)

    if cu_seqlens is None:
        steps, last_state = one_sequence(0, seqlen, first_state(slice(None), batch))
    else:
        steps, ends = [], []
        for s, (start, end) in enumerate(pairwise(cu_seqlens.tolist())):
            states, state = one_sequence(start, end, first_state(slice(s, s + 1), 1))
            steps.extend(states)
            ends.append(state)
        last_state = torch.cat(ends) if ends else torch.zeros(0, dim, dtype=acc, device=b.device)

    h = torch.stack(steps, dim=-1) if steps else term.clone()  # of no steps
    return h.to(b.dtype), last_state.clone()  # the caller may change it in place; the graph, or initial_state, may not
