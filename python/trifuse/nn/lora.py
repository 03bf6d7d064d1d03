"""A linear layer with a low-rank adapter, fused."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trifuse import ops
from trifuse.nn.low_rank import LowRank, take_over
from trifuse.ops.lora_linear import plain_inference

__all__ = ["LoRALinear"]


class LoRALinear(LowRank, nn.Linear):
    """``torch.nn.Linear`` with a low-rank adapter: ``x Wᵀ + bias + scale * (dropout(x) lora_Aᵀ) lora_Bᵀ``.

    ``weight`` ``(N, K)`` and ``bias`` ``(N,)`` are frozen, and a checkpoint of ``torch.nn.Linear`` loads; the adapter
    is ``lora_A`` ``(rank, K)`` and ``lora_B`` ``(N, rank)``, which starts at zero. ``merge()`` adds the update to
    ``weight`` and ``unmerge()`` gives every bit back; ``eval()`` does neither. ``state_dict()`` holds the base weight
    and the adapter whether the layer is merged or not, and a checkpoint that is loaded into a merged layer unmerges it.
    While merged, a forward pass with gradients raises: the adapter would get none.

    Args:
        in_features, out_features, bias, device, dtype: those of ``torch.nn.Linear``.
        rank: r, at least 1.
        alpha: the scale's numerator, by default the rank.
        dropout: the share of x's elements that the adapter does not see in training, in [0, 1).
        scaling: ``"lora"``: ``alpha / rank``; ``"rslora"``: ``alpha / sqrt(rank)``.
        adapter_dtype: of the adapter; by default float32 beside a half-precision weight, else the weight's.
        rows: which of the N outputs have the adapter: a slice, a range or ascending numbers; by default all.
            ``lora_B`` has a row for each of them.
        nested_ranks: ascending ranks, the last being `rank`: the update is the sum, over each of them, of the adapter
            made of that many first ranks with its own scale (Matryoshka LoRA); that is one factor per rank.

    Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021 (arXiv 2106.09685); Kalajdzievski, "A
    Rank Stabilization Scaling Factor for Fine-Tuning with LoRA", 2023 (arXiv 2312.03732).
    """

    rows: range | tuple[int, ...] | None
    _written_out = True  # whether a kind of layer computes what is written out in `forward`

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        names = ("product", "_fused", "factor", "scale", "_full_B")
        cls._written_out = all(getattr(cls, name) is getattr(LoRALinear, name) for name in names)

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
        nested_ranks: Sequence[int] | None = None,
    ):
        super().__init__(in_features, out_features, bias, device, dtype)
        if self.bias is not None:
            self.bias.requires_grad_(False)
        self._add_linear_adapter(
            rows, rank=rank, alpha=alpha, dropout=dropout, scaling=scaling, adapter_dtype=adapter_dtype,
            nested_ranks=nested_ranks,
        )  # fmt: skip

    @classmethod
    def from_linear(cls, linear: nn.Linear, **options: Any) -> Any:
        """A layer that does what `linear` does, with an adapter that has no effect yet.

        Args:
            linear: a ``torch.nn.Linear``. Its parameters are shared, not copied, and its weight is frozen; its bias
                stays as it was; hooks, mode and attributes are taken over.
            options: the arguments of this class from `rank` on.

        Raises:
            TypeError, ValueError: it is not a plain linear layer, or an option is wrong.
        """
        layer = take_over(cls, linear, nn.Linear)
        layer._add_linear_adapter(**{"rank": 8, "alpha": None, "dropout": 0.0, "scaling": "lora", **options})
        return layer

    def _add_linear_adapter(
        self,
        rows: slice | range | Sequence[int] | None = None,
        *,
        adapter_dtype: torch.dtype | None = None,
        nested_ranks: Sequence[int] | None = None,
        **options: Any,
    ) -> None:
        self.rows = selected_rows(type(self).__name__, rows, self.out_features)
        together = self.rows is None or (isinstance(self.rows, range) and self.rows.step == 1)
        place = None if together else torch.tensor(list(self.rows), device=self.weight.device)
        self.register_buffer("_places", place, persistent=False)
        count = None if self.rows is None else len(self.rows)
        self._add_adapter(**options, adapter_dtype=adapter_dtype, nested_ranks=nested_ranks, rows=count)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if "lora_A" in self._parameters:
            self.reset_lora_parameters()

    def _full_B(self) -> Tensor:
        B = self.lora_B
        if self.rows is None:
            return B
        if self._places is None:
            return F.pad(B, (0, 0, self.rows.start, self.out_features - self.rows.stop))
        return B.new_zeros(self.out_features, B.shape[1]).index_copy(0, self._places, B)

    def forward(self, x: Tensor) -> Tensor:
        """``(..., in_features)`` to ``(..., out_features)``."""
        # Beside one row's product, which empties the caches, every name that is looked up counts: the way that most
        # calls at inference take is written out, by the dictionaries that hold the names.
        own = self.__dict__
        of = own["_parameters"]
        if (
            own["_merge"] is None and own["rows"] is None and own["nested_ranks"] is None and "bias" in of
            and not torch.is_grad_enabled() and not (own["training"] and own["dropout"]) and self._written_out
        ):  # fmt: skip
            rank = self.active_rank
            scale = own["alpha"] / rank if own["scaling"] == "lora" else self.scale
            y = plain_inference(x, of.get("weight"), of["bias"], of.get("lora_A"), of.get("lora_B"), scale, rank)
            if y is not None:
                return y
        return self.product(x, self.bias)

    def product(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """What ``forward`` gives, with another bias or none."""
        if self.merged:
            self._check_merged_gradient()
            return F.linear(x, self.weight, bias)
        return self._fused(x, bias)

    def _fused(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return ops.lora_linear(
            x, self.weight, bias, self.lora_A, self._full_B(), self.factor(), active_rank=self.active_rank,
            frozen=self.frozen, dropout=self.dropout, training=self.training,
        )  # fmt: skip

    def to_linear(self, merged: bool = True) -> nn.Linear:
        """A plain ``torch.nn.Linear``: with the update in its weight, or without the adapter.

        Args:
            merged: True: a new weight that holds the update, rounded once. False: the weight without it, shared with
                this layer unless that is merged. The bias is shared.
        """
        weight = self.original_weight()
        if merged:
            weight = self.weight.detach().clone() if self.merged else self._added_to(weight.clone())
        linear = nn.Linear(self.in_features, self.out_features, bias=False, device="meta", dtype=weight.dtype)
        shared = not merged and not self.merged
        linear.weight = self.weight if shared else nn.Parameter(weight, requires_grad=self.weight.requires_grad)
        linear.bias = self.bias
        return linear.train(self.training)

    @torch.no_grad()
    def _added_to(self, weight: Tensor) -> Tensor:
        self._merged_into(weight, {})
        return weight


def selected_rows(name: str, rows: slice | range | Sequence[int] | None, out: int) -> range | tuple[int, ...] | None:
    """Rows in one form: None for all, a range where they are evenly spaced, or numbers."""
    if rows is None:
        return None
    if isinstance(rows, slice):
        rows = range(*rows.indices(out))
    chosen = [int(row) for row in rows]
    if not chosen:
        raise ValueError(f"{name}: rows is empty; it must choose some of the {out} outputs")
    steps = {b - a for a, b in pairwise(chosen)}
    if chosen[0] < 0 or chosen[-1] >= out or any(step < 1 for step in steps):
        raise ValueError(f"{name}: rows runs from {chosen[0]} to {chosen[-1]}; it must ascend within 0 to {out - 1}")
    if len(chosen) == out:
        return None
    if len(steps) > 1:
        return tuple(chosen)
    return range(chosen[0], chosen[-1] + 1, steps.pop() if steps else 1)
