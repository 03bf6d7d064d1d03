"""Tiny random models of transformers with a Mamba mixer, and what the tests ask of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

SIZE = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "pad_token_id": 0, "eos_token_id": 60}
ATTENTION = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48, "attention_dropout": 0.0}

# The arguments of each model's config, besides SIZE: small, and away from the values that leave something out.
# fmt: off
CONFIGS: dict[str, dict[str, Any]] = {
    "mamba": {"state_size": 8, "conv_kernel": 4, "time_step_rank": 3, "use_bias": True},
    "falcon_mamba": {"state_size": 8, "conv_kernel": 4, "time_step_rank": 3},
    "jamba": {**ATTENTION, "mamba_d_state": 8, "mamba_dt_rank": 3, "attn_layer_period": 2, "attn_layer_offset": 1,
              "expert_layer_period": 2, "expert_layer_offset": 1, "num_experts": 2, "use_mamba_kernels": True},
    "zamba": {**ATTENTION, "num_hidden_layers": 4, "num_key_value_heads": 4, "mamba_d_state": 8, "mamba_dt_rank": 3,
              "n_mamba_heads": 2, "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"]},
    "mamba2": {"state_size": 8, "num_heads": 8, "head_dim": 8, "expand": 2, "n_groups": 2, "chunk_size": 8,
               "use_bias": True, "time_step_limit": (0.001, 0.5)},
    "bamba": {**ATTENTION, "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 8,
              "mamba_chunk_size": 8, "attn_layer_indices": [1]},
    "zamba2": {**ATTENTION, "num_key_value_heads": 4, "mamba_d_state": 8, "n_mamba_heads": 8, "mamba_headdim": 8,
               "mamba_ngroups": 2, "chunk_size": 8, "num_hidden_layers": 4, "num_mem_blocks": 1, "use_mem_rope": True,
               "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"]},
    "nemotron_h": {**ATTENTION, "num_hidden_layers": 3, "layers_block_type": ["mamba", "attention", "mamba"],
                   "head_dim": 8, "mamba_num_heads": 8, "mamba_head_dim": 8, "n_groups": 2, "ssm_state_size": 8,
                   "chunk_size": 8},
    "granitemoehybrid": {**ATTENTION, "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 2, "mamba_d_state": 8,
                         "mamba_chunk_size": 8, "layer_types": ["mamba", "attention"], "num_local_experts": 2,
                         "num_experts_per_tok": 1, "shared_intermediate_size": 16},
    "falcon_h1": {**ATTENTION, "head_dim": 8, "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_ssm": 64,
                  "mamba_n_groups": 2, "mamba_d_state": 8, "mamba_chunk_size": 8, "ssm_in_multiplier": 1.3,
                  "ssm_multipliers": [0.9, 1.1, 0.8, 1.2, 0.7], "mamba_rms_norm": False},
}
# fmt: on
CONFIGS["falcon_h1 with a norm"] = {**CONFIGS["falcon_h1"], "mamba_rms_norm": True}

MAMBA1 = ("mamba", "falcon_mamba", "jamba", "zamba")


@dataclass
class Batch:
    """Prompts of unequal length, padded on the left."""

    input_ids: Tensor
    attention_mask: Tensor

    @property
    def labels(self) -> Tensor:
        return self.input_ids.masked_fill(self.attention_mask == 0, -100)


def config(case: str, **changes: Any):
    import transformers

    arguments = {**SIZE, **CONFIGS[case], **changes}
    return transformers.AutoConfig.for_model(case.split()[0], **arguments)


def model(case: str, seed: int = 0, **changes: Any) -> nn.Module:
    """A model whose weights are all random, also those that start as constants."""
    import transformers

    torch.manual_seed(seed)
    made = transformers.AutoModelForCausalLM.from_config(config(case, **changes)).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return made


def batch(seed: int = 0, lengths: tuple[int, ...] = (19, 12, 7)) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    length = max(lengths)
    ids = torch.randint(1, SIZE["vocab_size"] - 1, (len(lengths), length), generator=generator)
    mask = (torch.arange(length) >= length - torch.tensor(lengths)[:, None]).long()
    return Batch(ids * mask, mask)


def mixer_of(made: nn.Module) -> nn.Module:
    """The first Mamba mixer of a model."""
    return next(module for module in made.modules() if hasattr(module, "A_log"))
