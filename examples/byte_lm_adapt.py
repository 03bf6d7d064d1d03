"""Adapt the byte-level Mamba of byte_lm.py to another kind of text, at every rank at once.

    python examples/byte_lm_adapt.py [--base-steps N] [--steps N] [--seed N] [--folder FOLDER] [--json FILE]

A base model is trained on the modules of Python's standard library, then adapted to the package ``encodings``, whose
files are mostly tables of characters: by one DyLoRA, whose first b ranks are an adapter of rank b for every b, and by
LoRA trained separately at each rank. The DyLoRA is saved as PEFT saves adapters, and loaded again. Then the model is
fine-tuned in bfloat16 and in float32 from the same start, and how far the two drift apart is printed beside the
Lyapunov exponents of its layers, which say how fast a layer forgets a rounding of its state.

The exit code is 1 if an adapter does not help, or if the loaded one is not the saved one to the last bit.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import byte_lm
import torch
from byte_lm import ByteLM, bits_per_byte, loss_of, progress, windows
from torch import Tensor, nn

import trifuse
import trifuse.integrations
from trifuse.analysis import lyapunov_exponents
from trifuse.report.memory import peak_extra

RANKS = (1, 2, 4, 8, 16)
TARGETS = ["in_proj", "x_proj", "dt_proj", "out_proj"]
ALPHA, RATE = 4.0, 1e-2
PROBED = 4  # windows whose logits are compared


@dataclass
class Run:
    """One training of adapters: the model, and what it took."""

    model: ByteLM
    seconds: float
    peak: int | None
    parameters: int


def encodings() -> tuple[Tensor, Tensor]:
    """The package ``encodings`` as bytes, for training; and every fifth of its files, held out."""
    files = sorted((Path(os.__file__).parent / "encodings").glob("*.py"))
    if len(files) < 20:
        sys.exit(f"byte_lm_adapt: found {len(files)} files in encodings beside {os.__file__}; it needs 20")

    def read(part: list[Path]) -> Tensor:
        return torch.frombuffer(bytearray(b"".join(file.read_bytes() for file in part)), dtype=torch.uint8)

    return read([file for i, file in enumerate(files) if i % 5]), read(files[::5])


def with_adapters(base: ByteLM, kind: str, rank: int, seed: int) -> ByteLM:
    """A copy of a model in which adapters alone are trained; rank-stabilised, so that ranks share a learning rate."""
    torch.manual_seed(seed)
    model = copy.deepcopy(base)
    return trifuse.apply_lora(model, TARGETS, rank, ALPHA, kind=kind, scaling="rslora")


def fit(
    model: ByteLM, text: Tensor, steps: int, seed: int, label: str, after: Callable[[], None] = lambda: None
) -> None:
    """Train the adapters of a model. With nested ranks, each step is at a rank drawn for all layers."""
    trained = [(name, one) for name, one in model.named_parameters() if one.requires_grad]
    nested = any(isinstance(one, trifuse.nn.DyLoRALinear) for one in model.modules())
    optimizer = trifuse.optim.LowRankAdamW(trained, lr=RATE, weight_decay=0.0)
    warmup = min(6, steps // 4) + 1
    rate = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min((step + 1) / warmup, 1 - 0.95 * step / steps))
    batches, ranks = (torch.Generator().manual_seed(seed + i) for i in range(2))
    with progress(label, steps) as show:
        for _ in range(steps):
            if nested:
                trifuse.sample_rank(model, generator=ranks)
            starts = torch.randint(len(text) - byte_lm.LENGTH, (byte_lm.BATCH,), generator=batches)
            loss = loss_of(model, *windows(text, starts))
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_([one for _, one in trained], 1.0)
            optimizer.step()
            rate.step()
            show(loss.item())
            after()


def adapt(base: ByteLM, kind: str, rank: int, text: Tensor, steps: int, seed: int) -> Run:
    """Adapters of a rank, trained from their start, with the time and the memory of it."""
    model, seconds = with_adapters(base, kind, rank, seed), 0.0

    def train() -> None:
        nonlocal seconds
        started = time.perf_counter()
        fit(model, text, steps, seed, f"{kind:6} of rank {rank:<2}")
        seconds = time.perf_counter() - started

    peak, _ = peak_extra(train, byte_lm.DEVICE)
    trained = sum(one.numel() for one in model.parameters() if one.requires_grad)
    return Run(model, seconds, peak, trained)


def reloaded(base: ByteLM, model: ByteLM, folder: Path) -> ByteLM:
    """The base model with the adapter of another one, by way of files."""
    trifuse.integrations.save_peft(model, folder)
    fresh = copy.deepcopy(base)
    trifuse.integrations.load_peft(fresh, folder)
    return fresh


def in_bfloat16(base: ByteLM) -> ByteLM:
    """A copy in bfloat16, but for what Mamba keeps in float32: the rates of its states, and the skip weights."""
    model = copy.deepcopy(base).bfloat16()
    for mixer, exact in zip(model.mixers, base.mixers, strict=True):
        for name in ("A_log", "D"):
            setattr(mixer, name, nn.Parameter(getattr(exact, name).detach().clone()))
    return model


def drift(base: ByteLM, text: Tensor, probe: Tensor, steps: int, seed: int) -> dict:
    """Fine-tune in float32 and in bfloat16 from the same start on the same batches, and compare the logits of `probe`
    after every step."""
    seen: list[Tensor] = []
    differences: list[float] = []
    spread, exponents = 0.0, {}

    @torch.no_grad()
    def logits() -> Tensor:
        return model(probe).float()

    def compare() -> None:
        differences.append((logits() - seen[len(differences)]).abs().max().item())

    for name, start in (("float32", base), ("bfloat16", in_bfloat16(base))):
        model = with_adapters(start, "lora", RANKS[-1], seed)
        exponents[f"{name}, before"] = largest_exponents(model, probe)
        after = (lambda: seen.append(logits())) if name == "float32" else compare
        after()
        fit(model, text, steps, seed, f"in {name:12}", after)
        exponents[f"{name}, after"] = largest_exponents(model, probe)
        spread = seen[-1].std().item()
    return {
        "steps": steps, "differences": differences, "at_start": differences[0], "largest": max(differences),
        "logit_std": spread, "largest_exponents": exponents,
    }  # fmt: skip


def largest_exponents(model: ByteLM, tokens: Tensor) -> list[float]:
    """Of each layer: of the state that lasts longest."""
    return [found.max().item() for found in lyapunov_exponents(model, tokens).values()]


def measure(base_steps: int, steps: int, seed: int, folder: Path) -> dict:
    """Everything this example prints."""
    started = time.perf_counter()
    own, own_held_out = byte_lm.standard_library()
    text, held_out = encodings()
    print(f"base: {len(own):,} bytes; target: {len(text):,} bytes of encodings, {len(held_out):,} held out\n")
    base, _, _ = byte_lm.train(own, base_steps, base_steps, seed, "base model")

    one = adapt(base, "dylora", RANKS[-1], text, 2 * steps, seed)
    nested = {rank: bits_per_byte(one.model, held_out) for rank in trifuse.ranks(one.model, RANKS)}
    trifuse.set_rank(one.model, RANKS[-1])  # a DyLoRA is saved at its active rank
    back = bits_per_byte(reloaded(base, one.model, folder), held_out)
    separate, runs = {}, {}
    for rank in RANKS:
        run = adapt(base, "lora", rank, text, steps, seed)
        runs[rank], separate[rank] = _figures(run), bits_per_byte(run.model, held_out)

    starts = torch.linspace(0, len(held_out) - byte_lm.LENGTH - 1, PROBED).long()
    apart = drift(base, text, windows(held_out, starts)[0], max(1, steps // 2), seed)
    return {
        "base_steps": base_steps, "steps": steps, "seed": seed, "seconds": time.perf_counter() - started,
        "bits_per_byte_own": bits_per_byte(base, own_held_out), "bits_per_byte_before": bits_per_byte(base, held_out),
        "bits_per_byte_dylora": nested, "bits_per_byte_lora": separate, "bits_per_byte_reloaded": back,
        "dylora": _figures(one), "lora": runs, "drift": apart,
    }  # fmt: skip


def show(figures: dict) -> None:
    """Print them."""
    own, before = figures["bits_per_byte_own"], figures["bits_per_byte_before"]
    print(f"\nbits per byte of what is held out: the base model has {own:.3f} on modules, {before:.3f} on encodings;")
    print("adapted to encodings:\n")
    print("rank   one DyLoRA   LoRA of the rank     time   peak memory   parameters")
    for rank in RANKS:
        nested, separate = figures["bits_per_byte_dylora"][rank], figures["bits_per_byte_lora"][rank]
        print(f"{rank:4}   {nested:10.3f}   {separate:16.3f}   {_cost(figures['lora'][rank])}")
    print(f"{'the DyLoRA, at all ranks':>36}   {_cost(figures['dylora'])}")
    back = figures["bits_per_byte_reloaded"]
    print(f"\nsaved in PEFT's format and loaded: {back:.3f} bits per byte at rank {RANKS[-1]}")

    apart = figures["drift"]
    print(f"\nfine-tuned for {apart['steps']} steps in bfloat16 and in float32, from the same start")
    print(f"largest difference of a logit      {apart['at_start']:.3f} before, {apart['largest']:.3f} along training")
    print(f"standard deviation of the logits   {apart['logit_std']:.3f}")
    print("largest Lyapunov exponent of each layer, per step (0 would never forget):")
    for name, found in apart["largest_exponents"].items():
        print(f"  {name:18}  " + "  ".join(f"{value:9.2e}" for value in found))
    print(f"\n{figures['seconds']:.0f} seconds in all")


def complaints(figures: dict) -> list[str]:
    """What is wrong with the figures, in sentences."""
    before, last = figures["bits_per_byte_before"], figures["bits_per_byte_dylora"][RANKS[-1]]
    found = []
    for kind in ("dylora", "lora"):
        for rank, bits in figures[f"bits_per_byte_{kind}"].items():
            if not bits < before:
                found.append(f"{kind} at rank {rank} has {bits:.3f} bits per byte; the base model had {before:.3f}")
    if figures["bits_per_byte_reloaded"] != last:
        found.append(f"the loaded adapter has {figures['bits_per_byte_reloaded']} bits per byte; the saved had {last}")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--base-steps", type=int, default=200, help="of the base model (default: %(default)s)")
    parser.add_argument(
        "--steps", type=int, default=60, help="of LoRA at each rank; DyLoRA takes twice as many (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="keep the adapter in PEFT's format there")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    options = parser.parse_args()
    if options.steps < 1 or options.base_steps < 1:
        parser.error(f"--steps is {options.steps}, --base-steps {options.base_steps}; both must be at least 1")
    with tempfile.TemporaryDirectory() as scratch:
        figures = measure(options.base_steps, options.steps, options.seed, options.folder or Path(scratch))
    show(figures)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1))
    wrong = complaints(figures)
    for one in wrong:
        print(f"byte_lm_adapt: {one}")
    return 1 if wrong else 0


def _cost(run: dict) -> str:
    peak = "not measured" if run["peak_bytes"] is None else f"{run['peak_bytes'] / 1e6:.0f} MB"
    return f"{run['seconds']:4.1f} s   {peak:>11}   {run['parameters']:10,}"


def _figures(run: Run) -> dict:
    return {"seconds": run.seconds, "peak_bytes": run.peak, "parameters": run.parameters}


if __name__ == "__main__":
    sys.exit(main())
