"""``gaussian_gate`` in the report."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from trifuse import reference
from trifuse.report import headlines
from trifuse.report.contenders import Contender, backend_contenders, named
from trifuse.report.floors import COPY, COPY_FLOOR
from trifuse.report.inputs import Axes, Draw, Inputs
from trifuse.report.subject import OpSubject, Rows
from trifuse.report.workloads import FWD, FWD_BWD, Workload, sizes

__all__ = ["GaussianGate"]

DENSITY, FEATURE = "gate-density", "gate-feature"


class GaussianGate(OpSubject):
    op = "gaussian_gate"
    # x is (batch, layers, time, features); a feature gate looks across layers, a density gate along features.
    axes = Axes(
        {"x": "BNTF", "mean_offset": "P", "width": "P", "alpha": "P", "out": "BNTF", "dout": "BNTF"},
        weights=("mean_offset", "width", "alpha"), has_layouts=False,
    )  # fmt: skip
    probed, probes = "B", 2
    small = sizes(B=2, N=7, T=9, F=40, H=2, K=3)
    explained = sizes(B=4, N=24, T=200, F=768, H=1, K=1)
    floors = named(COPY)
    measure = COPY_FLOOR
    measure_text = "a copy of as many bytes"

    def __init__(self) -> None:
        self.contenders = backend_contenders(self.ours, self.refusals, dtypes=("float32",)) | RIVALS

    def quick(self) -> tuple[Workload, ...]:
        def work(name: str, title: str, shape: dict[str, int], rival: str, rank: int) -> Workload:
            return Workload(name, title, self.op, shape, rivals=((FWD, (rival,)), (FWD_BWD, (rival,))), rank=rank)

        density = sizes(B=8, N=1, T=512, F=1024, H=8, K=5)
        return (
            work(FEATURE, "feature gate over 24 layers of a speech encoder", self.explained, "compiled", 2),
            work(DENSITY, "density gate, 8 heads of 5 Gaussians", density, "reference", 3),
        )

    def for_cuda(self, workload: Workload) -> Workload:
        return workload.sized(B=64)

    def options(self, workload: Workload) -> dict[str, object]:
        if workload.name == DENSITY:
            return {"kind": "density", "dim": -1, "num_heads": workload["H"]}
        return {"kind": "feature", "dim": 1, "feature_dim": -1}

    def values(self, workload: Workload, draw: Draw) -> dict[str, Tensor]:
        B, N, T, F, H, K = (workload[axis] for axis in "BNTFHK")
        density = workload.name == DENSITY
        shape = (H, K) if density else (F,)
        values = {
            "x": draw.normal(B, N, T, F),
            "mean_offset": draw.normal(*shape).mul_(0.3),
            "width": draw.uniform(*shape) + 1,
            "dout": draw.normal(B, N, T, F),
        }
        return values | ({"alpha": draw.uniform(H)} if density else {})

    def arguments(self, inputs: Inputs) -> tuple[list, dict]:
        alpha = {} if inputs.get("alpha") is None else {"alpha": inputs["alpha"]}
        return [inputs["x"], inputs["mean_offset"], inputs["width"]], {**inputs.options, **alpha}

    def headlines(self, rows: Rows, device: str) -> list[dict]:
        out = []
        for workload, what in ((FEATURE, "feature gate"), (DENSITY, "density gate")):
            for direction in (FWD, FWD_BWD):
                found = rows.get(f"{workload} {direction}", [])
                row = headlines.pick(found)
                if row is not None:
                    out += headlines.against(found, row, f"{what} {direction}", where=workload)
                    if "floor_ratio" in row:
                        out.append(headlines.line(f"{what} {direction} over a copy", f"{row['floor_ratio']:.2f} x",
                                                  f"{row['title']} / {row['floor_note']}"))  # fmt: skip
        return out


@functools.cache
def _compiled_reference() -> Callable[..., Tensor]:
    torch._dynamo.config.recompile_limit = 256
    return torch.compile(reference.gaussian_gate, dynamic=False)


def compiled(inputs: Inputs) -> Tensor:
    """The reference under torch.compile: nobody publishes these gates as kernels."""
    alpha = {} if inputs.get("alpha") is None else {"alpha": inputs["alpha"]}
    return _compiled_reference()(inputs["x"], inputs["mean_offset"], inputs["width"], **inputs.options, **alpha)


RIVALS = named(
    Contender("compiled", "the reference under torch.compile", "rival", compiled, dtypes=("float32",),
              checked=("full",), compiles=True),
)  # fmt: skip
