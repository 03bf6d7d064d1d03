"""``lora_merge_`` and ``lora_swap_`` in the report."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

import trifuse
from trifuse.report import headlines
from trifuse.report.adapters import SCALE
from trifuse.report.contenders import Contender, backend_contenders, named
from trifuse.report.floors import COPY_FLOOR, UPDATE_COPY
from trifuse.report.inputs import Axes, Draw, Inputs
from trifuse.report.subject import OpSubject, Rows
from trifuse.report.workloads import FWD, Workload, sizes

__all__ = ["LoraMerge", "LoraSwap"]


class _Update(OpSubject):
    """An op that changes a weight in place: its output is the weight."""

    probed, probes = "N", 8
    small = sizes(K=40, N=37, R=3)
    explained = sizes(K=4096, N=4096, R=16)
    floors = named(UPDATE_COPY)
    measure = COPY_FLOOR
    measure_text = "a copy of as many bytes"
    rival: Contender
    label: str

    def __init__(self) -> None:
        self.contenders = backend_contenders(self.ours, self.refusals, dtypes=("float32",)) | named(self.rival)

    def work(self, name: str, title: str, rank: int, **extents: int) -> Workload:
        return Workload(
            name, title, self.op, extents, directions=(FWD,), rivals=((FWD, (self.rival.name,)),), rank=rank
        )

    def values(self, workload: Workload, draw: Draw) -> dict[str, Tensor]:
        K, N, R = (workload[axis] for axis in "KNR")
        return {
            "weight": draw.normal(N, K) * K**-0.5,
            "lora_A": draw.normal(R, K) * K**-0.5,
            "lora_B": draw.normal(N, R) * R**-0.5,
        }

    def full(self) -> tuple[Workload, ...]:
        (first,) = self.quick()
        first = replace(first, dtypes=("float32", "bfloat16"), on_request=False)
        mlp = self.work(f"{first.name}-mlp", "Llama 8B's MLP", 4, K=4096, N=14336, R=16)
        return first, replace(mlp, dtypes=("float32", "bfloat16"))

    def headlines(self, rows: Rows, device: str) -> list[dict]:
        name = self.quick()[0].name
        found = rows.get(f"{name} {FWD}", [])
        row = headlines.pick(found)
        if row is None:
            return []
        out = headlines.against(found, row, self.label, where=name)
        if "floor_ratio" in row:
            detail = f"{row['title']} / {row['floor_note']}"
            out.append(headlines.line(f"{self.label} over a copy", f"{row['floor_ratio']:.2f} x", detail))
        return out


def add(inputs: Inputs) -> Tensor:
    """``W += scale * B @ A``, as PEFT merges."""
    weight = inputs["weight"]
    weight += ((inputs["lora_B"] @ inputs["lora_A"]) * SCALE).to(weight.dtype)
    return weight


def exchange(inputs: Inputs) -> Tensor:
    """The old adapter subtracted, the new one added."""
    weight = inputs["weight"]
    weight -= ((inputs["old_B"] @ inputs["old_A"]) * SCALE).to(weight.dtype)
    return add(inputs)


class LoraMerge(_Update):
    op = "lora_merge_"
    axes = Axes(
        {"weight": "NK", "lora_A": "RK", "lora_B": "NR", "out": "NK"}, weights=("lora_A", "lora_B"),
        mutated=("weight",), has_layouts=False,
    )  # fmt: skip
    rival = Contender("product", "eager PyTorch: W += s B A", "rival", add)
    label = "merging rank 16 into 4096 x 4096"

    def quick(self) -> tuple[Workload, ...]:
        return (self.work("lora-merge", "merging an adapter of rank 16 into 4096 x 4096", 3, **self.explained),)

    def ours(self, inputs: Inputs) -> Tensor:
        positional, options = self.arguments(inputs)
        trifuse.lora_merge_(*positional, **options)
        return inputs["weight"]

    def arguments(self, inputs: Inputs) -> tuple[list, dict]:
        # No copy is kept: eager merging has none either.
        return [*(inputs[name] for name in ("weight", "lora_A", "lora_B")), SCALE], {"keep": False}


class LoraSwap(_Update):
    op = "lora_swap_"
    axes = Axes(
        {"weight": "NK", "original": "NK", "old_A": "RK", "old_B": "NR", "lora_A": "RK", "lora_B": "NR", "out": "NK"},
        weights=("old_A", "old_B", "lora_A", "lora_B"), mutated=("weight",), has_layouts=False,
    )  # fmt: skip
    rival = Contender("products", "eager PyTorch: W -= s B A, W += s B' A'", "rival", exchange)
    label = "swapping adapters of rank 16 in 4096 x 4096"

    def quick(self) -> tuple[Workload, ...]:
        title = "an adapter of rank 16 in the place of another, 4096 x 4096"
        return (replace(self.work("lora-swap", title, 4, **self.explained), on_request=True),)

    def values(self, workload: Workload, draw: Draw) -> dict[str, Tensor]:
        new, old = super().values(workload, draw), super().values(workload, draw)
        merged = old["weight"] + (old["lora_B"] @ old["lora_A"]) * SCALE
        old_A, old_B = old["lora_A"], old["lora_B"]
        return new | {"weight": merged, "original": old["weight"], "old_A": old_A, "old_B": old_B}

    def ours(self, inputs: Inputs) -> Tensor:
        positional, options = self.arguments(inputs)
        trifuse.lora_swap_(*positional, **options)
        return inputs["weight"]

    def arguments(self, inputs: Inputs) -> tuple[list, dict]:
        weight = inputs["weight"]
        merge = trifuse.LoraMerge(weight, inputs["original"], "nearest", torch.zeros(2))
        return [weight, merge, inputs["lora_A"], inputs["lora_B"], SCALE], {}
