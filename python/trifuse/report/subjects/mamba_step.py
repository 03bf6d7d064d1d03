"""One token of ``nn.Mamba`` and ``nn.Mamba2`` in the report, against their matrix products alone."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import trifuse
from trifuse.report import headlines
from trifuse.report.contenders import Contender, Floor, named
from trifuse.report.subject import Bench, Rows, Subject, Timed
from trifuse.report.validation import Check, Verdict, compare
from trifuse.report.workloads import DTYPES, FWD, Entry, Workload, sizes

__all__ = ["MambaStep"]

_TOKENS = 3  # that the check carries the states through


class MambaStep(Subject):
    op = "mamba_step"
    measure = "matmul-floor"
    measure_text = "its matrix products alone"

    def __init__(self) -> None:
        # Which kernel serves the step is the backend's choice, as in a model; the reference is forced.
        self.contenders = named(
            Contender("step", "trifuse nn: step", "kernel", _unused, dtypes=("float32", "bfloat16")),
            Contender("reference", "the same on the reference", "reference", _unused, dtypes=("float32",),
                      around=lambda: trifuse.backend("reference")),
        )  # fmt: skip
        self.floors = named(Floor(self.measure, "floor: its matrix products", _unused))

    def quick(self) -> tuple[Workload, ...]:
        def work(name: str, title: str, batch: int, size: int, rank: int) -> Workload:
            return Workload(name, title, self.op, sizes(B=batch, D=size), dtypes=("float32", "bfloat16"),
                            directions=(FWD,), rivals=((FWD, ("reference",)),), rank=rank)  # fmt: skip

        return (
            work("step-130m", "one token through a block of Mamba 130M", 1, 768, 0),
            work("step2-130m", "one token through a block of Mamba-2 130M", 1, 768, 2),
            work("step-2.8b", "one token through a block of Mamba 2.8B, batch 8", 8, 2560, 4),
        )

    def bench(self, device: str) -> Bench:
        return StepBench(self, device)

    def headlines(self, rows: Rows, device: str) -> list[dict]:
        out = []
        for name, block, asked in (("step-130m", "nn.Mamba", "at most 1.3 x"), ("step2-130m", "nn.Mamba2", "")):
            row = headlines.pick(rows.get(f"{name} {FWD}", []))
            if row is not None and "floor_ratio" in row:
                detail = f"{row['title']} / {row['floor_note']}, d 768"
                out.append(headlines.line(f"{block}.step over its matrix products alone", f"{row['floor_ratio']:.2f} x",
                                          detail, asked if device == "cpu" else ""))  # fmt: skip
        return out


def _unused(*arguments: object) -> Tensor:
    raise NotImplementedError("steps run on the module")


class StepBench(Bench):
    def __init__(self, subject: MambaStep, device: str):
        self.subject, self.device, self.contenders = subject, device, subject.contenders
        self._workload: Workload | None = None
        self._modules: dict[str, torch.nn.Module] = {}

    def enter(self, workload: Workload | None) -> None:
        if workload != self._workload:
            self._workload = workload
            self._modules.clear()

    def need_bytes(self, entry: Entry) -> int:
        return 4 * 8 * 8 * entry.workload["D"] ** 2

    def module(self, dtype: str) -> torch.nn.Module:
        if "float32" not in self._modules:
            torch.manual_seed(0)
            block = trifuse.nn.Mamba2 if self._workload.name.startswith("step2") else trifuse.nn.Mamba
            self._modules["float32"] = block(self._workload["D"]).to(self.device).eval()
        if dtype not in self._modules:
            self._modules[dtype] = copy.deepcopy(self._modules["float32"]).to(DTYPES[dtype])
        return self._modules[dtype]

    def verdict(self, entry: Entry) -> Verdict:
        try:
            with self.around(entry):
                got = self._carried(self.module(entry.dtype), entry.dtype)
            with trifuse.backend("reference"):
                # In the same rounded weights, which float64 holds exactly.
                exact = self._carried(copy.deepcopy(self.module(entry.dtype)).double(), entry.dtype)
                eager = self._carried(self.module(entry.dtype), entry.dtype)
        except Exception as error:  # whatever it raises is its verdict
            return Verdict((), f"raised {type(error).__name__}: {error}".splitlines()[0])
        return Verdict(tuple(self._checks(got, exact, eager)))

    def _checks(self, got: dict, exact: dict, eager: dict) -> list[Check]:
        return [compare(f"{_TOKENS} tokens", name, got[name], exact[name], eager[name]) for name in exact]

    @torch.no_grad()
    def _carried(self, module: torch.nn.Module, dtype: str) -> dict[str, Tensor]:
        """Outputs and last states of a few tokens."""
        batch, size = self._workload["B"], self._workload["D"]
        generator = torch.Generator(device=self.device).manual_seed(1)
        states, out = module.allocate_inference_cache(batch), {}
        for index in range(_TOKENS):
            token = torch.randn(batch, 1, size, generator=generator, device=self.device).to(DTYPES[dtype])
            out[f"out {index}"] = module.step(token.to(module.A_log.dtype), *states)[0]
        return out | dict(zip(("conv_state", "ssm_state"), states, strict=True))

    def timed(self, entry: Entry) -> Timed:
        module = self.module(entry.dtype)
        token = torch.randn(self._workload["B"], 1, self._workload["D"], device=self.device, dtype=DTYPES[entry.dtype])
        if entry.contender == self.subject.measure:
            call = products(module, token)
            return Timed(call, {"note": f"{', '.join(_linear(module))} by torch on one token"})
        states = module.allocate_inference_cache(self._workload["B"])

        def step() -> None:
            with torch.no_grad():
                module.step(token, *states)

        return Timed(step)


def _linear(module: torch.nn.Module) -> dict[str, torch.nn.Linear]:
    return {name: one for name, one in module.named_children() if isinstance(one, torch.nn.Linear)}


def products(module: torch.nn.Module, token: Tensor) -> Callable[[], None]:
    weights = [one.weight.detach() for one in _linear(module).values()]
    rows = [torch.randn(token.shape[0], weight.shape[1], device=token.device, dtype=token.dtype) for weight in weights]

    def call() -> None:
        with torch.no_grad():
            for row, weight in zip(rows, weights, strict=True):
                F.linear(row, weight)

    return call
