"""``gaussian_attention`` in the report."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from trifuse.report import headlines
from trifuse.report.contenders import Contender, Floor, backend_contenders, named, timed_call
from trifuse.report.inputs import Axes, Draw, Inputs
from trifuse.report.subject import OpSubject, Rows
from trifuse.report.workloads import FWD, FWD_BWD, Entry, Workload, sizes

__all__ = ["GaussianAttention"]

RBF, WINDOW = "rbf-2k", "window-4k"
_LONG = "rbf-16k"
_ASKED = 1.05  # times SDPA without a bias
_ASKED_BYTES = 100e6  # beyond inputs, output and gradients, at 16384 positions
_ASKED_ERROR = 1e-5  # of a window of width 1 in float32
_EAGER = {FWD: 4096, FWD_BWD: 4096}  # positions beyond which an (L, L) tensor is gigabytes


class GaussianAttention(OpSubject):
    op = "gaussian_attention"
    axes = Axes(
        {"q": "BHLE", "k": "BHLE", "v": "BHLE", "gamma": "H", "sigma": "H", "out": "BHLE", "dout": "BHLE"},
        weights=("gamma", "sigma"), has_layouts=False,
    )  # fmt: skip
    # All eight heads: of two, eager PyTorch may get the gradient of gamma right by luck.
    probed, probes = "H", 8
    small = sizes(B=2, H=2, L=131, E=40)
    longest = (4096, 2048)  # the reference holds (L, L) tensors
    explained = sizes(B=2, H=8, L=2048, E=64)
    measure = "sdpa-floor"
    measure_text = "torch's SDPA without a bias"

    def __init__(self) -> None:
        kernels = backend_contenders(self.ours, self.refusals, dtypes=("float32",), limit=_EAGER)
        self.contenders = kernels | RIVALS
        self.floors = named(Floor(self.measure, "floor: SDPA without a bias", sdpa))

    def quick(self) -> tuple[Workload, ...]:
        distance = Workload(
            RBF, "attention by distance, 2048 positions", self.op, self.explained, dtypes=("float32", "bfloat16"),
            rivals=((FWD, ("sdpa-augmented", "sdpa-bias", "cdist", "flex")),
                    (FWD_BWD, ("sdpa-augmented", "sdpa-bias", "cdist"))), rank=0,
        )  # fmt: skip
        window = replace(
            distance, name=WINDOW, title="dot products in Gaussian windows of widths 1 to 64, 4096 positions",
            sizes=sizes(B=1, H=8, L=4096, E=64), dtypes=("float32",),
            rivals=((FWD, ("sdpa-bias", "flex")), (FWD_BWD, ("sdpa-bias",))), rank=1,
        )  # fmt: skip
        return distance, window

    def full(self) -> tuple[Workload, ...]:
        distance, window = self.quick()
        long = replace(distance.sized(B=1, L=16384), name=_LONG, title="attention by distance, 16384 positions",
                       dtypes=("float32",), rank=4)  # fmt: skip
        return distance, window, long

    def for_cuda(self, workload: Workload) -> Workload:
        return workload.sized(B=8)

    def options(self, workload: Workload) -> dict[str, object]:
        return {"window": workload.name == WINDOW}

    def values(self, workload: Workload, draw: Draw) -> dict[str, Tensor]:
        B, H, L, E = (workload[axis] for axis in "BHLE")
        q, k, v, dout = (draw.normal(B, H, L, E) for _ in range(4))
        if self.options(workload)["window"]:
            widths = {"sigma": torch.logspace(0, 6, H, base=2, device=draw.device)}
        else:
            widths = {"gamma": (draw.uniform(H) + 0.5) / (2 * E**0.5)}
        return {"q": q, "k": k, "v": v, **widths, "dout": dout}

    def arguments(self, inputs: Inputs) -> tuple[list, dict]:
        width = "sigma" if inputs.options["window"] else "gamma"
        return [inputs["q"], inputs["k"], inputs["v"]], {width: inputs[width]}

    def need_bytes(self, entry: Entry) -> int:
        several = 8 if entry.contender in ("sdpa-bias", "cdist", "reference") else 0
        positions = min(entry.workload["L"], self.longest[0])
        checked = entry.workload["B"] * self.probes * positions**2 * 8 * 6
        return super().need_bytes(entry) + several * entry.workload.count("BHLL") * 4 + checked

    def headlines(self, rows: Rows, device: str) -> list[dict]:
        out = []
        for workload, what in ((RBF, "attention by distance"), (WINDOW, "attention in windows")):
            for direction in (FWD, FWD_BWD):
                found = rows.get(f"{workload} {direction}", [])
                row = headlines.pick(found)
                if row is None:
                    continue
                if "floor_ratio" in row:
                    goal = f"at most {_ASKED:g} x" if workload == RBF and device == "cpu" else ""
                    out.append(headlines.line(f"{what} {direction} over SDPA", f"{row['floor_ratio']:.2f} x",
                                              f"{row['title']} / {row['floor_note']}", goal))  # fmt: skip
                out += headlines.against(found, row, f"{what} {direction}", where=workload)
        row = headlines.pick(rows.get(f"{_LONG} {FWD_BWD}", []))
        if row is not None and row.get("peak_extra_bytes") is not None:
            # The peak counts what the call returns as well: the output and four gradients.
            detail = f"peak ({row['memory_method']}) beyond the inputs, with {row['bytes'] / 1e6:.0f} MB of tensors"
            out.append(headlines.line("attention by distance, 16384 positions, extra memory",
                                      f"{row['peak_extra_bytes'] / 1e6:.0f} MB", detail,
                                      f"at most {_ASKED_BYTES / 1e6:.0f} MB beyond its results"))  # fmt: skip
        return out


def sdpa(workload: Workload, inputs: Inputs, direction: str) -> tuple[Callable[[], object], str]:
    """torch's fused attention of the same q, k and v: no distances, no windows, no gradient for a width."""
    kept = {name: inputs[name] for name in ("q", "k", "v", "dout")}
    plain = replace(inputs, tensors=kept)
    call = timed_call(lambda one: F.scaled_dot_product_attention(one["q"], one["k"], one["v"]), plain, direction)
    return call, f"scaled_dot_product_attention without a bias, {direction}"


def sdpa_augmented(inputs: Inputs) -> Tensor:
    """SDPA with one more feature: 2 gamma q k - gamma |k|^2 is [2 gamma q, 1] times [k, -gamma |k|^2]."""
    q, k, v = inputs["q"], inputs["k"], inputs["v"]
    gamma = inputs["gamma"].to(q.dtype)[:, None, None]
    wide = torch.cat([2 * gamma * q, torch.ones_like(q[..., :1])], -1)
    tall = torch.cat([k, -gamma * k.square().sum(-1, keepdim=True)], -1)
    return F.scaled_dot_product_attention(wide, tall, F.pad(v, (0, 1)), scale=1.0)[..., :-1]


def sdpa_bias(inputs: Inputs) -> Tensor:
    """SDPA with the bias written out, (L, L) numbers a head in the case of windows."""
    q, k, v = inputs["q"], inputs["k"], inputs["v"]
    length = q.shape[2]
    if inputs.options["window"]:
        places = torch.arange(length, device=q.device)
        apart = (places[:, None] - places).square().to(q.dtype)
        bias = -apart / (2 * inputs["sigma"].to(q.dtype)[:, None, None].square())
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias[None])
    gamma = inputs["gamma"].to(q.dtype)[:, None, None]
    bias = (-gamma * k.square().sum(-1, keepdim=True)).transpose(2, 3).expand(-1, -1, length, -1)
    return F.scaled_dot_product_attention(2 * gamma * q, k, v, attn_mask=bias, scale=1.0)


def cdist(inputs: Inputs) -> Tensor:
    q, k, v = inputs["q"], inputs["k"], inputs["v"]
    apart = torch.cdist(q, k).square()
    return torch.softmax(-inputs["gamma"].to(q.dtype)[:, None, None] * apart, -1) @ v


@functools.cache
def _compiled_flex() -> Callable[..., Tensor]:
    torch._dynamo.config.recompile_limit = 256
    return torch.compile(importlib.import_module("torch.nn.attention.flex_attention").flex_attention, dynamic=False)


def flex(inputs: Inputs) -> Tensor:
    """FlexAttention; what it adds to a score is read from a tensor per head."""
    q, k, v = inputs["q"], inputs["k"], inputs["v"]
    if inputs.options["window"]:
        sigma = inputs["sigma"]

        def near(score, batch, head, row, column):
            apart = (column - row).to(torch.float32)
            return score - apart * apart / (2 * sigma[head] * sigma[head])

        return _compiled_flex()(q, k, v, score_mod=near)
    gamma, size = inputs["gamma"], k.float().square().sum(-1)

    def close(score, batch, head, row, column):
        return gamma[head] * (2 * score - size[batch, head, column])

    return _compiled_flex()(q, k, v, score_mod=close, scale=1.0)


RIVALS = named(
    Contender("sdpa-augmented", "SDPA with an augmented head", "rival", sdpa_augmented, dtypes=("float32",)),
    Contender("sdpa-bias", "SDPA with a bias", "rival", sdpa_bias, dtypes=("float32",), limit=_EAGER),
    Contender("cdist", "cdist, softmax, matmul", "rival", cdist, dtypes=("float32",), limit=_EAGER),
    Contender("flex", "FlexAttention, compiled (no gradients on a CPU)", "rival", flex, dtypes=("float32",),
              directions=(FWD,), checked=("full",), compiles=True),
)  # fmt: skip
