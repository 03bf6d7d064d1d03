"""The gated normalization in front of a Mamba-2 block's output projection."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["RMSNormGated"]


class RMSNormGated(nn.Module):
    """Root-mean-square normalization of groups of channels, with a gate before or after it.

    ``norm(x * silu(z))``, or with ``norm_before_gate`` ``norm(x) * silu(z)``, where per group of channels
    ``norm(x) = x / sqrt(mean(x ** 2) + eps) * weight``.

    Args:
        hidden_size: number of channels.
        eps: added to the mean of squares.
        group_size: channels per group, which divides ``hidden_size``; None is one group.
        norm_before_gate: gate after the normalization, not before it.
        device, dtype: of ``weight`` ``(hidden_size,)``, which starts at one.

    Source: Dao and Gu, "Transformers are SSMs", 2024, section 7.2; Zhang and Sennrich, "Root Mean Square Layer
    Normalization", 2019, equation 4.
    """

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-5,
        group_size: int | None = None,
        norm_before_gate: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if group_size is not None and (group_size < 1 or hidden_size % group_size):
            raise ValueError(f"RMSNormGated: group_size is {group_size}, which does not divide {hidden_size} channels")
        self.eps = eps
        self.group_size = group_size
        self.norm_before_gate = norm_before_gate
        self.weight = nn.Parameter(torch.ones(hidden_size, device=device, dtype=dtype))
        self.register_parameter("bias", None)

    def forward(self, x: Tensor, z: Tensor | None = None) -> Tensor:
        """Normalize x ``(..., hidden_size)``, gated by z of the same shape or by nothing; the dtype of x.

        Computed in float32, or in float64 for float64 x.
        """
        wide = torch.promote_types(x.dtype, torch.float32)
        y = x.to(wide)
        gate = None if z is None else F.silu(z.to(wide))
        if gate is not None and not self.norm_before_gate:
            y = y * gate
        size = self.group_size or x.shape[-1]
        groups = y.unflatten(-1, (-1, size)) if size < x.shape[-1] else y
        y = F.rms_norm(groups, (size,), eps=self.eps).view(x.shape) * self.weight
        if gate is not None and self.norm_before_gate:
            y = y * gate
        return y.to(x.dtype)

    def extra_repr(self) -> str:
        return (
            f"{self.weight.shape[0]}, eps={self.eps}, group_size={self.group_size}, "
            f"norm_before_gate={self.norm_before_gate}"
        )
