"""One token of the selective scan."""

from __future__ import annotations

from torch import Tensor

import trifuse
from trifuse import selective_state_update

__all__ = ["selective_state_update", "selective_state_update_ref"]


def selective_state_update_ref(
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
) -> Tensor:
    """``selective_state_update`` on the reference backend."""
    with trifuse.backend("reference"):
        return selective_state_update(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus)
