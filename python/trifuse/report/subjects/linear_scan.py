"""``linear_scan`` in the report."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from trifuse.report import headlines, validation
from trifuse.report.contenders import Contender, Run, backend_contenders, importable, named
from trifuse.report.floors import COPY, COPY_FLOOR
from trifuse.report.inputs import Axes, Draw, Inputs
from trifuse.report.subject import OpSubject, Rows
from trifuse.report.validation import Check
from trifuse.report.workloads import FWD, FWD_BWD, Entry, Workload, sizes

__all__ = ["LinearScan"]

_STEPS = 100_000  # of the check at |a| = 1
_RIVALS = (
    (FWD, ("reference", "loop-compiled", "mambapy", "associative-scan")),
    (FWD_BWD, ("loop-compiled", "mambapy", "associative-scan")),
)


class LinearScan(OpSubject):
    op = "linear_scan"
    axes = Axes({"a": "BLD", "b": "BLD", "out": "BLD", "dout": "BLD"})
    small = sizes(B=2, D=72, L=131)
    longest = (65536, 4096)
    explained = sizes(B=1, D=1024, L=4096)
    complex_arguments = ("a", "b")
    floors = named(COPY)
    measure = COPY_FLOOR
    measure_text = "a copy of as many bytes"

    def __init__(self) -> None:
        kernels = backend_contenders(self.ours, self.refusals, layouts=("bdl",), limit={FWD: 8192, FWD_BWD: 256})
        self.contenders = kernels | RIVALS

    def quick(self) -> tuple[Workload, ...]:
        real = Workload(
            "linear-real", "a layer of minGRU or RG-LRU, 4096 steps", self.op, sizes(B=1, D=1024, L=4096),
            dtypes=("float32", "bfloat16"), layouts=("bld", "bdl"), rivals=_RIVALS, rank=0,
        )  # fmt: skip
        turning = replace(
            real, name="linear-complex", title="a layer of LRU, complex, 4096 steps", dtypes=("complex64",),
            layouts=("bld",), rank=2,
        )  # fmt: skip
        return real, turning

    def full(self) -> tuple[Workload, ...]:
        long = replace(self.quick()[0].sized(L=131072), name="linear-128k", title="131072 steps", rank=5)
        return (*self.quick(), long)

    def for_cuda(self, workload: Workload) -> Workload:
        return workload.sized(B=8)

    def values(self, workload: Workload, draw: Draw) -> dict[str, Tensor]:
        """Factors between 0.9 and 1 as gates give them; complex ones with a phase."""
        shape = tuple(workload[axis] for axis in "BLD")
        size = draw.uniform(*shape) * 0.1 + 0.9
        if "complex64" not in workload.dtypes:
            return {"a": size, "b": draw.normal(*shape), "dout": draw.normal(*shape)}
        return {
            "a": torch.polar(size, draw.uniform(*shape) * 6.28),
            "b": draw.normal(*shape, dtype=torch.complex64),
            "dout": draw.normal(*shape, dtype=torch.complex64),
        }

    def arguments(self, inputs: Inputs) -> tuple[list, dict]:
        return [inputs["a"], inputs["b"]], {"layout": inputs.layout}

    def checks(self, run: Run, entry: Entry, device: str) -> Iterator[Check]:
        """|a| = 1: the powers of a complex number on the unit circle over many steps."""
        if entry.dtype == "complex64" and entry.direction == FWD:
            yield _powers(run, self.contenders["reference"].run, self.axes, device)

    def headlines(self, rows: Rows, device: str) -> list[dict]:
        out = []
        for name, dtype in (("linear-real", "float32"), ("linear-complex", "complex64")):
            for direction in (FWD, FWD_BWD):
                found = rows.get(f"{name} {direction}", [])
                row = headlines.pick(found, dtype=dtype, layout="bld")
                if row is None:
                    continue
                label = f"linear scan {dtype} {direction}"
                asked = {"mambapy": 15} if device == "cpu" else None
                out += headlines.against(found, row, label, where=name, asked=asked)
                if "floor_ratio" in row:
                    out.append(headlines.line(f"{label} over a copy", f"{row['floor_ratio']:.2f} x",
                                              f"{row['title']} / {row['floor_note']}"))  # fmt: skip
                for case, error in row["errors"].items():
                    if case.startswith("|a| = 1"):
                        detail = f"largest error of {row['title']} against complex128 powers, |a| = 1"
                        out.append(headlines.line(f"linear scan, {_STEPS} steps, error", f"{error:.1e}", detail))
        return out


def _powers(run: Run, reference: Run, axes: Axes, device: str) -> Check:
    turns = torch.linspace(0.01, 3.1, 8, device=device)
    a = torch.polar(torch.ones_like(turns), turns)
    impulse = torch.zeros(1, _STEPS, 8, dtype=torch.complex64, device=device)
    impulse[:, 0] = 1
    inputs = Inputs(axes, "bld", {"a": a.expand_as(impulse), "b": impulse}, {})
    steps = torch.arange(_STEPS, device=device, dtype=torch.float64)
    exact = (a.to(torch.complex128)[None] ** steps[:, None])[None]
    with torch.no_grad():
        return validation.compare(f"|a| = 1, {_STEPS} steps,", "out", run(inputs), exact, reference(inputs))


def mambapy(inputs: Inputs) -> Tensor:
    """mambapy's parallel scan, which takes (B, L, D, N)."""
    scan = importlib.import_module("mambapy.pscan").pscan
    return scan(inputs["a"][..., None], inputs["b"][..., None])[..., 0]


def mambapy_cannot(entry: Entry) -> str | None:
    if entry.dtype == "complex64" and entry.direction == FWD_BWD:
        return "mambapy's backward pass conjugates nothing, so its gradients are wrong for complex numbers"
    return None


def _step(state: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return a * state + b


@functools.cache
def _compiled_step():
    torch._dynamo.config.recompile_limit = 256
    return torch.compile(_step, dynamic=False)


def loop_compiled(inputs: Inputs) -> Tensor:
    """The time loop with its step under torch.compile, in "bld"."""
    step, a, b = _compiled_step(), inputs["a"], inputs["b"]
    state = torch.zeros_like(b[:, 0])
    out = []
    for factor, term in zip(a.unbind(1), b.unbind(1), strict=True):
        state = step(state, factor, term)
        out.append(state)
    return torch.stack(out, 1)


def loop_cannot(entry: Entry) -> str | None:
    return "torch.compile has no code for complex numbers on a CPU" if entry.dtype == "complex64" else None


def _combine(left: tuple[Tensor, Tensor], right: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return left[0] * right[0], right[0] * left[1] + right[1]


def associative_scan(inputs: Inputs) -> Tensor:
    """torch's own prototype, in the mode that a CPU has."""
    scan = importlib.import_module("torch._higher_order_ops").associative_scan
    return scan(_combine, (inputs["a"], inputs["b"]), dim=1, combine_mode="generic")[1]


def associative_scan_missing(device: str) -> str | None:
    if not hasattr(importlib.import_module("torch._higher_order_ops"), "associative_scan"):
        return "this torch has no associative_scan"
    return None


RIVALS = named(
    Contender(
        "loop-compiled", "time loop, its step under torch.compile", "rival", loop_compiled, cannot=loop_cannot,
        layouts=("bld",), dtypes=("float32", "complex64"), devices=("cpu",), checked=("full",), compiles=True,
    ),
    Contender(
        "mambapy", "mambapy: parallel scan", "rival", mambapy, importable("mambapy"), cannot=mambapy_cannot,
        layouts=("bld",), dtypes=("float32", "complex64"), limit={FWD: 65536, FWD_BWD: 65536},
    ),
    Contender(
        "associative-scan", "torch: associative_scan, generic", "rival", associative_scan, associative_scan_missing,
        layouts=("bld",), dtypes=("float32", "complex64"), limit={FWD: 65536, FWD_BWD: 65536},
    ),
)  # fmt: skip
