"""``lora_linear`` in the report."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from trifuse.report import adapters
from trifuse.report.adapters import lent, loralib_layer, peft_layer
from trifuse.report.contenders import Contender, backend_contenders, importable, named
from trifuse.report.inputs import Axes, Draw, Inputs
from trifuse.report.subject import OpSubject, Rows
from trifuse.report.workloads import FWD, FWD_BWD, Workload, sizes

__all__ = ["LoraLinear"]

_SHAPES = {  # columns, outputs
    "in": (768, 3072, "in_proj of Mamba 130M"),
    "x": (1536, 80, "x_proj of Mamba 130M"),
    "dt": (48, 1536, "dt_proj of Mamba 130M"),
    "out": (1536, 768, "out_proj of Mamba 130M"),
    "1024": (1024, 1024, "1024 -> 1024"),
    "4096": (4096, 4096, "4096 -> 4096"),
    "mlp": (4096, 14336, "the MLP of Llama 8B"),
}
_ROWS, _RANKS = (1, 32, 512, 4096), (1, 4, 16, 64)
_ASKED = {  # times the layer alone, on two threads
    "lora-1024": "at most 1.08 x", "lora-1024-dropout": "at most 1.15 x", "lora-4096": "at most 1.05 x",
    "lora-4096-row": "at most 1.03 x",
}  # fmt: skip


def _work(
    name: str, title: str, M: int, K: int, N: int, R: int, *, drop: int = 0, directions: tuple[str, ...] = (FWD_BWD,),
    rivals: tuple[str, ...] = ("peft",), rank: int = 1,
) -> Workload:  # fmt: skip
    return Workload(
        name, title, "lora_linear", sizes(M=M, K=K, N=N, R=R, drop=drop), directions=directions,
        rivals=tuple((direction, rivals) for direction in directions), rank=rank,
    )  # fmt: skip


class LoraLinear(OpSubject):
    op = "lora_linear"
    axes = Axes(
        {**adapters.LINEAR_AXES, "lora_A": "RK", "lora_B": "NR"}, weights=("lora_A", "lora_B"),
        frozen=("weight", "bias"), has_layouts=False,
    )  # fmt: skip
    probed, probes = "N", 8
    # Others draw dropout masks of their own: the small case, on which they are checked, has none.
    small = sizes(M=37, K=40, N=11, R=3, drop=0)
    explained = sizes(M=512, K=1024, N=1024, R=8, drop=0)
    floors = named(adapters.BASE)
    measure = adapters.BASE_FLOOR
    measure_text = adapters.BASE_TEXT

    def __init__(self) -> None:
        self.contenders = backend_contenders(self.ours, self.refusals, dtypes=("float32",)) | RIVALS

    def quick(self) -> tuple[Workload, ...]:
        everyone = ("reference", "peft", "loralib")
        return (
            _work("lora-1024", "LoRA of rank 8 on 1024 -> 1024", 512, 1024, 1024, 8, rivals=everyone),
            _work("lora-1024-dropout", "the same with dropout 0.1", 512, 1024, 1024, 8, drop=10),
            _work("lora-4096", "LoRA of rank 16 on 4096 -> 4096", 512, 4096, 4096, 16),
            _work("lora-4096-row", "one row through LoRA of rank 16", 1, 4096, 4096, 16, directions=(FWD,)),
        )

    def full(self) -> tuple[Workload, ...]:
        half = tuple(replace(one, dtypes=("float32", "bfloat16")) for one in self.quick())
        return (*half, *_grid())

    def for_cuda(self, workload: Workload) -> Workload:
        if workload.name != "lora-4096":
            return workload
        return replace(workload.sized(M=4096), dtypes=("float32", "bfloat16"))

    def values(self, workload: Workload, draw: Draw) -> dict[str, Tensor]:
        M, K, N, R = (workload[axis] for axis in "MKNR")
        return {
            "x": draw.normal(M, K),
            "weight": draw.normal(N, K) * K**-0.5,
            "bias": draw.normal(N),
            "lora_A": draw.normal(R, K) * K**-0.5,
            "lora_B": draw.normal(N, R) * R**-0.5,
            "dout": draw.normal(M, N),
        }

    def options(self, workload: Workload) -> dict[str, object]:
        drop = workload["drop"] / 100
        return {"dropout": drop, "seed": 1234 if drop else None}

    def arguments(self, inputs: Inputs) -> tuple[list, dict]:
        tensors = [inputs[name] for name in ("x", "weight", "bias", "lora_A", "lora_B")]
        return [*tensors, adapters.SCALE], dict(inputs.options)

    def headlines(self, rows: Rows, device: str) -> list[dict]:
        out = []
        for one in self.quick():
            asked = _ASKED[one.name] if device == "cpu" else ""
            count = f"{one['M']} rows" if one["M"] > 1 else "one row"
            label = f"LoRA {one['K']} -> {one['N']}, {count}" + ", dropout 0.1" * bool(one["drop"])
            out += adapters.over_base(rows, one.name, one.directions[0], label + ",", asked, ("peft", "loralib"))
        return out


def _grid() -> list[Workload]:
    """Every shape at every number of rows, and other ranks at one of them."""
    out = []
    for name, (K, N, title) in _SHAPES.items():
        for rows in _ROWS:
            if (name, rows) not in (("1024", 512), ("4096", 1)):
                directions = (FWD,) if rows == 1 else (FWD_BWD,)
                text = f"LoRA of rank 8 on {title}, {rows} rows"
                out.append(_work(f"lora-{name}-m{rows}", text, rows, K, N, 8, directions=directions, rank=4))
    for name in ("in", "1024"):
        K, N, title = _SHAPES[name]
        for R in _RANKS:
            out.append(_work(f"lora-{name}-r{R}", f"LoRA of rank {R} on {title}", 512, K, N, R, rank=5))
    return out


def peft(inputs: Inputs) -> Tensor:
    x, weight, A, B = (inputs[name] for name in ("x", "weight", "lora_A", "lora_B"))
    layer = peft_layer(weight.shape[1], weight.shape[0], A.shape[0], inputs.options["dropout"])
    lent(layer.base_layer, weight=weight, bias=inputs["bias"])
    lent(layer.lora_A["0"], weight=A)
    lent(layer.lora_B["0"], weight=B)
    return layer(x)


def loralib(inputs: Inputs) -> Tensor:
    weight, A, B = (inputs[name] for name in ("weight", "lora_A", "lora_B"))
    layer = loralib_layer(weight.shape[1], weight.shape[0], A.shape[0], inputs.options["dropout"])
    lent(layer, weight=weight, bias=inputs["bias"], lora_A=A, lora_B=B)
    return layer(inputs["x"])


RIVALS = named(
    Contender("peft", "PEFT's layer", "rival", peft, importable("peft")),
    Contender("loralib", "loralib's layer", "rival", loralib, importable("loralib"), dtypes=("float32",)),
)  # fmt: skip
