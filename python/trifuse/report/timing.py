"""Runs the benchmarks in a process of their own and gathers what they measured.

A separate process keeps a kernel that crashes from taking the report with it, and its memory figures
free of the report's own. Samples and statistics are pytest-benchmark's.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

__all__ = ["BenchmarkError", "Measured", "bench_folder", "run_benchmarks"]

_GRACE = 300  # seconds beyond the time limit after which the benchmarks are ended


class BenchmarkError(RuntimeError):
    """The benchmarks could not be run. The message says why."""


@dataclass
class Measured:
    """Rows of speeds, verdicts of validation, and the entries that were not timed, with why."""

    rows: list[dict] = field(default_factory=list)
    verdicts: list[dict] = field(default_factory=list)
    absent: list[dict] = field(default_factory=list)
    machine: dict = field(default_factory=dict)
    seconds: float = 0.0
    exit_code: int = 0
    output: str = ""

    @property
    def failed(self) -> list[dict]:
        return [one for one in self.absent if one["failed"]]


def bench_folder(given: Path | None = None) -> Path:
    """The clone's ``bench/``: the one given, below the working directory, or beside an editable install."""
    beside = Path(__file__).resolve().parents[3]
    for folder in (given,) if given is not None else (Path("bench"), beside / "bench"):
        if (folder / "bench_selective_scan.py").exists():
            return folder
    raise BenchmarkError(
        f"report: there are no benchmarks in {given or Path('bench').resolve()}; run it from a clone of the "
        "repository, or name the clone's bench folder with --bench"
    )


def run_benchmarks(
    bench: Path, options: list[str], time_limit: float, on_event: Callable[[dict], None], keep_json: Path
) -> Measured:
    """Run ``pytest bench/`` and return what it measured.

    Args:
        bench: the folder of benchmarks.
        options: options of bench/conftest.py.
        time_limit: seconds; no new entry starts after them, and the process is ended a while later.
        on_event: called with every event as it comes, for a progress bar.
        keep_json: where pytest-benchmark writes every sample.
    """
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        events, log = Path(scratch) / "events", Path(scratch) / "log"
        events.touch()
        command = [
            sys.executable, "-m", "pytest", *sorted(map(str, bench.glob("bench_*.py"))),
            f"--rootdir={bench}", "-o", "addopts=", "-p", "no:cacheprovider", "-p", "pytest_benchmark.plugin",
            "-q", "--tb=short",
            "--benchmark-only", "--benchmark-columns=median", f"--benchmark-json={keep_json}",
            f"--benchmark-storage=file://{scratch}/storage", f"--events={events}", f"--time-limit={time_limit}",
            *options,
        ]  # fmt: skip
        # No other plugin has a say in how rounds are run. Inside a worker of pytest-xdist, pytest-benchmark would
        # take this process for one of its workers and refuse to measure.
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
        environment |= {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "TRIFUSE_BACKEND": ""}
        with log.open("w") as sink:
            process = subprocess.Popen(command, stdout=sink, stderr=subprocess.STDOUT, env=environment)
            try:
                seen = _follow(process, events, on_event, started + time_limit + _GRACE)
            finally:
                if process.poll() is None:
                    process.kill()
                    process.wait()
        measured = Measured(exit_code=process.returncode, output=log.read_text(errors="replace"))
    measured.seconds = time.monotonic() - started
    told = ("entry", "contender", "ok", "summary", "checks")
    measured.verdicts = [{key: event[key] for key in told} for event in seen if event["kind"] == "verdict"]
    measured.absent = [event for event in seen if event["kind"] == "absent"]
    if not keep_json.exists() or keep_json.stat().st_size == 0:
        # pytest-benchmark writes nothing when nothing was timed; that is an answer if all failed or skipped.
        if process.returncode not in (0, 1) or not seen:
            where = next((event["entry"] for event in reversed(seen) if event["kind"] == "turn"), "their start")
            raise BenchmarkError(
                f"report: the benchmarks ended with exit code {process.returncode} at {where}\n"
                + measured.output[-3000:]
            )
        return measured
    data = json.loads(keep_json.read_text())
    measured.machine = data.get("machine_info", {})
    measured.rows = merge(data["benchmarks"])
    return measured


def _follow(process: subprocess.Popen, events: Path, on_event: Callable[[dict], None], deadline: float) -> list[dict]:
    seen, rest = [], ""
    with events.open() as stream:
        while True:
            running = process.poll() is None
            rest += stream.read()
            *lines, rest = rest.split("\n")
            for line in lines:
                seen.append(json.loads(line))
                on_event(seen[-1])
            if not running:
                return seen
            if time.monotonic() > deadline:
                process.kill()
            time.sleep(0.1)


def merge(benchmarks: list[dict]) -> list[dict]:
    """One row per entry, from its blocks: the statistics of all its rounds."""
    from pytest_benchmark.stats import Stats

    rows: dict[str, dict] = {}
    samples: dict[str, Stats] = {}
    for one in benchmarks:
        facts = one["extra_info"]
        row = rows.setdefault(facts["id"], {key: value for key, value in facts.items() if key != "block"})
        row.setdefault("blocks", []).append(facts["block"])
        row["iterations"] = one["stats"]["iterations"]
        stats = samples.setdefault(facts["id"], Stats())
        for seconds in one["stats"]["data"]:
            stats.update(seconds)
    for key, row in rows.items():
        stats = samples[key]
        row["rounds"] = stats.rounds
        row["seconds"] = {name: getattr(stats, name) for name in ("min", "q1", "median", "q3", "max")}
    return list(rows.values())
