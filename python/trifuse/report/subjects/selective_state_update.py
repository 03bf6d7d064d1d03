"""``selective_state_update``, the scan's one-token form, in the report."""

from __future__ import annotations

import importlib

import torch
from torch import Tensor

from trifuse.report import headlines
from trifuse.report.contenders import Contender, backend_contenders
from trifuse.report.inputs import Axes, Draw, Inputs
from trifuse.report.subject import OpSubject, Rows
from trifuse.report.subjects.selective_scan import transformers_missing
from trifuse.report.workloads import FWD, Workload, sizes

__all__ = ["SelectiveStateUpdate"]


def _work(name: str, title: str, B: int, D: int) -> Workload:
    return Workload(
        name, title, "selective_state_update", sizes(B=B, D=D, N=16), dtypes=("float32", "bfloat16"),
        directions=(FWD,), rivals=((FWD, ("reference", "transformers")),), rank=2,
    )  # fmt: skip


class SelectiveStateUpdate(OpSubject):
    op = "selective_state_update"
    axes = Axes(
        {"state": "BDN", "x": "BD", "dt": "BD", "A": "DN", "B": "BN", "C": "BN", "D": "D", "z": "BD", "dt_bias": "D",
         "out": "BD"},
        weights=("state", "A", "D", "dt_bias"), mutated=("state",), has_layouts=False,
    )  # fmt: skip
    probes = 1 << 62  # one step: all of it is checked
    explained = sizes(B=1, D=1536, N=16)

    def __init__(self) -> None:
        settings = {"checked": ("full",), "dtypes": ("float32",)}
        kernels = backend_contenders(self.ours, self.refusals, **settings)
        rival = Contender("transformers", "transformers: its own fallback", "rival", transformers, transformers_missing,
                          **settings)  # fmt: skip
        self.contenders = kernels | {rival.name: rival}

    def quick(self) -> tuple[Workload, ...]:
        return (
            _work("decode-130m", "one token, batch 1, Mamba 130M", 1, 1536),
            _work("decode-2.8b", "one token, batch 32, Mamba 2.8B", 32, 5120),
        )

    def values(self, workload: Workload, draw: Draw) -> dict[str, Tensor]:
        B, D, N = (workload[axis] for axis in "BDN")
        return {
            "state": draw.normal(B, D, N),
            "x": draw.normal(B, D),
            "dt": draw.normal(B, D).mul_(0.5),
            "A": -torch.arange(1.0, N + 1, device=draw.device).repeat(D, 1),
            "B": draw.normal(B, N),
            "C": draw.normal(B, N),
            "D": torch.ones(D, device=draw.device),
            "z": draw.normal(B, D),
            "dt_bias": draw.step_bias(D),
        }

    def arguments(self, inputs: Inputs) -> tuple[list, dict]:
        return [*(inputs[name] for name in ("state", "x", "dt", "A", "B", "C", "D", "z", "dt_bias")), True], {}

    def headlines(self, rows: Rows, device: str) -> list[dict]:
        out = []
        for name in ("decode-130m", "decode-2.8b"):
            found = rows.get(f"{name} {FWD}", [])
            row = headlines.pick(found)
            if row is not None:
                out += headlines.against(found, row, f"one token ({name})")
        return out


def transformers(inputs: Inputs) -> Tensor:
    module = importlib.import_module("transformers.models.mamba.modeling_mamba")
    arguments = (inputs[name] for name in ("state", "x", "dt", "A", "B", "C"))
    return module.mamba_selective_state_update(
        *arguments, D=inputs["D"], z=inputs["z"], dt_bias=inputs["dt_bias"], dt_softplus=True
    )
