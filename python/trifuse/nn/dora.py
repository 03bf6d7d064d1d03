"""A linear layer with a weight-decomposed low-rank adapter, fused."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from trifuse import ops
from trifuse.nn.lora import LoRALinear

__all__ = ["DoRALinear"]


class DoRALinear(LoRALinear):
    """``torch.nn.Linear`` whose weight has a low-rank update and a trained length of each row.

    The weight in effect is ``lora_magnitude * V / |V|`` row by row, ``V = weight + scale * lora_B lora_A``; the length
    ``|V|`` counts as a constant in the backward pass. ``lora_magnitude`` ``(N,)`` starts at the lengths of the weight's
    rows, also when a plain layer's checkpoint is loaded, so that the adapter has no effect yet. Merging and checkpoints
    are as in ``LoRALinear``.

    Args:
        in_features, out_features, bias, device, dtype, rank, alpha, dropout, scaling, adapter_dtype: those of
            ``LoRALinear``.

    Source: Liu et al., "DoRA: Weight-Decomposed Low-Rank Adaptation", 2024 (arXiv 2402.09353), sections 4.1 and 4.3.
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
    ):
        super().__init__(
            in_features, out_features, bias, device, dtype, rank=rank, alpha=alpha, dropout=dropout, scaling=scaling,
            adapter_dtype=adapter_dtype,
        )  # fmt: skip

    def _add_adapter(self, *args: Any, **options: Any) -> None:
        if self.rows is not None or options.get("nested_ranks") is not None:
            raise ValueError("DoRALinear: rows and nested_ranks came; they are options of LoRALinear only")
        super()._add_adapter(*args, **options)
        self.lora_magnitude = nn.Parameter(torch.empty(self.out_features, device=self.weight.device,
                                                       dtype=self.lora_A.dtype))  # fmt: skip
        self.reset_magnitude()

    def reset_lora_parameters(self) -> None:
        super().reset_lora_parameters()
        if "lora_magnitude" in self._parameters:
            self.reset_magnitude()

    @torch.no_grad()
    def reset_magnitude(self) -> None:
        """Set ``lora_magnitude`` to the lengths of the rows as they are now: the layer then adds its update only."""
        self.lora_magnitude.copy_(self._lengths(self.original_weight()))

    def _lengths(self, weight: Tensor) -> Tensor:
        A, B, factor = self._update()
        return ops.dora_norm(weight, A, B, factor)

    def _fused(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return ops.dora_linear(
            x, self.weight, bias, self.lora_A, self.lora_B, self.lora_magnitude, self.scale, dropout=self.dropout,
            training=self.training,
        )  # fmt: skip

    def merge(self, *, rounding: str = "nearest", seed: int | None = None) -> None:
        """As ``LoRALinear.merge``; the rows are also scaled, and rounding is to the nearest."""
        if rounding != "nearest":
            raise ValueError(f'DoRALinear: rounding is {rounding!r}; it must be "nearest"')
        super().merge(rounding=rounding, seed=seed)

    def swap(
        self, lora_A: Tensor, lora_B: Tensor, scale: float | None = None, *, magnitude: Tensor | None = None
    ) -> None:
        """As ``LoRALinear.swap``, and with `magnitude` ``(N,)`` for ``lora_magnitude``, which by default stays."""
        self._check_swap(lora_A, lora_B, scale)
        if magnitude is not None:
            if magnitude.shape != self.lora_magnitude.shape:
                was, must = tuple(magnitude.shape), tuple(self.lora_magnitude.shape)
                raise ValueError(f"DoRALinear: magnitude has shape {was}; it must be {must}")
            with torch.no_grad():
                self.lora_magnitude.copy_(magnitude)
        super().swap(lora_A, lora_B, scale)

    # The rows are scaled, which is no low-rank update: a merge keeps a copy of the weight.

    def _merged_into(self, matrix: Tensor, options: dict[str, Any]) -> Tensor:
        kept = matrix.clone()
        A, B, factor = self._update()
        wide = torch.promote_types(matrix.dtype, torch.float32)
        lengths = self._lengths(matrix).to(wide)
        ratio = torch.where(lengths > 0, self.lora_magnitude.to(wide) / torch.where(lengths > 0, lengths, 1), 0)
        for start in range(0, matrix.shape[0], 1024):  # a few rows at a time in float32
            part = slice(start, start + 1024)
            whole = torch.addmm(matrix[part].to(wide), B[part].to(wide), A.to(wide), alpha=factor)
            matrix[part] = whole * ratio[part, None]
        return kept

    @torch.no_grad()
    def _merged_again(self) -> None:
        self._restore(self.weight.detach())
        self._merge = self._merged_into(self.weight.detach(), {})

    def _kept(self) -> Tensor:
        return self._merge

    @torch.no_grad()
    def _restore(self, matrix: Tensor) -> None:
        matrix.copy_(self._merge)

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *rest: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *rest)
        if prefix + "weight" in state_dict and prefix + "lora_magnitude" not in state_dict:
            self.reset_magnitude()
