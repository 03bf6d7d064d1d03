"""Who is measured: this package's backends, the rivals that are installed, and floors.

A contender computes the same function as the subject on the same inputs, and says in whole sentences
why it cannot take part when it cannot.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

import trifuse
from trifuse.report.inputs import Inputs
from trifuse.report.workloads import FWD_BWD, Entry, Workload

__all__ = ["AVX2", "Contender", "Floor", "add_rivals_folder", "backend_contenders", "cpu_isas", "importable", "named"]

Run = Callable[[Inputs], Tensor]
AVX2 = "cpp-avx2"


@dataclass(frozen=True)
class Contender:
    """Someone who computes what the subject computes.

    Args:
        name: short, used in ids.
        title: what the report prints.
        kind: "kernel" (ours: held to the tolerance rule), "reference", or "rival".
        run: the output of a call on inputs in one of `layouts`.
        missing: why it cannot be used on a device at all, or None.
        cannot: why it cannot take part in an entry, or None.
        limit: the longest sequence (axis L) per direction that ends in reasonable time.
        layouts: what it takes; None stands for every layout of the workload.
        dtypes, devices, directions: what it takes (directions: None for all).
        workloads: takes part in these only, if given.
        around: a context in which everything of this contender runs.
        checked: the cases it is validated on.
        compiles: its first call compiles, so neither the time nor the memory of that one is its own.
    """

    name: str
    title: str
    kind: str
    run: Run
    missing: Callable[[str], str | None] = lambda device: None
    cannot: Callable[[Entry], str | None] = lambda entry: None
    limit: dict[str, int] = field(default_factory=dict)
    layouts: tuple[str, ...] | None = None
    dtypes: tuple[str, ...] = ("float32", "bfloat16", "float16")
    devices: tuple[str, ...] = ("cpu", "cuda")
    directions: tuple[str, ...] | None = None
    workloads: tuple[str, ...] | None = None
    around: Callable[[], object] = nullcontext
    checked: tuple[str, ...] = ("small",)
    compiles: bool = False

    def refusal(self, entry: Entry, device: str) -> str | None:
        """Why it does not take part in this entry, or None if it does."""
        if device not in self.devices:
            return f"{self.title} does not run on {device}"
        reason = self.missing(device) or self.cannot(entry)
        if reason is not None:
            return reason
        longest, length = self.limit.get(entry.direction), entry.workload.sizes.get("L", 1)
        if longest is not None and length > longest:
            return (
                f"{self.title} takes minutes or more memory than there is beyond {longest} steps "
                f"({entry.direction}), and this workload has {length}"
            )
        return None


@dataclass(frozen=True)
class Floor:
    """Less work than any kernel for a subject can do without, timed beside it.

    Args:
        name, title: as a contender's.
        make: for a workload, its inputs and a direction, what to call, and a note that says what it is.
        dtypes: "float32" alone where the dtype of the sequences makes no difference.
        devices: where it can be measured.
        largest: elements of the output beyond which it is left out.
    """

    name: str
    title: str
    make: Callable[[Workload, Inputs, str], tuple[Callable[[], object], str]]
    dtypes: tuple[str, ...] | None = None
    devices: tuple[str, ...] = ("cpu", "cuda")
    largest: int = 1 << 62


def named(*found: Contender | Floor) -> dict:
    """Contenders or floors by their names, in order."""
    return {one.name: one for one in found}


def forward(run: Run, inputs: Inputs) -> Callable[[], Tensor]:
    def call() -> Tensor:
        with torch.no_grad():
            return run(inputs)

    return call


def forward_backward(run: Run, inputs: Inputs) -> Callable[[], tuple[Tensor, ...]]:
    """The output and the gradient of every differentiable argument, in order."""
    leaves, asking = list(inputs.leaves.values()), inputs.asking()

    def call() -> tuple[Tensor, ...]:
        out = run(asking)
        return (out.detach(), *torch.autograd.grad(out, leaves, inputs.dout))

    return call


def timed_call(run: Run, inputs: Inputs, direction: str) -> Callable[[], object]:
    """What one round of the benchmark runs."""
    return (forward_backward if direction == FWD_BWD else forward)(run, inputs)


def forced(backend: str, call: Run) -> Run:
    """A call of this package's public function held to one backend."""

    def run(inputs: Inputs) -> Tensor:
        with trifuse.backend(backend):
            return call(inputs)

    return run


def backend_contenders(
    call: Run, refuse: Callable[[str, str], list[str]], *, avx2_in: tuple[str, ...] = (), **reference: object
) -> dict[str, Contender]:
    """Every backend of an op as a contender.

    Args:
        call: the public function on inputs.
        refuse: (backend, device) -> its reasons for refusing the smallest call.
        avx2_in: workloads in which the AVX2 build of the CPU kernels is measured as well.
        reference: what the reference cannot or need not do (`limit`, `layouts`, ...).
    """

    def missing(backend: str) -> Callable[[str], str | None]:
        def why(device: str) -> str | None:
            if device == "cuda" and not torch.cuda.is_available():
                return "torch finds no CUDA device"
            return "; ".join(refuse(backend, device)) or None

        return why

    both = ("small", "full")
    found = [
        Contender(name, f"trifuse {name}", "kernel", forced(name, call), missing(name), devices=(device,), checked=both,
                  dtypes=("float32", "bfloat16", "float16", "complex64"))
        for name, device in (("cpp", "cpu"), ("cuda", "cuda"), ("triton", "cuda"))
    ]  # fmt: skip
    found.append(Contender(
        AVX2, "trifuse cpp, AVX2 build", "kernel", forced("cpp", call), _isa_missing("avx2", missing("cpp")),
        devices=("cpu",), dtypes=("float32",), workloads=avx2_in, around=lambda: _with_isa("avx2"), checked=both,
    ))  # fmt: skip
    settings = {"dtypes": ("float32", "complex64"), **reference}
    found.append(Contender("reference", "reference: eager PyTorch", "reference", forced("reference", call), **settings))
    return named(*found)


def cpu_isas() -> tuple[list[str], str | None]:
    """Instruction sets the compiled kernels can use here, and the one in use."""
    try:
        from trifuse import _native

        return list(_native.cpu_isas()), _native.cpu_isa()
    except (ImportError, AttributeError):
        return [], None


def _isa_missing(isa: str, otherwise: Callable[[str], str | None]) -> Callable[[str], str | None]:
    def missing(device: str) -> str | None:
        available, active = cpu_isas()
        if isa not in available:
            return f"the {isa} build of the kernels is not available on this machine"
        return f"cpp already runs its {isa} build" if isa == active else otherwise(device)

    return missing


@contextmanager
def _with_isa(isa: str) -> Iterator[None]:
    from trifuse import _native

    before = _native.cpu_isa()
    _native.set_cpu_isa(isa)
    try:
        yield
    finally:
        _native.set_cpu_isa(before)


def importable(module: str) -> Callable[[str], str | None]:
    def missing(device: str) -> str | None:
        root = module.split(".")[0]
        return None if importlib.util.find_spec(root) else f"the package {root} is not installed"

    return missing


def add_rivals_folder(folder: Path = Path(".rivals")) -> None:
    """Make packages in a git-ignored ``.rivals/`` folder of the clone importable."""
    for path in (folder, *sorted(folder.glob("*/"))) if folder.is_dir() else ():
        if str(path.resolve()) not in sys.path:
            sys.path.append(str(path.resolve()))


def entries(contenders: dict[str, Contender], workload: Workload, device: str) -> Iterator[tuple[Entry, str | None]]:
    """Every entry of a workload on a device, with the reason of those that cannot run."""
    for direction in workload.directions:
        for one in contenders.values():
            if one.kind != "kernel" and one.name not in workload.rivals_in(direction):
                continue
            if device not in one.devices or (one.workloads is not None and workload.name not in one.workloads):
                continue
            if one.directions is not None and direction not in one.directions:
                continue
            wanted = workload.layouts if one.layouts is None or workload.layouts == ("",) else one.layouts
            if one.kind == "kernel":
                wanted = tuple(layout for layout in workload.layouts if layout in wanted)
            for dtype in workload.dtypes:
                if dtype in one.dtypes:
                    for layout in wanted:
                        entry = Entry(workload, direction, one.name, dtype, layout)
                        yield entry, one.refusal(entry, device)
