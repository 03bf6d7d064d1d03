"""The language model of published Mamba and Mamba-2 checkpoints."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..modules.block import Block
from ..modules.mamba2 import Mamba2
from ..modules.mamba_simple import Mamba
from ..modules.mlp import GatedMLP
from ..ops.triton.layer_norm import RMSNorm
from ..utils.generation import GenerationMixin
from ..utils.hf import load_config_hf, load_state_dict_hf
from .config_mamba import MambaConfig

__all__ = ["CausalLMOutput", "MambaLMHeadModel", "MixerModel", "create_block"]

MIXERS = {"Mamba1": Mamba, "Mamba2": Mamba2}


class CausalLMOutput(NamedTuple):
    """What ``MambaLMHeadModel`` gives."""

    logits: Tensor


def create_block(
    d_model: int,
    d_intermediate: int = 0,
    ssm_cfg: dict[str, Any] | None = None,
    attn_layer_idx: list[int] | None = None,
    attn_cfg: dict[str, Any] | None = None,
    norm_epsilon: float = 1e-5,
    rms_norm: bool = False,
    residual_in_fp32: bool = False,
    fused_add_norm: bool = False,
    layer_idx: int | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Block:
    """One layer: see ``MambaConfig`` for the arguments."""
    if layer_idx in (attn_layer_idx or ()):
        raise NotImplementedError(
            f"mamba_ssm (trifuse): layer {layer_idx} is in attn_layer_idx; trifuse has no attention layer, "
            "so attn_layer_idx must be empty"
        )
    arguments = dict(ssm_cfg or {})
    layer = arguments.pop("layer", "Mamba1")
    if layer not in MIXERS:
        raise ValueError(f'mamba_ssm (trifuse): ssm_cfg["layer"] is {layer!r}; it must be one of {", ".join(MIXERS)}')
    factory = {"device": device, "dtype": dtype}
    block = Block(
        d_model,
        partial(MIXERS[layer], layer_idx=layer_idx, **arguments, **factory),
        partial(GatedMLP, hidden_features=d_intermediate, out_features=d_model, **factory)
        if d_intermediate
        else nn.Identity,
        norm_cls=partial(RMSNorm if rms_norm else nn.LayerNorm, eps=norm_epsilon, **factory),
        fused_add_norm=fused_add_norm,
        residual_in_fp32=residual_in_fp32,
    )
    block.layer_idx = layer_idx
    return block


class MixerModel(nn.Module):
    """Embedding, blocks and a last norm: ``(B, L)`` tokens to ``(B, L, d_model)``. Arguments as of MambaConfig."""

    def __init__(
        self,
        d_model: int,
        n_layer: int,
        d_intermediate: int,
        vocab_size: int,
        ssm_cfg: dict[str, Any] | None = None,
        attn_layer_idx: list[int] | None = None,
        attn_cfg: dict[str, Any] | None = None,
        norm_epsilon: float = 1e-5,
        rms_norm: bool = False,
        initializer_cfg: dict[str, Any] | None = None,
        fused_add_norm: bool = False,
        residual_in_fp32: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        self.residual_in_fp32 = residual_in_fp32
        self.fused_add_norm = fused_add_norm
        self.embedding = nn.Embedding(vocab_size, d_model, **factory)
        self.layers = nn.ModuleList(
            create_block(
                d_model, d_intermediate, ssm_cfg, attn_layer_idx, attn_cfg, norm_epsilon, rms_norm,
                residual_in_fp32, fused_add_norm, layer_idx, **factory,
            )
            for layer_idx in range(n_layer)
        )  # fmt: skip
        self.norm_f = (RMSNorm if rms_norm else nn.LayerNorm)(d_model, eps=norm_epsilon, **factory)
        _initialize(self, n_layer, residuals_per_layer=2 if d_intermediate else 1, **(initializer_cfg or {}))

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None, **kwargs: Any
    ) -> dict[int, Any]:
        return {
            index: layer.allocate_inference_cache(batch_size, max_seqlen, dtype=dtype, **kwargs)
            for index, layer in enumerate(self.layers)
        }

    def forward(self, input_ids: Tensor, inference_params: Any = None, **mixer_kwargs: Any) -> Tensor:
        hidden_states, residual = self.embedding(input_ids), None
        for layer in self.layers:
            hidden_states, residual = layer(hidden_states, residual, inference_params=inference_params, **mixer_kwargs)
        dtype = self.norm_f.weight.dtype
        residual = hidden_states if residual is None else hidden_states + residual
        if self.fused_add_norm and isinstance(self.norm_f, RMSNorm):
            return self.norm_f(residual).to(dtype)  # the sum is normalized before it is rounded
        return self.norm_f(residual.to(dtype))


class MambaLMHeadModel(nn.Module, GenerationMixin):
    """A language model with the keys of published checkpoints.

    Args:
        config: see ``MambaConfig``.
        initializer_cfg: ``initializer_range``, ``rescale_prenorm_residual``.
        device, dtype: of the parameters.
    """

    def __init__(
        self,
        config: MambaConfig,
        initializer_cfg: dict[str, Any] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.config = config
        multiple = config.pad_vocab_size_multiple
        vocab_size = -(-config.vocab_size // multiple) * multiple
        self.backbone = MixerModel(
            config.d_model, config.n_layer, config.d_intermediate, vocab_size, config.ssm_cfg, config.attn_layer_idx,
            config.attn_cfg, rms_norm=config.rms_norm, initializer_cfg=initializer_cfg,
            fused_add_norm=config.fused_add_norm, residual_in_fp32=config.residual_in_fp32, device=device, dtype=dtype,
        )  # fmt: skip
        self.lm_head = nn.Linear(config.d_model, vocab_size, bias=False, device=device, dtype=dtype)
        self.tie_weights()

    def tie_weights(self) -> None:
        if self.config.tie_embeddings:
            self.lm_head.weight = self.backbone.embedding.weight

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None, **kwargs: Any
    ) -> dict[int, Any]:
        return self.backbone.allocate_inference_cache(batch_size, max_seqlen, dtype=dtype, **kwargs)

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        inference_params: Any = None,
        num_last_tokens: int = 0,
        **mixer_kwargs: Any,
    ) -> CausalLMOutput:
        """Logits of ``(B, L)`` tokens, of the last ``num_last_tokens`` if that is above 0.

        ``position_ids`` is not read. ``inference_params`` and ``mixer_kwargs`` go to the mixers.
        """
        hidden_states = self.backbone(input_ids, inference_params=inference_params, **mixer_kwargs)
        return CausalLMOutput(self.lm_head(hidden_states[:, -num_last_tokens:] if num_last_tokens else hidden_states))

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name: str,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> MambaLMHeadModel:
        """Load config.json and the weights of a folder, or of a model on the hub (this needs transformers)."""
        model = cls(MambaConfig(**load_config_hf(pretrained_model_name)), device=device, dtype=dtype, **kwargs)
        model.load_state_dict(load_state_dict_hf(pretrained_model_name, device=device, dtype=dtype))
        return model

    def save_pretrained(self, save_directory: str) -> None:
        """Write config.json and pytorch_model.bin."""
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(self.state_dict(), folder / "pytorch_model.bin")
        (folder / "config.json").write_text(json.dumps(asdict(self.config), indent=4))


@torch.no_grad()
def _initialize(
    model: nn.Module,
    n_layer: int,
    residuals_per_layer: int,
    initializer_range: float = 0.02,
    rescale_prenorm_residual: bool = True,
) -> None:
    """Embeddings from a normal, biases zero; what adds to the residual stream is scaled by its depth (GPT-2)."""
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=initializer_range)
        elif isinstance(module, nn.Linear) and not getattr(module.bias, "_no_reinit", module.bias is None):
            nn.init.zeros_(module.bias)
    if rescale_prenorm_residual:
        for name, parameter in model.named_parameters():
            if name.endswith(("out_proj.weight", "fc2.weight")):
                nn.init.kaiming_uniform_(parameter, a=math.sqrt(5))
                parameter /= math.sqrt(residuals_per_layer * n_layer)
