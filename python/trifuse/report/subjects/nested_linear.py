"""``nested_linear`` in the report."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from trifuse.backends import COMPOSITE
from trifuse.report import headlines
from trifuse.report.contenders import Contender, Floor, backend_contenders, forced, named
from trifuse.report.inputs import Axes, Draw, Inputs
from trifuse.report.subject import OpSubject, Rows
from trifuse.report.workloads import FWD, FWD_BWD, Workload, sizes

__all__ = ["NestedLinear"]

_WORK = "nested-resnet50"


class NestedLinear(OpSubject):
    op = "nested_linear"
    axes = Axes(
        {"x": "BK", "weight": "NK", "bias": "N", "out": "WBN", "dout": "WBN"}, has_layouts=False,
    )  # fmt: skip
    probed, probes = "N", 8
    small = sizes(B=37, K=40, N=11, W=5)
    explained = sizes(B=256, K=2048, N=1000, W=9)
    measure = "widest"
    measure_text = "the layer at its whole width alone"

    def __init__(self) -> None:
        ours = Contender(
            COMPOSITE, "trifuse: torch's products", "kernel", forced(COMPOSITE, self.ours), checked=("small", "full")
        )
        slices = Contender("slices", "a product of slices per width (MRL-E)", "rival", per_width)
        reference = backend_contenders(self.ours, self.refusals, dtypes=("float32",))["reference"]
        self.contenders = named(ours, slices, reference)
        self.floors = named(Floor(self.measure, "floor: the layer at its whole width", widest))

    def quick(self) -> tuple[Workload, ...]:
        both = ((FWD, ("slices", "reference")), (FWD_BWD, ("slices", "reference")))
        title = "the classifier of a ResNet-50 at nested widths 8 to 2048"
        return (Workload(_WORK, title, self.op, self.explained, rivals=both, rank=3),)

    def for_cuda(self, workload: Workload) -> Workload:
        return workload.sized(B=4096)

    def values(self, workload: Workload, draw: Draw) -> dict[str, Tensor]:
        B, K, N = (workload[axis] for axis in "BKN")
        return {
            "x": draw.normal(B, K),
            "weight": draw.normal(N, K) * K**-0.5,
            "bias": draw.normal(N),
            "dout": draw.normal(len(_widths(workload)), B, N),
        }

    def options(self, workload: Workload) -> dict[str, object]:
        return {"widths": _widths(workload)}

    def arguments(self, inputs: Inputs) -> tuple[list, dict]:
        return [inputs["x"], inputs["weight"], inputs["bias"], inputs.options["widths"]], {}

    def headlines(self, rows: Rows, device: str) -> list[dict]:
        out = []
        for direction in (FWD, FWD_BWD):
            found = rows.get(f"{_WORK} {direction}", [])
            row = headlines.pick(found)
            if row is not None:
                out += headlines.against(found, row, f"nested linear {direction}", where=_WORK)
                if "floor_ratio" in row:
                    out.append(headlines.line(f"nested linear {direction} over its widest width",
                                              f"{row['floor_ratio']:.2f} x",
                                              f"{row['title']} / {row['floor_note']}"))  # fmt: skip
        return out


def _widths(workload: Workload) -> list[int]:
    """K and its halves, W of them or as many as there are."""
    return sorted({max(1, workload["K"] >> i) for i in range(workload["W"])})


def per_width(inputs: Inputs) -> Tensor:
    """What the paper's own layer does with tied weights: one product per width, of slices."""
    x, weight, bias = inputs["x"], inputs["weight"], inputs["bias"]
    return torch.stack([F.linear(x[:, :width], weight[:, :width], bias) for width in inputs.options["widths"]])


def widest(workload: Workload, inputs: Inputs, direction: str) -> tuple[Callable[[], object], str]:
    """One product forward, two more backward."""
    x, weight, bias, gradient = inputs["x"], inputs["weight"], inputs["bias"], inputs["dout"][-1]

    def call() -> None:
        F.linear(x, weight, bias)
        if direction == FWD_BWD:
            torch.mm(gradient, weight)
            torch.mm(gradient.t(), x)

    B, K, N = (workload[axis] for axis in "BKN")
    return call, f"F.linear of ({B}, {K}) with ({N}, {K})" + (", and its two gradients" * (direction == FWD_BWD))
