"""The torch op behind ``ops.mamba_token``: its schema and its fake kernel. It has a CPU kernel and no gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from trifuse._library import LIB

_SCHEMA = (
    "(Tensor token, Tensor(a!) conv_state, Tensor(b!) ssm_state, Tensor in_weight, Tensor? in_bias, "
    "Tensor conv_weight, Tensor? conv_bias, Tensor x_weight, Tensor dt_weight, Tensor? dt_bias, Tensor A_log, "
    "Tensor D, Tensor out_weight, Tensor? out_bias) -> Tensor"
)


def _fake(token, conv_state, ssm_state, in_weight, in_bias, conv_weight, conv_bias, x_weight, dt_weight, dt_bias, A_log,
          D, out_weight, out_bias) -> Tensor:  # fmt: skip
    return token.new_empty((token.shape[0], 1, out_weight.shape[0]))


LIB.define("mamba_token" + _SCHEMA)
torch.library.register_fake("trifuse::mamba_token", _fake, lib=LIB)
