"""Fixtures of the whole suite."""

import pytest
import torch


@pytest.fixture
def poisoned_memory():
    """Uninitialised memory is NaN: what a kernel does not write, a comparison finds."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(before)


def pytest_collection_modifyitems(items):
    """GPU tests need a GPU; each says so where there is none."""
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
