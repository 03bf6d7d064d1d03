"""The public functions."""

from trifuse.ops.causal_conv1d import causal_conv1d
from trifuse.ops.causal_conv1d_update import causal_conv1d_update
from trifuse.ops.dora_linear import dora_linear, dora_norm
from trifuse.ops.gaussian_adaptive_attention import gaussian_adaptive_attention
from trifuse.ops.gaussian_attention import gaussian_attention
from trifuse.ops.gaussian_gate import gaussian_gate
from trifuse.ops.gmm_attention_step import gmm_attention_step
from trifuse.ops.linear_scan import linear_scan
from trifuse.ops.lora_linear import lora_linear
from trifuse.ops.lora_linear_multi import lora_linear_multi
from trifuse.ops.lora_rank import lora_change_rank, lora_truncate
from trifuse.ops.lora_update import LoraMerge, lora_merge_, lora_swap_, lora_unmerge_
from trifuse.ops.nested_linear import nested_cross_entropy, nested_linear
from trifuse.ops.selective_scan import selective_scan
from trifuse.ops.selective_state_update import selective_state_update
from trifuse.ops.ssd import ssd

__all__ = [
    "LoraMerge",
    "causal_conv1d",
    "causal_conv1d_update",
    "dora_linear",
    "dora_norm",
    "gaussian_adaptive_attention",
    "gaussian_attention",
    "gaussian_gate",
    "gmm_attention_step",
    "linear_scan",
    "lora_change_rank",
    "lora_linear",
    "lora_linear_multi",
    "lora_merge_",
    "lora_swap_",
    "lora_truncate",
    "lora_unmerge_",
    "nested_cross_entropy",
    "nested_linear",
    "selective_scan",
    "selective_state_update",
    "ssd",
]
