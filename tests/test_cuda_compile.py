"""Compile gate of the CUDA kernels, without a GPU: every kernel for every shipped architecture spills
nothing and stays within the committed budget of registers and shared memory.

After a change that is worth more registers: ``python tests/test_cuda_compile.py`` writes
tests/budgets/cuda.json anew; commit it with the change. Registers are budgeted in eights, as the
hardware hands them out, so that another release of nvcc does not fail for a register or two.
"""

import concurrent.futures
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BUDGETS = Path(__file__).parent / "budgets" / "cuda.json"
ARCHITECTURES = (80, 90, 100)
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
KERNEL = re.compile(r"Compiling entry function '(\w+)' for 'sm_(\d+)'")
SPILLS = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
REGISTERS = re.compile(r"Used (\d+) registers")


def find_nvcc():
    return os.environ.get("CUDACXX") or shutil.which("nvcc")


def compile_one(source, architecture, folder):
    """ptxas' report of one source for one architecture."""
    code = f"-gencode=arch=compute_{architecture},code=sm_{architecture}"
    out = Path(folder) / f"{source.stem}.{architecture}.o"
    command = [find_nvcc(), "-std=c++17", "-O3", "-I", ROOT / "csrc" / "include", code, "-Xptxas", "-v", "-c", source]
    done = subprocess.run([*command, "-o", out], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{source.name} for sm_{architecture}:\n{done.stderr[-4000:]}"
    return done.stderr


def demangled(names):
    done = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True)
    short = (
        re.sub(r"trifuse::(cuda::)?|\(anonymous namespace\)::|^void ", "", name) for name in done.stdout.split("\n")
    )
    return [re.sub(r"\([^()]*\)$", "", name) for name in short]  # template arguments have parentheses too


def parse(report):
    """{kernel: {registers, spilled bytes, stack}} of one compilation."""
    kernels, current = {}, None
    for line in report.splitlines():
        if match := KERNEL.search(line):
            current = kernels.setdefault(match[1], {})
        elif match := SPILLS.search(line):
            current["stack"] = int(match[1])
            current["spills"] = int(match[2]) + int(match[3])
        elif match := REGISTERS.search(line):
            current["registers"] = int(match[1])
    return dict(zip(demangled(kernels), kernels.values(), strict=True))


def measure():
    """{architecture: {kernel: facts}} of everything in csrc/cuda."""
    found = {f"sm_{a}": {} for a in ARCHITECTURES}
    jobs = [(source, a) for a in ARCHITECTURES for source in SOURCES]
    with tempfile.TemporaryDirectory() as folder, concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        reports = pool.map(lambda job: compile_one(*job, folder), jobs)
        for (_, architecture), report in zip(jobs, reports, strict=True):
            found[f"sm_{architecture}"] |= parse(report)
    return found


def rounded(registers):
    return min((registers + 7) // 8 * 8, 255)


@pytest.fixture(scope="module")
def measured():
    if find_nvcc() is None:
        pytest.skip("nvcc is not on the PATH, and CUDACXX is not set")
    return measure()


@pytest.fixture(scope="module")
def budgets():
    return json.loads(BUDGETS.read_text())


def test_every_kernel_has_a_budget(measured, budgets):
    for architecture, kernels in measured.items():
        assert sorted(kernels) == sorted(budgets["registers"][architecture]), architecture


def test_nothing_spills(measured):
    for architecture, kernels in measured.items():
        for name, facts in kernels.items():
            assert (facts["spills"], facts["stack"]) == (0, 0), f"{name} for {architecture}: {facts}"


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
