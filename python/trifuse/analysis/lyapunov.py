"""The Lyapunov exponents of Mamba layers: how fast what a layer remembers, and any error in it, dies away."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trifuse.analysis.importance import evaluating, moved
from trifuse.nn.block import product_and_bias
from trifuse.nn.mamba import Mamba

__all__ = ["lyapunov_exponents"]


def lyapunov_exponents(model: nn.Module, batch: Any, *, per_sequence: bool = False) -> dict[str, Tensor]:
    """The exact Lyapunov exponents of the state of every Mamba layer of a model, on a batch.

    A Mamba layer's state is ``h[d, n, l] = exp(dt[d, l] A[d, n]) h[d, n, l - 1] + ...``, so its Jacobian is diagonal,
    and over L steps a deviation of h[d, n] is multiplied by ``exp(L lambda[d, n])`` with
    ``lambda[d, n] = A[d, n] mean_l dt[d, l]``, where dt is what softplus makes of ``dt_proj`` and its bias. No limit
    and no estimate is taken. ``A = -exp(A_log)`` is below 0 and so are all exponents: no layer amplifies what rounding
    does to its state, and the largest exponents say how many steps it is remembered, about ``-1 / lambda``.

    The model runs once in evaluation mode without gradients, and eagerly where it was compiled; modes are as before
    afterwards. Padding of an ``attention_mask`` does not count, and texts that are packed by ``cu_seqlens`` or an
    ``attention_mask`` are told apart. Of a layer that is called several times every call counts.

    Args:
        model: holds ``trifuse.nn.Mamba`` (``MambaLM`` does) or transformers' ``MambaMixer``, or is one. Adapters count.
        batch: the model's input: a tensor, a tuple or list whose first entry is the input, or a mapping of its keyword
            arguments. Goes to the device of the model's first parameter.
        per_sequence: one result per sequence instead of the mean over all steps of all sequences.

    Returns:
        By name of a layer, as in ``model.named_modules()``, ``(d_inner, d_state)``, with per_sequence
        ``(sequences, d_inner, d_state)``: float64 on the CPU. In units of 1 / step.

    Raises:
        TypeError, ValueError: naming the argument, what it was and what it must be.

    Source: the recurrence of Gu and Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces", 2023,
    section 3.2, differentiated; what it means for fine-tuning in half precision: Halloran et al., "Mamba State-Space
    Models Are Lyapunov-Stable Learners", 2024 (arXiv 2406.00209).
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"lyapunov_exponents: model is {type(model).__name__}; it must be a torch.nn.Module")
    layers = {name: _Steps(name, module) for name, module in _find(model).items()}
    first = next(model.parameters(), None)
    batch = moved(batch, None if first is None else first.device)
    with evaluating(model), torch.no_grad(), torch.compiler.set_stance("force_eager"):
        try:
            for layer in layers.values():
                layer.listen()
            if isinstance(batch, Mapping):
                model(**batch)
            else:
                model(batch[0] if isinstance(batch, (tuple, list)) else batch)
        finally:
            for layer in layers.values():
                layer.stop()
    return {name: layer.exponents(per_sequence) for name, layer in layers.items()}


def _find(model: nn.Module) -> dict[str, nn.Module]:
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, Mamba) or type(module).__name__ == "MambaMixer":
            found[name.removeprefix("_orig_mod").replace("._orig_mod", "").removeprefix(".")] = module
    if not found:
        raise ValueError(
            f"lyapunov_exponents: model is a {type(model).__name__} without Mamba layers; it must hold "
            "trifuse.nn.Mamba or transformers' MambaMixer"
        )
    return found


class _Steps:
    """Listens to one layer and adds its step sizes up, sequence by sequence."""

    def __init__(self, name: str, layer: nn.Module):
        self.name, self.layer = name, layer
        self.sums: Tensor | None = None  # (sequences, d_inner)
        self.counts: Tensor | None = None  # (sequences,)
        self._handles: list[Any] = []
        self._mask: Tensor | None = None
        self._offsets: Tensor | None = None

    def listen(self) -> None:
        self._handles = [
            self.layer.register_forward_pre_hook(self._begin, with_kwargs=True),
            # x_proj is called by every way through the layer, and a hook on it changes none of their numbers.
            self.layer.x_proj.register_forward_hook(self._take),
        ]

    def stop(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _begin(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        # transformers' mixer takes its mask as third argument too.
        self._mask = kwargs.get("attention_mask", args[2] if len(args) > 2 else None)
        self._offsets = kwargs.get("cu_seqlens")

    def _take(self, module: nn.Module, args: tuple, projected: Tensor) -> None:
        dt = _step_sizes(self.layer, projected).double()  # (B, L, d_inner)
        rows, length = dt.shape[:2]
        weights, offsets = dt.new_ones(rows, length), self._offsets
        if self._mask is not None:
            kept = self._mask != 0
            if kept.shape == (rows, length):
                weights = kept.to(dt.dtype)
            else:  # the layer has packed what is kept
                offsets = F.pad(kept.sum(1).cumsum(0), (1, 0))
        if offsets is None:
            sums, counts = (dt * weights[..., None]).sum(1), weights.sum(1)
        else:
            sequence = torch.arange(len(offsets) - 1, device=dt.device).repeat_interleave(offsets.diff())
            sums = dt.new_zeros(len(offsets) - 1, dt.shape[2]).index_add_(0, sequence, dt[0])
            counts = offsets.diff().to(dt.dtype)
        if self.sums is not None and len(self.sums) != len(sums):
            raise ValueError(
                f"lyapunov_exponents: {self.name!r} was called with {len(self.sums)} sequences and then with "
                f"{len(sums)}; all calls of a layer must have the same"
            )
        self.sums = sums if self.sums is None else self.sums + sums
        self.counts = counts if self.counts is None else self.counts + counts

    def exponents(self, per_sequence: bool) -> Tensor:
        if self.sums is None:
            raise ValueError(f"lyapunov_exponents: the model never called x_proj of {self.name!r} on this batch")
        sums, counts = (self.sums, self.counts) if per_sequence else (self.sums.sum(0), self.counts.sum())
        if not bool((counts > 0).all()):
            raise ValueError("lyapunov_exponents: batch has a sequence without tokens; each must have at least one")
        wide = torch.promote_types(self.layer.A_log.dtype, torch.float32)  # the dtype that the layer's A is made in
        A = -torch.exp(self.layer.A_log.detach().to(wide)).double()
        return (A * (sums / counts[..., None])[..., None]).cpu()


def _step_sizes(layer: nn.Module, projected: Tensor) -> Tensor:
    """dt after softplus, from what x_proj gave: as the layer makes it, and as its kernel does in float32."""
    dt = projected[..., : projected.shape[-1] - 2 * layer.A_log.shape[1]]
    dt, bias = product_and_bias(layer.dt_proj, dt)
    dt = dt.to(torch.promote_types(dt.dtype, torch.float32))
    return F.softplus(dt if bias is None else dt + bias.to(dt.dtype))
