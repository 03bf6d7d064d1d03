"""PEFT's LoRA layer of a linear layer with a forward of trifuse, and what that forward leaves to PEFT's.

The module imports PEFT: it is for ``peft_layers``, and for unpickling a model that was accelerated.
"""

from __future__ import annotations

import numbers
from typing import Any, NamedTuple

import torch
from peft.tuners.lora import dora
from peft.tuners.lora import layer as lora
from peft.tuners.lora.variants import DoraLinearVariant
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules.module import _has_any_global_hook
from transformers.pytorch_utils import Conv1D

from trifuse import ops

__all__ = ["FusedLinear", "exceptions", "lora", "why_left"]

_HALF = (torch.float16, torch.bfloat16)
_DEVICES = ("cpu", "cuda")
_TENSORS = (Tensor, nn.Parameter)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class Adapter(NamedTuple):
    """One active adapter of a layer, as the functions of trifuse take it."""

    name: str
    lora_A: Tensor
    lora_B: Tensor
    scale: float
    dropout: float  # that applies now
    magnitude: Tensor | None  # of DoRA


class FusedLinear(lora.Linear):
    """``peft.tuners.lora.layer.Linear`` with the base product and the adapters' in one op.

    Everything but ``forward`` is PEFT's, and so is that of a call that trifuse does not reproduce.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """``(..., in_features)`` to ``(..., out_features)``; ``adapter_names`` as PEFT has it, and trainable."""
        result = None
        names = kwargs.get("adapter_names")
        if not (args or self.disable_adapters or self.merged or _unknown(kwargs)):
            result = self._together(x) if names is None else self._mixed(x, names)
        return super().forward(x, *args, **kwargs) if result is None else result

    def _together(self, x: Tensor) -> Tensor | None:
        """Every active adapter on every row; None where PEFT has to compute it."""
        names = [name for name in self.active_adapters if name in self.lora_A]
        if not names or _refusal(self) is not None or any(_refusal_of_adapter(self, name) for name in names):
            return None
        adapters = [_adapter(self, name) for name in names]
        if not _fits(self, x, adapters):
            return None
        weight, bias = _weight_and_bias(self)
        if adapters[0].magnitude is not None:
            one = adapters[0]
            drops = self.training and not isinstance(self.lora_dropout[one.name], nn.Identity)
            if len(adapters) > 1 or drops or x.dim() < 2:  # of one vector PEFT makes a matrix
                return None
            return ops.dora_linear(x, weight, bias, one.lora_A, one.lora_B, one.magnitude, one.scale)
        if len(adapters) == 1:
            (one,) = adapters
            return ops.lora_linear(x, weight, bias, one.lora_A, one.lora_B, one.scale, dropout=one.dropout)
        if any(one.dropout or one.magnitude is not None for one in adapters):
            return None
        return ops.lora_linear(x, weight, bias, *_side_by_side(adapters))

    def _mixed(self, x: Tensor, names: list[str]) -> Tensor | None:
        """An adapter of its own for each entry of the batch, or none (``"__base__"``)."""
        self._check_forward_args(x, adapter_names=names)
        used = [name for name in dict.fromkeys(names) if name in self.lora_A]
        if not used or _refusal(self) is not None or any(_refusal_of_adapter(self, name) for name in used):
            return None
        adapters = [_adapter(self, name) for name in used]
        if not _fits(self, x, adapters) or any(one.dropout or one.magnitude is not None for one in adapters):
            return None
        places = {name: place for place, name in enumerate(used)}
        index = torch.tensor([places.get(name, -1) for name in names], device=x.device)
        index = index.view(-1, *(1 for _ in x.shape[1:-1])).expand(x.shape[:-1])
        return ops.lora_linear_multi(
            x, *_weight_and_bias(self), [one.lora_A for one in adapters], [one.lora_B for one in adapters],
            [one.scale for one in adapters], index,
        )  # fmt: skip


def why_left(layer: nn.Module) -> str | None:
    """Why a LoRA layer stays PEFT's; None if it is, or can be, a ``FusedLinear``."""
    if type(layer) is lora.Embedding:
        return "it is an embedding, for which trifuse has no kernel"
    if type(layer) not in (lora.Linear, FusedLinear):
        return f"it is a {type(layer).__name__}; trifuse reproduces peft.tuners.lora.layer.Linear"
    if "forward" in layer.__dict__:
        return "it has a forward of its own"
    why = _refusal(layer)
    if why is not None:
        return why
    reasons = {name: _refusal_of_adapter(layer, name) for name in layer.lora_A}
    if reasons and all(reasons.values()):
        return "; ".join(f"of adapter {name!r}: {reason}" for name, reason in reasons.items())
    return None


def exceptions(layer: nn.Module) -> str:
    """When a ``FusedLinear`` leaves a call to PEFT, as far as its adapters tell; empty if they don't."""
    when, weight = [], layer.base_layer.weight.dtype
    for name in layer.lora_A:
        reason, dtype = _refusal_of_adapter(layer, name), layer.lora_A[name].weight.dtype
        if reason is not None:
            when.append(f"adapter {name!r} is active, and {reason}")
            continue
        if name in layer.lora_variant and not isinstance(layer.lora_dropout[name], nn.Identity):
            when.append(f"adapter {name!r} is active in training, and PEFT's dropout before DoRA is the base's too")
        if dtype != weight and not (dtype == torch.float32 and weight in _HALF):
            when.append(f"adapter {name!r} is active without autocast, and is {dtype} beside {weight}")
    return "; ".join(when)


def _refusal(layer: nn.Module) -> str | None:
    """Why a LoRA layer's base layer, as it is now, is left to PEFT; None if it is not."""
    base = layer.base_layer
    was = type(base).__name__
    if not (isinstance(base, nn.Linear) and type(base).forward is nn.Linear.forward) and type(base) is not Conv1D:
        return f"its base layer is a {was}; trifuse reproduces torch.nn.Linear and transformers' Conv1D"
    if _is_watched(base):
        return f"its base layer, a {was}, has hooks or a forward of its own, which a fused op would not call"
    weight, bias = base.weight, base.bias
    if type(weight) not in _TENSORS or not (bias is None or type(bias) in _TENSORS):
        return f"the weight of its base layer is a {type(weight).__name__}; it must be a plain tensor"
    if not weight.is_floating_point() or weight.element_size() == 1:
        return f"the weight of its base layer is {weight.dtype}; it must be float32, float64 or half precision"
    if layer.fan_in_fan_out != (type(base) is Conv1D):
        return f"fan_in_fan_out is {layer.fan_in_fan_out}, and its base layer is a {was}"
    return None


def _refusal_of_adapter(layer: nn.Module, name: str) -> str | None:
    """Why an adapter of a layer, as it is now, is left to PEFT; None if it is not."""
    variant = layer.lora_variant.get(name)
    if variant is not None and type(variant) is not DoraLinearVariant:
        return f"it is a variant of LoRA, {type(variant).__name__}"
    lora_A, lora_B, dropout = layer.lora_A[name], layer.lora_B[name], layer.lora_dropout[name]
    if type(lora_A) is not nn.Linear or type(lora_B) is not nn.Linear:
        return f"lora_A is a {type(lora_A).__name__} and lora_B a {type(lora_B).__name__}; they must be torch.nn.Linear"
    if lora_A.bias is not None or lora_B.bias is not None:
        return "it has a bias of its own (lora_bias)"
    if type(dropout) not in (nn.Identity, nn.Dropout) or getattr(dropout, "p", 0.0) >= 1:
        return f"its dropout is {dropout}; it must be torch.nn.Dropout of less than 1"
    parts = [lora_A, lora_B, dropout]
    if variant is not None:
        parts.append(layer.lora_magnitude_vector[name])
        if type(parts[-1]) is not dora.DoraLinearLayer:
            return f"its magnitude is a {type(parts[-1]).__name__}; it must be DoraLinearLayer"
    if any(_is_watched(part) for part in parts):
        return "one of its modules has hooks or a forward of its own, which a fused op would not call"
    if type(lora_A.weight) not in _TENSORS or type(lora_B.weight) not in _TENSORS:
        return f"its weight is a {type(lora_A.weight).__name__}; it must be a plain tensor"
    if not isinstance(layer.scaling[name], numbers.Real):
        return f"its scale is a {type(layer.scaling[name]).__name__}; it must be a number"
    return None


def _unknown(kwargs: dict[str, Any]) -> bool:
    """Whether something came that the base layer or a variant of LoRA would get."""
    return any(value is not None and name != "adapter_names" for name, value in kwargs.items())


def _is_watched(module: nn.Module) -> bool:
    own = module.__dict__
    return "forward" in own or any(own[hooks] for hooks in _HOOKS)


def _is_looked_on() -> bool:
    """Whether there is a derivative that the fused ops do not have, a transform, or who wants to see every module."""
    transformed = torch._C._functorch.maybe_current_level() is not None
    return forward_ad._current_level >= 0 or transformed or _has_any_global_hook()


def _weight_and_bias(layer: nn.Module) -> tuple[Tensor, Tensor | None]:
    base = layer.base_layer
    return (base.weight.t() if type(base) is Conv1D else base.weight), base.bias


def _adapter(layer: nn.Module, name: str) -> Adapter:
    dropout = layer.lora_dropout[name]
    return Adapter(
        name, layer.lora_A[name].weight, layer.lora_B[name].weight, layer.scaling[name],
        dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0,
        layer.lora_magnitude_vector[name].weight if name in layer.lora_variant else None,
    )  # fmt: skip


def _fits(layer: nn.Module, x: Tensor, adapters: list[Adapter]) -> bool:
    """Whether the tensors of a call are such that PEFT's casts, and torch's, are those of the fused ops."""
    if type(x) not in _TENSORS or not x.is_floating_point() or x.device.type not in _DEVICES:
        return False
    if not torch.compiler.is_compiling() and _is_looked_on():
        return False
    weight, kind = layer.base_layer.weight, x.device.type
    dtype = x.dtype
    if torch.is_autocast_enabled(kind) and torch.float64 not in (x.dtype, weight.dtype):
        dtype = torch.get_autocast_dtype(kind)
    elif weight.dtype != dtype or not layer.cast_input_dtype_enabled:
        return False
    factor = adapters[0].lora_A.dtype
    if factor != dtype and not (factor == torch.float32 and dtype in _HALF):
        return False
    if dora.ENABLE_DORA_CACHING and not layer.training and adapters[0].magnitude is not None:
        return False
    return all(
        one.device == x.device and one.dtype in ((factor,) if place < 2 else (dtype, torch.float32))
        for adapter in adapters
        for place, one in enumerate((adapter.lora_A, adapter.lora_B, adapter.magnitude))
        if one is not None
    )


def _side_by_side(adapters: list[Adapter]) -> tuple[Tensor, Tensor, float | Tensor]:
    """Several adapters as one, whose rank is the sum of theirs."""
    A = torch.cat([one.lora_A for one in adapters])
    B = torch.cat([one.lora_B for one in adapters], dim=1)
    scales = [one.scale for one in adapters]
    if len(set(scales)) == 1:
        return A, B, scales[0]
    wide = torch.promote_types(A.dtype, torch.float32)
    each = [float(one.scale) for one in adapters for _ in range(one.lora_A.shape[0])]
    return A, B, torch.tensor(each, dtype=wide, device=A.device)
