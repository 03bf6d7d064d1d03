"""``mamba_token``: one token through a Mamba block of plain layers in one call. Not public: ``nn.Mamba`` is."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from trifuse import _library
from trifuse.backends import forced_backend
from trifuse.registration import mamba_token as _  # noqa: F401

__all__ = ["mamba_token"]

_PLAIN = (Tensor, nn.Parameter)


def mamba_token(*tensors: Tensor | None) -> Tensor | None:
    """The block's output for the next token of every text, or None where there is no kernel for these tensors.

    Args:
        tensors: token ``(B, d_model)``; conv_state ``(B, D, K)`` and ssm_state ``(B, D, N)``, moved on in place; the
            weights and biases of in_proj and conv1d, x_proj's weight, dt_proj's weight and bias, A_log ``(D, N)``,
            D ``(D,)``, and out_proj's weight and bias. None for a bias that is not there. All float32 on the CPU.

    No gradient is recorded. The statement of what it computes is ``nn.Mamba`` itself, on any other way.
    """
    if torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu") or forced_backend() not in (None, "cpp"):
        return None
    float32 = torch.float32
    for one in tensors:  # a subclass may hold its numbers elsewhere
        if one is not None and (type(one) not in _PLAIN or one.dtype is not float32 or not one.is_cpu):
            return None
    states, weights = tensors[1:3], tensors[5:7] + tensors[9:10]
    if any(0 in state.stride() for state in states) or not all(w is None or w.is_contiguous() for w in weights):
        return None
    if _library.missing("cpp") is not None or _library.wrong_isa is not None:
        return None
    return torch.ops.trifuse.mamba_token.default(*tensors)
