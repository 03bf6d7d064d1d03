"""Train a small byte-level Mamba language model on the source of Python's own standard library.

    python examples/byte_lm.py [--quick] [--steps N] [--reference-steps N] [--seed N] [--json FILE]

The model is trained with the fastest backend this machine has. Its first steps are also taken with
the plain PyTorch reference, from the same seed on the same batches, and the two must agree: the exit
code is 1 if a loss differs by more than 1e-3.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import trifuse
from trifuse.nn import InferenceParams, Mamba

BATCH, LENGTH = 16, 128
LARGEST_TEXT = 4 << 20
AGREEMENT = 1e-3
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class ByteLM(nn.Module):
    """Bytes in, scores of the next byte out: residual blocks of RMSNorm and Mamba."""

    def __init__(self, d_model: int = 128, n_layers: int = 4):
        super().__init__()
        self.embedding = nn.Embedding(256, d_model)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.norms = nn.ModuleList(nn.RMSNorm(d_model) for _ in range(n_layers))
        self.mixers = nn.ModuleList(Mamba(d_model, layer_idx=i) for i in range(n_layers))
        self.final_norm = nn.RMSNorm(d_model)

    def forward(self, tokens: Tensor, cache: InferenceParams | None = None) -> Tensor:
        hidden = self.embedding(tokens)
        for norm, mixer in zip(self.norms, self.mixers, strict=True):
            hidden = hidden + mixer(norm(hidden), cache)
        return F.linear(self.final_norm(hidden), self.embedding.weight)


def standard_library() -> tuple[Tensor, Tensor]:
    """The modules next to ``os.py`` as bytes, for training; and every tenth of them, held out."""
    files = sorted(Path(os.__file__).parent.glob("*.py"))
    if len(files) < 20:
        sys.exit(f"byte_lm: found {len(files)} files of the standard library beside {os.__file__}; it needs 20")

    def read(part: list[Path]) -> Tensor:
        text = b"".join(file.read_bytes() for file in part)[:LARGEST_TEXT]
        return torch.frombuffer(bytearray(text), dtype=torch.uint8)

    return read([file for i, file in enumerate(files) if i % 10]), read(files[::10])


def windows(text: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
    """For each start, LENGTH bytes and the LENGTH bytes that come one later."""
    pieces = text[starts[:, None] + torch.arange(LENGTH + 1)].long().to(DEVICE)
    return pieces[:, :-1], pieces[:, 1:]


def loss_of(model: ByteLM, inputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())


def train(text: Tensor, steps: int, schedule: int, seed: int, label: str) -> tuple[ByteLM, list[float], float]:
    """Take `steps` of a schedule of `schedule` steps. The same seed gives the same start and batches."""
    torch.manual_seed(seed)
    model = ByteLM().to(DEVICE)
    plain = [one for one in model.parameters() if one.dim() < 2 or getattr(one, "_no_weight_decay", False)]
    decayed = [one for one in model.parameters() if all(one is not other for other in plain)]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=4e-3, betas=(0.9, 0.95))
    warmup = min(20, schedule // 4) + 1
    rate = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, 0.55 + 0.45 * math.cos(math.pi * step / schedule))
    )
    batches = torch.Generator().manual_seed(seed)
    losses, started = [], time.perf_counter()
    with progress(label, steps) as show:
        for _ in range(steps):
            starts = torch.randint(len(text) - LENGTH, (BATCH,), generator=batches)
            loss = loss_of(model, *windows(text, starts))
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            rate.step()
            losses.append(loss.item())
            show(losses[-1])
    return model, losses, steps * BATCH * LENGTH / (time.perf_counter() - started)


@torch.no_grad()
def bits_per_byte(model: ByteLM, text: Tensor, count: int = 64) -> float:
    """Over `count` windows spread evenly over a text."""
    starts = torch.linspace(0, len(text) - LENGTH - 1, count).long()
    losses = [loss_of(model, *windows(text, part)).item() for part in starts.split(BATCH)]
    return sum(losses) / len(losses) / math.log(2)


@torch.no_grad()
def write(model: ByteLM, prompt: str, length: int, seed: int, temperature: float = 0.7) -> tuple[str, float]:
    """Read the prompt at once, then write byte by byte, each in constant time; also returns bytes per second."""
    dice = torch.Generator(DEVICE).manual_seed(seed)
    cache, text = InferenceParams(), list(prompt.encode())
    piece = torch.tensor([text], device=DEVICE)
    started = time.perf_counter()
    for _ in range(length):
        scores = model(piece, cache)[0, -1]
        cache.seqlen_offset += piece.shape[1]
        piece = torch.multinomial(torch.softmax(scores / temperature, dim=-1), 1, generator=dice)[None]
        text.append(piece.item())
    return bytes(text).decode(errors="replace"), length / (time.perf_counter() - started)


@contextmanager
def progress(label: str, total: int) -> Iterator[Callable[[float], None]]:
    """A bar with the current loss; without the package rich, a line now and then."""
    try:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    except ImportError:
        done = 0

        def line(loss: float) -> None:
            nonlocal done
            done += 1
            if done == total or done % max(1, total // 10) == 0:
                print(f"{label}  {done}/{total}  loss {loss:.3f}", flush=True)

        yield line
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, TextColumn("loss {task.fields[loss]:.3f}")) as bar:
        task = bar.add_task(label, total=total, loss=math.nan)
        yield lambda loss: bar.update(task, advance=1, loss=loss)


def fastest_backend() -> str:
    """What the blocks of this model run on here, with the reasons against the others (printed)."""
    sequence = torch.empty(BATCH, LENGTH, 256, device=DEVICE)
    A, coefficient = sequence[0, 0, :, None].expand(256, 16), sequence[:, :, :16]
    return trifuse.explain("selective_scan", sequence, sequence, A, coefficient, coefficient, layout="bld").chosen


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=200, help="steps with the fastest backend (default: %(default)s)")
    parser.add_argument("--reference-steps", type=int, default=3, help="steps with both (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    parser.add_argument("--quick", action="store_true", help="20 steps, 2 with both")
    options = parser.parse_args()
    steps, both = (20, 2) if options.quick else (options.steps, options.reference_steps)
    if not 0 < both <= steps:
        parser.error(f"--reference-steps is {both}; it must be from 1 to --steps, {steps}")

    text, held_out = standard_library()
    print(f"{len(text):,} bytes to train on, {len(held_out):,} held out\n")
    backend = fastest_backend()
    if backend == "reference":
        print("There is no fast backend here, so only the steps with the reference are taken.")
        steps = both
    torch.manual_seed(options.seed)
    before = bits_per_byte(ByteLM().to(DEVICE), held_out)
    with trifuse.backend("reference"):
        _, wanted, reference_speed = train(text, both, steps, options.seed, "reference")
    model, losses, speed = train(text, steps, steps, options.seed, f"{backend:9}")
    after = bits_per_byte(model, held_out)
    sample, write_speed = write(model, "def read(self, size):\n", 300, options.seed)
    difference = max(abs(one - other) for one, other in zip(losses, wanted, strict=False))

    print(f"\n{sample}\n")
    print(f"bits per byte of the held-out text   {before:.3f} before, {after:.3f} after {steps} steps")
    print(
        f"tokens per second, training          {speed:,.0f} with {backend}, {reference_speed:,.0f} with the reference"
    )
    print(f"bytes per second, writing            {write_speed:,.0f}")
    print(f"largest difference of a loss         {difference:.1e} over the first {both} steps")
    if options.json:
        figures = {
            "backend": backend, "steps": steps, "reference_steps": both, "seed": options.seed,
            "bits_per_byte_before": before, "bits_per_byte_after": after, "tokens_per_second": speed,
            "reference_tokens_per_second": reference_speed, "written_bytes_per_second": write_speed,
            "largest_loss_difference": difference, "losses": losses, "reference_losses": wanted, "sample": sample,
        }  # fmt: skip
        options.json.write_text(json.dumps(figures, indent=1))
    if not difference <= AGREEMENT:
        print(f"byte_lm: {backend} and the reference differ by {difference:.1e}; it must be at most {AGREEMENT:.0e}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
