"""Compile gate of the CUDA kernels, without a GPU: every kernel of the library, for every architecture it was built
for, spills nothing and stays within the committed budget of registers and shared memory.

After a change that is worth more registers: ``python tests/test_cuda_compile.py`` writes
tests/budgets/cuda.json anew; commit it with the change. Registers are budgeted in eights, as the
hardware hands them out, so that another release of nvcc does not fail for a register or two.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import trifuse

BUDGETS = Path(__file__).parent / "budgets" / "cuda.json"
LIBRARY = Path(trifuse.__file__).parent / "lib" / "libtrifuse_cuda.so"
ARCHITECTURE = re.compile(r"^arch = (sm_\d+)", re.MULTILINE)
KERNEL = re.compile(r"Function (\w+):\s+REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)")


def find_nvcc():
    return os.environ.get("CUDACXX") or shutil.which("nvcc")


def find_cuobjdump():
    """The tool that reads what is built: CUDA's, or the one that comes with triton."""
    beside = Path(find_nvcc() or "").resolve().parent / "cuobjdump"
    if beside.exists() or shutil.which("cuobjdump"):
        return beside if beside.exists() else shutil.which("cuobjdump")
    triton = pytest.importorskip("triton", reason="there is no cuobjdump, and no triton, which brings one")
    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


def demangled(names):
    done = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True)
    short = (
        re.sub(r"trifuse::(cuda::)?|\(anonymous namespace\)::|^void ", "", name) for name in done.stdout.split("\n")
    )
    return [re.sub(r"\([^()]*\)$", "", name) for name in short]  # template arguments have parentheses too


def measure():
    """{architecture: {kernel: facts}} of the library that is built."""
    done = subprocess.run([find_cuobjdump(), "--dump-resource-usage", LIBRARY], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    found = {}
    pieces = ARCHITECTURE.split(done.stdout)
    for architecture, piece in zip(pieces[1::2], pieces[2::2], strict=True):
        kernels = KERNEL.findall(piece)
        if not kernels:  # an architecture's source form
            continue
        facts = [{"registers": int(r), "stack": int(stack), "local": int(local)} for _, r, stack, local in kernels]
        found.setdefault(architecture, {}).update(zip(demangled([name for name, *_ in kernels]), facts, strict=True))
    return found


def rounded(registers):
    return min((registers + 7) // 8 * 8, 255)


@pytest.fixture(scope="module")
def measured():
    if not LIBRARY.exists() and find_nvcc() is None:
        pytest.skip("there is no CUDA library: nvcc is not on the PATH, and CUDACXX is not set")
    found = measure()
    assert found
    return found


@pytest.fixture(scope="module")
def budgets():
    return json.loads(BUDGETS.read_text())


def test_every_kernel_has_a_budget(measured, budgets):
    for architecture, kernels in measured.items():
        assert sorted(kernels) == sorted(budgets["registers"][architecture]), architecture


def test_nothing_spills(measured):
    for architecture, kernels in measured.items():
        for name, facts in kernels.items():
            # What is spilled lies on the stack, and the kernels keep nothing else there.
            assert (facts["stack"], facts["local"]) == (0, 0), f"{name} for {architecture}: {facts}"


def test_registers_stay_within_the_budget(measured, budgets):
    for architecture, kernels in measured.items():
        for name, facts in kernels.items():
            budget = budgets["registers"][architecture][name]
            assert facts["registers"] <= budget, f"{name} for {architecture}: {facts['registers']}, budget {budget}"


def shared_bytes():
    """Dynamic shared memory of a block, which ptxas does not see: the host compiler's sizeof."""
    from emulated_cuda import load

    library = load()
    return {
        f"{('scan_fwd_kernel', 'scan_bwd_kernel')[backward]}<{dtype}, {states}>": library.trifuse_shared_bytes(
            backward, dtype.encode(), states
        )
        for backward in (0, 1)
        for dtype in ("float32", "bfloat16")
        for states in (1, 4)
    }


def test_shared_memory_stays_within_the_budget(budgets):
    for name, size in shared_bytes().items():
        assert 0 < size <= budgets["shared_bytes"][name], name


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    registers = {
        architecture: {name: rounded(facts["registers"]) for name, facts in sorted(kernels.items())}
        for architecture, kernels in measure().items()
    }
    BUDGETS.write_text(json.dumps({"registers": registers, "shared_bytes": shared_bytes()}, indent=1) + "\n")
