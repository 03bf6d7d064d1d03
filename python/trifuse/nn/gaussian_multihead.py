"""Multi-head attention by distance or in a Gaussian window, in the place of ``torch.nn.MultiheadAttention``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trifuse._library import values_are_known
from trifuse.nn import explicit_attention
from trifuse.ops import gaussian_attention

__all__ = ["MultiheadGaussianAttention"]

KINDS = ("rbf", "local", "rbf+local")
NAME = "MultiheadGaussianAttention"


class MultiheadGaussianAttention(nn.MultiheadAttention):
    """``torch.nn.MultiheadAttention`` whose weights come from distances, or look through a Gaussian window.

    With projected queries, keys and values of a head, ``softmax_j(logit[i, j]) @ v`` and, by ``kind``::

        "rbf"         logit = -gamma * ||q[i] - k[j]||^2
        "local"       logit = q[i] . k[j] / sqrt(head_dim) - (i - j)^2 / (2 sigma^2)
        "rbf+local"   logit = -gamma * ||q[i] - k[j]||^2 - (i - j)^2 / (2 sigma^2)

    ``gamma`` and ``sigma`` are learned, one a head, as ``log_gamma`` and ``log_sigma``, so they stay positive. Every
    other parameter has the name, the shape and the initial values of ``torch.nn.MultiheadAttention``; its
    ``state_dict`` loads, also with ``strict=True``, and then leaves ``log_gamma`` and ``log_sigma`` as they are.

    Args:
        embed_dim, num_heads, dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim, batch_first, device, dtype: as of
            ``torch.nn.MultiheadAttention``. The added key and the zero key have no place: no window applies to them.
        kind: "rbf", "local" or "rbf+local".
        gamma: where it starts, a number or one a head; by default ``1 / (2 sqrt(head_dim))``, at which the logits
            differ from those of dot products by half the square of the key's norm, divided by ``sqrt(head_dim)``.
        sigma: where it starts, in positions, a number or one a head; by default from 4 to 256 over the heads, in equal
            ratios (16 for one head).

    ``need_weights=True`` (the default, as in torch) and dropout in training store the (L, S) matrix, in plain
    PyTorch; everything else runs ``trifuse.gaussian_attention``, which does not. A query that no key is left for has
    output 0 where torch's has NaN.

    Source: Tsai et al., "Transformer Dissection", 2019, section 3.2 (the RBF kernel); Yang et al., "Modeling Localness
    for Self-Attention Networks", 2018, equations 4 to 6 (the window).
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        kind: str = "rbf",
        gamma: float | Sequence[float] | None = None,
        sigma: float | Sequence[float] | None = None,
    ) -> None:
        if kind not in KINDS:
            raise ValueError(f'{NAME}: kind is {kind!r}; it must be "rbf", "local" or "rbf+local"')
        if embed_dim <= 0 or num_heads <= 0 or embed_dim % num_heads:
            raise ValueError(
                f"{NAME}: embed_dim is {embed_dim} and num_heads {num_heads}; they must be positive, and num_heads "
                "must divide embed_dim"
            )
        if not 0 <= dropout <= 1:
            raise ValueError(f"{NAME}: dropout is {dropout}; it must be a probability")
        super().__init__(
            embed_dim, num_heads, dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim, batch_first, device, dtype
        )
        self.kind = kind
        default_gamma = 1 / (2 * math.sqrt(self.head_dim))
        self._start = {
            "log_gamma": self._starts("gamma", gamma, [default_gamma] * num_heads, "rbf" in kind),
            "log_sigma": self._starts("sigma", sigma, _windows(num_heads), "local" in kind),
        }
        for name, start in self._start.items():
            if start is None:
                self.register_parameter(name, None)
                continue
            parameter = nn.Parameter(torch.tensor(start, device=device, dtype=dtype))
            parameter._no_weight_decay = True  # decay would pull gamma and sigma towards 1
            self.register_parameter(name, parameter)

    def _starts(self, name: str, given: Any, default: list[float], used: bool) -> list[float] | None:
        """The logarithms that gamma or sigma start at, one a head."""
        if not used:
            if given is not None:
                raise ValueError(f"{NAME}: {name} is given, and kind {self.kind!r} has none; it must be None")
            return None
        values = default if given is None else given
        values = torch.as_tensor(values, dtype=torch.float64, device="cpu")
        values = values.expand(self.num_heads).tolist() if values.dim() == 0 else values.tolist()
        if len(values) != self.num_heads or not all(0 < value < math.inf for value in values):
            raise ValueError(
                f"{NAME}: {name} is {given!r}; it must be a positive number, or one for each of {self.num_heads} heads"
            )
        return [math.log(value) for value in values]

    @property
    def gamma(self) -> Tensor | None:
        """``(num_heads,)``, or None where the kind has none."""
        return None if self.log_gamma is None else self.log_gamma.exp()

    @property
    def sigma(self) -> Tensor | None:
        """``(num_heads,)``, or None where the kind has none."""
        return None if self.log_sigma is None else self._sigma(self.log_sigma.dtype)

    def _sigma(self, dtype: torch.dtype) -> Tensor:
        # Above zero whatever a step of training did, its square in float32 too; so narrow, one key is all there is.
        return self.log_sigma.to(dtype).exp().clamp(min=1e-15)

    def _reset_parameters(self) -> None:
        self._qkv_same_embed_dim = self.in_proj_weight is not None
        super()._reset_parameters()
        # The layers of torch.nn hand weights that they believe to be of dot-product attention to a kernel of their
        # own in inference, passing this module by. They do not where this is False, which nothing here reads.
        self._qkv_same_embed_dim = False
        for name, start in getattr(self, "_start", {}).items():
            if start is not None:
                with torch.no_grad():
                    getattr(self, name).copy_(torch.tensor(start))

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any, **kwargs: Any) -> None:
        if prefix + "out_proj.weight" in state_dict:
            for name, start in self._start.items():
                if start is None or prefix + name in state_dict:
                    continue
                held = getattr(self, name)
                state_dict[prefix + name] = torch.tensor(start, dtype=held.dtype) if held.is_meta else held.detach()
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend.

        Args:
            query: ``(L, B, embed_dim)``, ``(B, L, embed_dim)`` with ``batch_first``, or unbatched ``(L, embed_dim)``.
            key: ``(S, B, kdim)``, ``(B, S, kdim)`` or ``(S, kdim)``; value the same with ``vdim``.
            value: see key.
            key_padding_mask: ``(B, S)`` or ``(S,)``: bool, True is padding, or floating, added to the logits, -inf is
                padding. What padding holds does not matter, even NaN.
            need_weights: also return the weights, for which the (L, S) matrix is stored.
            attn_mask: ``(L, S)`` or ``(B * num_heads, L, S)``: bool, True may not attend, or floating, added.
            average_attn_weights: the weights are the mean over heads, not those of each head.
            is_causal: query i sees the keys ``j <= i`` only. An ``attn_mask`` beside it is taken to say the same, as
                in torch, and is looked at only with ``need_weights``; unlike there it may be None.

        Returns:
            The output, of the shape and dtype of query; and the weights ``(B, L, S)`` or ``(B, num_heads, L, S)``
            (without B for unbatched input; S counts the added keys too), or None.

        Raises:
            TypeError, ValueError: naming the argument, what it was and what it must be.
        """
        batched = self._check(query, key, value)
        q, k, v = self._project(query, key, value)
        dropout = self.dropout if self.training else 0.0
        stored = need_weights or dropout > 0
        if is_causal and attn_mask is not None and not need_weights:
            attn_mask = None
        masks = self._masks(q, k, key_padding_mask, attn_mask, batched)
        causal = is_causal and attn_mask is None
        acc = torch.promote_types(q.dtype, torch.float32)
        gamma = None if self.log_gamma is None else self.log_gamma.to(acc).exp()
        sigma = None if self.log_sigma is None else self._sigma(acc)
        weights = None
        if stored:
            k, v, added = self._with_added_keys(k, v)
            out, weights = explicit_attention.attend(q, k, v, gamma, sigma, *masks, causal, added, dropout)
        elif self.bias_k is None and not self.add_zero_attn:
            out = gaussian_attention(
                q, k, v, gamma=gamma, sigma=sigma, attn_mask=masks[0], key_padding_mask=masks[1], is_causal=causal
            )
        else:
            out = self._beside_added_keys(q, k, v, gamma, sigma, *masks, causal)
        out = self.out_proj(self._join(out, batched))
        if not need_weights:
            return out, None
        weights = weights.mean(1) if average_attn_weights else weights
        return out, weights if batched else weights.squeeze(0)

    def _check(self, query: Tensor, key: Tensor, value: Tensor) -> bool:
        """Whether the inputs are a batch."""
        for name, x, size in (("query", query, self.embed_dim), ("key", key, self.kdim), ("value", value, self.vdim)):
            if x.is_nested:
                raise TypeError(f"{NAME}: {name} is a nested tensor; it must be padded, with key_padding_mask")
            if x.dim() not in (2, 3) or x.dim() != query.dim() or x.shape[-1] != size:
                form = "(L, B, E)" if not self.batch_first else "(B, L, E)"
                raise ValueError(
                    f"{NAME}: {name} has shape {tuple(x.shape)}; it must be {form} or unbatched (L, E), all three "
                    f"alike, with E = {size}"
                )
        if key.shape[:-1] != value.shape[:-1]:
            raise ValueError(
                f"{NAME}: value has shape {tuple(value.shape)}; its length and batch must be those of key, "
                f"{tuple(key.shape[:-1])}"
            )
        batched = query.dim() == 3
        axis = 0 if self.batch_first else 1
        if batched and query.shape[axis] != key.shape[axis]:
            raise ValueError(
                f"{NAME}: key has a batch of {key.shape[axis]}; it must be that of query, {query.shape[axis]}"
            )
        return batched

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> Sequence[Tensor]:
        """q, k and v (B, H, L, head_dim), views of as few products as there are different inputs."""
        weight, bias, size = self.in_proj_weight, self.in_proj_bias, self.embed_dim
        if weight is not None and key is value:
            if query is key:
                return self._split(F.linear(query, weight, bias), 3)
            of_query, of_both = (None, None) if bias is None else bias.split([size, 2 * size])
            (q,) = self._split(F.linear(query, weight[:size], of_query), 1)
            return q, *self._split(F.linear(key, weight[size:], of_both), 2)
        weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight) if weight is None else weight.chunk(3)
        biases = (None, None, None) if bias is None else bias.chunk(3)
        inputs = zip((query, key, value), weights, biases, strict=True)
        return [self._split(F.linear(x, w, b), 1)[0] for x, w, b in inputs]

    def _split(self, x: Tensor, parts: int) -> tuple[Tensor, ...]:
        """Projections side by side, each as (B, H, L, head_dim), a view."""
        x = x.view(*x.shape[:-1], parts, self.num_heads, self.head_dim)
        if x.dim() == 4:
            return x.permute(1, 2, 0, 3).unsqueeze(1).unbind()
        return x.permute((2, 0, 3, 1, 4) if self.batch_first else (2, 1, 3, 0, 4)).unbind()

    def _join(self, out: Tensor, batched: bool) -> Tensor:
        """(B, H, L, head_dim) as the query came."""
        if not batched:
            return out.squeeze(0).transpose(0, 1).flatten(1)
        return (out.transpose(1, 2) if self.batch_first else out.permute(2, 0, 1, 3)).flatten(2)

    def _masks(
        self, q: Tensor, k: Tensor, padding: Tensor | None, mask: Tensor | None, batched: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """attn_mask as the op has it, True for what takes part, and a bool key_padding_mask."""
        batch, heads, queries, keys = *q.shape[:3], k.shape[2]
        for name, one in (("key_padding_mask", padding), ("attn_mask", mask)):
            if one is not None and one.dtype != torch.bool and not one.is_floating_point():
                raise TypeError(f"{NAME}: {name} is {one.dtype}; it must be bool or floating")
        acc = torch.promote_types(q.dtype, torch.float32)
        if mask is not None:
            full = (batch * heads, queries, keys)
            if tuple(mask.shape) not in (full, full[1:]):
                raise ValueError(f"{NAME}: attn_mask has shape {tuple(mask.shape)}; it must be {full[1:]} or {full}")
            mask = mask.unflatten(0, (batch, heads)) if mask.dim() == 3 else mask
            mask = ~mask if mask.dtype == torch.bool else mask.to(acc)
        if padding is not None:
            wanted = (batch, keys) if batched else (keys,)
            if tuple(padding.shape) != wanted:
                raise ValueError(f"{NAME}: key_padding_mask has shape {tuple(padding.shape)}; it must be {wanted}")
            padding = padding.view(batch, keys)
            if padding.dtype != torch.bool:
                added, padding = padding.to(acc)[:, None, None], padding == -math.inf
                if _is_only(padding, added):
                    return mask, padding
                if mask is None:
                    mask = added
                else:
                    mask = torch.where(mask, added, -math.inf) if mask.dtype == torch.bool else mask + added
        return mask, padding

    def _with_added_keys(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, int]:
        """Keys and values with the learned and the zero one behind them, and how many these are."""
        keys, values = [k], [v]
        if self.bias_k is not None:
            for held, bias in ((keys, self.bias_k), (values, self.bias_v)):
                one = bias.view(1, self.num_heads, 1, self.head_dim).to(k.dtype)
                held.append(one.expand(k.shape[0], -1, -1, -1))
        if self.add_zero_attn:
            for held in (keys, values):
                held.append(held[0].new_zeros(1, 1, 1, self.head_dim).expand(*k.shape[:2], -1, -1))
        added = len(keys) - 1
        return (torch.cat(keys, 2), torch.cat(values, 2), added) if added else (k, v, 0)

    def _beside_added_keys(
        self, q: Tensor, k: Tensor, v: Tensor, gamma: Tensor | None, sigma: Tensor | None, mask: Tensor | None,
        padding: Tensor | None, causal: bool,
    ) -> Tensor:  # fmt: skip
        """Attention to the keys by the kernel and to the added ones here, joined by their normalizers: the added keys
        stand outside of window, masks and causal order."""
        out, lse = gaussian_attention(
            q, k, v, gamma=gamma, sigma=sigma, attn_mask=mask, key_padding_mask=padding, is_causal=causal,
            return_lse=True,
        )  # fmt: skip
        wide = q.to(lse.dtype)
        logits = [lse]
        if self.bias_k is not None:
            bias_k, bias_v = (
                bias.view(self.num_heads, 1, self.head_dim).to(lse.dtype) for bias in (self.bias_k, self.bias_v)
            )
            logits.append(explicit_attention.similarity(wide, bias_k, gamma))
        if self.add_zero_attn:
            logits.append(explicit_attention.similarity(wide, torch.zeros_like(wide[:1, :1, :1]), gamma))
        shares = torch.softmax(torch.stack(logits, -1), -1)
        joined = shares[..., :1] * out.to(lse.dtype)
        if self.bias_k is not None:
            joined = joined + shares[..., 1:2] * bias_v
        return joined.to(out.dtype)


def _is_only(padding: Tensor, added: Tensor) -> bool:
    """Whether numbers added to the logits do nothing but shut out padding, as those of torch's encoder do: as bool,
    they let keys be passed over. On a GPU the answer would wait for it."""
    if added.requires_grad or added.device.type != "cpu" or not values_are_known(added):
        return False
    return not (added[:, 0, 0].masked_fill(padding, 0) != 0).any()


def _windows(heads: int) -> list[float]:
    return [16.0] if heads == 1 else [4 * 64 ** (head / (heads - 1)) for head in range(heads)]
