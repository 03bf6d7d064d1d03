"""Slices of an (outer, axis, inner) tensor as Triton kernels meet them: tiles of slices x entries.

With columns the slices of a tile are neighbours in memory and belong to one outer index; otherwise they are any, and
their entries are neighbours. `heads` cuts every slice into pieces of `part` entries, the last of `last_part`, that are
slices of their own.
"""

import triton
import triton.language as tl

from trifuse.triton_kernels.common import wide


@triton.jit
def place(tile, head, heads, outer, inner, part, last_part, SLICES: tl.constexpr, COLUMNS: tl.constexpr):
    """The slices of a tile: their outer and inner index, their place among all, whether they exist; the first entry
    of the head and how many it has."""
    i = tl.arange(0, SLICES)
    if COLUMNS:
        tiles = tl.cdiv(inner, SLICES)
        index = wide(tile % tiles) * SLICES + i
        exists = index < inner
        o = wide(tile // tiles) + tl.zeros((SLICES,), tl.int64)
    else:
        flat = wide(tile) * SLICES + i
        exists = flat < wide(outer) * inner
        o, index = flat // inner, flat % inner
    slot = (wide(head) * outer + o) * inner + index
    return o, index, slot, exists, wide(head) * part, tl.where(head == heads - 1, last_part, part)


@triton.jit
def offsets(strides, o, i, n):
    return (o * strides[0] + i * strides[2])[:, None] + (n * strides[1])[None, :]


@triton.jit
def load(ptr, strides, o, i, n, here):
    return tl.load(ptr + offsets(strides, o, i, n), mask=here, other=0.0)


@triton.jit
def store(ptr, strides, o, i, n, here, value):
    tl.store(ptr + offsets(strides, o, i, n), value.to(ptr.dtype.element_ty), mask=here)


@triton.jit
def taking_part(mask, strides, o, i, n, here):
    """Which entries of a tile take part: those that exist and that the mask, if any, keeps."""
    keep = here
    if mask is not None:
        keep = here & (tl.load(mask + offsets(strides, o, i, n), mask=here, other=0) != 0)
    return keep


@triton.jit
def moments(x, keep):
    """Of each slice of a tile: how many entries take part, their mean in two parts (far from zero, the rounding of one
    would be that of every distance from it), and the sum of the squares of the distances."""
    count = tl.sum(keep.to(tl.float32), 1)
    some = tl.maximum(count, 1.0)
    mean = tl.sum(tl.where(keep, x, 0.0), 1) / some
    d = tl.where(keep, x - mean[:, None], 0.0)
    rest = tl.sum(d, 1) / some
    d = tl.where(keep, d - rest[:, None], 0.0)
    return count, mean, rest, tl.sum(d * d, 1)


@triton.jit
def join(count, mean, squares, more, its_mean, its_rest, its_squares):
    """The moments of two parts of a slice, in float64."""
    n = more.to(tl.float64)
    apart = its_mean.to(tl.float64) + its_rest - mean
    both = count + n
    share = n / tl.maximum(both, 1.0)
    return both, mean + apart * share, squares + its_squares + apart * apart * count * share
