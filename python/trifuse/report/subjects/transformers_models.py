"""Whole models of transformers, with and without trifuse, in the report."""

from __future__ import annotations

import functools
import importlib.util
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F

from trifuse.report import headlines
from trifuse.report.contenders import Contender, Floor, named
from trifuse.report.model_worker import SHAPES, VOCABULARY
from trifuse.report.subject import Bench, Rows, Subject, Timed
from trifuse.report.validation import Check, Verdict
from trifuse.report.workloads import Entry, Workload, sizes

__all__ = ["TransformersModels"]

WITH, WITHOUT = "trifuse", "transformers"
FORWARD, TRAIN, GENERATE = "forward", "train", "generate"
LOGITS, GRADIENTS = 1e-4, 1e-3  # absolute; relative to the largest magnitude of each gradient
# At 4 layers and d 768 on a CPU.
_ASKED = {("mamba", FORWARD): 4, ("mamba2", FORWARD): 2, ("mamba", TRAIN): 20, ("mamba2", TRAIN): 1.8}
_TITLES = {"mamba": "Mamba", "mamba2": "Mamba-2"}


def _work(model: str, do: str, layers: int, rank: int) -> Workload:
    """Forward at 1024 tokens, a training step at 256, generation of 64 tokens after 32."""
    text, length = {FORWARD: ("1024 tokens", 1024), TRAIN: ("loss and gradients of 256 tokens", 256),
                    GENERATE: ("64 tokens after 32, greedy", 32)}[do]  # fmt: skip
    extents = sizes(B=1, L=length, D=768, layers=layers) | (sizes(new=64) if do == GENERATE else {})
    return Workload(
        f"hf-{model}", f"transformers' {_TITLES[model]}, {layers} layers of the 130M shape, {text}",
        "transformers", extents, directions=(do,), rivals=((do, (WITHOUT,)),), rank=rank,
    )  # fmt: skip


class TransformersModels(Subject):
    op = "transformers"
    measure = "linear-floor"
    measure_text = "its linear layers alone"

    def __init__(self) -> None:
        self.contenders = named(
            Contender(WITH, "transformers with trifuse", "kernel", _unused, missing, dtypes=("float32",)),
            Contender(WITHOUT, "transformers alone", "rival", _unused, missing, dtypes=("float32",)),
        )
        self.floors = named(Floor(self.measure, "floor: its linear layers alone", linear_layers))

    def quick(self) -> tuple[Workload, ...]:
        return self._grid(4)

    def full(self) -> tuple[Workload, ...]:
        whole = (replace(one, name=one.name + "-24-layers", rank=5) for one in self._grid(24))
        return (*self.quick(), *whole)

    def _grid(self, layers: int) -> tuple[Workload, ...]:
        ranks = {FORWARD: 0, TRAIN: 1, GENERATE: 2}
        return tuple(
            replace(_work(model, do, layers, rank), name=f"hf-{model}-{do}")
            for do, rank in ranks.items() for model in SHAPES
        )  # fmt: skip

    def bench(self, device: str) -> Bench:
        return ModelBench(self, device)

    def headlines(self, rows: Rows, device: str) -> list[dict]:
        out = []
        for model, title in _TITLES.items():
            for do in (FORWARD, TRAIN, GENERATE):
                found = rows.get(f"hf-{model}-{do} {do}", [])
                row = headlines.pick(found)
                if row is None:
                    continue
                goal = _ASKED.get((model, do)) if device == "cpu" else None
                asked = {WITHOUT: goal} if goal else None
                out += headlines.against(found, row, f"transformers' {title}, {do}, with trifuse", asked=asked)
                if "floor_ratio" in row:
                    out.append(headlines.line(f"transformers' {title}, {do}, over its linear layers",
                                              f"{row['floor_ratio']:.2f} x", row["floor_note"]))  # fmt: skip
                if do == GENERATE:
                    out.append(_tokens_per_second(title, row, found))
        return [line for line in out if line is not None]


def _tokens_per_second(title: str, row: dict, found: list[dict]) -> dict | None:
    alone = next((one for one in found if one["contender"] == WITHOUT), None)
    if alone is None:
        return None
    one, other = (each["tokens"] / headlines.median(each) for each in (row, alone))
    return headlines.line(f"transformers' {title}, tokens per second", f"{one:.0f}", f"{other:.0f} without trifuse")


def _unused(inputs: object) -> torch.Tensor:
    raise NotImplementedError("models run in processes of their own")


@functools.cache
def missing(device: str) -> str | None:
    if importlib.util.find_spec("transformers") is None:
        return "the package transformers is not installed"
    if importlib.util.find_spec("trifuse.integrations") is None:
        return "this trifuse has no integrations"
    return None


class Side:
    """A process that holds transformers' models; see ``model_worker``."""

    def __init__(self, trifuse: bool, device: str):
        command = [sys.executable, "-m", "trifuse.report.model_worker"]
        self.scratch = tempfile.TemporaryDirectory()
        with self._log.open("w") as sink:
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=sink, text=True, bufsize=1
            )
        self.ask(ask="start", trifuse=trifuse, device=device)

    @property
    def _log(self) -> Path:
        return Path(self.scratch.name) / "log"

    def ask(self, **request: object) -> dict:
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the model's process ended: {self._log.read_text()[-500:]}")
        found = json.loads(line)
        if "error" in found:
            raise RuntimeError(found["error"])
        return found

    def close(self) -> None:
        self.process.stdin.close()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()
        self.scratch.cleanup()


class ModelBench(Bench):
    """Two processes, one with trifuse and one without; the rounds of both alternate."""

    def __init__(self, subject: TransformersModels, device: str):
        self.subject, self.device, self.contenders = subject, device, subject.contenders
        self._sides: dict[str, Side] = {}
        self._answers: dict[str, tuple[dict, list[str]]] = {}
        self._workload: Workload | None = None

    def enter(self, workload: Workload | None) -> None:
        if workload != self._workload:
            self._workload = workload
            self._answers.clear()

    def close(self) -> None:
        for side in self._sides.values():
            side.close()
        self._sides.clear()

    def need_bytes(self, entry: Entry) -> int:
        one = entry.workload
        # transformers' training step keeps a state of every step of every layer.
        states = one["L"] * one["D"] * 2 * 16 * 4 * one["layers"] * (8 if entry.direction == TRAIN else 1)
        return states + (1 << 30)

    def verdict(self, entry: Entry) -> Verdict:
        try:
            alone, _ = self._answer(WITHOUT, entry)
            if entry.contender == WITHOUT:
                return Verdict(tuple(_finite(alone)))
            ours, said = self._answer(WITH, entry)
        except RuntimeError as error:
            return Verdict((), f"raised {error}")
        told = Check("messages", "; ".join(said) or "of falling back to slow code", float(len(said)), 0.0, 0.0)
        return Verdict((*_compared(ours, alone), told))

    def timed(self, entry: Entry) -> Timed:
        floor = self.subject.floors.get(entry.contender)
        if floor is not None:
            call, note = linear_layers(entry.workload, None, entry.direction)
            return Timed(call, {"note": note})
        side, what = self._side(entry.contender), _what(entry)
        return Timed(lambda: side.ask(ask="run", **what), {"tokens": entry.workload.sizes.get("new", 0)})

    def peak(self, entry: Entry, call: Callable[[], object]) -> tuple[int | None, str]:
        found = self._side(entry.contender).ask(ask="peak", **_what(entry))
        return found["bytes"], found["method"]

    def _side(self, name: str) -> Side:
        if name not in self._sides:
            self._sides[name] = Side(name == WITH, self.device)
        return self._sides[name]

    def _answer(self, name: str, entry: Entry) -> tuple[dict, list[str]]:
        if name not in self._answers:
            with tempfile.TemporaryDirectory() as scratch:
                path = str(Path(scratch) / "answer.pt")
                said = self._side(name).ask(ask="answer", path=path, **_what(entry))["said"]
                self._answers[name] = torch.load(path, map_location="cpu"), said
        return self._answers[name]


def _model(workload: Workload) -> str:
    return workload.name.split("-")[1]


def _what(entry: Entry) -> dict:
    one = entry.workload
    return {"do": entry.direction, "model": _model(one), "layers": one["layers"], "batch": one["B"],
            "length": one["L"], "tokens": one.sizes.get("new", 0)}  # fmt: skip


def _finite(answer: dict) -> list[Check]:
    bad = sum(int((~torch.isfinite(tensor.float())).sum()) for tensor in answer.values())
    return [Check("timed shape", "numbers that are not finite", float(bad), 0.0, 0.0)]


def _compared(ours: dict, alone: dict) -> list[Check]:
    """Logits to an absolute bound, gradients relative to their largest magnitude, tokens one by one."""
    if ours.keys() != alone.keys():
        odd = sorted(ours.keys() ^ alone.keys())
        return [Check("timed shape", f"{odd[0]} is there on one side only", float("nan"), 0.0, 0.0)]
    out = []
    for name, theirs in alone.items():
        if name == "tokens":
            error, bound = float((ours[name] != theirs).sum()), 0.0
        else:
            error = (ours[name].double() - theirs.double()).abs().max().item()
            bound = LOGITS if name in ("logits", "loss") else GRADIENTS * theirs.abs().max().item()
        out.append(Check("timed shape", name, error, 0.0, bound))
    return out


def linear_layers(workload: Workload, inputs: object, direction: str) -> tuple[Callable[[], object], str]:
    """Every linear layer of the model as often as the call runs it, on data that is already in place."""
    shape = SHAPES[_model(workload)]
    size, state = shape["hidden_size"], shape["state_size"]
    inner = size * shape["expand"]
    if "time_step_rank" in shape:
        rank = shape["time_step_rank"]
        layers = [(size, 2 * inner), (inner, rank + 2 * state), (rank, inner), (inner, size)]
    else:
        layers = [(size, 2 * inner + 2 * state * shape["n_groups"] + shape["num_heads"]), (inner, size)]
    rows = workload.count("BL")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    every = layers * workload["layers"] + [(size, VOCABULARY)]
    weights = [torch.randn(out, into, device=device) for into, out in every]
    first = [torch.randn(rows, into, device=device) for into, _ in every]
    token = [torch.randn(workload["B"], into, device=device) for into, _ in every]
    times = 3 if direction == TRAIN else 1

    def call() -> None:
        for _ in range(times):
            for x, weight in zip(first, weights, strict=True):
                F.linear(x, weight)
        for _ in range(max(0, workload.sizes.get("new", 1) - 1)):
            for x, weight in zip(token, weights, strict=True):
                F.linear(x, weight)

    counted = f"{len(every)} linear layers" + (", three times" if times == 3 else "")
    return call, f"{counted}, {rows} tokens" + (" and then one by one" if "new" in workload.sizes else "")
