"""What the report measures, one room per subject; their order decides among equally important workloads.

The scan comes last of the first rank: its rivals take longer than those of all others together.
"""

from __future__ import annotations

from trifuse.report.subject import OpSubject, Subject
from trifuse.report.subjects.causal_conv1d import CausalConv1d
from trifuse.report.subjects.causal_conv1d_update import CausalConv1dUpdate
from trifuse.report.subjects.dora_linear import DoraLinear
from trifuse.report.subjects.gaussian_adaptive_attention import GaussianAdaptiveAttention
from trifuse.report.subjects.gaussian_attention import GaussianAttention
from trifuse.report.subjects.gaussian_gate import GaussianGate
from trifuse.report.subjects.gmm_attention_step import GMMAttentionStep
from trifuse.report.subjects.linear_scan import LinearScan
from trifuse.report.subjects.lora_adamw import LoraAdamW
from trifuse.report.subjects.lora_linear import LoraLinear
from trifuse.report.subjects.lora_linear_multi import LoraLinearMulti
from trifuse.report.subjects.lora_update import LoraMerge, LoraSwap
from trifuse.report.subjects.mamba_step import MambaStep
from trifuse.report.subjects.nested_linear import NestedLinear
from trifuse.report.subjects.selective_scan import SelectiveScan
from trifuse.report.subjects.selective_state_update import SelectiveStateUpdate
from trifuse.report.subjects.ssd import SSD
from trifuse.report.subjects.transformers_models import TransformersModels

__all__ = ["OPS", "SUBJECTS"]

_ROOMS = (
    TransformersModels(), GaussianAttention(), GaussianAdaptiveAttention(), SSD(), MambaStep(), LinearScan(),
    CausalConv1d(), SelectiveScan(), SelectiveStateUpdate(), CausalConv1dUpdate(), GaussianGate(), GMMAttentionStep(),
    LoraLinear(), DoraLinear(), LoraLinearMulti(), LoraMerge(), LoraSwap(), LoraAdamW(), NestedLinear(),
)  # fmt: skip
SUBJECTS: dict[str, Subject] = {one.op: one for one in _ROOMS}

OPS: dict[str, OpSubject] = {name: one for name, one in SUBJECTS.items() if isinstance(one, OpSubject)}
