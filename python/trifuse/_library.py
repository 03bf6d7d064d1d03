"""Loads the compiled libraries and owns the torch library that every schema is defined in."""

from __future__ import annotations

import importlib
import os
from pathlib import Path

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

__all__ = ["LIB", "MINIMUM_TORCH", "missing", "values_are_known", "wrong_isa"]

MINIMUM_TORCH = (2, 10)

# Schemas are defined here, in Python, so that they exist whichever libraries could be loaded; the
# libraries only add kernels to them.
LIB = torch.library.Library("trifuse", "DEF")

_missing: dict[str, str] = {}


def missing(library: str) -> str | None:
    """Why a compiled library ("cpp", "cuda", "native") is not there, or None if it is loaded."""
    return _missing.get(library)


def torch_version() -> tuple[int, int]:
    major, minor = torch.__version__.split(".")[:2]
    return int(major), int(minor)


def _load(library: str, file: str) -> None:
    path = Path(__file__).parent / "lib" / file
    if torch_version() < MINIMUM_TORCH:
        wanted = ".".join(map(str, MINIMUM_TORCH))
        _missing[library] = f"torch is {torch.__version__} and the compiled kernels need {wanted} or newer"
    elif not path.exists():
        _missing[library] = f"{file} was not built with this installation"
    else:
        try:
            torch.ops.load_library(str(path))
        except OSError as error:
            _missing[library] = f"{file} could not be loaded: {error}"


_load("cpp", "libtrifuse_ops.so")
if torch.version.cuda is None:
    _missing["cuda"] = f"this torch ({torch.__version__}) is built without CUDA"
else:
    _load("cuda", "libtrifuse_cuda.so")
try:
    importlib.import_module("trifuse._native")
except ImportError as error:
    _missing["native"] = f"trifuse._native could not be imported: {error}"


def _wrong_isa() -> str | None:
    name = os.environ.get("TRIFUSE_CPU_ISA")
    if not name or "cpp" in _missing or "native" in _missing:
        return None
    known = importlib.import_module("trifuse._native").cpu_isas()
    if name in known:
        return None
    return f"TRIFUSE_CPU_ISA is {name!r}; on this machine and build it must be one of {', '.join(known)}"


wrong_isa = _wrong_isa()
"""What is wrong with ``TRIFUSE_CPU_ISA``, which every call on the CPU then raises; None where it is right."""


def values_are_known(tensor: Tensor) -> bool:
    """Whether a tensor's values can be looked at: not while tracing, nor in a FakeTensor."""
    if torch.compiler.is_compiling() or isinstance(tensor, FakeTensor) or tensor.is_meta:
        return False
    return not isinstance(tensor, torch._subclasses.functional_tensor.FunctionalTensor)
