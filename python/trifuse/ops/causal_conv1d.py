"""``causal_conv1d``: arguments, checks, and the choice of a kernel."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from trifuse import reference
from trifuse.backends import Op
from trifuse.ops import _checks as check
from trifuse.ops._checks import SEQUENCE_DTYPES
from trifuse.registration import causal_conv1d as kernels

__all__ = ["causal_conv1d"]

WIDTHS = range(2, 9)


class Call(NamedTuple):
    """A checked call. x is a (B, D, L) view whatever the layout; the weights are contiguous and of the accumulation
    dtype, the states contiguous and of x's; seq_idx is int32 and cu_seqlens int64."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    initial_states: Tensor | None
    seq_idx: Tensor | None
    cu_seqlens: Tensor | None
    silu: bool
    bld: bool
    deterministic: bool

    @property
    def device_type(self) -> str:
        return self.x.device.type

    def summary(self) -> str:
        batch, dim, seqlen = self.x.shape
        return (
            f"B={batch}, D={dim}, L={seqlen}, W={self.weight.shape[1]}, {check.dtype_name(self.x.dtype)}, "
            f"layout {'bld' if self.bld else 'bdl'}, {self.x.device}"
        )


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    seq_idx: Tensor | None = None,
    initial_states: Tensor | None = None,
    return_final_states: bool = False,
    activation: str | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    layout: str = "bdl",
    deterministic: bool | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """A short causal convolution of every channel with its own weights, as in front of the scans of Mamba.

    Per channel d, inputs left of the sequence being ``initial_states`` or zero::

        y[l] = act(bias[d] + sum_w weight[d, w] * x[l - (W - 1) + w])

    Args:
        x: ``(B, D, L)``, or ``(B, L, D)`` with ``layout="bld"``; float32, float16, bfloat16 or float64.
            Any strides.
        weight: ``(D, W)``, W from 2 to 8.
        bias: ``(D,)``, or None.
        seq_idx: ``(B, L)`` int32, or int64 of values that fit into int32, the id of the sequence each position
            belongs to: an input counts only for positions of its own id. A negative id is padding: output 0, and
            no gradient.
        initial_states: ``(B, D, W - 1)``, or ``(S, D, W - 1)`` with ``cu_seqlens``, in the dtype of ``x``: the inputs
            left of position 0, zero if None. With ``seq_idx`` they belong to the sequence of position 0, up to
            where the id first changes. Differentiable.
        return_final_states: also return the last W - 1 inputs, to be given as the next ``initial_states``.
        activation: None, or ``"silu"`` (``"swish"`` is another name of it).
        cu_seqlens: ``(S + 1,)`` int32 or int64, the offsets of S sequences packed along the time of a batch of
            one. No window crosses a boundary. Together with ``seq_idx`` an input must satisfy both.
        layout: ``"bdl"`` or ``"bld"``, of x and the output. Neither is copied into the other.
        deterministic: bitwise repeatable gradients. None follows
            ``torch.are_deterministic_algorithms_enabled()``.

    weight and bias are computed in float32 (float64 with float64 ``x``), also under autocast. All floating tensor
    arguments are differentiable once; for second derivatives use ``with trifuse.backend("reference")``.

    Returns:
        ``y`` with the shape and dtype of ``x``; with ``return_final_states`` the pair ``(y, final_states)``,
        ``final_states`` with the shape and dtype of ``initial_states``, differentiable. With ``seq_idx`` they are
        the last inputs of the last sequence that is not padding, and zero left of it.

    Raises:
        TypeError, ValueError: naming the argument, what it was and what it must be.
        BackendUnavailable: a backend was forced that cannot serve the call.
        RuntimeError: a second or a forward-mode derivative was asked of a native kernel.

    Source: Gu and Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces", 2023, section 3.4.
    """
    call = prepare(
        x, weight, bias, seq_idx, initial_states, return_final_states, activation,
        cu_seqlens=cu_seqlens, layout=layout, deterministic=deterministic,
    )  # fmt: skip
    # The output lies in memory as x does: a transposed x has channels side by side, and so has what is made of it.
    call = call._replace(bld=call.bld or (call.x.stride(1) == 1 and call.x.stride(2) != 1))
    name = CONV.choose(call, call.device_type, call.x.numel())
    if name == "reference":
        y, final_states = reference.causal_conv1d(*call[:7])
    else:
        y, final_states = kernels.conv(name, call, bool(return_final_states))
    if layout == "bld":
        y = y.transpose(1, 2)
    return (y, final_states) if return_final_states else y


def prepare(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    seq_idx: Tensor | None = None,
    initial_states: Tensor | None = None,
    return_final_states: bool = False,
    activation: str | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    layout: str = "bdl",
    deterministic: bool | None = None,
) -> Call:
    """Check the arguments of ``causal_conv1d`` and bring them to one form, without copying a sequence."""
    op = "causal_conv1d"
    if layout not in ("bdl", "bld"):
        raise ValueError(f'{op}: layout is {layout!r}; it must be "bdl" or "bld"')
    bld = layout == "bld"
    check.tensors(op, x=x, weight=weight)
    check.tensors(op, optional=True, bias=bias, seq_idx=seq_idx, initial_states=initial_states, cu_seqlens=cu_seqlens)
    check.rank(op, "x", x, 3, "(B, L, D)" if bld else "(B, D, L)")
    silu = is_silu(op, activation)
    x, initial_states = _autocast(x, initial_states)
    check.dtype(op, "x", x, SEQUENCE_DTYPES)
    if bld:
        x = x.transpose(1, 2)
    batch, dim, seqlen = x.shape
    weight, bias = weights(op, x, weight, bias)
    check.same_device(op, x, weight=weight, bias=bias, seq_idx=seq_idx, initial_states=initial_states,
                      cu_seqlens=cu_seqlens)  # fmt: skip

    rows = batch
    if cu_seqlens is not None:
        check.cu_seqlens(op, cu_seqlens, batch, seqlen)
        cu_seqlens = cu_seqlens.to(torch.int64).contiguous()
        rows = cu_seqlens.shape[0] - 1
    if seq_idx is not None:
        seq_idx = check.sequence_ids(op, seq_idx, batch, seqlen)
    if initial_states is not None:
        check.shape(op, "initial_states", initial_states, (rows, dim, weight.shape[1] - 1),
                    "(B, D, W - 1)" if cu_seqlens is None else "(S, D, W - 1)")  # fmt: skip
        check.same_dtype(op, "initial_states", initial_states, "x", x)
        initial_states = initial_states.contiguous()
    if deterministic is None:
        deterministic = torch.are_deterministic_algorithms_enabled()
    return Call(x, weight, bias, initial_states, seq_idx, cu_seqlens, silu, bld, bool(deterministic))


def is_silu(op: str, activation: object) -> bool:
    if activation not in (None, "silu", "swish"):
        raise ValueError(f'{op}: activation is {activation!r}; it must be None, "silu" or "swish"')
    return activation is not None


def weights(op: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """weight and bias beside x (B, D, L), contiguous and of the accumulation dtype."""
    dim = x.shape[1]
    check.rank(op, "weight", weight, 2, "(D, W)")
    if weight.shape[0] != dim:
        raise ValueError(f"{op}: weight has shape {tuple(weight.shape)}; its first size must be D = {dim}")
    if weight.shape[1] not in WIDTHS:
        raise ValueError(
            f"{op}: weight has width {weight.shape[1]}; it must be from {WIDTHS.start} to {WIDTHS.stop - 1}"
        )
    check.weight_dtype(op, "weight", weight, x)
    acc = torch.float64 if x.dtype == torch.float64 else torch.float32
    if bias is not None:
        check.shape(op, "bias", bias, (dim,), "(D,)")
        check.weight_dtype(op, "bias", bias, x)
        bias = bias.to(acc).contiguous()
    return weight.to(acc).contiguous(), bias


def _autocast(x: Tensor, initial_states: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Under autocast, the inputs follow the autocast dtype, as the products before them do."""
    device = x.device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return x, initial_states
    if x.dtype not in SEQUENCE_DTYPES or x.dtype == torch.float64:
        return x, initial_states
    dtype = torch.get_autocast_dtype(device)
    if initial_states is not None and initial_states.dtype in SEQUENCE_DTYPES[:3]:
        initial_states = initial_states.to(dtype)
    return x.to(dtype), initial_states


CONV = Op("causal_conv1d", prepare, {"cpu": ("cpp", "reference"), "cuda": ("cuda", "triton", "reference")})
CONV.backend("reference", lambda call: [])
kernels.register_backends(CONV)
