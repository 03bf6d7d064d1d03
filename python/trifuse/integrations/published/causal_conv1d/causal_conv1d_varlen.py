"""The last inputs of each of several packed sequences."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["causal_conv1d_varlen_states", "causal_conv1d_varlen_states_ref"]


def causal_conv1d_varlen_states(x: Tensor, cu_seqlens: Tensor, state_len: int) -> Tensor:
    """The convolution states that packed prompts leave.

    Args:
        x: ``(T, D)``, the inputs of S sequences one after another.
        cu_seqlens: ``(S + 1,)`` int32 or int64, their offsets.
        state_len: how many inputs to keep of each.

    Returns:
        ``(S, D, state_len)`` in x's dtype, newest last; zero where a sequence is shorter. Not differentiable.
    """
    ends = cu_seqlens[1:].to(torch.int64)
    places = ends[:, None] + torch.arange(-state_len, 0, device=x.device)  # (S, state_len)
    own = places >= cu_seqlens[:-1, None]
    if x.shape[0] == 0:
        return x.new_zeros(len(ends), x.shape[1], state_len)
    states = x.detach()[places.clamp(min=0)]
    return states.masked_fill(~own[:, :, None], 0).transpose(1, 2)


causal_conv1d_varlen_states_ref = causal_conv1d_varlen_states
