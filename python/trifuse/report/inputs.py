"""The tensors of a call of an op, in any dtype and layout, and the gradient of its output."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

__all__ = ["Axes", "Draw", "Inputs", "swapped"]

_WIDE = {True: torch.complex128, False: torch.float64}


@dataclass(frozen=True)
class Axes:
    """What is known of every argument of an op.

    Args:
        of: letters of the axes of each argument and of "out" and "dout"; sequences are given in "bld".
        weights: arguments that stay in the accumulation dtype whatever the dtype of the sequences.
        mutated: arguments changed in place; they are outputs too and ask for no gradient.
        frozen: arguments that the backward pass takes as constants.
        has_layouts: three-axis tensors that begin with "BL" may come as (B, channels, L) instead.
    """

    of: dict[str, str]
    weights: tuple[str, ...] = ()
    mutated: tuple[str, ...] = ()
    frozen: tuple[str, ...] = ()
    has_layouts: bool = True

    def turns(self, name: str) -> bool:
        axes = self.of.get(name, "")
        return self.has_layouts and len(axes) == 3 and axes.startswith("BL")


def swapped(tensor: Tensor, turn: bool) -> Tensor:
    return tensor.transpose(1, 2) if turn else tensor


@dataclass(frozen=True)
class Inputs:
    """The arguments of one call by name, with "dout" among them where there is a backward pass.

    `options` are arguments that are no tensors. Weights are in the accumulation dtype.
    """

    axes: Axes
    layout: str
    tensors: dict[str, Tensor]
    options: dict[str, object]

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def get(self, name: str) -> Tensor | None:
        return self.tensors.get(name)

    @property
    def dout(self) -> Tensor:
        return self.tensors["dout"]

    @cached_property
    def leaves(self) -> dict[str, Tensor]:
        """The differentiable arguments as leaves; they share the storage of the inputs."""
        constant = ("dout", *self.axes.mutated, *self.axes.frozen)
        return {
            name: tensor.detach().requires_grad_()
            for name, tensor in self.tensors.items()
            if name not in constant and (tensor.is_floating_point() or tensor.is_complex())
        }

    def asking(self) -> Inputs:
        """The same call on the leaves, so that its output can be differentiated."""
        return replace(self, tensors={**self.tensors, **self.leaves})

    def bytes(self, backward: bool) -> int:
        """Bytes of inputs and output, and for the backward pass of the gradient of every leaf."""
        everything = sum(tensor.nbytes for tensor in self.tensors.values())  # the output is as large as its gradient
        return everything + (sum(leaf.nbytes for leaf in self.leaves.values()) if backward else 0)

    def to(self, *, dtype: torch.dtype | None = None, layout: str | None = None) -> Inputs:
        """The same values in another sequence dtype and layout, contiguous. float64 is for everything,
        weights included; complex arguments stay complex."""
        turn = layout is not None and layout != self.layout
        changed = {}
        for name, tensor in self.tensors.items():
            target = tensor.dtype
            if dtype == torch.float64 and (tensor.is_floating_point() or tensor.is_complex()):
                target = _WIDE[tensor.is_complex()]
            elif dtype is not None and tensor.is_floating_point() and not dtype.is_complex:
                target = tensor.dtype if name in self.axes.weights else dtype
            changed[name] = swapped(tensor, turn and self.axes.turns(name)).to(target).contiguous()
        return replace(self, layout=layout if layout is not None else self.layout, tensors=changed)

    def fresh(self) -> Inputs:
        """The same with copies of what the call changes in place."""
        return replace(self, tensors={**self.tensors, **{name: self[name].clone() for name in self.axes.mutated}})

    def take(self, letter: str, index: Tensor) -> Inputs:
        """The call restricted to some places of an axis whose places are independent of each other."""
        part = {name: taken(self.axes, name, tensor, self.layout, letter, index)
                for name, tensor in self.tensors.items()}  # fmt: skip
        return replace(self, tensors=part)


def taken(axes: Axes, name: str, tensor: Tensor, layout: str, letter: str, index: Tensor) -> Tensor:
    """Some places of one axis of an argument; all of it if it has no such axis."""
    letters = axes.of[name]
    if layout == "bdl" and axes.turns(name):
        letters = letters[0] + letters[2] + letters[1]
    return tensor.index_select(letters.index(letter), index) if letter in letters else tensor


class Draw:
    """Where the values of a call come from: a seeded generator, or, without a seed, they are all one.

    Those are for asking what a call would run on, so no check of values may stumble over them; they work as fake
    tensors of any device.
    """

    def __init__(self, device: str | torch.device, seed: int | None = 0):
        self.device = device
        self.generator = None if seed is None else torch.Generator(device=device).manual_seed(seed)

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        if self.generator is None:
            return torch.ones(shape, device=self.device, dtype=dtype)
        return torch.randn(shape, generator=self.generator, device=self.device, dtype=dtype)

    def uniform(self, *shape: int) -> Tensor:
        if self.generator is None:
            return torch.ones(shape, device=self.device)
        return torch.rand(shape, generator=self.generator, device=self.device)

    def step_bias(self, channels: int) -> Tensor:
        """The bias that gives a Mamba block's first steps: dt between 0.001 and 0.1, log-uniform."""
        dt = torch.exp(self.uniform(channels) * 4.6 - 6.9)
        return dt + torch.log(-torch.expm1(-dt))
