"""``lora_linear_multi``: arguments, checks, and the choice of a kernel."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from trifuse import reference
from trifuse._library import values_are_known
from trifuse.backends import Op
from trifuse.ops import _checks as check
from trifuse.ops.lora_linear import adapter, factor, is_plain
from trifuse.registration import common
from trifuse.registration import lora_linear_multi as kernels

__all__ = ["lora_linear_multi"]


class Call(NamedTuple):
    """A checked call, cast as autocast asks; ``scales[i, :r_i]`` are the factors of adapter i's ranks."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    A_list: list[Tensor]
    B_list: list[Tensor]
    scales: Tensor
    index: Tensor

    @property
    def device_type(self) -> str:
        return self.x.device.type

    def summary(self) -> str:
        ranks = [one.shape[0] for one in self.A_list]
        return (
            f"rows {self.index.numel()}, {self.x.shape[-1]} -> {self.weight.shape[0]}, {len(ranks)} adapters of rank "
            f"{min(ranks)} to {max(ranks)}, {check.dtype_name(self.x.dtype)}, "
            f"adapters {check.dtype_name(self.A_list[0].dtype)}, {self.x.device}"
        )


def lora_linear_multi(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A_list: Sequence[Tensor],
    B_list: Sequence[Tensor],
    scales: Sequence[float | Tensor] | Tensor,
    index: Tensor,
) -> Tensor:
    """A linear layer where every row has a low-rank adapter of its own, or none: one base product for all of them.

    Rows are sorted by adapter; no weights are copied per row. Every tensor argument but index is differentiable once.

    Args:
        x: ``(..., K)``: float32, float16, bfloat16 or float64. Any strides.
        weight: ``(N, K)`` in the dtype of x; bias: ``(N,)`` or None. Under autocast x, weight and bias are cast as
            ``torch.nn.functional.linear`` casts them.
        A_list, B_list: the adapters, ``(r_i, K)`` and ``(N, r_i)``, at least one, ranks may differ: all in the dtype of
            x, or all in float32 beside half precision.
        scales: for each adapter a number or ``(r_i,)``; or all of them as one ``(adapters, largest rank)`` tensor.
        index: ``x.shape[:-1]``, int32 or int64: the adapter of each row; negative: none. Values are looked at on a CPU
            where nothing is traced; on a GPU an index beyond the adapters counts as none.

    Returns:
        ``(..., N)`` in the dtype of x.

    Raises:
        TypeError, ValueError: naming the argument, what it was and what it must be.
        BackendUnavailable: a backend was forced that cannot serve the call.
        RuntimeError: a second or a forward-mode derivative was asked of a native kernel.

    Source: the batches of Sheng et al., "S-LoRA: Serving Thousands of Concurrent LoRA Adapters", 2023 (arXiv
    2311.03285), and Chen et al., "Punica: Multi-Tenant LoRA Serving", 2023 (arXiv 2310.18547), with a backward pass.
    """
    if _is_plain(x, weight, bias, A_list, B_list, scales, index):
        y = kernels.plain(x, weight, bias, A_list, B_list, scales, index)
        if y is not None:
            return y
    call = prepare(x, weight, bias, A_list, B_list, scales, index)
    name = MULTI.choose(call, call.device_type, call.x.numel())
    if name != "reference":
        return kernels.linear(name, call)
    factors = [row[: one.shape[0]] for row, one in zip(call.scales, call.A_list, strict=True)]
    return reference.lora_linear_multi(*call[:5], factors, call.index)


def _is_plain(
    x: Tensor, weight: Tensor, bias: Tensor | None, A_list: object, B_list: object, scales: object, index: Tensor
) -> bool:
    """Whether a call may be one for the kernel that looks at its arguments itself: lists of plain tensors and numbers,
    no gradient recorded, nothing that looks on. Checks of many adapters cost as much as their products with few rows.
    """
    known = common.PLAIN
    return (
        not torch.is_grad_enabled() and type(A_list) is list and type(B_list) is list and type(scales) is list
        and len(A_list) > 0 and len(B_list) > 0 and type(index) is Tensor and index.is_cpu
        and is_plain(x, weight, bias, A_list[0], B_list[0], 1.0, 0.0, None, False)
        and all([type(one) in known and one.is_cpu for one in A_list])  # noqa: C419
        and all([type(one) in known and one.is_cpu for one in B_list])  # noqa: C419
        and all([type(one) is float for one in scales])  # noqa: C419
    )  # fmt: skip


def prepare(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A_list: Sequence[Tensor],
    B_list: Sequence[Tensor],
    scales: Sequence[float | Tensor] | Tensor,
    index: Tensor,
) -> Call:
    """Check the arguments of ``lora_linear_multi`` and bring them to one form."""
    op = "lora_linear_multi"
    x, weight, bias = check.linear(op, x, weight, bias)
    n = _count(op, "A_list", A_list)
    if n == 0:
        raise ValueError(f"{op}: A_list is empty; there must be at least one adapter (lora_linear needs none)")
    for name, given in (("B_list", B_list), ("scales", scales)):
        if _count(op, name, given) != n:
            raise ValueError(f"{op}: {name} has {len(given)} entries; it must have one per adapter, {n}")
    pairs = [adapter(op, x, weight, A, B, str(i)) for i, (A, B) in enumerate(zip(A_list, B_list, strict=True))]
    A_list, B_list = [A for A, _ in pairs], [B for _, B in pairs]
    for i, one in enumerate(A_list):
        check.same_dtype(op, f"A_list[{i}]", one, "A_list[0]", A_list[0])
    check.tensors(op, index=index)
    if index.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{op}: index is {check.dtype_name(index.dtype)}; it must be int32 or int64")
    check.shape(op, "index", index, tuple(x.shape[:-1]), "x.shape[:-1]")
    check.same_device(op, x, index=index)
    if index.is_cpu and values_are_known(index) and index.numel() and int(index.max()) >= n:
        raise ValueError(f"{op}: index holds {int(index.max())}; there are only {n} adapters")
    ranks = [one.shape[0] for one in A_list]
    return Call(x, weight, bias, A_list, B_list, _factors(op, scales, ranks, x), index.to(torch.int64))


def _count(op: str, name: str, given: object) -> int:
    if not hasattr(given, "__len__") or (isinstance(given, Tensor) and given.dim() == 0):
        raise TypeError(f"{op}: {name} is {type(given).__name__}; it must be a sequence, one entry per adapter")
    return len(given)


def _factors(op: str, scales: Sequence[float | Tensor] | Tensor, ranks: list[int], x: Tensor) -> Tensor:
    """``(adapters, largest rank)`` in the accumulation dtype; what lies beyond an adapter's rank does not count."""
    acc, width = torch.promote_types(x.dtype, torch.float32), max(ranks)
    if isinstance(scales, Tensor) and scales.dim() == 2:
        check.shape(op, "scales", scales, (len(ranks), width), "(adapters, largest rank)")
        if not scales.is_floating_point():
            raise TypeError(f"{op}: scales is {check.dtype_name(scales.dtype)}; it must be a floating-point tensor")
        check.same_device(op, x, scales=scales)
        return scales.to(acc).contiguous()
    pairs = [factor(op, f"scales[{i}]", one, rank, x) for i, (one, rank) in enumerate(zip(scales, ranks, strict=True))]
    if all(p is None for _, p in pairs):
        numbers = torch.tensor([number for number, _ in pairs], dtype=acc, device=x.device)
        return numbers[:, None].expand(-1, width).contiguous()
    rows = [
        torch.full((width,), number, dtype=acc, device=x.device) if p is None else F.pad(p, (0, width - p.shape[0]))
        for number, p in pairs
    ]
    return torch.stack(rows)


MULTI = Op("lora_linear_multi", prepare, {"cpu": ("cpp", "reference"), "cuda": ("triton", "reference")})
MULTI.backend("reference", lambda call: [])
kernels.register_backends(MULTI)
