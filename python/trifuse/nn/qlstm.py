"""The quasi-LSTM: an LSTM whose gates read only the input."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from trifuse.nn.recurrent import Cell, Recurrent, at_least_float32
from trifuse.ops import linear_scan

__all__ = ["QLSTM"]


class QLSTMCell(Cell):
    def __init__(self, input_size: int, hidden_size: int, bias: bool, device: Any, dtype: Any) -> None:
        super().__init__(input_size, hidden_size, bias, device, dtype)
        self.linear_i = nn.Linear(input_size, hidden_size, bias, device, dtype)
        self.linear_f = nn.Linear(input_size, hidden_size, bias, device, dtype)
        self.linear_z = nn.Linear(input_size, hidden_size, bias, device, dtype)
        self.linear_o = nn.Linear(input_size, hidden_size, bias, device, dtype)

    def forward(self, x: Tensor, h_0: Tensor | None, reverse: bool, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
        forget = torch.sigmoid(at_least_float32(self.linear_f(x)) + 1)
        update = torch.sigmoid(at_least_float32(self.linear_i(x))) * torch.tanh(at_least_float32(self.linear_z(x)))
        c, c_n = linear_scan(
            forget, update, None if h_0 is None else h_0.to(update.dtype),
            reverse=reverse, cu_seqlens=cu_seqlens, layout="bld", return_last_state=True,
        )  # fmt: skip
        h = torch.sigmoid(at_least_float32(self.linear_o(x))) * torch.tanh(c)
        return h.to(x.dtype), c_n


class QLSTM(Recurrent):
    """The quasi-LSTM, with the interface of ``torch.nn.GRU``.

    Per layer, with i, f, z, o linear in ``x[t]`` alone:
    ``c[t] = sigmoid(f[t] + 1) * c[t - 1] + sigmoid(i[t]) * tanh(z[t])`` and ``output[t] = sigmoid(o[t]) * tanh(c[t])``.
    The cell c is all that the recurrence carries, so ``h_0`` and ``h_n`` are cells, and not the last output.

    Args:
        input_size, hidden_size: sizes of a step of the input and of the state.
        num_layers: layers, each reading the outputs of the one before.
        bias: whether the linear maps have one.
        batch_first: input and output are ``(B, T, size)`` instead of ``(T, B, size)``.
        dropout: probability of dropping an output between two layers, in training.
        bidirectional: a second cell per layer runs backwards in time; outputs are concatenated.
        device, dtype: of the parameters. The recurrence runs in at least float32.

    Source: Stanić, Ashley, Serikov, Kirsch, Faccio, Schmidhuber, Hofmann and Schlag, "The Languini Kitchen:
    Enabling Language Modelling Research at Different Scales of Compute", 2023 (the quasi-LSTM, with one head and
    no projection behind it); the offset of the forget gate is that of its published code.
    """

    cell = QLSTMCell
