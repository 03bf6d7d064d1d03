"""What is measured: named workloads with the shapes of real models, and the tensors they run on."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

__all__ = ["FULL", "QUICK", "Entry", "Inputs", "Workload", "make_inputs", "select"]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
FWD, FWD_BWD = "fwd", "fwd+bwd"

# Rivals the quick report can afford at full length: the faster ones, and each slow one somewhere.
_ALL = ("reference", "loop-compiled", "mambapy", "transformers", "mamba_ssm")


@dataclass(frozen=True)
class Workload:
    """One shape of one op. Every dtype x layout x direction of it is timed against `rivals`."""

    name: str
    title: str
    op: str = "selective_scan"
    batch: int = 1
    dim: int = 1536
    seqlen: int = 2048
    dstate: int = 16
    dtypes: tuple[str, ...] = ("float32",)
    layouts: tuple[str, ...] = ("bld",)
    directions: tuple[str, ...] = (FWD, FWD_BWD)
    rivals: tuple[tuple[str, tuple[str, ...]], ...] = ()  # (direction, names)
    on_request: bool = False  # left out unless asked for by name

    def rivals_in(self, direction: str) -> tuple[str, ...]:
        return dict(self.rivals).get(direction, ())

    @property
    def exponentials(self) -> int:
        """exp(dt * A) of the recurrence: what no forward scan can do without."""
        return self.batch * self.dim * self.seqlen * self.dstate

    @property
    def elements(self) -> int:
        """Elements of one sequence tensor."""
        return self.batch * self.dim * self.seqlen

    def shape(self) -> str:
        length = "" if self.op == "selective_state_update" else f" L{self.seqlen}"
        return f"B{self.batch} D{self.dim}{length} N{self.dstate}"


@dataclass(frozen=True)
class Entry:
    """One line of the report: a contender on a workload, in one direction, dtype and layout."""

    workload: Workload
    direction: str
    contender: str
    dtype: str
    layout: str

    @property
    def group(self) -> str:
        return f"{self.workload.name} {self.direction}"

    @property
    def id(self) -> str:
        parts = (self.workload.name, self.direction, self.contender, self.dtype, self.layout)
        return "/".join(part for part in parts if part)


@dataclass(frozen=True)
class Inputs:
    """The tensors of a call of ``selective_scan`` in one layout, and the gradient of its output."""

    layout: str
    u: Tensor
    delta: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor
    z: Tensor
    delta_bias: Tensor
    dout: Tensor

    ARGUMENTS = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")
    SEQUENCES = ("u", "delta", "z", "dout")

    @cached_property
    def leaves(self) -> dict[str, Tensor]:
        """The arguments as leaves that ask for a gradient; they share the storage of the inputs."""
        return {name: getattr(self, name).detach().requires_grad_() for name in self.ARGUMENTS}

    def bytes(self, direction: str) -> int:
        """Bytes of inputs and output, and for the backward pass of the gradients of every input."""
        inputs = sum(getattr(self, name).nbytes for name in self.ARGUMENTS)
        return (2 if direction == FWD_BWD else 1) * inputs + self.dout.nbytes

    def to(self, *, dtype: torch.dtype | None = None, layout: str | None = None) -> Inputs:
        """The same values in another sequence dtype and layout, contiguous. Weights stay in the
        accumulation dtype."""
        changed = {}
        swap = layout is not None and layout != self.layout
        acc = torch.float64 if dtype == torch.float64 else None
        for name in (*self.ARGUMENTS, "dout"):
            tensor = getattr(self, name)
            if name in ("A", "D", "delta_bias"):
                changed[name] = tensor if acc is None else tensor.to(acc)
            else:
                tensor = tensor.transpose(1, 2) if swap else tensor
                changed[name] = tensor.to(dtype or tensor.dtype).contiguous()
        return Inputs(layout=layout or self.layout, **changed)

    def channels(self, index: Tensor) -> Inputs:
        """The call restricted to some channels, which are independent of each other."""
        axis = 2 if self.layout == "bld" else 1
        part = {name: getattr(self, name).index_select(axis, index) for name in self.SEQUENCES}
        part |= {name: getattr(self, name).index_select(0, index) for name in ("A", "D", "delta_bias")}
        return replace(self, **part)


def make_inputs(workload: Workload, device: str = "cpu", seed: int = 0) -> Inputs:
    """Float32 inputs in "bld", with the values a Mamba block starts training with.

    dt between 0.001 and 0.1 (log-uniform), A = -(1..N), D = 1, everything else normal.
    """
    generator = torch.Generator(device=device).manual_seed(seed)
    batch, dim, seqlen, dstate = workload.batch, workload.dim, workload.seqlen, workload.dstate

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    dt = torch.exp(torch.rand(dim, generator=generator, device=device) * 4.6 - 6.9)
    return Inputs(
        layout="bld",
        u=normal(batch, seqlen, dim),
        delta=normal(batch, seqlen, dim).mul_(0.5),
        A=-torch.arange(1.0, dstate + 1, device=device).repeat(dim, 1),
        B=normal(batch, seqlen, dstate),
        C=normal(batch, seqlen, dstate),
        D=torch.ones(dim, device=device),
        z=normal(batch, seqlen, dim),
        delta_bias=dt + torch.log(-torch.expm1(-dt)),
        dout=normal(batch, seqlen, dim),
    )


def _decode(name: str, title: str, **sizes: int) -> Workload:
    return Workload(
        name, title, op="selective_state_update", seqlen=1, dtypes=("float32", "bfloat16"), layouts=("",),
        directions=(FWD,), rivals=((FWD, ("reference", "transformers")),), **sizes,
    )  # fmt: skip


_MODELS = {"130m": 1536, "370m": 2048, "1.4b": 4096, "2.8b": 5120}
_BOTH = ("float32", "bfloat16")

SMOKE = Workload(
    "smoke", "smallest case, for tests", dim=32, seqlen=40, dstate=4, layouts=("bld", "bdl"),
    rivals=((FWD, ("reference",)), (FWD_BWD, ("reference",))), on_request=True,
)  # fmt: skip

# The most telling first: a time limit cuts from the end.
QUICK = (
    Workload(
        "mamba-130m", "one layer of Mamba 130M, 2048 tokens", dtypes=_BOTH, layouts=("bld", "bdl"),
        rivals=((FWD, _ALL), (FWD_BWD, ("mambapy", "loop-compiled", "mamba_ssm"))),
    ),
    Workload(
        "mamba-130m-short", "the same at 128 tokens, where every rival can train", seqlen=128,
        directions=(FWD_BWD,), rivals=((FWD_BWD, ("reference", "mambapy", "transformers")),),
    ),
    _decode("decode-130m", "one token, batch 1, Mamba 130M"),
    _decode("decode-2.8b", "one token, batch 32, Mamba 2.8B", batch=32, dim=5120),
    Workload(
        "long-64k", "Mamba 130M's layer, 65536 tokens", seqlen=65536,
        rivals=((FWD, ("mamba_ssm",)), (FWD_BWD, ("mamba_ssm",))),
    ),
    *(
        Workload(
            f"length-{length}", f"Mamba 130M's layer, {length} tokens", seqlen=length,
            rivals=((FWD, ("mambapy", "mamba_ssm")), (FWD_BWD, ("mambapy", "mamba_ssm")))
            if length <= 1024 else ((FWD, ("mamba_ssm",)), (FWD_BWD, ("mamba_ssm",))),
        )
        for length in (256, 1024, 8192)
    ),
    *(
        Workload(
            f"mamba-{name}", f"one layer of Mamba {name.upper()}, 2048 tokens", dim=_MODELS[name], dtypes=_BOTH,
            rivals=((FWD, ("reference", "mamba_ssm")), (FWD_BWD, ("mamba_ssm",))),
        )
        for name in ("370m", "1.4b", "2.8b")
    ),
    SMOKE,
)  # fmt: skip


def _grid() -> tuple[Workload, ...]:
    """Every model shape x dtype x layout with every rival that can run it."""
    everything = {
        "dtypes": ("float32", "bfloat16", "float16"), "layouts": ("bld", "bdl"),
        "rivals": ((FWD, _ALL), (FWD_BWD, _ALL)),
    }  # fmt: skip
    out = []
    for one in QUICK:
        if one.op == "selective_scan" and not one.on_request and one.name != "mamba-130m-short":
            rivals = everything if one.seqlen <= 8192 else {**everything, "rivals": one.rivals}
            one = replace(one, **rivals)
        out.append(one)
        if one.name == "mamba-130m":
            out.append(replace(one, name="mamba-130m-b8", title=one.title + ", batch 8", batch=8))
    return tuple(out)


FULL = _grid()


def _for_cuda(workload: Workload) -> Workload:
    """A GPU is filled by a batch; its headline is the shape published kernels are compared at."""
    if workload.on_request or workload.op != "selective_scan":
        return workload
    both = {"dtypes": _BOTH, "layouts": ("bdl", "bld")}
    if workload.name == "mamba-370m":
        return replace(workload, batch=8, title=workload.title + ", batch 8", **both)
    return workload if workload.seqlen > 2048 else replace(workload, batch=8, title=workload.title + ", batch 8")


def select(
    *, full: bool = False, device: str = "cpu", ops: tuple[str, ...] = (), names: tuple[str, ...] = ()
) -> tuple[Workload, ...]:
    """The workloads of a report.

    Args:
        full: the whole grid instead of the quick selection.
        device: "cpu" or "cuda".
        ops: only these ops; all if empty.
        names: only these workloads, those left out by default included.

    Raises:
        ValueError: an op or a workload of that name does not exist.
    """
    found = FULL if full else QUICK
    for wanted, attribute in ((ops, "op"), (names, "name")):
        known = sorted({getattr(one, attribute) for one in found})
        for name in wanted:
            if name not in known:
                what = {"op": "op", "name": "workload"}[attribute]
                raise ValueError(f"report: there is no {what} {name!r}; choose from {', '.join(known)}")
    if ops:
        found = tuple(one for one in found if one.op in ops)
    found = tuple(one for one in found if (one.name in names if names else not one.on_request))
    if device == "cuda":
        found = tuple(_for_cuda(one) for one in found)
        found = tuple(sorted(found, key=lambda one: one.name != "mamba-370m"))
    return found
