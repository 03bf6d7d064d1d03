"""``lora_merge_``, ``lora_unmerge_`` and ``lora_swap_``: arguments, checks, and the choice of a kernel."""

from __future__ import annotations

import math
import warnings
import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trifuse import reference
from trifuse._library import values_are_known
from trifuse.backends import Op
from trifuse.ops import _checks as check
from trifuse.ops.lora_linear import adapter, factor
from trifuse.registration import lora_update as kernels

__all__ = ["LoraMerge", "lora_merge_", "lora_swap_", "lora_unmerge_"]

ROUNDINGS = ("nearest", "stochastic")
MOST_LOST = 0.05  # of an update, by its norm, that a merge loses to rounding without a word
_warned: set[torch.dtype] = set()


class Call(NamedTuple):
    """A checked call: ``out = round(weight + scale B diag(p) A)``, where weight is out if it is None."""

    out: Tensor
    weight: Tensor | None
    lora_A: Tensor
    lora_B: Tensor
    scale: float
    p: Tensor | None
    active_rank: int
    seed: Tensor | None
    measure: bool

    @property
    def device_type(self) -> str:
        return self.out.device.type

    def summary(self) -> str:
        rows, columns = self.out.shape
        rounding = "nearest" if self.seed is None else "stochastic"
        return (
            f"N={rows}, K={columns}, rank {self.active_rank} of {self.lora_A.shape[0]}, "
            f"{check.dtype_name(self.out.dtype)}, adapter {check.dtype_name(self.lora_A.dtype)}, rounding {rounding}, "
            f"{self.out.device}"
        )


class LoraMerge:
    """A merge of an adapter into a weight: what ``lora_unmerge_`` and ``lora_swap_`` need.

    Attributes:
        original: the weight as it was, bit for bit, or None where it was not kept.
        rounding: "nearest" or "stochastic".
        is_merged: whether the weight holds the adapter.
    """

    def __init__(self, weight: Tensor, original: Tensor | None, rounding: str, sums: Tensor):
        self.original = original
        self.rounding = rounding
        self.is_merged = True
        self._sums = sums
        self._weight: weakref.ref[Tensor] | None = weakref.ref(weight)
        self._address = weight.data_ptr() if values_are_known(weight) else None

    @property
    def lost(self) -> float:
        """The share of the last update that rounding took, by Frobenius norms: looking at it waits for the device."""
        update, lost = self._sums.tolist()
        return math.sqrt(lost / update) if update else 0.0

    def belongs_to(self, weight: Tensor) -> bool:
        """Whether nothing speaks against this weight being the merged one."""
        merged = self._weight() if self._weight is not None else None
        return merged is None or merged is weight or self._address == weight.data_ptr()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_weight": None}  # a copy's weight is a copy, too

    def __repr__(self) -> str:
        kept = "kept" if self.original is not None else "not kept"
        return f"LoraMerge(is_merged={self.is_merged}, rounding={self.rounding!r}, original {kept})"


@torch.no_grad()
def lora_merge_(
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scale: float | Tensor = 1.0,
    *,
    active_rank: int | None = None,
    rounding: str = "nearest",
    seed: int | Tensor | None = None,
    keep: bool = True,
) -> LoraMerge:
    """Add an adapter to a weight in place: ``weight += lora_B diag(scale) lora_A`` in float32, rounded once.

    Args:
        weight: ``(N, K)``: float32, float16, bfloat16 or float64, a parameter as well. Rows or columns should be
            contiguous, as those of a transposed weight are; other strides take the reference.
        lora_A: ``(r, K)``; lora_B: ``(N, r)``: both in the dtype of weight, or in float32 beside half precision.
        scale: a number, or ``(r,)``: one per rank.
        active_rank: only the first so many ranks are read, 1 to r.
        rounding: "nearest" (to even), or "stochastic": up with the probability of what is cut off, so that the rounding
            errors of a sum over many elements cancel. Of float32 and float64 weights both are the same.
        seed: of stochastic rounding, a whole number or an int64 tensor of one element on the device of weight; by
            default drawn from torch's generator. What is drawn is a function of seed, row and column, the same on every
            backend.
        keep: keep a copy of the weight, for ``lora_unmerge_`` and ``lora_swap_``.

    Returns:
        LoraMerge: for ``lora_unmerge_`` and ``lora_swap_``; its ``lost`` is the share of the update that rounding took.

    Warns:
        UserWarning: once per dtype, if rounding took more than 5 % of the update.

    Raises:
        TypeError, ValueError: naming the argument, what it was and what it must be.
        BackendUnavailable: a backend was forced that cannot serve the call.

    Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021 (arXiv 2106.09685), section 4.1;
    Gupta et al., "Deep Learning with Limited Numerical Precision", 2015 (arXiv 1502.02551), section 3 (stochastic
    rounding).
    """
    op = "lora_merge_"
    call = prepare_merge(
        weight, lora_A, lora_B, scale, active_rank=active_rank, rounding=rounding, seed=seed, keep=keep
    )
    original = weight.detach().clone() if keep else None
    merge = LoraMerge(weight, original, rounding, _run(MERGE, call, weight))
    _warn_of_loss(op, merge, weight)
    return merge


@torch.no_grad()
def lora_unmerge_(weight: Tensor, merge: LoraMerge) -> None:
    """Take an adapter out of a weight in place: every bit is as it was before ``lora_merge_``.

    Args:
        weight: the merged weight. If its dtype was changed since, it becomes the original one in that dtype.
        merge: what ``lora_merge_`` returned. The copy is given up.

    Raises:
        TypeError, ValueError: merge is not one of this weight, was undone already, or kept nothing.
    """
    original = _original("lora_unmerge_", weight, merge)
    weight.copy_(original)
    merge.original, merge.is_merged = None, False


@torch.no_grad()
def lora_swap_(
    weight: Tensor,
    merge: LoraMerge,
    lora_A: Tensor,
    lora_B: Tensor,
    scale: float | Tensor = 1.0,
    *,
    active_rank: int | None = None,
    rounding: str | None = None,
    seed: int | Tensor | None = None,
) -> None:
    """Put another adapter in the place of a merged one, in one pass: what merging it into the original weight gives,
    bit for bit, after any number of swaps.

    Args:
        weight: the merged weight.
        merge: what ``lora_merge_`` returned; it stands for the new adapter afterwards.
        lora_A, lora_B, scale, active_rank, seed: as in ``lora_merge_``; the rank may be another.
        rounding: as in ``lora_merge_``, by default that of the merge.

    Warns:
        UserWarning: as ``lora_merge_``.

    Raises:
        TypeError, ValueError: as ``lora_merge_``; or merge is not one of this weight, was undone, or kept nothing.
        BackendUnavailable: a backend was forced that cannot serve the call.
    """
    op = "lora_swap_"
    call = prepare_swap(weight, merge, lora_A, lora_B, scale, active_rank=active_rank, rounding=rounding, seed=seed)
    merge._sums = _run(SWAP, call, weight)
    merge.rounding = merge.rounding if rounding is None else rounding
    _warn_of_loss(op, merge, weight)


def prepare_merge(
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scale: float | Tensor = 1.0,
    *,
    active_rank: int | None = None,
    rounding: str = "nearest",
    seed: int | Tensor | None = None,
    keep: bool = True,
) -> Call:
    """Check the arguments of ``lora_merge_`` and bring them to one form."""
    return _prepare("lora_merge_", weight, lora_A, lora_B, scale, active_rank, rounding, seed)


def prepare_swap(
    weight: Tensor,
    merge: LoraMerge,
    lora_A: Tensor,
    lora_B: Tensor,
    scale: float | Tensor = 1.0,
    *,
    active_rank: int | None = None,
    rounding: str | None = None,
    seed: int | Tensor | None = None,
) -> Call:
    """Check the arguments of ``lora_swap_`` and bring them to one form."""
    op = "lora_swap_"
    original = _original(op, weight, merge)
    rounding = merge.rounding if rounding is None else rounding
    call = _prepare(op, weight, lora_A, lora_B, scale, active_rank, rounding, seed)
    return call._replace(weight=original.to(device=weight.device, dtype=weight.dtype))


def _prepare(
    op: str,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scale: float | Tensor,
    active_rank: int | None,
    rounding: str,
    seed: int | Tensor | None,
) -> Call:
    _check_weight(op, weight)
    lora_A, lora_B = adapter(op, weight, weight, lora_A, lora_B)
    scale, p = factor(op, "scale", scale, lora_A.shape[0], weight)
    active_rank = check.active_rank(op, active_rank, lora_A.shape[0])
    if rounding not in ROUNDINGS:
        raise ValueError(f"{op}: rounding is {rounding!r}; it must be one of {', '.join(map(repr, ROUNDINGS))}")
    if rounding == "nearest" and seed is not None:
        raise ValueError(f'{op}: seed is {seed!r} and rounding "nearest"; only rounding="stochastic" takes a seed')
    drawn = check.seed(op, seed, weight) if rounding == "stochastic" else None
    detached = (None if one is None else one.detach() for one in (lora_A, lora_B, p))
    A, B, p = detached
    return Call(weight.detach(), None, A, B, scale, p, active_rank, drawn, True)


def _check_weight(op: str, weight: Tensor) -> None:
    check.tensors(op, weight=weight)
    check.rank(op, "weight", weight, 2, "(N, K)")
    check.dtype(op, "weight", weight, check.SEQUENCE_DTYPES)
    check.written(op, "weight", weight)


def _original(op: str, weight: Tensor, merge: LoraMerge) -> Tensor:
    """The weight before it was merged."""
    _check_weight(op, weight)
    if not isinstance(merge, LoraMerge):
        raise TypeError(f"{op}: merge is {type(merge).__name__}; it must be what lora_merge_ returned")
    if not merge.is_merged:
        raise ValueError(f"{op}: merge was undone by lora_unmerge_; the weight must be merged")
    if merge.original is None:
        raise ValueError(f"{op}: merge kept no copy of the weight; lora_merge_ must be called with keep=True")
    check.shape(op, "weight", weight, tuple(merge.original.shape), "the shape of the merged weight")
    if not merge.belongs_to(weight):
        raise ValueError(f"{op}: merge is one of another weight; it must be what lora_merge_ returned for this one")
    return merge.original


def _run(op: Op, call: Call, weight: Tensor) -> Tensor:
    """Change the weight; returns its sums of squares."""
    name = op.choose(call, call.device_type, call.out.numel())
    if name != "reference":
        sums = kernels.update(name, call)
        if not weight.is_inference():
            torch.autograd.graph.increment_version(weight)
        return sums
    before = call.out if call.weight is None else call.weight
    scale = call.scale if call.p is None else call.p
    value, sums = reference.lora_update(
        before, call.lora_A, call.lora_B, scale, active_rank=call.active_rank, seed=call.seed
    )
    weight.copy_(value)
    return sums


def _warn_of_loss(op: str, merge: LoraMerge, weight: Tensor) -> None:
    if weight.dtype in _warned or not values_are_known(merge._sums):
        return
    lost = merge.lost
    if lost <= MOST_LOST:
        return
    _warned.add(weight.dtype)
    other = ', or round with rounding="stochastic"' if merge.rounding == "nearest" else ""
    warnings.warn(
        f"{op}: rounding to {check.dtype_name(weight.dtype)} took {lost:.1%} of this update (by its norm); keep the "
        f"adapter unmerged, or merge it into a float32 copy of the weight{other}",
        UserWarning,
        stacklevel=4,
    )


MERGE = Op("lora_merge_", prepare_merge, {"cpu": ("cpp", "reference"), "cuda": ("cuda", "triton", "reference")})
SWAP = Op("lora_swap_", prepare_swap, {"cpu": ("cpp", "reference"), "cuda": ("cuda", "triton", "reference")})
for _entry in (MERGE, SWAP):
    _entry.backend("reference", lambda call: [])
    kernels.register_backends(_entry)
