"""The scans that people use today, called the way their own packages call them.

Each gets its inputs in its own layout, so that no transposition is charged to it.
"""

from __future__ import annotations

import functools
import importlib

import torch
import torch.nn.functional as F
from torch import Tensor

from trifuse.report.workloads import Inputs


def _step(state: Tensor, dt: Tensor, x: Tensor, A: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
    state = torch.exp(dt[..., None] * A) * state + (dt * x)[..., None] * B[:, None, :]
    return state, (state * C[:, None, :]).sum(-1)


@functools.cache
def _compiled_step():
    # One version per shape and gradient mode; at torch's own limit it would fall back to eager.
    torch._dynamo.config.recompile_limit = 256
    return torch.compile(_step, dynamic=False)


def loop_compiled(inputs: Inputs) -> Tensor:
    """The reference's time loop with its body fused by torch.compile, in "bld".

    The whole loop cannot be compiled: 2048 unrolled steps take the compiler longer than any run. The
    sequences are unbound once, which spares autograd the full-size gradient per step that indexing
    costs the reference.
    """
    step = _compiled_step()
    dt = F.softplus(inputs.delta + inputs.delta_bias)
    batch, _, dim = inputs.u.shape
    state = torch.zeros(batch, dim, inputs.A.shape[1], device=inputs.u.device)
    ys = []
    for d, x, b, c in zip(dt.unbind(1), inputs.u.unbind(1), inputs.B.unbind(1), inputs.C.unbind(1), strict=True):
        state, y = step(state, d, x, inputs.A, b, c)
        ys.append(y)
    return (torch.stack(ys, 1) + inputs.D * inputs.u) * F.silu(inputs.z)


def mambapy(inputs: Inputs) -> Tensor:
    """mambapy's ``MambaBlock.selective_scan`` (which does not use its block) with its gate after it."""
    block = importlib.import_module("mambapy.mamba").MambaBlock
    dt = F.softplus(inputs.delta + inputs.delta_bias)
    y = block.selective_scan(None, inputs.u, dt, inputs.A, inputs.B, inputs.C, inputs.D)
    return y * F.silu(inputs.z)


@functools.cache
def transformers_missing(device: str) -> str | None:
    try:
        module = importlib.import_module("transformers.models.mamba.modeling_mamba")
    except Exception as error:  # a half-installed transformers fails in many ways at import
        return f"transformers' Mamba could not be imported: {error}"
    if not hasattr(module, "mamba_selective_scan"):
        return "this version of transformers has no scan function of its own (mamba_selective_scan)"
    return None


def transformers(inputs: Inputs) -> Tensor:
    module = importlib.import_module("transformers.models.mamba.modeling_mamba")
    return module.mamba_selective_scan(
        inputs.u, inputs.delta, inputs.A, inputs.B, inputs.C, D=inputs.D, z=inputs.z,
        delta_bias=inputs.delta_bias, delta_softplus=True,
    )  # fmt: skip


def transformers_update(arguments: tuple) -> Tensor:
    module = importlib.import_module("transformers.models.mamba.modeling_mamba")
    state, x, dt, A, B, C, D, z, dt_bias = arguments
    with torch.no_grad():
        return module.mamba_selective_state_update(state, x, dt, A, B, C, D=D, z=z, dt_bias=dt_bias, dt_softplus=True)


class _PublishedScan(torch.autograd.Function):
    """``selective_scan_cuda`` without the Python package around it, which imports much else."""

    @staticmethod
    def forward(ctx, u, delta, A, B, C, D, z, delta_bias):
        kernels = importlib.import_module("selective_scan_cuda")
        B, C = B.unsqueeze(1), C.unsqueeze(1)
        out, states, gated = kernels.fwd(u, delta, A, B, C, D, z, delta_bias, True)
        ctx.save_for_backward(u, delta, A, B, C, D, z, delta_bias, states, out)
        return gated

    @staticmethod
    def backward(ctx, dout):
        kernels = importlib.import_module("selective_scan_cuda")
        u, delta, A, B, C, D, z, delta_bias, states, out = ctx.saved_tensors
        du, ddelta, dA, dB, dC, dD, ddelta_bias, dz = kernels.bwd(
            u, delta, A, B, C, D, z, delta_bias, dout.contiguous(), states, out, None, True, False
        )
        return du, ddelta, dA, dB.squeeze(1), dC.squeeze(1), dD, dz, ddelta_bias


@functools.cache
def mamba_ssm_missing(device: str) -> str | None:
    try:
        importlib.import_module("selective_scan_cuda")
    except Exception as error:
        return f"mamba_ssm's compiled scan is neither installed nor in .rivals/: {error}"
    return None


def mamba_ssm(inputs: Inputs) -> Tensor:
    return _PublishedScan.apply(
        inputs.u, inputs.delta, inputs.A, inputs.B, inputs.C, inputs.D, inputs.z, inputs.delta_bias
    )
