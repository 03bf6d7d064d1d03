"""A transformer layer on Gaussian attention."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trifuse.nn.gaussian import MultiHeadGaussianAdaptiveAttention
from trifuse.nn.gaussian_multihead import MultiheadGaussianAttention

__all__ = ["GaussianTransformerLayer"]

ACTIVATIONS = {"relu": F.relu, "gelu": F.gelu}


class GaussianTransformerLayer(nn.Module):
    """A transformer encoder layer whose attention goes by distance or through a window, with features reweighed.

    Self-attention, a feed-forward network and, with ``gaam_heads``, Gaussian adaptive attention over the features,
    each added to its input. It stands in ``torch.nn.TransformerEncoder`` and loads the ``state_dict`` of a
    ``torch.nn.TransformerEncoderLayer`` (strictly, without ``gaam_heads``).

    Args:
        d_model, nhead, dim_feedforward, activation, layer_norm_eps, batch_first, norm_first, bias, device, dtype: as
            of ``torch.nn.TransformerEncoderLayer``.
        dropout: of the sublayers' outputs and inside the feed-forward network.
        attention_dropout: of the attention's weights; above 0 training stores the (L, L) matrix.
        kind, gamma, sigma: of ``trifuse.nn.MultiheadGaussianAttention``.
        gaam_heads: heads of the Gaussian adaptive attention over the features of a position; 0: there is none.
        gaam_gaussians: Gaussians of each of these heads.

    Source: Vaswani et al., "Attention Is All You Need", 2017, section 3; Xiong et al., "On Layer Normalization in the
    Transformer Architecture", 2020 (``norm_first``); Ioannides et al., "Gaussian Adaptive Attention Is All You Need",
    2024 (the attention over features).
    """

    def __init__(
        self,
        d_model: int,
        nhead: int,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: str | Callable[[Tensor], Tensor] = F.relu,
        layer_norm_eps: float = 1e-5,
        batch_first: bool = False,
        norm_first: bool = False,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        kind: str = "rbf",
        gamma: float | Sequence[float] | None = None,
        sigma: float | Sequence[float] | None = None,
        attention_dropout: float = 0.0,
        gaam_heads: int = 0,
        gaam_gaussians: int = 3,
    ) -> None:
        super().__init__()
        if isinstance(activation, str):
            if activation not in ACTIVATIONS:
                raise ValueError(
                    f'GaussianTransformerLayer: activation is {activation!r}; it must be "relu", "gelu" or callable'
                )
            activation = ACTIVATIONS[activation]
        if not 0 <= gaam_heads <= d_model:
            raise ValueError(
                f"GaussianTransformerLayer: gaam_heads is {gaam_heads}; it must be from 0 to d_model, {d_model}"
            )
        factory = {"device": device, "dtype": dtype}
        self.self_attn = MultiheadGaussianAttention(
            d_model, nhead, attention_dropout, bias, batch_first=batch_first, kind=kind, gamma=gamma, sigma=sigma,
            **factory,
        )  # fmt: skip
        self.linear1 = nn.Linear(d_model, dim_feedforward, bias=bias, **factory)
        self.dropout = nn.Dropout(dropout)
        self.linear2 = nn.Linear(dim_feedforward, d_model, bias=bias, **factory)
        self.norm_first = norm_first
        self.norm1 = nn.LayerNorm(d_model, eps=layer_norm_eps, bias=bias, **factory)
        self.norm2 = nn.LayerNorm(d_model, eps=layer_norm_eps, bias=bias, **factory)
        self.dropout1 = nn.Dropout(dropout)
        self.dropout2 = nn.Dropout(dropout)
        self.activation = activation
        self.gaam = self.norm3 = self.dropout3 = None
        if gaam_heads:
            self.gaam = MultiHeadGaussianAdaptiveAttention(-1, gaam_heads, gaam_gaussians, **factory)
            self.norm3 = nn.LayerNorm(d_model, eps=layer_norm_eps, bias=bias, **factory)
            self.dropout3 = nn.Dropout(dropout)

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """Run the layer.

        Args:
            src: ``(L, B, d_model)``, ``(B, L, d_model)`` with ``batch_first``, or unbatched ``(L, d_model)``.
            src_mask, src_key_padding_mask, is_causal: as ``attn_mask``, ``key_padding_mask`` and ``is_causal`` of
                ``trifuse.nn.MultiheadGaussianAttention``.

        Returns:
            The shape and dtype of src.
        """

        def attend(x: Tensor) -> Tensor:
            out, _ = self.self_attn(
                x, x, x, attn_mask=src_mask, key_padding_mask=src_key_padding_mask, need_weights=False,
                is_causal=is_causal,
            )  # fmt: skip
            return self.dropout1(out)

        x = self._add(src, self.norm1, attend)
        x = self._add(x, self.norm2, self._feed_forward)
        return x if self.gaam is None else self._add(x, self.norm3, lambda y: self.dropout3(self.gaam(y)))

    def _add(self, x: Tensor, norm: nn.Module, sublayer: Callable[[Tensor], Tensor]) -> Tensor:
        return x + sublayer(norm(x)) if self.norm_first else norm(x + sublayer(x))

    def _feed_forward(self, x: Tensor) -> Tensor:
        return self.dropout2(self.linear2(self.dropout(self.activation(self.linear1(x)))))
