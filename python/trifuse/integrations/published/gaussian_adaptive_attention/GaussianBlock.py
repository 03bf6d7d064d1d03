"""The three modules, with the published normalization: a model that was trained with it gives the same outputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from trifuse import nn

__all__ = ["GaussianAdaptiveAttention", "GaussianBlock", "MultiHeadGaussianAdaptiveAttention"]


class GaussianAdaptiveAttention(nn.GaussianAdaptiveAttention):
    """``trifuse.nn.GaussianAdaptiveAttention``, whose normalization is "clamped" unless it is named."""

    def __init__(
        self, norm_axis: int, num_heads: int, num_gaussians: int, padding_value: float | None,
        mean_offset_init: float = 0, eps: float = 1e-8, **options: Any,
    ) -> None:  # fmt: skip
        options.setdefault("normalization", "clamped")
        super().__init__(norm_axis, num_heads, num_gaussians, padding_value, mean_offset_init, eps, **options)


class MultiHeadGaussianAdaptiveAttention(nn.MultiHeadGaussianAdaptiveAttention):
    """``trifuse.nn.MultiHeadGaussianAdaptiveAttention``, whose normalization is "clamped" unless it is named."""

    head_class = GaussianAdaptiveAttention

    def __init__(
        self, norm_axis: int, num_heads: int, num_gaussians: int, padding_value: float | None = None,
        eps: float = 1e-8, **options: Any,
    ) -> None:  # fmt: skip
        options.setdefault("normalization", "clamped")
        super().__init__(norm_axis, num_heads, num_gaussians, padding_value, eps, **options)


class GaussianBlock(nn.GaussianBlock):
    """``trifuse.nn.GaussianBlock``, whose normalization is "clamped" unless it is named."""

    layer_class = MultiHeadGaussianAdaptiveAttention

    def __init__(
        self, norm_axes: Sequence[int], num_heads: Sequence[int], num_gaussians: Sequence[int], num_layers: int,
        padding_value: float | None = None, eps: float = 1e-8, **options: Any,
    ) -> None:  # fmt: skip
        options.setdefault("normalization", "clamped")
        super().__init__(norm_axes, num_heads, num_gaussians, num_layers, padding_value, eps, **options)
