"""transformers' Conv1D, a linear layer that keeps its weight transposed, with a low-rank adapter.

The module imports transformers: it is for models that have such layers.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from trifuse import ops
from trifuse.nn.low_rank import LowRank, take_over

__all__ = ["LoRATransposed"]


class LoRATransposed(LowRank, Conv1D):
    """transformers' ``Conv1D`` with a low-rank adapter; ``weight`` is ``(K, N)``, as GPT-2's checkpoints have it.

    ``lora_A`` is ``(rank, K)``, ``lora_B`` ``(N, rank)``. Merging and checkpoints are as in ``nn.LoRALinear``.
    """

    @classmethod
    def from_conv1d(cls, layer: Conv1D, rank: int = 8, **options: Any) -> LoRATransposed:
        """A layer that does what `layer` does, with an adapter that has no effect yet.

        Args:
            layer: its parameters are shared, not copied, and its weight is frozen.
            rank, options: as in ``nn.LoRALinear``: alpha, dropout, scaling, adapter_dtype.
        """
        new = take_over(cls, layer, Conv1D)
        new._add_adapter(rank, **{"alpha": None, "dropout": 0.0, "scaling": "lora", "adapter_dtype": None, **options})
        return new

    def _matrix(self, weight: Tensor) -> Tensor:
        return weight.t()

    def original_weight(self) -> Tensor:
        return self._kept().t() if self.merged else self.weight.detach()

    def forward(self, x: Tensor) -> Tensor:
        """``(..., K)`` to ``(..., N)``."""
        if self.merged:
            self._check_merged_gradient()
            return F.linear(x, self.weight.t(), self.bias)
        return ops.lora_linear(
            x, self.weight.t(), self.bias, self.lora_A, self.lora_B, self.factor(), dropout=self.dropout,
            training=self.training,
        )  # fmt: skip
