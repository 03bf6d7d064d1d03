"""The output of each chunk from its inputs and the state it begins with, as plain torch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .ssd_chunk_state import _chunked

__all__ = ["chunk_scan", "chunk_scan_ref"]


def chunk_scan(
    B: Tensor,
    C: Tensor,
    x: Tensor,
    dt: Tensor,
    dA_cumsum: Tensor,
    prev_states: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
) -> Tensor:
    """SSD of every chunk.

    Args:
        B, C: ``(B, L, G, N)``; x, z: ``(B, L, H, P)``.
        dt, dA_cumsum: ``(B, H, chunks, chunk_size)``.
        prev_states: ``(B, chunks, H, P, N)``, the state with which each chunk begins.
        D: ``(H,)`` or ``(H, P)``, or None.

    Returns:
        ``(B, L, H, P)`` in x's dtype.
    """
    length, heads, chunk_size = x.shape[1], x.shape[2], dt.shape[-1]
    times = heads // B.shape[2]
    Bc, Cc = (_chunked(m.float(), chunk_size).repeat_interleave(times, dim=3) for m in (B, C))  # (B, chunks, l, H, N)
    decay = torch.exp((dA_cumsum[..., :, None] - dA_cumsum[..., None, :]).tril())
    scores = torch.einsum("bclhn,bcshn->bhcls", Cc, Bc) * decay * dt[..., None, :]
    out = torch.einsum("bhcls,bcshp->bclhp", scores.tril(), _chunked(x.float(), chunk_size))
    carried = torch.einsum("bclhn,bchpn->bclhp", Cc, prev_states.float())
    out = (out + carried * torch.exp(dA_cumsum).permute(0, 2, 3, 1)[..., None]).flatten(1, 2)[:, :length]
    if D is not None:
        out = out + x.float() * (D[:, None] if D.dim() == 1 else D).float()
    if z is not None:
        out = out * F.silu(z.float())
    return out.to(x.dtype)


chunk_scan_ref = chunk_scan
