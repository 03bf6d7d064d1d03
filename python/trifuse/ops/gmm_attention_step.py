"""``gmm_attention_step``: arguments, checks, and the choice of a kernel."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from trifuse import reference
from trifuse._library import values_are_known
from trifuse.backends import Op
from trifuse.ops import _checks as check
from trifuse.registration import gmm_attention_step as kernels

__all__ = ["gmm_attention_step"]


class Call(NamedTuple):
    """A checked call: values and mask as they were, the mixture's parameters in the accumulation dtype."""

    values: Tensor
    weight: Tensor
    delta: Tensor
    sigma: Tensor
    mean: Tensor
    key_padding_mask: Tensor | None

    @property
    def device_type(self) -> str:
        return self.values.device.type

    def summary(self) -> str:
        batch, length, width = self.values.shape
        masked = "" if self.key_padding_mask is None else ", key_padding_mask"
        return (
            f"B={batch}, T={length}, E={width}, K={self.weight.shape[1]}, {check.dtype_name(self.values.dtype)}"
            f"{masked}, {self.values.device}"
        )


def gmm_attention_step(
    values: Tensor,
    weight: Tensor,
    delta: Tensor,
    sigma: Tensor,
    mean: Tensor,
    *,
    key_padding_mask: Tensor | None = None,
    return_alignment: bool = False,
) -> tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Tensor]:
    """One step of monotonic attention by a mixture of Gaussians: every mean moves forward, and the values are summed
    with the mixture's density at their positions.

    ``mean_new = mean + softplus(delta)``, ``alignment[b, j] = sum_k weight[b, k] N(j; mean_new[b, k], sigma[b, k])``
    with the normal density N, ``context[b] = sum_j alignment[b, j] values[b, j]``. Nothing of size (B, T, K) is
    stored, forward or backward.

    Args:
        values: ``(B, T, E)``: float32, float16, bfloat16 or float64. Any strides. E may be 0 where only the
            alignment is wanted.
        weight: ``(B, K)`` in the accumulation dtype (float32 for half precision, otherwise that of values) or in
            the dtype of values, as delta, sigma and mean: the weights of the mixture, as they are (usually a softmax).
        delta: ``(B, K)``: what softplus (the identity above 20) makes the means' step of.
        sigma: ``(B, K)``, above 0. Looked at on a CPU where nothing is traced; on a GPU the look would stall every
            step.
        mean: ``(B, K)``: the means before this step, zeros at first.
        key_padding_mask: ``(B, T)`` bool, True = padding, whose alignment is 0.
        return_alignment: also return the alignment.

    All tensor arguments but the mask are differentiable once; for second derivatives use
    ``with trifuse.backend("reference")``. Padding, and positions where every density is 0 in the accumulation dtype,
    take no part: their values are not read. mean_new and alignment are kept for the backward pass, so they must not
    be changed in place before it. The dtypes are those of the arguments, also under autocast.

    Returns:
        ``(context, mean_new)``, with ``return_alignment`` ``(context, mean_new, alignment)``: context ``(B, E)`` in
        the dtype of values; mean_new ``(B, K)`` and alignment ``(B, T)`` in the accumulation dtype, since positions
        in half precision would be off by whole numbers.

    Raises:
        TypeError, ValueError: naming the argument, what it was and what it must be.
        BackendUnavailable: a backend was forced that cannot serve the call.
        RuntimeError: a second or a forward-mode derivative was asked of a native kernel.

    Source: Graves, "Generating Sequences With Recurrent Neural Networks", 2013 (arXiv 1308.0850), section 5;
    Battenberg et al., "Location-Relative Attention Mechanisms for Robust Long-Form Speech Synthesis", 2020
    (arXiv 1910.10288), GMMv2.
    """
    call = prepare(
        values, weight, delta, sigma, mean, key_padding_mask=key_padding_mask, return_alignment=return_alignment
    )
    name = STEP.choose(call, call.device_type, call.values.numel())
    results = reference.gmm_attention_step(*call) if name == "reference" else kernels.step(name, call)
    return results if return_alignment else results[:2]


def prepare(
    values: Tensor,
    weight: Tensor,
    delta: Tensor,
    sigma: Tensor,
    mean: Tensor,
    *,
    key_padding_mask: Tensor | None = None,
    return_alignment: bool = False,
) -> Call:
    """Check the arguments of ``gmm_attention_step`` and bring them to one form, without copying the values."""
    op = "gmm_attention_step"
    mixture = {"weight": weight, "delta": delta, "sigma": sigma, "mean": mean}
    check.tensors(op, values=values, **mixture)
    check.tensors(op, optional=True, key_padding_mask=key_padding_mask)
    check.rank(op, "values", values, 3, "(B, T, E)")
    check.dtype(op, "values", values, check.SEQUENCE_DTYPES)
    batch, length, _ = values.shape
    check.rank(op, "weight", weight, 2, "(B, K)")
    expected, acc = (batch, weight.shape[1]), torch.promote_types(values.dtype, torch.float32)
    for name, tensor in mixture.items():
        check.shape(op, name, tensor, expected, "(B, K)")
        if tensor.dtype != acc:
            check.weight_dtype(op, name, tensor, values)
            mixture[name] = tensor.to(acc)
    check.same_device(op, values, **mixture, key_padding_mask=key_padding_mask)
    if key_padding_mask is not None:
        check.dtype(op, "key_padding_mask", key_padding_mask, (torch.bool,))
        check.shape(op, "key_padding_mask", key_padding_mask, (batch, length), "(B, T)")
    # Only the host's copy is free to look at.
    if sigma.is_cpu and values_are_known(sigma) and sigma.numel():
        smallest = sigma.detach().min().item()
        if smallest <= 0:
            raise ValueError(f"{op}: sigma holds {smallest:g}; it must be above 0")
    return Call(values, *mixture.values(), key_padding_mask)


STEP = Op("gmm_attention_step", prepare, {"cpu": ("cpp", "reference"), "cuda": ("triton", "reference")})
STEP.backend("reference", lambda call: [])
kernels.register_backends(STEP)
