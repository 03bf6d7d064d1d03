"""The shape of a language model."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

__all__ = ["MambaConfig"]


@dataclass
class MambaConfig:
    """Arguments of ``MambaLMHeadModel``, under the names that published checkpoints keep in config.json.

    ``ssm_cfg`` goes to the mixer; its ``"layer"`` is "Mamba1" (if absent) or "Mamba2". ``attn_layer_idx`` must be
    empty. ``vocab_size`` is rounded up to a multiple of ``pad_vocab_size_multiple``.
    """

    d_model: int = 2560
    d_intermediate: int = 0
    n_layer: int = 64
    vocab_size: int = 50277
    ssm_cfg: dict[str, Any] = field(default_factory=dict)
    attn_layer_idx: list[int] = field(default_factory=list)
    attn_cfg: dict[str, Any] = field(default_factory=dict)
    rms_norm: bool = True
    residual_in_fp32: bool = True
    fused_add_norm: bool = True
    pad_vocab_size_multiple: int = 8
    tie_embeddings: bool = True
