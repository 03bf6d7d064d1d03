"""``causal_conv1d`` in the report."""

from __future__ import annotations

import importlib
import importlib.util

import torch.nn.functional as F
from torch import Tensor

from trifuse.report import headlines
from trifuse.report.contenders import Contender, backend_contenders, named
from trifuse.report.floors import COPY, COPY_FLOOR
from trifuse.report.inputs import Axes, Draw, Inputs
from trifuse.report.subject import OpSubject, Rows
from trifuse.report.workloads import FWD, FWD_BWD, Workload, sizes

__all__ = ["CausalConv1d"]

_RIVALS = ("reference", "conv1d", "shift-add", "causal_conv1d")


def _work(name: str, title: str, D: int, rank: int, B: int = 1, L: int = 2048) -> Workload:
    return Workload(
        name, title, "causal_conv1d", sizes(B=B, D=D, L=L, W=4), dtypes=("float32", "bfloat16"),
        layouts=("bld", "bdl"), rivals=((FWD, _RIVALS), (FWD_BWD, _RIVALS)), rank=rank,
    )  # fmt: skip


class CausalConv1d(OpSubject):
    op = "causal_conv1d"
    axes = Axes(
        {"x": "BLD", "weight": "DW", "bias": "D", "out": "BLD", "dout": "BLD"}, weights=("weight", "bias")
    )  # fmt: skip
    small = sizes(B=2, D=72, L=131)
    explained = sizes(B=1, D=1536, L=2048, W=4)
    least = sizes(W=2)
    floors = named(COPY)
    measure = COPY_FLOOR
    measure_text = "a copy of as many bytes"

    def __init__(self) -> None:
        self.contenders = backend_contenders(self.ours, self.refusals, layouts=("bdl",), dtypes=("float32",)) | RIVALS

    def quick(self) -> tuple[Workload, ...]:
        return (
            _work("conv-130m", "convolution of Mamba 130M, silu, 2048 tokens", 1536, 0),
            _work("conv-2.8b", "convolution of Mamba 2.8B, silu, 2048 tokens", 5120, 4),
        )

    def full(self) -> tuple[Workload, ...]:
        long = _work("conv-130m-32k", "the convolution of Mamba 130M, 32768 tokens", 1536, 5, L=32768)
        return (*self.quick(), long)

    def for_cuda(self, workload: Workload) -> Workload:
        return workload.sized(B=8)

    def values(self, workload: Workload, draw: Draw) -> dict[str, Tensor]:
        B, D, L, W = (workload[axis] for axis in "BDLW")
        return {
            "x": draw.normal(B, L, D),
            "weight": draw.normal(D, W).mul_(0.5),
            "bias": draw.normal(D).mul_(0.1),
            "dout": draw.normal(B, L, D),
        }

    def arguments(self, inputs: Inputs) -> tuple[list, dict]:
        named = {"activation": "silu", "layout": inputs.layout or "bdl"}
        return [inputs["x"], inputs["weight"], inputs["bias"]], named

    def headlines(self, rows: Rows, device: str) -> list[dict]:
        out = []
        for direction in (FWD, FWD_BWD):
            found = rows.get(f"conv-130m {direction}", [])
            for layout in ("bld", "bdl"):
                row = headlines.pick(found, layout=layout)
                if row is not None:
                    label = f"causal convolution {direction}, {layout},"
                    out += headlines.against(found, row, label, ("conv1d", "shift-add", "causal_conv1d"), "conv-130m")
                    if "floor_ratio" in row:
                        out.append(headlines.line(f"{label} over a copy", f"{row['floor_ratio']:.2f} x",
                                                  f"{row['title']} / {row['floor_note']}"))  # fmt: skip
        return out


def conv1d(inputs: Inputs) -> Tensor:
    """``torch.nn.functional.conv1d`` with as many groups as channels, in "bdl", as Mamba's fallbacks call it."""
    x, weight, bias = (inputs[name].to(inputs["x"].dtype) for name in ("x", "weight", "bias"))
    channels, width = weight.shape
    return F.silu(F.conv1d(x, weight[:, None], bias, padding=width - 1, groups=channels)[..., : x.shape[2]])


def shift_add(inputs: Inputs) -> Tensor:
    """One shifted product per tap, in "bld"."""
    x, weight, bias = (inputs[name].to(inputs["x"].dtype) for name in ("x", "weight", "bias"))
    width, seqlen = weight.shape[1], x.shape[1]
    padded = F.pad(x, (0, 0, width - 1, 0))
    out = padded[:, :seqlen] * weight[:, 0] + bias
    for tap in range(1, width):
        out = out + padded[:, tap : tap + seqlen] * weight[:, tap]
    return F.silu(out)


def published_missing(device: str) -> str | None:
    if importlib.util.find_spec("causal_conv1d_cuda") is None:
        return "the published causal_conv1d is neither installed nor in .rivals/"
    return None


def published(inputs: Inputs) -> Tensor:
    function = importlib.import_module("causal_conv1d").causal_conv1d_fn
    x, turn = inputs["x"], inputs.layout == "bld"
    x = x.transpose(1, 2) if turn else x
    weight, bias = (inputs[name].to(x.dtype) for name in ("weight", "bias"))
    out = function(x, weight, bias, activation="silu")
    return out.transpose(1, 2) if turn else out


RIVALS = named(
    Contender("conv1d", "torch: depthwise conv1d, silu", "rival", conv1d, layouts=("bdl",)),
    Contender("shift-add", "torch: shifted products, silu", "rival", shift_add, layouts=("bld",)),
    Contender("causal_conv1d", "causal_conv1d: published CUDA kernel", "rival", published, published_missing,
              layouts=("bdl", "bld"), devices=("cuda",)),
)  # fmt: skip
