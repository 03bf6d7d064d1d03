"""Facts about the machine, torch and this installation, for ``info`` and for every report."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path

import torch

import trifuse
from trifuse import _library, backends

__all__ = ["commit", "facts"]

_LIBRARIES = {"cpp": "CPU kernels", "cuda": "CUDA kernels", "native": "trifuse._native"}
_PACKAGES = ("numpy", "triton", "mambapy", "transformers", "mamba_ssm", "pytest-benchmark")


def facts(device: str = "cpu") -> dict:
    """Everything a reader needs to judge a figure, as plain JSON values."""
    isas, active = _isas()
    return {
        "trifuse": trifuse.__version__,
        "commit": commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "packages": {name: version for name in _PACKAGES if (version := _version(name))},
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cpu_flags": _cpu_flags(),
        "isas": isas,
        "isa": active,
        "libraries": {title: _library.missing(name) or "loaded" for name, title in _LIBRARIES.items()},
        "build": _build_info(),
        "cuda": _cuda(),
        "device": device,
    }


def backends_per_op() -> dict[str, dict[str, list[str]]]:
    """For every op: each backend with its reasons for refusing a small float32 CPU (or CUDA) call."""
    from trifuse.report.subjects import OPS

    out = {}
    for name, subject in sorted(OPS.items()):
        out[name] = {}
        for backend in backends.Op.registry[name].names:
            device = "cuda" if backend in ("cuda", "triton") and torch.cuda.is_available() else "cpu"
            out[name][backend] = subject.refusals(backend, device)
    return out


def commit(folder: Path | None = None) -> str | None:
    """The commit of the clone this is run from, marked when files differ from it; None outside one."""
    where = folder or Path.cwd()
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],
            cwd=where, capture_output=True, text=True, timeout=20, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip() or None


def _isas() -> tuple[list[str], str | None]:
    from trifuse.report.contenders import cpu_isas

    return cpu_isas()


def _build_info() -> dict:
    try:
        from trifuse import _native

        return dict(_native.build_info())
    except (ImportError, AttributeError):
        return {}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def _cpu_flags() -> list[str]:
    """Those flags of the processor that decide which build of a kernel can run."""
    present = set((_cpuinfo("flags") or _cpuinfo("Features")).split())
    wanted = ("avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_bf16", "avx512_fp16",
              "amx_bf16", "asimd", "sve", "bf16")  # fmt: skip
    return [flag for flag in wanted if flag in present]


def _cpuinfo(key: str) -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            name, _, value = line.partition(":")
            if name.strip() == key:
                return value.strip()
    except OSError:
        pass
    return ""


def _cuda() -> list[str]:
    if not torch.cuda.is_available():
        return []
    out = []
    for index in range(torch.cuda.device_count()):
        one = torch.cuda.get_device_properties(index)
        out.append(f"{one.name}, sm_{one.major}{one.minor}, {one.multi_processor_count} multiprocessors, "
                   f"{one.total_memory / 2**30:.0f} GiB")  # fmt: skip
    return out
