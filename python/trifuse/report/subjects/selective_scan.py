"""``selective_scan`` in the report."""

from __future__ import annotations

import functools
import importlib
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from trifuse.report import headlines
from trifuse.report.contenders import AVX2, Contender, Floor, backend_contenders, importable, named
from trifuse.report.floors import COPY, EXP_FLOOR, computed_gpu_exp_floor, exp_floor
from trifuse.report.inputs import Axes, Draw, Inputs
from trifuse.report.subject import OpSubject, Rows
from trifuse.report.workloads import FWD, FWD_BWD, Workload, sizes

__all__ = ["SelectiveScan"]

_MODELS = {"130m": 1536, "370m": 2048, "1.4b": 4096, "2.8b": 5120}
_BOTH = ("float32", "bfloat16")
_ALL = ("reference", "loop-compiled", "mambapy", "transformers", "mamba_ssm")


def _work(name: str, title: str, L: int = 2048, D: int = 1536, **settings: object) -> Workload:
    settings = {"layouts": ("bld",), **settings}
    return Workload(name, title, "selective_scan", sizes(B=1, D=D, L=L, N=16), **settings)


# Rivals the quick report can afford at full length: the faster ones, and each slow one somewhere.
_QUICK = (
    _work("mamba-130m", "one layer of Mamba 130M, 2048 tokens", dtypes=_BOTH, layouts=("bld", "bdl"), rank=0,
          rivals=((FWD, _ALL), (FWD_BWD, ("mambapy", "loop-compiled", "mamba_ssm")))),
    _work("mamba-130m-short", "the same at 128 tokens, where every rival can train", L=128, rank=2,
          directions=(FWD_BWD,), rivals=((FWD_BWD, ("reference", "mambapy", "transformers")),)),
    _work("long-64k", "Mamba 130M's layer, 65536 tokens", L=65536, rank=3,
          rivals=((FWD, ("mamba_ssm",)), (FWD_BWD, ("mamba_ssm",)))),
    *(
        _work(f"length-{length}", f"Mamba 130M's layer, {length} tokens", L=length, rank=4,
              rivals=tuple((way, ("mambapy", "mamba_ssm") if length <= 1024 else ("mamba_ssm",))
                           for way in (FWD, FWD_BWD)))
        for length in (256, 1024, 8192)
    ),
    *(
        _work(f"mamba-{name}", f"one layer of Mamba {name.upper()}, 2048 tokens", D=_MODELS[name], dtypes=_BOTH, rank=5,
              rivals=((FWD, ("reference", "mamba_ssm")), (FWD_BWD, ("mamba_ssm",))))
        for name in ("370m", "1.4b", "2.8b")
    ),
    replace(
        _work("smoke", "smallest case, for tests", L=40, D=32, layouts=("bld", "bdl"), on_request=True,
              rivals=((FWD, ("reference",)), (FWD_BWD, ("reference",)))),
        sizes=sizes(B=1, D=32, L=40, N=4),
    ),
)  # fmt: skip


def _exponentials(workload: Workload) -> int:
    """exp(dt * A) of the recurrence: what no forward scan can do without."""
    return workload.count("BDLN")


class SelectiveScan(OpSubject):
    op = "selective_scan"
    axes = Axes(
        {"u": "BLD", "delta": "BLD", "A": "DN", "B": "BLN", "C": "BLN", "D": "D", "z": "BLD", "delta_bias": "D",
         "out": "BLD", "dout": "BLD"},
        weights=("A", "D", "delta_bias"),
    )  # fmt: skip
    small = sizes(B=2, D=72, L=131)
    longest = (65536, 2048)  # the reference's backward pass is quadratic
    explained = sizes(B=1, D=1536, L=2048, N=16)
    complex_arguments = ("A",)
    floors = named(
        Floor(EXP_FLOOR, "floor: the exponentials alone",
              lambda workload, inputs, direction: exp_floor(_exponentials(workload)),
              dtypes=("float32",), devices=("cpu",)),
        COPY,
    )  # fmt: skip
    measure = EXP_FLOOR
    measure_text = "the exponentials alone"

    def __init__(self) -> None:
        kernels = backend_contenders(
            self.ours, self.refusals, avx2_in=("mamba-130m", "smoke"), layouts=("bdl",), dtypes=("float32",),
            limit={FWD: 8192, FWD_BWD: 256},
        )  # fmt: skip
        self.contenders = kernels | RIVALS

    def quick(self) -> tuple[Workload, ...]:
        return _QUICK

    def full(self) -> tuple[Workload, ...]:
        """Every model shape x dtype x layout with every rival that can run it."""
        out = []
        for one in _QUICK:
            if not one.on_request and one.name != "mamba-130m-short":
                rivals = ((FWD, _ALL), (FWD_BWD, _ALL)) if one["L"] <= 8192 else one.rivals
                one = replace(one, dtypes=(*_BOTH, "float16"), layouts=("bld", "bdl"), rivals=rivals)
            out.append(one)
            if one.name == "mamba-130m":
                out.append(replace(one.sized(B=8), name="mamba-130m-b8", title=one.title + ", batch 8"))
        return tuple(out)

    def for_cuda(self, workload: Workload) -> Workload:
        """A GPU is filled by a batch; its headline is the shape published kernels are compared at."""
        if workload.on_request:
            return workload
        if workload["L"] <= 2048:
            workload = replace(workload.sized(B=8), title=workload.title.removesuffix(", batch 8") + ", batch 8")
        if workload.name == "mamba-370m":
            return replace(workload, dtypes=_BOTH, layouts=("bdl", "bld"), rank=-1)
        return workload

    def values(self, workload: Workload, draw: Draw) -> dict[str, Tensor]:
        """What a Mamba block starts training with: dt between 0.001 and 0.1, A = -(1..N), D = 1, the rest normal."""
        B, D, L, N = (workload[axis] for axis in "BDLN")
        device = draw.device
        return {
            "u": draw.normal(B, L, D),
            "delta": draw.normal(B, L, D).mul_(0.5),
            "A": -torch.arange(1.0, N + 1, device=device).repeat(D, 1),
            "B": draw.normal(B, L, N),
            "C": draw.normal(B, L, N),
            "D": torch.ones(D, device=device),
            "z": draw.normal(B, L, D),
            "delta_bias": draw.step_bias(D),
            "dout": draw.normal(B, L, D),
        }

    def arguments(self, inputs: Inputs) -> tuple[list, dict]:
        names = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")
        return [*(inputs[name] for name in names), True], {"layout": inputs.layout}

    def facts(self, workload: Workload, device: str) -> dict:
        if device != "cuda":
            return {}
        seconds, note = computed_gpu_exp_floor(_exponentials(workload))
        return {"floor_computed": seconds, "floor_computed_note": note}

    def headlines(self, rows: Rows, device: str) -> list[dict]:
        name = "mamba-130m" if device == "cpu" else "mamba-370m"
        out = []
        for direction in (FWD, FWD_BWD):
            found = rows.get(f"{name} {direction}", [])
            for layout in ("bld", "bdl"):
                row = headlines.pick(found, layout=layout)
                if row is None:
                    continue
                label = f"selective scan {direction}, {layout},"
                out += headlines.against(found, row, label, where=name)
                older = next((one for one in found if (one["contender"], one["layout"]) == (AVX2, layout)), None)
                if older is not None:
                    out += headlines.against(found, older, f"{label} AVX2 build", ("reference", "mambapy"), name)
                if direction == FWD and "floor_ratio" in row:
                    out.append(headlines.line(f"{label} over the exponential floor", f"{row['floor_ratio']:.2f} x",
                                              f"{row['title']} / {row['floor_note']}"))  # fmt: skip
                half = headlines.pick(found, dtype="bfloat16", layout=layout)
                if half is not None:
                    ratio = headlines.median(half) / headlines.median(row)
                    out.append(headlines.line(f"{label} bfloat16 / float32", f"{ratio:.2f} x",
                                              f"time of {row['title']} in bfloat16 / in float32"))  # fmt: skip
        long = headlines.pick(rows.get(f"long-64k {FWD_BWD}", []), layout="bld")
        if long is not None and "memory_ratio" in long:
            detail = f"peak extra memory ({long['memory_method']}) / (inputs + output + gradients)"
            out.append(headlines.line("selective scan fwd+bwd, 65536 tokens, peak extra memory",
                                      f"{long['memory_ratio']:.2f} x", detail))  # fmt: skip
        return out


def _step(state: Tensor, dt: Tensor, x: Tensor, A: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
    state = torch.exp(dt[..., None] * A) * state + (dt * x)[..., None] * B[:, None, :]
    return state, (state * C[:, None, :]).sum(-1)


@functools.cache
def _compiled_step():
    # One version per shape and gradient mode; at torch's own limit it would fall back to eager.
    torch._dynamo.config.recompile_limit = 256
    return torch.compile(_step, dynamic=False)


def loop_compiled(inputs: Inputs) -> Tensor:
    """The reference's time loop with its body fused by torch.compile, in "bld".

    The whole loop cannot be compiled: 2048 unrolled steps take the compiler longer than any run. The
    sequences are unbound once, which spares autograd the full-size gradient per step that indexing
    costs the reference.
    """
    step = _compiled_step()
    u, A = inputs["u"], inputs["A"]
    dt = F.softplus(inputs["delta"] + inputs["delta_bias"])
    state = torch.zeros(u.shape[0], u.shape[2], A.shape[1], device=u.device)
    ys = []
    steps = (tensor.unbind(1) for tensor in (dt, u, inputs["B"], inputs["C"]))
    for d, x, b, c in zip(*steps, strict=True):
        state, y = step(state, d, x, A, b, c)
        ys.append(y)
    return (torch.stack(ys, 1) + inputs["D"] * u) * F.silu(inputs["z"])


def mambapy(inputs: Inputs) -> Tensor:
    """mambapy's ``MambaBlock.selective_scan`` (which does not use its block) with its gate after it."""
    block = importlib.import_module("mambapy.mamba").MambaBlock
    dt = F.softplus(inputs["delta"] + inputs["delta_bias"])
    y = block.selective_scan(None, inputs["u"], dt, *(inputs[name] for name in "ABCD"))
    return y * F.silu(inputs["z"])


@functools.cache
def transformers_missing(device: str) -> str | None:
    try:
        module = importlib.import_module("transformers.models.mamba.modeling_mamba")
    except Exception as error:  # a half-installed transformers fails in many ways at import
        return f"transformers' Mamba could not be imported: {error}"
    if not hasattr(module, "mamba_selective_scan"):
        return "this version of transformers has no scan function of its own (mamba_selective_scan)"
    return None


def transformers(inputs: Inputs) -> Tensor:
    module = importlib.import_module("transformers.models.mamba.modeling_mamba")
    return module.mamba_selective_scan(
        *(inputs[name] for name in ("u", "delta", "A", "B", "C")), D=inputs["D"], z=inputs["z"],
        delta_bias=inputs["delta_bias"], delta_softplus=True,
    )  # fmt: skip


class _PublishedScan(torch.autograd.Function):
    """``selective_scan_cuda`` without the Python package around it, which imports much else."""

    @staticmethod
    def forward(ctx, u, delta, A, B, C, D, z, delta_bias):
        kernels = importlib.import_module("selective_scan_cuda")
        B, C = B.unsqueeze(1), C.unsqueeze(1)
        out, states, gated = kernels.fwd(u, delta, A, B, C, D, z, delta_bias, True)
        ctx.save_for_backward(u, delta, A, B, C, D, z, delta_bias, states, out)
        return gated

    @staticmethod
    def backward(ctx, dout):
        kernels = importlib.import_module("selective_scan_cuda")
        u, delta, A, B, C, D, z, delta_bias, states, out = ctx.saved_tensors
        du, ddelta, dA, dB, dC, dD, ddelta_bias, dz = kernels.bwd(
            u, delta, A, B, C, D, z, delta_bias, dout.contiguous(), states, out, None, True, False
        )
        return du, ddelta, dA, dB.squeeze(1), dC.squeeze(1), dD, dz, ddelta_bias


@functools.cache
def mamba_ssm_missing(device: str) -> str | None:
    try:
        importlib.import_module("selective_scan_cuda")
    except Exception as error:
        return f"mamba_ssm's compiled scan is neither installed nor in .rivals/: {error}"
    return None


def mamba_ssm(inputs: Inputs) -> Tensor:
    names = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")
    return _PublishedScan.apply(*(inputs[name] for name in names))


RIVALS = named(
    Contender(
        "loop-compiled", "time loop, its body under torch.compile", "rival", loop_compiled,
        limit={FWD: 8192, FWD_BWD: 8192}, layouts=("bld",), dtypes=("float32",), devices=("cpu",),
        checked=("full",),  # every new shape costs it half a minute of compilation
        compiles=True,
    ),
    Contender(
        "mambapy", "mambapy: parallel scan", "rival", mambapy, importable("mambapy"),
        limit={FWD: 8192, FWD_BWD: 2048}, layouts=("bld",), dtypes=("float32",),
    ),
    Contender(
        "transformers", "transformers: its own fallback", "rival", transformers, transformers_missing,
        limit={FWD: 8192, FWD_BWD: 128}, layouts=("bdl",), dtypes=("float32",),
    ),
    Contender(
        "mamba_ssm", "mamba_ssm: published CUDA scan", "rival", mamba_ssm, mamba_ssm_missing,
        layouts=("bdl",), devices=("cuda",),
    ),
)  # fmt: skip
