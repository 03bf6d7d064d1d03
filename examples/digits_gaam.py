"""Classify scikit-learn's handwritten digits with Gaussian adaptive attention, RBF attention and dot-product attention.

    python examples/digits_gaam.py [--seeds N] [--epochs N] [--quick] [--png FILE] [--json FILE]

Every pixel of an 8x8 image is a token. Three classifiers that differ in nothing but how they let the tokens attend are
trained from the same seeds on the same batches. Printed are their test accuracies, and the importance factor of
Gaussian adaptive attention as a picture: which pixels the trained model weighs most. The exit code is 1 if one of the
three stays below 90 %.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import trifuse
from trifuse.analysis import ImportanceFactor, importance_factor
from trifuse.nn import MultiHeadGaussianAdaptiveAttention

SIDE = 8
PIXELS = SIDE * SIDE
D_MODEL, HEADS, BATCH = 16, 2, 64
TEST = 360  # images held out, a fifth
RATE = 4e-3
WANTED = 0.9
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHADES = " .:-=+*#%@"


class GaussianAdaptive(nn.Module):
    """Weighs every pixel of every feature by how far it is from that feature's mean over the image."""

    def __init__(self) -> None:
        super().__init__()
        self.value = nn.Linear(D_MODEL, D_MODEL)
        self.attention = MultiHeadGaussianAdaptiveAttention(
            norm_axis=1, num_heads=1, num_gaussians=4, padding_value=None
        )

    def forward(self, x: Tensor) -> Tensor:
        return PIXELS * self.attention(self.value(x))  # weights sum to one: times their number they are near one


class PairwiseAttention(nn.Module):
    """Projections to heads around an attention of queries to keys."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(D_MODEL, 3 * D_MODEL)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        return self.attend(q, k, v).transpose(1, 2).flatten(2)


class RBFAttention(PairwiseAttention):
    """Attends by distance, exp(-gamma |q - k|^2), with a gamma of each head that is learned."""

    def __init__(self) -> None:
        super().__init__()
        start = 0.5 / math.sqrt(D_MODEL // HEADS)  # for keys of one length, dot-product attention with its usual scale
        self.log_gamma = nn.Parameter(torch.full((HEADS,), math.log(start)))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return trifuse.gaussian_attention(q, k, v, gamma=self.log_gamma.exp())


class DotProductAttention(PairwiseAttention):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v)


ATTENTIONS = {"GAAM": GaussianAdaptive, "RBF": RBFAttention, "dot product": DotProductAttention}


class Classifier(nn.Module):
    """Images ``(B, 64)`` in, scores of ten digits out: one block of attention between an embedding and a linear map."""

    def __init__(self, attention: type[nn.Module]) -> None:
        super().__init__()
        self.brightness = nn.Linear(1, D_MODEL)
        self.position = nn.Parameter(0.1 * torch.randn(PIXELS, D_MODEL))
        self.norms = nn.ModuleList(nn.LayerNorm(D_MODEL) for _ in range(2))
        self.attention = attention()
        self.out = nn.Linear(PIXELS * D_MODEL, 10)

    def forward(self, images: Tensor) -> Tensor:
        x = self.brightness(images[:, :, None]) + self.position
        x = x + self.attention(self.norms[0](x))
        return self.out(F.gelu(self.norms[1](x)).flatten(1))


def digits() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """(images, labels) to train on and held out. Brightness from -1 to 1."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        sys.exit(f"digits_gaam: scikit-learn has the digits and cannot be imported ({error}): pip install scikit-learn")
    data = load_digits()
    images = torch.from_numpy(data.data).float() / 8 - 1
    labels = torch.from_numpy(data.target).long()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    test, train = order[:TEST], order[TEST:]
    return (images[train].to(DEVICE), labels[train].to(DEVICE)), (images[test].to(DEVICE), labels[test].to(DEVICE))


def train(
    attention: type[nn.Module], data: tuple[Tensor, Tensor], epochs: int, seed: int, show: Callable
) -> Classifier:
    """The same seed gives the same batches to every attention, and the same start of what they share."""
    torch.manual_seed(seed)
    model = Classifier(attention).to(DEVICE)
    images, labels = data
    steps = epochs * (len(labels) // BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.05)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps)
    batches = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        order = torch.randperm(len(labels), generator=batches)[: len(labels) // BATCH * BATCH]
        for rows in order.view(-1, BATCH):
            loss = F.cross_entropy(model(images[rows]), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            rate.step()
        show()
    return model


@torch.no_grad()
def accuracy(model: Classifier, data: tuple[Tensor, Tensor]) -> float:
    images, labels = data
    return (model.eval()(images).argmax(1) == labels).float().mean().item()


def importance(models: list[Classifier], data: tuple[Tensor, Tensor]) -> tuple[ImportanceFactor, Tensor]:
    """The importance factor of every pixel over a data set and all models: its 8x8 picture goes from 0 to 1."""
    layers = []
    for model in models:
        layers += importance_factor(model, data[0].split(BATCH), keep="axis", progress=False).values()
    layer = replace(layers[0], mean=torch.stack([layer.mean for layer in layers]).mean(0))
    return ImportanceFactor({layer.name: layer}), layer.factor.view(SIDE, SIDE)


def picture(values: Tensor) -> list[str]:
    """A picture of numbers from 0 to 1 in characters: the fuller, the larger."""
    levels = (values.clamp(0, 1) * (len(SHADES) - 1)).round().int().tolist()
    edge = "+" + "--" * values.shape[1] + "+"
    return [edge, *("|" + "".join(2 * SHADES[level] for level in row) + "|" for row in levels), edge]


def explain_backends() -> dict[str, str]:
    """What the two ops of this package run on here (their refusals are printed)."""
    tokens = torch.empty(BATCH, PIXELS, D_MODEL, device=DEVICE)
    heads = tokens.unflatten(-1, (HEADS, -1)).transpose(1, 2)
    parameters = torch.ones(2, 1, 4, device=DEVICE)
    return {
        "GAAM": trifuse.explain("gaussian_adaptive_attention", tokens, *parameters, dim=1).chosen,
        "RBF": trifuse.explain("gaussian_attention", heads, heads, heads, gamma=1.0).chosen,
    }


@contextmanager
def progress(label: str, total: int) -> Iterator[Callable[[], None]]:
    """A bar; without the package rich, nothing."""
    try:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    except ImportError:
        yield lambda: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(label, total=total)
        yield lambda: bar.advance(task)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=5, help="runs of each classifier (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=20, help="walks through the data (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="one seed, six epochs")
    parser.add_argument("--png", type=Path, metavar="FILE", help="draw the importance factor there (needs matplotlib)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    options = parser.parse_args()
    seeds, epochs = (1, 6) if options.quick else (options.seeds, options.epochs)
    for name, count in (("--seeds", seeds), ("--epochs", epochs)):
        if count < 1:
            parser.error(f"{name} is {count}; it must be at least 1")

    training, held_out = digits()
    print(f"{len(training[1])} images to train on, {len(held_out[1])} held out\n")
    backends = explain_backends()
    accuracies: dict[str, list[float]] = {}
    seconds: dict[str, float] = {}
    print("\ntest accuracy")
    for name, attention in ATTENTIONS.items():
        started = time.perf_counter()
        with progress(name, seeds * epochs) as show:
            models = [train(attention, training, epochs, seed, show) for seed in range(seeds)]
        seconds[name] = time.perf_counter() - started
        accuracies[name] = [accuracy(model, held_out) for model in models]
        if name == "GAAM":
            found, factor = importance(models, held_out)
        each = "  ".join(f"{one:.1%}" for one in accuracies[name])
        spread = f" +- {stdev(accuracies[name]):.1%}" if seeds > 1 else ""
        print(f"  {name:12} {mean(accuracies[name]):.1%}{spread}   ({each})   {seconds[name]:.1f} s", flush=True)

    print("\nimportance factor of GAAM        mean image")
    bright = (held_out[0].mean(0).view(SIDE, SIDE) + 1) / 2
    for left, right in zip(picture(factor), picture(bright / bright.max()), strict=True):
        print(f"  {left}             {right}")
    if options.png:
        found.plot(shape=(SIDE, SIDE), path=options.png)
    if options.json:
        figures = {
            "backends": backends, "seeds": seeds, "epochs": epochs, "accuracies": accuracies, "seconds": seconds,
            "importance_factor": factor.tolist(),
        }  # fmt: skip
        options.json.write_text(json.dumps(figures, indent=1))
    low = [name for name in ATTENTIONS if not mean(accuracies[name]) >= WANTED]
    for name in low:
        print(f"digits_gaam: {name} reached {mean(accuracies[name]):.1%}; it must be at least {WANTED:.0%}")
    return 1 if low else 0


if __name__ == "__main__":
    sys.exit(main())
