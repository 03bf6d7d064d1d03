"""``python -m trifuse info | explain | report``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

import trifuse
from trifuse import backends
from trifuse.report import machine, workloads
from trifuse.report.inputs import Draw
from trifuse.report.subjects import OPS

DTYPES = tuple(name for name, dtype in workloads.DTYPES.items() if dtype.is_floating_point)


def main(arguments: list[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    options = _parser().parse_args(arguments)
    try:
        return options.run(options)
    except (ValueError, TypeError, RuntimeError) as error:
        print(f"trifuse {options.command}: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m trifuse", description=trifuse.__doc__)
    parser.add_argument("--version", action="version", version=f"trifuse {trifuse.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="info | explain | report")

    info = commands.add_parser("info", help="what is installed, what can run here, and why the rest cannot")
    info.set_defaults(run=_info)

    explain = commands.add_parser("explain", help="which backend a call would run on, and why the others would not")
    explain.add_argument("op", choices=sorted(OPS))
    explain.add_argument("--shape", default=None, help="; ".join(
        f"{','.join(one.explained)} ({name})" for name, one in OPS.items()))  # fmt: skip
    explain.add_argument("--dtype", default="float32", choices=DTYPES, help="of the sequences")
    explain.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ... (need not be there)")
    explain.add_argument("--layout", default="bdl", choices=("bdl", "bld"))
    explain.add_argument("--complex", action="store_true", help="complex A, or complex sequences")
    names = (*backends.NAMES, backends.COMPOSITE)
    explain.add_argument("--backend", choices=names, help="as with trifuse.backend(...) forced")
    explain.set_defaults(run=_explain)

    report = commands.add_parser("report", help="validate every backend, time it beside its rivals, write it down")
    report.add_argument("--full", action="store_true", help="the whole grid of shapes, dtypes and layouts")
    report.add_argument("--out", type=Path, default=Path("report"), help="folder for index.html and report.json")
    report.add_argument("--device", choices=("cpu", "cuda"), default=None, help="default: cuda where there is a GPU")
    report.add_argument("--ops", type=_names, default=(), help="only these ops, comma-separated")
    report.add_argument("--workloads", type=_names, default=(), help="only these workloads, comma-separated")
    report.add_argument("--time-limit", type=_positive, default=None, metavar="S",
                        help="start no new measurement after S seconds (default 280, with --full 3600)")  # fmt: skip
    report.add_argument("--bench", type=Path, default=None, help="the clone's bench folder, if not ./bench")
    report.add_argument("--no-example", action="store_true", help="leave out examples/byte_lm.py")
    report.set_defaults(run=_report)
    return parser


def _names(text: str) -> tuple[str, ...]:
    return tuple(name for name in text.split(",") if name)


def _positive(text: str) -> float:
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"it is {text}; it must be a positive number of seconds")
    return value


def _info(options: argparse.Namespace) -> int:
    facts = machine.facts()
    libraries = facts["libraries"]
    lines = [
        ("trifuse", facts["trifuse"]),
        ("python", f"{facts['python']} on {facts['system']}"),
        ("torch", f"{facts['torch']}, {facts['threads']} threads"),
        *((name, version) for name, version in facts["packages"].items()),
        ("processor", f"{facts['cpu']}, {facts['cores']} cores"),
        ("processor has", ", ".join(facts["cpu_flags"]) or "unknown"),
        ("kernels can use", ", ".join(facts["isas"]) or "nothing compiled"),
        ("kernels use", facts["isa"] or "nothing compiled"),
        *((f"build: {name}", value) for name, value in facts["build"].items() if value),
        ("CUDA devices", "; ".join(facts["cuda"]) or "none"),
        *((f"library: {name}", state) for name, state in libraries.items()),
    ]
    width = max(len(name) for name, _ in lines)
    for name, value in lines:
        print(f"{name:<{width}}  {value}")
    for op, found in machine.backends_per_op().items():
        print(f"\n{op}")
        for backend, reasons in found.items():
            print(f"  {backend:<10} {'available' if not reasons else 'unavailable: ' + '; '.join(reasons)}")
    return 0


def _explain(options: argparse.Namespace) -> int:
    from contextlib import nullcontext

    from torch._subclasses.fake_tensor import FakeTensorMode

    subject = OPS[options.op]
    if options.complex and not subject.complex_arguments:
        raise ValueError(f"--complex: {options.op} takes real A only")
    sizes = _sizes(options.shape, subject.explained)
    dtype = workloads.DTYPES[options.dtype]
    # Fake tensors carry a shape, a dtype and a device, and no data: any size, any device.
    with FakeTensorMode(), backends.backend(options.backend) if options.backend else nullcontext():
        workload = workloads.Workload("explained", "", options.op, sizes)
        inputs = subject.make(workload, Draw(torch.device(options.device), None))
        layout = options.layout if subject.axes.has_layouts else ""
        inputs = inputs.to(dtype=dtype, layout=layout)
        if options.complex:
            wide = torch.complex128 if dtype == torch.float64 else torch.complex64
            inputs.tensors.update({name: inputs[name].to(wide) for name in subject.complex_arguments})
        positional, named = subject.arguments(inputs)
        backends.explain(options.op, *positional, **named)
    return 0


def _sizes(text: str | None, default: dict[str, int]) -> dict[str, int]:
    if text is None:
        return default
    parts = text.split(",")
    if len(parts) != len(default) or not all(part.strip().isdigit() for part in parts):
        raise ValueError(f"--shape is {text!r}; it must be {','.join(default)}, as in {','.join('2' * len(default))}")
    return dict(zip(default, map(int, parts), strict=True))


def _report(options: argparse.Namespace) -> int:
    from trifuse import report

    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no CUDA device here")
    return report.run(report.Options(
        out=options.out, full=options.full, device=device, ops=options.ops, workloads=options.workloads,
        time_limit=options.time_limit, bench=options.bench, example=not options.no_example,
    ))  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
