"""AdamW for low-rank adapters."""

from __future__ import annotations

import itertools
import numbers
import re
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from trifuse.ops.lora_adamw import Call, run

__all__ = ["LowRankAdamW"]

_OP = "LowRankAdamW"
# lora_A, lora_B (this package, loralib), lora_A.default.weight, lora_embedding_B.default (PEFT)
_FACTOR = re.compile(r"(?:^|\.)lora_(?:embedding_)?([AB])(?:\.|$)")


class LowRankAdamW(torch.optim.Optimizer):
    """AdamW whose ranks are parameters of their own: those that are not active keep every bit.

    A factor of an adapter may be trained a few ranks at a time (DyLoRA). A rank that is not active in a step is not
    touched by it: not its numbers, by weight decay neither, nor its moments, nor its count of steps, so that the bias
    correction of a rank that is trained rarely is right. Where all ranks are active the results are those of
    ``torch.optim.AdamW``. A whole group is one fused pass over parameters, gradients and moments.

    Which ranks are active: ``(first, last)``, those with ``first <= i < last`` counted from 0. A module announces it as
    the attribute ``active_rows`` of its parameters (``trifuse.nn.DyLoRALinear`` does); a group may have it as its
    option ``active``; otherwise all are.

    Where the ranks lie: along axis 0 of A, ``(r, K)``, and along axis 1 of B, ``(N, r)``. What is A and what is B is
    told by names, ``LowRankAdamW(model.named_parameters())``, as of this package, loralib or PEFT; by a group's option
    ``rank_dim``; or by the attribute ``rank_dim`` of a parameter. Other parameters are stepped as one.

    Args:
        params: parameters, ``(name, parameter)`` pairs, or dicts of them with options of their own: those below,
            ``rank_dim`` (0, 1, ... or None) and ``active``.
        lr: the learning rate, at least 0.
        betas: of the two moments, each in [0, 1).
        eps: added to the denominator, at least 0.
        weight_decay: decoupled, at least 0.
        lr_ratio: what the learning rate of B is that of A times (LoRA+; there about 16 is advised).
        maximize: step along the gradient instead of against it.

    Parameters may be float32, float16, bfloat16 or float64. Moments are float32, float64 beside float64: half
    precision, as ``torch.optim.AdamW`` keeps them beside such parameters, would lose small changes.

    Raises:
        TypeError, ValueError: naming the option, what it was and what it must be.

    Source: Loshchilov and Hutter, "Decoupled Weight Decay Regularization", 2019 (arXiv 1711.05101); Hayou et al.,
    "LoRA+: Efficient Low Rank Adaptation of Large Models", 2024 (arXiv 2402.12354); Valipour et al., "DyLoRA", 2022
    (arXiv 2210.07558), section 3 (frozen mode).
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[tuple[str, Tensor]] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        lr_ratio: float = 1.0,
        maximize: bool = False,
    ):
        defaults = {
            "lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "lr_ratio": lr_ratio,
            "maximize": maximize, "rank_dim": None, "active": None,
        }  # fmt: skip
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters with options of their own, as in the constructor."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            _check_options(group)
            dims = [self._rank_dim(group, at) for at in range(len(group["params"]))]
            if group["lr_ratio"] != 1 and all(dim is None for dim in dims):
                raise ValueError(
                    f"{_OP}: lr_ratio is {group['lr_ratio']} and no parameter is known to be an adapter's A or B; pass "
                    "model.named_parameters(), or groups with rank_dim (0 for A, 1 for B)"
                )
        except Exception:
            self.param_groups.pop()
            raise

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of all parameters that have a gradient.

        Args:
            closure: computes the loss anew, and its gradients.

        Returns:
            What the closure returned, or None.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            options = (*group["betas"], group["eps"], group["weight_decay"], bool(group["maximize"]))
            for fields in self._batches(group).values():
                run(Call(*fields, *options))
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what ``state_dict`` returned. Moments stay in their own precision."""
        groups = state_dict.get("param_groups", [])
        if any("rank_dim" not in group or "lr_ratio" not in group for group in groups):
            raise ValueError(
                "LowRankAdamW: state_dict is that of another optimizer: its groups have no rank_dim or lr_ratio, its "
                "states no steps per rank"
            )
        super().load_state_dict(state_dict)
        saved = itertools.chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        here = itertools.chain.from_iterable(group["params"] for group in self.param_groups)
        for key, param in zip(saved, here, strict=True):
            # torch's own rounds every state to the dtype of its parameter.
            for name, value in state_dict["state"].get(key, {}).items():
                dtype = torch.float32 if name == "steps" else torch.promote_types(param.dtype, torch.float32)
                value = value.to(device=param.device, dtype=dtype)
                self.state[param][name] = value.clone(memory_format=torch.contiguous_format)

    def _batches(self, group: dict[str, Any]) -> dict[torch.device, list[list[Any]]]:
        """The arguments of a step by device: lists with an entry for each parameter that has a gradient."""
        batches: dict[torch.device, list[list[Any]]] = {}
        for at, param in enumerate(group["params"]):
            grad = param.grad
            if grad is None:
                continue
            if grad.is_sparse:
                raise RuntimeError(f"{_OP}: {_name(group, at)} has a sparse gradient; it must be dense")
            rank_dim = self._rank_dim(group, at)
            whole = rank_dim is None
            active = _active(group, at, 1 if whole else param.shape[rank_dim], whole)
            if active[0] == active[1]:
                continue
            lr = group["lr"] * (group["lr_ratio"] if rank_dim == 1 else 1)
            state = self._state_of(param, rank_dim)
            tensors = [param, grad.contiguous(), state["exp_avg"], state["exp_avg_sq"]]
            if whole:  # one row
                rank_dim = 0
                tensors = [one.unsqueeze(0) for one in tensors]
            fields = (*tensors, state["steps"], rank_dim, *active, lr)
            for column, field in zip(batches.setdefault(param.device, [[] for _ in fields]), fields, strict=True):
                column.append(field)
        return batches

    def _state_of(self, param: Tensor, rank_dim: int | None) -> dict[str, Tensor]:
        state = self.state[param]
        if not state:
            ranks = 1 if rank_dim is None else param.shape[rank_dim]
            acc = torch.promote_types(param.dtype, torch.float32)
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = torch.zeros(param.shape, dtype=acc, device=param.device)
            state["steps"] = torch.zeros(ranks, dtype=torch.float32, device=param.device)
        return state

    @staticmethod
    def _rank_dim(group: dict[str, Any], at: int) -> int | None:
        """The axis along which the ranks of a parameter lie, or None."""
        param = group["params"][at]
        rank_dim = group["rank_dim"]
        if rank_dim is None:
            rank_dim = getattr(param, "rank_dim", None)
        if rank_dim is None and "param_names" in group and (found := _FACTOR.search(group["param_names"][at])):
            rank_dim = "AB".index(found[1])
        if rank_dim is None:
            return None
        if isinstance(rank_dim, bool) or not isinstance(rank_dim, numbers.Integral):
            raise TypeError(f"{_OP}: rank_dim is {type(rank_dim).__name__}; it must be an int or None")
        if not 0 <= rank_dim < param.dim():
            raise ValueError(
                f"{_OP}: rank_dim is {rank_dim}; for {_name(group, at)} of shape {tuple(param.shape)} it must be 0 to "
                f"{param.dim() - 1}"
            )
        return int(rank_dim)


def _name(group: dict[str, Any], at: int) -> str:
    return repr(group["param_names"][at]) if "param_names" in group else f"parameter {at}"


def _active(group: dict[str, Any], at: int, ranks: int, whole: bool) -> tuple[int, int]:
    """The ranks of a parameter that are stepped."""
    active = getattr(group["params"][at], "active_rows", None)
    if active is None:
        active = group["active"]
    if active is None:
        return 0, ranks
    if whole:
        raise ValueError(
            f"{_OP}: {_name(group, at)} has active rows {active} and is not known to be an adapter's A or B; pass "
            "model.named_parameters(), or groups with rank_dim (0 for A, 1 for B)"
        )
    try:
        first, last = (int(bound) for bound in active)
    except (TypeError, ValueError):
        raise TypeError(
            f"{_OP}: active rows of {_name(group, at)} are {active!r}; they must be (first, last)"
        ) from None
    if not 0 <= first <= last <= ranks:
        raise ValueError(
            f"{_OP}: active rows of {_name(group, at)} are {(first, last)}; they must lie in its {ranks} ranks"
        )
    return first, last


def _check_options(group: dict[str, Any]) -> None:
    for name in ("lr", "eps", "weight_decay", "lr_ratio"):
        value = group[name]
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            raise TypeError(f"{_OP}: {name} is {type(value).__name__}; it must be a number")
        if not 0 <= value < float("inf"):
            raise ValueError(f"{_OP}: {name} is {value}; it must be at least 0 and finite")
    if not isinstance(group["betas"], (tuple, list)) or len(group["betas"]) != 2:
        raise TypeError(f"{_OP}: betas is {group['betas']!r}; it must be two numbers")
    for beta in group["betas"]:
        if not isinstance(beta, numbers.Real) or not 0 <= beta < 1:
            raise ValueError(f"{_OP}: betas is {tuple(group['betas'])}; each must be in [0, 1)")
    for at, param in enumerate(group["params"]):
        if not param.is_floating_point():
            raise TypeError(f"{_OP}: {_name(group, at)} is {param.dtype}; it must be a floating-point tensor")
