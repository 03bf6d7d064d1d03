"""Adapters that were read from somewhere: checked against a model, and then put on it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from trifuse.nn import apply_lora, mark_only_lora_as_trainable

__all__ = ["Adapter", "check_adapters", "check_model", "few", "is_transposed", "layers_with_adapters", "place"]


@dataclass
class Adapter:
    """One layer's adapter: factors as ``nn.LoRALinear`` and ``nn.LoRAEmbedding`` have them."""

    lora_A: Tensor
    lora_B: Tensor
    alpha: float
    magnitude: Tensor | None = None

    @property
    def rank(self) -> int:
        return self.lora_A.shape[0]


def few(names: Iterable[str]) -> str:
    names = sorted(names)
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def is_transposed(module: nn.Module) -> bool:
    """Whether a module is transformers' Conv1D, or that with an adapter; asked without importing it."""
    return any(
        kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils" for kind in type(module).__mro__
    )


def layers_with_adapters(model: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in model.named_modules() if getattr(module, "has_adapter", False)}


def check_model(caller: str, model: nn.Module) -> None:
    """Raise ValueError if a model has adapters, of trifuse or of PEFT."""
    taken = list(layers_with_adapters(model))
    taken += [name for name, one in model.named_modules() if hasattr(one, "base_layer") and hasattr(one, "lora_A")]
    if taken:
        raise ValueError(f"{caller}: the model has adapters already ({few(taken)}); it must be one without")


def check_adapters(caller: str, model: nn.Module, adapters: Mapping[str, Adapter]) -> None:
    """Raise ValueError where an adapter does not fit the layer of its name."""
    for name, one in adapters.items():
        module = model.get_submodule(name)
        if isinstance(module, nn.Embedding):
            out, columns = module.embedding_dim, module.num_embeddings
        elif isinstance(module, nn.Linear):
            out, columns = module.out_features, module.in_features
        elif is_transposed(module) and type(module).__name__ == "Conv1D" and "forward" not in module.__dict__:
            columns, out = module.weight.shape
        else:
            raise ValueError(
                f"{caller}: {name!r} is a {type(module).__name__}; an adapter can be loaded onto a torch.nn.Linear, an "
                "Embedding or transformers' Conv1D"
            )
        if one.magnitude is not None and not isinstance(module, nn.Linear):
            raise ValueError(f"{caller}: {name!r} is a {type(module).__name__}; DoRA must be of a torch.nn.Linear")
        expected = {"lora_A": (one.rank, columns), "lora_B": (out, one.rank), "magnitude": (out,)}
        for part, shape in expected.items():
            tensor = getattr(one, part)
            if tensor is not None and tuple(tensor.shape) != shape:
                raise ValueError(
                    f"{caller}: {part} of {name!r} has shape {tuple(tensor.shape)}; for a layer {columns} -> {out} and "
                    f"rank {one.rank} it must be {shape}"
                )


def _transposed(conv: nn.Module, one: Adapter, options: Mapping[str, Any]) -> nn.Module:
    from trifuse.integrations.transposed import LoRATransposed

    return LoRATransposed.from_conv1d(conv, one.rank, alpha=one.alpha, **options)


def _place_plain(model: nn.Module, adapters: Mapping[str, Adapter], bias: str, options: Mapping[str, Any]) -> None:
    if not adapters:
        return
    # A name as an expression is asked for whole, and the longest first: another may end with it.
    plain = {_exactly(name): adapters[name] for name in sorted(adapters, key=len, reverse=True)}
    dora = any(one.magnitude is not None for one in plain.values())
    apply_lora(
        model, list(plain), kind="dora" if dora else "lora", bias=bias,
        rank_pattern={pattern: one.rank for pattern, one in plain.items()},
        alpha_pattern={pattern: one.alpha for pattern, one in plain.items()}, **options,
    )  # fmt: skip


def place(
    model: nn.Module,
    adapters: Mapping[str, Adapter],
    *,
    scaling: str = "lora",
    dropout: float = 0.0,
    bias: str = "none",
    adapter_dtype: torch.dtype | None = None,
) -> None:
    """Put adapters that were checked on a model, in place; they and the biases of ``bias`` are trained, no others."""
    options = {"scaling": scaling, "dropout": dropout, "adapter_dtype": adapter_dtype}
    transposed = [name for name in adapters if is_transposed(model.get_submodule(name))]
    before = [(one, one.requires_grad) for one in model.parameters()]
    try:
        layers = {name: _transposed(model.get_submodule(name), adapters[name], options) for name in transposed}
        _place_plain(model, {name: one for name, one in adapters.items() if name not in layers}, bias, options)
    except Exception:  # an adapter was refused, and none is on the model
        for one, required in before:
            one.requires_grad_(required)
        raise
    for name, layer in layers.items():
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, layer)
    if transposed:
        mark_only_lora_as_trainable(model, bias)
    with torch.no_grad():
        for name, one in adapters.items():
            layer = model.get_submodule(name)
            layer.lora_A.copy_(one.lora_A)
            layer.lora_B.copy_(one.lora_B)
            if one.magnitude is not None:
                layer.lora_magnitude.copy_(one.magnitude)


def _exactly(name: str) -> str:
    return f"(?:{re.escape(name)})"
