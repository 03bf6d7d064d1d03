"""``optim.LowRankAdamW`` in the report: a step over the factors of many adapters."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from trifuse.optim import LowRankAdamW
from trifuse.report import headlines
from trifuse.report.contenders import Contender, backend_contenders, named
from trifuse.report.floors import COPY_FLOOR, UPDATE_COPY
from trifuse.report.inputs import Axes, Draw, Inputs
from trifuse.report.subject import OpSubject, Rows
from trifuse.report.workloads import FWD, Workload, sizes

__all__ = ["LoraAdamW"]

_WORK = "lora-adamw"
_STEPS_BEFORE = 10  # steps that the moments of the first call come from
_OPTIONS = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 1e-2}
_PARTS = ("grad", "exp_avg", "exp_avg_sq")


class LoraAdamW(OpSubject):
    """The adapters of P layers are stacked; each of their matrices is a parameter."""

    op = "lora_adamw"
    axes = Axes(
        {"A": "PRK", "B": "PNR", **{f"{part}_A": "PRK" for part in _PARTS}, **{f"{part}_B": "PNR" for part in _PARTS},
         "out": "PRK"},
        weights=tuple(f"{part}_{factor}" for part in _PARTS[1:] for factor in "AB"),
        mutated=("A", "B", "exp_avg_A", "exp_avg_B", "exp_avg_sq_A", "exp_avg_sq_B"), has_layouts=False,
    )  # fmt: skip
    probed, probes = "P", 2
    small = sizes(P=3, K=40, N=37, R=3)
    explained = sizes(P=96, K=768, N=1536, R=8)
    floors = named(UPDATE_COPY)
    measure = COPY_FLOOR
    measure_text = "a copy of as many bytes"

    def __init__(self) -> None:
        kernels = backend_contenders(Stepped(low_rank), self.refusals, dtypes=("float32",))
        self.contenders = kernels | named(
            Contender("torch-fused", "torch.optim.AdamW, fused", "rival", Stepped(torch_adamw("fused"))),
            Contender("torch-foreach", "torch.optim.AdamW, foreach", "rival", Stepped(torch_adamw("foreach"))),
        )

    def quick(self) -> tuple[Workload, ...]:
        rivals = ((FWD, ("torch-fused", "torch-foreach")),)
        title = "a step of AdamW over 96 adapters of rank 8, as of Mamba 130M"
        return (Workload(_WORK, title, self.op, self.explained, directions=(FWD,), rivals=rivals, rank=3),)

    def values(self, workload: Workload, draw: Draw) -> dict[str, Tensor]:
        P, K, N, R = (workload[axis] for axis in "PKNR")
        out = {}
        for factor, shape in (("A", (P, R, K)), ("B", (P, N, R))):
            out |= {
                factor: draw.normal(*shape) * K**-0.5,
                f"grad_{factor}": draw.normal(*shape),
                f"exp_avg_{factor}": draw.normal(*shape) * 0.1,
                f"exp_avg_sq_{factor}": draw.uniform(*shape) * 0.01 + 1e-4,
            }
        return out

    def arguments(self, inputs: Inputs) -> tuple[list, dict]:
        """Of ``ops.lora_adamw.prepare``."""
        params, grads, exp_avgs, exp_avg_sqs = columns(inputs)
        dims = [0] * len(inputs["A"]) + [1] * len(inputs["B"])
        steps = [one.new_full((one.shape[dim],), _STEPS_BEFORE, dtype=torch.float32)
                 for one, dim in zip(params, dims, strict=True)]  # fmt: skip
        active = [(0, len(step)) for step in steps]
        return [params, grads, exp_avgs, exp_avg_sqs, steps, dims, active, [_OPTIONS["lr"]] * len(params)], {}

    def headlines(self, rows: Rows, device: str) -> list[dict]:
        found = rows.get(f"{_WORK} {FWD}", [])
        row = headlines.pick(found)
        if row is None:
            return []
        out = headlines.against(found, row, "AdamW over low-rank factors", where=_WORK)
        if "floor_ratio" in row:
            detail = f"{row['title']} / {row['floor_note']}"
            out.append(headlines.line("AdamW over low-rank factors over a copy", f"{row['floor_ratio']:.2f} x", detail))
        return out


def columns(inputs: Inputs) -> list[list[Tensor]]:
    """Parameters, gradients and the two moments, each as a list: those of A first."""
    names = [("A", "B"), *((f"{part}_A", f"{part}_B") for part in _PARTS)]
    return [[one for name in pair for one in inputs[name].data.unbind()] for pair in names]


Make = Callable[[list[Tensor], int], torch.optim.Optimizer]


class Stepped:
    """A step of an optimizer that is made when it first sees the tensors of a call, with their moments as its state.

    `make` gets the parameters and how many of them are factors A.
    """

    def __init__(self, make: Make):
        self._make = make
        self._seen: Tensor | None = None
        self._optimizer: torch.optim.Optimizer | None = None

    def __call__(self, inputs: Inputs) -> Tensor:
        if self._seen is not inputs["A"]:
            self._seen, self._optimizer = inputs["A"], self._made(inputs)
        self._optimizer.step()
        return inputs["A"]

    def _made(self, inputs: Inputs) -> torch.optim.Optimizer:
        params, grads, exp_avgs, exp_avg_sqs = columns(inputs)
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad
        optimizer = self._make(params, len(inputs["A"]))
        for at, (param, exp_avg, exp_avg_sq) in enumerate(zip(params, exp_avgs, exp_avg_sqs, strict=True)):
            state = {"exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
            if isinstance(optimizer, LowRankAdamW):
                ranks = param.shape[int(at >= len(inputs["A"]))]
                state["steps"] = param.new_full((ranks,), _STEPS_BEFORE, dtype=torch.float32)
            else:
                state["step"] = torch.tensor(float(_STEPS_BEFORE), device=param.device)
            optimizer.state[param] = state
        return optimizer


def low_rank(params: list[Tensor], count: int) -> torch.optim.Optimizer:
    groups = [{"params": params[:count], "rank_dim": 0}, {"params": params[count:], "rank_dim": 1}]
    return LowRankAdamW(groups, **_OPTIONS)


def torch_adamw(implementation: str) -> Make:
    def make(params: list[Tensor], count: int) -> torch.optim.Optimizer:
        return torch.optim.AdamW(params, **_OPTIONS, **{implementation: True})

    return make
