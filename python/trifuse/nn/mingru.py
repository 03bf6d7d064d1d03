"""The minimal GRU: gates that read only the input make the recurrence linear."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from trifuse.nn.recurrent import Cell, Recurrent, at_least_float32
from trifuse.ops import linear_scan

__all__ = ["MinGRU"]


class MinGRUCell(Cell):
    def __init__(self, input_size: int, hidden_size: int, bias: bool, device: Any, dtype: Any) -> None:
        super().__init__(input_size, hidden_size, bias, device, dtype)
        self.linear_z = nn.Linear(input_size, hidden_size, bias, device, dtype)
        self.linear_h = nn.Linear(input_size, hidden_size, bias, device, dtype)

    def forward(self, x: Tensor, h_0: Tensor | None, reverse: bool, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
        gate, candidate = at_least_float32(self.linear_z(x)), at_least_float32(self.linear_h(x))
        h, h_n = linear_scan(
            torch.sigmoid(-gate), torch.sigmoid(gate) * candidate, None if h_0 is None else h_0.to(gate.dtype),
            reverse=reverse, cu_seqlens=cu_seqlens, layout="bld", return_last_state=True,
        )  # fmt: skip
        return h.to(x.dtype), h_n


class MinGRU(Recurrent):
    """The minimal GRU, with the interface of ``torch.nn.GRU``.

    Per layer ``z[t] = sigmoid(linear_z(x[t]))`` and ``h[t] = (1 - z[t]) * h[t - 1] + z[t] * linear_h(x[t])``.

    Args:
        input_size, hidden_size: sizes of a step of the input and of the state.
        num_layers: layers, each reading the outputs of the one before.
        bias: whether the linear maps have one.
        batch_first: input and output are ``(B, T, size)`` instead of ``(T, B, size)``.
        dropout: probability of dropping an output between two layers, in training.
        bidirectional: a second cell per layer runs backwards in time; outputs are concatenated.
        device, dtype: of the parameters. The recurrence runs in at least float32.

    Source: Feng, Tung, Ahmed, Bengio and Hajimirsadeghi, "Were RNNs All We Needed?", 2024, section 3.1.
    """

    cell = MinGRUCell
