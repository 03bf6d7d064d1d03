"""A depthwise convolution with a low-rank update of its taps."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from trifuse.nn.low_rank import LowRank, take_over

__all__ = ["LoRAConv1d"]


class LoRAConv1d(LowRank, nn.Conv1d):
    """A depthwise ``torch.nn.Conv1d`` whose taps ``(D, W)`` are ``weight + scale * lora_B lora_A``.

    Kernels that do a block's causal convolution take these taps and run as they do without an adapter. ``lora_A`` is
    ``(rank, W)``, ``lora_B`` ``(D, rank)`` and starts at zero; weight and bias are frozen. Merging and checkpoints are
    as in ``LoRALinear``. There is no dropout: the update is of the taps.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, dtype:
            those of ``torch.nn.Conv1d``; channels and groups must be one number.
        rank, alpha, scaling, adapter_dtype: as in ``LoRALinear``; ranks above W add nothing but numbers to train.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        padding: int | str = 0,
        dilation: int = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        rank: int = 4,
        alpha: float | None = None,
        scaling: str = "lora",
        adapter_dtype: torch.dtype | None = None,
    ):
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, dtype
        )
        if self.bias is not None:
            self.bias.requires_grad_(False)
        self._add_tap_adapter(rank, alpha, scaling=scaling, adapter_dtype=adapter_dtype)

    @classmethod
    def from_conv1d(cls, conv: nn.Conv1d, **options: Any) -> Any:
        """A convolution that does what `conv` does, with an adapter that has no effect yet.

        Args:
            conv: a depthwise ``torch.nn.Conv1d``. Its parameters are shared, and its weight is frozen.
            options: the arguments of this class from `rank` on.

        Raises:
            TypeError, ValueError: it is not a plain depthwise convolution, or an option is wrong.
        """
        layer = take_over(cls, conv, nn.Conv1d)
        layer._add_tap_adapter(**options)
        return layer

    def _add_tap_adapter(
        self,
        rank: int = 4,
        alpha: float | None = None,
        *,
        scaling: str = "lora",
        adapter_dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        if not self.in_channels == self.out_channels == self.groups:
            raise ValueError(
                f"{type(self).__name__}: {self.in_channels} channels go in and {self.out_channels} out in "
                f"{self.groups} groups; it must be a depthwise convolution, with one number for the three"
            )
        self._add_adapter(rank, alpha, 0.0, scaling, adapter_dtype, **options)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if "lora_A" in self._parameters:
            self.reset_lora_parameters()

    def _matrix(self, weight: Tensor) -> Tensor:
        return weight.squeeze(1)

    def taps(self) -> Tensor:
        """``(D, W)``: the taps with the update, in the weight's dtype, rounded once; gradients flow."""
        weight = self.weight.squeeze(1)
        if self.merged:
            self._check_merged_gradient()
            return weight
        A, B, factor = self._update()
        wide = torch.promote_types(weight.dtype, torch.float32)
        with torch.autocast(weight.device.type, enabled=False):
            return torch.addmm(weight.to(wide), B.to(wide), A.to(wide), alpha=factor).to(weight.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, D, L)`` to ``(B, D, L')``, as ``torch.nn.Conv1d``."""
        return self._conv_forward(x, self.taps().unsqueeze(1), self.bias)

    def to_conv1d(self) -> nn.Conv1d:
        """A plain ``torch.nn.Conv1d`` with the update in its weight; the bias is shared."""
        conv = nn.Conv1d(
            self.in_channels, self.out_channels, self.kernel_size, self.stride, self.padding, self.dilation,
            self.groups, False, self.padding_mode, device="meta",
        )  # fmt: skip
        taps = self.weight.squeeze(1) if self.merged else self.taps()
        conv.weight = nn.Parameter(taps.detach().clone().unsqueeze(1), requires_grad=self.weight.requires_grad)
        conv.bias = self.bias
        return conv.train(self.training)
