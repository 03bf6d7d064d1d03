"""``selective_state_update``: arguments, checks, and the choice of a kernel.

The one-token form of ``selective_scan``: its reference, registration, tests and CPU entry point are in the rooms of
that op.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from trifuse import reference
from trifuse.backends import Op
from trifuse.ops import _checks as check
from trifuse.ops._checks import SEQUENCE_DTYPES
from trifuse.registration import selective_scan as kernels

__all__ = ["selective_state_update"]


class UpdateCall(NamedTuple):
    """A checked call of the one-token form, with heads: see ``reference.selective_state_update``."""

    state: Tensor
    x: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None
    z: Tensor | None
    dt_bias: Tensor | None
    dt_softplus: bool
    state_batch_indices: Tensor | None

    @property
    def device_type(self) -> str:
        return self.x.device.type

    def summary(self) -> str:
        batch, heads, headdim = self.x.shape
        return (
            f"B={batch}, H={heads}, P={headdim}, N={self.A.shape[2]}, {check.dtype_name(self.x.dtype)}, "
            f"state {check.dtype_name(self.state.dtype)}, {self.x.device}"
        )


def selective_state_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    state_batch_indices: Tensor | None = None,
) -> Tensor:
    """One token of the selective scan, for decoding. ``state`` is changed in place.

    Args:
        state: ``(R, D, N)``, or ``(R, H, P, N)`` with heads; R is the batch, or the number of cache
            rows with ``state_batch_indices``. float32, float16, bfloat16 or float64, any strides.
        x: ``(B, D)`` or ``(B, H, P)``; float32, float16, bfloat16 or float64.
        dt: step sizes, shape and dtype of ``x`` (expanded along P is fine).
        A: ``(D, N)`` or ``(H, P, N)``.
        B, C: ``(B, N)`` or ``(B, G, N)``, float32 or the dtype of ``x``; G divides H (or D, without heads).
        D: ``(D,)`` or ``(H, P)``, or None.
        z: gate, shape and dtype of ``x``, or None.
        dt_bias: ``(D,)`` or ``(H, P)``, or None.
        dt_softplus: pass ``dt + dt_bias`` through softplus.
        state_batch_indices: ``(B,)`` int32 or int64: the row of ``state`` each item uses. A negative
            index is padding: its output is 0 and no state is touched. Live indices must differ.

    Returns:
        ``(B, D)`` or ``(B, H, P)`` in the dtype of ``x``. Not differentiable: use ``selective_scan``.

    Raises:
        TypeError, ValueError: naming the argument, what it was and what it must be; ``state`` is untouched.
        BackendUnavailable: a backend was forced that cannot serve the call.

    Source: Gu and Dao, "Mamba", 2023, equation 2, one step of the recurrence.
    """
    if state_batch_indices is None and _is_plain(state, x, dt, A, B, C, D, z, dt_bias):
        call = UpdateCall(state, x, dt, A, B, C, D, z, dt_bias, bool(dt_softplus), None)
        name = UPDATE.choose(call, x.device.type, state.numel())
        if name in ("cpp", "cuda"):
            with torch.no_grad():
                return kernels.update(name, call)
    call = prepare_update(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, state_batch_indices)
    name = UPDATE.choose(call, call.device_type, call.state.numel())
    with torch.no_grad():
        out = reference.selective_state_update(*call) if name == "reference" else kernels.update(name, call)
    out = out.to(x.dtype)
    return out if x.dim() == 3 else out.flatten(1)


def _is_plain(
    state: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
    dt_bias: Tensor | None,
) -> bool:  # fmt: skip
    """Whether the arguments are float32 tensors without heads and groups that pass every check and need no conversion.

    A token of a small model is a matter of microseconds, of which ``prepare_update`` would take a good part; the
    compiled kernels take such a call as it is. Whatever is not told apart here goes the long way.
    """
    if not isinstance(x, Tensor):
        return False
    device, float32, token = x.device, torch.float32, x.shape
    for one in (state, x, dt, A, B, C, D, z, dt_bias):
        if one is not None and (not isinstance(one, Tensor) or one.dtype is not float32 or one.device != device):
            return False
    if len(token) != 2 or state.dim() != 3 or 0 in state.stride():
        return False
    batch, dim = token
    weights = state.shape[1:]
    coefficient = (batch, weights[1])
    return (
        state.shape[0] == batch
        and weights[0] == dim
        and dt.shape == token
        and (z is None or z.shape == token)
        and A.shape == weights
        and B.shape == coefficient
        and C.shape == coefficient
        and (D is None or D.shape == (dim,))
        and (dt_bias is None or dt_bias.shape == (dim,))
    )


def prepare_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    state_batch_indices: Tensor | None = None,
) -> UpdateCall:
    """Check the arguments of ``selective_state_update`` and give them heads, without copies."""
    op = "selective_state_update"
    check.tensors(op, state=state, x=x, dt=dt, A=A, B=B, C=C)
    check.tensors(op, optional=True, D=D, z=z, dt_bias=dt_bias, state_batch_indices=state_batch_indices)
    if state.dim() not in (3, 4):
        raise ValueError(f"{op}: state has shape {tuple(state.shape)}; it must be (R, D, N) or (R, H, P, N)")
    check.written(op, "state", state)
    heads = state.dim() == 4
    check.rank(op, "x", x, 3 if heads else 2, "(B, H, P)" if heads else "(B, D)")
    check.dtype(op, "state", state, SEQUENCE_DTYPES)
    x, dt, z, B, C = _one_dtype_under_autocast(x, dt, z, B, C)
    check.dtype(op, "x", x, SEQUENCE_DTYPES)
    check.shape(op, "x", x, (x.shape[0], *state.shape[1:-1]), "(B, *state.shape[1:-1])")
    for name, tensor in (("dt", dt), ("z", z)):
        if tensor is not None:
            check.same_shape(op, name, tensor, "x", x)
            check.same_dtype(op, name, tensor, "x", x)
    check.shape(op, "A", A, tuple(state.shape[1:]), "(H, P, N)" if heads else "(D, N)")
    check.weight_dtype(op, "A", A, x)
    for name, tensor in (("D", D), ("dt_bias", dt_bias)):
        if tensor is not None:
            check.shape(op, name, tensor, tuple(state.shape[1:-1]), "(H, P)" if heads else "(D,)")
            check.weight_dtype(op, name, tensor, x)

    batch, dstate = x.shape[0], state.shape[-1]
    for name, tensor in (("B", B), ("C", C)):
        if tensor.dim() not in (2, 3) or tensor.shape[0] != batch or tensor.shape[-1] != dstate:
            raise ValueError(
                f"{op}: {name} has shape {tuple(tensor.shape)}; it must be (B, N) or (B, G, N) "
                f"with B = {batch} and N = {dstate}"
            )
        check.weight_dtype(op, name, tensor, x)
        if tensor.dim() == 3 and (tensor.shape[1] == 0 or x.shape[1] % tensor.shape[1]):
            size = f"{'H' if heads else 'D'} = {x.shape[1]}"
            raise ValueError(f"{op}: {name} has {tensor.shape[1]} groups, which does not divide {size}")
    B, C = (tensor.unsqueeze(1) if tensor.dim() == 2 else tensor for tensor in (B, C))
    count = math.lcm(B.shape[1], C.shape[1])  # without heads, as many as both kinds of groups need
    B, C = (tensor.repeat_interleave(count // tensor.shape[1], dim=1) if tensor.shape[1] < count else tensor
            for tensor in (B, C))  # fmt: skip
    split = (count, x.shape[1] // count)

    def with_heads(tensor: Tensor | None, dim: int) -> Tensor | None:
        return tensor if tensor is None or heads else tensor.unflatten(dim, split)

    check.same_device(op, x, state=state, dt=dt, A=A, B=B, C=C, D=D, z=z, dt_bias=dt_bias,
                      state_batch_indices=state_batch_indices)  # fmt: skip
    if state_batch_indices is not None:
        check.state_rows(op, state_batch_indices, batch, state.shape[0])
        state_batch_indices = state_batch_indices.to(torch.int64).contiguous()
    elif state.shape[0] != batch:
        raise ValueError(f"{op}: state has {state.shape[0]} rows; without state_batch_indices it must have B = {batch}")

    acc = torch.float64 if x.dtype == torch.float64 else torch.float32
    # Kernels read one sequence dtype. Beside float32 B or C that is float32: a token is small.
    sequence = torch.promote_types(torch.promote_types(x.dtype, B.dtype), C.dtype)
    x, dt, B, C = x.to(sequence), dt.to(sequence), B.to(sequence), C.to(sequence)
    z = None if z is None else z.to(sequence)

    def weight(tensor: Tensor | None, dim: int) -> Tensor | None:
        return None if tensor is None else with_heads(tensor.to(acc), dim)

    return UpdateCall(
        with_heads(state, 1), with_heads(x, 1), with_heads(dt, 1), weight(A, 0), B, C, weight(D, 0),
        with_heads(z, 1), weight(dt_bias, 0), bool(dt_softplus), state_batch_indices,
    )  # fmt: skip


def _one_dtype_under_autocast(*token: Tensor | None) -> list[Tensor | None]:
    """Under autocast a token's tensors may differ in dtype, as the operations before them do: the widest serves all."""
    x = token[0]
    if not torch.amp.is_autocast_available(x.device.type) or not torch.is_autocast_enabled(x.device.type):
        return list(token)
    dtypes = [one.dtype for one in token if one is not None and one.dtype in SEQUENCE_DTYPES]
    widest = functools.reduce(torch.promote_types, dtypes, x.dtype)
    return [one.to(widest) if one is not None and one.dtype in SEQUENCE_DTYPES else one for one in token]


UPDATE = Op(
    "selective_state_update", prepare_update, {"cpu": ("cpp", "reference"), "cuda": ("cuda", "triton", "reference")}
)
UPDATE.backend("reference", lambda call: [])
kernels.register_backends(UPDATE)
