"""Compiles the Triton kernels for a GPU that need not be there, and reports what each one takes.

    python tests/triton_configurations.py TARGET        print the figures as JSON (TARGET: sm_90, gfx942, ...)
    python tests/triton_configurations.py --write       measure every target and rewrite tests/budgets/triton.json
    python tests/triton_configurations.py --raise       the same, but never lowering a budget

The launchers run on meta tensors, so that block sizes, flags and the specialization of every argument are
those of a real call; only the launch itself is replaced by a compilation. Needs triton and nothing else: it
brings its own ptxas and cuobjdump.
"""

import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

BUDGETS = Path(__file__).parent / "budgets" / "triton.json"
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
MAX_REGISTERS = {"gfx942": 512}  # of a thread; elsewhere 255


class Driver:
    """What triton asks of a driver before it compiles."""

    def __init__(self, target):
        self.target = target

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return 0

    def get_current_stream(self, device=None):
        return 0


def gpu(target):
    from triton.backends.compiler import GPUTarget

    return GPUTarget("cuda", int(target[3:]), 32) if target.startswith("sm_") else GPUTarget("hip", target, 64)


def configurations(target):
    """(name, call) of everything compiled for a target: what each tests/triton_<op>.py lists, under the op's name."""
    for path in sorted(Path(__file__).parent.glob("triton_*.py")):
        if path != Path(__file__):
            op = path.stem.removeprefix("triton_")
            for name, call in importlib.import_module(path.stem).configurations(target):
                yield f"{op} {name}", call


def cuda_figures(compiled):
    import triton.backends.nvidia

    tool = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True)
    found = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", usage.stdout + usage.stderr))
    spilled = int(found["STACK"]) + int(found["LOCAL"])  # the kernels have no arrays: all stack is spills
    return {"registers": int(found["REG"]), "spilled": spilled, "shared": compiled.metadata.shared}


def hip_figures(compiled):
    found = dict(re.findall(r"\.(vgpr_count|vgpr_spill_count|sgpr_spill_count):\s+(\d+)", compiled.asm["amdgcn"]))
    return {
        "registers": int(found["vgpr_count"]),
        "spilled": int(found["vgpr_spill_count"]),  # scalar ones go to vector registers, which are counted
        "shared": compiled.metadata.shared,
    }


def measure(target):
    import triton

    from trifuse.triton_kernels import common

    triton.runtime.driver.set_active(Driver(gpu(target)))
    results, launched = {}, []

    def compile_only(kernel, grid, *args, **meta):
        compiled = kernel.warmup(*args, grid=grid, **common.OPTIONS, **meta)
        figures = cuda_figures(compiled) if target.startswith("sm_") else hip_figures(compiled)
        launched.append((kernel.fn.__name__.strip("_"), figures))

    common.launch = compile_only
    for name, call in configurations(target):
        launched.clear()
        call()
        for place, (kernel, figures) in enumerate(launched, start=1):
            results[name if len(launched) == 1 else f"{name}, {place} {kernel}"] = figures
    return results


def measured_elsewhere(target, cache):
    """The figures of a target, from a process of its own in which nothing is interpreted."""
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    env["TRITON_CACHE_DIR"] = str(cache)
    done = subprocess.run([sys.executable, __file__, target], env=env, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"compiling for {target} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def budget(figures, old, most):
    """Room of one allocation step above what was measured, so that compilers of one series agree."""
    registers = min(-(-figures["registers"] // 8) * 8 + 8, most)
    return {
        "registers": max(registers, old.get("registers", 0)),
        "shared": max(figures["shared"], old.get("shared", 0)),
    }


def series():
    """The triton a budget holds for: another one's compiler allocates otherwise."""
    import triton

    return ".".join(triton.__version__.split(".")[:2])


def write(keep):
    old = json.loads(BUDGETS.read_text()) if keep and BUDGETS.exists() else {}
    budgets = {}
    with tempfile.TemporaryDirectory() as cache:
        for target in TARGETS:
            before = old.get(target, {})
            found = measured_elsewhere(target, cache)
            most = MAX_REGISTERS.get(target, 255)
            budgets[target] = {name: budget(figures, before.get(name, {}), most) for name, figures in found.items()}
            spilled = {name: figures["spilled"] for name, figures in found.items() if figures["spilled"]}
            print(target, len(found), "kernels", f"SPILLED: {spilled}" if spilled else "no spills")
    BUDGETS.parent.mkdir(exist_ok=True)
    lines = [f'  "triton": {json.dumps(series())}']
    lines += [
        f"  {json.dumps(target)}: {{\n"
        + ",\n".join(f"    {json.dumps(name)}: {json.dumps(limit)}" for name, limit in kernels.items())
        + "\n  }"
        for target, kernels in budgets.items()
    ]
    BUDGETS.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    if sys.argv[1] in ("--write", "--raise"):
        write(keep=sys.argv[1] == "--raise")
    else:
        print(json.dumps(measure(sys.argv[1])))
