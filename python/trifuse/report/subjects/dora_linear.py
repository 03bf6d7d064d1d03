"""``dora_linear`` in the report."""

from __future__ import annotations

import torch
from torch import Tensor

from trifuse.report import adapters
from trifuse.report.adapters import lent, peft_layer
from trifuse.report.contenders import Contender, backend_contenders, importable, named
from trifuse.report.inputs import Axes, Draw, Inputs
from trifuse.report.subject import OpSubject, Rows
from trifuse.report.workloads import FWD, FWD_BWD, Workload, sizes

__all__ = ["DoraLinear"]

_TENSORS = ("x", "weight", "bias", "lora_A", "lora_B", "magnitude")
_WORK = "dora-1024"


def _work(name: str, title: str, M: int, K: int, N: int, directions: tuple[str, ...], rank: int) -> Workload:
    rivals = tuple((direction, ("reference", "peft")) for direction in directions)
    return Workload(
        name, title, "dora_linear", sizes(M=M, K=K, N=N, R=8), directions=directions, rivals=rivals, rank=rank
    )


class DoraLinear(OpSubject):
    op = "dora_linear"
    axes = Axes(
        {**adapters.LINEAR_AXES, "lora_A": "RK", "lora_B": "NR", "magnitude": "N"},
        weights=("lora_A", "lora_B", "magnitude"), frozen=("weight", "bias"), has_layouts=False,
    )  # fmt: skip
    probed, probes = "N", 8
    small = sizes(M=37, K=40, N=11, R=3)
    explained = sizes(M=512, K=1024, N=1024, R=8)
    floors = named(adapters.BASE)
    measure = adapters.BASE_FLOOR
    measure_text = adapters.BASE_TEXT

    def __init__(self) -> None:
        rival = Contender("peft", "PEFT's layer", "rival", peft, importable("peft"))
        self.contenders = backend_contenders(self.ours, self.refusals, dtypes=("float32",)) | named(rival)

    def quick(self) -> tuple[Workload, ...]:
        return (_work(_WORK, "DoRA of rank 8 on 1024 -> 1024", 512, 1024, 1024, (FWD_BWD,), 1),)

    def full(self) -> tuple[Workload, ...]:
        return (
            *self.quick(),
            _work("dora-4096", "DoRA of rank 8 on 4096 -> 4096", 512, 4096, 4096, (FWD_BWD,), 4),
            _work("dora-4096-row", "one row through DoRA of rank 8", 1, 4096, 4096, (FWD,), 4),
            _work("dora-in", "DoRA of rank 8 on in_proj of Mamba 130M", 512, 768, 3072, (FWD_BWD,), 4),
        )

    def values(self, workload: Workload, draw: Draw) -> dict[str, Tensor]:
        M, K, N, R = (workload[axis] for axis in "MKNR")
        weight = draw.normal(N, K) * K**-0.5
        return {
            "x": draw.normal(M, K),
            "weight": weight,
            "bias": draw.normal(N),
            "lora_A": draw.normal(R, K) * K**-0.5,
            "lora_B": draw.normal(N, R) * R**-0.5,
            "magnitude": torch.linalg.vector_norm(weight, dim=1) * (1 + draw.uniform(N) / 4),
            "dout": draw.normal(M, N),
        }

    def arguments(self, inputs: Inputs) -> tuple[list, dict]:
        return [*(inputs[name] for name in _TENSORS), adapters.SCALE], {}

    def headlines(self, rows: Rows, device: str) -> list[dict]:
        asked = "at most 1.15 x" if device == "cpu" else ""
        return adapters.over_base(rows, _WORK, FWD_BWD, "DoRA 1024 -> 1024, 512 rows,", asked, ("peft",))


def peft(inputs: Inputs) -> Tensor:
    x, weight, bias, A, B, magnitude = (inputs[name] for name in _TENSORS)
    layer = peft_layer(weight.shape[1], weight.shape[0], A.shape[0], dora=True)
    lent(layer.base_layer, weight=weight, bias=bias)
    lent(layer.lora_A["0"], weight=A)
    lent(layer.lora_B["0"], weight=B)
    lent(layer.lora_magnitude_vector["0"], weight=magnitude)
    return layer(x)
