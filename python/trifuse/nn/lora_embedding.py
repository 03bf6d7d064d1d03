"""An embedding with a low-rank adapter."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trifuse.nn.low_rank import LowRank, take_over

__all__ = ["LoRAEmbedding"]


class LoRAEmbedding(LowRank, nn.Embedding):
    """``torch.nn.Embedding`` with a low-rank adapter: row i is ``weight[i] + scale * lora_B lora_A[:, i]``.

    ``weight`` ``(num, dim)`` is frozen; ``lora_A`` is ``(rank, num)`` and starts at zero, ``lora_B`` is ``(dim, rank)``
    and starts normal. Only the rows that are looked up are computed. Merging and checkpoints are as in ``LoRALinear``.

    Args:
        num_embeddings, embedding_dim, padding_idx, scale_grad_by_freq, device, dtype: those of ``torch.nn.Embedding``.
        rank, alpha, scaling, adapter_dtype: as in ``LoRALinear``. There is no dropout.

    Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021 (arXiv 2106.09685).
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        scale_grad_by_freq: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        rank: int = 8,
        alpha: float | None = None,
        scaling: str = "lora",
        adapter_dtype: torch.dtype | None = None,
    ):
        super().__init__(
            num_embeddings, embedding_dim, padding_idx, scale_grad_by_freq=scale_grad_by_freq, device=device,
            dtype=dtype,
        )  # fmt: skip
        self._add_adapter(rank, alpha, 0.0, scaling, adapter_dtype)

    @classmethod
    def from_embedding(cls, embedding: nn.Embedding, **options: Any) -> Any:
        """An embedding that does what `embedding` does, with an adapter that has no effect yet.

        Args:
            embedding: a ``torch.nn.Embedding``. Its weight is shared, and frozen.
            options: the arguments of this class from `rank` on.

        Raises:
            TypeError, ValueError: it is not a plain embedding, it changes its weight (``max_norm``), or an option is
                wrong.
        """
        layer = take_over(cls, embedding, nn.Embedding)
        if layer.max_norm is not None:
            raise ValueError(f"{cls.__name__}: max_norm is {layer.max_norm}; it must be None: the weight is frozen")
        layer._add_adapter(
            options.pop("rank", 8), options.pop("alpha", None), 0.0, options.pop("scaling", "lora"),
            options.pop("adapter_dtype", None), **options,
        )  # fmt: skip
        return layer

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if "lora_A" in self._parameters:
            self.reset_lora_parameters()

    def reset_lora_parameters(self) -> None:
        """Set ``lora_A`` to zero and draw ``lora_B`` anew."""
        super().reset_lora_parameters()
        with torch.no_grad():
            self.lora_A.zero_()
            self.lora_B.normal_()

    def _factor_sizes(self) -> tuple[int, int]:
        return self.embedding_dim, self.num_embeddings

    def _update(self) -> tuple[Tensor, Tensor, float]:
        return self.lora_B.t().contiguous(), self.lora_A.t().contiguous(), self.scale

    def forward(self, index: Tensor) -> Tensor:
        """``(...)`` whole numbers to ``(..., embedding_dim)``."""
        options = {"padding_idx": self.padding_idx, "scale_grad_by_freq": self.scale_grad_by_freq}
        if self.merged:
            self._check_merged_gradient()
            return F.embedding(index, self.weight, **options)
        rows = F.embedding(index, self.weight, **options)
        wide = torch.promote_types(rows.dtype, torch.float32)
        with torch.autocast(rows.device.type, enabled=False):
            update = F.embedding(index, self.lora_A.t(), **options).to(wide) @ (self.lora_B.t().to(wide) * self.scale)
        return (rows + update).to(rows.dtype)

    def to_embedding(self) -> nn.Embedding:
        """A plain ``torch.nn.Embedding`` with the update in its weight."""
        weight = self.weight.detach().clone()
        if not self.merged:
            with torch.no_grad():
                self._merged_into(self._matrix(weight), {})
        plain = nn.Embedding(
            self.num_embeddings, self.embedding_dim, self.padding_idx, scale_grad_by_freq=self.scale_grad_by_freq,
            _weight=weight,
        )  # fmt: skip
        plain.weight.requires_grad_(self.weight.requires_grad)
        return plain.train(self.training)
