"""``gmm_attention_step`` in the report."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from trifuse.report import headlines
from trifuse.report.contenders import Floor, backend_contenders, named
from trifuse.report.inputs import Axes, Draw, Inputs
from trifuse.report.subject import OpSubject, Rows
from trifuse.report.workloads import FWD, FWD_BWD, Workload, sizes

__all__ = ["GMMAttentionStep"]

_WORK = "gmm-speech"


class GMMAttentionStep(OpSubject):
    op = "gmm_attention_step"
    axes = Axes(
        {"values": "BTE", "weight": "BK", "delta": "BK", "sigma": "BK", "mean": "BK", "out": "BE", "dout": "BE"},
        weights=("weight", "delta", "sigma", "mean"), has_layouts=False,
    )  # fmt: skip
    probed, probes = "B", 4
    small = sizes(B=3, T=37, E=40, K=3)
    explained = sizes(B=16, T=200, E=512, K=5)
    measure = "bmm-floor"
    measure_text = "weights times values by torch.bmm"

    def __init__(self) -> None:
        self.contenders = backend_contenders(self.ours, self.refusals, dtypes=("float32",))
        self.floors = named(Floor(self.measure, "floor: weights times values by bmm", product))

    def quick(self) -> tuple[Workload, ...]:
        both = ((FWD, ("reference",)), (FWD_BWD, ("reference",)))
        title = "one decoder step of speech synthesis"
        return (Workload(_WORK, title, self.op, self.explained, rivals=both, rank=3),)

    def for_cuda(self, workload: Workload) -> Workload:
        return workload.sized(B=64)

    def values(self, workload: Workload, draw: Draw) -> dict[str, Tensor]:
        B, T, E, K = (workload[axis] for axis in "BTEK")
        return {
            "values": draw.normal(B, T, E),
            "weight": torch.softmax(draw.normal(B, K), -1),
            "delta": draw.normal(B, K),
            "sigma": draw.uniform(B, K) * 4 + 1,
            "mean": draw.uniform(B, K) * T,
            "dout": draw.normal(B, E),
        }

    def arguments(self, inputs: Inputs) -> tuple[list, dict]:
        return [inputs[name] for name in ("values", "weight", "delta", "sigma", "mean")], {}

    def ours(self, inputs: Inputs) -> Tensor:
        return super().ours(inputs)[0]

    def headlines(self, rows: Rows, device: str) -> list[dict]:
        out = []
        for direction in (FWD, FWD_BWD):
            found = rows.get(f"{_WORK} {direction}", [])
            row = headlines.pick(found)
            if row is not None:
                out += headlines.against(found, row, f"mixture attention step {direction}", where=_WORK)
                if "floor_ratio" in row:
                    out.append(headlines.line(f"mixture attention step {direction} over bmm",
                                              f"{row['floor_ratio']:.2f} x",
                                              f"{row['title']} / {row['floor_note']}"))  # fmt: skip
        return out


def product(workload: Workload, inputs: Inputs, direction: str) -> tuple[Callable[[], object], str]:
    """The context from weights that are there; a backward pass has two more products of that size."""
    B, T, E = (workload[axis] for axis in "BTE")
    weights, values = torch.rand(B, 1, T, device=inputs["values"].device), inputs["values"]
    weights = weights.to(values.dtype)
    gradient = inputs["dout"][:, None]

    def call() -> None:
        torch.bmm(weights, values)
        if direction == FWD_BWD:
            torch.bmm(gradient, values.transpose(1, 2))
            torch.bmm(weights.transpose(1, 2), gradient)

    return call, f"torch.bmm of (B, 1, {T}) and (B, {T}, {E})" + (", and its two gradients" * (direction == FWD_BWD))
