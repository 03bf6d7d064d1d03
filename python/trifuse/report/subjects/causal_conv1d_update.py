"""``causal_conv1d_update``, the convolution's one-token form, in the report."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from trifuse.report import headlines
from trifuse.report.contenders import Contender, backend_contenders
from trifuse.report.inputs import Axes, Draw, Inputs
from trifuse.report.subject import OpSubject, Rows
from trifuse.report.workloads import FWD, Workload, sizes

__all__ = ["CausalConv1dUpdate"]


def _work(name: str, title: str, B: int, D: int) -> Workload:
    return Workload(
        name, title, "causal_conv1d_update", sizes(B=B, D=D, W=4), dtypes=("float32", "bfloat16"), directions=(FWD,),
        rivals=((FWD, ("reference", "conv1d")),), rank=2,
    )  # fmt: skip


class CausalConv1dUpdate(OpSubject):
    op = "causal_conv1d_update"
    axes = Axes(
        {"x": "BD", "conv_state": "BDW", "weight": "DW", "bias": "D", "out": "BD"},
        weights=("weight", "bias"), mutated=("conv_state",), has_layouts=False,
    )  # fmt: skip
    probes = 1 << 62  # one step: all of it is checked
    explained = sizes(B=1, D=1536, W=4)
    least = sizes(W=2)

    def __init__(self) -> None:
        settings = {"checked": ("full",), "dtypes": ("float32",)}
        rival = Contender("conv1d", "torch: shift the window, conv1d", "rival", conv1d, **settings)
        self.contenders = backend_contenders(self.ours, self.refusals, **settings) | {rival.name: rival}

    def quick(self) -> tuple[Workload, ...]:
        return (
            _work("conv-step-130m", "the convolution of one token, batch 1, Mamba 130M", 1, 1536),
            _work("conv-step-2.8b", "the convolution of one token, batch 32, Mamba 2.8B", 32, 5120),
        )

    def values(self, workload: Workload, draw: Draw) -> dict[str, Tensor]:
        B, D, W = (workload[axis] for axis in "BDW")
        return {
            "x": draw.normal(B, D),
            "conv_state": draw.normal(B, D, W),
            "weight": draw.normal(D, W).mul_(0.5),
            "bias": draw.normal(D).mul_(0.1),
        }

    def arguments(self, inputs: Inputs) -> tuple[list, dict]:
        return [inputs[name] for name in ("x", "conv_state", "weight", "bias")], {"activation": "silu"}

    def headlines(self, rows: Rows, device: str) -> list[dict]:
        found = rows.get(f"conv-step-130m {FWD}", [])
        row = headlines.pick(found)
        return [] if row is None else headlines.against(found, row, "convolution of one token (conv-step-130m)")


def conv1d(inputs: Inputs) -> Tensor:
    """The window of the state and the token through a grouped ``conv1d``, as transformers' fallback does it."""
    state = inputs["conv_state"]
    window = torch.cat([state, inputs["x"][:, :, None]], dim=2)[:, :, 1:]
    state.copy_(window)
    return F.silu(F.conv1d(window, inputs["weight"][:, None], inputs["bias"], groups=state.shape[1])[:, :, 0])
