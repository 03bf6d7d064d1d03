"""``causal_conv1d_update``: arguments, checks, and the choice of a kernel.

The step form of ``causal_conv1d``: its reference, registration and CPU kernel are in the rooms of that op, since they
share the definition, the parameters and the taps with it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from trifuse import reference
from trifuse.backends import Op
from trifuse.ops import _checks as check
from trifuse.ops._checks import SEQUENCE_DTYPES
from trifuse.ops.causal_conv1d import WIDTHS, is_silu, weights
from trifuse.registration import causal_conv1d as kernels

__all__ = ["causal_conv1d_update"]


class UpdateCall(NamedTuple):
    """A checked call of the step form: see ``reference.causal_conv1d_update``."""

    x: Tensor
    conv_state: Tensor
    weight: Tensor
    bias: Tensor | None
    silu: bool
    cache_seqlens: Tensor | None
    conv_state_indices: Tensor | None

    @property
    def device_type(self) -> str:
        return self.x.device.type

    def summary(self) -> str:
        batch, dim, seqlen = self.x.shape
        return (
            f"B={batch}, D={dim}, L={seqlen}, W={self.weight.shape[1]}, {check.dtype_name(self.x.dtype)}, "
            f"conv_state of {self.conv_state.shape[2]} in {check.dtype_name(self.conv_state.dtype)}, {self.x.device}"
        )


def causal_conv1d_update(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    cache_seqlens: Tensor | None = None,
    conv_state_indices: Tensor | None = None,
) -> Tensor:
    """The next token, or the next few, of ``causal_conv1d``, for decoding. ``conv_state`` is changed in place.

    Args:
        x: ``(B, D)``, or ``(B, D, L)`` for several tokens; float32, float16, bfloat16 or float64.
        conv_state: ``(R, D, K)``, K at least W - 1, of any of these dtypes, any strides: the last K inputs, the
            newest last. R is the batch, or the number of cache rows with ``conv_state_indices``.
        weight: ``(D, W)``, W from 2 to 8.
        bias: ``(D,)``, or None.
        activation: None, or ``"silu"`` (``"swish"`` is another name of it).
        cache_seqlens: ``(B,)`` int32 or int64, how many inputs each item has had. ``conv_state`` is then a
            circular buffer: input number i stands at ``i % K``.
        conv_state_indices: ``(B,)`` int32 or int64: the row of ``conv_state`` each item uses. A negative index is
            padding: its output is 0 and no row is touched. Live indices must differ.

    Returns:
        ``y`` with the shape and dtype of ``x``. Not differentiable: use ``causal_conv1d``.

    Raises:
        TypeError, ValueError: naming the argument, what it was and what it must be; ``conv_state`` is untouched.
        BackendUnavailable: a backend was forced that cannot serve the call.

    Source: Gu and Dao, "Mamba", 2023, section 3.4, one step of the convolution.
    """
    if cache_seqlens is None and conv_state_indices is None and _is_plain(x, conv_state, weight, bias):
        silu = is_silu("causal_conv1d_update", activation)
        call = UpdateCall(x.unsqueeze(2), conv_state, weight, bias, silu, None, None)
    else:
        call = prepare_update(x, conv_state, weight, bias, activation, cache_seqlens, conv_state_indices)
    name = UPDATE.choose(call, call.device_type, call.x.numel())
    with torch.no_grad():
        y = reference.causal_conv1d_update(*call) if name == "reference" else kernels.update(name, call)
    return y if x.dim() == 3 else y.squeeze(2)


def _is_plain(x: Tensor, conv_state: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether one float32 token meets contiguous float32 weights: it passes every check and needs no conversion, and a
    token is a matter of microseconds. Whatever is not told apart here goes the long way."""
    if not isinstance(x, Tensor):
        return False
    device, float32, token = x.device, torch.float32, x.shape
    for one in (x, conv_state, weight, bias):
        if one is not None and (not isinstance(one, Tensor) or one.dtype is not float32 or one.device != device):
            return False
    if len(token) != 2 or conv_state.dim() != 3 or weight.dim() != 2 or 0 in conv_state.stride():
        return False
    width, rows = weight.shape[1], conv_state.shape
    return (
        rows[0] == token[0]
        and rows[1] == token[1] == weight.shape[0]
        and width in WIDTHS
        and rows[2] >= width - 1
        and weight.is_contiguous()
        and (bias is None or (bias.shape == token[1:] and bias.is_contiguous()))
    )


def prepare_update(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    cache_seqlens: Tensor | None = None,
    conv_state_indices: Tensor | None = None,
) -> UpdateCall:
    """Check the arguments of ``causal_conv1d_update`` and bring them to one form, without copies."""
    op = "causal_conv1d_update"
    check.tensors(op, x=x, conv_state=conv_state, weight=weight)
    check.tensors(op, optional=True, bias=bias, cache_seqlens=cache_seqlens, conv_state_indices=conv_state_indices)
    silu = is_silu(op, activation)
    if x.dim() not in (2, 3):
        raise ValueError(f"{op}: x has shape {tuple(x.shape)}; it must be (B, D) or (B, D, L)")
    check.dtype(op, "x", x, SEQUENCE_DTYPES)
    if x.dim() == 2:
        x = x.unsqueeze(2)
    batch, dim, _ = x.shape
    weight, bias = weights(op, x, weight, bias)
    check.rank(op, "conv_state", conv_state, 3, "(R, D, K)")
    check.dtype(op, "conv_state", conv_state, SEQUENCE_DTYPES)
    check.written(op, "conv_state", conv_state)
    if conv_state.shape[1] != dim or conv_state.shape[2] < weight.shape[1] - 1:
        raise ValueError(
            f"{op}: conv_state has shape {tuple(conv_state.shape)}; it must be (R, D, K) with D = {dim} "
            f"and K at least W - 1 = {weight.shape[1] - 1}"
        )
    check.same_device(op, x, conv_state=conv_state, weight=weight, bias=bias, cache_seqlens=cache_seqlens,
                      conv_state_indices=conv_state_indices)  # fmt: skip
    if conv_state_indices is not None:
        check.state_rows(op, conv_state_indices, batch, conv_state.shape[0], "conv_state_indices", "conv_state")
        conv_state_indices = conv_state_indices.to(torch.int64).contiguous()
    elif conv_state.shape[0] != batch:
        raise ValueError(
            f"{op}: conv_state has {conv_state.shape[0]} rows; without conv_state_indices it must have B = {batch}"
        )
    if cache_seqlens is not None:
        if cache_seqlens.dtype not in (torch.int32, torch.int64):
            raise TypeError(
                f"{op}: cache_seqlens is {check.dtype_name(cache_seqlens.dtype)}; it must be int32 or int64"
            )
        check.shape(op, "cache_seqlens", cache_seqlens, (batch,), "(B,)")
        cache_seqlens = cache_seqlens.to(torch.int64).contiguous()
    return UpdateCall(x, conv_state, weight, bias, silu, cache_seqlens, conv_state_indices)


UPDATE = Op(
    "causal_conv1d_update", prepare_update, {"cpu": ("cpp", "reference"), "cuda": ("cuda", "triton", "reference")}
)
UPDATE.backend("reference", lambda call: [])
kernels.register_backends(UPDATE)
