"""High-performance kernels for sequence models, on every machine: C++ for CPUs, CUDA, and Triton."""

from trifuse import analysis, nn, reference
from trifuse.backends import BackendUnavailable, backend, explain
from trifuse.nn import (
    adapters,
    apply_lora,
    lora_state_dict,
    mark_only_lora_as_trainable,
    ranks,
    sample_rank,
    set_rank,
)
from trifuse.ops import (
    causal_conv1d,
    causal_conv1d_update,
    dora_linear,
    dora_norm,
    gaussian_adaptive_attention,
    gaussian_attention,
    gaussian_gate,
    gmm_attention_step,
    linear_scan,
    lora_linear,
    lora_linear_multi,
    nested_cross_entropy,
    nested_linear,
    selective_scan,
    selective_state_update,
    ssd,
)

__version__ = "0.1.0"

__all__ = [
    "BackendUnavailable",
    "__version__",
    "adapters",
    "analysis",
    "apply_lora",
    "backend",
    "causal_conv1d",
    "causal_conv1d_update",
    "dora_linear",
    "dora_norm",
    "explain",
    "gaussian_adaptive_attention",
    "gaussian_attention",
    "gaussian_gate",
    "gmm_attention_step",
    "linear_scan",
    "lora_linear",
    "lora_linear_multi",
    "lora_state_dict",
    "mark_only_lora_as_trainable",
    "nested_cross_entropy",
    "nested_linear",
    "nn",
    "ranks",
    "reference",
    "sample_rank",
    "selective_scan",
    "selective_state_update",
    "set_rank",
    "ssd",
]
