"""The torch op behind ``trifuse.optim.LowRankAdamW``: its schema, its fake kernel, and who can serve what."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trifuse.backends import Op
from trifuse.registration import common

# One step of AdamW of many parameters. Of each, ranks first <= i < last along the axis rank_dim are stepped; steps (r,)
# float32 counts how often. exp_avgs and exp_avg_sqs in the accumulation dtype; everything is contiguous.
_SCHEMA = (
    "(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, Tensor(d!)[] steps,"
    " int[] rank_dims, int[] first, int[] last, float[] lrs, float beta1, float beta2, float eps, float weight_decay,"
    " bool maximize) -> ()"
)


def _fake(params, grads, exp_avgs, exp_avg_sqs, steps, rank_dims, first, last, lrs, beta1, beta2, eps, weight_decay,
          maximize) -> None:  # fmt: skip
    return None


common.define("lora_adamw", _SCHEMA, _fake)
common.implement_triton("lora_adamw", "lora_adamw")


def _memory_refusals(call: Any) -> list[str]:
    for at, param in enumerate(call.params):
        if not param.is_contiguous():
            return [f"it takes contiguous parameters, and parameter {at} has strides {tuple(param.stride())}"]
    return []


def _gpu_refusals(call: Any) -> list[str]:
    reasons = _memory_refusals(call)
    if any(param.dtype == torch.float64 for param in call.params):
        reasons.append("it computes in float32, and a parameter is float64")
    return reasons


def _cpp_refusals(call: Any) -> list[str]:
    return common.cpp_refusals(call) + _memory_refusals(call)


def _cuda_refusals(call: Any) -> list[str]:
    return common.cuda_refusals(call) + _gpu_refusals(call)


def _triton_refusals(call: Any) -> list[str]:
    half = next((one for one in call.params if one.dtype == torch.bfloat16), call.params[0])
    return common.triton_refusals(call, half) + _gpu_refusals(call)


def register_backends(op: Op) -> None:
    op.backend("cpp", _cpp_refusals)
    op.backend("cuda", _cuda_refusals)
    op.backend("triton", _triton_refusals)


def step(backend: str, call: Any) -> None:
    """Run a checked call on a native backend."""
    ops = torch.ops.trifuse
    (ops.lora_adamw_triton if backend == "triton" else ops.lora_adamw)(*call)
    changed: list[Tensor] = [*call.params, *call.exp_avgs, *call.exp_avg_sqs, *call.steps]
    torch.autograd.graph.increment_version([one for one in changed if not one.is_inference()])
