"""What every layer with a low-rank adapter shares: ranks and scales, merging, checkpoints."""

from __future__ import annotations

import math
import numbers
import re
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from trifuse import ops

__all__ = ["SCALINGS", "LowRank", "adapted_by", "adapter_dtype_beside", "check_options", "scale_of", "take_over"]

SCALINGS = ("lora", "rslora")
_NO_REPLACEMENT = "it must be a plain one, whose forward an adapter can take the place of"


class LowRank(nn.Module):
    """A layer with a frozen weight, seen as a matrix ``(N, K)``, and ``scale * lora_B @ lora_A`` beside it.

    It is mixed in before a class of ``torch.nn``. ``lora_A`` is ``(rank, K)``, ``lora_B`` ``(N, rank)``.
    """

    rank: int
    alpha: float
    scaling: str
    dropout: float
    nested_ranks: tuple[int, ...] | None
    lora_A: Tensor
    lora_B: Tensor
    weight: Tensor
    has_adapter = True
    tied_to: str | None = None  # which other module of its model has the same weight
    frozen = False  # whether only the last active rank is trained: of the layers with nested ranks

    # What a kind of layer says of itself.

    def _matrix(self, weight: Tensor) -> Tensor:
        """The weight as the ``(N, K)`` matrix that has the update."""
        return weight

    def _factor_sizes(self) -> tuple[int, int]:
        """How many rows ``lora_B`` has, and how many columns ``lora_A``."""
        out, columns = self._matrix(self.weight).shape
        return out, columns

    def _full_B(self) -> Tensor:
        """``lora_B`` with a row for each row of the matrix."""
        return self.lora_B

    def reset_lora_parameters(self) -> None:
        """Draw ``lora_A`` anew and set ``lora_B`` to zero: the layer is then what it was without an adapter."""
        if self.merged:
            raise RuntimeError(f"{type(self).__name__}: the update is merged; unmerge() before it is drawn anew")
        with torch.no_grad():
            nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
            self.lora_B.zero_()

    def _add_adapter(
        self,
        rank: int,
        alpha: float | None,
        dropout: float,
        scaling: str,
        adapter_dtype: torch.dtype | None,
        nested_ranks: Sequence[int] | None = None,
        rows: int | None = None,
    ) -> None:
        """Check the options and make the factors, with `rows` of ``lora_B``, by default all."""
        name, weight = type(self).__name__, self.weight
        check_options(name, rank, alpha, dropout, scaling)
        self.rank, self.alpha = int(rank), float(rank if alpha is None else alpha)
        self.dropout, self.scaling = float(dropout), scaling
        self._merge, self._merge_options = None, {}
        self.nested_ranks = None if nested_ranks is None else nested(name, nested_ranks, self.rank)
        self._set_nested_scales()
        out, columns = self._factor_sizes()
        factory = {"device": weight.device, "dtype": adapter_dtype_beside(name, weight, adapter_dtype)}
        self.lora_A = nn.Parameter(torch.empty(self.rank, columns, **factory))
        self.lora_B = nn.Parameter(torch.empty(out if rows is None else rows, self.rank, **factory))
        weight.requires_grad_(False)
        self.reset_lora_parameters()

    # Its update.

    @property
    def active_rank(self) -> int:
        """How many ranks are in use: all."""
        return self.rank

    @property
    def scale(self) -> float:
        """What the product of the factors is multiplied by: ``alpha / rank``, or ``alpha / sqrt(rank)`` ("rslora")."""
        return scale_of(self.alpha, self.active_rank, self.scaling)

    def factor(self) -> float | Tensor:
        """``scale``, or with ``nested_ranks`` one factor per rank ``(rank,)``: the sum over the ranks that reach it."""
        return self.scale if self.nested_ranks is None else self._nested_scales

    def _set_nested_scales(self) -> None:
        scales = None
        if self.nested_ranks is not None:
            each = [
                sum(scale_of(self.alpha, m, self.scaling) for m in self.nested_ranks if m > i) for i in range(self.rank)
            ]
            wide = torch.promote_types(self.weight.dtype, torch.float32)
            scales = torch.tensor(each, device=self.weight.device, dtype=wide)
        self.register_buffer("_nested_scales", scales, persistent=False)

    def _update(self) -> tuple[Tensor, Tensor, float]:
        """A ``(b, K)``, B ``(N, b)`` and a number whose product is the update; gradients flow."""
        A, B, factor, used = self.lora_A, self._full_B(), self.factor(), self.active_rank
        if isinstance(factor, Tensor):
            return A, (B * factor).to(B.dtype), 1.0
        if used < self.rank:
            A, B = A[:used], B[:, :used]
        if self.frozen:
            A = torch.cat((A[:-1].detach(), A[-1:]))
            B = torch.cat((B[:, :-1].detach(), B[:, -1:]), dim=1)
        return A, B, factor

    # Merging.

    @property
    def merged(self) -> bool:
        """Whether ``weight`` holds the update."""
        return self._merge is not None

    def merge(self, *, rounding: str = "nearest", seed: int | None = None) -> None:
        """Add the update to ``weight``; a copy of what it was is kept for ``unmerge``.

        Args:
            rounding, seed: as in ``trifuse.lora_merge_``.

        Raises:
            RuntimeError: it is merged already, or the weight is another module's too.
        """
        if self.merged:
            raise RuntimeError(f"{type(self).__name__}: merge on a layer that is merged; unmerge() it first, or swap()")
        if self.tied_to is not None:
            raise RuntimeError(
                f"{type(self).__name__}: merge on a weight that {self.tied_to!r} shares, which would change too"
            )
        if rounding == "stochastic" and seed is None:
            seed = int(torch.randint(2**63 - 1, ()))  # known, so that the same bits can be made again
        options = {"rounding": rounding, "seed": seed}
        with torch.no_grad():
            self._merge = self._merged_into(self._matrix(self.weight.detach()), options)
        self._merge_options = options

    def unmerge(self) -> None:
        """Give ``weight`` the bits back that it had before ``merge``.

        Raises:
            RuntimeError: it is not merged.
        """
        if not self.merged:
            raise RuntimeError(f"{type(self).__name__}: unmerge on a layer that is not merged; merge() comes first")
        self._restore(self._matrix(self.weight.detach()))
        self._merge = None

    def _merged_into(self, matrix: Tensor, options: dict[str, Any]) -> Any:
        return ops.lora_merge_(matrix, *self._update(), **options)

    def _merged_again(self) -> None:
        """Merge other factors, or others' ranks, in place of those that are merged, in one pass."""
        with torch.no_grad():
            matrix = self._matrix(self.weight.detach())
            ops.lora_swap_(matrix, self._merge, *self._update(), **self._merge_options)

    def _restore(self, matrix: Tensor) -> None:
        with torch.no_grad():
            ops.lora_unmerge_(matrix, self._merge)

    def _kept(self) -> Tensor:
        """The matrix that was merged into, as it was."""
        return self._merge.original

    def original_weight(self) -> Tensor:
        """The weight without the update: the parameter's own memory, or while it is merged that of the kept copy."""
        return self._kept().view(self.weight.shape) if self.merged else self.weight.detach()

    def swap(self, lora_A: Tensor, lora_B: Tensor, scale: float | None = None) -> None:
        """Put another adapter in the place of the merged one, in one pass over the weight.

        Args:
            lora_A, lora_B: the factors, of any rank; they are copied.
            scale: what their product is multiplied by (``alpha`` is set accordingly); by default ``alpha`` stays.

        Raises:
            RuntimeError: the layer is not merged.
            ValueError: the factors don't fit.
        """
        self._check_swap(lora_A, lora_B, scale)
        self._set_factors(lora_A, lora_B)
        if scale is not None:
            self.alpha = scale / scale_of(1.0, self.active_rank, self.scaling)
        self._merged_again()

    def _check_swap(self, lora_A: Tensor, lora_B: Tensor, scale: float | None) -> None:
        name = type(self).__name__
        if not self.merged:
            raise RuntimeError(f"{name}: swap on a layer that is not merged; merge() it first, or load the adapter")
        rank, columns = lora_A.shape[0], self.lora_A.shape[1]
        if rank < 1 or lora_A.shape != (rank, columns) or lora_B.shape != (self.lora_B.shape[0], rank):
            raise ValueError(
                f"{name}: lora_A has shape {tuple(lora_A.shape)} and lora_B {tuple(lora_B.shape)}; they must be "
                f"(r, {columns}) and ({self.lora_B.shape[0]}, r)"
            )
        check_options(name, rank, scale, self.dropout, self.scaling, alpha_name="scale")
        if self.nested_ranks is not None and (scale is not None or rank != self.rank):
            raise ValueError(f"{name}: the ranks {self.nested_ranks} are nested; an adapter of the same rank must come")

    def change_rank(self, rank: int) -> None:
        """Give the adapter another rank, merged or not; ``scale`` stays, and ``alpha`` follows.

        Downwards the update becomes the closest one of that rank (``trifuse.lora_truncate``), upwards it stays the
        same, and ``lora_B`` gets columns of zeros. ``lora_A`` and ``lora_B`` are new parameters, for the optimizer to
        be told.

        Args:
            rank: at least 1.
        """
        check_options(type(self).__name__, rank, None, self.dropout, self.scaling)
        if rank == self.rank:
            return
        scale, rank = self.scale, int(rank)
        # Of one factor for all ranks the scale stays outside, so that upwards every bit stays.
        scales = {} if self.nested_ranks is None else {"scale": self.factor(), "new_scale": scale}
        self._set_factors(*ops.lora_change_rank(self.lora_A.detach(), self.lora_B.detach(), rank, **scales))
        self.alpha = scale / scale_of(1.0, rank, self.scaling)
        self.nested_ranks = None
        self._set_nested_scales()
        if self.merged:
            self._merged_again()

    @torch.no_grad()
    def _set_factors(self, A: Tensor, B: Tensor) -> None:
        for name, value in (("lora_A", A), ("lora_B", B)):
            old = getattr(self, name)
            if value.shape == old.shape:
                old.copy_(value)
            else:
                value = value.detach().to(old, copy=True).contiguous()
                setattr(self, name, nn.Parameter(value, requires_grad=old.requires_grad))
        self.rank = A.shape[0]

    # What others ask.

    def acts_as(self, kind: type[nn.Module]) -> bool:
        """Whether the layer does what a `kind` with its weight and bias would, and loses no gradient."""
        return self.merged and isinstance(self, kind) and not self._wants_gradient()

    def _wants_gradient(self) -> bool:
        return torch.is_grad_enabled() and any(
            one.requires_grad for name, one in self.named_parameters(recurse=False) if name.startswith("lora_")
        )

    def _check_merged_gradient(self) -> None:
        if self._wants_gradient():
            name = type(self).__name__
            raise RuntimeError(
                f"{name}: the update is merged, and its factors would get no gradient; unmerge() it to train it, or "
                "run it under torch.no_grad()"
            )

    def extra_repr(self) -> str:
        own = f'{super().extra_repr()}, rank={self.rank}, alpha={self.alpha:g}, scaling="{self.scaling}"'
        return own + (f", dropout={self.dropout:g}" if self.dropout else "") + (", merged" if self.merged else "")

    # A checkpoint holds the base weight and the adapter, never their sum.

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.merged:
            destination[prefix + "weight"] = self.original_weight()

    def _load_from_state_dict(
        self, state_dict: dict, prefix: str, local_metadata: dict, strict: bool, missing_keys: list[str], *rest: Any
    ) -> None:
        """A merged layer is unmerged. A plain layer's checkpoint leaves the adapter as it is."""
        own = [prefix + name for name, _ in self.named_parameters() if name.startswith("lora_")]
        if self.merged and any(prefix + name in state_dict for name in self._parameters):
            self.unmerge()
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, *rest)
        if not any(name in state_dict for name in own):
            missing_keys[:] = [name for name in missing_keys if name not in own]

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Of a merged layer the base weight is moved or cast, and the update merged into the result."""
        options = self._merge_options if self.merged else None
        if options is not None:
            self.unmerge()
        super()._apply(fn, recurse)
        self._set_nested_scales()
        if options is not None:
            self.merge(**options)
        return self


def take_over(cls: type[nn.Module], layer: nn.Module, kind: type[nn.Module]) -> Any:
    """A `cls` with the parameters, hooks and attributes of a plain layer, and as yet without an adapter."""
    name, was = cls.__name__, type(layer).__name__
    if getattr(layer, "has_adapter", False):
        raise ValueError(f"{name}: the layer is a {was}; it has an adapter already")
    if not isinstance(layer, kind):
        raise TypeError(f"{name}: the layer is a {was}; it must be a torch.nn.{kind.__name__}")
    if type(layer).forward is not kind.forward or "forward" in layer.__dict__:
        raise TypeError(f"{name}: the layer is a {was} with a forward of its own; {_NO_REPLACEMENT}")
    weight = layer._parameters.get("weight")
    if weight is None or parametrize.is_parametrized(layer) or nn.parameter.is_lazy(weight):
        raise TypeError(f"{name}: the layer's weight is computed, or not made yet; {_NO_REPLACEMENT}")
    if not weight.is_floating_point():
        raise TypeError(f"{name}: the layer's weight is {weight.dtype}; it must be floating point")
    new = cls.__new__(cls)
    new.__dict__.update(layer.__dict__)
    new._parameters, new._buffers, new._modules = (
        own.copy() for own in (layer._parameters, layer._buffers, layer._modules)
    )
    return new


def adapter_dtype_beside(name: str, weight: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    """The dtype of an adapter, by default float32 beside half precision."""
    half = weight.dtype in (torch.float16, torch.bfloat16)
    dtype = dtype or (torch.float32 if half else weight.dtype)
    if dtype != weight.dtype and not (half and dtype == torch.float32):
        also = " or torch.float32" if half else ""
        raise TypeError(f"{name}: adapter_dtype is {dtype}; it must be {weight.dtype}{also}")
    return dtype


def scale_of(alpha: float, rank: int, scaling: str) -> float:
    return alpha / (rank if scaling == "lora" else math.sqrt(rank))


def adapted_by(name: str) -> str | None:
    """The prefix of the layer that a parameter of this name adapts, or None if it is of no adapter."""
    found = re.search(r"(^|\.)lora_", name)
    return None if found is None else name[: found.end(1)]


def check_options(name: str, rank: Any, alpha: Any, dropout: Any, scaling: Any, *, alpha_name: str = "alpha") -> None:
    if isinstance(rank, bool) or not isinstance(rank, numbers.Integral) or rank < 1:
        raise ValueError(f"{name}: rank is {rank!r}; it must be an int of at least 1")
    if alpha is not None and (
        isinstance(alpha, bool) or not isinstance(alpha, numbers.Real) or not 0 < alpha < math.inf
    ):
        raise ValueError(f"{name}: {alpha_name} is {alpha!r}; it must be a positive number")
    if isinstance(dropout, bool) or not isinstance(dropout, numbers.Real) or not 0 <= dropout < 1:
        raise ValueError(f"{name}: dropout is {dropout!r}; it must be in [0, 1)")
    if scaling not in SCALINGS:
        raise ValueError(f'{name}: scaling is {scaling!r}; it must be "lora" or "rslora"')


def nested(name: str, ranks: Sequence[int], rank: int) -> tuple[int, ...]:
    """Nested ranks in ascending order; the last is the adapter's."""
    ranks = tuple(ranks)
    if not ranks or any(isinstance(m, bool) or not isinstance(m, numbers.Integral) for m in ranks):
        raise ValueError(f"{name}: nested_ranks is {ranks!r}; it must hold whole numbers")
    if ranks[0] < 1 or ranks[-1] != rank or any(a >= b for a, b in pairwise(ranks)):
        raise ValueError(f"{name}: nested_ranks is {ranks}; it must ascend from at least 1 to the rank, {rank}")
    return tuple(int(m) for m in ranks)
