"""What the report must be told about an op, and everything that follows from it for a plain op.

A subject is one room: its workloads, inputs, our call, rivals, floors and headline figures are in one
file of ``report/subjects/``. The arena, the gate, the timing and the page know subjects and bench
stands only through the two base classes here.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

from torch import Tensor

import trifuse
from trifuse import backends
from trifuse.report import contenders, memory
from trifuse.report.contenders import Contender, Floor, Run, named
from trifuse.report.inputs import Axes, Draw, Inputs
from trifuse.report.validation import Check, Validator, Verdict
from trifuse.report.workloads import DTYPES, FWD_BWD, Entry, Workload, sizes

__all__ = ["Bench", "OpSubject", "Subject", "Timed"]

Rows = dict[str, list[dict]]  # the timed rows of every table by its name, "workload direction"


@dataclass(frozen=True)
class Timed:
    """What a round runs, and the facts that go with it into the report."""

    call: Callable[[], object]
    facts: dict = field(default_factory=dict)
    compiles: bool = False


class Bench(ABC):
    """A subject on one device: holds what its current workload needs."""

    @abstractmethod
    def enter(self, workload: Workload | None) -> None:
        """Drop what only other workloads needed; None: the next one belongs to another subject."""

    @abstractmethod
    def need_bytes(self, entry: Entry) -> int:
        """About how much memory validating and timing it takes."""

    @abstractmethod
    def verdict(self, entry: Entry) -> Verdict:
        """The check in front of every speed."""

    @abstractmethod
    def timed(self, entry: Entry) -> Timed:
        """What to time."""

    def around(self, entry: Entry) -> AbstractContextManager:
        """A context in which everything of the entry's contender runs."""
        return self.contenders[entry.contender].around()

    def peak(self, entry: Entry, call: Callable[[], object]) -> tuple[int | None, str]:
        """Runs `call` once: the peak of extra bytes, and how it was measured."""
        return memory.peak_extra(call, self.device)

    def close(self) -> None:
        """End what it has running."""
        self.enter(None)

    contenders: dict[str, Contender]
    device: str


class Subject(ABC):
    """One room of the report.

    Class attributes: `op`, its name; `contenders` and `floors`, by name; `measure`, the floor its
    ratios are over, and `measure_text`, that floor in words.
    """

    op: str
    contenders: dict[str, Contender]
    floors: dict[str, Floor] = named()
    measure: str | None = None
    measure_text: str = ""

    @abstractmethod
    def quick(self) -> tuple[Workload, ...]:
        """What a report measures by default, and what it measures on request."""

    def full(self) -> tuple[Workload, ...]:
        """What ``--full`` measures."""
        return self.quick()

    def for_cuda(self, workload: Workload) -> Workload:
        """The workload as it is measured on a GPU."""
        return workload

    @abstractmethod
    def bench(self, device: str) -> Bench:
        """A place to measure on."""

    def entries(self, workload: Workload, device: str) -> Iterator[tuple[Entry, str | None]]:
        """Every entry of a workload, with the reason of those that cannot run."""
        return contenders.entries(self.contenders, workload, device)

    def floor_entries(self, workload: Workload, direction: str, device: str) -> list[Entry]:
        out = []
        for floor in self.floors.values():
            if device in floor.devices and self.elements(workload) <= floor.largest:
                for dtype in floor.dtypes or workload.dtypes:
                    out.append(Entry(workload, direction, floor.name, dtype, ""))
        return out

    def elements(self, workload: Workload) -> int:
        """Elements of the output."""
        return 0

    def title(self, contender: str) -> str:
        return (self.floors.get(contender) or self.contenders[contender]).title

    def kind(self, contender: str) -> str:
        return "floor" if contender in self.floors else self.contenders[contender].kind

    def headlines(self, rows: Rows, device: str) -> list[dict]:
        """The figures to read first; made by ``headlines.line``."""
        return []


class OpSubject(Subject):
    """A public function of tensors, measured on tensors of every dtype and layout.

    Class attributes: `axes`, of its arguments; `probed`, an axis whose places are independent of each
    other, along which the float64 reference of a full-size case is computed at a few places only;
    `small`, the sizes of the small case; `longest`, steps the float64 reference is run for, forward
    and backward.
    """

    axes: Axes
    probed: str = "D"
    probes: int = 8
    small: dict[str, int] = sizes()
    longest: tuple[int, int] = (1 << 62, 1 << 62)
    least: dict[str, int] = sizes()  # extents of which one is too few
    reference_layout: str = "bdl"
    complex_arguments: tuple[str, ...] = ()  # those that --complex makes complex
    explained: dict[str, int]  # the sizes `explain` asks for, with their defaults

    @abstractmethod
    def values(self, workload: Workload, draw: Draw) -> dict[str, Tensor]:
        """The arguments in float32 and "bld", in the order of the function, and "dout" if it has gradients."""

    @abstractmethod
    def arguments(self, inputs: Inputs) -> tuple[list, dict]:
        """Positional and keyword arguments of the public function."""

    def options(self, workload: Workload) -> dict[str, object]:
        """Arguments that are no tensors."""
        return {}

    def ours(self, inputs: Inputs) -> Tensor:
        positional, named = self.arguments(inputs)
        return getattr(trifuse, self.op)(*positional, **named)

    def make(self, workload: Workload, draw: Draw) -> Inputs:
        layout = "bld" if self.axes.has_layouts else ""
        return Inputs(self.axes, layout, self.values(workload, draw), self.options(workload))

    def checks(self, run: Run, entry: Entry, device: str) -> Iterator[Check]:
        """Checks beyond the comparison with the reference, for kernels."""
        return iter(())

    def bench(self, device: str) -> Bench:
        return OpBench(self, device)

    def elements(self, workload: Workload) -> int:
        return workload.count(self.axes.of["out"])

    def probe(self, workload: Workload) -> tuple[str, int]:
        """The axis along which a full-size case is checked at a few places only, and at how many."""
        return self.probed, self.probes

    def need_bytes(self, entry: Entry) -> int:
        """About how much memory validating and timing an entry takes."""
        # Five tensors of the output's size, their copies for validation, and as many again for gradients.
        return 20 * self.elements(entry.workload) * 4

    def facts(self, workload: Workload, device: str) -> dict:
        """Facts of a workload that rows carry."""
        return {}

    def smallest(self, device: str) -> Inputs:
        """The smallest call, to ask backends about."""
        one = Workload("smallest", "", self.op, {**dict.fromkeys(self.explained, 1), **self.least})
        return self.make(one, Draw(device))  # of real values: some arguments have to be positive

    def refusals(self, backend: str, device: str) -> list[str]:
        """Why a backend cannot take the smallest call on a device."""
        op = backends.Op.registry[self.op]
        if backend not in op.refusals:
            return [f"{self.op} has no {backend} kernel"]
        positional, named = self.arguments(self.smallest(device))
        return op.refusals[backend](op.prepare(*positional, **named))


class OpBench(Bench):
    """Tensors of the current workload, and the gate."""

    def __init__(self, subject: OpSubject, device: str):
        self.subject, self.device, self.contenders = subject, device, subject.contenders
        self.validator = Validator(subject, device)
        self._workload: Workload | None = None
        self._inputs: dict[tuple[str, str], Inputs] = {}

    def enter(self, workload: Workload | None) -> None:
        if workload != self._workload:
            self._workload = workload
            self._inputs.clear()
            self.validator.forget_full_cases()

    def need_bytes(self, entry: Entry) -> int:
        return self.subject.need_bytes(entry)

    def verdict(self, entry: Entry) -> Verdict:
        return self.validator.verdict(self.contenders[entry.contender], entry)

    def inputs(self, entry: Entry) -> Inputs:
        base_layout = "bld" if self.subject.axes.has_layouts else ""
        key = (entry.dtype, entry.layout or base_layout)
        if key not in self._inputs:
            base = self._inputs.get(("", ""))
            if base is None:
                base = self._inputs["", ""] = self.subject.make(entry.workload, Draw(self.device))
            self._inputs[key] = base.to(dtype=DTYPES[key[0]], layout=key[1])
        return self._inputs[key]

    def timed(self, entry: Entry) -> Timed:
        inputs = self.inputs(entry)
        facts = {"bytes": inputs.bytes(entry.direction == FWD_BWD), **self.subject.facts(entry.workload, self.device)}
        floor = self.subject.floors.get(entry.contender)
        if floor is not None:
            call, facts["note"] = floor.make(entry.workload, inputs, entry.direction)
            return Timed(call, facts)
        one = self.contenders[entry.contender]
        return Timed(contenders.timed_call(one.run, inputs, entry.direction), facts, one.compiles)
