"""The real-gated linear recurrent unit of Griffin."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trifuse.nn.recurrent import Cell, Recurrent, at_least_float32
from trifuse.ops import linear_scan

__all__ = ["RGLRU"]


class RGLRUCell(Cell):
    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool,
        device: Any,
        dtype: Any,
        c: float,
        a_min: float,
        a_max: float,
    ) -> None:
        super().__init__(input_size, hidden_size, bias, device, dtype)
        self.c, self.a_min, self.a_max = c, a_min, a_max
        self.linear_in = nn.Linear(input_size, hidden_size, bias, device, dtype)
        self.linear_r = nn.Linear(hidden_size, hidden_size, bias, device, dtype)
        self.linear_i = nn.Linear(hidden_size, hidden_size, bias, device, dtype)
        self.Lambda = nn.Parameter(torch.empty(hidden_size, device=device, dtype=dtype))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """``sigmoid(Lambda) ** c`` starts uniform between ``a_min`` and ``a_max``."""
        a = torch.empty_like(self.Lambda, dtype=torch.float64).uniform_(self.a_min, self.a_max) ** (1 / self.c)
        self.Lambda.copy_(torch.log(a) - torch.log1p(-a))

    def forward(self, x: Tensor, h_0: Tensor | None, reverse: bool, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
        value = self.linear_in(x)
        r, i = torch.sigmoid(at_least_float32(self.linear_r(value))), torch.sigmoid(self.linear_i(value))
        log_a = -self.c * F.softplus(-at_least_float32(self.Lambda)).to(r.dtype) * r
        # A gate that underflowed leaves no input, and not a root with an infinite slope.
        room = (-torch.expm1(2 * log_a)).clamp(min=torch.finfo(log_a.dtype).tiny)
        b = torch.sqrt(room) * at_least_float32(i * value)
        h, h_n = linear_scan(
            torch.exp(log_a), b, None if h_0 is None else h_0.to(b.dtype),
            reverse=reverse, cu_seqlens=cu_seqlens, layout="bld", return_last_state=True,
        )  # fmt: skip
        return h.to(x.dtype), h_n


class RGLRU(Recurrent):
    """The real-gated linear recurrent unit (RG-LRU), with the interface of ``torch.nn.GRU``.

    Per layer, with ``u[t] = linear_in(x[t])``, ``r[t] = sigmoid(linear_r(u[t]))`` and
    ``i[t] = sigmoid(linear_i(u[t]))``: ``a[t] = sigmoid(Lambda) ** (c * r[t])`` and
    ``h[t] = a[t] * h[t - 1] + sqrt(1 - a[t] ** 2) * (i[t] * u[t])``.
    The gates are full matrices; ``linear_in`` is the projection that stands before the unit in its block.

    Args:
        input_size, hidden_size: sizes of a step of the input and of the state.
        num_layers: layers, each reading the outputs of the one before.
        bias: whether the linear maps have one.
        batch_first: input and output are ``(B, T, size)`` instead of ``(T, B, size)``.
        dropout: probability of dropping an output between two layers, in training.
        bidirectional: a second cell per layer runs backwards in time; outputs are concatenated.
        device, dtype: of the parameters. The recurrence runs in at least float32.
        c: the exponent's constant.
        a_min, a_max: ``sigmoid(Lambda) ** c`` starts uniform between them.

    Source: De et al., "Griffin: Mixing Gated Linear Recurrences with Local Attention for Efficient Language Models",
    2024, section 2.4, equations 1 to 4.
    """

    cell = RGLRUCell

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        c: float = 8.0,
        a_min: float = 0.9,
        a_max: float = 0.999,
    ) -> None:
        if not c > 0:
            raise ValueError(f"RGLRU: c is {c!r}; it must be positive")
        if not 0 < a_min <= a_max < 1:
            raise ValueError(f"RGLRU: a_min is {a_min!r} and a_max {a_max!r}; it must be 0 < a_min <= a_max < 1")
        super().__init__(
            input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, device, dtype,
            c=c, a_min=a_min, a_max=a_max,
        )  # fmt: skip
