"""SSD, alone and with the convolution, the norm and the projection around it."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

import trifuse

from .k_activations import swiglu
from .layernorm_gated import rmsnorm_fn

__all__ = [
    "mamba_chunk_scan",
    "mamba_chunk_scan_combined",
    "mamba_conv1d_scan_ref",
    "mamba_split_conv1d_scan_combined",
    "mamba_split_conv1d_scan_ref",
    "ssd_chunk_scan_combined_ref",
    "ssd_selective_scan",
]

NO_LIMIT = (0.0, math.inf)


def mamba_chunk_scan_combined(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = NO_LIMIT,
    return_final_states: bool = False,
    return_varlen_states: bool = False,
    state_dtype: torch.dtype | None = None,
):
    """``trifuse.ssd``.

    Args:
        x, dt, A, B, C, chunk_size, D, z, dt_bias, initial_states, seq_idx, dt_softplus, dt_limit: as of
            ``trifuse.ssd``.
        cu_seqlens: ``(S + 1,)``, read only with ``return_varlen_states``. What comes after its last offset is
            padding.
        return_final_states: also return the states after the last position, ``(B, H, P, N)``.
        return_varlen_states: also return the states after each of the S sequences, ``(S, H, P, N)``.
        state_dtype: of the returned states; float32 if None.

    Returns:
        out ``(B, L, H, P)``, then what was asked for, in this order.
    """
    kept = {"D": D, "z": z, "dt_bias": dt_bias, "dt_softplus": dt_softplus, "dt_limit": tuple(dt_limit)}
    if return_varlen_states:
        return _varlen(x, dt, A, B, C, chunk_size, initial_states, cu_seqlens, return_final_states, state_dtype, kept)
    out, states = trifuse.ssd(
        x, dt, A, B, C, chunk_size, initial_states=initial_states, seq_idx=seq_idx, return_final_states=True, **kept
    )
    return (out, states if state_dtype is None else states.to(state_dtype)) if return_final_states else out


def _varlen(x, dt, A, B, C, chunk_size, initial_states, cu_seqlens, return_final_states, state_dtype, kept):
    if cu_seqlens is None:
        raise ValueError("mamba_chunk_scan_combined: cu_seqlens is None; with return_varlen_states it must be offsets")
    count, length = cu_seqlens.shape[0] - 1, x.shape[1]
    offsets = cu_seqlens
    if offsets[-1] < length:  # the padding is one more sequence
        offsets = torch.cat((offsets, offsets.new_tensor([length])))
    if initial_states is not None:  # of the batch of one: they enter its first sequence
        rest = initial_states.new_zeros(offsets.shape[0] - 2, *initial_states.shape[1:])
        initial_states = torch.cat((initial_states, rest))
    out, states = trifuse.ssd(
        x, dt, A, B, C, chunk_size, initial_states=initial_states, cu_seqlens=offsets, return_final_states=True, **kept
    )
    states = states if state_dtype is None else states.to(state_dtype)
    return (out, states[-1:], states[:count]) if return_final_states else (out, states[:count])


def mamba_chunk_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
) -> Tensor:
    """``trifuse.ssd``."""
    return trifuse.ssd(x, dt, A, B, C, chunk_size, D=D, z=z, dt_bias=dt_bias, dt_softplus=dt_softplus)


def ssd_chunk_scan_combined_ref(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
) -> Tensor:
    """``mamba_chunk_scan`` on the reference backend."""
    with trifuse.backend("reference"):
        return mamba_chunk_scan(x, dt, A, B, C, chunk_size, D, z, dt_bias, dt_softplus)


def ssd_selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = NO_LIMIT,
) -> Tensor:
    """SSD as a selective scan, which has a step and a decay per channel.

    Args:
        x, z: ``(B, L, H, P)``; B, C: ``(B, L, G, N)``; D: ``(H,)`` or ``(H, P)``.
        dt: ``(B, L, H)`` or ``(B, L, H, P)``; dt_bias: ``(H,)`` or ``(H, P)``.
        A: ``(H,)`` or ``(H * P, N)``.

    Returns:
        ``(B, L, H, P)``.
    """
    heads, headdim, dstate = *x.shape[2:], B.shape[-1]

    def channels(weight: Tensor | None) -> Tensor | None:
        return None if weight is None else weight.reshape(heads, -1).expand(heads, headdim).flatten()

    dt = (dt[..., None] if dt.dim() == 3 else dt).expand(x.shape).flatten(2)
    dt_bias = channels(dt_bias)
    if tuple(dt_limit) != NO_LIMIT:  # the scan knows no limit
        dt = dt if dt_bias is None else dt + dt_bias
        dt = (F.softplus(dt) if dt_softplus else dt).clamp(*dt_limit)
        dt_bias, dt_softplus = None, False
    A = A[:, None].expand(heads, headdim).reshape(-1, 1).expand(-1, dstate) if A.dim() == 1 else A
    out = trifuse.selective_scan(
        x.flatten(2), dt.to(x.dtype), A, B, C, channels(D), None if z is None else z.flatten(2), dt_bias, dt_softplus,
        layout="bld",
    )  # fmt: skip
    return out.unflatten(-1, (heads, headdim))


def mamba_conv1d_scan_ref(
    xBC: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    dt: Tensor,
    A: Tensor,
    chunk_size: int,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = NO_LIMIT,
    activation: str | None = "silu",
    headdim: int | None = None,
    ngroups: int = 1,
) -> Tensor:
    """The convolution of ``(B, L, H P + 2 G N)`` and the selective scan of it, on the reference backend."""
    heads = dt.shape[2]
    if D is not None and D.dim() == 2:
        headdim = D.shape[1]
    dim = heads * headdim if z is None else z.shape[-1]
    with trifuse.backend("reference"):
        x, B, C = _convolved(xBC, conv1d_weight, conv1d_bias, None, activation, dim, heads, ngroups)
        z = None if z is None else z.unflatten(-1, (heads, -1))
        return ssd_selective_scan(x, dt.to(x.dtype), A, B, C, D, z, dt_bias, dt_softplus, dt_limit).flatten(2)


def mamba_split_conv1d_scan_combined(
    zxbcdt: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    chunk_size: int,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    dt_limit: tuple[float, float] = NO_LIMIT,
    return_final_states: bool = False,
    activation: str | None = "silu",
    rmsnorm_weight: Tensor | None = None,
    rmsnorm_eps: float = 1e-6,
    outproj_weight: Tensor | None = None,
    outproj_bias: Tensor | None = None,
    headdim: int | None = None,
    ngroups: int = 1,
    norm_before_gate: bool = True,
    state_dtype: torch.dtype | None = None,
):
    """The Mamba-2 block between its projected input and its output.

    It reads weights: an adapter on the convolution or the projection has no effect here. ``trifuse.nn.Mamba2`` and
    the mixers that ``trifuse.integrations.install`` puts into transformers call their submodules instead.

    Args:
        zxbcdt: ``(B, L, 2 E + 2 H P + 2 G N + H)``: E channels of a gated unit and its gate (often none), then the
            gate, the input of the convolution and the steps.
        conv1d_weight: ``(H P + 2 G N, W)``; conv1d_bias: ``(H P + 2 G N,)`` or None.
        dt_bias, A: ``(H,)``; D: ``(H,)``, with ``headdim``, or ``(H, P)``.
        chunk_size, initial_states, seq_idx, dt_limit: as of ``trifuse.ssd``.
        return_final_states: also return the states after the last position, ``(B, H, P, N)``.
        activation: of the convolution: "silu", "swish" or None.
        rmsnorm_weight: ``(H P,)``, of a gated RMS norm in G groups; without it the gate is the scan's.
        norm_before_gate: whether that norm is taken before the gate.
        outproj_weight: ``(F, E + H P)``; outproj_bias: ``(F,)``; None: no projection.
        state_dtype: of the returned states; float32 if None.

    Returns:
        ``(B, L, F)``, or ``(B, L, E + H P)`` without a projection; with the states, if asked for.
    """
    if D.dim() == 1 and headdim is None:
        raise ValueError("mamba_split_conv1d_scan_combined: headdim is None; with a D of one dimension it must be P")
    heads = D.shape[0]
    dim = heads * (headdim if D.dim() == 1 else D.shape[1])
    conv_dim = conv1d_weight.shape[0]
    unit, z, xBC, dt = zxbcdt.split([zxbcdt.shape[-1] - dim - conv_dim - heads, dim, conv_dim, heads], dim=-1)
    x, B, C = _convolved(xBC, conv1d_weight, conv1d_bias, seq_idx, activation, dim, heads, ngroups)
    gate = z.unflatten(-1, (heads, -1)) if rmsnorm_weight is None else None
    out, states = mamba_chunk_scan_combined(
        x, dt, A, B, C, chunk_size, D, gate, dt_bias, initial_states, seq_idx, dt_softplus=True, dt_limit=dt_limit,
        return_final_states=True, state_dtype=state_dtype,
    )  # fmt: skip
    out = out.flatten(2)
    if rmsnorm_weight is not None:
        out = rmsnorm_fn(out, rmsnorm_weight, None, z, rmsnorm_eps, dim // ngroups, norm_before_gate)
    if unit.shape[-1]:
        out = torch.cat((swiglu(unit), out), dim=-1)
    if outproj_weight is not None:
        out = F.linear(out, outproj_weight, outproj_bias)
    return (out, states) if return_final_states else out


def mamba_split_conv1d_scan_ref(
    zxbcdt: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    chunk_size: int,
    dt_limit: tuple[float, float] = NO_LIMIT,
    activation: str | None = "silu",
    rmsnorm_weight: Tensor | None = None,
    rmsnorm_eps: float = 1e-6,
    outproj_weight: Tensor | None = None,
    outproj_bias: Tensor | None = None,
    headdim: int | None = None,
    ngroups: int = 1,
    norm_before_gate: bool = True,
) -> Tensor:
    """``mamba_split_conv1d_scan_combined`` on the reference backend."""
    with trifuse.backend("reference"):
        return mamba_split_conv1d_scan_combined(
            zxbcdt, conv1d_weight, conv1d_bias, dt_bias, A, D, chunk_size, dt_limit=dt_limit, activation=activation,
            rmsnorm_weight=rmsnorm_weight, rmsnorm_eps=rmsnorm_eps, outproj_weight=outproj_weight,
            outproj_bias=outproj_bias, headdim=headdim, ngroups=ngroups, norm_before_gate=norm_before_gate,
        )  # fmt: skip


def _convolved(
    xBC: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    seq_idx: Tensor | None,
    activation: str | None,
    dim: int,
    heads: int,
    groups: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """x (B, L, H, P), B and C (B, L, G, N), convolved."""
    xBC = trifuse.causal_conv1d(xBC, weight, bias, seq_idx=seq_idx, activation=activation, layout="bld")
    dstate = (xBC.shape[-1] - dim) // (2 * groups)
    x, B, C = xBC.split([dim, groups * dstate, groups * dstate], dim=-1)
    return x.unflatten(-1, (heads, -1)), B.unflatten(-1, (groups, -1)), C.unflatten(-1, (groups, -1))
