"""Adapters whose first b ranks are an adapter of rank b, for every b."""

from __future__ import annotations

import numbers
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from trifuse import ops
from trifuse.nn.lora import LoRALinear
from trifuse.nn.lora_conv1d import LoRAConv1d
from trifuse.nn.low_rank import LowRank

__all__ = ["DyLoRAConv1d", "DyLoRALinear", "NestedRanks", "ranks", "sample_rank", "set_rank"]


class NestedRanks(LowRank):
    """What a layer with nested ranks has beside ``LowRank``: an active rank b, with the scale of an adapter of rank b.

    For optimizers its factors say which ranks are trained: ``lora_A.active_rows`` and ``lora_B.active_rows`` are
    ``(0, b)``, or ``(b - 1, b)`` in frozen mode: rows of ``lora_A`` (``rank_dim`` 0), columns of ``lora_B`` (1).
    """

    _active: int
    _frozen: bool

    def _add_adapter(self, rank: int, *args: Any, frozen: bool = False, **options: Any) -> None:
        self._active, self._frozen = rank, bool(frozen)
        super()._add_adapter(rank, *args, **options)
        self._announce()

    @property
    def active_rank(self) -> int:
        """b: only the first b rows of ``lora_A`` and columns of ``lora_B`` are in use."""
        return self._active

    @property
    def frozen(self) -> bool:
        """Whether training at rank b trains row and column b only (numbered from 1)."""
        return self._frozen

    @frozen.setter
    def frozen(self, frozen: bool) -> None:
        self._frozen = bool(frozen)
        self._announce()

    def set_rank(self, rank: int) -> None:
        """Use the first `rank` ranks, 1 to all; a merged layer is merged anew, in one pass.

        Raises:
            ValueError: outside 1 to ``self.rank``.
        """
        self._active = _checked(type(self).__name__, rank, self.rank)
        self._announce()
        if self.merged:
            self._merged_again()

    def sample_rank(
        self, distribution: str = "uniform", generator: torch.Generator | None = None, *, p: float = 0.15
    ) -> int:
        """Draw a rank of 1 to all, use it, and return it.

        Args:
            distribution: ``"uniform"``, or ``"geometric"``: rank b in proportion to ``(1 - p) ** b``.
            generator: on the CPU; by default torch's own.
            p: of the geometric distribution, in (0, 1).
        """
        self.set_rank(draw(type(self).__name__, self.rank, distribution, generator, p))
        return self._active

    def ranks(self, which: Iterable[int] | None = None) -> Iterator[int]:
        """Use every rank in turn, or those named, and at the end the one that was in use."""
        before = self._active
        try:
            for rank in range(1, self.rank + 1) if which is None else which:
                self.set_rank(rank)
                yield rank
        finally:
            self.set_rank(before)

    def change_rank(self, rank: int) -> None:
        """Keep the first `rank` ranks, or add ranks with columns of zeros; ``alpha`` stays, and so does what the layer
        does at every rank that it had and has. ``lora_A`` and ``lora_B`` are new parameters."""
        if isinstance(rank, bool) or not isinstance(rank, numbers.Integral) or rank < 1:
            raise ValueError(f"{type(self).__name__}: rank is {rank!r}; it must be an int of at least 1")
        if rank == self.rank:
            return
        active, rank = min(self._active, int(rank)), int(rank)
        A, B = self.lora_A.detach(), self.lora_B.detach()
        if rank > self.rank:
            A, B = ops.lora_change_rank(A, B, rank)
        self._set_factors(A[:rank], B[:, :rank])
        self.set_rank(active)

    def _set_factors(self, A: Tensor, B: Tensor) -> None:
        everything = self._active == self.rank
        super()._set_factors(A, B)
        self._active = self.rank if everything else min(self._active, self.rank)
        self._announce()

    def _announce(self) -> None:
        rows = (self._active - 1 if self._frozen else 0, self._active)
        for rank_dim, factor in enumerate((self.lora_A, self.lora_B)):
            factor.active_rows, factor.rank_dim = rows, rank_dim

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        self._announce()
        return self

    def __setstate__(self, state: dict) -> None:  # what a copied parameter does not keep
        super().__setstate__(state)
        self._announce()

    def extra_repr(self) -> str:
        frozen = ", frozen" if self._frozen else ""
        return f"{super().extra_repr()}, active_rank={self._active}{frozen}"


class DyLoRALinear(NestedRanks, LoRALinear):
    """``LoRALinear`` that is trained at many ranks at once: at each step at rank b, drawn of 1 to `rank`.

    At active rank b the update is ``alpha / b * lora_B[:, :b] lora_A[:b]`` (``alpha / sqrt(b)`` for "rslora"), in
    training, in evaluation and when it is merged; the other rows and columns are neither read nor trained. Starts at
    full rank. ``for b in layer.ranks(): ...`` evaluates at every rank; ``trifuse.sample_rank(model)`` draws one rank
    for all layers of a model.

    Args:
        in_features, out_features, bias, device, dtype, rank, alpha, dropout, scaling, adapter_dtype, rows: those of
            ``LoRALinear``.
        frozen: training at rank b trains row b of ``lora_A`` and column b of ``lora_B`` only; an optimizer that knows
            (``trifuse.optim.LowRankAdamW``) leaves every bit of the others.

    Source: Valipour et al., "DyLoRA: Parameter-Efficient Tuning of Pre-trained Models using Dynamic Search-Free
    Low-Rank Adaptation", 2022 (arXiv 2210.07558).
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        rank: int = 8,
        alpha: float | None = None,
        dropout: float = 0.0,
        scaling: str = "lora",
        adapter_dtype: torch.dtype | None = None,
        rows: slice | range | Sequence[int] | None = None,
        frozen: bool = False,
    ):
        super().__init__(
            in_features, out_features, bias, device, dtype, rank=rank, alpha=alpha, dropout=dropout, scaling=scaling,
            adapter_dtype=adapter_dtype, rows=rows,
        )  # fmt: skip
        self.frozen = frozen


class DyLoRAConv1d(NestedRanks, LoRAConv1d):
    """``LoRAConv1d`` with nested ranks, as ``DyLoRALinear`` has them."""


def set_rank(model: nn.Module, rank: int) -> None:
    """Set the active rank of every layer with nested ranks; one that has fewer uses all it has.

    Args:
        model: whatever holds the layers.
        rank: 1 to the largest rank of the layers.

    Raises:
        ValueError: outside that, or the model has no such layer.
    """
    layers = _layers("set_rank", model)
    rank = _checked("set_rank", rank, max(layer.rank for layer in layers))
    for layer in layers:
        layer.set_rank(min(rank, layer.rank))


def sample_rank(
    model: nn.Module, distribution: str = "uniform", generator: torch.Generator | None = None, *, p: float = 0.15
) -> int:
    """Draw one rank for all layers of a model with nested ranks, use it (``set_rank``), and return it.

    Args:
        model: whatever holds the layers.
        distribution, generator, p: as in ``DyLoRALinear.sample_rank``. Processes that train one model together give
            generators of one seed.
    """
    most = max(layer.rank for layer in _layers("sample_rank", model))
    rank = draw("sample_rank", most, distribution, generator, p)
    set_rank(model, rank)
    return rank


def ranks(model: nn.Module, which: Iterable[int] | None = None) -> Iterator[int]:
    """Use every rank of a model in turn, or those named, and at the end the ranks that were in use.

    ``for b in trifuse.ranks(model, (1, 2, 4, 8)): print(b, evaluate(model))``
    """
    layers = _layers("ranks", model)
    before = [layer.active_rank for layer in layers]
    try:
        for rank in range(1, max(layer.rank for layer in layers) + 1) if which is None else which:
            set_rank(model, rank)
            yield rank
    finally:
        for layer, rank in zip(layers, before, strict=True):
            layer.set_rank(rank)


def draw(name: str, most: int, distribution: str, generator: torch.Generator | None, p: float) -> int:
    """A rank of 1 to `most`."""
    if distribution == "uniform":
        return int(torch.randint(1, most + 1, (), generator=generator))
    if distribution != "geometric":
        raise ValueError(f'{name}: distribution is {distribution!r}; it must be "uniform" or "geometric"')
    if not 0 < p < 1:
        raise ValueError(f"{name}: p is {p!r}; it must be in (0, 1)")
    weights = (1 - p) ** torch.arange(most, dtype=torch.float64)
    return int(torch.multinomial(weights, 1, generator=generator)) + 1


def _layers(name: str, model: nn.Module) -> list[NestedRanks]:
    layers = [module for module in model.modules() if isinstance(module, NestedRanks)]
    if not layers:
        raise ValueError(f"{name}: the model has no layer with nested ranks; DyLoRALinear is one")
    return layers


def _checked(name: str, rank: Any, most: int) -> int:
    if isinstance(rank, bool) or not isinstance(rank, numbers.Integral) or not 1 <= rank <= most:
        raise ValueError(f"{name}: rank is {rank!r}; it must be 1 to {most}")
    return int(rank)
