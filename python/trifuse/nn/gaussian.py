"""Gaussian adaptive attention as modules, with the published package's arguments, names and checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from trifuse.ops import gaussian_adaptive_attention

__all__ = ["GaussianAdaptiveAttention", "GaussianBlock", "MultiHeadGaussianAdaptiveAttention"]

NORMALIZATIONS = ("stable", "clamped")


class GaussianAdaptiveAttention(nn.Module):
    """Weights every entry of x along one axis by a product of Gaussians around the axis' own mean.

    ``out = x * w``, ``w`` the normalized product of ``num_gaussians`` Gaussians with centres ``mean + mean_offsets``
    and widths ``c``, in units of the standard deviation: ``trifuse.gaussian_adaptive_attention`` with one head.

    Args:
        norm_axis: the axis that the statistics and the weights run along; negative counts from the end.
        num_heads: kept as an attribute; it changes nothing here, as in the published package.
        num_gaussians: K.
        padding_value: entries of x equal to it are padding and pass unchanged. They count in the statistics, as
            zeros; the ``mask`` of ``forward`` leaves entries out of everything instead. None: no entry is padding.
        mean_offset_init: where ``mean_offsets`` starts (the published package takes it and starts at 0).
        eps: added to the variance; with "clamped" also the least sum that the weights are divided by.
        normalization: "stable": the weights of a slice sum to one, whatever K and the widths; "clamped": the
            published package's division, whose weights vanish where the product of the Gaussians does.
        device, dtype: of ``mean_offsets`` and ``c``, both ``(K,)``; the arithmetic is in at least float32 anyway.

    Raises:
        ValueError: naming the argument, what it was and what it must be.

    Source: Ioannides et al., "Gaussian Adaptive Attention Is All You Need: Robust Contextual Representations Across
    Multiple Modalities", 2024, section 3.
    """

    def __init__(
        self,
        norm_axis: int,
        num_heads: int,
        num_gaussians: int,
        padding_value: float | None,
        mean_offset_init: float = 0,
        eps: float = 1e-8,
        *,
        normalization: str = "stable",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _check_arguments(type(self).__name__, norm_axis, num_heads, num_gaussians, normalization)
        self.norm_axis = norm_axis
        self.num_heads = num_heads
        self.num_gaussians = num_gaussians
        self.padding_value = padding_value
        self.mean_offset_init = mean_offset_init
        self.eps = eps
        self.normalization = normalization
        self.mean_offsets = nn.Parameter(torch.empty(num_gaussians, device=device, dtype=dtype))
        self.c = nn.Parameter(torch.empty(num_gaussians, device=device, dtype=dtype))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Offsets at ``mean_offset_init``, widths from a standard normal distribution, as published."""
        self.mean_offsets.fill_(self.mean_offset_init)
        self.c.normal_()

    def forward(
        self, x: Tensor, return_attention_details: bool = False, *, mask: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Weight x.

        Args:
            x: at least two axes, any strides; float32, float16, bfloat16 or float64.
            return_attention_details: also return the weights.
            mask: bool, broadcastable to x, True = keep; the others take no part in anything, their output is 0.

        Returns:
            The weighted x, of its shape and dtype; with ``return_attention_details`` also the weights, the same
            shape and dtype, detached.

        Raises:
            TypeError, ValueError: naming the argument, what it was and what it must be.
        """
        _check_input("GaussianAdaptiveAttention", x, self.norm_axis)
        return _weigh(self, x, self.mean_offsets, self.c, 1, mask, return_attention_details)

    def extra_repr(self) -> str:
        return _repr(self)


class MultiHeadGaussianAdaptiveAttention(nn.Module):
    """Gaussian adaptive attention of ``num_heads`` consecutive pieces of an axis, each with parameters of its own.

    A piece has ``x.shape[norm_axis] // num_heads`` entries, the last takes the remainder. One call of
    ``trifuse.gaussian_adaptive_attention`` serves all heads: the modules in ``attention_heads`` hold the parameters
    and are not called, so hooks on them do not run.

    Args:
        norm_axis, num_heads, num_gaussians, padding_value, eps, normalization, device, dtype: as of
            ``GaussianAdaptiveAttention``. ``eps`` is obeyed; the published class passes it on in the place of
            ``mean_offset_init``, so that there it is always 1e-8.

    Source: Ioannides et al., 2024, section 3.
    """

    head_class: type[GaussianAdaptiveAttention] = GaussianAdaptiveAttention

    def __init__(
        self,
        norm_axis: int,
        num_heads: int,
        num_gaussians: int,
        padding_value: float | None = None,
        eps: float = 1e-8,
        *,
        normalization: str = "stable",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _check_arguments(type(self).__name__, norm_axis, num_heads, num_gaussians, normalization)
        self.norm_axis = norm_axis
        self.num_heads = num_heads
        self.num_gaussians = num_gaussians
        self.padding_value = padding_value
        self.eps = eps
        self.normalization = normalization
        self.attention_heads = nn.ModuleList(
            self.head_class(
                norm_axis, num_heads, num_gaussians, padding_value, eps=eps, normalization=normalization,
                device=device, dtype=dtype,
            )
            for _ in range(num_heads)
        )  # fmt: skip

    def forward(
        self, x: Tensor, return_attention_details: bool = False, *, mask: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Weight x: arguments, results and errors as of ``GaussianAdaptiveAttention.forward``; x must not have
        fewer entries along ``norm_axis`` than there are heads."""
        _check_input("MultiHeadGaussianAdaptiveAttention", x, self.norm_axis)
        if x.shape[self.norm_axis] < self.num_heads:
            raise ValueError(
                f"MultiHeadGaussianAdaptiveAttention: x has {x.shape[self.norm_axis]} entries along norm_axis "
                f"({self.norm_axis}); it must have at least as many as heads, {self.num_heads}"
            )
        offsets, widths = self._parameters_of_heads()
        return _weigh(self, x, offsets, widths, self.num_heads, mask, return_attention_details)

    def _parameters_of_heads(self) -> tuple[Tensor, Tensor]:
        """``mean_offsets`` and ``c`` of all heads, each ``(num_heads, K)``, or ``(K,)`` of the only one."""
        heads = self.attention_heads._modules.values()
        try:  # getattr searches for several times as long
            offsets = [head._parameters["mean_offsets"] for head in heads]
            widths = [head._parameters["c"] for head in heads]
        except KeyError:  # parametrized ones are no parameters by these names
            offsets = [head.mean_offsets for head in heads]
            widths = [head.c for head in heads]
        if len(offsets) == 1:
            return offsets[0], widths[0]
        return torch.stack(offsets), torch.stack(widths)

    def extra_repr(self) -> str:
        return _repr(self)


class GaussianBlock(nn.Module):
    """Layers of multi-head Gaussian adaptive attention, each added to its input: ``x = x + layer(x)``.

    Args:
        norm_axes, num_heads, num_gaussians: ``num_layers`` integers each, the arguments of the layers.
        num_layers: number of layers.
        padding_value, eps, normalization, device, dtype: of every layer. As in the published class padding is added
            to itself too, so later layers do not find a ``padding_value`` other than 0 any more; the ``mask`` of
            ``forward`` has no such trouble.

    Raises:
        ValueError: naming the argument, what it was and what it must be.

    Source: Ioannides et al., 2024, section 3; the residual sum is that of the published package.
    """

    layer_class: type[MultiHeadGaussianAdaptiveAttention] = MultiHeadGaussianAdaptiveAttention

    def __init__(
        self,
        norm_axes: Sequence[int],
        num_heads: Sequence[int],
        num_gaussians: Sequence[int],
        num_layers: int,
        padding_value: float | None = None,
        eps: float = 1e-8,
        *,
        normalization: str = "stable",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("norm_axes", norm_axes), ("num_heads", num_heads), ("num_gaussians", num_gaussians)):
            if len(value) != num_layers:
                raise ValueError(
                    f"GaussianBlock: {name} has {len(value)} entries; Lengths of norm_axes, num_heads, and "
                    f"num_gaussians must match num_layers, {num_layers}"
                )
        self.layers = nn.ModuleList(
            self.layer_class(
                norm_axes[i], num_heads[i], num_gaussians[i], padding_value, eps, normalization=normalization,
                device=device, dtype=dtype,
            )
            for i in range(num_layers)
        )  # fmt: skip

    def forward(
        self, x: Tensor, return_attention_details: bool = False, *, mask: Tensor | None = None
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        """Run the layers.

        Args:
            x, return_attention_details, mask: as of ``GaussianAdaptiveAttention.forward``. Masked entries leave as
                they came.

        Returns:
            x of the same shape and dtype; with ``return_attention_details`` also the weights of each layer,
            detached, by the names "layer_0", "layer_1", ...
        """
        if not return_attention_details:
            for layer in self.layers:
                x = layer(x, mask=mask) + x
            return x
        details = {}
        for i, layer in enumerate(self.layers):
            out, details[f"layer_{i}"] = layer(x, True, mask=mask)
            x = out + x
        return x, details


def _weigh(
    module: Any, x: Tensor, offsets: Tensor, widths: Tensor, heads: int, mask: Tensor | None, details: bool
) -> Tensor | tuple[Tensor, Tensor]:
    wide = torch.promote_types(x.dtype, torch.float32)
    if offsets.dtype not in (wide, x.dtype):  # a module may be of any dtype, the op's parameters of these two
        offsets, widths = offsets.to(wide), widths.to(wide)
    done = gaussian_adaptive_attention(
        x, offsets, widths, dim=module.norm_axis, num_heads=heads, mask=mask, padding_value=module.padding_value,
        eps=module.eps, normalization=module.normalization, return_weights=details,
    )  # fmt: skip
    return (done[0], done[1].detach()) if details else done


def _check_input(name: str, x: Tensor, axis: int) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: x is {type(x).__name__}; it must be a torch.Tensor")
    dims = x.dim()
    if dims < 2:
        raise ValueError(f"{name}: x has shape {tuple(x.shape)}; it must have at least 2 dimensions")
    if not -dims <= axis < dims:
        raise ValueError(f"{name}: norm_axis is {axis}, out of bounds for x with {dims} dimensions")


def _check_arguments(name: str, norm_axis: int, num_heads: int, num_gaussians: int, normalization: str) -> None:
    if not isinstance(norm_axis, int):
        raise ValueError(f"{name}: norm_axis is {norm_axis!r}; norm_axis must be an integer")
    for argument, value in (("num_heads", num_heads), ("num_gaussians", num_gaussians)):
        if not isinstance(value, int) or value <= 0:
            raise ValueError(f"{name}: {argument} is {value!r}; {argument} must be a positive integer")
    if normalization not in NORMALIZATIONS:
        raise ValueError(f'{name}: normalization is {normalization!r}; it must be "stable" or "clamped"')


def _repr(module: Any) -> str:
    return (
        f"norm_axis={module.norm_axis}, num_heads={module.num_heads}, num_gaussians={module.num_gaussians}, "
        f"padding_value={module.padding_value}, eps={module.eps}, normalization={module.normalization!r}"
    )
