"""Adapters as loralib's state dicts have them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from trifuse.integrations.placing import Adapter, check_adapters, check_model, few, is_transposed, place

__all__ = ["load_loralib"]

_CALLER = "load_loralib"


def load_loralib(
    model: nn.Module,
    state_dict: Mapping[str, Tensor],
    alpha: float = 1.0,
    *,
    dropout: float = 0.0,
    enable_lora: Sequence[bool] | None = None,
    adapter_dtype: torch.dtype | None = None,
) -> nn.Module:
    """Put adapters of loralib on a model, in place, as layers of trifuse.

    ``loralib.Linear`` and ``Embedding`` have the names and shapes of ``nn.LoRALinear`` and ``nn.LoRAEmbedding``, which
    therefore load such a state dict by ``load_state_dict(..., strict=False)`` too. Of ``MergedLinear`` the adapters of
    its parts become one, whose ``lora_B`` holds each part's in its own rows and columns; trained on, it may couple the
    parts. A state dict that loralib made in evaluation mode has the update in its weights already, and gives it twice.

    Args:
        model: the base model, without adapters.
        state_dict: of ``loralib.lora_state_dict(model)``, or of the whole model: weights and biases in it are loaded.
        alpha: loralib's ``lora_alpha``, which the state dict does not hold; the scale is ``alpha / r``.
        dropout: of the linear layers.
        enable_lora: of ``MergedLinear``: which parts of a layer's outputs have adapters; by default all.
        adapter_dtype: as in ``nn.LoRALinear``.

    Returns:
        the model; its adapters are trained, everything else is frozen.

    Raises:
        ValueError: a key names nothing of the model, or a shape does not fit. The model is as it was.
    """
    check_model(_CALLER, model)
    factors: dict[str, dict[str, Tensor]] = {}
    whole: dict[str, Tensor] = {}
    for key, tensor in state_dict.items():
        name, _, part = key.rpartition(".")
        if part in ("lora_A", "lora_B"):
            factors.setdefault(name, {})[part] = tensor
        else:
            whole[key] = tensor
    if not factors:
        raise ValueError(f"{_CALLER}: the state dict has no lora_A; it must be one of loralib")
    modules = dict(model.named_modules())
    if factors.keys() - modules.keys():
        raise ValueError(
            f"{_CALLER}: there are adapters of {few(factors.keys() - modules.keys())}; the model has no such"
        )
    adapters = {name: _adapter(name, modules[name], own, alpha, enable_lora) for name, own in factors.items()}
    check_adapters(_CALLER, model, adapters)
    state = model.state_dict()
    for key, value in whole.items():
        if key not in state or state[key].shape != value.shape:
            has = "nothing of the name" if key not in state else f"one of shape {tuple(state[key].shape)}"
            raise ValueError(f"{_CALLER}: {key} has shape {tuple(value.shape)}; the model has {has}")
    place(model, adapters, dropout=dropout, adapter_dtype=adapter_dtype)
    model.load_state_dict(whole, strict=False)
    return model


def _adapter(
    name: str, module: nn.Module, own: Mapping[str, Tensor], alpha: float, enable_lora: Sequence[bool] | None
) -> Adapter:
    if len(own) < 2 or any(one.dim() != 2 for one in own.values()):
        raise ValueError(f"{_CALLER}: {name!r} must have lora_A and lora_B, matrices")
    A, B = own["lora_A"], own["lora_B"]
    linear = isinstance(module, nn.Linear) or is_transposed(module)
    out = B.shape[0] if not linear else module.weight.shape[1 if is_transposed(module) else 0]
    if A.shape[0] == B.shape[1] and B.shape[0] == out:
        return Adapter(A, B, alpha)
    rank = B.shape[1]
    parts = A.shape[0] // max(rank, 1)
    enabled = [True] * parts if enable_lora is None else [bool(one) for one in enable_lora]
    rows = out // max(len(enabled), 1)
    if rank * parts != A.shape[0] or sum(enabled) != parts or rows * len(enabled) != out or B.shape[0] != rows * parts:
        raise ValueError(
            f"{_CALLER}: lora_A of {name!r} has shape {tuple(A.shape)} and lora_B {tuple(B.shape)}, of a layer with "
            f"{out} outputs and enable_lora {enabled}; they must be of loralib's Linear, Embedding or, with its "
            "enable_lora, MergedLinear"
        )
    together = B.new_zeros(out, A.shape[0])
    places = [place for place, one in enumerate(enabled) if one]
    for part, place_of in enumerate(places):
        columns = slice(part * rank, (part + 1) * rank)
        together[place_of * rows : (place_of + 1) * rows, columns] = B[part * rows : (part + 1) * rows]
    return Adapter(A, together, alpha * parts)
