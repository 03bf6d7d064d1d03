"""Fixtures of the whole suite."""

import pytest
import torch
from backends_here import ISAS

import trifuse


@pytest.fixture
def poisoned_memory():
    """Uninitialised memory is NaN: what a kernel does not write, a comparison finds."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture(params=ISAS)
def isa(request):
    """Each instruction set of this machine in turn."""
    before = trifuse._native.cpu_isa()
    trifuse._native.set_cpu_isa(request.param)
    yield request.param
    trifuse._native.set_cpu_isa(before)


@pytest.fixture
def threads():
    """Sets the number of threads, which is as before afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def pytest_collection_modifyitems(items):
    """GPU tests need a GPU; each says so where there is none."""
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
