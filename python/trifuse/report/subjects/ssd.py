"""``ssd``, the scan of Mamba-2, in the report."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

import trifuse
from trifuse.report import headlines
from trifuse.report.contenders import Contender, Floor, backend_contenders, named
from trifuse.report.inputs import Axes, Draw, Inputs
from trifuse.report.subject import OpSubject, Rows
from trifuse.report.workloads import FWD, FWD_BWD, Entry, Workload, sizes

__all__ = ["SSD"]

_CHUNK = 256  # what published Mamba-2 configurations use; for the rivals
_FLOOR_CHUNK = 64  # the fewest operations among sizes at which a product still fills a core
_MOST = 200e6  # bytes the short case may take beyond its inputs
_ALL = ("reference", "transformers", "selective-scan", "mamba_ssm")
SHORT = "ssd-short"


class SSD(OpSubject):
    op = "ssd"
    axes = Axes(
        {"x": "BLHP", "dt": "BLH", "A": "H", "B": "BLGN", "C": "BLGN", "D": "H", "dt_bias": "H", "out": "BLHP",
         "dout": "BLHP"},
        weights=("A", "D", "dt_bias"), has_layouts=False,
    )  # fmt: skip
    probed, probes = "H", 4
    small = sizes(B=2, L=131, H=4, P=32, N=32)
    longest = (4096, 256)  # the recurrence keeps a state per step for its backward pass
    explained = sizes(B=1, L=4096, H=24, P=64, G=1, N=128)
    measure = "matmul-floor"
    measure_text = "its matrix products alone"

    def __init__(self) -> None:
        reference = {"dtypes": ("float32",), "limit": {FWD: 4096, FWD_BWD: 256}, "cannot": _reference_cannot}
        self.contenders = backend_contenders(self.ours, self.refusals, **reference) | RIVALS
        self.floors = named(Floor(self.measure, "floor: its matrix products alone", products))

    def quick(self) -> tuple[Workload, ...]:
        main = Workload(
            "ssd-130m", "one layer of Mamba-2 130M, 4096 tokens", self.op, self.explained,
            dtypes=("float32", "bfloat16"), rivals=((FWD, _ALL), (FWD_BWD, _ALL)), rank=0,
        )  # fmt: skip
        short = Workload(
            SHORT, "many short sequences with a large state", self.op, sizes(B=512, L=3, H=8, P=64, G=1, N=1024),
            directions=(FWD_BWD,), rivals=((FWD_BWD, ("reference", "transformers")),), rank=2,
        )  # fmt: skip
        return main, short

    def full(self) -> tuple[Workload, ...]:
        main, short = self.quick()
        more = [
            replace(main.sized(L=length), name=f"ssd-{length}", title=f"Mamba-2 130M's layer, {length} tokens", rank=4)
            for length in (256, 1024, 16384)
        ]
        large = main.sized(L=2048, H=80)
        return main, short, *more, replace(large, name="ssd-2.8b", title="one layer of Mamba-2 2.7B", rank=5)

    def for_cuda(self, workload: Workload) -> Workload:
        return workload if workload.name == SHORT else workload.sized(B=8)

    def values(self, workload: Workload, draw: Draw) -> dict[str, Tensor]:
        """What a Mamba-2 block starts training with: A between -1 and -16, dt between 0.001 and 0.1."""
        B, L, H, P, G, N = (workload[axis] for axis in "BLHPGN")
        return {
            "x": draw.normal(B, L, H, P),
            "dt": draw.normal(B, L, H).mul_(0.5),
            "A": -(draw.uniform(H) * 15 + 1),
            "B": draw.normal(B, L, G, N),
            "C": draw.normal(B, L, G, N),
            "D": torch.ones(H, device=draw.device),
            "dt_bias": draw.step_bias(H),
            "dout": draw.normal(B, L, H, P),
        }

    def arguments(self, inputs: Inputs) -> tuple[list, dict]:
        named = {"D": inputs["D"], "dt_bias": inputs["dt_bias"], "dt_softplus": True}
        return [inputs[name] for name in ("x", "dt", "A", "B", "C")], named

    def probe(self, workload: Workload) -> tuple[str, int]:
        # A few heads of a long sequence, a few of many short sequences.
        return ("B", 8) if workload["B"] > workload["H"] else (self.probed, self.probes)

    def need_bytes(self, entry: Entry) -> int:
        # Rivals hold states of every chunk, expanded to heads, several times over.
        workload, several = entry.workload, 4 * 8
        chunks = -(-workload["L"] // _CHUNK)
        states = workload.count("BHPN") * chunks * several if entry.contender == "transformers" else 0
        return super().need_bytes(entry) + states

    def headlines(self, rows: Rows, device: str) -> list[dict]:
        out = []
        for direction in (FWD, FWD_BWD):
            found = rows.get(f"ssd-130m {direction}", [])
            row = headlines.pick(found)
            if row is not None:
                asked = {"transformers": {FWD: 3, FWD_BWD: 4}[direction]} if device == "cpu" else None
                out += headlines.against(found, row, f"ssd {direction}", where="ssd-130m", asked=asked)
                if "floor_ratio" in row:
                    value, detail = f"{row['floor_ratio']:.2f} x", f"{row['title']} / {row['floor_note']}"
                    out.append(headlines.line(f"ssd {direction} over its matrix products", value, detail))
                half = headlines.pick(found, dtype="bfloat16")
                if half is not None:
                    ratio = headlines.median(half) / headlines.median(row)
                    out.append(headlines.line(f"ssd {direction}, bfloat16 / float32", f"{ratio:.2f} x",
                                              f"time of {row['title']} in bfloat16 / in float32"))  # fmt: skip
        found = rows.get(f"{SHORT} {FWD_BWD}", [])
        row = headlines.pick(found)
        if row is not None:
            out += headlines.against(found, row, "ssd, 512 sequences of 3 tokens, fwd+bwd", where=SHORT)
            if row.get("peak_extra_bytes") is not None:
                detail = f"peak ({row['memory_method']}) beyond the inputs"
                out.append(headlines.line("ssd, 512 sequences of 3 tokens, fwd+bwd, extra memory",
                                          f"{row['peak_extra_bytes'] / 1e6:.0f} MB", detail,
                                          f"at most {_MOST / 1e6:.0f} MB"))  # fmt: skip
        return out


def products(workload: Workload, inputs: Inputs, direction: str) -> tuple[Callable[[], object], str]:
    """The matrix products of the chunked form by torch.matmul, on data that is already in place.

    Per chunk: C Bᵀ per group, the weights by x per head, and, where there is more than one chunk, the
    states B ᵀx and their outputs C h, each one product for all heads of a group. A backward pass has two
    products for each of these.
    """
    B, L, H, P, G, N = (workload[axis] for axis in "BLHPGN")
    chunk = min(L, _FLOOR_CHUNK)
    count, heads = B * (L // chunk), H // G
    like = {"dtype": inputs["x"].dtype, "device": inputs["x"].device}
    rows, columns = torch.randn(count, G, chunk, N, **like), torch.randn(count, G, N, chunk, **like)
    weights, x = torch.randn(count, H, chunk, chunk, **like), torch.randn(count, H, chunk, P, **like)
    wide, states = torch.randn(count, G, chunk, heads * P, **like), torch.randn(count, G, N, heads * P, **like)
    times = 3 if direction == FWD_BWD else 1

    def call() -> None:
        for _ in range(times):
            torch.matmul(rows, columns)
            torch.matmul(weights, x)
            if chunk < L:
                torch.matmul(columns, wide)
                torch.matmul(rows, states)

    note = f"torch.matmul of the products of {count} chunks of {chunk} steps" + (", three times" if times == 3 else "")
    return call, note


@functools.cache
def transformers_missing(device: str) -> str | None:
    try:
        module = importlib.import_module("transformers.models.mamba2.modeling_mamba2")
    except Exception as error:  # a half-installed transformers fails in many ways at import
        return f"transformers' Mamba-2 could not be imported: {error}"
    if not hasattr(module, "mamba2_chunk_scan"):
        return "this version of transformers has no chunk scan function of its own (mamba2_chunk_scan)"
    return None


def transformers(inputs: Inputs) -> Tensor:
    """transformers' chunk scan in torch; a short sequence is given a chunk of its own length."""
    module = importlib.import_module("transformers.models.mamba2.modeling_mamba2")
    names = ("x", "dt", "A", "B", "C")
    chunk = min(_CHUNK, inputs["x"].shape[1])
    return module.mamba2_chunk_scan(
        *(inputs[name] for name in names), chunk, D=inputs["D"], dt_bias=inputs["dt_bias"], dt_softplus=True
    )


def expanded(inputs: Inputs) -> Tensor:
    """The same function as a selective scan of H x P channels, its arguments repeated."""
    x, B = inputs["x"], inputs["B"]
    heads, headdim, state = *x.shape[2:], B.shape[3]
    A = inputs["A"].repeat_interleave(headdim)[:, None].expand(-1, state).contiguous()
    dt = inputs["dt"].repeat_interleave(headdim, dim=2)
    out = trifuse.selective_scan(
        x.flatten(2), dt, A, B, inputs["C"], inputs["D"].repeat_interleave(headdim), None,
        inputs["dt_bias"].repeat_interleave(headdim), True, layout="bld",
    )  # fmt: skip
    return out.unflatten(2, (heads, headdim))


def _reference_cannot(entry: Entry) -> str | None:
    if entry.workload.name == SHORT:
        return "the recurrence holds a state of a gigabyte per step here, several times over"
    return None


@functools.cache
def published_missing(device: str) -> str | None:
    try:
        importlib.import_module("mamba_ssm.ops.triton.ssd_combined")
    except Exception as error:
        return f"mamba_ssm's Triton kernels are neither installed nor in .rivals/: {error}"
    return None


def published(inputs: Inputs) -> Tensor:
    function = importlib.import_module("mamba_ssm.ops.triton.ssd_combined").mamba_chunk_scan_combined
    names = ("x", "dt", "A", "B", "C")
    return function(
        *(inputs[name] for name in names), _CHUNK, D=inputs["D"], dt_bias=inputs["dt_bias"], dt_softplus=True
    )


RIVALS = named(
    Contender("transformers", "transformers: its own torch path", "rival", transformers, transformers_missing,
              dtypes=("float32",)),
    Contender("selective-scan", "trifuse.selective_scan, expanded", "rival", expanded, dtypes=("float32",)),
    Contender("mamba_ssm", "mamba_ssm: published Triton kernels", "rival", published, published_missing,
              devices=("cuda",)),
)  # fmt: skip
