"""The Mamba-2 block under the arguments of the published simple form of it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from trifuse.nn.mamba2 import Mamba2

__all__ = ["Mamba2Simple"]


class Mamba2Simple(Mamba2):
    """``Mamba2`` with fewer arguments and other defaults; parameters, draws and ``state_dict`` keys are the published
    simple block's, and everything ``Mamba2`` can do (step, cache, packed texts) it can.

    Args:
        activation: of the convolution, ``"swish"`` or ``"silu"``, which are one.
        learnable_init_states: a text starts from a trained state ``init_states``, not from zero.
        d_model, d_state, d_conv, conv_init, expand, headdim, ngroups, A_init_range, dt_min, dt_max, dt_init_floor,
            dt_limit, bias, conv_bias, chunk_size, use_mem_eff_path, layer_idx, device, dtype: those of ``Mamba2``.

    Source: Dao and Gu, "Transformers are SSMs: Generalized Models and Efficient Algorithms Through Structured
    State Space Duality", 2024, section 7.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 64,
        d_conv: int = 4,
        conv_init: float | None = None,
        expand: float = 2,
        headdim: int = 128,
        ngroups: int = 1,
        A_init_range: tuple[float, float] = (1, 16),
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init_floor: float = 1e-4,
        dt_limit: tuple[float, float] = (0.0, math.inf),
        learnable_init_states: bool = False,
        activation: str = "swish",
        bias: bool = False,
        conv_bias: bool = True,
        chunk_size: int = 256,
        use_mem_eff_path: bool = True,
        layer_idx: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        if activation not in ("silu", "swish"):
            raise ValueError(f'Mamba2Simple: activation is {activation!r}; it must be "silu" or "swish"')
        super().__init__(
            d_model, d_state, d_conv, conv_init, expand, headdim, ngroups=ngroups, A_init_range=A_init_range,
            dt_min=dt_min, dt_max=dt_max, dt_init_floor=dt_init_floor, dt_limit=dt_limit, bias=bias,
            conv_bias=conv_bias, chunk_size=chunk_size, use_mem_eff_path=use_mem_eff_path, layer_idx=layer_idx,
            device=device, dtype=dtype, learnable_init_states=learnable_init_states,
        )  # fmt: skip
        self.activation = activation

    def forward(self, u: Tensor, seq_idx: Tensor | None = None, **options) -> Tensor:
        """``Mamba2.forward`` of u ``(B, L, d_model)``, with ``seq_idx`` in the second place."""
        return super().forward(u, seq_idx=seq_idx, **options)
