"""The gate in front of every speed: a contender is compared with the float64 reference first.

The rule is the one of the test suite. With ``ref`` the float64 reference on the same (rounded)
inputs, error(kernel) <= 2 * error(eager PyTorch in the same dtype) + a few ulp, for the output and
the gradient of every argument. Errors are the largest absolute difference; an ulp is that of the
tensor's dtype at the largest magnitude of ``ref``.

Two cases per workload and dtype:

- ``small``: all channels of a small shape with an awkward length, every gradient.
- ``full``: the timed shape itself. Channels are independent but for the sums over channels in dB and
  dC, so the float64 reference computes a few channels spread over D, and the gradient of the output
  is zero elsewhere, which leaves every gradient of the full call comparable.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor

from trifuse.report import contenders
from trifuse.report.contenders import Contender
from trifuse.report.workloads import DTYPES, FWD_BWD, Entry, Inputs, Workload, make_inputs

__all__ = ["Check", "Validator", "Verdict", "compare"]

ULPS = 4
RIVAL_TOLERANCE = {"float32": 1e-3, "bfloat16": 5e-2, "float16": 1e-2}  # of the largest magnitude
_SMALL = {"batch": 2, "dim": 72, "seqlen": 131}
_PROBES = 8
_LONGEST_BACKWARD = 2048  # steps the reference's quadratic backward is run for
_LONGEST_FORWARD = 65536


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
            return math.inf if math.isnan(check.error) else check.error / check.bound

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
        return (tensor.double() - reference).abs().max().item()

    if rival is not None:
        return Check(case, name, error(got), error(eager), rival * largest)
    few_ulp = ULPS * torch.finfo(got.dtype).eps * largest
    return Check(case, name, error(got), error(eager), 2 * error(eager) + few_ulp)


@dataclass(frozen=True)
class _Case:
    """Inputs, with the answers of the float64 reference and of eager PyTorch in the same dtype."""

    name: str
    inputs: Inputs
    channels: Tensor | None
    reference: dict[str, Tensor]
    eager: dict[str, Tensor]


def _answers(contender_scan: Callable, inputs: Inputs, backward: bool) -> dict[str, Tensor]:
    if not backward:
        return {"out": contenders.forward(contender_scan, inputs)()}
    out, *grads = contenders.forward_backward(contender_scan, inputs)()
    return {"out": out} | {f"d{name}": grad for name, grad in zip(Inputs.ARGUMENTS, grads, strict=True)}


def _restrict(answers: dict[str, Tensor], layout: str, channels: Tensor | None) -> dict[str, Tensor]:
    """Answers in "bld", restricted to the probed channels."""
    out = {}
    for name, tensor in answers.items():
        if layout == "bdl" and tensor.dim() == 3:
            tensor = tensor.transpose(1, 2)
        if channels is not None and name not in ("dB", "dC"):
            tensor = tensor.index_select(2 if tensor.dim() == 3 else 0, channels)
        out[name] = tensor
    return out


class Validator:
    """Checks contenders; the reference's answers are computed once per workload and dtype."""

    def __init__(self, device: str):
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
        if entry.workload.op == "selective_state_update":
            yield from self._update_checks(contender, entry, rival)
            return
        backward = entry.direction == FWD_BWD
        for name in contender.checked:
            case = self._case(name, entry.workload, backward, entry.dtype)
            inputs = case.inputs.to(layout=entry.layout)
            got = _restrict(_answers(contender.scan, inputs, backward), entry.layout, case.channels)
            for tensor in got:
                yield compare(case.name, tensor, got[tensor], case.reference[tensor], case.eager[tensor], rival)

    def _case(self, name: str, workload: Workload, backward: bool, dtype: str) -> _Case:
        if name == "small":
            dim, seqlen = min(_SMALL["dim"], workload.dim), min(_SMALL["seqlen"], workload.seqlen)
            shape = replace(workload, batch=_SMALL["batch"], dim=dim, seqlen=seqlen)
        else:
            longest = _LONGEST_BACKWARD if backward else _LONGEST_FORWARD
            shape = replace(workload, seqlen=min(longest, workload.seqlen))
        # One case serves both directions where its backward pass can be afforded.
        backward = backward or (FWD_BWD in workload.directions and shape.seqlen <= _LONGEST_BACKWARD)
        key = (shape.shape(), backward, dtype, name)
        if key not in self._cases:
            self._cases[key] = self._make_case(name, shape, backward, DTYPES[dtype])
        return self._cases[key]

    def _make_case(self, name: str, shape: Workload, backward: bool, dtype: torch.dtype) -> _Case:
        inputs = make_inputs(shape, self.device, seed=1).to(dtype=dtype)
        channels, part = None, inputs
        if name == "full":
            probes = min(_PROBES, shape.dim)
            channels = torch.linspace(0, shape.dim - 1, probes).long().to(self.device)
            inputs.dout.copy_(torch.zeros_like(inputs.dout).index_copy_(2, channels, inputs.dout[..., channels]))
            part = inputs.channels(channels)
        scan = contenders.ours("reference")

        def answers(at: torch.dtype | None) -> dict[str, Tensor]:
            # "bdl" is the reference's own form; the result is compared in "bld".
            return _restrict(_answers(scan, part.to(dtype=at, layout="bdl"), backward), "bdl", None)

        label = f"{name} ({shape.shape()})"
        return _Case(label, inputs, channels, answers(torch.float64), answers(None))

    def _update_checks(self, contender: Contender, entry: Entry, rival: float | None) -> Iterator[Check]:
        inputs = make_inputs(entry.workload, self.device, seed=1).to(dtype=DTYPES[entry.dtype])
        arguments = contenders.update_arguments(inputs)
        reference = contenders.our_update("reference")

        def run(update: Callable, dtype: torch.dtype | None) -> dict[str, Tensor]:
            copies = tuple(tensor.to(dtype or tensor.dtype, copy=True) for tensor in arguments)
            out = update(copies)
            return {"out": out, "state": copies[0]}

        exact, eager, got = run(reference, torch.float64), run(reference, None), run(contender.update, None)
        for name in exact:
            yield compare(f"full ({entry.workload.shape()})", name, got[name], exact[name], eager[name], rival)
