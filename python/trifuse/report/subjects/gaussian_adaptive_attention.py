"""``gaussian_adaptive_attention`` in the report."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable

import torch
from torch import Tensor

from trifuse.report import headlines
from trifuse.report.contenders import Contender, backend_contenders, importable, named
from trifuse.report.floors import COPY, COPY_FLOOR
from trifuse.report.inputs import Axes, Draw, Inputs
from trifuse.report.subject import OpSubject, Rows
from trifuse.report.workloads import FWD, FWD_BWD, Workload, sizes

__all__ = ["GaussianAdaptiveAttention"]

_ALL = ("reference", "package", "package-compiled")
_DIMS = {"gaam-rows": -1, "gaam-columns": 1}  # by workload; any other has its slices along the last axis
_ASKED = {FWD: 30, FWD_BWD: 40}  # times faster than the published package
_ASKED_COPY = 4  # times a copy of the tensor, forward


class GaussianAdaptiveAttention(OpSubject):
    op = "gaussian_adaptive_attention"
    axes = Axes(
        {"x": "BLD", "mean_offset": "HK", "width": "HK", "out": "BLD", "dout": "BLD"},
        weights=("mean_offset", "width"), has_layouts=False,
    )  # fmt: skip
    probed, probes = "B", 2
    small = sizes(B=2, L=37, D=52, H=3, K=5)
    explained = sizes(B=8, L=512, D=1024, H=8, K=5)
    floors = named(COPY)
    measure = COPY_FLOOR
    measure_text = "a copy of as many bytes"

    def __init__(self) -> None:
        self.contenders = backend_contenders(self.ours, self.refusals, dtypes=("float32",)) | RIVALS

    def quick(self) -> tuple[Workload, ...]:
        def work(name: str, title: str, dtypes: tuple[str, ...], rivals: tuple[str, ...], rank: int) -> Workload:
            both = ((FWD, rivals), (FWD_BWD, rivals))
            return Workload(name, title, self.op, self.explained, dtypes=dtypes, rivals=both, rank=rank)

        return (
            work("gaam-rows", "8 heads of 5 Gaussians along the last axis", ("float32", "bfloat16"), _ALL, 0),
            work("gaam-columns", "8 heads of 5 Gaussians along axis 1", ("float32",), ("package",), 1),
        )

    def for_cuda(self, workload: Workload) -> Workload:
        return workload.sized(B=32, L=2048) if workload["B"] == 8 else workload

    def options(self, workload: Workload) -> dict[str, object]:
        return {"dim": _DIMS.get(workload.name, -1)}

    def values(self, workload: Workload, draw: Draw) -> dict[str, Tensor]:
        B, L, D, H, K = (workload[axis] for axis in "BLDHK")
        return {
            "x": draw.normal(B, L, D),
            "mean_offset": draw.normal(H, K).mul_(0.3),
            "width": draw.uniform(H, K) + 1,
            "dout": draw.normal(B, L, D),
        }

    def arguments(self, inputs: Inputs) -> tuple[list, dict]:
        named = {"dim": inputs.options["dim"], "num_heads": inputs["width"].shape[0]}
        return [inputs["x"], inputs["mean_offset"], inputs["width"]], named

    def headlines(self, rows: Rows, device: str) -> list[dict]:
        out = []
        for workload, where in (("gaam-rows", "last axis"), ("gaam-columns", "axis 1")):
            for direction in (FWD, FWD_BWD):
                found = rows.get(f"{workload} {direction}", [])
                row = headlines.pick(found)
                if row is None:
                    continue
                label = f"Gaussian adaptive attention {direction}, {where},"
                asked = {"package": _ASKED[direction]} if device == "cpu" else None
                out += headlines.against(found, row, label, ("package", "package-compiled"), workload, asked)
                if "floor_ratio" in row:
                    goal = f"at most {_ASKED_COPY} x" if direction == FWD else ""
                    out.append(headlines.line(f"{label} over a copy", f"{row['floor_ratio']:.2f} x",
                                              f"{row['title']} / {row['floor_note']}", goal))  # fmt: skip
        return out


@functools.lru_cache(maxsize=4)
def _module(dim: int, heads: int, gaussians: int) -> torch.nn.Module:
    published = importlib.import_module("gaussian_adaptive_attention")
    return published.MultiHeadGaussianAdaptiveAttention(dim, heads, gaussians)


def _call(module: torch.nn.Module, x: Tensor, mean_offset: Tensor, width: Tensor) -> Tensor:
    given = {}
    for head in range(width.shape[0]):
        given[f"attention_heads.{head}.mean_offsets"] = mean_offset[head]
        given[f"attention_heads.{head}.c"] = width[head]
    return torch.func.functional_call(module, given, (x,))


@functools.cache
def _compiled_call() -> Callable[..., Tensor]:
    torch._dynamo.config.recompile_limit = 256
    return torch.compile(_call, dynamic=False)


def package(inputs: Inputs) -> Tensor:
    """The published module with the parameters of the call."""
    module = _module(inputs.options["dim"], *inputs["width"].shape)
    return _call(module, inputs["x"], inputs["mean_offset"], inputs["width"])


def package_compiled(inputs: Inputs) -> Tensor:
    module = _module(inputs.options["dim"], *inputs["width"].shape)
    return _compiled_call()(module, inputs["x"], inputs["mean_offset"], inputs["width"])


_MISSING = importable("gaussian_adaptive_attention")
RIVALS = named(
    Contender("package", "gaussian-adaptive-attention: published package", "rival", package, _MISSING,
              dtypes=("float32",)),
    Contender("package-compiled", "the package under torch.compile", "rival", package_compiled, _MISSING,
              dtypes=("float32",), checked=("full",), compiles=True),
)  # fmt: skip
