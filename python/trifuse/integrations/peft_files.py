"""Adapters in PEFT's files, ``adapter_config.json`` and ``adapter_model.safetensors``: read, and written."""

from __future__ import annotations

import json
import os
import re
import warnings
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trifuse.integrations.peft_config import CONFIG, Config, exact_targets, read_config
from trifuse.integrations.placing import (
    Adapter,
    check_adapters,
    check_model,
    few,
    is_transposed,
    layers_with_adapters,
    place,
)
from trifuse.nn import DoRALinear, LoRAConv1d, LoRAEmbedding, LoRALinear, MultiLoRALinear
from trifuse.nn.low_rank import adapted_by

__all__ = ["load_peft", "save_peft"]

TENSORS = "adapter_model.safetensors"
_PREFIX = "base_model.model."
# Endings of the keys, and the part of an adapter that each is.
_PARTS = {
    ".lora_A.weight": "lora_A",
    ".lora_B.weight": "lora_B",
    ".lora_embedding_A": "lora_A",
    ".lora_embedding_B": "lora_B",
    ".lora_magnitude_vector": "magnitude",
    ".lora_magnitude_vector.weight": "magnitude",
}
# Where PEFT refuses to put an adapter, because transformers' own forward passes it by.
_MAMBAS = ("mamba", "mamba2", "falcon_mamba", "falcon_h1", "nemotron_h")
_PASSED_BY = ("out_proj", "conv1d")
# Beside a module that is saved whole, PEFT's bias="all" saves its biases twice more: as they were, and as they are.
_ALSO = ("original_module", "modules_to_save")


def load_peft(
    model: nn.Module, folder: str | os.PathLike[str], *, adapter_dtype: torch.dtype | None = None
) -> nn.Module:
    """Put a LoRA or DoRA adapter that PEFT saved on a model, in place, as layers of trifuse.

    Linear layers become ``nn.LoRALinear`` or ``nn.DoRALinear``, embeddings ``nn.LoRAEmbedding``; transformers' Conv1D
    keeps its transposed weight. Modules that the file holds whole (``modules_to_save``) get its values, and biases that
    it holds, too. The adapters and those modules and biases are trained, everything else is frozen.

    Args:
        model: the base model that the adapter was trained on, without adapters.
        folder: with ``adapter_config.json`` and ``adapter_model.safetensors``.
        adapter_dtype: as in ``nn.LoRALinear``: by default float32 beside half precision.

    Returns:
        the model.

    Raises:
        FileNotFoundError: there is no such folder, or it lacks a file.
        ValueError: the configuration asks for what is not supported, or the file and the model do not fit: a key too
            many or too few, a shape. The message names it, and the model is as it was.
    """
    caller, folder = "load_peft", Path(folder)
    config = read_config(folder)
    check_model(caller, model)
    adapters, whole = _read_tensors(folder, config)
    _check_names(config, model, adapters)
    check_adapters(caller, model, adapters)
    for name, one in adapters.items():
        if one.rank != config.rank_of(name):
            raise ValueError(
                f"{caller}: the adapter of {name!r} has rank {one.rank}; by {CONFIG} it must be {config.rank_of(name)}"
            )
    saved = config.saved(name for name, _ in model.named_modules(remove_duplicate=False))
    _check_whole(config, model, adapters, whole, saved)
    place(
        model, adapters, scaling=config.scaling, dropout=config.lora_dropout, bias=config.bias,
        adapter_dtype=adapter_dtype,
    )  # fmt: skip
    for name in saved:
        _untie(model, name)
    state = model.state_dict(keep_vars=True)
    with torch.no_grad():
        for key, value in whole.items():
            state[key].copy_(value)
    for name in saved:
        model.get_submodule(name).requires_grad_(True)
    return model


def _read_tensors(folder: Path, config: Config) -> tuple[dict[str, Adapter], dict[str, Tensor]]:
    """The adapters by the names of their layers, and the other tensors by those they have in the base model."""
    import safetensors.torch

    path = folder / TENSORS
    if not path.is_file():
        pickled = folder / "adapter_model.bin"
        also = f"; {pickled.name} is a pickle, which is not read: save_pretrained(..., safe_serialization=True)"
        raise FileNotFoundError(f"load_peft: there is no {path}{also if pickled.is_file() else ''}")
    parts: dict[str, dict[str, Tensor]] = {}
    whole: dict[str, Tensor] = {}
    try:
        tensors = safetensors.torch.load_file(path)
    except safetensors.SafetensorError as error:
        raise ValueError(f"load_peft: {path} is no safetensors file ({error})") from error
    for key, tensor in tensors.items():
        key = key.removeprefix(_PREFIX)
        ending = next((one for one in _PARTS if key.endswith(one)), None)
        if ending is None:
            if not any(f".{one}." in key for one in _ALSO):
                whole[key.replace(".base_layer.", ".")] = tensor
        else:
            parts.setdefault(key.removesuffix(ending), {})[_PARTS[ending]] = tensor
    needed = {"lora_A", "lora_B", "magnitude"} if config.use_dora else {"lora_A", "lora_B"}
    for name, own in parts.items():
        if own.keys() != needed:
            raise ValueError(
                f"load_peft: of {name!r} the file holds {', '.join(sorted(own))}; it must be "
                f"{', '.join(sorted(needed))}"
            )
        for part, tensor in own.items():
            if tensor.dim() != (1 if part == "magnitude" else 2) or tensor.numel() == 0:
                raise ValueError(f"load_peft: {part} of {name!r} has shape {tuple(tensor.shape)}; it must be a matrix")
    return {name: Adapter(**own, alpha=config.alpha_of(name)) for name, own in sorted(parts.items())}, whole


def _check_names(config: Config, model: nn.Module, adapters: Mapping[str, Adapter]) -> None:
    """The file has an adapter of each layer that the configuration means, and of no other."""
    modules = dict(model.named_modules())
    strange = adapters.keys() - modules.keys()
    if strange:
        raise ValueError(f"load_peft: the file has adapters of {few(strange)}; the model has no such modules")
    meant = set(adapters) if config.means_all_linear() else config.targets(modules)
    if not adapters or meant - adapters.keys():
        lacking = few(meant - adapters.keys()) or "any layer"
        raise ValueError(f"load_peft: the file lacks the adapters of {lacking}, which {CONFIG} means")
    if adapters.keys() - meant:
        raise ValueError(
            f"load_peft: the file has adapters of {few(adapters.keys() - meant)}, which {CONFIG} does not mean"
        )


def _check_whole(
    config: Config, model: nn.Module, adapters: Mapping[str, Adapter], whole: Mapping[str, Tensor], saved: list[str]
) -> None:
    """What the file holds beside adapters is of the model, and all that must be there is."""
    state = model.state_dict()
    needed = {f"{name}.{key}" for name in saved for key in model.get_submodule(name).state_dict()}
    if config.bias == "all":
        needed |= {key for key in state if key.rpartition(".")[2] == "bias"}
    elif config.bias == "lora_only":
        needed |= {f"{name}.bias" for name in adapters} & state.keys()
    if needed - whole.keys():
        raise ValueError(f"load_peft: the file lacks {few(needed - whole.keys())}")
    if whole.keys() - state.keys():
        raise ValueError(
            f"load_peft: the file has {few(whole.keys() - state.keys())}; the model has nothing of the name"
        )
    for key, value in whole.items():
        if value.shape != state[key].shape:
            raise ValueError(
                f"load_peft: {key} has shape {tuple(value.shape)} in the file; in the model it is "
                f"{tuple(state[key].shape)}"
            )


def _untie(model: nn.Module, name: str) -> None:
    """Give a module parameters of its own where it shares them: as in PEFT, only it gets the file's values."""
    own = model.get_submodule(name)
    inside = {id(module) for module in own.modules()}
    others = {id(p) for module in model.modules() if id(module) not in inside for p in module._parameters.values()}
    for module in own.modules():
        for key, parameter in module._parameters.items():
            if parameter is not None and id(parameter) in others:
                module._parameters[key] = nn.Parameter(parameter.detach().clone())


def save_peft(
    model: nn.Module,
    folder: str | os.PathLike[str],
    base_model_name_or_path: str | None = None,
    task_type: str | None = None,
) -> None:
    """Write a model's adapters so that ``peft.PeftModel.from_pretrained(base, folder)`` gives the same outputs.

    A ``DyLoRALinear`` is written at its active rank and with that rank's scale; an adapter of some rows as one of all,
    with zeros; the factors of nested ranks are multiplied into ``lora_B``. Biases that are trained, and modules that
    have other trained parameters (``modules_to_save``), are written whole.

    Args:
        model: with the layers of ``trifuse.apply_lora`` or ``load_peft``, merged or not.
        folder: made if it is not there. Files of these names in it are replaced.
        base_model_name_or_path, task_type: for the configuration; PEFT's ``AutoPeftModel`` classes read them
            (``"CAUSAL_LM"``, ...).

    Warns:
        UserWarning: an adapter is on a layer of transformers' Mamba models where PEFT refuses one.

    Raises:
        ValueError: PEFT cannot hold what the model has, which is named: adapters of a convolution's taps, several
            adapters in one layer, DoRA beside LoRA, several dropout rates, or trained parameters of or around a layer
            with an adapter. Nothing is written then.
    """
    import safetensors.torch

    layers = layers_with_adapters(model)
    if not layers:
        raise ValueError(
            "save_peft: the model has no adapters of trifuse; trifuse.apply_lora makes them, and a PEFT model "
            "saves its own with save_pretrained"
        )
    config = _config_of(layers)
    _warn_of_mamba(model, layers)
    adapters = {name: _adapter_of(layer, config.use_rslora) for name, layer in layers.items()}
    config.r, config.rank_pattern = _with_exceptions({name: one.rank for name, one in adapters.items()})
    config.lora_alpha, config.alpha_pattern = _with_exceptions({name: one.alpha for name, one in adapters.items()})
    tensors = {}
    for name, one in adapters.items():
        embedding = isinstance(layers[name], LoRAEmbedding)
        for part in ("lora_A", "lora_B"):
            ending = part.replace("lora_", "lora_embedding_") if embedding else f"{part}.weight"
            tensors[f"{name}.{ending}"] = getattr(one, part)
        if one.magnitude is not None:
            tensors[f"{name}.lora_magnitude_vector"] = one.magnitude
    tensors.update(_trained(model, layers, config))
    names = [name for name, _ in model.named_modules()]
    config.target_modules = exact_targets(config, names, set(layers))
    values = {
        **vars(config), "peft_type": "LORA", "task_type": task_type, "inference_mode": True, "revision": None,
        "base_model_name_or_path": base_model_name_or_path, "auto_mapping": None, "init_lora_weights": True,
        "fan_in_fan_out": any(is_transposed(layer) for layer in layers.values()),
    }  # fmt: skip
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    # Memory that two tensors share cannot be saved; a copy is whole, and of its own.
    whole = {_PREFIX + key: tensor.detach().cpu().clone().contiguous() for key, tensor in tensors.items()}
    safetensors.torch.save_file(whole, folder / TENSORS, metadata={"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")


def _config_of(layers: Mapping[str, nn.Module]) -> Config:
    """What holds for all layers; raises ValueError where they do not agree, or PEFT has no such layer."""
    for name, layer in layers.items():
        was = f"save_peft: {name!r} is a {type(layer).__name__}"
        if isinstance(layer, LoRAConv1d):
            raise ValueError(
                f"{was}; PEFT has no low-rank update of a convolution's taps. Put to_conv1d() in its place"
            )
        if isinstance(layer, MultiLoRALinear):
            raise ValueError(f"{was} of several adapters; a folder holds one for each layer")
        if not isinstance(layer, LoRALinear | LoRAEmbedding) and not is_transposed(layer):
            raise ValueError(f"{was}; PEFT has no such layer")
    dora = {name for name, layer in layers.items() if isinstance(layer, DoRALinear)}
    if dora and len(dora) < len(layers):
        raise ValueError(
            f"save_peft: {few(dora)} have DoRA, and {few(layers.keys() - dora)} have not; PEFT knows all or none"
        )
    rates = {layer.dropout for layer in layers.values() if not isinstance(layer, LoRAEmbedding)}
    if len(rates) > 1:
        raise ValueError(f"save_peft: the layers have dropout {sorted(rates)}; for PEFT it must be one rate")
    rslora = all(layer.scaling == "rslora" and layer.nested_ranks is None for layer in layers.values())
    return Config(lora_dropout=max(rates, default=0.0), use_rslora=rslora, use_dora=bool(dora))


def _warn_of_mamba(model: nn.Module, layers: Mapping[str, nn.Module]) -> None:
    kind = getattr(getattr(model, "config", None), "model_type", None)
    passed_by = [name for name in layers if name.rpartition(".")[2] in _PASSED_BY]
    if kind in _MAMBAS and passed_by:
        warnings.warn(
            f"save_peft: there are adapters on {few(passed_by)} of a {kind} model, where PEFT refuses them; load_peft "
            "reads the folder, PeftModel.from_pretrained does not",
            stacklevel=3,
        )


@torch.no_grad()
def _adapter_of(layer: Any, rslora: bool) -> Adapter:
    """The adapter that a layer has at its active rank, with an alpha for the scale that all layers have."""
    rank, factor = layer.active_rank, layer.factor()
    A, B = layer.lora_A[:rank], layer._full_B()[:, :rank]
    if isinstance(factor, Tensor):
        alpha, B = float(rank), B * factor.to(B.dtype)
    elif rslora == (layer.scaling == "rslora"):
        alpha = layer.alpha
    else:
        alpha = layer.scale * rank
    return Adapter(A, B, alpha, getattr(layer, "lora_magnitude", None))


def _with_exceptions(values: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The most frequent value, and the others by names that PEFT takes for nothing but these layers."""
    values = {name: int(value) if value == int(value) else value for name, value in values.items()}
    common = Counter(values.values()).most_common(1)[0][0]
    return common, {f"^{re.escape(name)}": value for name, value in values.items() if value != common}


def _trained(model: nn.Module, layers: Mapping[str, nn.Module], config: Config) -> dict[str, Tensor]:
    """What is trained beside adapters, by PEFT's names; sets ``bias`` and ``modules_to_save``."""
    trained = [name for name, one in model.named_parameters() if one.requires_grad and adapted_by(name) is None]
    biases = {name for name in trained if name.rpartition(".")[2] == "bias"}
    of_layers = {f"{name}.bias" for name, layer in layers.items() if getattr(layer, "bias", None) is not None}
    every = {name for name, _ in model.named_parameters() if name.rpartition(".")[2] == "bias"}
    owners = {name.rpartition(".")[0] for name in set(trained) - biases}
    if biases and biases == every:
        config.bias = "all"
    else:
        config.bias = "lora_only" if biases & of_layers else "none"
        owners |= {name.rpartition(".")[0] for name in biases - of_layers}
    # A module is written with all that is in it.
    owners = {one for one in owners if not any(one.startswith(f"{other}.") for other in owners)}
    config.modules_to_save = sorted(owners) or None
    saved = config.saved(name for name, _ in model.named_modules(remove_duplicate=False))
    for name in layers:
        if "" in owners or any(name == one or name.startswith(f"{one}.") for one in saved):
            which = [one for one in trained if one.rpartition(".")[0] in owners and one not in biases]
            raise ValueError(
                f"save_peft: {few(which)} are trained, in or around {name!r}, which has an adapter; PEFT holds one or "
                "the other of a module"
            )
    state = model.state_dict()
    written = every if config.bias == "all" else of_layers if config.bias == "lora_only" else set()
    tensors = {}
    for name in written:
        owner = name.rpartition(".")[0]
        tensors[f"{owner}.base_layer.bias" if owner in layers else name] = state[name]
    for key, value in state.items():
        if any(key.startswith(f"{one}.") for one in saved):
            tensors[key] = value
    return tensors
