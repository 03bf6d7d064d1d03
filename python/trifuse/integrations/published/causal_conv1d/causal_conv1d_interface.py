"""The convolution of sequences and of single tokens; ``*_ref`` are trifuse's references."""

from __future__ import annotations

from torch import Tensor

import trifuse

__all__ = ["causal_conv1d_fn", "causal_conv1d_ref", "causal_conv1d_update", "causal_conv1d_update_ref"]


def causal_conv1d_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    seq_idx: Tensor | None = None,
    initial_states: Tensor | None = None,
    return_final_states: bool = False,
    final_states_out: Tensor | None = None,
    activation: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """``trifuse.causal_conv1d`` of x ``(B, D, L)``; ``final_states_out`` is written to, if given, and returned."""
    out = trifuse.causal_conv1d(
        x, weight, bias, seq_idx=seq_idx, initial_states=initial_states, return_final_states=return_final_states,
        activation=activation,
    )  # fmt: skip
    if not return_final_states or final_states_out is None:
        return out
    return out[0], final_states_out.copy_(out[1])


def causal_conv1d_ref(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    return_final_states: bool = False,
    final_states_out: Tensor | None = None,
    activation: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """``causal_conv1d_fn`` on the reference backend."""
    with trifuse.backend("reference"):
        return causal_conv1d_fn(
            x, weight, bias, None, initial_states, return_final_states, final_states_out, activation
        )


def causal_conv1d_update(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    cache_seqlens: Tensor | None = None,
    conv_state_indices: Tensor | None = None,
) -> Tensor:
    """``trifuse.causal_conv1d_update``: x ``(B, D)`` or ``(B, D, L)``, ``conv_state`` changed in place."""
    return trifuse.causal_conv1d_update(
        x, conv_state, weight, bias, activation, cache_seqlens=cache_seqlens, conv_state_indices=conv_state_indices
    )


def causal_conv1d_update_ref(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    cache_seqlens: Tensor | None = None,
) -> Tensor:
    """``causal_conv1d_update`` on the reference backend."""
    with trifuse.backend("reference"):
        return causal_conv1d_update(x, conv_state, weight, bias, activation, cache_seqlens)
