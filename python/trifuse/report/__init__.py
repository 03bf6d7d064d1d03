"""``python -m trifuse report``: validate every backend, time it beside its rivals, write it down."""

from __future__ import annotations

import datetime
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Options", "run"]

EXAMPLE_SECONDS = 60  # what examples/byte_lm.py is meant to take on two cores
_MODULES = {"rich": "rich", "jinja2": "jinja2", "matplotlib": "matplotlib", "pytest_benchmark": "pytest-benchmark"}


@dataclass(frozen=True)
class Options:
    """What ``python -m trifuse report`` was asked for; see its ``--help``."""

    out: Path = Path("report")
    full: bool = False
    device: str = "cpu"
    ops: tuple[str, ...] = ()
    workloads: tuple[str, ...] = ()
    time_limit: float | None = None
    bench: Path | None = None
    example: bool = True

    @property
    def seconds(self) -> float:
        return self.time_limit if self.time_limit is not None else (3600.0 if self.full else 280.0)


def missing_packages() -> list[str]:
    """Distributions that the report needs and that are not installed."""
    import importlib.util

    return [name for module, name in _MODULES.items() if importlib.util.find_spec(module) is None]


def run(options: Options) -> int:
    """Make a report; returns 0, or 1 if a kernel failed its check or the example failed."""
    absent = missing_packages()
    if absent:
        raise RuntimeError(f"report: {', '.join(absent)} not installed; pip install 'trifuse[report]' brings them")
    from trifuse.report import arena, page, summary, table, timing, workloads

    started = time.monotonic()
    chosen = workloads.select(full=options.full, device=options.device, ops=options.ops, names=options.workloads)
    bench = timing.bench_folder(options.bench)
    options.out.mkdir(parents=True, exist_ok=True)
    samples = options.out / "benchmarks.json"
    samples.unlink(missing_ok=True)
    on = table.console()
    load = _load()
    if load is not None and load > 0.5:
        on.print(f"[bold yellow]This machine is busy[/] (load {load:.1f} before the start): times will be off.")
    with table.progress(on) as take:
        measured = timing.run_benchmarks(bench, _bench_options(options), options.seconds, take, samples)

    groups = summary.groups(chosen, measured)
    report = {
        "schema": 1,
        "created": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "device": options.device,
        "full": options.full,
        "blocks": arena.BLOCKS,
        "minimum_rounds": arena.FULL_ROUNDS if options.full else arena.QUICK_ROUNDS,
        "machine": measured.machine or _machine(options.device),
        "load": load,
        "headlines": summary.headlines(groups, options.device),
        "groups": groups,
        "failed": [one["entry"] for one in measured.failed],
        "verdicts": measured.verdicts,
        "absent": summary.reasons(measured),
        "byte_lm": None,
        "seconds": time.monotonic() - started,
    }
    table.print_report(on, report)
    example = bench.resolve().parent / "examples" / "byte_lm.py"
    if options.example and example.exists():
        report["byte_lm"] = run_example(example)
        report["seconds"] = time.monotonic() - started
    (options.out / "report.json").write_text(json.dumps(report, indent=1))
    page.write_page(report, options.out / "index.html")
    on.print(f"\nWrote {options.out / 'index.html'}, report.json and benchmarks.json in {report['seconds']:.0f} s.")
    for entry in report["failed"]:
        on.print(f"[bold red]FAILED[/] {entry}: no speed is given for a kernel that does not match its reference.")
    broken = report["byte_lm"] is not None and "error" in report["byte_lm"]
    return 1 if report["failed"] or broken else 0


def _load() -> float | None:
    """The system's load average over the last minute, where it has one."""
    try:
        return os.getloadavg()[0]
    except (AttributeError, OSError):
        return None


def _machine(device: str) -> dict:
    from trifuse.report import machine

    return machine.facts(device)


def _bench_options(options: Options) -> list[str]:
    out = [f"--device={options.device}"]
    if options.full:
        out.append("--full")
    if options.ops:
        out.append("--ops=" + ",".join(options.ops))
    if options.workloads:
        out.append("--workloads=" + ",".join(options.workloads))
    return out


def run_example(example: Path) -> dict:
    """Run examples/byte_lm.py with its own progress bar, and return the figures it wrote."""
    with tempfile.TemporaryDirectory() as scratch:
        written = Path(scratch) / "byte_lm.json"
        command = [sys.executable, str(example), "--json", str(written)]
        started = time.monotonic()
        try:
            code = subprocess.run(command, timeout=4 * EXAMPLE_SECONDS, check=False).returncode
        except subprocess.TimeoutExpired:
            code = None
        data = json.loads(written.read_text()) if written.exists() else {}
    if code is None:
        problem = {"error": f"examples/byte_lm.py did not end in {4 * EXAMPLE_SECONDS} s"}
    else:
        problem = {"error": f"examples/byte_lm.py ended with exit code {code}"} if code or not data else {}
    figures, texts = {}, {}
    for name, value in _flat(data):
        if isinstance(value, str) and (len(value) > 80 or "\n" in value):
            texts[name] = value
        elif not isinstance(value, list):
            figures[name] = value
    return problem | {"figures": figures, "texts": texts, "data": data, "seconds": time.monotonic() - started}


def _flat(data: dict, prefix: str = ""):
    for name, value in data.items():
        label = f"{prefix}{name.replace('_', ' ')}"
        if isinstance(value, dict):
            yield from _flat(value, label + ": ")
        else:
            yield label, value
