"""Tensors of any rank seen as slices along one axis, (outer, axis, inner), without copying what is dense."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Slices", "slices_along"]


class Slices(NamedTuple):
    """How a tensor becomes (outer, axis, inner), and back.

    Axes of larger stride than the axis are outer, those of smaller stride inner, so that a transposed tensor is
    read, and its results written, in the order of its own memory.
    """

    shape: torch.Size
    order: tuple[int, ...]  # axes of the tensor, from the largest stride to the smallest
    split: int  # where in `order` the axis stands

    @property
    def sizes(self) -> tuple[int, int, int]:
        sizes = [self.shape[axis] for axis in self.order]
        return _product(sizes[: self.split]), sizes[self.split], _product(sizes[self.split + 1 :])

    def take(self, x: Tensor) -> Tensor:
        """`x`, of a shape that broadcasts to the tensor's, as (outer, axis, inner): a view where there is one."""
        return x.expand(self.shape).permute(self.order).reshape(self.sizes)

    def put_back(self, x: Tensor) -> Tensor:
        """A dense (outer, axis, inner) result as a tensor of the original shape, in the original's memory order."""
        inverse = sorted(range(len(self.order)), key=self.order.__getitem__)
        return x.reshape([self.shape[axis] for axis in self.order]).permute(inverse)

    def place_of(self, axis: int) -> tuple[bool, int]:
        """Where another axis went: (it is outer, how many consecutive slices of that side share one index of it)."""
        place = self.order.index(axis % len(self.shape))
        outer = place < self.split
        inside = self.order[place + 1 : self.split if outer else len(self.order)]
        return outer, _product([self.shape[one] for one in inside])


def slices_along(x: Tensor, dim: int) -> Slices:
    """The slices of `x` along `dim` (negative counts from the end), in the memory order of `x`."""
    dim = dim % x.dim()
    strides = x.stride()
    # Axes of size 1 may have any stride and axes of stride 0 repeat memory: in doubt the order of the shape decides.
    # Inserted one by one: a traced size can be compared, but not sorted by.
    order: list[int] = []
    for axis in range(x.dim()):
        place = len(order)
        while place and strides[order[place - 1]] < strides[axis]:
            place -= 1
        order.insert(place, axis)
    if any(strides[axis] == 0 and x.shape[axis] > 1 for axis in range(x.dim())):
        order = list(range(x.dim()))
    return Slices(x.shape, tuple(order), order.index(dim))


def _product(sizes: list[int]) -> int:
    total = 1
    for size in sizes:
        total *= size
    return total
