"""Compiles the Triton kernels for a GPU that need not be there, and reports what each one takes.

    python tests/triton_configurations.py TARGET        print the figures as JSON (TARGET: sm_90, gfx942, ...)
    python tests/triton_configurations.py --write       measure every target and rewrite tests/budgets/triton.json
    python tests/triton_configurations.py --raise       the same, but never lowering a budget

The launchers run on meta tensors, so that block sizes, flags and the specialization of every argument are
those of a real call; only the launch itself is replaced by a compilation. Needs triton and nothing else: it
brings its own ptxas and cuobjdump.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

import torch

BUDGETS = Path(__file__).parent / "budgets" / "triton.json"
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
MAX_REGISTERS = 255


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


def scan_arguments(
    dtype, batch=8, dim=2048, seqlen=2048, dstate=16, groups=1, bld=False, bare=False, constant=False, packed=False,
    softplus=True, reverse=False, deterministic=False,
):  # fmt: skip
    """The arguments of the registered forward op, less chunk_size."""
    empty = partial(torch.empty, device="meta")

    def sequence(*channels):
        if bld:
            return empty((batch, seqlen, *channels), dtype=dtype).movedim(1, -1)
        return empty((batch, *channels, seqlen), dtype=dtype)

    def coef():
        return empty((dim, dstate)) if constant else sequence(groups, dstate)

    rows = 5 if packed else batch
    return (
        sequence(dim), sequence(dim), empty((dim, dstate)), coef(), coef(), None if bare else empty(dim),
        None if bare else sequence(dim), None if bare else empty(dim), empty((rows, dim, dstate)) if packed else None,
        empty(6, dtype=torch.int64) if packed else None, softplus, reverse, bld, deterministic,
    )  # fmt: skip


def forward(dtype, save=False, **options):
    from trifuse.triton_kernels.selective_scan import selective_scan_fwd

    from trifuse.registration.selective_scan import CHUNK_SIZE

    selective_scan_fwd(*scan_arguments(dtype, **options), CHUNK_SIZE["triton"] if save else 0)


def backward(dtype, packed=False, **options):
    from trifuse.triton_kernels.selective_scan import selective_scan_bwd

    from trifuse.registration.selective_scan import CHUNK_SIZE

    *tensors, softplus, reverse, bld, deterministic = scan_arguments(dtype, packed=packed, **options)
    u, A, initial_state = tensors[0], tensors[2], tensors[8]
    batch, dim, seqlen = u.shape
    states = A.new_empty((batch, -(-seqlen // CHUNK_SIZE["triton"]), A.shape[1], dim))
    dlast = torch.empty_like(initial_state) if packed else None
    flags = (softplus, reverse, bld, deterministic, CHUNK_SIZE["triton"])
    selective_scan_bwd(torch.empty_like(u), dlast, *tensors, states, *flags)


def update(dtype, heads=1, dstate=16, indices=False):
    from trifuse.triton_kernels.selective_state_update import selective_state_update

    empty = partial(torch.empty, device="meta")
    channels = (heads, 2048 // heads)
    x, weight = empty((8, *channels), dtype=dtype), empty(channels)
    coef = empty((8, 1, dstate), dtype=dtype)
    state, A = empty((8, *channels, dstate)), empty((*channels, dstate))
    rows = empty(8, dtype=torch.int64) if indices else None
    selective_state_update(state, x, x, A, coef, coef, weight, x, weight, True, rows)


def configurations(target):
    """(name, call) of everything compiled for a target: all of it for sm_90, the main ones elsewhere."""
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    everything = target == "sm_90"
    for name, dtype in dtypes.items():
        if name == "float16" and not everything:
            continue
        yield f"fwd {name}", partial(forward, dtype)
        yield f"bwd {name}", partial(backward, dtype)
        yield f"fwd {name} bld", partial(forward, dtype, bld=True)
        yield f"bwd {name} bld", partial(backward, dtype, bld=True)
        yield f"update {name}", partial(update, dtype)
    variants = {
        "packed reverse": {"batch": 1, "packed": True, "reverse": True},
        "few rows, odd length": {"batch": 1, "dim": 1536, "seqlen": 1000},
    }
    if everything:
        variants |= {
            "packed bld": {"batch": 1, "packed": True, "bld": True},
            "reverse": {"reverse": True},
            "bare": {"bare": True, "softplus": False},
            "constant": {"constant": True},
            "groups, short": {"groups": 8, "seqlen": 64, "dstate": 5},
            "one channel a group": {"groups": 64, "dim": 64, "dstate": 4},
        }
    for name, options in variants.items():
        for dtype in ("float32", "bfloat16"):
            yield f"fwd {dtype} {name}", partial(forward, dtypes[dtype], save=True, **options)
            yield f"bwd {dtype} {name}", partial(backward, dtypes[dtype], **options)
    if everything:
        yield "bwd float32 deterministic", partial(backward, torch.float32, deterministic=True)
        yield "bwd bfloat16 deterministic groups", partial(backward, torch.bfloat16, deterministic=True, groups=8)
        yield "update float32 heads", partial(update, torch.float32, heads=32, dstate=128, indices=True)


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
    results = {}

    def compile_only(kernel, grid, *args, **meta):
        compiled = kernel.warmup(*args, grid=grid, **common.OPTIONS, **meta)
        results[name] = cuda_figures(compiled) if target.startswith("sm_") else hip_figures(compiled)

    common.launch = compile_only
    for name, call in configurations(target):  # noqa: B007 (compile_only reads the name)
        call()
    return results


def measured_elsewhere(target, cache):
    """The figures of a target, from a process of its own in which nothing is interpreted."""
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    env["TRITON_CACHE_DIR"] = str(cache)
    done = subprocess.run([sys.executable, __file__, target], env=env, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"compiling for {target} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def budget(figures, old):
    """Room of one allocation step above what was measured, so that compilers of one series agree."""
    registers = min(-(-figures["registers"] // 8) * 8 + 8, MAX_REGISTERS)
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
            budgets[target] = {name: budget(figures, before.get(name, {})) for name, figures in found.items()}
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
