"""Checkpoints of Mamba and Mamba-2 language models: the published layout, and that of transformers."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["load_into", "read", "write"]

_SAFE, _BIN = "model.safetensors", "pytorch_model.bin"
_PUBLISHED = (
    "d_model", "d_intermediate", "n_layer", "vocab_size", "ssm_cfg", "attn_layer_idx", "attn_cfg", "rms_norm",
    "residual_in_fp32", "fused_add_norm", "pad_vocab_size_multiple", "tie_embeddings", "norm_epsilon",
)  # fmt: skip


def read(path: str | os.PathLike) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The config, in the published words, and the weights, under the published keys."""
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(
            f"MambaLM: there is no folder or file {path}; it must be one on this machine, nothing is downloaded"
        )
    folder = path if path.is_dir() else path.parent
    if not (folder / "config.json").exists():
        raise FileNotFoundError(f"MambaLM: there is no config.json in {folder}")
    config = json.loads((folder / "config.json").read_text())
    weights = _read_weights(path)
    # Old files of transformers say d_model beside hidden_size; the published ones never have the latter.
    if "d_model" in config and "hidden_size" not in config:
        return {name: config[name] for name in _PUBLISHED if name in config}, weights
    weights = {name.replace("backbone.embeddings.", "backbone.embedding."): one for name, one in weights.items()}
    return _from_transformers(config), weights


def _from_transformers(config: dict[str, Any]) -> dict[str, Any]:
    """The published words for a config of transformers' Mamba or Mamba-2."""
    kind = config.get("model_type")
    if kind not in ("mamba", "mamba2"):
        raise ValueError(
            f"MambaLM: the config has model_type {kind!r} and no d_model; it must be one of a published model, or of "
            'transformers\' "mamba" or "mamba2"'
        )
    if config.get("hidden_act", "silu") not in ("silu", "swish"):
        raise ValueError(f'MambaLM: the config has hidden_act {config["hidden_act"]!r}; it must be "silu"')
    size = config["hidden_size"]
    mixer: dict[str, Any] = {
        "layer": "Mamba1" if kind == "mamba" else "Mamba2",
        "d_state": config.get("state_size", 16 if kind == "mamba" else 128),
        "d_conv": config.get("conv_kernel", 4),
        "expand": config.get("expand", 2),
        "bias": config.get("use_bias", False),
        "conv_bias": config.get("use_conv_bias", True),
    }
    if kind == "mamba":
        rank = config.get("time_step_rank", "auto")
        mixer["dt_rank"] = math.ceil(size / 16) if rank == "auto" else rank
    else:
        low, high = config.get("time_step_limit") or (0.0, math.inf)
        mixer |= {
            "headdim": config.get("head_dim", 64),
            "ngroups": config.get("n_groups", 8),
            "chunk_size": config.get("chunk_size", 256),
            "dt_limit": (_number(low), _number(high)),
        }
    return {
        "d_model": size,
        "n_layer": config["num_hidden_layers"],
        "vocab_size": config["vocab_size"],
        "ssm_cfg": mixer,
        "pad_vocab_size_multiple": 1,
        "residual_in_fp32": config.get("residual_in_fp32", True),
        "tie_embeddings": config.get("tie_word_embeddings", kind == "mamba"),
        "norm_epsilon": config.get("layer_norm_epsilon", 1e-5),
    }


def _number(value: Any) -> float:
    """A number of a config: JSON has no infinity, and transformers writes ``{"__float__": "Infinity"}``."""
    return float(value["__float__"] if isinstance(value, dict) else value)


def _read_weights(path: Path) -> dict[str, Tensor]:
    if path.is_file():
        return _read_file(path)
    for name in (_SAFE, _BIN):
        if (path / name).exists():
            return _read_file(path / name)
        index = path / f"{name}.index.json"
        if index.exists():
            files = sorted(set(json.loads(index.read_text())["weight_map"].values()))
            return {key: one for file in files for key, one in _read_file(path / file).items()}
    raise FileNotFoundError(f"MambaLM: there is no {_SAFE}, {_BIN} or .index.json of them in {path}")


def _read_file(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        return _safetensors().load_file(path)
    return torch.load(path, map_location="cpu", weights_only=True, mmap=True)


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError(
            "MambaLM: .safetensors files need the package safetensors (pip install safetensors)"
        ) from error
    return safetensors.torch


def load_into(model: nn.Module, weights: dict[str, Tensor], source: str) -> None:
    """Copy weights into a model of the same keys and shapes; every difference is named."""
    own = model.state_dict()
    problems = [f"it lacks {name}" for name in own if name not in weights]
    problems += [f"it has {name}, which the model has not" for name in weights if name not in own]
    problems += [
        f"{name} is {tuple(weights[name].shape)} and must be {tuple(own[name].shape)}"
        for name in own
        if name in weights and weights[name].shape != own[name].shape
    ]
    if problems:
        more = f" (and {len(problems) - 8} more)" if len(problems) > 8 else ""
        raise ValueError(f"MambaLM: {source} does not fit its config: " + "; ".join(problems[:8]) + more)
    model.load_state_dict(weights)


def write(path: str | os.PathLike, config: dict[str, Any], weights: dict[str, Tensor], tied: bool, safe: bool) -> None:
    """Write ``config.json`` and the weights into a folder."""
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    if safe:
        if tied:
            weights = {name: one for name, one in weights.items() if name != "lm_head.weight"}
        weights = {name: one.contiguous() for name, one in weights.items()}
        _safetensors().save_file(weights, folder / _SAFE, metadata={"format": "pt"})
    else:
        torch.save(dict(weights), folder / _BIN)
