"""The gated unit of two halves."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

__all__ = ["swiglu"]


def swiglu(xy: Tensor) -> Tensor:
    """``silu(x) * y`` of ``xy`` ``(..., 2 D)``, its halves x and y."""
    x, y = xy.chunk(2, dim=-1)
    return F.silu(x) * y
