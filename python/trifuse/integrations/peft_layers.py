"""The LoRA layers of a live PEFT model on trifuse's kernels, and back."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from types import ModuleType

from torch import nn

__all__ = ["Acceleration", "accelerate_peft", "restore_peft"]


@dataclass(frozen=True)
class Acceleration:
    """What ``accelerate_peft`` did with each LoRA layer of a model, by name.

    Args:
        fused: the layers that run on trifuse.
        left: those that PEFT computes as before, and why.
        sometimes: fused layers, and when PEFT computes them.
    """

    fused: tuple[str, ...]
    left: dict[str, str]
    sometimes: dict[str, str]

    def __str__(self) -> str:
        lines = [f"{len(self.fused)} of {len(self.fused) + len(self.left)} LoRA layers are fused"]
        lines += [f"{name} stays PEFT's: {why}" for name, why in self.left.items()]
        lines += [f"{name} is PEFT's in some calls: {when}" for name, when in self.sometimes.items()]
        return "\n".join(lines)


def accelerate_peft(model: nn.Module) -> Acceleration:
    """Compute the LoRA layers of a PEFT model by ``trifuse.lora_linear``, ``dora_linear`` and ``lora_linear_multi``.

    In place, and only a layer's ``forward`` changes: parameters, names, ``state_dict()`` and all that PEFT does with
    them (``set_adapter``, ``merge_adapter``, ``disable_adapter``, ``save_pretrained``, ...) stay PEFT's, and
    ``restore_peft`` gives the very same layers back. Fused are linear layers and transformers' Conv1D with one or
    several active adapters, with rank-stabilised scales, dropout (a mask of trifuse's own, of the same distribution),
    DoRA, float32 adapters beside half precision, autocast, and with ``adapter_names`` (mixed batches). A call that
    is none of these goes to PEFT's own forward: disabled or merged adapters; several adapters at once of which one
    is DoRA's, or drops out; DoRA in training with dropout, which PEFT gives the base product too; dtypes that the
    functions don't take; functional transforms. In half precision what DoRA's factors scale is rounded to the layer's
    dtype, also beside float32 adapters, where PEFT computes in float32. A second derivative through a fused layer
    raises and says so: ``restore_peft`` first.

    The model can be copied and pickled; unpickling it needs trifuse. Adapters that are added later count; layers that
    get their first adapter later need another call.

    Args:
        model: a ``peft.PeftModel``, or whatever holds PEFT's LoRA layers.

    Returns:
        which layers are fused, which are not, and why.

    Raises:
        ImportError: PEFT is not installed.
        ValueError: the model has no LoRA layers of PEFT.
    """
    peft = _peft("accelerate_peft")
    fused, left, sometimes = [], {}, {}
    for name, layer in _lora_layers("accelerate_peft", peft, model):
        why = peft.why_left(layer)
        if why is not None:
            left[name] = why
            continue
        layer.__class__ = peft.FusedLinear
        fused.append(name)
        when = peft.exceptions(layer)
        if when:
            sometimes[name] = when
    return Acceleration(tuple(fused), left, sometimes)


def restore_peft(model: nn.Module) -> tuple[str, ...]:
    """Give the layers that ``accelerate_peft`` changed PEFT's own forward back.

    Args:
        model: a model with PEFT's LoRA layers.

    Returns:
        the names of those layers; none if nothing was accelerated.

    Raises:
        ImportError: PEFT is not installed.
        ValueError: the model has no LoRA layers of PEFT.
    """
    peft = _peft("restore_peft")
    restored = []
    for name, layer in _lora_layers("restore_peft", peft, model):
        if type(layer) is peft.FusedLinear:
            layer.__class__ = peft.lora.Linear
            restored.append(name)
    return tuple(restored)


def _peft(caller: str) -> ModuleType:
    try:
        return importlib.import_module("trifuse.integrations.peft_fused")
    except ImportError as error:
        raise ImportError(f"{caller}: PEFT is not installed, or is another than trifuse knows ({error})") from error


def _lora_layers(caller: str, peft: ModuleType, model: nn.Module) -> list[tuple[str, nn.Module]]:
    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, peft.lora.LoraLayer)]
    if not layers:
        raise ValueError(
            f"{caller}: the model, a {type(model).__name__}, has no LoRA layers of PEFT; adapters of trifuse are fused "
            "already, and trifuse.apply_lora makes them"
        )
    return layers
