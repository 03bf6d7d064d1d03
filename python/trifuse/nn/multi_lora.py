"""A linear layer with many low-rank adapters, each row of a batch with its own."""

from __future__ import annotations

import contextlib
import contextvars
import math
import numbers
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trifuse import ops
from trifuse.nn.low_rank import adapter_dtype_beside, check_options, scale_of, take_over

__all__ = ["Index", "MultiLoRALinear", "adapters", "packed_from"]

# Where the rows of a batch of one come from that a block made of texts without their padding: (text, position).
_origin: contextvars.ContextVar[tuple[Tensor, Tensor] | None] = contextvars.ContextVar("origin", default=None)

Index = int | str | Tensor | Sequence[int | str | None] | None


class _Factors(nn.ParameterDict):
    """One factor of every adapter, by name; a plain layer's checkpoint leaves them as they are."""

    def _load_from_state_dict(
        self, state_dict: dict, prefix: str, local_metadata: dict, strict: bool, missing_keys: list[str], *rest: Any
    ) -> None:
        own = [prefix + name for name in self]
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, *rest)
        if not any(name in state_dict for name in own):
            missing_keys[:] = [name for name in missing_keys if name not in own]


class MultiLoRALinear(nn.Linear):
    """``torch.nn.Linear`` with any number of named low-rank adapters, chosen row by row, in training too.

    ``weight`` and ``bias`` are frozen; the factors are ``lora_A[name]`` ``(rank, K)`` and ``lora_B[name]``
    ``(N, rank)``, with ranks of their own. ``adapter_index`` says who has which, see ``trifuse.adapters``.

    Args:
        in_features, out_features, bias, device, dtype: those of ``torch.nn.Linear``.
        adapter_dtype: of the adapters; by default float32 beside a half-precision weight, else the weight's.

    Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021 (arXiv 2106.09685).
    """

    has_adapter = True

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        adapter_dtype: torch.dtype | None = None,
    ):
        super().__init__(in_features, out_features, bias, device, dtype)
        if self.bias is not None:
            self.bias.requires_grad_(False)
        self._start(adapter_dtype)

    @classmethod
    def from_linear(cls, linear: nn.Linear, *, adapter_dtype: torch.dtype | None = None) -> Any:
        """A layer that does what `linear`, a plain ``torch.nn.Linear``, does, and has no adapters yet. The parameters
        are shared, and the weight is frozen."""
        layer = take_over(cls, linear, nn.Linear)
        layer._start(adapter_dtype)
        return layer

    def _start(self, adapter_dtype: torch.dtype | None) -> None:
        adapter_dtype_beside(type(self).__name__, self.weight, adapter_dtype)
        self.weight.requires_grad_(False)
        self.adapter_dtype = adapter_dtype
        self.lora_A, self.lora_B = _Factors(), _Factors()
        self.rank: dict[str, int] = {}
        self.alpha: dict[str, float] = {}
        self.scaling: dict[str, str] = {}
        self._index: Index = None

    @property
    def adapter_names(self) -> tuple[str, ...]:
        """In the order they were added; an adapter's place here is its number."""
        return tuple(self.rank)

    @property
    def scale(self) -> dict[str, float]:
        """What each adapter's product is multiplied by."""
        return {name: scale_of(self.alpha[name], self.rank[name], self.scaling[name]) for name in self.rank}

    def add_adapter(self, name: str, rank: int = 8, alpha: float | None = None, *, scaling: str = "lora") -> None:
        """Add an adapter that has no effect yet.

        Args:
            name: without a dot, and not taken.
            rank, alpha, scaling: as in ``LoRALinear``.
        """
        own = type(self).__name__
        if not isinstance(name, str) or not name or "." in name or hasattr(nn.ParameterDict, name):
            raise ValueError(f"{own}: name is {name!r}; it must be a word without a dot, and none of a dict's methods")
        if name in self.rank:
            raise ValueError(f"{own}: name is {name!r}, which is taken; the adapters are {', '.join(self.rank)}")
        check_options(own, rank, alpha, 0.0, scaling)
        factory = {"device": self.weight.device, "dtype": adapter_dtype_beside(own, self.weight, self.adapter_dtype)}
        self.lora_A[name] = nn.Parameter(torch.empty(rank, self.in_features, **factory))
        self.lora_B[name] = nn.Parameter(torch.zeros(self.out_features, rank, **factory))
        nn.init.kaiming_uniform_(self.lora_A[name], a=math.sqrt(5))
        self.rank[name], self.alpha[name], self.scaling[name] = int(rank), float(alpha or rank), scaling

    def remove_adapter(self, name: str) -> None:
        """Remove an adapter. Those after it move up, and ``adapter_index`` is None again."""
        self._check_name(name)
        for kept in (self.lora_A, self.lora_B, self.rank, self.alpha, self.scaling):
            del kept[name]
        self._index = None

    def _check_name(self, name: str) -> None:
        if name not in self.rank:
            has = ", ".join(self.rank) or "none"
            raise ValueError(f"{type(self).__name__}: there is no adapter {name!r}; the adapters are {has}")

    @property
    def adapter_index(self) -> Index:
        """Which adapter a row has: one name or number for all, or one per text or per row; None and below 0: none.

        Set to None, a layer with one adapter uses it, and one with several raises when it is called. A tensor or a
        list has the size ``(B,)`` of x's first axis, or the shape of x without its last one.
        """
        return self._index

    @adapter_index.setter
    def adapter_index(self, index: Index) -> None:
        if index is None or isinstance(index, str) or _is_number(index):
            self._index = index if index is None else self._number(index)
            return
        if not isinstance(index, Tensor):
            places = [-1 if one is None else self._number(one) for one in index]
            index = torch.tensor(places, dtype=torch.int64, device=self.weight.device)
        elif index.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"{type(self).__name__}: adapter_index is {index.dtype}; it must be int64")
        elif index.device.type == "cpu" and index.numel():
            self._number(int(index.max()))
        self._index = index.to(torch.int64)

    def _number(self, one: int | str) -> int:
        if isinstance(one, str):
            self._check_name(one)
            return self.adapter_names.index(one)
        if one >= len(self.rank):
            raise ValueError(
                f"{type(self).__name__}: adapter_index is or holds {one}; there are {len(self.rank)} adapters, 0 to "
                f"{len(self.rank) - 1}"
            )
        return int(one)

    def forward(self, x: Tensor) -> Tensor:
        """``(..., in_features)`` to ``(..., out_features)``."""
        return self.product(x, self.bias)

    def product(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """What ``forward`` gives, with another bias or none."""
        index, names = self._index, self.adapter_names
        if index is None:
            if len(names) > 1:
                raise RuntimeError(
                    f"{type(self).__name__}: adapter_index is None, and there are the adapters {', '.join(names)}; set "
                    "it, or run under trifuse.adapters(model, index)"
                )
            index = len(names) - 1
        if not isinstance(index, Tensor):
            if index < 0:
                return F.linear(x, self.weight, bias)
            name = names[index]
            return ops.lora_linear(
                x, self.weight, bias, self.lora_A[name], self.lora_B[name], self.scale[name], training=self.training
            )
        # Not by the dictionaries of parameters, which look up each twice, nor by `scale`: many adapters are looked up
        # for few rows.
        A, B, alpha, rank, scaling = (
            self.lora_A._parameters, self.lora_B._parameters, self.alpha, self.rank, self.scaling,
        )  # fmt: skip
        scales = [
            alpha[name] / rank[name] if scaling[name] == "lora" else scale_of(alpha[name], rank[name], scaling[name])
            for name in names
        ]
        return ops.lora_linear_multi(
            x, self.weight, bias, [A[name] for name in names], [B[name] for name in names], scales,
            self._per_row(index, x),
        )  # fmt: skip

    def _per_row(self, index: Tensor, x: Tensor) -> Tensor:
        rows = x.shape[:-1]
        origin = None if torch.compiler.is_compiling() else _origin.get()
        index = index.to(x.device)
        if origin is not None:
            index = index[origin[: index.dim()]].view(rows)
        if index.shape != rows and index.dim() == 1 and rows and index.shape[0] == rows[0]:
            index = index.view(-1, *(1 for _ in rows[1:])).expand(rows)
        if index.shape != rows:
            raise ValueError(
                f"{type(self).__name__}: adapter_index has shape {tuple(index.shape)}; for x of shape "
                f"{tuple(x.shape)} it must be {tuple(rows[:1])} or {tuple(rows)}"
            )
        return index

    def extra_repr(self) -> str:
        each = ", ".join(f"{name}: rank {rank}" for name, rank in self.rank.items())
        return f"{super().extra_repr()}, adapters={{{each}}}"


@contextlib.contextmanager
def packed_from(texts: Tensor, positions: Tensor) -> Iterator[None]:
    """Within it the rows of x are positions of texts, packed, and ``adapter_index`` is still that of the texts."""
    token = _origin.set((texts, positions))
    try:
        yield
    finally:
        _origin.reset(token)


@contextlib.contextmanager
def adapters(model: nn.Module, index: Index) -> Iterator[None]:
    """Within it every ``MultiLoRALinear`` of a model has this ``adapter_index``; afterwards its own again. A backward
    pass that computes layers once more (activation checkpointing) belongs inside, too.

    Args:
        model: whatever holds the layers.
        index: a name or number for all rows, or per text (or row) a list of names or numbers, or an int64 tensor. None
            and numbers below 0 are the layer without an adapter, and so is a name that a layer has not and others have.

    Raises:
        ValueError: no layer has the name, a number is beyond the adapters, or the model has no such layer.
    """
    layers = [module for module in model.modules() if isinstance(module, MultiLoRALinear)]
    if not layers:
        raise ValueError("adapters: the model has no MultiLoRALinear; trifuse.apply_lora(..., kind='multi') makes them")
    named = [index] if isinstance(index, str) else [] if isinstance(index, Tensor) or _is_number(index) else index or ()
    known = {name for layer in layers for name in layer.adapter_names}
    for name in named:
        if isinstance(name, str) and name not in known:
            raise ValueError(f"adapters: no layer has an adapter {name!r}; there are {', '.join(sorted(known))}")
    before = [layer._index for layer in layers]
    try:
        for layer in layers:
            layer.adapter_index = _of_layer(layer, index)
        yield
    finally:
        for layer, own in zip(layers, before, strict=True):
            layer._index = own


def _of_layer(layer: MultiLoRALinear, index: Index) -> Index:
    """The index with -1 where the layer has no adapter of a name, or no name is given."""
    if index is None or isinstance(index, str):
        return index if index in layer.rank else -1
    if isinstance(index, Tensor) or _is_number(index):
        return index
    return [-1 if one is None or (isinstance(one, str) and one not in layer.rank) else one for one in index]


def _is_number(index: Any) -> bool:
    return isinstance(index, numbers.Integral) and not isinstance(index, bool)
