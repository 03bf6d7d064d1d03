"""``selective_scan``: arguments, checks, and the choice of a kernel."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from trifuse import reference
from trifuse.backends import Op
from trifuse.ops import _checks as check
from trifuse.ops._checks import SEQUENCE_DTYPES
from trifuse.registration import selective_scan as kernels

__all__ = ["selective_scan"]


class Call(NamedTuple):
    """A checked call. Sequences are (B, D, L) views whatever the layout; B and C are (D, N) or
    (B, G, N, L); weights and states are contiguous and of the accumulation dtype."""

    u: Tensor
    delta: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None
    z: Tensor | None
    delta_bias: Tensor | None
    initial_state: Tensor | None
    cu_seqlens: Tensor | None
    delta_softplus: bool
    reverse: bool
    bld: bool
    deterministic: bool

    @property
    def device_type(self) -> str:
        return self.u.device.type

    def summary(self) -> str:
        batch, dim, seqlen = self.u.shape
        return (
            f"B={batch}, D={dim}, L={seqlen}, N={self.A.shape[1]}, {check.dtype_name(self.u.dtype)}, "
            f"A {check.dtype_name(self.A.dtype)}, layout {'bld' if self.bld else 'bdl'}, {self.u.device}"
        )


def selective_scan(
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
    *,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    reverse: bool = False,
    layout: str = "bdl",
    deterministic: bool | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """The selective scan of Mamba (S6): a linear recurrence whose step size depends on the input.

    With ``dt = softplus(delta + delta_bias)`` (softplus only if asked for), per channel d and state n::

        h[l] = exp(dt[l] * A[d, n]) * h[l - 1] + dt[l] * B[n, l] * u[l]
        out[l] = (sum_n C[n, l] * h[l] + D[d] * u[l]) * silu(z[l])

    Args:
        u: ``(B, D, L)``, or ``(B, L, D)`` with ``layout="bld"``; float32, float16, bfloat16 or float64.
            Any strides. The sequence dtype: delta, z and variable B, C share it.
        delta: step sizes, shape of ``u``.
        A: ``(D, N)``, real, or complex (the output is then twice the real part of the sum).
        B, C: input and output projections of the state: constant ``(D, N)``, or variable
            ``(B, N, L)`` or ``(B, G, N, L)`` with G dividing D (``"bld"``: ``(B, L, N)``,
            ``(B, L, G, N)``); channel d reads group ``d // (D / G)``. With complex A they may be
            complex, or real; real ``(..., 2 L)`` in layout "bdl" is read as interleaved complex.
        D: ``(D,)`` skip weights, or None.
        z: gate, shape of ``u``, or None.
        delta_bias: ``(D,)``, added to ``delta`` before the softplus, or None.
        delta_softplus: pass ``delta + delta_bias`` through softplus.
        return_last_state: also return the state after the last step.
        initial_state: ``(B, D, N)``, or ``(S, D, N)`` with ``cu_seqlens``; zero if None. Differentiable.
        cu_seqlens: ``(S + 1,)`` int32 or int64, the offsets of S sequences packed along the time of a
            batch of one. The state restarts at every boundary.
        reverse: run time backwards: equal to flipping every sequence, scanning, and flipping back.
        layout: ``"bdl"`` or ``"bld"``, of u, delta, z, B, C and the output. Neither is copied into the other.
        deterministic: bitwise repeatable gradients. None follows
            ``torch.are_deterministic_algorithms_enabled()``.

    A, D, delta_bias, constant B, C and the states are computed in float32 (float64 with float64 ``u``),
    also under autocast. All tensor arguments are differentiable once; for second derivatives use
    ``with trifuse.backend("reference")``.

    Returns:
        ``out`` with the shape and dtype of ``u``; with ``return_last_state`` the pair
        ``(out, last_state)``, ``last_state`` ``(B, D, N)`` (``(S, D, N)`` when packed), differentiable.

    Raises:
        TypeError, ValueError: naming the argument, what it was and what it must be.
        BackendUnavailable: a backend was forced that cannot serve the call.
        RuntimeError: a second or a forward-mode derivative was asked of a native kernel.

    Source: Gu and Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces", 2023,
    equation 2 and algorithm 2.
    """
    call = prepare(
        u, delta, A, B, C, D, z, delta_bias, delta_softplus, return_last_state,
        initial_state=initial_state, cu_seqlens=cu_seqlens, reverse=reverse, layout=layout,
        deterministic=deterministic,
    )  # fmt: skip
    name = SCAN.choose(call, call.device_type, call.u.numel())
    if name == "reference":
        out, last_state = reference.selective_scan(
            call.u, call.delta, call.A, call.B, call.C, call.D, call.z, call.delta_bias, call.delta_softplus,
            initial_state=call.initial_state, cu_seqlens=call.cu_seqlens, reverse=call.reverse,
        )  # fmt: skip
    else:
        out, last_state = kernels.scan(name, call)
    if call.bld:
        out = out.transpose(1, 2)
    return (out, last_state) if return_last_state else out


def prepare(
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
    *,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    reverse: bool = False,
    layout: str = "bdl",
    deterministic: bool | None = None,
) -> Call:
    """Check the arguments of ``selective_scan`` and bring them to one form, without copying a sequence."""
    op = "selective_scan"
    if layout not in ("bdl", "bld"):
        raise ValueError(f'{op}: layout is {layout!r}; it must be "bdl" or "bld"')
    bld = layout == "bld"
    check.tensors(op, u=u, delta=delta, A=A, B=B, C=C)
    check.tensors(
        op, optional=True, D=D, z=z, delta_bias=delta_bias, initial_state=initial_state, cu_seqlens=cu_seqlens
    )
    shape = "(B, L, D)" if bld else "(B, D, L)"
    check.rank(op, "u", u, 3, shape)

    u, delta, z, B, C = _autocast(u, delta, z, B, C, A)
    check.dtype(op, "u", u, SEQUENCE_DTYPES)
    real = torch.float64 if u.dtype == torch.float64 else torch.float32
    acc = (torch.complex128 if real == torch.float64 else torch.complex64) if A.is_complex() else real

    for name, tensor in (("delta", delta), ("z", z)):
        if tensor is not None:
            check.same_shape(op, name, tensor, "u", u)
            check.same_dtype(op, name, tensor, "u", u)
    if bld:
        u, delta = u.transpose(1, 2), delta.transpose(1, 2)
        z = None if z is None else z.transpose(1, 2)
    batch, dim, seqlen = u.shape

    check.rank(op, "A", A, 2, "(D, N)")
    if A.shape[0] != dim:
        raise ValueError(f"{op}: A has shape {tuple(A.shape)}; its first size must be D = {dim}")
    check.weight_dtype(op, "A", A, u, complex_too=True)
    dstate = A.shape[1]

    B = _coefficient(op, "B", B, u, A, bld)
    C = _coefficient(op, "C", C, u, A, bld)
    for name, tensor in (("D", D), ("delta_bias", delta_bias)):
        if tensor is not None:
            check.shape(op, name, tensor, (dim,), "(D,)")
            check.weight_dtype(op, name, tensor, u)
    check.same_device(op, u, delta=delta, A=A, B=B, C=C, D=D, z=z, delta_bias=delta_bias, initial_state=initial_state,
                      cu_seqlens=cu_seqlens)  # fmt: skip

    rows = batch
    if cu_seqlens is not None:
        check.cu_seqlens(op, cu_seqlens, batch, seqlen)
        cu_seqlens = cu_seqlens.to(torch.int64).contiguous()
        rows = cu_seqlens.shape[0] - 1
    if initial_state is not None:
        check.shape(op, "initial_state", initial_state, (rows, dim, dstate),
                    "(B, D, N)" if cu_seqlens is None else "(S, D, N)")  # fmt: skip
        check.weight_dtype(op, "initial_state", initial_state, u, complex_too=A.is_complex())

    if deterministic is None:
        deterministic = torch.are_deterministic_algorithms_enabled()

    def weight(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        return None if tensor is None else tensor.to(dtype).contiguous()

    return Call(
        u, delta, weight(A, acc), B, C, weight(D, real), z, weight(delta_bias, real), weight(initial_state, acc),
        cu_seqlens, bool(delta_softplus), bool(reverse), bld, bool(deterministic),
    )  # fmt: skip


def _autocast(u, delta, z, B, C, A):
    """Under autocast, sequences follow the autocast dtype, as the products before them do."""
    device = u.device.type
    if u.dtype == torch.float64 or not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return u, delta, z, B, C
    dtype = torch.get_autocast_dtype(device)

    def cast(tensor: Tensor | None, variable: bool = True) -> Tensor | None:
        if tensor is None or not variable or not tensor.is_floating_point() or tensor.dtype == torch.float64:
            return tensor
        return tensor.to(dtype)

    variable_B, variable_C = B.dim() > 2 and not A.is_complex(), C.dim() > 2 and not A.is_complex()
    return cast(u), cast(delta), cast(z), cast(B, variable_B), cast(C, variable_C)


def _coefficient(op: str, name: str, coef: Tensor, u: Tensor, A: Tensor, bld: bool) -> Tensor:
    """B or C as (D, N) contiguous in the accumulation dtype, or as a (B, G, N, L) view."""
    batch, dim, seqlen = u.shape
    dstate = A.shape[1]
    real = torch.float64 if u.dtype == torch.float64 else torch.float32
    acc = (torch.complex128 if real == torch.float64 else torch.complex64) if A.is_complex() else real
    if coef.is_complex() and not A.is_complex():
        raise TypeError(f"{op}: {name} is complex and A is real; make A complex or {name} real")

    if coef.dim() == 2:
        check.shape(op, name, coef, (dim, dstate), "(D, N)")
        check.weight_dtype(op, name, coef, u, complex_too=A.is_complex())
        return coef.to(acc).contiguous()
    forms = "(B, L, N) or (B, L, G, N)" if bld else "(B, N, L) or (B, G, N, L)"
    if coef.dim() not in (3, 4):
        raise ValueError(f"{op}: {name} has shape {tuple(coef.shape)}; it must be (D, N), {forms}")
    if bld:
        coef = coef.transpose(1, 2).unsqueeze(1) if coef.dim() == 3 else coef.permute(0, 2, 3, 1)
    elif coef.dim() == 3:
        coef = coef.unsqueeze(1)
    if A.is_complex() and not coef.is_complex():
        check.dtype(op, name, coef, SEQUENCE_DTYPES)
        if not bld and seqlen > 0 and coef.shape[3] == 2 * seqlen:
            coef = torch.view_as_complex(coef.to(real).contiguous().unflatten(-1, (seqlen, 2)))
    groups = coef.shape[1]
    if (coef.shape[0], coef.shape[2], coef.shape[3]) != (batch, dstate, seqlen):
        raise ValueError(
            f"{op}: {name} has batch {coef.shape[0]}, state size {coef.shape[2]} and length {coef.shape[3]}; "
            f"they must be B = {batch}, N = {dstate} and L = {seqlen} in the form {forms}"
        )
    if groups == 0 or dim % groups:
        raise ValueError(f"{op}: {name} has {groups} groups, which does not divide D = {dim}")
    if A.is_complex():
        return coef.to(acc)
    check.same_dtype(op, name, coef, "u", u)
    return coef


SCAN = Op("selective_scan", prepare, {"cpu": ("cpp", "reference"), "cuda": ("cuda", "triton", "reference")})
SCAN.backend("reference", lambda call: [])
kernels.register_backends(SCAN)
