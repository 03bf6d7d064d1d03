"""``linear_scan``: arguments, checks, and the choice of a kernel."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from trifuse import reference
from trifuse.backends import Op
from trifuse.ops import _checks as check
from trifuse.registration import linear_scan as kernels

__all__ = ["linear_scan"]

REAL = {torch.complex64: torch.float32, torch.complex128: torch.float64}
DTYPES = (*check.SEQUENCE_DTYPES, *REAL)


class Call(NamedTuple):
    """A checked call: a and b are (B, D, T) views whatever the layout, a of the dtype of b or of its real
    part; the state is contiguous and of the accumulation dtype."""

    a: Tensor
    b: Tensor
    initial_state: Tensor | None
    cu_seqlens: Tensor | None
    reverse: bool
    bld: bool

    @property
    def device_type(self) -> str:
        return self.b.device.type

    def summary(self) -> str:
        batch, dim, seqlen = self.b.shape
        return (
            f"B={batch}, D={dim}, T={seqlen}, {check.dtype_name(self.b.dtype)}, "
            f"a {check.dtype_name(self.a.dtype)}, layout {'bld' if self.bld else 'bdl'}, {self.b.device}"
        )


def linear_scan(
    a: Tensor,
    b: Tensor,
    initial_state: Tensor | None = None,
    *,
    reverse: bool = False,
    cu_seqlens: Tensor | None = None,
    layout: str = "bdl",
    return_last_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """The linear recurrence ``h[t] = a[t] * h[t - 1] + b[t]``, element by element, real or complex.

    Nothing is assumed of ``a``: ``|a|`` may be 1 or more, and zero. Nothing is divided by it.

    Args:
        a: ``(B, D, T)``, or ``(B, T, D)`` with ``layout="bld"``, of the dtype of ``b``, or real beside complex
            ``b``. Where it does not vary its size may be 1; its gradient is then the sum over that axis.
        b: ``(B, D, T)`` (``(B, T, D)``): float32, float16, bfloat16, float64, complex64 or complex128. Any strides.
        initial_state: ``(B, D)``, or ``(S, D)`` with ``cu_seqlens``: the state before the first step, of the
            accumulation dtype (float32 for half precision, otherwise that of ``b``), of the dtype of ``b``, or
            real; zero if None. Differentiable.
        reverse: run time backwards: equal to flipping every sequence, scanning, and flipping back.
        cu_seqlens: ``(S + 1,)`` int32 or int64, the offsets of S sequences packed along the time of a
            batch of one. The state restarts at every boundary.
        layout: ``"bdl"`` or ``"bld"``, of a, b and h. Neither is copied into the other.
        return_last_state: also return the state after the last step.

    All tensor arguments are differentiable once; for second derivatives use
    ``with trifuse.backend("reference")``. ``h`` is kept for the backward pass, so it must not be changed in place
    before it. The dtypes are those of the arguments, also under autocast. On a CPU the state is carried in
    float64 whatever the dtype, so an error does not grow with the length where ``|a|`` is 1.

    Returns:
        ``h`` with the shape and dtype of ``b``; with ``return_last_state`` the pair ``(h, last_state)``,
        ``last_state`` ``(B, D)`` (``(S, D)`` when packed) in the accumulation dtype, differentiable.

    Raises:
        TypeError, ValueError: naming the argument, what it was and what it must be.
        BackendUnavailable: a backend was forced that cannot serve the call.
        RuntimeError: a second or a forward-mode derivative was asked of a native kernel.

    Source: Blelloch, "Prefix Sums and Their Applications", 1990, section 1.4.1; Martin and Cundy,
    "Parallelizing Linear Recurrent Neural Nets Over Sequence Length", 2018, section 2.
    """
    call = prepare(
        a, b, initial_state, reverse=reverse, cu_seqlens=cu_seqlens, layout=layout, return_last_state=return_last_state
    )
    name = SCAN.choose(call, call.device_type, call.b.numel())
    if name == "reference":
        h, last_state = reference.linear_scan(
            call.a, call.b, call.initial_state, cu_seqlens=call.cu_seqlens, reverse=call.reverse
        )
    else:
        h, last_state = kernels.scan(name, call)
    if call.bld:
        h = h.transpose(1, 2)
    return (h, last_state) if return_last_state else h


def prepare(
    a: Tensor,
    b: Tensor,
    initial_state: Tensor | None = None,
    *,
    reverse: bool = False,
    cu_seqlens: Tensor | None = None,
    layout: str = "bdl",
    return_last_state: bool = False,
) -> Call:
    """Check the arguments of ``linear_scan`` and bring them to one form, without copying a sequence."""
    op = "linear_scan"
    if layout not in ("bdl", "bld"):
        raise ValueError(f'{op}: layout is {layout!r}; it must be "bdl" or "bld"')
    bld = layout == "bld"
    check.tensors(op, a=a, b=b)
    check.tensors(op, optional=True, initial_state=initial_state, cu_seqlens=cu_seqlens)
    check.rank(op, "b", b, 3, "(B, T, D)" if bld else "(B, D, T)")
    check.dtype(op, "b", b, DTYPES)
    _check_factor(op, a, b)
    check.same_device(op, b, a=a, initial_state=initial_state, cu_seqlens=cu_seqlens)
    a = a.expand(b.shape)
    if bld:
        a, b = a.transpose(1, 2), b.transpose(1, 2)
    batch, dim, seqlen = b.shape

    rows = batch
    if cu_seqlens is not None:
        check.cu_seqlens(op, cu_seqlens, batch, seqlen)
        cu_seqlens = cu_seqlens.to(torch.int64).contiguous()
        rows = cu_seqlens.shape[0] - 1
    if initial_state is not None:
        check.shape(op, "initial_state", initial_state, (rows, dim), "(B, D)" if cu_seqlens is None else "(S, D)")
        acc = torch.promote_types(b.dtype, torch.float32)
        allowed = {acc, b.dtype, REAL.get(acc, acc)}
        if initial_state.dtype not in allowed:
            names = " or ".join(sorted(check.dtype_name(one) for one in allowed))
            was, beside = check.dtype_name(initial_state.dtype), check.dtype_name(b.dtype)
            raise TypeError(f"{op}: initial_state is {was}; beside {beside} sequences it must be {names}")
        initial_state = initial_state.to(acc).contiguous()
    return Call(a, b, initial_state, cu_seqlens, bool(reverse), bld)


def _check_factor(op: str, a: Tensor, b: Tensor) -> None:
    if a.dim() != 3 or any(size not in (1, full) for size, full in zip(a.shape, b.shape, strict=True)):
        was, expected = tuple(a.shape), tuple(b.shape)
        raise ValueError(f"{op}: a has shape {was}; it must have the shape of b, {expected}, or 1 in its place")
    if a.is_complex() and not b.is_complex():
        raise TypeError(f"{op}: a is complex and b is real; make b complex or a real")
    real = REAL.get(b.dtype, b.dtype)
    if a.dtype not in (b.dtype, real):
        names = " or ".join(dict.fromkeys((check.dtype_name(b.dtype), check.dtype_name(real))))
        raise TypeError(f"{op}: a is {check.dtype_name(a.dtype)}; it must be {names} like b")


SCAN = Op("linear_scan", prepare, {"cpu": ("cpp", "reference"), "cuda": ("cuda", "triton", "reference")})
SCAN.backend("reference", lambda call: [])
kernels.register_backends(SCAN)
