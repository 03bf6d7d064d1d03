"""The Mamba block read in both directions of time."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from trifuse.nn import block
from trifuse.nn.convolution import convolve
from trifuse.nn.mamba import StepSizes, add_direction, scan, set_sizes

__all__ = ["BidirectionalMamba"]


class BidirectionalMamba(nn.Module):
    """A Mamba block whose channels are scanned forwards and backwards; the projections in and out are shared.

    Each direction has its own convolution, ``x_proj``, ``dt_proj``, ``A_log`` and ``D``; those of the backward one
    end in ``_b``, as in the checkpoints of Vision Mamba. The output is that of the two directions added up.
    No sequence is turned around: the scan runs backwards, and the convolution's window reaches forwards.

    Args:
        d_model, d_state, d_conv, expand, dt_rank, dt_min, dt_max, dt_init, dt_scale, dt_init_floor, conv_bias, bias,
            use_fast_path, layer_idx, device, dtype: those of ``Mamba``; both directions start alike. ``layer_idx``
            is kept and not used: there is no decoding step, since a text's end decides about its first token.
        if_divide_out: halve the sum of the directions.
        init_layer_scale: scale the output by a trained vector ``gamma`` that starts at this; None has none.

    The submodules are called, never read around, so wrapped ones (LoRA, quantization, hooks) are honoured.

    Source: Zhu et al., "Vision Mamba: Efficient Visual Representation Learning with Bidirectional State Space
    Model", 2024, algorithm 1.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: float = 2,
        dt_rank: int | str = "auto",
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init: str = "random",
        dt_scale: float = 1.0,
        dt_init_floor: float = 1e-4,
        conv_bias: bool = True,
        bias: bool = False,
        use_fast_path: bool = True,
        layer_idx: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        if_divide_out: bool = False,
        init_layer_scale: float | None = None,
    ):
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        set_sizes(self, d_model, d_state, d_conv, expand, dt_rank)
        self.use_fast_path = use_fast_path
        self.layer_idx = layer_idx
        self.if_divide_out = if_divide_out
        self.init_layer_scale = init_layer_scale
        if init_layer_scale is not None:
            self.gamma = nn.Parameter(torch.full((d_model,), float(init_layer_scale), **factory))
        self.in_proj = nn.Linear(d_model, 2 * self.d_inner, bias=bias, **factory)
        self.activation = "silu"
        self.act = nn.SiLU()
        steps = StepSizes(dt_init, dt_scale, dt_min, dt_max, dt_init_floor)
        add_direction(self, "", conv_bias, steps, **factory)
        add_direction(self, "_b", conv_bias, steps, **factory)
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=bias, **factory)

    def forward(
        self, hidden_states: Tensor, *, attention_mask: Tensor | None = None, cu_seqlens: Tensor | None = None
    ) -> Tensor:
        """Mix tokens along time, in both directions.

        Args:
            hidden_states: ``(B, L, d_model)``.
            attention_mask: ``(B, L)`` bool or numbers; where it is 0 stands padding, on the left, on the right or in
                between. Outputs and gradients are those of the texts without it; at padding the output is 0.
            cu_seqlens: ``(S + 1,)`` offsets of S texts packed in a batch of one; convolutions and scans
                stop at every boundary.

        Returns:
            ``(B, L, d_model)``.

        Raises:
            TypeError, ValueError: naming the argument, what it was and what it must be.
        """
        block.check_input("BidirectionalMamba", hidden_states, self.d_model, self.A_log.device)
        block.check_packing("BidirectionalMamba", hidden_states, attention_mask, cu_seqlens)
        if attention_mask is not None:
            return block.without_padding(hidden_states, attention_mask, self._mix)
        return self._mix(hidden_states, cu_seqlens)

    def _mix(self, hidden_states: Tensor, cu_seqlens: Tensor | None) -> Tensor:
        x, z = self.in_proj(hidden_states).chunk(2, dim=-1)
        y = scan(
            convolve(self.conv1d, self.d_conv, x, cu_seqlens=cu_seqlens), z, self.x_proj, self.dt_proj, self.A_log,
            self.D, cu_seqlens=cu_seqlens,
        ) + scan(
            convolve(self.conv1d_b, self.d_conv, x, cu_seqlens=cu_seqlens, reverse=True), z, self.x_proj_b,
            self.dt_proj_b, self.A_b_log, self.D_b, cu_seqlens=cu_seqlens, reverse=True,
        )  # fmt: skip
        out = self.out_proj(y / 2 if self.if_divide_out else y)
        return out * self.gamma if self.init_layer_scale is not None else out
