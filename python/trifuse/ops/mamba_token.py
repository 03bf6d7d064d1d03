"""``mamba_token``: one token through a Mamba block of plain layers in one call. Not public: ``nn.Mamba`` is.

It has no rooms of its own on the other floors because it computes nothing of its own: csrc/torch/mamba_token.cpp
strings together torch's products and the CPU kernels of ``causal_conv1d_update`` and ``selective_state_update``. Its
reference is the block's ordinary way, with which tests/test_mamba.py compares it; it is timed as ``nn.Mamba.step`` in
bench/bench_mamba_step.py. On other devices and in other dtypes the block takes the ordinary way.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from trifuse import _library, backends
from trifuse.registration import mamba_token as _  # noqa: F401

__all__ = ["mamba_token"]

_PLAIN = (Tensor, nn.Parameter, type(None))
_HAS_KERNEL = _library.missing("cpp") is None and _library.wrong_isa is None


def mamba_token(*tensors: Tensor | None) -> Tensor | None:
    """The block's output for the next token of every text, or None, and nothing moved, where no kernel takes these.

    Args:
        tensors: token ``(B, 1, d_model)``; conv_state ``(B, D, W)`` and ssm_state ``(B, D, N)``, moved on in place; the
            weights and biases of in_proj and conv1d, x_proj's weight, dt_proj's weight and bias, A_log ``(D, N)``,
            D ``(D,)``, and out_proj's weight and bias. None for a bias that is not there. All float32 on the CPU.

    No gradient is recorded. The statement of what it computes is ``nn.Mamba`` itself, on any other way. What can be
    found out in C++ is: between products that stream the weights through the caches every line of Python is a cold one.
    """
    if not _HAS_KERNEL or backends._forced.name not in (None, "cpp") or torch.is_autocast_enabled("cpu"):
        return None
    for one in tensors:  # a subclass may hold its numbers elsewhere
        if type(one) not in _PLAIN:
            return None
    out = torch.ops.trifuse.mamba_token.default(*tensors)
    return out if out.dim() == 3 else None
