"""``lora_linear``: arguments, checks, and the choice of a kernel."""

from __future__ import annotations

import numbers
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from trifuse import _library, reference
from trifuse.backends import Op, _forced
from trifuse.ops import _checks as check
from trifuse.registration import common
from trifuse.registration import lora_linear as kernels

__all__ = ["lora_linear"]


class Call(NamedTuple):
    """A checked call, cast as autocast asks; the factor of rank i is ``scale * p[i]``."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    lora_A: Tensor
    lora_B: Tensor
    scale: float
    p: Tensor | None
    active_rank: int
    frozen: bool
    dropout: float
    seed: Tensor | None

    @property
    def device_type(self) -> str:
        return self.x.device.type

    def summary(self) -> str:
        rows = self.x.numel() // max(self.x.shape[-1], 1)
        ranks = f"rank {self.active_rank} of {self.lora_A.shape[0]}"
        dropout = f", dropout {self.dropout:g}" if self.seed is not None else ""
        return (
            f"rows {rows}, {self.x.shape[-1]} -> {self.weight.shape[0]}, {ranks}, {check.dtype_name(self.x.dtype)}, "
            f"adapter {check.dtype_name(self.lora_A.dtype)}{dropout}, {self.x.device}"
        )


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scale: float | Tensor = 1.0,
    *,
    active_rank: int | None = None,
    frozen: bool = False,
    dropout: float = 0.0,
    seed: int | Tensor | None = None,
    training: bool = True,
) -> Tensor:
    """A linear layer and its low-rank adapter as one op: ``x Wᵀ + bias + ((dropout(x) Aᵀ) * scale) Bᵀ``.

    The adapter rides along: its product is what the base product is added to, forward and backward. Kept for the
    backward pass are x, ``dropout(x) Aᵀ`` and the seed. On a CPU, ``x (W + scale B A)ᵀ`` is computed instead where
    that costs less (float32 and float64 weights, no dropout, many rows).

    Args:
        x: ``(..., K)``: float32, float16, bfloat16 or float64. Any strides; rows may be none.
        weight: ``(N, K)`` in the dtype of x, with or without a gradient; bias: ``(N,)`` or None. Under autocast x,
            weight and bias are cast as ``torch.nn.functional.linear`` casts them.
        lora_A: ``(r, K)``; lora_B: ``(N, r)``: both in the dtype of x, or in float32 beside half precision.
        scale: a number, or ``(r,)``, one per rank and differentiable: ``alpha / r`` is LoRA, ``alpha / sqrt(r)``
            rank-stabilised LoRA, ``alpha / b`` with ``active_rank=b`` DyLoRA, sums over nested ranks Matryoshka LoRA.
        active_rank: b, 1 to r: only the first b rows of A and columns of B are read; the others' gradients are 0.
        frozen: only row b - 1 of A and column b - 1 of B (and of scale) get a gradient (DyLoRA's frozen mode).
        dropout: the share of x's elements that the adapter does not see, in [0, 1); applies if ``training``.
        seed: of the dropout mask: a whole number, or an int64 tensor of one element on the device of x. By default
            drawn from torch's generator, so that activation checkpointing draws it again. The mask is a function of
            seed, row and column (``trifuse.reference.lora_dropout_mask``), the same on every backend.
        training: False turns dropout off.

    Returns:
        ``(..., N)`` in the dtype of x.

    Raises:
        TypeError, ValueError: naming the argument, what it was and what it must be.
        BackendUnavailable: a backend was forced that cannot serve the call.
        RuntimeError: a second or a forward-mode derivative was asked of a native kernel.

    Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021 (arXiv 2106.09685); Valipour et al.,
    "DyLoRA", 2022 (arXiv 2210.07558); Kalajdzievski, "A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA",
    2023 (arXiv 2312.03732).
    """
    if is_plain(x, weight, bias, lora_A, lora_B, scale, dropout, seed, training):
        rate, rank = 0.0, active_rank
        if dropout and training:  # the seed is drawn once, whichever way is taken
            rate, seed = float(dropout), dropout_seed("lora_linear", x, dropout, seed, True)
        if rank is None and lora_A.dim():
            rank = lora_A.shape[0]
        if type(rank) is int and 0 < rank < 2**31:
            y = kernels.plain(x, weight, bias, lora_A, lora_B, float(scale), rank, bool(frozen), rate, seed)
            if y is not None:
                return y
    call = prepare(
        x, weight, bias, lora_A, lora_B, scale, active_rank=active_rank, frozen=frozen, dropout=dropout, seed=seed,
        training=training,
    )  # fmt: skip
    name = LINEAR.choose(call, call.device_type, call.x.numel())
    if name != "reference":
        return kernels.linear(name, call)
    factor = call.scale if call.p is None else call.p
    if call.frozen and call.p is not None:
        last = call.active_rank - 1
        factor = torch.cat((factor[:last].detach(), factor[last:]))
    return reference.lora_linear(
        *call[:5], factor, active_rank=call.active_rank, frozen=call.frozen, dropout=call.dropout, seed=call.seed
    )


_HAS_KERNEL = _library.missing("cpp") is None and _library.wrong_isa is None
_NUMBERS = (float, int)
_autocast = torch.is_autocast_enabled


def is_plain(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_A: Tensor, lora_B: Tensor, scale: object, dropout: object,
    seed: object, training: bool,
) -> bool:  # fmt: skip
    """Whether a call may be one for the kernels that look at their arguments themselves: plain tensors on a CPU, with
    nothing that looks on. A seed beside no dropout goes the long way, which checks it."""
    known = common.PLAIN
    return (
        type(x) in known and type(weight) in known and type(lora_A) in known and type(lora_B) in known
        and (bias is None or type(bias) in known) and type(scale) in _NUMBERS and type(dropout) in _NUMBERS
        and 0 <= dropout < 1 and (seed is None or (training and dropout > 0)) and not common.is_watched()
        and _HAS_KERNEL and x.is_cpu and weight.is_cpu and lora_A.is_cpu and lora_B.is_cpu
        and (bias is None or bias.is_cpu) and _forced.name in (None, "cpp") and not _autocast("cpu")
        and forward_ad._current_level < 0
    )  # fmt: skip


def plain_inference(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, lora_A: Tensor | None, lora_B: Tensor | None, scale: float,
    active_rank: int,
) -> Tensor | None:  # fmt: skip
    """The output of a layer that drops nothing, where no gradient is recorded and the plain way takes it; else None."""
    if not is_plain(x, weight, bias, lora_A, lora_B, scale, 0.0, None, False):
        return None
    return kernels.plain(x, weight, bias, lora_A, lora_B, scale, active_rank, False, 0.0, None)


def prepare(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scale: float | Tensor = 1.0,
    *,
    active_rank: int | None = None,
    frozen: bool = False,
    dropout: float = 0.0,
    seed: int | Tensor | None = None,
    training: bool = True,
    op: str = "lora_linear",
) -> Call:
    """Check the arguments of ``lora_linear``, or of `op`, and bring them to one form."""
    x, weight, bias = check.linear(op, x, weight, bias)
    lora_A, lora_B = adapter(op, x, weight, lora_A, lora_B)
    rank = lora_A.shape[0]
    if active_rank is None:
        active_rank = rank
    elif not isinstance(active_rank, numbers.Integral) or isinstance(active_rank, bool):
        raise TypeError(f"{op}: active_rank is {type(active_rank).__name__}; it must be an int")
    elif not 1 <= active_rank <= rank:
        raise ValueError(f"{op}: active_rank is {active_rank}; it must be 1 to the rank of lora_A, {rank}")
    scale, p = factor(op, "scale", scale, rank, x)
    seed = dropout_seed(op, x, dropout, seed, training)
    return Call(x, weight, bias, lora_A, lora_B, scale, p, active_rank, bool(frozen), float(dropout), seed)


def adapter(
    op: str, x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, where: str = ""
) -> tuple[Tensor, Tensor]:
    """Check the two factors; their rows are contiguous afterwards."""
    if isinstance(lora_A, Tensor) and isinstance(lora_B, Tensor) and lora_A.dim() == 2:  # the usual, at one look
        rank, dtype, device = lora_A.shape[0], lora_A.dtype, lora_A.device
        known = dtype == x.dtype or (dtype == torch.float32 and x.dtype in (torch.bfloat16, torch.float16))
        shapes = rank > 0 and lora_A.shape[1] == weight.shape[1] and lora_B.shape == (weight.shape[0], rank)
        alike = lora_B.dtype == dtype and lora_B.device == device == x.device
        if known and shapes and alike and lora_A.is_contiguous() and lora_B.is_contiguous():
            return lora_A, lora_B
    name_A, name_B = ("lora_A", "lora_B") if not where else (f"A_list[{where}]", f"B_list[{where}]")
    check.tensors(op, **{name_A: lora_A, name_B: lora_B})
    check.rank(op, name_A, lora_A, 2, "(r, K)")
    out, columns = weight.shape
    rank = lora_A.shape[0]
    if rank < 1:
        raise ValueError(f"{op}: {name_A} has shape {tuple(lora_A.shape)}; its rank must be at least 1")
    check.shape(op, name_A, lora_A, (rank, columns), "(r, K)")
    check.shape(op, name_B, lora_B, (out, rank), "(N, r)")
    check.same_dtype(op, name_B, lora_B, name_A, lora_A)
    check.weight_dtype(op, name_A, lora_A, x)
    if x.dtype == torch.float64 and lora_A.dtype != torch.float64:
        lora_A, lora_B = lora_A.double(), lora_B.double()
    check.same_device(op, x, **{name_A: lora_A, name_B: lora_B})
    return rows(lora_A), rows(lora_B)


def rows(matrix: Tensor) -> Tensor:
    return matrix if matrix.stride(1) == 1 or matrix.shape[1] <= 1 else matrix.contiguous()


def factor(op: str, name: str, scale: float | Tensor, rank: int, x: Tensor) -> tuple[float, Tensor | None]:
    """A scale as a number and a vector whose product it is."""
    if isinstance(scale, Tensor):
        if scale.dim() == 0:
            scale = scale.expand(rank)
        check.shape(op, name, scale, (rank,), "a number or (r,)")
        if not scale.is_floating_point():
            raise TypeError(f"{op}: {name} is {check.dtype_name(scale.dtype)}; it must be a floating-point tensor")
        check.same_device(op, x, **{name: scale})
        return 1.0, scale.to(torch.promote_types(x.dtype, torch.float32)).contiguous()
    if isinstance(scale, bool) or not isinstance(scale, numbers.Real):
        raise TypeError(f"{op}: {name} is {type(scale).__name__}; it must be a number or a tensor (r,)")
    return float(scale), None


def dropout_seed(op: str, x: Tensor, dropout: float, seed: int | Tensor | None, training: bool) -> Tensor | None:
    """The seed of a call as a tensor, or None where nothing is dropped."""
    if isinstance(dropout, bool) or not isinstance(dropout, numbers.Real):
        raise TypeError(f"{op}: dropout is {type(dropout).__name__}; it must be a number")
    if not 0 <= dropout < 1:
        raise ValueError(f"{op}: dropout is {dropout}; it must be in [0, 1)")
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64 or seed.numel() != 1:
            was = f"{check.dtype_name(seed.dtype)} of shape {tuple(seed.shape)}"
            raise TypeError(f"{op}: seed is {was}; it must be a number or an int64 tensor of one element")
        check.same_device(op, x, seed=seed)
        seed = seed.reshape(1)
    elif seed is not None and (isinstance(seed, bool) or not isinstance(seed, numbers.Integral)):
        raise TypeError(f"{op}: seed is {type(seed).__name__}; it must be a number or an int64 tensor of one element")
    if not training or dropout == 0:
        return None
    if seed is None:
        return torch.randint(2**63 - 1, (1,), dtype=torch.int64, device=x.device)
    if not isinstance(seed, Tensor):
        seed = torch.tensor([(int(seed) + 2**63) % 2**64 - 2**63], dtype=torch.int64, device=x.device)
    return seed


LINEAR = Op("lora_linear", prepare, {"cpu": ("cpp", "reference"), "cuda": ("cuda", "triton", "reference")})
LINEAR.backend("reference", lambda call: [])
kernels.register_backends(LINEAR)
