"""What of this package this machine can run, as marks and parameters of tests."""

import pytest

import trifuse
from trifuse import _library

HAS_CPP = _library.missing("cpp") is None
ISAS = trifuse._native.cpu_isas() if _library.missing("native") is None else []

cpp_only = pytest.mark.skipif(not HAS_CPP, reason="the cpp library is not built")


def kernels_of(*gpu):
    """The parameters (backend, device): `cpp` on CPU tensors, each of `gpu` on CUDA tensors."""
    cases = [pytest.param("cpp", "cpu", marks=cpp_only)]
    cases += [pytest.param(name, "cuda", marks=pytest.mark.gpu) for name in gpu]
    return pytest.mark.parametrize("backend, device", cases)
