"""``lora_truncate`` and ``lora_change_rank``: another rank for an adapter, by its factors alone."""

from __future__ import annotations

import math
import numbers

import torch
from torch import Tensor

from trifuse.ops import _checks as check

__all__ = ["lora_change_rank", "lora_truncate"]


@torch.no_grad()
def lora_truncate(lora_A: Tensor, lora_B: Tensor, rank: int, scale: float | Tensor = 1.0) -> tuple[Tensor, Tensor]:
    """The adapter of a smaller rank that is nearest in the Frobenius norm, by QR of the factors and the SVD of an
    ``(r, r)`` matrix; the ``(N, K)`` product is never made.

    Args:
        lora_A: ``(r, K)``; lora_B: ``(N, r)``: of one floating-point dtype.
        rank: 1 to r.
        scale: a number, or ``(r,)``: one per rank. It becomes part of the result, whose own scale is 1.

    Returns:
        ``(A, B)``, ``(rank, K)`` and ``(N, rank)`` in the dtype of the factors: ``B A`` is nearest to
        ``lora_B diag(scale) lora_A``. The singular values are shared out evenly: ``A Aᵀ = Bᵀ B``, diagonal, largest
        first. Computed in float64.

    Raises:
        TypeError, ValueError: naming the argument, what it was and what it must be.

    Source: Eckart and Young, "The approximation of one matrix by another of lower rank", 1936.
    """
    op = "lora_truncate"
    _check_factors(op, lora_A, lora_B, scale)
    r, columns = lora_A.shape
    _check_rank(op, rank, r)
    A, B = lora_A.double(), lora_B.double() * scale
    q_a, r_a = torch.linalg.qr(A.mT)
    q_b, r_b = torch.linalg.qr(B)
    u, s, vh = torch.linalg.svd(r_b @ r_a.mT, full_matrices=False)
    kept = min(rank, s.shape[0])
    root = s[:kept].sqrt()
    new_A, new_B = A.new_zeros((rank, columns)), B.new_zeros((lora_B.shape[0], rank))
    new_A[:kept] = root[:, None] * (vh[:kept] @ q_a.mT)
    new_B[:, :kept] = (q_b @ u[:, :kept]) * root
    return new_A.to(lora_A.dtype), new_B.to(lora_B.dtype)


@torch.no_grad()
def lora_change_rank(
    lora_A: Tensor,
    lora_B: Tensor,
    rank: int,
    scale: float | Tensor = 1.0,
    *,
    new_scale: float = 1.0,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """The same adapter at another rank: truncated downwards, extended upwards by what is 0 in the product but learns.

    Args:
        lora_A: ``(r, K)``; lora_B: ``(N, r)``: of one floating-point dtype.
        rank: the new rank, at least 1.
        scale: a number, or ``(r,)``: one per rank.
        new_scale: the scale that the result will be used with, not 0.
        generator: of the new rows of A, by default torch's own.

    Returns:
        ``(A, B)``, ``(rank, K)`` and ``(N, rank)``: ``new_scale B A`` is ``lora_B diag(scale) lora_A``, or what
        ``lora_truncate`` leaves of it. New rows of A are drawn as those of a fresh adapter are (Kaiming uniform with
        a = sqrt 5), new columns of B are 0.

    Raises:
        TypeError, ValueError: naming the argument, what it was and what it must be.
    """
    op = "lora_change_rank"
    _check_factors(op, lora_A, lora_B, scale)
    r, columns = lora_A.shape
    _check_rank(op, rank)
    if isinstance(new_scale, bool) or not isinstance(new_scale, numbers.Real):
        raise TypeError(f"{op}: new_scale is {type(new_scale).__name__}; it must be a number")
    if new_scale == 0 or not math.isfinite(new_scale):
        raise ValueError(f"{op}: new_scale is {new_scale}; it must be finite and not 0")
    if rank < r:
        A, B = lora_truncate(lora_A, lora_B, rank, scale)
        return A, B / new_scale
    bound = 1 / math.sqrt(columns) if columns else 0.0
    fresh = torch.empty((rank - r, columns), dtype=torch.float32, device=lora_A.device)
    fresh.uniform_(-bound, bound, generator=generator)
    B = (lora_B.double() * scale / new_scale).to(lora_B.dtype)
    return torch.cat((lora_A, fresh.to(lora_A.dtype))), torch.cat((B, B.new_zeros((B.shape[0], rank - r))), dim=1)


def _check_factors(op: str, lora_A: Tensor, lora_B: Tensor, scale: float | Tensor) -> None:
    check.tensors(op, lora_A=lora_A, lora_B=lora_B)
    check.rank(op, "lora_A", lora_A, 2, "(r, K)")
    check.rank(op, "lora_B", lora_B, 2, "(N, r)")
    check.shape(op, "lora_B", lora_B, (lora_B.shape[0], lora_A.shape[0]), "(N, r)")
    check.dtype(op, "lora_A", lora_A, check.SEQUENCE_DTYPES)
    check.same_dtype(op, "lora_B", lora_B, "lora_A", lora_A)
    if isinstance(scale, Tensor):
        if scale.dim():
            check.shape(op, "scale", scale, (lora_A.shape[0],), "a number or (r,)")
    elif isinstance(scale, bool) or not isinstance(scale, numbers.Real):
        raise TypeError(f"{op}: scale is {type(scale).__name__}; it must be a number or a tensor (r,)")


def _check_rank(op: str, rank: int, most: int | None = None) -> None:
    if isinstance(rank, bool) or not isinstance(rank, numbers.Integral):
        raise TypeError(f"{op}: rank is {type(rank).__name__}; it must be an int")
    if rank < 1 or (most is not None and rank > most):
        wanted = "at least 1" if most is None else f"1 to the rank of lora_A, {most}"
        raise ValueError(f"{op}: rank is {rank}; it must be {wanted}")
