"""What is measured: named workloads with the shapes of real models, chosen and put in order."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import torch

__all__ = ["DTYPES", "FWD", "FWD_BWD", "Entry", "Workload", "every", "ranked", "select", "sizes"]

DTYPES = {
    "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64,
    "complex64": torch.complex64,
}  # fmt: skip
FWD, FWD_BWD = "fwd", "fwd+bwd"


@dataclass(frozen=True)
class Workload:
    """One shape of one subject. Every dtype x layout x direction of it is timed against `rivals`.

    Args:
        name: unique among all subjects.
        title: what the report prints above its tables.
        op: the subject it belongs to.
        sizes: extent of every axis by its letter, in the order they are printed.
        dtypes, layouts, directions: what is timed; a layout "" stands for an op that has only one.
        rivals: (direction, names of rivals and references).
        rank: its importance; a time limit cuts the highest first.
        on_request: left out unless asked for by name.
    """

    name: str
    title: str
    op: str
    sizes: dict[str, int] = field(hash=False)
    dtypes: tuple[str, ...] = ("float32",)
    layouts: tuple[str, ...] = ("",)
    directions: tuple[str, ...] = (FWD, FWD_BWD)
    rivals: tuple[tuple[str, tuple[str, ...]], ...] = ()
    rank: int = 1
    on_request: bool = False

    def __getitem__(self, axis: str) -> int:
        return self.sizes[axis]

    def rivals_in(self, direction: str) -> tuple[str, ...]:
        return dict(self.rivals).get(direction, ())

    def count(self, axes: str) -> int:
        """Elements of a tensor with these axes."""
        return math.prod(self.sizes[axis] for axis in axes)

    def sized(self, **sizes: int) -> Workload:
        """The same with other extents."""
        return replace(self, sizes={**self.sizes, **sizes})

    def shape(self) -> str:
        return " ".join(f"{axis}{size}" for axis, size in self.sizes.items())


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


def sizes(**extents: int) -> dict[str, int]:
    """Extents by the letters of their axes."""
    return extents


def ranked(found: tuple[Workload, ...]) -> tuple[Workload, ...]:
    """The most telling first; workloads of one rank keep the order of their subjects."""
    return tuple(sorted(found, key=lambda one: one.rank))


def every(*, full: bool = True) -> tuple[Workload, ...]:
    """All workloads of all subjects, those on request included."""
    from trifuse.report.subjects import SUBJECTS

    return tuple(one for subject in SUBJECTS.values() for one in (subject.full() if full else subject.quick()))


def select(
    *, full: bool = False, device: str = "cpu", ops: tuple[str, ...] = (), names: tuple[str, ...] = ()
) -> tuple[Workload, ...]:
    """The workloads of a report, in the order they are run.

    Args:
        full: the whole grid instead of the quick selection.
        device: "cpu" or "cuda".
        ops: only these subjects; all if empty.
        names: only these workloads, those left out by default included.

    Raises:
        ValueError: a subject or a workload of that name does not exist.
    """
    found = every(full=full)
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
        from trifuse.report.subjects import SUBJECTS

        found = tuple(SUBJECTS[one.op].for_cuda(one) for one in found)
    return ranked(found)
