"""Who is measured: this package's backends, and the rivals that are installed.

A contender gives, for the inputs of a call, a function to time, and says in whole sentences why it
cannot take part when it cannot.
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
from trifuse import backends
from trifuse.report import rivals
from trifuse.report.workloads import FWD, FWD_BWD, Entry, Inputs, Workload

__all__ = ["CONTENDERS", "Contender", "cpu_isas", "entries"]

Scan = Callable[[Inputs], Tensor]
_NATIVE_LAYOUTS = ("bld", "bdl")


@dataclass(frozen=True)
class Contender:
    """Someone who computes the scan.

    Args:
        name: short, used in ids.
        title: what the report prints.
        kind: "kernel" (ours: held to the tolerance rule), "reference", or "rival".
        scan: the output of a call on inputs in one of `layouts`.
        missing: why it cannot be used on a device at all, or None.
        limit: the longest sequence per direction that ends in reasonable time.
        layouts, dtypes, devices: what it takes.
        around: a context in which everything of this contender runs.
        update: the one-token form, or None if it has none.
        checked: the cases it is validated on.
    """

    name: str
    title: str
    kind: str
    scan: Scan
    missing: Callable[[str], str | None] = lambda device: None
    limit: dict[str, int] = field(default_factory=dict)
    layouts: tuple[str, ...] = _NATIVE_LAYOUTS
    dtypes: tuple[str, ...] = ("float32", "bfloat16", "float16")
    devices: tuple[str, ...] = ("cpu", "cuda")
    around: Callable[[], object] = nullcontext
    update: Callable[[tuple], Tensor] | None = None
    checked: tuple[str, ...] = ("small",)  # cases of validation.py

    def refusal(self, entry: Entry, device: str) -> str | None:
        """Why it does not take part in this entry, or None if it does."""
        if device not in self.devices:
            return f"{self.title} does not run on {device}"
        reason = self.missing(device)
        if reason is not None:
            return reason
        longest = self.limit.get(entry.direction)
        if longest is not None and entry.workload.seqlen > longest:
            return (
                f"{self.title} takes minutes or more memory than there is beyond {longest} steps "
                f"({entry.direction}), and this workload has {entry.workload.seqlen}"
            )
        return None


def forward(scan: Scan, inputs: Inputs) -> Callable[[], Tensor]:
    def call() -> Tensor:
        with torch.no_grad():
            return scan(inputs)

    return call


def forward_backward(scan: Scan, inputs: Inputs) -> Callable[[], tuple[Tensor, ...]]:
    leaves = list(inputs.leaves.values())
    asking = Inputs(inputs.layout, *leaves, inputs.dout)

    def call() -> tuple[Tensor, ...]:
        out = scan(asking)
        return (out.detach(), *torch.autograd.grad(out, leaves, inputs.dout))

    return call


def timed_call(contender: Contender, inputs: Inputs, direction: str) -> Callable[[], object]:
    """What one round of the benchmark runs."""
    return (forward_backward if direction == FWD_BWD else forward)(contender.scan, inputs)


def ours(backend: str) -> Scan:
    """``trifuse.selective_scan`` forced onto one backend."""

    def scan(inputs: Inputs) -> Tensor:
        with trifuse.backend(backend):
            return trifuse.selective_scan(
                inputs.u, inputs.delta, inputs.A, inputs.B, inputs.C, inputs.D, inputs.z, inputs.delta_bias,
                True, layout=inputs.layout,
            )  # fmt: skip

    return scan


def our_update(backend: str) -> Callable[[tuple], Tensor]:
    def update(arguments: tuple) -> Tensor:
        state, x, dt, A, B, C, D, z, dt_bias = arguments
        with trifuse.backend(backend), torch.no_grad():
            return trifuse.selective_state_update(state, x, dt, A, B, C, D, z, dt_bias, True)

    return update


def update_arguments(inputs: Inputs) -> tuple[Tensor, ...]:
    """The same values as one token: (state, x, dt, A, B, C, D, z, dt_bias)."""
    batch, _, dim = inputs.u.shape
    generator = torch.Generator(device=inputs.u.device).manual_seed(1)
    state = torch.randn(batch, dim, inputs.A.shape[1], generator=generator, device=inputs.u.device)
    acc = torch.float64 if inputs.u.dtype == torch.float64 else torch.float32
    first = [tensor[:, 0].contiguous() for tensor in (inputs.u, inputs.delta, inputs.B, inputs.C, inputs.z)]
    x, dt, B, C, z = first
    return state.to(acc), x, dt, inputs.A, B, C, inputs.D, z, inputs.delta_bias


def example_call(op: str, device: str) -> object:
    """The smallest checked call of an op, to ask its backends about."""
    one, weight = torch.zeros(1, 1, 1, device=device), torch.zeros(1, 1, device=device)
    arguments = (one, weight, weight) if op == "selective_state_update" else (one, one)
    return backends.Op.registry[op].prepare(*arguments, weight, weight, weight)


def _backend_missing(backend: str) -> Callable[[str], str | None]:
    """A backend's own refusals, asked with a tiny call on the device."""

    def missing(device: str) -> str | None:
        if device == "cuda" and not torch.cuda.is_available():
            return "torch finds no CUDA device"
        op = backends.Op.registry["selective_scan"]
        return "; ".join(op.refusals[backend](example_call(op.name, device))) or None

    return missing


def cpu_isas() -> tuple[list[str], str | None]:
    """Instruction sets the compiled kernels can use here, and the one in use."""
    try:
        from trifuse import _native

        return list(_native.cpu_isas()), _native.cpu_isa()
    except (ImportError, AttributeError):
        return [], None


def _isa_missing(isa: str) -> Callable[[str], str | None]:
    def missing(device: str) -> str | None:
        available, active = cpu_isas()
        if isa not in available:
            return f"the {isa} build of the kernels is not available on this machine"
        return f"cpp already runs its {isa} build" if isa == active else _backend_missing("cpp")(device)

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


CONTENDERS = {
    one.name: one
    for one in (
        *(
            Contender(
                name, f"trifuse {name}", "kernel", ours(name), _backend_missing(name), devices=(device,),
                update=our_update(name), checked=("small", "full"),
            )
            for name, device in (("cpp", "cpu"), ("cuda", "cuda"), ("triton", "cuda"))
        ),
        Contender(
            "cpp-avx2", "trifuse cpp, AVX2 build", "kernel", ours("cpp"), _isa_missing("avx2"), devices=("cpu",),
            dtypes=("float32",), around=lambda: _with_isa("avx2"), checked=("small", "full"),
        ),
        Contender(
            "reference", "reference: eager PyTorch", "reference", ours("reference"),
            limit={FWD: 8192, FWD_BWD: 256}, layouts=("bdl",), dtypes=("float32",), update=our_update("reference"),
        ),
        Contender(
            "loop-compiled", "time loop, its body under torch.compile", "rival", rivals.loop_compiled,
            limit={FWD: 8192, FWD_BWD: 8192}, layouts=("bld",), dtypes=("float32",), devices=("cpu",),
            checked=("full",),  # every new shape costs it half a minute of compilation
        ),
        Contender(
            "mambapy", "mambapy: parallel scan", "rival", rivals.mambapy, importable("mambapy"),
            limit={FWD: 8192, FWD_BWD: 2048}, layouts=("bld",), dtypes=("float32",),
        ),
        Contender(
            "transformers", "transformers: its own fallback", "rival", rivals.transformers, rivals.transformers_missing,
            limit={FWD: 8192, FWD_BWD: 128}, layouts=("bdl",), dtypes=("float32",),
            update=rivals.transformers_update,
        ),
        Contender(
            "mamba_ssm", "mamba_ssm: published CUDA scan", "rival", rivals.mamba_ssm, rivals.mamba_ssm_missing,
            layouts=("bdl",), dtypes=("float32", "bfloat16", "float16"), devices=("cuda",),
        ),
    )
}  # fmt: skip


def entries(workload: Workload, device: str) -> Iterator[tuple[Entry, str | None]]:
    """Every entry of a workload on a device, with the reason of those that cannot run."""
    for direction in workload.directions:
        for contender in CONTENDERS.values():
            if contender.kind != "kernel" and contender.name not in workload.rivals_in(direction):
                continue
            if device not in contender.devices:
                continue
            decode = workload.op == "selective_state_update"
            if decode and contender.update is None:
                continue
            if contender.name == "cpp-avx2" and workload.name != "mamba-130m":
                continue
            shared = [layout for layout in workload.layouts if layout in contender.layouts]
            layouts = ("",) if decode else tuple(shared) if contender.kind == "kernel" else contender.layouts
            for dtype in workload.dtypes:
                if dtype in contender.dtypes:
                    for layout in layouts:
                        entry = Entry(workload, direction, contender.name, dtype, layout)
                        yield entry, contender.refusal(entry, device)
