"""The selective scan, and the Mamba block as one function of its weights."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

import trifuse

from .triton.layer_norm import rms_norm_fn

__all__ = ["mamba_inner_fn", "mamba_inner_ref", "rms_norm_forward", "selective_scan_fn", "selective_scan_ref"]


def selective_scan_fn(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """``trifuse.selective_scan`` of ``(B, D, L)``. The last state is differentiable here."""
    return trifuse.selective_scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, return_last_state)


def selective_scan_ref(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """``selective_scan_fn`` on the reference backend."""
    with trifuse.backend("reference"):
        return selective_scan_fn(u, delta, A, B, C, D, z, delta_bias, delta_softplus, return_last_state)


def rms_norm_forward(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float = 1e-6) -> Tensor:
    """RMS norm over the last dimension."""
    return rms_norm_fn(x, weight, bias, eps=eps)


def mamba_inner_fn(
    xz: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    x_proj_weight: Tensor,
    delta_proj_weight: Tensor,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    A: Tensor,
    B: Tensor | None = None,
    C: Tensor | None = None,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    B_proj_bias: Tensor | None = None,
    C_proj_bias: Tensor | None = None,
    delta_softplus: bool = True,
    checkpoint_lvl: int = 1,
    b_rms_weight: Tensor | None = None,
    c_rms_weight: Tensor | None = None,
    dt_rms_weight: Tensor | None = None,
    b_c_dt_rms_eps: float = 1e-6,
) -> Tensor:
    """The Mamba block between its projected input and its output.

    It reads weights: an adapter on one of the projections has no effect here. ``trifuse.nn.Mamba`` and the mixers
    that ``trifuse.integrations.install`` puts into transformers call their submodules instead.

    Args:
        xz: ``(B, 2 D, L)``, input of the convolution and gate.
        conv1d_weight: ``(D, 1, W)``; conv1d_bias: ``(D,)`` or None.
        x_proj_weight: ``(R + N + N, D)``, less N where B or C is given, twice N where A is complex.
        delta_proj_weight: ``(D, R)``; delta_bias: ``(D,)`` or None.
        out_proj_weight: ``(E, D)``; out_proj_bias: ``(E,)`` or None.
        A: ``(D, N)``, real or complex; D: ``(D,)`` or None.
        B, C: constant ``(D, N)``, or sequences ``(B, N, L)`` or ``(B, G, N, L)``; None takes them from x_proj.
        B_proj_bias, C_proj_bias: added to the projected B and C.
        checkpoint_lvl: accepted; what the backward recomputes is decided by each op.
        b_rms_weight, c_rms_weight, dt_rms_weight: RMS norms of B, C (over N) and of delta (over D), with
            ``b_c_dt_rms_eps``.

    Returns:
        ``(B, L, E)``.
    """
    if torch.is_autocast_enabled(xz.device.type):
        half = torch.get_autocast_dtype(xz.device.type)
        x_proj_weight, delta_proj_weight = x_proj_weight.to(half), delta_proj_weight.to(half)
    x, z = xz.transpose(1, 2).chunk(2, dim=-1)  # (B, L, D)
    x = trifuse.causal_conv1d(x, conv1d_weight.squeeze(1), conv1d_bias, activation="silu", layout="bld")

    rank = delta_proj_weight.shape[1]
    width = A.shape[1] * (2 if A.is_complex() else 1)
    projected = F.linear(x, x_proj_weight)
    delta = F.linear(projected[..., :rank], delta_proj_weight)
    B = _sequence(B, projected[..., rank : rank + width], B_proj_bias, A, b_rms_weight, b_c_dt_rms_eps)
    C = _sequence(C, projected[..., -width:], C_proj_bias, A, c_rms_weight, b_c_dt_rms_eps)
    if dt_rms_weight is not None:
        delta = rms_norm_forward(delta, dt_rms_weight, None, b_c_dt_rms_eps)
    delta = delta.to(x.dtype)
    y = trifuse.selective_scan(x, delta, A, B, C, D, z.to(x.dtype), delta_bias, delta_softplus, layout="bld")
    return F.linear(y, out_proj_weight, out_proj_bias)


def mamba_inner_ref(
    xz: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    x_proj_weight: Tensor,
    delta_proj_weight: Tensor,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    A: Tensor,
    B: Tensor | None = None,
    C: Tensor | None = None,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    B_proj_bias: Tensor | None = None,
    C_proj_bias: Tensor | None = None,
    delta_softplus: bool = True,
) -> Tensor:
    """``mamba_inner_fn``. It calls the kernels too, as the published one does: it checks how they are put together."""
    return mamba_inner_fn(
        xz, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight, out_proj_weight, out_proj_bias,
        A, B, C, D, delta_bias, B_proj_bias, C_proj_bias, delta_softplus,
    )  # fmt: skip


def _sequence(
    given: Tensor | None, projected: Tensor, bias: Tensor | None, A: Tensor, norm: Tensor | None, eps: float
) -> Tensor:
    """B or C for the layout "bld": constant as given, or (B, L, N)."""
    if given is not None:
        if given.dim() == 2:
            return given
        if A.is_complex() and not given.is_complex():
            given = torch.view_as_complex(given.float().unflatten(-1, (-1, 2)).contiguous())
        return given.movedim(-1, 1)
    if bias is not None:
        projected = projected + bias.to(projected.dtype)
    if A.is_complex():
        return torch.view_as_complex(projected.float().unflatten(-1, (-1, 2)).contiguous())
    return projected if norm is None else rms_norm_forward(projected, norm, None, eps)
