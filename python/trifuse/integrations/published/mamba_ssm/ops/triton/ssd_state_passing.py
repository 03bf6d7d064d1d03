"""States handed from chunk to chunk, as plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from .ssd_chunk_state import chunk_ends

__all__ = ["state_passing", "state_passing_ref"]


def state_passing(
    states: Tensor, dA_chunk_cumsum: Tensor, initial_states: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The state with which each chunk begins, and the one after the last.

    Args:
        states: ``(B, chunks, H, D)``, what each chunk adds.
        dA_chunk_cumsum: ``(B, H, chunks)``, the logarithm of each chunk's decay.
        initial_states: ``(B, H, D)``, or None for zero.

    Returns:
        ``(B, chunks, H, D)`` in the dtype of ``states``, and ``(B, H, D)`` float32.
    """
    return _state_passing_fwd(states, dA_chunk_cumsum, initial_states)


def state_passing_ref(
    states: Tensor, dA_chunk_cumsum: Tensor, initial_states: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """``state_passing`` with both results in the dtype of ``states``."""
    out, last = _state_passing_fwd(states, dA_chunk_cumsum, initial_states)
    return out, last.to(states.dtype)


def _state_passing_fwd(
    states: Tensor,
    dA_chunk_cumsum: Tensor,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    chunk_size: int | None = None,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """``state_passing``; with seq_idx a state ends with the sequence it is of. Sequence 0 is the initial one."""
    chunks = states.shape[1]
    decay = torch.exp(dA_chunk_cumsum.float())  # (B, H, chunks)
    if seq_idx is not None:
        if chunk_size is None:
            raise ValueError("_state_passing_fwd: chunk_size is None; with seq_idx it must be an int")
        ids = seq_idx[:, chunk_ends(seq_idx.shape[1], chunk_size, chunks, seq_idx.device)]
        before = torch.cat((torch.zeros_like(ids[:, :1]), ids[:, :-1]), dim=1)
        decay = decay * (ids == before)[:, None]
    state = torch.zeros_like(states[:, 0], dtype=torch.float32) if initial_states is None else initial_states.float()
    begins = []
    for chunk in range(chunks):
        begins.append(state)
        state = decay[:, :, chunk, None] * state + states[:, chunk].float()
    return torch.stack(begins, dim=1).to(out_dtype or states.dtype), state
