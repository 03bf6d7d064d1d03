"""The importance factor of models with Gaussian adaptive attention: which entries a trained model weighs most."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from trifuse.analysis import heat_map
from trifuse.nn.gaussian import GaussianAdaptiveAttention, MultiHeadGaussianAdaptiveAttention

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["ImportanceFactor", "LayerImportance", "importance_factor"]


@dataclass(frozen=True)
class LayerImportance:
    """One layer's part of an ``ImportanceFactor``.

    Attributes:
        name: of the module in the model.
        mean: the mean weight map over the data set, float64 on the CPU.
        axis: the axis of ``mean`` that the weights run along.
        num_heads: H; the heads are consecutive pieces of that axis.
    """

    name: str
    mean: Tensor
    axis: int
    num_heads: int

    @property
    def factor(self) -> Tensor:
        """``mean``, min-max scaled to [0, 1] over the layer; 0 where all are equal."""
        return _scaled(self.mean)

    @property
    def heads(self) -> tuple[Tensor, ...]:
        """The piece of each head, min-max scaled to [0, 1] by itself. Weights of a head sum to one, so a last head
        with more entries than the others has smaller weights: only so are heads of unequal size compared."""
        size = self.mean.shape[self.axis] // self.num_heads
        sizes = [size] * (self.num_heads - 1) + [self.mean.shape[self.axis] - size * (self.num_heads - 1)]
        return tuple(_scaled(piece) for piece in self.mean.split(sizes, self.axis))


@dataclass(frozen=True)
class ImportanceFactor(Mapping[str, LayerImportance]):
    """What ``importance_factor`` found: a mapping of the names of layers, in the model's order, to their parts."""

    layers: dict[str, LayerImportance]

    def __getitem__(self, name: str) -> LayerImportance:
        return self.layers[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def plot(
        self, *, per: str = "layer", shape: Sequence[int] | None = None, cmap: str = "viridis", path: Any = None
    ) -> Figure:
        """Draw heat maps of the importance factor, one panel a layer.

        Maps with one axis and the same length share a panel, a row each. Of maps with more than two axes the mean
        over all but the weights' axis is drawn.

        Args:
            per: "layer" scales each layer to [0, 1], "head" each head by itself.
            shape: two sizes; maps with one axis are drawn as pictures of this shape.
            cmap: name of a colour map of matplotlib.
            path: file to save the figure in; its ending chooses the format.

        Returns:
            The ``matplotlib.figure.Figure``.

        Raises:
            ImportError: matplotlib is not installed.
            ValueError: naming the argument, what it was and what it must be.
        """
        if per not in ("layer", "head"):
            raise ValueError(f'ImportanceFactor.plot: per is {per!r}; it must be "layer" or "head"')
        maps = {}
        for layer in self.values():
            found = layer.factor if per == "layer" else torch.cat(layer.heads, layer.axis)
            if found.dim() > 2:
                found = found.mean([axis for axis in range(found.dim()) if axis != layer.axis])
            maps[layer.name or "model"] = found
        return heat_map.draw(maps, shape, cmap, path)


def importance_factor(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    layers: Sequence[str] | None = None,
    keep: str = "map",
    batch_axis: int = 0,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    max_batches: int | None = None,
    device: torch.device | str | None = None,
    progress: bool = True,
) -> ImportanceFactor:
    """The importance factor: the mean map of Gaussian adaptive attention's weights over a data set, scaled to [0, 1].

    The model runs in evaluation mode without gradients, and eagerly where it was compiled; modes are as before
    afterwards. Modules of the published package are found beside those of ``trifuse.nn``. A module that is called
    several times counts every call. Entries that a mask or a padding value leaves out do not count in the mean.

    Args:
        model: holds ``trifuse.nn.MultiHeadGaussianAdaptiveAttention`` or ``GaussianAdaptiveAttention`` (a
            ``GaussianBlock`` does), or is one.
        loader: iterable of batches: a tensor, a tuple or list whose first entry is the model's input, or a mapping
            of its keyword arguments.
        layers: names of the modules to look at, as in ``model.named_modules()``; all by default.
        keep: "map": the mean over the batch alone, so of the shape of a module's input without ``batch_axis``, which
            must be the same for all batches; "axis": the mean over everything but the axis of the weights.
        batch_axis: where the batch stands in the inputs of the modules.
        forward: called as ``forward(model, batch)`` instead, for any other batches.
        max_batches: stop after so many.
        device: where the batches go; by default to the model's first parameter.
        progress: show a bar on the standard error.

    Returns:
        ``ImportanceFactor``: by name of a layer its ``mean``, ``factor`` and ``heads``; ``plot()`` draws them.

    Raises:
        TypeError, ValueError: naming the argument, what it was and what it must be.

    Source: Ioannides et al., "Gaussian Adaptive Attention Is All You Need: Robust Contextual Representations Across
    Multiple Modalities", 2024, the importance factor.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"importance_factor: model is {type(model).__name__}; it must be a torch.nn.Module")
    if keep not in ("map", "axis"):
        raise ValueError(f'importance_factor: keep is {keep!r}; it must be "map" or "axis"')
    if max_batches is not None and max_batches < 1:
        raise ValueError(f"importance_factor: max_batches is {max_batches}; it must be positive or None")
    means = {name: _Mean(name, module, batch_axis, keep) for name, module in _find(model, layers).items()}
    if device is None:
        first = next(model.parameters(), None)
        device = None if first is None else first.device
    batches = 0
    with evaluating(model), torch.no_grad(), torch.compiler.set_stance("force_eager"):
        try:
            for mean in means.values():
                mean.listen()
            for batch in _shown(loader, max_batches, progress):
                batch = moved(batch, device)
                if forward is not None:
                    forward(model, batch)
                elif isinstance(batch, Mapping):
                    model(**batch)
                else:
                    model(batch[0] if isinstance(batch, (tuple, list)) else batch)
                batches += 1
        finally:
            for mean in means.values():
                mean.stop()
    if not batches:
        raise ValueError("importance_factor: loader gave no batch; it must give at least one")
    silent = [name for name, mean in means.items() if mean.total is None]
    if silent:
        raise ValueError(
            f"importance_factor: the model never called {', '.join(map(repr, silent))}; "
            "name the modules that it calls in layers"
        )
    return ImportanceFactor({name: mean.result() for name, mean in means.items()})


class _Mean:
    """Listens to one module and adds its weights up."""

    def __init__(self, name: str, module: nn.Module, batch_axis: int, keep: str):
        self.name, self.module, self.batch_axis, self.keep = name, module, batch_axis, keep
        # The published module of several heads does not keep it, but its heads do.
        holders = (one for one in module.modules() if hasattr(one, "padding_value"))
        self.padding_value = next(holders).padding_value
        self.total: Tensor | None = None
        self.count: Tensor | int = 0
        self.axis = 0
        self._handles: list[Any] = []
        self._asked: list[bool] = []

    def listen(self) -> None:
        self._handles = [
            self.module.register_forward_pre_hook(self._ask, with_kwargs=True),
            self.module.register_forward_hook(self._take, with_kwargs=True, prepend=True),
        ]

    def stop(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _ask(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """Have the module return its weights, whether or not its caller wants them."""
        given = dict(kwargs)
        self._asked.append(bool(args[1] if len(args) > 1 else given.get("return_attention_details", False)))
        return args[:1], {**given, "return_attention_details": True}

    def _take(self, module: nn.Module, args: tuple, kwargs: dict, output: tuple[Tensor, Tensor]) -> Any:
        self._add(args[0] if args else kwargs["x"], kwargs.get("mask"), output[1])
        return output if self._asked.pop() else output[0]

    def _add(self, x: Tensor, mask: Tensor | None, weights: Tensor) -> None:
        axis, batch = self.module.norm_axis % x.dim(), self.batch_axis % x.dim()
        if axis == batch:
            raise ValueError(
                f"importance_factor: the weights of {self.name!r} run along axis {axis}, which batch_axis says is the "
                "batch; batch_axis must be another axis"
            )
        if self.padding_value is not None:
            mask = x != self.padding_value
        over = [batch] if self.keep == "map" else [one for one in range(x.dim()) if one != axis]
        total = weights.sum(over, dtype=torch.float64)
        if mask is None:
            count = x.numel() // max(1, total.numel())
        else:
            kept = mask.expand(x.shape)
            total, count = torch.where(kept, weights, 0).sum(over, dtype=torch.float64), kept.sum(over)
        if self.total is not None and self.total.shape != total.shape:
            raise ValueError(
                f"importance_factor: the map of {self.name!r} has shape {tuple(total.shape)} and had "
                f'{tuple(self.total.shape)} in a batch before; all must be equal, or keep="axis" leaves only the axis '
                "of the weights"
            )
        self.axis = 0 if self.keep == "axis" else axis - (batch < axis)
        self.total = total if self.total is None else self.total + total
        self.count = self.count + count

    def result(self) -> LayerImportance:
        count = self.count.clamp(min=1) if isinstance(self.count, Tensor) else max(1, self.count)
        heads = self.module.num_heads if hasattr(self.module, "attention_heads") else 1
        return LayerImportance(self.name, (self.total / count).cpu(), self.axis, heads)


def _find(model: nn.Module, layers: Sequence[str] | None) -> dict[str, nn.Module]:
    """The modules that weigh, by name: those with several heads, and single ones outside of them."""
    many, single = [MultiHeadGaussianAdaptiveAttention], [GaussianAdaptiveAttention]
    published = sys.modules.get("gaussian_adaptive_attention")
    if published is not None:
        many.append(published.MultiHeadGaussianAdaptiveAttention)
        single.append(published.GaussianAdaptiveAttention)
    found: dict[str, nn.Module] = {}
    heads: set[nn.Module] = set()
    for name, module in model.named_modules():
        name = name.removeprefix("_orig_mod").replace("._orig_mod", "").removeprefix(".")
        if isinstance(module, tuple(many)):
            heads.update(module.modules())
            found[name] = module
        elif isinstance(module, tuple(single)) and module not in heads:
            found[name] = module
    if not found:
        raise ValueError(
            f"importance_factor: model is a {type(model).__name__} without Gaussian adaptive attention; it must hold "
            "trifuse.nn.MultiHeadGaussianAdaptiveAttention or GaussianAdaptiveAttention"
        )
    unknown = [name for name in layers or () if name not in found]
    if unknown:
        raise ValueError(f"importance_factor: layers names {unknown[0]!r}; the model has {', '.join(map(repr, found))}")
    return found if layers is None else {name: found[name] for name in layers}


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def moved(batch: Any, device: torch.device | str | None) -> Any:
    if isinstance(batch, Tensor):
        return batch if device is None else batch.to(device)
    if isinstance(batch, Mapping):
        return {name: moved(value, device) for name, value in batch.items()}
    if isinstance(batch, (tuple, list)) and not hasattr(batch, "_fields"):
        return type(batch)(moved(value, device) for value in batch)
    return batch


def _scaled(mean: Tensor) -> Tensor:
    if not mean.numel():
        return mean
    low, high = mean.min(), mean.max()
    return torch.zeros_like(mean) if low == high else (mean - low) / (high - low)


def _shown(loader: Iterable[Any], most: int | None, show: bool) -> Iterator[Any]:
    """The batches, with a bar on the standard error: rich's where that is installed, lines otherwise."""
    total = len(loader) if hasattr(loader, "__len__") else None
    if most is not None:
        total = most if total is None else min(total, most)
    with _bar(total) if show else _no_bar() as advance:
        for i, batch in enumerate(loader):
            if i == most:
                return
            yield batch
            advance()


@contextmanager
def _no_bar() -> Iterator[Callable[[], None]]:
    yield lambda: None


@contextmanager
def _bar(total: int | None) -> Iterator[Callable[[], None]]:
    try:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    except ImportError:
        done = 0

        def line() -> None:
            nonlocal done
            done += 1
            if done == total or done % max(1, (total or 100) // 10) == 0:
                print(f"importance factor  {done}/{total or '?'} batches", file=sys.stderr, flush=True)

        yield line
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("importance factor", total=total)
        yield lambda: bar.update(task, advance=1)
