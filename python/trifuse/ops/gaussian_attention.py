"""``gaussian_attention``: arguments, checks, and the choice of a kernel."""

from __future__ import annotations

import math
import numbers
from typing import NamedTuple

import torch
from torch import Tensor

from trifuse import reference
from trifuse._library import values_are_known
from trifuse.backends import Op
from trifuse.ops import _checks as check
from trifuse.ops._checks import SEQUENCE_DTYPES
from trifuse.registration import gaussian_attention as kernels

__all__ = ["gaussian_attention"]


class Call(NamedTuple):
    """A checked call: gamma is (H,) and contiguous, center and sigma are (B, H, L), perhaps expanded, all three of
    the accumulation dtype; attn_mask is expanded to (B, H, L, S)."""

    q: Tensor
    k: Tensor
    v: Tensor
    gamma: Tensor | None
    center: Tensor | None
    sigma: Tensor | None
    attn_mask: Tensor | None
    key_padding_mask: Tensor | None
    cu_seqlens_q: Tensor | None
    cu_seqlens_k: Tensor | None
    scale: float
    is_causal: bool
    normalized: bool

    @property
    def device_type(self) -> str:
        return self.q.device.type

    def summary(self) -> str:
        batch, heads, queries, head_dim = self.q.shape
        kind = "dot product" if self.gamma is None else "distance"
        parts = [
            f"B={batch}, H={heads}, Hk={self.k.shape[1]}, L={queries}, S={self.k.shape[2]}, d={head_dim}, "
            f"dv={self.v.shape[3]}, {check.dtype_name(self.q.dtype)}, by {kind}"
        ]
        given = {
            "in a window": self.sigma, "attn_mask": self.attn_mask, "key_padding_mask": self.key_padding_mask,
            "packed": self.cu_seqlens_q,
        }  # fmt: skip
        parts += [word for word, tensor in given.items() if tensor is not None]
        parts += [word for word, flag in (("causal", self.is_causal), ("unnormalized", not self.normalized)) if flag]
        return ", ".join([*parts, str(self.q.device)])


def gaussian_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    gamma: Tensor | float | None = None,
    scale: float | None = None,
    center: Tensor | float | None = None,
    sigma: Tensor | float | None = None,
    attn_mask: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    is_causal: bool = False,
    enable_gqa: bool = False,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    normalized: bool = True,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention by distance, or in a Gaussian window around each query's place, or both, without an (L, S) matrix.

    With ``w = softmax_j(logit[i, j])`` and ``out[i] = sum_j w[j] * v[j]``, the logits are::

        -gamma * ||q[i] - k[j]||^2         with gamma: the Gaussian (RBF) kernel of width 1 / sqrt(2 gamma)
        scale * q[i] . k[j]                without gamma
        - (j - center[i])^2 / (2 sigma[i]^2)   added with sigma

    Args:
        q: ``(B, H, L, d)``; float32, float16, bfloat16 or float64. Any strides, also of k and v.
        k: ``(B, Hk, S, d)`` of q's dtype; ``Hk = H`` unless ``enable_gqa``.
        v: ``(B, Hk, S, dv)`` of q's dtype.
        gamma: number, or tensor ``()`` or ``(H,)``, at least 0; None for dot products.
        scale: of the dot products, ``1 / sqrt(d)`` if None; not together with gamma.
        center: number, or tensor broadcastable to ``(B, H, L)``, one of one dimension being ``(H,)`` or of size 1:
            where the window of a query stands, counted in keys; its own position if None.
        sigma: number, or tensor shaped as center may be, above 0: the width of the window, in keys; None for no
            window.
        attn_mask: broadcastable to ``(B, H, L, S)``: bool, True takes part; or floating, of q's or the accumulation
            dtype, added to the logits. One that requires grad is served by the reference only.
        key_padding_mask: ``(B, S)`` bool, True is padding, as in ``torch.nn.MultiheadAttention``; what it holds does
            not matter, even NaN.
        is_causal: query i sees the keys ``j <= i`` only (aligned at the first key, also where ``L != S``).
        enable_gqa: Hk may divide H; query head h reads head ``h // (H / Hk)`` of k and v.
        cu_seqlens_q: ``(n + 1,)`` int32 or int64, the offsets of n sequences packed along L of a batch of one: each
            attends to its own keys, and the positions of centers and causal order start again in each.
        cu_seqlens_k: the same along S; ``cu_seqlens_q`` if None.
        normalized: False, with gamma only: the kernel smoother's numerator ``sum_j exp(logit[i, j]) * v[j]``.
        return_lse: also return the logsumexp of the logits.

    gamma, center and sigma are float32 (float64 beside float64 q) or of q's dtype, and differentiable like q, k, v and
    lse, once; for second derivatives use ``with trifuse.backend("reference")``. A query without any key (all masked)
    has output 0, lse -inf and gradient 0. q, k and v follow autocast as those of ``scaled_dot_product_attention`` do;
    logits and sums are float32 (float64 for float64). Values of tensors on a GPU are not checked.

    Distances are those of q and k less the mean of the keys that are no padding: far from the origin they keep their
    digits, but a key far from all others costs the rest theirs (one of 64 keys, 1e4 away: outputs are wrong by 1e-2),
    also where attn_mask or causal order hide it. As in ``scaled_dot_product_attention``, an attn_mask hides no NaN;
    key_padding_mask does both.

    Keys that a window certainly leaves no more than 3e-10 of a query's weights, all together, are passed over (1e-20 in
    float64), so that time with a narrow window grows like L; an added attn_mask, and on a GPU any, prevents that.

    Returns:
        ``out`` ``(B, H, L, dv)`` in q's dtype; with ``return_lse`` the pair ``(out, lse)``, ``lse`` ``(B, H, L)`` in
        the accumulation dtype.

    Raises:
        TypeError, ValueError: naming the argument, what it was and what it must be.
        BackendUnavailable: a backend was forced that cannot serve the call.
        RuntimeError: a second or a forward-mode derivative was asked of a native kernel.

    Source: Tsai et al., "Transformer Dissection", 2019 (attention as a kernel smoother, its kernel of distances);
    Yang et al., "Modeling Localness for Self-Attention Networks", 2018 (the Gaussian bias with centre P and width
    sigma); Dao, "FlashAttention-2", 2023, algorithms 1 and 2 (the order of computation).
    """
    call = prepare(
        q, k, v, gamma=gamma, scale=scale, center=center, sigma=sigma, attn_mask=attn_mask,
        key_padding_mask=key_padding_mask, is_causal=is_causal, enable_gqa=enable_gqa, cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k, normalized=normalized, return_lse=return_lse,
    )  # fmt: skip
    name = ATTENTION.choose(call, call.device_type, call.q.numel() * max(call.k.shape[2], 1))
    if name == "reference":
        out, lse = reference.gaussian_attention(**call._asdict())
    else:
        out, lse = kernels.attention(name, call)
    return (out, lse) if return_lse else out


def prepare(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    gamma: Tensor | float | None = None,
    scale: float | None = None,
    center: Tensor | float | None = None,
    sigma: Tensor | float | None = None,
    attn_mask: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    is_causal: bool = False,
    enable_gqa: bool = False,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    normalized: bool = True,
    return_lse: bool = False,
) -> Call:
    """Check the arguments of ``gaussian_attention`` and bring them to one form, without copying a sequence."""
    op = "gaussian_attention"
    check.tensors(op, q=q, k=k, v=v)
    check.tensors(op, optional=True, attn_mask=attn_mask, key_padding_mask=key_padding_mask,
                  cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k)  # fmt: skip
    _check_kind(op, gamma, scale, center, sigma, normalized)
    q, k, v, attn_mask = _autocast(q, k, v, attn_mask)
    _check_sequences(op, q, k, v, enable_gqa)
    gamma = _parameter(op, "gamma", gamma, q, (q.shape[1],))
    center = _parameter(op, "center", center, q, q.shape[:3])
    sigma = _parameter(op, "sigma", sigma, q, q.shape[:3])
    check.same_device(
        op, q, k=k, v=v, gamma=gamma, center=center, sigma=sigma, attn_mask=attn_mask,
        key_padding_mask=key_padding_mask, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k,
    )  # fmt: skip
    attn_mask = _masks(op, q, k, attn_mask, key_padding_mask)
    cu_seqlens_q, cu_seqlens_k = _offsets(op, q, k, cu_seqlens_q, cu_seqlens_k)
    if scale is None:
        scale = 1 / math.sqrt(max(q.shape[3], 1))
    return Call(
        q, k, v, None if gamma is None else gamma.contiguous(), center, sigma, attn_mask, key_padding_mask,
        cu_seqlens_q, cu_seqlens_k, float(scale), bool(is_causal), bool(normalized),
    )  # fmt: skip


def _check_kind(op, gamma, scale, center, sigma, normalized) -> None:
    """Which arguments go together."""
    if gamma is None and sigma is None:
        raise ValueError(
            f"{op}: gamma and sigma are both None; give gamma for attention by distance or sigma for a window, or call "
            "torch.nn.functional.scaled_dot_product_attention"
        )
    if center is not None and sigma is None:
        raise ValueError(f"{op}: center was given without sigma; it must come with the width of its window")
    if scale is not None:
        if gamma is not None:
            raise ValueError(f"{op}: scale was given with gamma; distances have no scale but gamma, so it must be None")
        if not _is_number(scale):
            raise TypeError(f"{op}: scale is {type(scale).__name__}; it must be a number or None")
        if isinstance(scale, numbers.Real) and not math.isfinite(scale):
            raise ValueError(f"{op}: scale is {scale}; it must be finite")
    if not normalized and gamma is None:
        raise ValueError(
            f"{op}: normalized is False without gamma; only the kernel of distances has an unnormalized form"
        )


def _is_number(value: object) -> bool:
    return isinstance(value, (numbers.Real, torch.SymFloat, torch.SymInt)) and not isinstance(value, bool)


def _autocast(q, k, v, attn_mask):
    """Under autocast, sequences follow the autocast dtype, as in scaled_dot_product_attention."""
    device = q.device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return q, k, v, attn_mask
    dtype = torch.get_autocast_dtype(device)

    def cast(tensor: Tensor) -> Tensor:
        return tensor.to(dtype) if tensor.is_floating_point() and tensor.dtype != torch.float64 else tensor

    mask = attn_mask
    if mask is not None and mask.dtype != torch.float32:  # what kernels add is float32 in any case
        mask = cast(mask)
    return cast(q), cast(k), cast(v), mask


def _check_sequences(op: str, q: Tensor, k: Tensor, v: Tensor, enable_gqa: bool) -> None:
    for name, tensor, form in (("q", q, "(B, H, L, d)"), ("k", k, "(B, Hk, S, d)"), ("v", v, "(B, Hk, S, dv)")):
        check.rank(op, name, tensor, 4, form)
    check.dtype(op, "q", q, SEQUENCE_DTYPES)
    check.same_dtype(op, "k", k, "q", q)
    check.same_dtype(op, "v", v, "q", q)
    batch, heads, _, head_dim = q.shape
    kv_heads, keys = k.shape[1], k.shape[2]
    if k.shape[0] != batch or k.shape[3] != head_dim:
        raise ValueError(
            f"{op}: k has shape {tuple(k.shape)}; its batch and head size must be those of q, {batch} and {head_dim}"
        )
    if tuple(v.shape[:3]) != (batch, kv_heads, keys):
        raise ValueError(
            f"{op}: v has shape {tuple(v.shape)}; it must be (B, Hk, S, dv) with {tuple(k.shape[:3])} of k"
        )
    if kv_heads == heads:
        return
    if not enable_gqa:
        raise ValueError(f"{op}: k has {kv_heads} heads and q {heads}; they must be as many without enable_gqa=True")
    if kv_heads == 0 or heads % kv_heads:
        raise ValueError(f"{op}: k has {kv_heads} heads, which does not divide the H = {heads} of q")


def _parameter(op: str, name: str, value: object, q: Tensor, full: tuple[int, ...]) -> Tensor | None:
    """gamma, center or sigma as a tensor of the full shape and of the accumulation dtype."""
    if value is None:
        return None
    acc = torch.promote_types(q.dtype, torch.float32)
    per_head = len(full) == 1
    form = "() or (H,)" if per_head else "broadcastable to (B, H, L), or (H,),"
    if _is_number(value):
        _check_values(op, name, value, value)
        return torch.full((), value, dtype=acc, device=q.device).expand(full)
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {name} is {type(value).__name__}; it must be a number or a tensor {form} or None")
    check.weight_dtype(op, name, value, q)
    shaped = value[:, None] if value.dim() == 1 and not per_head else value
    matches = shaped.dim() <= len(full) and all(
        size in (1, wanted) for size, wanted in zip(reversed(shaped.shape), reversed(full), strict=False)
    )
    if not matches:
        sizes = f"H = {full[0]}" if per_head else f"(B, H, L) = {tuple(full)}"
        raise ValueError(f"{op}: {name} has shape {tuple(value.shape)}; it must be {form} with {sizes}")
    if value.device.type == "cpu" and values_are_known(value) and value.numel():
        bounds = value.detach().aminmax()  # NaN is both of them
        _check_values(op, name, bounds.min.item(), bounds.max.item())
    return shaped.to(acc).expand(full)


def _check_values(op: str, name: str, smallest: float, largest: float) -> None:
    if isinstance(smallest, (torch.SymFloat, torch.SymInt)):
        return
    if name == "sigma":
        if not smallest > 0:  # infinite ones are no window
            raise ValueError(f"{op}: sigma was {smallest}; it must be above 0")
        return
    wrong = next((one for one in (smallest, largest) if not math.isfinite(one)), None)
    if wrong is not None:
        raise ValueError(f"{op}: {name} was {wrong}; it must be finite")
    if name == "gamma" and smallest < 0:
        raise ValueError(f"{op}: gamma was {smallest}; it must be at least 0")


def _masks(op: str, q: Tensor, k: Tensor, attn_mask: Tensor | None, key_padding_mask: Tensor | None) -> Tensor | None:
    """attn_mask expanded to (B, H, L, S), both masks checked."""
    if key_padding_mask is not None:
        if key_padding_mask.dtype != torch.bool:
            was = check.dtype_name(key_padding_mask.dtype)
            raise TypeError(f"{op}: key_padding_mask is {was}; it must be bool, True where a key is padding")
        check.shape(op, "key_padding_mask", key_padding_mask, (k.shape[0], k.shape[2]), "(B, S)")
    if attn_mask is None:
        return None
    acc = torch.promote_types(q.dtype, torch.float32)
    if attn_mask.dtype not in (torch.bool, q.dtype, acc):
        names = " or ".join(dict.fromkeys(map(check.dtype_name, (torch.bool, q.dtype, acc))))
        raise TypeError(f"{op}: attn_mask is {check.dtype_name(attn_mask.dtype)}; it must be {names}")
    full = (*q.shape[:3], k.shape[2])
    sizes = zip(reversed(attn_mask.shape), reversed(full), strict=False)
    if attn_mask.dim() > 4 or any(size not in (1, wanted) for size, wanted in sizes):
        was = tuple(attn_mask.shape)
        raise ValueError(f"{op}: attn_mask has shape {was}; it must be broadcastable to (B, H, L, S) = {full}")
    return attn_mask.expand(full)


def _offsets(
    op: str, q: Tensor, k: Tensor, cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """Both offsets as contiguous int64, or both None."""
    if cu_seqlens_q is None:
        if cu_seqlens_k is not None:
            raise ValueError(f"{op}: cu_seqlens_k was given without cu_seqlens_q; it must come with it")
        return None, None
    check.cu_seqlens(op, cu_seqlens_q, q.shape[0], q.shape[2], "cu_seqlens_q")
    if cu_seqlens_k is None:
        check.cu_seqlens(op, cu_seqlens_q, k.shape[0], k.shape[2], "cu_seqlens_q (of k, without cu_seqlens_k)", "S")
        offsets = cu_seqlens_q.to(torch.int64).contiguous()
        return offsets, offsets
    check.cu_seqlens(op, cu_seqlens_k, k.shape[0], k.shape[2], "cu_seqlens_k", "S")
    if cu_seqlens_k.shape != cu_seqlens_q.shape:
        was, wanted = cu_seqlens_k.shape[0] - 1, cu_seqlens_q.shape[0] - 1
        raise ValueError(f"{op}: cu_seqlens_k holds {was} sequences; it must hold as many as cu_seqlens_q, {wanted}")
    return cu_seqlens_q.to(torch.int64).contiguous(), cu_seqlens_k.to(torch.int64).contiguous()


ATTENTION = Op("gaussian_attention", prepare, {"cpu": ("cpp", "reference"), "cuda": ("triton", "reference")})
ATTENTION.backend("reference", lambda call: [])
kernels.register_backends(ATTENTION)
