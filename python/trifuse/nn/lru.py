"""The linear recurrent unit: a complex diagonal recurrence that is stable by its parametrisation."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from trifuse.nn.recurrent import Cell, Recurrent, at_least_float32
from trifuse.ops import linear_scan

__all__ = ["LRU"]


class LRUCell(Cell):
    def __init__(
        self, input_size: int, hidden_size: int, bias: bool, device: Any, dtype: Any, r_min: float, r_max: float,
        max_phase: float,
    ) -> None:  # fmt: skip
        super().__init__(input_size, hidden_size, bias, device, dtype)
        self.r_min, self.r_max, self.max_phase = r_min, r_max, max_phase
        for name in ("nu_log", "theta_log", "gamma_log"):
            self.register_parameter(name, nn.Parameter(torch.empty(hidden_size, device=device, dtype=dtype)))
        # Complex matrices as real ones, so that they are linear maps like any other. Real and imaginary parts
        # alternate: the rows of linear_B are those of B, the columns of linear_C those of (Re C, -Im C).
        self.linear_B = nn.Linear(input_size, 2 * hidden_size, False, device, dtype)
        self.linear_C = nn.Linear(2 * hidden_size, hidden_size, bias, device, dtype)
        self.linear_D = nn.Linear(input_size, hidden_size, False, device, dtype)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Eigenvalues uniform on the ring between ``r_min`` and ``r_max``, up to the phase ``max_phase``."""
        wide = {"dtype": torch.float64}
        size = torch.empty_like(self.nu_log, **wide).uniform_(self.r_min**2, self.r_max**2).clamp_(1e-12, 1 - 1e-12)
        phase = torch.empty_like(self.nu_log, **wide).uniform_(0, self.max_phase).clamp_(min=1e-12)
        self.nu_log.copy_(torch.log(-0.5 * torch.log(size)))
        self.theta_log.copy_(torch.log(phase))
        self.gamma_log.copy_(0.5 * torch.log1p(-size))
        self.linear_B.weight.normal_(std=(2 * self.input_size) ** -0.5)
        self.linear_C.weight.normal_(std=self.hidden_size**-0.5)
        self.linear_D.weight.normal_(std=self.input_size**-0.5)
        if self.linear_C.bias is not None:
            self.linear_C.bias.zero_()

    def forward(self, x: Tensor, h_0: Tensor | None, reverse: bool, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
        Bx = at_least_float32(self.linear_B(x)).unflatten(-1, (self.hidden_size, 2))
        nu, theta, gamma = (
            torch.exp(at_least_float32(p)).to(Bx.dtype) for p in (self.nu_log, self.theta_log, self.gamma_log)
        )
        decay = torch.polar(torch.exp(-nu), theta)
        b = torch.view_as_complex(Bx * gamma[:, None])
        h, h_n = linear_scan(
            decay[None, None, :], b, None if h_0 is None else h_0.to(b.dtype),
            reverse=reverse, cu_seqlens=cu_seqlens, layout="bld", return_last_state=True,
        )  # fmt: skip
        y = self.linear_C(torch.view_as_real(h).flatten(-2).to(x.dtype)) + self.linear_D(x)
        return y.to(x.dtype), h_n


class LRU(Recurrent):
    """The linear recurrent unit, with the interface of ``torch.nn.GRU``; its states are complex.

    Per layer, with ``lambda = exp(-exp(nu_log) + 1j * exp(theta_log))``, never outside the unit circle:
    ``h[t] = lambda * h[t - 1] + exp(gamma_log) * (B @ x[t])`` and ``output[t] = Re(C @ h[t]) + D @ x[t]``.

    Args:
        input_size: size of a step of the input.
        hidden_size: number of complex states, and size of the output.
        num_layers: layers, each reading the outputs of the one before.
        bias: whether the output has a bias (zero at the start; the paper has none).
        batch_first: input and output are ``(B, T, size)`` instead of ``(T, B, size)``.
        dropout: probability of dropping an output between two layers, in training.
        bidirectional: a second cell per layer runs backwards in time; outputs are concatenated.
        device, dtype: of the parameters. The recurrence runs in complex64, or complex128 for float64.
        r_min, r_max, max_phase: the eigenvalues start uniform on this ring, up to this phase.

    ``h_0`` may be real; ``h_n`` is complex.

    Source: Orvieto, Smith, Gu, Fernando, Gulcehre, Pascanu and De, "Resurrecting Recurrent Neural Networks for
    Long Sequences", 2023, sections 3.2 to 3.4 and appendix A.
    """

    cell = LRUCell
    complex_state = True

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
        r_min: float = 0.0,
        r_max: float = 1.0,
        max_phase: float = 2 * math.pi,
    ) -> None:
        if not 0 <= r_min <= r_max <= 1:
            raise ValueError(f"LRU: r_min is {r_min!r} and r_max {r_max!r}; it must be 0 <= r_min <= r_max <= 1")
        if not max_phase > 0:
            raise ValueError(f"LRU: max_phase is {max_phase!r}; it must be positive")
        super().__init__(
            input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, device, dtype,
            r_min=r_min, r_max=r_max, max_phase=max_phase,
        )  # fmt: skip
