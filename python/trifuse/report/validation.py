"""The gate in front of every speed: a contender is compared with the float64 reference first.

The rule is the one of the test suite. With ``ref`` the float64 reference on the same (rounded)
inputs, error(kernel) <= 2 * error(eager PyTorch in the same dtype) + a few ulp, for the output and
the gradient of every argument. Errors are the largest absolute difference; an ulp is that of the
tensor's dtype at the largest magnitude of ``ref``.

Two cases per workload and dtype:

- ``small``: all channels of a small shape with an awkward length, every gradient.
- ``full``: the timed shape itself. The places of the subject's probed axis (channels, heads) are
  independent but for gradients that are sums over them, so the float64 reference computes a few
  places spread over that axis, and the gradient of the output is zero elsewhere, which leaves every
  gradient of the full call comparable.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from trifuse.report import contenders
from trifuse.report.contenders import Contender, Run
from trifuse.report.inputs import Draw, Inputs, swapped, taken
from trifuse.report.workloads import DTYPES, FWD_BWD, Entry, Workload

if TYPE_CHECKING:
    from trifuse.report.subject import OpSubject

__all__ = ["Check", "Validator", "Verdict", "compare"]

ULPS = 4
RIVAL_TOLERANCE = {"float32": 1e-3, "complex64": 1e-3, "bfloat16": 5e-2, "float16": 1e-2}  # of the largest magnitude


@dataclass(frozen=True)
class Check:
    """One compared tensor: its error, the eager error, and the bound the error must keep."""

    case: str
    tensor: str
    error: float
    eager: float
    bound: float

    @property
    def ok(self) -> bool:
        return self.error <= self.bound  # false for NaN


@dataclass(frozen=True)
class Verdict:
    """Whether a contender may be timed, and the figures that say so."""

    checks: tuple[Check, ...]
    problem: str | None = None  # it raised instead of answering

    @property
    def ok(self) -> bool:
        return self.problem is None and all(check.ok for check in self.checks)

    @property
    def worst(self) -> Check | None:
        """The check nearest to its bound, or furthest beyond it."""

        def excess(check: Check) -> float:
            return math.inf if math.isnan(check.error) else check.error / (check.bound or 1e-300)

        return max(self.checks, key=excess, default=None)

    def __str__(self) -> str:
        if self.problem is not None:
            return self.problem
        worst = self.worst
        sign = "<=" if worst.ok else ">"
        return f"{worst.case} {worst.tensor}: error {worst.error:.2e} {sign} {worst.bound:.2e}"

    def as_dict(self) -> dict:
        return {"ok": self.ok, "summary": str(self), "checks": [asdict(one) | {"ok": one.ok} for one in self.checks]}


def compare(case: str, name: str, got: Tensor, reference: Tensor, eager: Tensor, rival: float | None = None) -> Check:
    """Check one tensor. With `rival` the bound is that fraction of the largest magnitude instead."""
    if got.shape != reference.shape:
        return Check(case, f"{name} has shape {tuple(got.shape)}, not {tuple(reference.shape)}", math.nan, 0.0, 0.0)
    if reference.numel() == 0:
        return Check(case, name, 0.0, 0.0, 0.0)
    largest = reference.abs().max().item()

    def error(tensor: Tensor) -> float:
        return (tensor.to(reference.dtype) - reference).abs().max().item()

    if rival is not None:
        return Check(case, name, error(got), error(eager), rival * largest)
    few_ulp = ULPS * torch.finfo(got.dtype).eps * largest
    return Check(case, name, error(got), error(eager), 2 * error(eager) + few_ulp)


@dataclass(frozen=True)
class _Case:
    """Inputs, with the answers of the float64 reference and of eager PyTorch in the same dtype."""

    name: str
    inputs: Inputs
    letter: str
    places: Tensor | None
    reference: dict[str, Tensor]
    eager: dict[str, Tensor]


def answers(run: Run, inputs: Inputs, backward: bool) -> dict[str, Tensor]:
    """Everything a call computes: "out", what it changed in place, and with `backward` every gradient."""
    inputs = inputs.fresh()
    if not backward:
        out = contenders.forward(run, inputs)()
        return {"out": out} | {name: inputs[name] for name in inputs.axes.mutated}
    out, *grads = contenders.forward_backward(run, inputs)()
    return {"out": out} | {f"d{name}": grad for name, grad in zip(inputs.leaves, grads, strict=True)}


class Validator:
    """Checks contenders of a subject; the reference's answers are computed once per workload and dtype."""

    def __init__(self, subject: OpSubject, device: str):
        self.subject = subject
        self.device = device
        self._cases: dict[tuple, _Case] = {}
        self._verdicts: dict[tuple, Verdict] = {}

    def forget_full_cases(self) -> None:
        """Free the tensors of the timed shapes; the small case serves every workload."""
        self._cases = {key: case for key, case in self._cases.items() if key[-1] == "small"}

    def verdict(self, contender: Contender, entry: Entry) -> Verdict:
        key = (contender.name, entry.workload, entry.direction, entry.dtype, entry.layout)
        if key not in self._verdicts:
            try:
                with contender.around():
                    self._verdicts[key] = Verdict(tuple(self._checks(contender, entry)))
            except Exception as error:  # whatever a kernel raises is its verdict
                self._verdicts[key] = Verdict((), f"raised {type(error).__name__}: {error}".splitlines()[0])
        return self._verdicts[key]

    def _checks(self, contender: Contender, entry: Entry) -> Iterator[Check]:
        rival = RIVAL_TOLERANCE[entry.dtype] if contender.kind == "rival" else None
        backward = entry.direction == FWD_BWD
        for name in contender.checked:
            case = self._case(name, entry.workload, backward, entry.dtype)
            inputs = case.inputs.to(layout=entry.layout)
            got = self._restrict(answers(contender.run, inputs, backward), entry.layout, case.letter, case.places)
            for tensor in got:
                yield compare(case.name, tensor, got[tensor], case.reference[tensor], case.eager[tensor], rival)
        if contender.kind == "kernel":
            yield from self.subject.checks(contender.run, entry, self.device)

    def _restrict(
        self, found: dict[str, Tensor], layout: str, letter: str = "", places: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Answers in "bld", restricted to the probed places."""
        axes, out = self.subject.axes, {}
        for name, tensor in found.items():
            argument = "out" if name == "out" else name if name in axes.mutated else name[1:]
            tensor = swapped(tensor, layout == "bdl" and axes.turns(argument))
            if places is not None:
                tensor = taken(axes, argument, tensor, "bld", letter, places)
            out[name] = tensor
        return out

    def _case(self, name: str, workload: Workload, backward: bool, dtype: str) -> _Case:
        subject = self.subject
        trainable = FWD_BWD in workload.directions
        if name == "small":
            # One case serves both directions, and every workload whose small shape is the same.
            shape = workload.sized(**{axis: min(size, workload[axis]) if axis != "B" else size
                                      for axis, size in subject.small.items()})  # fmt: skip
            backward = backward or trainable
        else:
            shape = workload
            if "L" in workload.sizes:
                backward = backward or (trainable and workload["L"] <= subject.longest[1])
                shape = workload.sized(L=min(subject.longest[backward], workload["L"]))
        key = (shape.shape(), repr(subject.options(shape)), backward, dtype, name)
        if key not in self._cases:
            self._cases[key] = self._make_case(name, shape, backward, DTYPES[dtype])
        return self._cases[key]

    def _make_case(self, name: str, shape: Workload, backward: bool, dtype: torch.dtype) -> _Case:
        subject = self.subject
        inputs = subject.make(shape, Draw(self.device, 1)).to(dtype=dtype)
        places, part = None, inputs
        letter, count = subject.probe(shape)
        if name == "full" and shape[letter] > count:
            places = torch.linspace(0, shape[letter] - 1, count).long().to(self.device)
            if "dout" in inputs.tensors:
                axis = subject.axes.of["dout"].index(letter)
                kept = torch.zeros_like(inputs.dout).index_copy_(axis, places, inputs.dout.index_select(axis, places))
                inputs.dout.copy_(kept)
            part = inputs.take(letter, places)
        reference = subject.contenders["reference"].run
        layout = subject.reference_layout if subject.axes.has_layouts else ""

        def computed(at: torch.dtype | None) -> dict[str, Tensor]:
            return self._restrict(answers(reference, part.to(dtype=at, layout=layout), backward), layout)

        label = f"{name} ({shape.shape()})"
        return _Case(label, inputs, letter, places, computed(torch.float64), computed(None))
