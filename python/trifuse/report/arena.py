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

from trifuse.report import contenders, floors, memory
from trifuse.report.contenders import CONTENDERS
from trifuse.report.validation import Validator, Verdict
from trifuse.report.workloads import DTYPES, Entry, Inputs, Workload, make_inputs

__all__ = [
    "BLOCKS",
    "COPY_FLOOR",
    "EXP_FLOOR",
    "FULL_ROUNDS",
    "QUICK_ROUNDS",
    "Arena",
    "NotTimed",
    "Turn",
    "schedule",
    "timer",
]

BLOCKS = 5
EXP_FLOOR, COPY_FLOOR = "exp-floor", "copy-floor"
_FLOORS = (EXP_FLOOR, COPY_FLOOR)
_MAX_ROUNDS = 50
_COPY_FLOOR_ELEMENTS = 1 << 26  # beyond them its buffers alone would take gigabytes
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
        found = list(contenders.entries(workload, device))
        absent += [(entry, reason) for entry, reason in found if reason is not None]
        for direction in workload.directions:
            group = [entry for entry, reason in found if reason is None and entry.direction == direction]
            if not group:
                continue
            group = _floor_entries(workload, direction, device) + group
            for block in range(BLOCKS):
                turns += [(entry, block) for entry in (group if block % 2 == 0 else reversed(group))]
    return turns, absent


def _floor_entries(workload: Workload, direction: str, device: str) -> list[Entry]:
    if workload.op != "selective_scan":
        return []
    out = [Entry(workload, direction, EXP_FLOOR, "float32", "")] if device == "cpu" else []
    if workload.elements < _COPY_FLOOR_ELEMENTS:
        out += [Entry(workload, direction, COPY_FLOOR, dtype, "") for dtype in workload.dtypes]
    return out


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
    """State of a benchmark session: the current group's tensors, and the verdicts.

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
        self.validator = Validator(device)
        self._workload: Workload | None = None
        self._group = ""
        self._inputs: dict[tuple[str, str], Inputs] = {}
        self._prepared: dict[Entry, _Prepared | NotTimed] = {}

    def turn(self, entry: Entry, block: int) -> Turn:
        """The block of an entry, validated and calibrated when it is its first. Raises NotTimed."""
        self._enter(entry)
        if entry not in self._prepared:
            try:
                self._prepared[entry] = self._prepare(entry)
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
            self._around(entry), prepared.facts | {"block": block},
        )  # fmt: skip

    def _enter(self, entry: Entry) -> None:
        """Drop what the next group does not need: long sequences fill the memory."""
        if entry.group != self._group:
            self._group = entry.group
            self._prepared.clear()
        if entry.workload != self._workload:
            self._workload = entry.workload
            self._inputs.clear()
            self.validator.forget_full_cases()
            if self.device == "cuda":
                torch.cuda.empty_cache()

    def _around(self, entry: Entry) -> Callable[[], AbstractContextManager]:
        return nullcontext if entry.contender in _FLOORS else CONTENDERS[entry.contender].around

    def _prepare(self, entry: Entry) -> _Prepared:
        if time.monotonic() > self.deadline:
            raise NotTimed(f"the time limit of {self.limit:.0f} s was reached before its turn")
        self._check_memory(entry)
        if entry.contender not in _FLOORS:
            self._validate(entry)
        call, facts = self._call(entry)
        with self._around(entry)():
            return self._calibrate(entry, call, facts)

    def _validate(self, entry: Entry) -> Verdict:
        contender = CONTENDERS[entry.contender]
        verdict = self.validator.verdict(contender, entry)
        self.report({"kind": "verdict", "entry": entry.id, "contender": entry.contender, **verdict.as_dict()})
        if not verdict.ok:
            raise NotTimed(str(verdict), failed=True)
        return verdict

    def _check_memory(self, entry: Entry) -> None:
        one = entry.workload
        # Five sequence tensors, their copies for validation, and as many again for gradients.
        need = 20 * one.elements * 4
        have = memory.available_bytes(self.device)
        if need > have:
            raise NotTimed(f"it needs about {need / 1e9:.1f} GB and {have / 1e9:.1f} GB are free")

    def inputs(self, entry: Entry) -> Inputs:
        key = (entry.dtype, entry.layout or "bld")
        if key not in self._inputs:
            base = self._inputs.get(("float32", "bld"))
            if base is None:
                base = self._inputs["float32", "bld"] = make_inputs(entry.workload, self.device)
            if key != ("float32", "bld"):
                self._inputs[key] = base.to(dtype=DTYPES[key[0]], layout=key[1])
        return self._inputs[key]

    def _call(self, entry: Entry) -> tuple[Callable[[], object], dict]:
        """What to time, and the facts that go with it into the report."""
        inputs = self.inputs(entry)
        facts = {
            "id": entry.id, "group": entry.group, "exponentials": entry.workload.exponentials,
            "bytes": inputs.bytes(entry.direction),
        }  # fmt: skip
        if self.device == "cuda" and entry.workload.op == "selective_scan":
            facts["exp_floor_computed"], facts["exp_floor_note"] = floors.computed_gpu_exp_floor(entry.workload)
        if entry.contender == EXP_FLOOR:
            call, facts["note"] = floors.exp_floor(entry.workload)
            return call, facts
        if entry.contender == COPY_FLOOR:
            call, facts["note"] = floors.copy_floor(inputs, entry.direction)
            return call, facts
        contender = CONTENDERS[entry.contender]
        if entry.workload.op == "selective_state_update":
            arguments = contenders.update_arguments(inputs)
            return lambda: contender.update(arguments), facts
        return contenders.timed_call(contender, inputs, entry.direction), facts

    def _calibrate(self, entry: Entry, call: Callable[[], object], facts: dict) -> _Prepared:
        """Run once for the peak of memory, again if that was quick, and plan the rounds."""
        clock = timer(self.device)
        if entry.contender == "loop-compiled":
            call()  # compiles: neither its time nor its memory is the kernel's
        start = clock()
        if entry.contender in _FLOORS:
            call()
        else:
            facts["peak_extra_bytes"], facts["memory_method"] = memory.peak_extra(call, self.device)
        seconds = clock() - start
        if seconds < 0.5:
            start = clock()
            call()
            seconds = min(seconds, clock() - start)
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
