"""``nested_linear`` and ``nested_cross_entropy``: one classifier at every width of a nested representation."""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from trifuse import reference
from trifuse._library import values_are_known
from trifuse.backends import Op
from trifuse.ops import _checks as check
from trifuse.registration import nested_linear as kernels

__all__ = ["checked_widths", "nested_cross_entropy", "nested_linear"]


class Call(NamedTuple):
    """A checked call, cast as autocast asks."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    widths: tuple[int, ...]

    @property
    def device_type(self) -> str:
        return self.x.device.type

    def summary(self) -> str:
        rows = self.x.numel() // max(self.x.shape[-1], 1)
        few = ", ".join(map(str, self.widths)) if len(self.widths) < 9 else f"{len(self.widths)} of them"
        return (
            f"rows {rows}, {self.x.shape[-1]} -> {self.weight.shape[0]}, widths {few}, "
            f"{check.dtype_name(self.x.dtype)}, {self.x.device}"
        )


def nested_linear(x: Tensor, weight: Tensor, bias: Tensor | None, widths: Sequence[int]) -> Tensor:
    """The logits of one linear layer at each of several nested widths of its input:
    ``logits[i] = x[..., :w] weight[:, :w]ᵀ + bias`` with ``w = widths[i]``.

    The logits of a width are those of the width before and the product of the columns in between, so that each column
    of the weight is multiplied once, forward, and once for each gradient: the cost of the widest layer alone, and of
    writing the logits. Backward, the gradient of the logits is summed up from the widest width down, once.

    This op has no kernel of its own on any device: it is torch's matrix products, whose GEMMs are those of BLAS and
    cuBLAS, each adding to the last one's result. ``trifuse.explain`` calls that backend "torch"; beside it there is
    "reference", and "cpp", "cuda" and "triton" refuse. In half precision the sum over widths is kept in float32.

    Args:
        x: ``(..., K)``: float32, float16, bfloat16 or float64. Any strides; rows may be none.
        weight: ``(N, K)`` in the dtype of x; bias: ``(N,)`` or None. Under autocast all three are cast as
            ``torch.nn.functional.linear`` casts them.
        widths: whole numbers, strictly increasing, from 1 to K. Columns beyond the last take no part.

    Returns:
        ``(len(widths), ..., N)`` in the dtype of x.

    Raises:
        TypeError, ValueError: naming the argument, what it was and what it must be.
        BackendUnavailable: a backend was forced that cannot serve the call.
        RuntimeError: a second or a forward-mode derivative was asked of another backend than the reference.

    Source: Kusupati et al., "Matryoshka Representation Learning", 2022 (arXiv 2205.13147), section 3, with the weights
    of all classifiers tied (MRL-E).
    """
    call = prepare(x, weight, bias, widths)
    name = NESTED.choose(call, call.device_type, call.x.numel())
    if name == "reference":
        return reference.nested_linear(*call)
    rows, out = call.x.shape[:-1], call.weight.shape[0]
    logits = kernels.logits(call._replace(x=call.x.reshape(rows.numel(), call.x.shape[-1])))
    return logits.view(len(call.widths), *rows, out)


def prepare(x: Tensor, weight: Tensor, bias: Tensor | None, widths: Sequence[int]) -> Call:
    """Check the arguments of ``nested_linear`` and bring them to one form."""
    x, weight, bias = check.linear("nested_linear", x, weight, bias)
    return Call(x, weight, bias, checked_widths("nested_linear", widths, weight.shape[1]))


def checked_widths(op: str, widths: Sequence[int], largest: int) -> tuple[int, ...]:
    """Widths as a tuple of ints."""
    if isinstance(widths, (str, Tensor)) or not isinstance(widths, Sequence):
        raise TypeError(f"{op}: widths is {type(widths).__name__}; it must be a sequence of ints")
    for width in widths:
        if isinstance(width, bool) or not isinstance(width, numbers.Integral):
            raise TypeError(f"{op}: widths holds a {type(width).__name__}; it must hold ints")
    found = tuple(int(width) for width in widths)
    if not found or list(found) != sorted(set(found)) or found[0] < 1 or found[-1] > largest:
        raise ValueError(f"{op}: widths is {found}; it must be strictly increasing, from 1 to {largest}")
    return found


NESTED = Op("nested_linear", prepare, {"": ("torch", "reference")})
NESTED.backend("reference", lambda call: [])
kernels.register_backends(NESTED)


def nested_cross_entropy(
    logits: Tensor,
    target: Tensor,
    weights: Sequence[float] | Tensor | None = None,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    """The cross entropy of the logits at every nested width, summed with weights:
    ``sum_i weights[i] cross_entropy(logits[i], target)``.

    Args:
        logits: ``(n, ..., C)``, as ``nested_linear`` returns them.
        target: ``(...)`` int64: the classes, 0 to C - 1, or ``ignore_index``.
        weights: n numbers, or an ``(n,)`` tensor; by default all 1, as in the paper.
        ignore_index: a target whose row takes no part, nor counts in a mean.
        label_smoothing: as in ``torch.nn.functional.cross_entropy``, 0 to 1.
        reduction: "mean" over the rows that take part (NaN if none does, as in torch), "sum", or "none".

    Returns:
        A scalar, with ``reduction="none"`` ``(...)``: in float32, for float64 logits in float64.

    Raises:
        TypeError, ValueError: naming the argument, what it was and what it must be.

    Source: Kusupati et al., "Matryoshka Representation Learning", 2022 (arXiv 2205.13147), equation 1.
    """
    op = "nested_cross_entropy"
    check.tensors(op, logits=logits, target=target)
    check.dtype(op, "logits", logits, check.SEQUENCE_DTYPES)
    if logits.dim() < 2:
        raise ValueError(f"{op}: logits has shape {tuple(logits.shape)}; it must be (n, ..., C)")
    check.dtype(op, "target", target, (torch.int64,))
    check.shape(op, "target", target, tuple(logits.shape[1:-1]), "(...) of logits (n, ..., C)")
    check.same_device(op, logits, target=target)
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f'{op}: reduction is {reduction!r}; it must be "mean", "sum" or "none"')
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"{op}: label_smoothing is {label_smoothing}; it must be in [0, 1]")
    count, classes = logits.shape[0], logits.shape[-1]
    if target.is_cpu and values_are_known(target):  # only the host's copy is free to look at
        bad = target[(target != ignore_index) & ((target < 0) | (target >= classes))]
        if bad.numel():
            raise ValueError(f"{op}: target holds {bad[0].item()}; it must hold classes from 0 to {classes - 1}")
    factors = _factors(op, weights, logits)
    losses = F.cross_entropy(
        logits.to(factors.dtype).reshape(-1, classes), target.flatten().repeat(count), ignore_index=ignore_index,
        label_smoothing=label_smoothing, reduction="none",
    ).view(count, -1)  # fmt: skip
    total = (losses * factors[:, None]).sum(0)
    if reduction == "none":
        return total.view(target.shape)
    return total.sum() / (target != ignore_index).sum() if reduction == "mean" else total.sum()


def _factors(op: str, weights: Sequence[float] | Tensor | None, logits: Tensor) -> Tensor:
    """(n,) in the accumulation dtype."""
    acc, count = torch.promote_types(logits.dtype, torch.float32), logits.shape[0]
    if weights is None:
        return torch.ones(count, dtype=acc, device=logits.device)
    if isinstance(weights, Tensor):
        check.shape(op, "weights", weights, (count,), "(n,)")
        check.same_device(op, logits, weights=weights)
        return weights.to(acc)
    if isinstance(weights, str) or not isinstance(weights, Sequence):
        raise TypeError(f"{op}: weights is {type(weights).__name__}; it must be a sequence of numbers or a tensor")
    if len(weights) != count:
        raise ValueError(f"{op}: weights has {len(weights)} numbers; it must have one per width, {count}")
    return torch.tensor(list(weights), dtype=acc, device=logits.device)
