"""``lora_linear_multi`` in the report."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from trifuse.report import adapters
from trifuse.report.adapters import lent, peft_layer
from trifuse.report.contenders import Contender, backend_contenders, importable, named
from trifuse.report.inputs import Axes, Draw, Inputs
from trifuse.report.subject import OpSubject, Rows
from trifuse.report.workloads import FWD, FWD_BWD, Entry, Workload, sizes

__all__ = ["LoraLinearMulti"]

_MOST = 64  # adapters
_DECODE, _TRAIN = "multi-decode", "multi-train"


def _work(name: str, title: str, shape: dict[str, int], direction: str, rivals: tuple[str, ...], rank: int) -> Workload:
    return Workload(
        name, title, "lora_linear_multi", shape, directions=(direction,), rivals=((direction, rivals),), rank=rank
    )


class LoraLinearMulti(OpSubject):
    """The adapters are arguments of their own, A0, B0, A1 and so on: they are leaves of their own in a model, too."""

    op = "lora_linear_multi"
    axes = Axes(
        {**adapters.LINEAR_AXES, **{f"A{i}": "RK" for i in range(_MOST)}, **{f"B{i}": "NR" for i in range(_MOST)},
         "index": "M"},
        weights=tuple(f"{factor}{i}" for factor in "AB" for i in range(_MOST)), frozen=("weight", "bias"),
        has_layouts=False,
    )  # fmt: skip
    probed, probes = "N", 8
    small = sizes(M=37, K=40, N=11, R=3, J=4)
    explained = sizes(M=64, K=4096, N=4096, R=8, J=32)
    floors = named(adapters.BASE)
    measure = adapters.BASE_FLOOR
    measure_text = adapters.BASE_TEXT

    def __init__(self) -> None:
        mixed = Contender("peft", "PEFT's mixed batch", "rival", peft, importable("peft"), _forward_only)
        each = Contender("loop", "eager PyTorch: a loop over the adapters", "rival", loop)
        self.contenders = backend_contenders(self.ours, self.refusals, dtypes=("float32",)) | named(mixed, each)

    def quick(self) -> tuple[Workload, ...]:
        train = sizes(M=512, K=1024, N=1024, R=8, J=8)
        return (
            _work(_DECODE, "64 rows over 32 adapters of rank 8", self.explained, FWD, ("peft", "loop"), 1),
            _work(_TRAIN, "512 rows over 8 adapters of rank 8", train, FWD_BWD, ("peft", "loop"), 3),
        )

    def full(self) -> tuple[Workload, ...]:
        mlp, long = sizes(M=32, K=4096, N=14336, R=16, J=8), sizes(M=4096, K=1024, N=1024, R=16, J=32)
        return (
            *self.quick(),
            _work("multi-mlp", "32 rows over 8 adapters of rank 16, Llama 8B's MLP", mlp, FWD, ("peft", "loop"), 4),
            _work("multi-train-long", "4096 rows over 32 adapters of rank 16", long, FWD_BWD, ("loop",), 4),
        )

    def values(self, workload: Workload, draw: Draw) -> dict[str, Tensor]:
        M, K, N, R, J = (workload[axis] for axis in "MKNRJ")
        return {
            "x": draw.normal(M, K),
            "weight": draw.normal(N, K) * K**-0.5,
            "bias": draw.normal(N),
            **{f"A{i}": draw.normal(R, K) * K**-0.5 for i in range(J)},
            **{f"B{i}": draw.normal(N, R) * R**-0.5 for i in range(J)},
            "index": torch.arange(M, device=draw.device) % J,
            "dout": draw.normal(M, N),
        }

    def arguments(self, inputs: Inputs) -> tuple[list, dict]:
        A, B = factors(inputs)
        tensors = [inputs[name] for name in ("x", "weight", "bias")]
        return [*tensors, A, B, [adapters.SCALE] * len(A), inputs["index"]], {}

    def headlines(self, rows: Rows, device: str) -> list[dict]:
        asked = "at most 1.05 x" if device == "cpu" else ""
        return [
            *adapters.over_base(rows, _DECODE, FWD, "64 rows over 32 adapters", asked),
            *adapters.over_base(rows, _TRAIN, FWD_BWD, "512 rows over 8 adapters"),
        ]


def factors(inputs: Inputs) -> tuple[list[Tensor], list[Tensor]]:
    count = sum(name[0] == "A" for name in inputs.tensors)
    A, B = ([inputs[f"{factor}{i}"] for i in range(count)] for factor in "AB")
    return A, B


def _forward_only(entry: Entry) -> str | None:
    return "PEFT refuses batches of mixed adapters in training" if entry.direction == FWD_BWD else None


@functools.lru_cache(maxsize=8)
def _names(rows: int, count: int) -> list[str]:
    return [str(row % count) for row in range(rows)]


def peft(inputs: Inputs) -> Tensor:
    """With ``adapter_names``, whose list belongs to the request and is there before the call."""
    weight, (A, B) = inputs["weight"], factors(inputs)
    layer = peft_layer(weight.shape[1], weight.shape[0], A[0].shape[0], adapters=len(A))
    lent(layer.base_layer, weight=weight, bias=inputs["bias"])
    for i in range(len(A)):
        lent(layer.lora_A[str(i)], weight=A[i])
        lent(layer.lora_B[str(i)], weight=B[i])
    return layer(inputs["x"], adapter_names=_names(len(inputs["x"]), len(A)))


def loop(inputs: Inputs) -> Tensor:
    """The base product, and the rows of each adapter through its factors."""
    x, index = inputs["x"], inputs["index"]
    out = F.linear(x, inputs["weight"], inputs["bias"])
    for i, (A, B) in enumerate(zip(*factors(inputs), strict=True)):
        rows = (index == i).nonzero()[:, 0]
        update = F.linear(F.linear(x[rows].to(A.dtype), A), B) * adapters.SCALE
        out.index_add_(0, rows, update.to(out.dtype))
    return out
