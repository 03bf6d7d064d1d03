"""Which kernel serves a call, and why the others do not.

Every op registers its backends here by name. A backend states, for the inputs of a call, a list of
reasons why it cannot serve them; an empty list means it can. CPU tensors try ``cpp`` and then
``reference``; CUDA tensors try ``cuda`` and ``triton`` in the order measured for the op, and then
``reference``. A backend that was asked for by name never falls back.

An op whose arithmetic is matrix products alone has no kernel to choose: its one backend beside the
reference is ``torch``, torch's own products (BLAS, cuBLAS) in an order of ours, on any device.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

__all__ = ["COMPOSITE", "NAMES", "BackendUnavailable", "Choice", "Op", "backend", "explain", "forced_backend"]

NAMES = ("reference", "cpp", "cuda", "triton")
COMPOSITE = "torch"  # of the ops that are products of torch's own, and of no others
LARGE_INPUT = 1 << 20  # elements from which a fallback to the reference is worth a log line

_log = logging.getLogger("trifuse")
_logged: set[str] = set()


class _Forced(threading.local):
    """What this thread forced. A compiled function is guarded on it and follows it, as it could not
    follow a ContextVar; for that the name has to be an attribute of every thread's own instance."""

    def __init__(self) -> None:
        self.name: str | None = None


_forced = _Forced()


class BackendUnavailable(RuntimeError):
    """A backend asked for by name cannot serve the call. The message says why, and what can."""


def _check_name(name: str, source: str) -> str:
    if name not in NAMES and name != COMPOSITE:
        raise ValueError(f"{source}: there is no backend {name!r}; choose one of {', '.join(NAMES)}")
    return name


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Force every op that this thread calls inside the ``with`` block onto one backend.

    Args:
        name: ``"reference"``, ``"cpp"``, ``"cuda"`` or ``"triton"``; ``"torch"`` for ops that are products of
            torch's own.

    Raises:
        ValueError: no backend has that name.
        BackendUnavailable: (from the op) the backend cannot serve the call; it never falls back.
    """
    before, _forced.name = _forced.name, _check_name(name, "trifuse.backend")
    try:
        yield
    finally:
        _forced.name = before


def forced_backend() -> str | None:
    """The backend forced by ``trifuse.backend`` or ``TRIFUSE_BACKEND``, or None."""
    name = _forced.name
    if name is None:
        name = os.environ.get("TRIFUSE_BACKEND") or None
        if name is not None:
            _check_name(name, "TRIFUSE_BACKEND")
    return name


@dataclass(frozen=True)
class Choice:
    """What ``explain`` found: the backend chosen for a call and the reasons of every refusal."""

    op: str
    inputs: str
    chosen: str | None
    forced: bool
    order: tuple[str, ...]
    refusals: dict[str, list[str]] = field(default_factory=dict)

    def __str__(self) -> str:
        how = "forced" if self.forced else "first of " + ", ".join(self.order) + " that can"
        lines = [f"{self.op}({self.inputs})", f"  runs on: {self.chosen or 'nothing'} ({how})"]
        for name in self.refusals:
            for reason in self.refusals[name]:
                lines.append(f"  {name} cannot: {reason}")
        return "\n".join(lines)


class Op:
    """One op's backends.

    Args:
        name: the public name of the op.
        prepare: turns the public arguments into the checked call that refusals and kernels take.
        order: backend names to try, per device type; under ``""`` for all other types, where it is not the reference.
    """

    registry: ClassVar[dict[str, Op]] = {}

    def __init__(self, name: str, prepare: Callable[..., Any], order: dict[str, tuple[str, ...]]):
        self.name = name
        self.prepare = prepare
        self.order = order
        self.refusals: dict[str, Callable[[Any], list[str]]] = {}
        Op.registry[name] = self

    def backend(self, name: str, refusals: Callable[[Any], list[str]]) -> None:
        """Register a backend with its list of reasons for not serving a call."""
        self.refusals[name] = refusals

    @property
    def names(self) -> tuple[str, ...]:
        """Every name that a backend of this op can be asked for by."""
        return (*NAMES, COMPOSITE) if COMPOSITE in self.refusals else NAMES

    def candidates(self, device_type: str) -> tuple[str, ...]:
        return self.order.get(device_type) or self.order.get("", ("reference",))

    def choose(self, call: Any, device_type: str, numel: int) -> str:
        """The name of the backend that serves `call`; raises BackendUnavailable."""
        forced = forced_backend()
        if forced is not None:
            reasons = self._reasons(forced, call)
            if reasons:
                self._refuse(forced, reasons, call, device_type)
            return forced
        for name in self.candidates(device_type):
            if not self._reasons(name, call):
                if name == "reference" and numel >= LARGE_INPUT and not torch.compiler.is_compiling():
                    self._log_fallback(call, device_type)
                return name
        raise AssertionError("reference serves every call")

    def explain(self, call: Any, device_type: str, inputs: str) -> Choice:
        forced = forced_backend()
        order = (forced,) if forced else self.candidates(device_type)
        refusals = {name: self._reasons(name, call) for name in dict.fromkeys((*self.names, *order))}
        chosen = next((name for name in order if not refusals[name]), None)
        return Choice(self.name, inputs, chosen, forced is not None, order, refusals)

    def _reasons(self, name: str, call: Any) -> list[str]:
        if name not in self.refusals:
            return [f"{self.name} has no {name} kernel"]
        return self.refusals[name](call)

    def _refuse(self, name: str, reasons: list[str], call: Any, device_type: str) -> None:
        others = [other for other in self.names if other != name and not self._reasons(other, call)]
        raise BackendUnavailable(
            f"{self.name}: backend {name!r} was asked for and cannot serve this call: "
            + "; ".join(reasons)
            + f". Backends that can: {', '.join(others)}."
        )

    def _log_fallback(self, call: Any, device_type: str) -> None:
        for name in self.candidates(device_type):
            for reason in self._reasons(name, call):
                text = f"{self.name}: {name} cannot serve this call: {reason}"
                if text not in _logged:
                    _logged.add(text)
                    _log.warning("%s. Falling back to the (slow) reference.", text)


def explain(op: str | Callable[..., Any], *args: Any, **kwargs: Any) -> Choice:
    """Print, and return, which backend a call would run on and why the others would not.

    Args:
        op: an op of this package (``trifuse.selective_scan``) or its name.
        *args, **kwargs: the call's arguments. Nothing is computed.

    Returns:
        Choice: also usable without the printed text (``.chosen``, ``.refusals``).
    """
    name = op if isinstance(op, str) else op.__name__
    if name not in Op.registry:
        raise ValueError(f"explain: there is no op {name!r}; choose one of {', '.join(sorted(Op.registry))}")
    entry = Op.registry[name]
    call = entry.prepare(*args, **kwargs)
    choice = entry.explain(call, call.device_type, call.summary())
    print(choice)
    return choice
