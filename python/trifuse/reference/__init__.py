"""Plain PyTorch definitions of every op: readable, float64-clean, differentiable without limit."""

from trifuse.reference.causal_conv1d import causal_conv1d, causal_conv1d_update
from trifuse.reference.dora_linear import dora_linear, dora_norm
from trifuse.reference.gaussian_adaptive_attention import gaussian_adaptive_attention
from trifuse.reference.gaussian_attention import gaussian_attention
from trifuse.reference.gaussian_gate import gaussian_gate
from trifuse.reference.gmm_attention_step import gmm_attention_step
from trifuse.reference.linear_scan import linear_scan
from trifuse.reference.lora_adamw import lora_adamw
from trifuse.reference.lora_linear import lora_dropout_mask, lora_linear, lora_linear_multi
from trifuse.reference.lora_update import lora_update, round_stochastically
from trifuse.reference.nested_linear import nested_cross_entropy, nested_linear
from trifuse.reference.philox import philox_words
from trifuse.reference.selective_scan import selective_scan, selective_state_update
from trifuse.reference.ssd import ssd

__all__ = [
    "causal_conv1d",
    "causal_conv1d_update",
    "dora_linear",
    "dora_norm",
    "gaussian_adaptive_attention",
    "gaussian_attention",
    "gaussian_gate",
    "gmm_attention_step",
    "linear_scan",
    "lora_adamw",
    "lora_dropout_mask",
    "lora_linear",
    "lora_linear_multi",
    "lora_update",
    "nested_cross_entropy",
    "nested_linear",
    "philox_words",
    "round_stochastically",
    "selective_scan",
    "selective_state_update",
    "ssd",
]
