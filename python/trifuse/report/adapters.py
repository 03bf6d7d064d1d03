"""What the subjects of low-rank adapters share: the layers of other packages, the layer without an adapter, shapes.

A rival's layer is made without memory of its own and lent the tensors of the call, so that it computes on the same
weights and its gradients are those of the call's own leaves.
"""

from __future__ import annotations

import functools
import importlib
import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trifuse.report import headlines
from trifuse.report.contenders import Floor
from trifuse.report.inputs import Inputs
from trifuse.report.subject import Rows
from trifuse.report.workloads import FWD_BWD, Workload

__all__ = [
    "BASE", "BASE_FLOOR", "BASE_TEXT", "LINEAR_AXES", "SCALE", "lent", "loralib_layer", "over_base", "peft_layer",
]  # fmt: skip

BASE_FLOOR = "base-floor"
BASE_TEXT = "the frozen layer alone"
SCALE = 2.0  # alpha / r of every adapter that is measured
LINEAR_AXES = {"x": "MK", "weight": "NK", "bias": "N", "out": "MN", "dout": "MN"}


def lent(module: nn.Module, **tensors: Tensor) -> None:
    """Give a module tensors in the place of its parameters, without copies or checks."""
    for name, tensor in tensors.items():
        module._parameters.pop(name, None)
        vars(module)[name] = tensor


@functools.lru_cache(maxsize=8)
def peft_layer(K: int, N: int, rank: int, dropout: float = 0.0, dora: bool = False, adapters: int = 1) -> nn.Module:
    """PEFT's layer around a linear one. Its tensors are to be lent; its adapters are called "0", "1" and so on."""
    peft = importlib.import_module("peft")
    model = nn.Sequential(nn.Linear(K, N, device="meta"))
    options = {"lora_alpha": SCALE * rank, "lora_dropout": dropout, "use_dora": dora, "target_modules": ["0"]}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")
        for adapter in range(adapters):
            peft.inject_adapter_in_model(
                peft.LoraConfig(r=rank, **options), model, adapter_name=str(adapter), low_cpu_mem_usage=True
            )
    return model[0]


@functools.lru_cache(maxsize=8)
def loralib_layer(K: int, N: int, rank: int, dropout: float = 0.0) -> nn.Module:
    """loralib's layer. Its tensors are to be lent."""
    options = {"r": rank, "lora_alpha": SCALE * rank, "lora_dropout": dropout, "merge_weights": False}
    return importlib.import_module("loralib").Linear(K, N, **options, device="meta")


def base_layer(workload: Workload, inputs: Inputs, direction: str) -> tuple[Callable[[], object], str]:
    """The linear layer without an adapter: forward, and the gradient of its input alone."""
    weight, bias = inputs["weight"], inputs["bias"]
    x = inputs["x"].detach().requires_grad_(direction == FWD_BWD)

    def call() -> None:
        out = F.linear(x, weight, bias)
        if direction == FWD_BWD:
            torch.autograd.grad(out, x, inputs.dout)

    note = f"F.linear of ({workload['M']}, {workload['K']}) with a frozen ({workload['N']}, {workload['K']})"
    return call, note + ", and the gradient of its input" * (direction == FWD_BWD)


BASE = Floor(BASE_FLOOR, "floor: " + BASE_TEXT, base_layer)


def over_base(
    rows: Rows, name: str, direction: str, label: str, asked: str = "", rivals: tuple[str, ...] | None = None
) -> list[dict]:
    """Headlines of a workload: how near the layer without an adapter, and against whom."""
    found = rows.get(f"{name} {direction}", [])
    row = headlines.pick(found)
    if row is None:
        return []
    out, label = [], f"{label} {direction}"
    if "floor_ratio" in row:
        detail = f"{row['title']} / {row['floor_note']}"
        out.append(headlines.line(f"{label} over {BASE_TEXT}", f"{row['floor_ratio']:.2f} x", detail, asked))
    return out + headlines.against(found, row, label, rivals, name)
