"""Peak extra memory of a call: what the process, or the GPU, held beyond what it held before."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch

__all__ = ["available_bytes", "peak_extra"]

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")


def peak_extra(call: Callable[[], object], device: str) -> tuple[int | None, str]:
    """Run `call` once; return the peak of extra bytes and how it was measured.

    Outputs and gradients count, since the call allocates them; inputs do not. On a CPU the figure is
    the resident set's high-water mark, reset just before the call after free heap pages have been
    given back to the system, and so includes whatever any library allocates.
    """
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before, "torch.cuda.max_memory_allocated"
    _trim_heap()
    try:
        _CLEAR_REFS.write_text("5")
        before = _status("VmRSS")
        call()
        return max(0, _status("VmHWM") - before), "VmHWM"
    except OSError:
        return _sampled(call)


def available_bytes(device: str) -> int:
    """Memory that can be had without swapping."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    try:
        return _field(Path("/proc/meminfo"), "MemAvailable")
    except OSError:
        return 1 << 62


def _trim_heap() -> None:
    # Pages that malloc keeps for itself would hide as much of the call's own use.
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)


def _field(path: Path, name: str) -> int:
    for line in path.read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"{path} has no {name}")


def _status(name: str) -> int:
    return _field(_STATUS, name)


def _sampled(call: Callable[[], object]) -> tuple[int | None, str]:
    """Where the high-water mark cannot be reset: the highest of samples a millisecond apart."""
    try:
        before = peak = _status("VmRSS")
    except OSError:
        call()
        return None, "not measured on this system"
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.is_set():
            peak = max(peak, _status("VmRSS"))
            time.sleep(0.001)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        result = call()
        peak = max(peak, _status("VmRSS"))
        del result
    finally:
        done.set()
        watcher.join()
    return peak - before, "VmRSS, sampled every millisecond"
