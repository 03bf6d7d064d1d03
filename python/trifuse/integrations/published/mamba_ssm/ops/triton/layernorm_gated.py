"""Layer norm and RMS norm with a gate and groups, in float32, as plain torch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trifuse.nn import RMSNormGated as RMSNorm

__all__ = ["LayerNorm", "RMSNorm", "layernorm_fn", "rms_norm_ref", "rmsnorm_fn"]


def layernorm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    z: Tensor | None = None,
    eps: float = 1e-6,
    group_size: int | None = None,
    norm_before_gate: bool = True,
    is_rms_norm: bool = False,
) -> Tensor:
    """``norm(x) * silu(z)``, or ``norm(x * silu(z))`` with ``norm_before_gate=False``.

    Args:
        x: ``(..., D)``; z: the gate, shape of x, or None.
        weight: ``(D,)``; bias: ``(D,)`` or None.
        group_size: normalize each group of so many channels by itself; None: all D.
        is_rms_norm: do not subtract the mean.

    Returns:
        ``(..., D)`` in x's dtype; computed in float32 (float64 for float64).
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    y = x.to(wide)
    if z is not None and not norm_before_gate:
        y = y * F.silu(z.to(wide))
    groups = y.unflatten(-1, (-1, group_size or x.shape[-1]))
    size = groups.shape[-1:]
    normed = F.rms_norm(groups, size, eps=eps) if is_rms_norm else F.layer_norm(groups, size, eps=eps)
    y = normed.flatten(-2) * weight.to(wide)
    if bias is not None:
        y = y + bias.to(wide)
    if z is not None and norm_before_gate:
        y = y * F.silu(z.to(wide))
    return y.to(x.dtype)


def rmsnorm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    z: Tensor | None = None,
    eps: float = 1e-6,
    group_size: int | None = None,
    norm_before_gate: bool = True,
) -> Tensor:
    """``layernorm_fn`` without the mean."""
    return layernorm_fn(x, weight, bias, z, eps, group_size, norm_before_gate, is_rms_norm=True)


def rms_norm_ref(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    z: Tensor | None = None,
    eps: float = 1e-6,
    group_size: int | None = None,
    norm_before_gate: bool = True,
    upcast: bool = True,
) -> Tensor:
    """``rmsnorm_fn`` from its formula, in float32, or in the dtypes as they come with ``upcast=False``."""
    dtype = x.dtype
    if upcast:
        x, weight = x.float(), weight.float()
        z, bias = (None if tensor is None else tensor.float() for tensor in (z, bias))
    if z is not None and not norm_before_gate:
        x = x * F.silu(z)
    groups = x.unflatten(-1, (-1, group_size or x.shape[-1]))
    y = (groups / torch.sqrt(groups.square().mean(-1, keepdim=True) + eps)).flatten(-2) * weight
    if bias is not None:
        y = y + bias
    if z is not None and norm_before_gate:
        y = y * F.silu(z)
    return y.to(dtype)


class LayerNorm(nn.Module):
    """Layer norm with a gate: ``forward(x, z=None)``; arguments as of ``layernorm_fn``."""

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-5,
        group_size: int | None = None,
        norm_before_gate: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.eps = eps
        self.group_size = group_size
        self.norm_before_gate = norm_before_gate
        self.weight = nn.Parameter(torch.empty(hidden_size, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(hidden_size, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor, z: Tensor | None = None) -> Tensor:
        return layernorm_fn(x, self.weight, self.bias, z, self.eps, self.group_size, self.norm_before_gate)
