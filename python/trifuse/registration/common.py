"""What the registrations of all ops share: schemas in two names, refusals by device, what autograd refuses."""

from __future__ import annotations

import importlib
import importlib.util
import math
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from trifuse import _library
from trifuse._library import LIB

__all__ = [
    "SCHEMAS",
    "RefusedError",
    "accumulation_dtype",
    "bare",
    "bare_apply",
    "call_eagerly",
    "cpp_refusals",
    "cuda_refusals",
    "define",
    "eager_function",
    "empty_sequence",
    "implement_triton",
    "interpreting",
    "is_eager",
    "is_watched",
    "matrix",
    "needs_grad",
    "no_second_derivative",
    "refuse_forward_mode",
    "state_rows",
    "triton_refusals",
]  # fmt: skip

# The compiled op has a CPU and a CUDA kernel under one name; Triton's has its own, so that a
# machine can have both.
SUFFIXES = ("", "_triton")

SCHEMAS: dict[str, str] = {}
"""The schema of every op that has compiled kernels, by name."""

_TRITON_INSTALLED = importlib.util.find_spec("triton") is not None


def define(name: str, schema: str, fake: Callable[..., Any]) -> None:
    """Define an op under both of its names, with its fake kernel."""
    SCHEMAS[name] = schema
    for suffix in SUFFIXES:
        LIB.define(name + suffix + schema)
        torch.library.register_fake(f"trifuse::{name}{suffix}", fake, lib=LIB)


def implement_triton(module: str, *names: str) -> None:
    """Triton's kernels of these ops are the functions of these names in ``trifuse.triton_kernels.<module>``,
    imported at their first use: importing triton takes a second."""

    def launcher(name: str) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            return getattr(importlib.import_module(f"trifuse.triton_kernels.{module}"), name)(*args)

        return call

    for name in names:
        for device in ("CUDA", "CPU"):
            LIB.impl(f"{name}_triton", launcher(name), device)


def accumulation_dtype(sequence: Tensor, complex: bool = False) -> torch.dtype:
    if sequence.dtype == torch.float64:
        return torch.complex128 if complex else torch.float64
    return torch.complex64 if complex else torch.float32


def empty_sequence(like: Tensor, bld: bool) -> Tensor:
    """An uninitialised (B, D, L) tensor, in memory (B, L, D) if `bld`."""
    batch, dim, seqlen = like.shape
    # A transposed tensor would be a view, which autograd forbids to change in place when an op returns it.
    return like.new_empty_strided((batch, dim, seqlen), (dim * seqlen, 1, dim) if bld else (dim * seqlen, seqlen, 1))


def state_rows(sequence: Tensor, cu_seqlens: Tensor | None) -> int:
    """Rows of a state: one per batch item, or per packed sequence."""
    return sequence.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1


def matrix(x: Tensor) -> Tensor:
    """x as a matrix whose rows are contiguous. Their number is counted: of empty rows torch cannot say it."""
    if x.dim() != 2:
        x = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    return x if x.stride(1) == 1 or x.shape[1] <= 1 else x.contiguous()


def interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def cpp_refusals(call: Any) -> list[str]:
    reasons = []
    if call.device_type != "cpu":
        reasons.append(f"it computes on CPU tensors, and these are on {call.device_type}")
    elif _library.wrong_isa is not None:
        raise ValueError(_library.wrong_isa)
    if _library.missing("cpp") is not None:
        reasons.append(_library.missing("cpp"))
    return reasons


def cuda_refusals(call: Any) -> list[str]:
    reasons = []
    if call.device_type != "cuda":
        reasons.append(f"it computes on CUDA tensors, and these are on {call.device_type}")
    if _library.missing("cuda") is not None:
        reasons.append(_library.missing("cuda"))
    return reasons


def triton_refusals(call: Any, sequence: Tensor) -> list[str]:
    """`sequence`: a tensor of the call in its sequence dtype."""
    reasons = []
    if not _TRITON_INSTALLED:
        reasons.append("the package triton is not installed")
    if call.device_type == "cpu":
        if not interpreting():
            reasons.append("it computes on CUDA tensors (on CPU tensors only with TRITON_INTERPRET=1, for tests)")
        elif sequence.dtype == torch.bfloat16:
            reasons.append("Triton's interpreter computes bfloat16 wrongly")
    elif call.device_type != "cuda":
        reasons.append(f"it computes on CUDA tensors, and these are on {call.device_type}")
    return reasons


def needs_grad(call: Any) -> bool:
    return torch.is_grad_enabled() and any(isinstance(one, Tensor) and one.requires_grad for one in call)


def refuse_forward_mode(op: str, call: Any) -> None:
    """A tangent would be dropped in silence: torch gives ops of a library no forward-mode derivative."""
    if forward_ad._current_level < 0:
        return
    if any(isinstance(one, Tensor) and forward_ad.unpack_dual(one).tangent is not None for one in call):
        raise RuntimeError(
            f'{op}: a native kernel has no forward-mode derivative; compute it under trifuse.backend("reference")'
        )


def no_second_derivative(op: str) -> Callable[..., tuple]:
    """The autograd formula of a backward op."""

    def refuse(ctx: Any, *grads: Tensor | None) -> tuple:
        raise RuntimeError(
            f"{op}: a native kernel has no second derivative; compute the forward pass under "
            'trifuse.backend("reference"), which can be differentiated any number of times'
        )

    return refuse


def eager_function(name: str, setup_context: Callable[..., None], backward: Callable[..., tuple]) -> Callable[..., Any]:
    """An op with the autograd formula that is registered for it, called without the ways of an op that anything may
    trace: those cost more than a small layer. Where something does trace, it is the op itself."""
    op = getattr(torch.ops.trifuse, name).default

    class Eager(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> Any:
            with torch._C._AutoDispatchBelowAutograd():
                output = op(*args)
            setup_context(ctx, args, output)
            return output

        @staticmethod
        def backward(ctx: Any, *grads: Tensor | None) -> tuple:
            return backward(ctx, *grads)

    Eager.__name__ = Eager.__qualname__ = name

    def call(*args: Any) -> Any:
        if not is_eager(args):
            return op(*args)
        if needs_grad(args):
            return Eager.apply(*args)
        with torch._C._AutoDispatchBelowAutograd():
            return op(*args)

    return call


def call_eagerly(name: str, *args: Any) -> Any:
    """An op without the ways of autograd, where no gradient is recorded and nothing looks on."""
    op = getattr(torch.ops.trifuse, name).default
    if torch.is_grad_enabled() or not is_eager(args):
        return op(*args)
    with torch._C._AutoDispatchBelowAutograd():
        return op(*args)


def is_eager(args: Any) -> bool:
    """Whether plain tensors are computed on, with nothing that looks on."""
    return not is_watched() and all(type(one) in PLAIN for one in args if isinstance(one, Tensor))


# Beside the product of one row with a large weight, whose stream empties the caches, every name that is looked up takes
# a tenth of a microsecond.
_is_compiling = torch.compiler.is_compiling
_dispatch_modes = torch._C._len_torch_dispatch_stack
_functorch_level = torch._C._functorch.maybe_current_level
_jit_trace = torch._C._get_tracing_state


def is_watched() -> bool:
    """Whether something looks on: torch.compile, a mode, a transformation."""
    return (
        _is_compiling() or _dispatch_modes() != 0 or _functorch_level() is not None or _jit_trace() is not None
    )  # fmt: skip


PLAIN = (Tensor, torch.nn.Parameter)


class RefusedError(Exception):
    """The arguments are not what a plain way takes."""


def bare(name: str) -> Callable[..., Any]:
    """An op without the Python that torch puts around it: for calls that nothing looks on."""
    op = getattr(torch.ops.trifuse, name).default
    return getattr(op, "_op", op)


def bare_apply(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """``apply`` without the Python that torch puts around it, which looks for transformations."""
    return super(torch.autograd.Function, function).apply
