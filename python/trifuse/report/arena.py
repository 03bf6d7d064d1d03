"""Where contenders take turns: inputs, the gate of validation, and how many rounds each gets.

Interleaving. The rounds of an entry are split into blocks, and the blocks of all entries of a group
(a workload in one direction) alternate: first block of each, in order, then the second block of each
in the opposite order, and so on. Whatever slows the machine for a while then slows all of them.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch

from trifuse.report import memory
from trifuse.report.subject import Bench, Timed
from trifuse.report.subjects import SUBJECTS
from trifuse.report.workloads import Entry, Workload

__all__ = ["BLOCKS", "FULL_ROUNDS", "QUICK_ROUNDS", "Arena", "NotTimed", "Turn", "schedule", "timer"]

BLOCKS = 5
_MAX_ROUNDS = 50
QUICK_ROUNDS, FULL_ROUNDS = 3, 5  # rounds even a slow entry gets
_SLOW, _VERY_SLOW = 2.0, 8.0  # seconds a call, from which on two rounds, or one, must do in a quick report


class NotTimed(Exception):
    """An entry takes no part; the message is the reason. `failed`: it did not pass validation."""

    def __init__(self, reason: str, failed: bool = False):
        super().__init__(reason)
        self.failed = failed


@dataclass(frozen=True)
class Turn:
    """One block of one entry, ready to be timed."""

    call: Callable[[], object]
    rounds: int
    iterations: int
    warmup: int
    around: Callable[[], AbstractContextManager]
    facts: dict

    def run(self, benchmark) -> None:
        """Time the block with pytest-benchmark's fixture."""
        benchmark.extra_info.update(self.facts)
        benchmark.pedantic(self.call, rounds=self.rounds, iterations=self.iterations, warmup_rounds=self.warmup)


@dataclass
class _Prepared:
    call: Callable[[], object]
    rounds: int
    iterations: int
    facts: dict


def schedule(workloads: tuple[Workload, ...], device: str) -> tuple[list[tuple[Entry, int]], list[tuple[Entry, str]]]:
    """The turns (entry, block) in the order they are taken, and the entries that take none, with why."""
    turns, absent = [], []
    for workload in workloads:
        subject = SUBJECTS[workload.op]
        found = list(subject.entries(workload, device))
        absent += [(entry, reason) for entry, reason in found if reason is not None]
        for direction in workload.directions:
            group = [entry for entry, reason in found if reason is None and entry.direction == direction]
            if not group:
                continue
            group = subject.floor_entries(workload, direction, device) + group
            for block in range(BLOCKS):
                turns += [(entry, block) for entry in (group if block % 2 == 0 else reversed(group))]
    return turns, absent


def timer(device: str) -> Callable[[], float]:
    """The clock of a round; on a GPU it waits for the work queued before."""
    if device != "cuda":
        return time.perf_counter

    def synchronized() -> float:
        torch.cuda.synchronize()
        return time.perf_counter()

    return synchronized


def rounds_in(block: int, rounds: int) -> int:
    """How many of an entry's rounds fall in a block, spread evenly and none lost."""
    return rounds * (block + 1) // BLOCKS - rounds * block // BLOCKS


class Arena:
    """State of a benchmark session: the subject at the bench, and what was prepared for its current group.

    Args:
        device: "cpu" or "cuda".
        budget: seconds of rounds an entry may use.
        minimum_rounds: rounds even the slowest entry gets.
        limit: seconds after which no new entry is started.
        report: called with an event (a dict) for everything worth telling.
    """

    def __init__(self, device: str, budget: float, minimum_rounds: int, limit: float, report: Callable[[dict], None]):
        self.device = device
        self.budget = budget
        self.minimum_rounds = minimum_rounds
        self.limit = limit
        self.deadline = time.monotonic() + limit
        self.report = report
        self._benches: dict[str, Bench] = {}
        self._workload: Workload | None = None
        self._group = ""
        self._prepared: dict[Entry, _Prepared | NotTimed] = {}

    def turn(self, entry: Entry, block: int) -> Turn:
        """The block of an entry, validated and calibrated when it is its first. Raises NotTimed."""
        bench = self._enter(entry)
        if entry not in self._prepared:
            try:
                self._prepared[entry] = self._prepare(bench, entry)
            except NotTimed as reason:
                self.report({"kind": "absent", "entry": entry.id, "reason": str(reason), "failed": reason.failed})
                self._prepared[entry] = reason
        prepared = self._prepared[entry]
        if isinstance(prepared, NotTimed):
            raise prepared
        rounds = rounds_in(block, prepared.rounds)
        if rounds == 0:
            raise NotTimed(f"its {prepared.rounds} rounds fall in other blocks")
        return Turn(
            prepared.call, rounds, prepared.iterations, 1 if prepared.rounds > self.minimum_rounds else 0,
            self._around(bench, entry), prepared.facts | {"block": block},
        )  # fmt: skip

    def close(self) -> None:
        """End what benches have running."""
        for bench in self._benches.values():
            bench.close()
        self._benches.clear()

    def _enter(self, entry: Entry) -> Bench:
        """Drop what the next group does not need: long sequences fill the memory."""
        if entry.group != self._group:
            self._group = entry.group
            self._prepared.clear()
        op = entry.workload.op
        if entry.workload != self._workload:
            if self._workload is not None and self._workload.op != op:
                self._benches[self._workload.op].enter(None)
            self._workload = entry.workload
            if op not in self._benches:
                self._benches[op] = SUBJECTS[op].bench(self.device)
            self._benches[op].enter(entry.workload)
            if self.device == "cuda":
                torch.cuda.empty_cache()
        return self._benches[op]

    def _around(self, bench: Bench, entry: Entry) -> Callable[[], AbstractContextManager]:
        return nullcontext if _is_floor(entry) else lambda: bench.around(entry)

    def _prepare(self, bench: Bench, entry: Entry) -> _Prepared:
        if time.monotonic() > self.deadline:
            raise NotTimed(f"the time limit of {self.limit:.0f} s was reached before its turn")
        need, have = bench.need_bytes(entry), memory.available_bytes(self.device)
        if need > have:
            raise NotTimed(f"it needs about {need / 1e9:.1f} GB and {have / 1e9:.1f} GB are free")
        errors = {}
        if not _is_floor(entry):
            verdict = bench.verdict(entry)
            self.report({"kind": "verdict", "entry": entry.id, "contender": entry.contender, **verdict.as_dict()})
            if not verdict.ok:
                raise NotTimed(str(verdict), failed=True)
            errors = {f"{check.case} {check.tensor}": check.error for check in verdict.checks}
        timed = bench.timed(entry)
        facts = {"id": entry.id, "group": entry.group, "errors": errors, **timed.facts}
        with self._around(bench, entry)():
            return self._calibrate(bench, entry, timed, facts)

    def _calibrate(self, bench: Bench, entry: Entry, timed: Timed, facts: dict) -> _Prepared:
        """Run once for the peak of memory, again if that was quick, and plan the rounds."""
        clock, call = timer(self.device), timed.call
        if timed.compiles:
            call()  # neither the time nor the memory of compiling is the kernel's
        start = clock()
        if _is_floor(entry):
            call()
        else:
            facts["peak_extra_bytes"], facts["memory_method"] = bench.peak(entry, call)
        seconds = clock() - start
        # A quick call that was held up once would get too few rounds.
        tries, since = 0, clock()
        while seconds < 0.5 and tries < 5 and (tries == 0 or clock() - since < 0.1):
            start = clock()
            call()
            seconds, tries = min(seconds, clock() - start), tries + 1
        minimum = self.minimum_rounds
        if seconds > _SLOW and minimum <= QUICK_ROUNDS:
            minimum = 2 if seconds < _VERY_SLOW else 1
        rounds = min(_MAX_ROUNDS, max(minimum, math.floor(self.budget / max(seconds, 1e-7))))
        left = self.deadline - time.monotonic()
        if seconds * rounds > left:
            rounds = max(1, math.floor(left / seconds))
        # A round shorter than a millisecond would measure the clock and the loop around it.
        iterations = max(1, math.ceil(1e-3 / max(seconds, 1e-7))) if seconds < 1e-3 else 1
        return _Prepared(call, rounds, iterations, facts)


def _is_floor(entry: Entry) -> bool:
    return entry.contender in SUBJECTS[entry.workload.op].floors
