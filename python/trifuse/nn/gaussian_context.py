"""The Gaussian context transformer: a gate for every channel of an image."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from trifuse.ops import gaussian_gate

__all__ = ["GaussianContext2d"]


class GaussianContext2d(nn.Module):
    """Gates the channels of an image by how far their mean lies from that of all channels.

    The mean of every channel over height and width, normalised over the channels to z, gives the gate
    ``exp(-z^2 / (2 width^2))`` that the channel is multiplied by: channels far from the others are dampened.

    Args:
        width: of the Gaussian, not 0. (The code published for it computes ``exp(-z^2 c / 2)``, c = 2: give
            ``width = c ** -0.5`` for that.)
        learnable: make ``width`` a parameter, of shape ``()``; otherwise there are none.
        eps: added to the variance of the channels' means.
        device, dtype: of the parameter, float32 by default.

    Shape:
        ``(B, C, H, W)`` or ``(C, H, W)``, of any memory format: float32, float16, bfloat16 or float64. The output is
        of the same shape, dtype and format. Means and gates are computed in float32 (float64 for float64), also under
        autocast.

    Raises:
        TypeError, ValueError: naming the argument, what it was and what it must be.

    Source: Ruan et al., "Gaussian Context Transformer", CVPR 2021: GCT-B0, and GCT-B1 with ``learnable=True``.
    """

    def __init__(
        self, width: float = 2.0, *, learnable: bool = False, eps: float = 1e-5, device: Any = None, dtype: Any = None
    ) -> None:
        super().__init__()
        for name, value in (("width", width), ("eps", eps)):
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TypeError(f"GaussianContext2d: {name} is {type(value).__name__}; it must be a number")
        if width == 0 or not math.isfinite(width):
            raise ValueError(f"GaussianContext2d: width is {width}; it must be finite and not 0")
        if not 0 < eps < math.inf:
            raise ValueError(f"GaussianContext2d: eps is {eps}; it must be above 0 and finite")
        self.initial_width, self.learnable, self.eps = float(width), learnable, float(eps)
        self.width: nn.Parameter | float = self.initial_width
        if learnable:
            self.width = nn.Parameter(torch.empty((), device=device, dtype=dtype))
            self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        if self.learnable:
            self.width.fill_(self.initial_width)

    def forward(self, x: Tensor) -> Tensor:
        if not isinstance(x, Tensor):
            raise TypeError(f"GaussianContext2d: x is {type(x).__name__}; it must be a torch.Tensor")
        if x.dim() not in (3, 4):
            raise ValueError(f"GaussianContext2d: x has shape {tuple(x.shape)}; it must be (B, C, H, W) or (C, H, W)")
        if not x.is_floating_point():
            raise TypeError(f"GaussianContext2d: x is {str(x.dtype).removeprefix('torch.')}; it must be floating")
        acc = torch.promote_types(x.dtype, torch.float32)
        width = self.width.to(acc) if self.learnable else self.width
        means = x.mean((-2, -1), dtype=acc)
        gate = gaussian_gate(means, width=width, kind="context", dim=-1, eps=self.eps, multiply=False)
        return x * gate[..., None, None].to(x.dtype)

    def extra_repr(self) -> str:
        return f"width={self.initial_width:g}, learnable={self.learnable}, eps={self.eps:g}"
