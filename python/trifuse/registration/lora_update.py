"""The torch op behind ``lora_merge_`` and ``lora_swap_``: its schema, its fake kernel, and who can serve what."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trifuse.backends import Op
from trifuse.registration import common

# out = round(weight + scale B diag(p) A) with the first `active_rank` ranks; the weight is `out` where none is given.
# Rounding is stochastic where there is a seed. Returns, if asked to measure, two sums of squares: of the update, and of
# what rounding lost of it.
_SCHEMA = (
    "(Tensor(a!) out, Tensor? weight, Tensor lora_A, Tensor lora_B, float scale, Tensor? p, SymInt active_rank,"
    " Tensor? seed, bool measure) -> Tensor"
)


def _fake(out, weight, lora_A, lora_B, scale, p, active_rank, seed, measure):
    return out.new_empty((2 if measure else 0,), dtype=torch.float64)


common.define("lora_update", _SCHEMA, _fake)
common.implement_triton("lora_update", "lora_update")


def _lies_plain(matrix: Tensor) -> bool:
    """Whether the elements of a row are neighbours in memory."""
    rows, columns = matrix.shape
    return (columns <= 1 or matrix.stride(1) == 1) and (rows <= 1 or matrix.stride(0) >= columns)


def _memory_refusals(call: Any) -> list[str]:
    for turn in (lambda one: one, Tensor.t):
        if _lies_plain(turn(call.out)) and (call.weight is None or _lies_plain(turn(call.weight))):
            return []
    return [f"it takes a weight whose rows or columns are contiguous, and its strides are {call.out.stride()}"]


def _gpu_refusals(call: Any) -> list[str]:
    reasons = _memory_refusals(call)
    if call.out.dtype == torch.float64:
        reasons.append("it computes in float32, and the weight is float64")
    return reasons


def _cpp_refusals(call: Any) -> list[str]:
    return common.cpp_refusals(call) + _memory_refusals(call)


def _cuda_refusals(call: Any) -> list[str]:
    return common.cuda_refusals(call) + _gpu_refusals(call)


def _triton_refusals(call: Any) -> list[str]:
    return common.triton_refusals(call, call.out) + _gpu_refusals(call)


def register_backends(op: Op) -> None:
    op.backend("cpp", _cpp_refusals)
    op.backend("cuda", _cuda_refusals)
    op.backend("triton", _triton_refusals)


def update(backend: str, call: Any) -> Tensor:
    """Run a checked call on a native backend: ``call.out`` is changed in place, and its sums come back."""
    ops = torch.ops.trifuse
    return (ops.lora_update_triton if backend == "triton" else ops.lora_update)(*call)
