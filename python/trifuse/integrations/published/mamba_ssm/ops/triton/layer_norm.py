"""Layer norm and RMS norm of a residual sum, as plain torch."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["RMSNorm", "layer_norm_fn", "layer_norm_ref", "rms_norm_fn", "rms_norm_ref"]


def layer_norm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    x1: Tensor | None = None,
    weight1: Tensor | None = None,
    bias1: Tensor | None = None,
    eps: float = 1e-6,
    dropout_p: float = 0.0,
    rowscale: Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    is_rms_norm: bool = False,
    return_dropout_mask: bool = False,
):
    """Norm of ``residual + dropout(rowscale * x) + dropout(x1)``, computed in float32.

    Args:
        x: ``(..., D)``; x1, residual: the same shape, or None.
        weight, bias: ``(D,)``; weight1, bias1: of a second norm of the same sum, or None.
        rowscale: ``(...,)``, factors of x, or None; not together with x1.
        prenorm: also return the sum.
        residual_in_fp32: the sum in float32 where no residual came in; otherwise it has residual's dtype.
        return_dropout_mask: also return what was kept of x, and of x1 (None without it), as bool.

    Returns:
        y in x's dtype; then, in this order and as asked for: y1 (with weight1), the sum (with prenorm), two masks.
    """
    if x1 is not None and rowscale is not None:
        raise ValueError("layer_norm_fn: rowscale came with x1; it scales x alone, so it must be None")
    wide = torch.promote_types(x.dtype, torch.float32)
    total, kept = _dropped(x.to(wide) if rowscale is None else x.to(wide) * rowscale[..., None], dropout_p)
    kept1 = None
    if x1 is not None:
        dropped, kept1 = _dropped(x1.to(wide), dropout_p)
        total = total + dropped
    if residual is not None:
        total = total + residual.to(wide)
    if residual is None and not residual_in_fp32:
        carried = total.to(x.dtype)
    else:
        carried = total.to(wide if residual is None else residual.dtype)

    outputs = [_normalize(total, weight, bias, eps, is_rms_norm).to(x.dtype)]
    if weight1 is not None:
        outputs.append(_normalize(total, weight1, bias1, eps, is_rms_norm).to(x.dtype))
    if prenorm:
        outputs.append(carried)
    if return_dropout_mask:
        outputs += [kept, kept1]
    return outputs[0] if len(outputs) == 1 else tuple(outputs)


rms_norm_fn = partial(layer_norm_fn, is_rms_norm=True)


def layer_norm_ref(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    eps: float = 1e-6,
    prenorm: bool = False,
    upcast: bool = False,
    is_rms_norm: bool = False,
):
    """The norm of ``x + residual`` in the dtypes as they come, or in float32 with ``upcast``."""
    dtype = x.dtype
    if upcast:
        x, weight = x.float(), weight.float()
        bias, residual = (None if tensor is None else tensor.float() for tensor in (bias, residual))
    total = x if residual is None else x + residual
    y = _normalize(total.to(weight.dtype), weight, bias, eps, is_rms_norm).to(dtype)
    return (y, total) if prenorm else y


rms_norm_ref = partial(layer_norm_ref, is_rms_norm=True)


class RMSNorm(nn.Module):
    """RMS norm of a residual sum: ``forward(x, residual=None, prenorm=False, residual_in_fp32=False)``."""

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-5,
        dropout_p: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.eps = eps
        self.drop = nn.Dropout(dropout_p) if dropout_p > 0.0 else None
        self.weight = nn.Parameter(torch.empty(hidden_size, device=device, dtype=dtype))
        self.register_parameter("bias", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor, residual: Tensor | None = None, prenorm: bool = False, residual_in_fp32: bool = False):
        return rms_norm_fn(
            x, self.weight, self.bias, residual=residual, eps=self.eps, prenorm=prenorm,
            dropout_p=self.drop.p if self.drop is not None and self.training else 0.0,
            residual_in_fp32=residual_in_fp32,
        )  # fmt: skip


def _normalize(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, is_rms_norm: bool) -> Tensor:
    weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
    if not is_rms_norm:
        return F.layer_norm(x, x.shape[-1:], weight, bias, eps)
    y = F.rms_norm(x, x.shape[-1:], weight, eps)
    return y if bias is None else y + bias


def _dropped(x: Tensor, p: float) -> tuple[Tensor, Tensor]:
    if p == 0.0:
        return x, torch.ones(x.shape, dtype=torch.bool, device=x.device)
    kept = torch.rand(x.shape, device=x.device) >= p
    return x * kept / (1.0 - p), kept
