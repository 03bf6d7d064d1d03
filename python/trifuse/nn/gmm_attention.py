"""Monotonic attention by a mixture of Gaussians, for decoders that read a sequence from its start to its end."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trifuse.nn.recurrent import at_least_float32
from trifuse.ops import gmm_attention_step

__all__ = ["MonotonicGMMAttention"]


class MonotonicGMMAttention(nn.Module):
    """Location-relative attention whose means only move forward: GMMv2b of Battenberg et al.

    A query gives ``(w, d, s) = mixture(tanh(hidden(query)))``; the mixture has the weights ``softmax(w)``, its means
    move by ``softplus(d)`` and its widths are ``softplus(s) + eps``. The context is the sum of the values with the
    mixture's density at their positions, ``trifuse.gmm_attention_step``.

    Args:
        query_dim: size of a query, usually the state of the decoder.
        num_mixtures: K, the number of Gaussians.
        hidden_dim: size of the hidden layer.
        initial_step: positions that the means move by in a step at the start of training; above 0.
        initial_width: the Gaussians' standard deviation at the start of training, in positions; above 0.
        eps: least standard deviation, so that a density stays finite; above 0.
        device, dtype: of the parameters. The mixture is computed in at least float32 anyway.

    ``forward`` takes all queries of a sequence at once (the decoder's inputs are known, as in training with given
    targets where the query does not depend on the context), ``step`` one of them; both give the same.

    Raises:
        TypeError, ValueError: naming the argument, what it was and what it must be.

    Source: Battenberg et al., "Location-Relative Attention Mechanisms for Robust Long-Form Speech Synthesis", 2020
    (arXiv 1910.10288); the mixture of Graves, "Generating Sequences With Recurrent Neural Networks",
    2013 (arXiv 1308.0850), section 5.
    """

    def __init__(
        self,
        query_dim: int,
        num_mixtures: int = 5,
        hidden_dim: int = 128,
        *,
        initial_step: float = 1.0,
        initial_width: float = 10.0,
        eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        sizes = {"query_dim": query_dim, "num_mixtures": num_mixtures, "hidden_dim": hidden_dim}
        for argument, size in sizes.items():
            if isinstance(size, bool) or not isinstance(size, int):
                raise TypeError(f"{name}: {argument} is {size!r}; it must be an int")
            if size < 1:
                raise ValueError(f"{name}: {argument} is {size}; it must be at least 1")
        for argument, number in {"initial_step": initial_step, "initial_width": initial_width, "eps": eps}.items():
            if isinstance(number, bool) or not isinstance(number, (int, float)):
                raise TypeError(f"{name}: {argument} is {type(number).__name__}; it must be a number")
            if not number > 0 or math.isinf(number):
                raise ValueError(f"{name}: {argument} is {number}; it must be above 0 and finite")
        self.query_dim, self.num_mixtures, self.hidden_dim = query_dim, num_mixtures, hidden_dim
        self.initial_step, self.initial_width, self.eps = initial_step, initial_width, eps
        self.hidden = nn.Linear(query_dim, hidden_dim, device=device, dtype=dtype)
        self.mixture = nn.Linear(hidden_dim, 3 * num_mixtures, device=device, dtype=dtype)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Linear layers as torch starts them, with biases that make the means' step and the widths what was asked."""
        self.hidden.reset_parameters()
        self.mixture.reset_parameters()
        weight, step, width = self.mixture.bias.chunk(3)
        weight.zero_()
        step.fill_(_inverse_softplus(self.initial_step))
        width.fill_(_inverse_softplus(self.initial_width))

    def initial_state(self, values: Tensor) -> Tensor:
        """The means before the first step: zeros ``(B, K)`` in at least float32."""
        dtype = torch.promote_types(values.dtype, torch.float32)
        return torch.zeros(values.shape[0], self.num_mixtures, dtype=dtype, device=values.device)

    def step(
        self,
        query: Tensor,
        values: Tensor,
        state: Tensor | None = None,
        *,
        key_padding_mask: Tensor | None = None,
        return_alignment: bool = False,
    ) -> tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Tensor]:
        """Attend once.

        Args:
            query: ``(B, query_dim)``.
            values: ``(B, T, E)``: float32, float16, bfloat16 or float64, any strides.
            state: ``(B, K)``: the means after the step before; None is ``initial_state``.
            key_padding_mask: ``(B, T)`` bool, True = padding.
            return_alignment: also return the alignment.

        Returns:
            ``(context, state)``, with ``return_alignment`` ``(context, state, alignment)``: context ``(B, E)`` in
            the dtype of values, the state after this step, alignment ``(B, T)`` in at least float32.

        Raises:
            TypeError, ValueError: naming the argument, what it was and what it must be.
        """
        self._check(query, values, 2, "(B, query_dim)", state, key_padding_mask)
        weight, delta, sigma = self._mixture_of(query, values)
        state = self.initial_state(values) if state is None else state
        return gmm_attention_step(
            values, weight, delta, sigma, state, key_padding_mask=key_padding_mask, return_alignment=return_alignment
        )

    def forward(
        self,
        queries: Tensor,
        values: Tensor,
        state: Tensor | None = None,
        *,
        key_padding_mask: Tensor | None = None,
        return_alignment: bool = False,
    ) -> tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Tensor]:
        """Attend with every query of a sequence, in order: what as many calls of ``step`` give, side by side.

        The alignments of all steps are computed at once and the contexts are one matrix product, of the dtype that
        autocast chooses for it.

        Args:
            queries: ``(B, S, query_dim)``.
            values, state, key_padding_mask, return_alignment: as for ``step``. Values must be finite where they are
                not padding.

        Returns:
            ``(context, state)``, with ``return_alignment`` ``(context, state, alignment)``: context ``(B, S, E)`` in
            the dtype of values, the state after the last query, alignment ``(B, S, T)`` in at least float32.

        Raises:
            TypeError, ValueError: naming the argument, what it was and what it must be.
        """
        self._check(queries, values, 3, "(B, S, query_dim)", state, key_padding_mask)
        batch, steps, _ = queries.shape
        length = values.shape[1]
        weight, delta, sigma = self._mixture_of(queries, values)
        state = self.initial_state(values) if state is None else state.to(delta.dtype)
        if steps == 0:
            context = values.new_zeros(batch, 0, values.shape[2])
            return (context, state, weight.new_zeros(batch, 0, length)) if return_alignment else (context, state)
        moves = F.softplus(delta[:, :-1]).cumsum(1)
        before = state[:, None] + torch.cat((torch.zeros_like(delta[:, :1]), moves), 1)
        # Values without columns: what comes of them is the alignment.
        padding = None if key_padding_mask is None else key_padding_mask[:, None].expand(-1, steps, -1).flatten(0, 1)
        _, means, alignment = gmm_attention_step(
            values.new_empty(batch * steps, length, 0), *(x.flatten(0, 1) for x in (weight, delta, sigma, before)),
            key_padding_mask=padding, return_alignment=True,
        )  # fmt: skip
        alignment = alignment.unflatten(0, (batch, steps))
        if key_padding_mask is not None:
            values = values.masked_fill(key_padding_mask[:, :, None], 0)
        context = torch.bmm(alignment.to(values.dtype), values).to(values.dtype)
        state = means.unflatten(0, (batch, steps))[:, -1]
        return (context, state, alignment) if return_alignment else (context, state)

    def extra_repr(self) -> str:
        return f"num_mixtures={self.num_mixtures}, eps={self.eps}"

    def _mixture_of(self, query: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Weights, steps before softplus, and widths: ``(..., K)`` in at least float32."""
        raw = at_least_float32(self.mixture(torch.tanh(self.hidden(query))))
        raw = raw.to(torch.promote_types(values.dtype, torch.float32))
        weight, delta, width = raw.chunk(3, -1)
        return weight.softmax(-1), delta, F.softplus(width) + self.eps

    def _check(self, query: Any, values: Any, dims: int, form: str, state: Any, key_padding_mask: Any) -> None:
        name, argument = type(self).__name__, "query" if dims == 2 else "queries"
        optional = {"state": state, "key_padding_mask": key_padding_mask}
        for given, tensor in {argument: query, "values": values, **optional}.items():
            if not isinstance(tensor, Tensor) and not (tensor is None and given in optional):
                also = " or None" if given in optional else ""
                raise TypeError(f"{name}: {given} is {type(tensor).__name__}; it must be a torch.Tensor{also}")
        if query.dim() != dims or query.shape[-1] != self.query_dim:
            was, size = tuple(query.shape), self.query_dim
            raise ValueError(f"{name}: {argument} has shape {was}; it must be {form} with query_dim = {size}")
        if values.dim() != 3 or values.shape[0] != query.shape[0]:
            raise ValueError(
                f"{name}: values has shape {tuple(values.shape)}; it must be (B, T, E) with B = {query.shape[0]}"
            )
        if key_padding_mask is not None and key_padding_mask.dtype != torch.bool:
            was = str(key_padding_mask.dtype).removeprefix("torch.")
            raise TypeError(f"{name}: key_padding_mask is {was}; it must be bool, True where a position is padding")
        batch, length, _ = values.shape
        for given, what, shape in (("state", "(B, K)", (batch, self.num_mixtures)),
                                   ("key_padding_mask", "(B, T)", (batch, length))):  # fmt: skip
            if optional[given] is not None and tuple(optional[given].shape) != shape:
                was = tuple(optional[given].shape)
                raise ValueError(f"{name}: {given} has shape {was}; it must be {what} = {shape}")


def _inverse_softplus(y: float) -> float:
    return y + math.log(-math.expm1(-y))
