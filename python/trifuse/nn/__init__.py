"""Drop-in ``torch.nn`` modules."""

from trifuse.nn.apply_lora import apply_lora, lora_state_dict, mark_only_lora_as_trainable
from trifuse.nn.bidirectional_mamba import BidirectionalMamba
from trifuse.nn.block import InferenceParams
from trifuse.nn.dora import DoRALinear
from trifuse.nn.dylora import DyLoRAConv1d, DyLoRALinear, ranks, sample_rank, set_rank
from trifuse.nn.gaussian import GaussianAdaptiveAttention, GaussianBlock, MultiHeadGaussianAdaptiveAttention
from trifuse.nn.gaussian_context import GaussianContext2d
from trifuse.nn.gaussian_multihead import MultiheadGaussianAttention
from trifuse.nn.gaussian_transformer import GaussianTransformerLayer
from trifuse.nn.gmm_attention import MonotonicGMMAttention
from trifuse.nn.lora import LoRALinear
from trifuse.nn.lora_conv1d import LoRAConv1d
from trifuse.nn.lora_embedding import LoRAEmbedding
from trifuse.nn.lru import LRU
from trifuse.nn.mamba import Mamba
from trifuse.nn.mamba2 import Mamba2
from trifuse.nn.mamba2_simple import Mamba2Simple
from trifuse.nn.mamba_lm import MambaLM, MambaLMConfig
from trifuse.nn.mingru import MinGRU
from trifuse.nn.multi_lora import MultiLoRALinear, adapters
from trifuse.nn.nested_linear import NestedLinear
from trifuse.nn.norm import RMSNormGated
from trifuse.nn.qlstm import QLSTM
from trifuse.nn.rglru import RGLRU

__all__ = [
    "LRU",
    "QLSTM",
    "RGLRU",
    "BidirectionalMamba",
    "DoRALinear",
    "DyLoRAConv1d",
    "DyLoRALinear",
    "GaussianAdaptiveAttention",
    "GaussianBlock",
    "GaussianContext2d",
    "GaussianTransformerLayer",
    "InferenceParams",
    "LoRAConv1d",
    "LoRAEmbedding",
    "LoRALinear",
    "Mamba",
    "Mamba2",
    "Mamba2Simple",
    "MambaLM",
    "MambaLMConfig",
    "MinGRU",
    "MonotonicGMMAttention",
    "MultiHeadGaussianAdaptiveAttention",
    "MultiLoRALinear",
    "MultiheadGaussianAttention",
    "NestedLinear",
    "RMSNormGated",
    "adapters",
    "apply_lora",
    "lora_state_dict",
    "mark_only_lora_as_trainable",
    "ranks",
    "sample_rank",
    "set_rank",
]
