"""A linear layer that answers at every nested width of its input."""

from __future__ import annotations

import numbers
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trifuse.ops import nested_linear
from trifuse.ops.nested_linear import checked_widths

__all__ = ["NestedLinear"]


class NestedLinear(nn.Linear):
    """A ``torch.nn.Linear`` read at several nested widths: its logits for the first 1, 2, 4, ... entries of its input.

    Trained with ``trifuse.nested_cross_entropy`` on top of an encoder, it makes the encoder put what matters most
    first, so that its output can be cut to any of the widths afterwards.

    Args:
        in_features, out_features, bias, device, dtype: those of ``torch.nn.Linear``; ``weight`` and ``bias`` have its
            names, shapes and initial values, so its checkpoints load.
        widths: strictly increasing, from 1 to in_features; by default the powers of two up to in_features, and
            in_features itself.

    Raises:
        TypeError, ValueError: naming the argument, what it was and what it must be.

    Source: Kusupati et al., "Matryoshka Representation Learning", 2022 (arXiv 2205.13147), section 3 (MRL-E).
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        widths: Sequence[int] | None = None,
    ):
        super().__init__(in_features, out_features, bias, device, dtype)
        if widths is None:
            widths = sorted({*(2**i for i in range(in_features.bit_length())), in_features})
        self.widths = checked_widths("NestedLinear", widths, in_features)

    def forward(self, x: Tensor, width: int | None = None) -> Tensor:
        """The logits at every width, or at one.

        Args:
            x: ``(..., in_features)``; with a width also ``(..., width)``, already cut to it.
            width: any from 1 to in_features, also one that is not among ``widths``.

        Returns:
            ``(len(widths), ..., out_features)``, with a width ``(..., out_features)``.

        Raises:
            TypeError, ValueError: naming the argument, what it was and what it must be.
        """
        if width is None:
            return nested_linear(x, self.weight, self.bias, self.widths)
        if isinstance(width, bool) or not isinstance(width, numbers.Integral):
            raise TypeError(f"NestedLinear: width is {type(width).__name__}; it must be an int or None")
        if not 1 <= width <= self.in_features:
            raise ValueError(f"NestedLinear: width is {width}; it must be from 1 to in_features, {self.in_features}")
        if x.shape[-1] not in (width, self.in_features):
            raise ValueError(
                f"NestedLinear: x has shape {tuple(x.shape)}; its last size must be in_features, {self.in_features}, "
                f"or width, {width}"
            )
        return F.linear(x[..., :width], self.weight[:, :width], self.bias)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, widths={self.widths}"
