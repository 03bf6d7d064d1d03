"""``gaussian_adaptive_attention``: arguments, checks, and the choice of a kernel."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from trifuse import reference
from trifuse._library import values_are_known
from trifuse.backends import Op
from trifuse.ops import _checks as check
from trifuse.ops._slices import Slices, slices_along
from trifuse.registration import gaussian_adaptive_attention as kernels

__all__ = ["gaussian_adaptive_attention"]

NORMALIZATIONS = ("stable", "clamped")


class Call(NamedTuple):
    """A checked call: x and mask are (outer, axis, inner) views in the memory order of the caller's x, the parameters
    (num_heads, K), contiguous, of the accumulation dtype. `slices` leads back to the caller's shape."""

    x: Tensor
    mean_offset: Tensor
    width: Tensor
    mask: Tensor | None
    padding_value: float | None
    eps: float
    clamped: bool
    return_weights: bool
    slices: Slices

    @property
    def device_type(self) -> str:
        return self.x.device.type

    def summary(self) -> str:
        heads, gaussians = self.width.shape
        return (
            f"x {tuple(self.slices.shape)}, N={self.x.shape[1]}, heads={heads}, K={gaussians}, "
            f"{check.dtype_name(self.x.dtype)}, {'clamped' if self.clamped else 'stable'}, {self.x.device}"
        )


def gaussian_adaptive_attention(
    x: Tensor,
    mean_offset: Tensor,
    width: Tensor,
    *,
    dim: int = -1,
    num_heads: int = 1,
    mask: Tensor | None = None,
    padding_value: float | None = None,
    eps: float = 1e-8,
    normalization: str = "stable",
    return_weights: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """``x * w``, with ``w`` the normalised product of K Gaussians around the mean of each slice of ``x`` along ``dim``.

    In a head with mean ``m`` and unbiased variance plus ``eps`` ``v`` of its entries, ``w`` is proportional to
    ``exp(-sum_k (x - m - mean_offset_k)^2 / (2 v width_k^2))``. The product of K Gaussians is one Gaussian, so the
    cost does not depend on K.

    Args:
        x: ``(..., N, ...)`` of any rank from 1, N along ``dim``: float32, float16, bfloat16 or float64. Any strides:
            slices along any axis of dense memory, transposed or not, are read where they lie.
        mean_offset: ``(num_heads, K)``, or ``(K,)`` for all heads alike, in units of ``x``; of the accumulation dtype
            (float32; float64 beside float64) or of the dtype of ``x``.
        width: like ``mean_offset``, in standard deviations; not zero. Its sign does not matter.
        dim: the axis of the statistics and of the normalisation.
        num_heads: heads are consecutive pieces of ``dim``, of ``N // num_heads`` entries; the last takes the rest.
        mask: bool, broadcastable to ``x``, True where an entry takes part. Others count nowhere, whatever they hold,
            and get weight 0, output 0 and gradient 0.
        padding_value: as the published package does it: entries of this value count as zeros in mean and variance,
            have weights as they are, and are returned unchanged. Not together with ``mask``.
        eps: added to the variance; with ``normalization="clamped"`` also the least sum of the products.
        normalization: ``"stable"`` divides by the sum, whatever it is: weights sum to one. ``"clamped"`` is the
            published package: its products are divided by ``max(sum, eps)``, so that where the sum falls below
            ``eps`` the weights no longer sum to one.
        return_weights: also return the weights.

    A head with fewer than two entries that take part has the variance ``eps``: one entry gets weight 1 ("clamped": at
    most 1) and no gradient through the statistics, and where none takes part outputs and gradients are 0. All tensor
    arguments are differentiable once; for second derivatives use ``with trifuse.backend("reference")``. Kept for the
    backward pass are ``x`` and three numbers per slice and head. The dtypes are those of the arguments, also under
    autocast. Widths are looked at on a CPU only: on a GPU that would wait for the device.

    Returns:
        The output with the shape, dtype and memory order of ``x``; with ``return_weights`` the pair
        ``(out, weights)``, both alike.

    Raises:
        TypeError, ValueError: naming the argument, what it was and what it must be; the index of a width that is
            zero or not finite.
        BackendUnavailable: a backend was forced that cannot serve the call.
        RuntimeError: a second or a forward-mode derivative was asked of a native kernel.

    Source: Ioannides et al., "Gaussian Adaptive Attention is All You Need", 2024 (arXiv 2401.11143), equations 1 to 6.
    """
    call = prepare(
        x, mean_offset, width, dim=dim, num_heads=num_heads, mask=mask, padding_value=padding_value, eps=eps,
        normalization=normalization, return_weights=return_weights,
    )  # fmt: skip
    name = ATTENTION.choose(call, call.device_type, call.x.numel())
    if name == "reference":
        out, weights = reference.gaussian_adaptive_attention(
            call.x, call.mean_offset, call.width, dim=1, num_heads=num_heads, mask=call.mask,
            padding_value=call.padding_value, eps=call.eps, normalization=normalization,
        )  # fmt: skip
    else:
        out, weights = kernels.attend(name, call)
    out = call.slices.put_back(out)
    return (out, call.slices.put_back(weights)) if return_weights else out


def prepare(
    x: Tensor,
    mean_offset: Tensor,
    width: Tensor,
    *,
    dim: int = -1,
    num_heads: int = 1,
    mask: Tensor | None = None,
    padding_value: float | None = None,
    eps: float = 1e-8,
    normalization: str = "stable",
    return_weights: bool = False,
) -> Call:
    """Check the arguments of ``gaussian_adaptive_attention`` and bring them to one form, without copying ``x`` where
    it is dense."""
    op = "gaussian_adaptive_attention"
    check.tensors(op, x=x, mean_offset=mean_offset, width=width)
    check.tensors(op, optional=True, mask=mask)
    check.dtype(op, "x", x, check.SEQUENCE_DTYPES)
    if x.dim() == 0:
        raise ValueError(f"{op}: x has shape (); it must have at least one axis")
    _check_options(op, x, dim, num_heads, padding_value, eps, normalization)
    mean_offset = _parameter(op, "mean_offset", mean_offset, x, num_heads)
    width = _parameter(op, "width", width, x, num_heads)
    if mean_offset.shape[1] != width.shape[1]:
        had, wanted = mean_offset.shape[1], width.shape[1]
        raise ValueError(f"{op}: mean_offset has {had} Gaussians; it must have {wanted} like width")
    _check_widths(op, width)
    slices = slices_along(x, dim)
    if mask is not None:
        mask = _check_mask(op, mask, x, padding_value, slices)
    return Call(
        slices.take(x), mean_offset, width, mask, None if padding_value is None else float(padding_value), float(eps),
        normalization == "clamped", bool(return_weights), slices,
    )  # fmt: skip


def _check_options(op: str, x: Tensor, dim: int, num_heads: int, padding_value: float | None, eps: float,
                   normalization: str) -> None:  # fmt: skip
    if normalization not in NORMALIZATIONS:
        raise ValueError(f'{op}: normalization is {normalization!r}; it must be "stable" or "clamped"')
    if isinstance(dim, bool) or not isinstance(dim, int):
        raise TypeError(f"{op}: dim is {type(dim).__name__}; it must be an int")
    if not -x.dim() <= dim < x.dim():
        raise ValueError(f"{op}: dim is {dim}; beside x {tuple(x.shape)} it must be from {-x.dim()} to {x.dim() - 1}")
    if isinstance(num_heads, bool) or not isinstance(num_heads, int):
        raise TypeError(f"{op}: num_heads is {type(num_heads).__name__}; it must be an int")
    if num_heads < 1:
        raise ValueError(f"{op}: num_heads is {num_heads}; it must be at least 1")
    if num_heads > 1 and 0 < x.shape[dim] < num_heads:
        raise ValueError(
            f"{op}: num_heads is {num_heads}; it must be at most N = {x.shape[dim]}, the size of dim {dim}"
        )
    for name, value in (("eps", eps), ("padding_value", padding_value)):
        if value is None and name == "padding_value":
            continue
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            also = "" if name == "eps" else " or None"
            raise TypeError(f"{op}: {name} is {type(value).__name__}; it must be a float{also}")
    if not 0 < eps < math.inf:  # a traced number can be compared, but not asked whether it is finite
        raise ValueError(f"{op}: eps is {eps}; it must be positive and finite")


def _parameter(op: str, name: str, value: Tensor, x: Tensor, num_heads: int) -> Tensor:
    """mean_offset or width as (num_heads, K), contiguous, of the accumulation dtype."""
    acc = torch.promote_types(x.dtype, torch.float32)
    if value.dtype not in (acc, x.dtype):
        names = " or ".join(dict.fromkeys((check.dtype_name(acc), check.dtype_name(x.dtype))))
        was, beside = check.dtype_name(value.dtype), check.dtype_name(x.dtype)
        raise TypeError(f"{op}: {name} is {was}; beside {beside} x it must be {names}")
    if value.device != x.device:
        raise ValueError(f"{op}: {name} is on {value.device}; it must be on {x.device} like x")
    if value.dim() not in (1, 2) or value.shape[-1] == 0 or (value.dim() == 2 and value.shape[0] != num_heads):
        expected = f"(num_heads, K) = ({num_heads}, K) or (K,), K at least 1"
        raise ValueError(f"{op}: {name} has shape {tuple(value.shape)}; it must be {expected}")
    return value.to(acc).expand(num_heads, value.shape[-1]).contiguous()


def _check_widths(op: str, width: Tensor) -> None:
    # Only the host's copy is free to look at: on a device the look would stall every call.
    if width.device.type != "cpu" or not values_are_known(width):
        return
    values = width.tolist()
    if all(0.0 not in widths and math.isfinite(sum(widths)) for widths in values):
        return
    for head, widths in enumerate(values):
        for k, value in enumerate(widths):
            if value == 0 or not math.isfinite(value):
                raise ValueError(f"{op}: width[{head}, {k}] is {value}; it must be finite and not zero")


def _check_mask(op: str, mask: Tensor, x: Tensor, padding_value: float | None, slices: Slices) -> Tensor:
    if padding_value is not None:
        raise ValueError(f"{op}: mask and padding_value are both given; one of them says what takes part")
    if mask.dtype != torch.bool:
        raise TypeError(f"{op}: mask is {check.dtype_name(mask.dtype)}; it must be bool")
    if mask.device != x.device:
        raise ValueError(f"{op}: mask is on {mask.device}; it must be on {x.device} like x")
    sizes = zip(mask.shape[::-1], x.shape[::-1], strict=False)
    if mask.dim() > x.dim() or any(size not in (1, full) for size, full in sizes):
        raise ValueError(
            f"{op}: mask has shape {tuple(mask.shape)}; it must broadcast to the shape of x, {tuple(x.shape)}"
        )
    return slices.take(mask)


ATTENTION = Op(
    "gaussian_adaptive_attention", prepare, {"cpu": ("cpp", "reference"), "cuda": ("cuda", "triton", "reference")}
)
ATTENTION.backend("reference", lambda call: [])
kernels.register_backends(ATTENTION)
