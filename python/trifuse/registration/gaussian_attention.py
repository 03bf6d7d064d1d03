"""The torch ops behind ``gaussian_attention``: schemas, fake kernels, autograd, and who can serve what."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from trifuse._library import LIB
from trifuse.backends import Op
from trifuse.registration import common

_INPUTS = (
    "Tensor q, Tensor k, Tensor v, Tensor? gamma, Tensor? center, Tensor? sigma, Tensor? attn_mask, "
    "Tensor? key_padding_mask, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k"
)
_FLAGS = "float scale, bool is_causal, bool normalized"
_FWD = f"({_INPUTS}, {_FLAGS}) -> (Tensor out, Tensor lse, Tensor lse_rest)"
_BWD = (
    f"(Tensor dout, Tensor? dlse, {_INPUTS}, Tensor out, Tensor lse, Tensor lse_rest, {_FLAGS}) -> "
    "(Tensor dq, Tensor dk, Tensor dv, Tensor dgamma, Tensor dcenter, Tensor dsigma)"
)

_N_TENSORS = 10
# lse_rest (B, H, L) is what lse lost when it was rounded: where logits are large, exp(logit - lse) of a whole row would
# be wrong by ulp(lse), and exp((logit - lse) - lse_rest) is not.


def _fwd_fake(q, k, v, gamma, center, sigma, attn_mask, key_padding_mask, cu_seqlens_q, cu_seqlens_k, scale,
              is_causal, normalized):  # fmt: skip
    lse, lse_rest = (q.new_empty(q.shape[:3], dtype=common.accumulation_dtype(q)) for _ in range(2))
    return q.new_empty((*q.shape[:3], v.shape[3])), lse, lse_rest


def _bwd_fake(dout, dlse, q, k, v, gamma, center, sigma, attn_mask, key_padding_mask, cu_seqlens_q, cu_seqlens_k, out,
              lse, lse_rest, scale, is_causal, normalized):  # fmt: skip
    def like(tensor: Tensor | None) -> Tensor:
        return lse.new_empty((0,) if tensor is None else tensor.shape)

    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), like(gamma), like(center), like(sigma)


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.save_for_backward(*inputs[:_N_TENSORS], *output)
    ctx.flags = inputs[_N_TENSORS:]
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)


def _backward(bwd_name: str, ctx: Any, dout: Tensor | None, dlse: Tensor | None, _: Tensor | None) -> tuple:
    nothing = (None,) * (_N_TENSORS + len(ctx.flags))
    if dout is None and dlse is None:
        return nothing
    saved = ctx.saved_tensors
    out = saved[_N_TENSORS]
    if dout is None:
        dout = torch.zeros((), dtype=out.dtype, device=out.device).expand(out.shape)
    grads = getattr(torch.ops.trifuse, bwd_name)(dout, dlse, *saved, *ctx.flags)
    given = [None if tensor is None else grad for tensor, grad in zip(saved[:6], grads, strict=True)]
    return (*given, *nothing[6:])


common.define("gaussian_attention_fwd", _FWD, _fwd_fake)
common.define("gaussian_attention_bwd", _BWD, _bwd_fake)
for _suffix in common.SUFFIXES:
    fwd, bwd = f"gaussian_attention_fwd{_suffix}", f"gaussian_attention_bwd{_suffix}"
    torch.library.register_autograd(
        f"trifuse::{fwd}", functools.partial(_backward, bwd), setup_context=_setup_context, lib=LIB
    )
    torch.library.register_autograd(f"trifuse::{bwd}", common.no_second_derivative("gaussian_attention"), lib=LIB)
common.implement_triton("gaussian_attention", "gaussian_attention_fwd", "gaussian_attention_bwd")


def _mask_refusals(call: Any) -> list[str]:
    mask = call.attn_mask
    if mask is not None and mask.requires_grad and torch.is_grad_enabled():
        return ["it gives no gradient to attn_mask, which requires one; the reference does"]
    return []


def _cpp_refusals(call: Any) -> list[str]:
    return common.cpp_refusals(call) + _mask_refusals(call)


def _cuda_refusals(call: Any) -> list[str]:
    return ["gaussian_attention has no kernel in CUDA C++; the Triton kernel is its backend on a GPU"]


def _triton_refusals(call: Any) -> list[str]:
    reasons = common.triton_refusals(call, call.q) + _mask_refusals(call)
    if call.q.dtype == torch.float64:
        reasons.append("it computes in float32, and the inputs are float64")
    for name, size in (("q and k", call.q.shape[3]), ("v", call.v.shape[3])):
        if size > TRITON_LARGEST_HEAD:
            reasons.append(f"it holds heads of up to {TRITON_LARGEST_HEAD} numbers, and those of {name} have {size}")
    return reasons


TRITON_LARGEST_HEAD = 128


def register_backends(op: Op) -> None:
    op.backend("cpp", _cpp_refusals)
    op.backend("cuda", _cuda_refusals)
    op.backend("triton", _triton_refusals)


def attention(backend: str, call: Any) -> tuple[Tensor, Tensor]:
    """Run a checked call of ``gaussian_attention`` on a native backend."""
    common.refuse_forward_mode("gaussian_attention", call)
    ops = torch.ops.trifuse
    op = ops.gaussian_attention_fwd_triton if backend == "triton" else ops.gaussian_attention_fwd
    out, lse, _ = op(*call)
    return out, lse
