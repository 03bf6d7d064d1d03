"""``ssd``: arguments, checks, and the choice of a kernel."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from trifuse import reference
from trifuse.backends import Op
from trifuse.ops import _checks as check
from trifuse.ops._checks import SEQUENCE_DTYPES
from trifuse.registration import ssd as kernels

__all__ = ["ssd"]


class Call(NamedTuple):
    """A checked call. Sequences keep their strides; weights, states, ``seq_idx`` (int32) and ``cu_seqlens``
    (int64) are contiguous; ``chunk_size`` is 0 where the backend chooses."""

    x: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None
    z: Tensor | None
    dt_bias: Tensor | None
    initial_states: Tensor | None
    seq_idx: Tensor | None
    cu_seqlens: Tensor | None
    dt_softplus: bool
    dt_min: float
    dt_max: float
    deterministic: bool
    return_final: bool
    chunk_size: int

    @property
    def device_type(self) -> str:
        return self.x.device.type

    def summary(self) -> str:
        batch, seqlen, heads, headdim = self.x.shape
        return (
            f"B={batch}, L={seqlen}, H={heads}, P={headdim}, G={self.B.shape[2]}, N={self.B.shape[3]}, "
            f"{check.dtype_name(self.x.dtype)}, {self.x.device}"
        )


def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int | None = None,
    *,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    return_final_states: bool = False,
    deterministic: bool | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """The state-space dual of Mamba-2 (SSD): a linear recurrence with one decay per head and step of time.

    With ``step = clamp(softplus(dt + dt_bias), *dt_limit)`` (softplus only if asked for), per head h with its
    group g, channel p and state n::

        state[l] = exp(step[l, h] * A[h]) * state[l - 1] + step[l, h] * B[l, g, n] * x[l, h, p]
        out[l] = (sum_n C[l, g, n] * state[l] + D * x[l, h, p]) * silu(z[l, h, p])

    Args:
        x: ``(B, L, H, P)``; float32, float16, bfloat16 or float64. Any strides.
        dt: step sizes ``(B, L, H)``, dtype of ``x`` or float32.
        A: ``(H,)`` decay rates, usually negative.
        B, C: ``(B, L, G, N)`` in the dtype of ``x``, G dividing H; head h reads group ``h // (H / G)``.
        chunk_size: positions that are computed as one matrix product. It changes rounding and speed only;
            None lets the backend choose, and a backend may take the nearest size that it serves.
        D: ``(H,)`` or ``(H, P)`` skip weights, or None.
        z: gate, shape and dtype of ``x``, or None.
        dt_bias: ``(H,)``, added to ``dt`` before the softplus, or None.
        dt_softplus: pass ``dt + dt_bias`` through softplus.
        dt_limit: the smallest and the largest step; beyond them no gradient reaches ``dt``.
        initial_states: ``(B, H, P, N)``, or ``(S, H, P, N)`` with ``cu_seqlens``; zero if None. Differentiable.
        seq_idx: ``(B, L)`` int32, or int64 of values that fit into int32. The state restarts from zero wherever it
            changes; ``initial_states`` enter the first run of equal values (of each packed sequence), final states
            are those after the last.
        cu_seqlens: ``(S + 1,)`` int32 or int64, the offsets of S sequences packed along the time of a batch of
            one. The state restarts, from ``initial_states[s]`` if given, at every offset.
        return_final_states: also return the states after the last step.
        deterministic: bitwise repeatable gradients. None follows ``torch.are_deterministic_algorithms_enabled()``.

    A, D, dt_bias and the states are computed in float32 (float64 with float64 ``x``), also under autocast. All
    floating arguments are differentiable once; for second derivatives use ``with trifuse.backend("reference")``.
    One token at a time, ``selective_state_update`` with heads continues from ``final_states``.

    Returns:
        ``out`` with the shape and dtype of ``x``; with ``return_final_states`` the pair ``(out, final_states)``,
        ``final_states`` ``(B, H, P, N)`` (``(S, H, P, N)`` when packed), float32 or float64, differentiable.

    Raises:
        TypeError, ValueError: naming the argument, what it was and what it must be.
        BackendUnavailable: a backend was forced that cannot serve the call.
        RuntimeError: a second or a forward-mode derivative was asked of a native kernel.

    Source: Dao and Gu, "Transformers are SSMs: Generalized Models and Efficient Algorithms Through Structured
    State Space Duality", 2024, equation 1 and section 6.
    """
    call = prepare(
        x, dt, A, B, C, chunk_size, D=D, z=z, dt_bias=dt_bias, dt_softplus=dt_softplus, dt_limit=dt_limit,
        initial_states=initial_states, seq_idx=seq_idx, cu_seqlens=cu_seqlens,
        return_final_states=return_final_states, deterministic=deterministic,
    )  # fmt: skip
    name = SSD.choose(call, call.device_type, call.x.numel())
    if name == "reference":
        out, final_states = reference.ssd(
            call.x, call.dt, call.A, call.B, call.C, D=call.D, z=call.z, dt_bias=call.dt_bias,
            dt_softplus=call.dt_softplus, dt_limit=(call.dt_min, call.dt_max), initial_states=call.initial_states,
            seq_idx=call.seq_idx, cu_seqlens=call.cu_seqlens,
        )  # fmt: skip
    else:
        out, final_states = kernels.ssd(name, call)
    return (out, final_states) if return_final_states else out


def prepare(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int | None = None,
    *,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    return_final_states: bool = False,
    deterministic: bool | None = None,
) -> Call:
    """Check the arguments of ``ssd`` and bring them to one form, without copying a sequence."""
    op = "ssd"
    check.tensors(op, x=x, dt=dt, A=A, B=B, C=C)
    check.tensors(op, optional=True, D=D, z=z, dt_bias=dt_bias, initial_states=initial_states, seq_idx=seq_idx,
                  cu_seqlens=cu_seqlens)  # fmt: skip
    check.rank(op, "x", x, 4, "(B, L, H, P)")
    x, dt, z, B, C = _autocast(x, dt, z, B, C)
    check.dtype(op, "x", x, SEQUENCE_DTYPES)
    batch, seqlen, heads, headdim = x.shape
    check.shape(op, "dt", dt, (batch, seqlen, heads), "(B, L, H)")
    check.weight_dtype(op, "dt", dt, x)
    if z is not None:
        check.same_shape(op, "z", z, "x", x)
        check.same_dtype(op, "z", z, "x", x)
    _coefficients(op, x, B, C)
    for name, tensor in (("A", A), ("dt_bias", dt_bias)):
        if tensor is not None:
            check.shape(op, name, tensor, (heads,), "(H,)")
            check.weight_dtype(op, name, tensor, x)
    if D is not None:
        if tuple(D.shape) not in ((heads,), (heads, headdim)):
            raise ValueError(
                f"{op}: D has shape {tuple(D.shape)}; it must be (H,) = {(heads,)} or (H, P) = {(heads, headdim)}"
            )
        check.weight_dtype(op, "D", D, x)
    check.same_device(op, x, dt=dt, A=A, B=B, C=C, D=D, z=z, dt_bias=dt_bias, initial_states=initial_states,
                      seq_idx=seq_idx, cu_seqlens=cu_seqlens)  # fmt: skip

    if seq_idx is not None:
        seq_idx = check.sequence_ids(op, seq_idx, batch, seqlen)
    rows = batch
    if cu_seqlens is not None:
        check.cu_seqlens(op, cu_seqlens, batch, seqlen)
        cu_seqlens = cu_seqlens.to(torch.int64).contiguous()
        rows = cu_seqlens.shape[0] - 1
    if initial_states is not None:
        check.shape(op, "initial_states", initial_states, (rows, heads, headdim, B.shape[3]),
                    "(B, H, P, N)" if cu_seqlens is None else "(S, H, P, N)")  # fmt: skip
        check.weight_dtype(op, "initial_states", initial_states, x)

    smallest, largest = _limits(op, dt_limit)
    if deterministic is None:
        deterministic = torch.are_deterministic_algorithms_enabled()
    acc = torch.float64 if x.dtype == torch.float64 else torch.float32

    def weight(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.to(acc).contiguous()

    return Call(
        x, dt, weight(A), B, C, weight(D), z, weight(dt_bias), weight(initial_states), seq_idx, cu_seqlens,
        bool(dt_softplus), smallest, largest, bool(deterministic), bool(return_final_states), _chunk(op, chunk_size),
    )  # fmt: skip


def _autocast(x, dt, z, B, C):
    """Under autocast, sequences follow the autocast dtype, as the products before them do; dt may stay float32."""
    device = x.device.type
    if x.dtype == torch.float64 or not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return x, dt, z, B, C
    dtype = torch.get_autocast_dtype(device)

    def cast(tensor: Tensor | None) -> Tensor | None:
        if tensor is None or not tensor.is_floating_point() or tensor.dtype == torch.float64:
            return tensor
        return tensor.to(dtype)

    return cast(x), dt if dt.dtype == torch.float32 else cast(dt), cast(z), cast(B), cast(C)


def _coefficients(op: str, x: Tensor, B: Tensor, C: Tensor) -> None:
    batch, seqlen, heads, _ = x.shape
    check.rank(op, "B", B, 4, "(B, L, G, N)")
    if tuple(B.shape[:2]) != (batch, seqlen):
        raise ValueError(
            f"{op}: B has batch {B.shape[0]} and length {B.shape[1]}; they must be {batch} and L = {seqlen} "
            "in the form (B, L, G, N)"
        )
    if B.shape[2] == 0 or heads % B.shape[2]:
        raise ValueError(f"{op}: B has {B.shape[2]} groups, which does not divide H = {heads}")
    check.same_shape(op, "C", C, "B", B)
    check.same_dtype(op, "B", B, "x", x)
    check.same_dtype(op, "C", C, "x", x)


def _limits(op: str, dt_limit: Sequence[float]) -> tuple[float, float]:
    if not isinstance(dt_limit, Sequence) or len(dt_limit) != 2:
        raise TypeError(f"{op}: dt_limit is {dt_limit!r}; it must be a pair of numbers")
    try:
        smallest, largest = (float(limit) for limit in dt_limit)
    except (TypeError, ValueError):
        raise TypeError(f"{op}: dt_limit is {dt_limit!r}; it must be a pair of numbers") from None
    if not smallest <= largest:
        raise ValueError(f"{op}: dt_limit is {(smallest, largest)}; its first number must not exceed its second")
    return smallest, largest


def _chunk(op: str, chunk_size: int | None) -> int:
    if chunk_size is None:
        return 0
    if isinstance(chunk_size, bool) or not isinstance(chunk_size, int):
        raise TypeError(f"{op}: chunk_size is {chunk_size!r}; it must be a positive int or None")
    if chunk_size < 1:
        raise ValueError(f"{op}: chunk_size is {chunk_size}; it must be at least 1")
    return chunk_size


SSD = Op("ssd", prepare, {"cpu": ("cpp", "reference"), "cuda": ("triton", "reference")})
SSD.backend("reference", lambda call: [])
kernels.register_backends(SSD)
