"""Config and weights of a published checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = ["load_config_hf", "load_state_dict_hf"]


def load_config_hf(model_name: str) -> dict[str, Any]:
    """The config.json of a folder, or of a model on the hub."""
    path = _file(model_name, "config.json")
    if path is None:
        raise FileNotFoundError(f"mamba_ssm (trifuse): {model_name} has no config.json")
    return json.loads(path.read_text())


def load_state_dict_hf(
    model_name: str, device: torch.device | str | None = None, dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """The weights of a folder, or of a model on the hub, on a device and, the floating ones, in a dtype."""
    path = _file(model_name, "pytorch_model.bin")
    if path is not None:
        weights = torch.load(path, map_location="cpu", weights_only=True)
    else:
        path = _file(model_name, "model.safetensors")
        if path is None:
            raise FileNotFoundError(
                f"mamba_ssm (trifuse): {model_name} has neither pytorch_model.bin nor model.safetensors"
            )
        from safetensors.torch import load_file

        weights = load_file(path)
    return {
        name: tensor.to(device=device, dtype=dtype if tensor.is_floating_point() else None)
        for name, tensor in weights.items()
    }


def _file(model_name: str, name: str) -> Path | None:
    folder = Path(model_name)
    if folder.is_dir():
        return folder / name if (folder / name).is_file() else None
    from transformers.utils.hub import cached_file

    found = cached_file(model_name, name, _raise_exceptions_for_missing_entries=False)
    return None if found is None else Path(found)
