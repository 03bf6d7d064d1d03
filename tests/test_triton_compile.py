"""The Triton kernels compile for every GPU generation, within a committed budget and without spills.

No GPU is needed: triton brings its assemblers. After a change that is meant to cost registers or shared
memory, regenerate the budget with ``python tests/triton_configurations.py --write`` and commit it.
"""

import json
import os
from concurrent.futures import ThreadPoolExecutor

import pytest

pytest.importorskip("triton", reason="the package triton is not installed")

from triton_configurations import BUDGETS, TARGETS, measured_elsewhere, series


@pytest.fixture(scope="module")
def measuring(tmp_path_factory):
    """The figures of every target, on their way: each target is compiled by one process on one core."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield {target: pool.submit(measured_elsewhere, target, tmp_path_factory.mktemp(target)) for target in TARGETS}


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_kernels_compile_within_their_budget(target, measuring):
    budgets = json.loads(BUDGETS.read_text())
    found = measuring[target].result()
    assert found.keys() == budgets[target].keys()
    if series() != budgets["triton"]:
        pytest.skip(f"compiled; the budget was measured with triton {budgets['triton']}, and this is {series()}")
    for name, figures in found.items():
        assert figures["spilled"] == 0, f"{name} spills {figures['spilled']} bytes"
        for figure, limit in budgets[target][name].items():
            assert figures[figure] <= limit, f"{name} takes {figures[figure]} {figure}, its budget is {limit}"
