"""Floors that several subjects share: a copy, exponentials, matrix products."""

from __future__ import annotations

import functools
import subprocess
from collections.abc import Callable

import torch

from trifuse.report.contenders import Floor
from trifuse.report.inputs import Inputs
from trifuse.report.workloads import FWD_BWD, Workload

__all__ = ["COPY", "COPY_FLOOR", "EXP_FLOOR", "UPDATE_COPY", "computed_gpu_exp_floor", "copy_floor", "exp_floor"]

EXP_FLOOR, COPY_FLOOR = "exp-floor", "copy-floor"
_L1_ELEMENTS = 4096  # 16 KB of float32: stays in any first-level cache
_SPECIAL_PER_CLOCK = 16  # exponentials per clock and multiprocessor, compute capability 7.x to 10.x


def native_exp_floor() -> Callable[[int, int], float] | None:
    """The compiled loop, or None where this installation has none."""
    try:
        from trifuse import _native
    except ImportError:
        return None
    return getattr(_native, "exp_floor", None)


def exp_floor(count: int) -> tuple[Callable[[], object], str]:
    """A call that computes so many exponentials, and what it is."""
    native = native_exp_floor()
    threads = torch.get_num_threads()
    if native is not None:
        return lambda: native(count, threads), f"{count:,} exponentials, the kernels' own exp, {threads} threads"
    # torch.exp_ on one cached tile per thread: an upper bound of the true floor, as each repetition
    # is a torch call.
    tile = torch.zeros(_L1_ELEMENTS * threads)
    repeats = max(1, count // tile.numel())

    def loop() -> None:
        for _ in range(repeats):
            tile.zero_().exp_()

    return loop, f"{count:,} exponentials by torch.exp_ on a cached tensor (no compiled floor in this installation)"


def copy_floor(workload: Workload, inputs: Inputs, direction: str) -> tuple[Callable[[], object], str]:
    """A call that moves as many bytes as the call must read and write once."""
    total = inputs.bytes(direction == FWD_BWD)
    if direction == FWD_BWD:
        total += inputs.dout.nbytes
    return copying(total, inputs.dout.device)


def updating_floor(workload: Workload, inputs: Inputs, direction: str) -> tuple[Callable[[], object], str]:
    """The same for an op that only changes tensors in place: those are read and written."""
    written = [inputs[name] for name in inputs.axes.mutated]
    return copying(inputs.bytes(False) + sum(one.nbytes for one in written), written[0].device)


def copying(total: int, device: torch.device) -> tuple[Callable[[], object], str]:
    """A copy that reads and writes so many bytes in all."""
    source = torch.zeros(max(1, total // 8), dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source), f"torch copy moving {total / 1e6:.1f} MB, reads and writes counted"


# Beyond so many elements its buffers alone would take gigabytes.
COPY = Floor(COPY_FLOOR, "floor: copying inputs and outputs", copy_floor, largest=(1 << 26) - 1)
UPDATE_COPY = Floor(COPY_FLOOR, "floor: copying what is read and written", updating_floor)


def computed_gpu_exp_floor(count: int) -> tuple[float, str]:
    """Seconds the special-function units need at their peak rate: computed, not measured."""
    processors, clock = _gpu()
    rate = processors * _SPECIAL_PER_CLOCK * clock
    text = f"computed: {count:,} exponentials at {_SPECIAL_PER_CLOCK} per clock and multiprocessor, "
    return count / rate, text + f"{clock / 1e6:.0f} MHz"


@functools.cache
def _gpu() -> tuple[int, float]:
    """Multiprocessors of the GPU and its highest clock in Hz."""
    properties = torch.cuda.get_device_properties(0)
    return properties.multi_processor_count, getattr(properties, "clock_rate", 0) * 1e3 or _nvidia_smi_clock()


def _nvidia_smi_clock() -> float:
    command = ["nvidia-smi", "--query-gpu=clocks.max.sm", "--format=csv,noheader,nounits"]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0]) * 1e6
