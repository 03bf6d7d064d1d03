"""lora_linear_multi in Triton: the passes of lora_linear, over rows in the order of their adapters.

The factors lie one after the other in one tensor, and a chunk of rows belongs to one adapter (`_sorted`), so that no
row copies weights. Rows without an adapter follow the others, as those of one more adapter, of rank 0. Few rows are not
sorted: each is a chunk, and its programs read its adapter directly. Nothing waits for the GPU.
"""

import functools
import itertools

import torch

from trifuse.triton_kernels import lora_linear_passes as passes
from trifuse.triton_kernels import lora_linear_sums as sums
from trifuse.triton_kernels.lora_linear_passes import Factor, Rows

__all__ = ["lora_linear_multi_bwd", "lora_linear_multi_fwd"]

FEW_ROWS = 64  # up to so many, or two of each adapter, no two rows share a read of their adapter


@functools.lru_cache(maxsize=256)
def _offsets(ranks, device):
    """The ranks before each adapter; the last of them, of rows without an adapter, has none."""
    return torch.tensor((0, *itertools.accumulate(ranks), sum(ranks)), dtype=torch.int64, device=device)


def _packed(factors):
    """The factors one after the other: as they are where they lie so in memory, else copied."""
    first = factors[0]
    memory, end = first.untyped_storage().data_ptr(), first.data_ptr()
    for one in factors:
        if not one.is_contiguous() or one.untyped_storage().data_ptr() != memory or one.data_ptr() != end:
            return torch.cat([one.reshape(-1) for one in factors])
        end += one.numel() * one.element_size()
    return first.as_strided((sum(one.numel() for one in factors),), (1,))


def _whose(index, n):
    """The adapter of each row; n where it has none."""
    return torch.where((index < 0) | (index >= n), n, index)


def _one_by_one(index, n, offsets):
    place = torch.arange(index.shape[0], device=index.device)
    chunks = torch.stack((_whose(index, n), place, place + 1), 1)
    return Rows(index.shape[0], 1, index.shape[0], chunks, offsets=offsets)


def _sorted(index, n, offsets, size):
    """The rows sorted by adapter, in chunks of at most `size` of one adapter."""
    rows = index.shape[0]
    sorted_index, order = torch.sort(_whose(index, n), stable=True)
    starts = torch.searchsorted(sorted_index, torch.arange(n + 2, device=index.device))
    first = torch.nn.functional.pad(((starts.diff() + (size - 1)) // size).cumsum(0), (1, 0))
    n_chunks = rows // size + n + 1  # as many as there can be; those beyond have no rows
    chunk = torch.arange(n_chunks, device=index.device)
    adapter = (torch.searchsorted(first, chunk, right=True) - 1).clamp(max=n)
    begin = starts[adapter] + (chunk - first[adapter]) * size
    end = torch.minimum(begin + size, starts[adapter + 1])
    return Rows(rows, size, n_chunks, torch.stack((adapter, begin, end), 1), order, first, offsets)


class _Adapters:
    """The lists as what the kernels take."""

    def __init__(self, A, B, width, index):
        self.n, self.ranks = len(A), tuple(one.shape[0] for one in A)
        self.width = width
        self.columns, self.out = A[0].shape[1], B[0].shape[0]
        self.offsets = _offsets(self.ranks, index.device)
        self.A = Factor(_packed(A), (0, 0), 0, self.width, self.columns)
        self.B = Factor(_packed(B), (0, 0), 0, self.width, self.out, by_column=True)
        self.index = index

    def rows(self, direct):
        rows = self.index.shape[0]
        if direct and rows <= max(FEW_ROWS, 2 * self.n):
            return _one_by_one(self.index, self.n, self.offsets)
        size = passes.chunk_size(rows, min(self.columns, self.out), self.width)
        return _sorted(self.index, self.n, self.offsets, size)

    def gradients(self, gradient, like):
        """The gradient of each adapter's factor."""
        found = [torch.empty_like(one, memory_format=torch.contiguous_format) for one in like]
        packed = like[0].new_empty((sum(one.numel() for one in like),))
        sums.join(gradient, packed, 0, self.width, self.n)
        sizes = [one.numel() for one in found]
        torch.split_with_sizes_copy(packed, sizes, out=[one.view(-1) for one in found])
        return found


def lora_linear_multi_fwd(x, weight, bias, A, B, scales, index, save):
    n = x.shape[0]
    adapters = _Adapters(A, B, scales.shape[1], index)
    y = x.new_empty((n, adapters.out))
    S = x.new_empty((n if save else 0, adapters.width), dtype=torch.float32)
    if adapters.out == 0:
        return y, S.zero_()
    rows = adapters.rows(direct=True)
    S_parts = passes.down(x, adapters.A, rows)
    passes.up(S_parts, adapters.B, scales.contiguous(), 1.0, rows, y, bias=bias, S=S if save else None)
    return y.addmm_(x, weight.t()), S


def lora_linear_multi_bwd(dy, x, weight, A, B, S, scales, index, needs):
    needs_x, needs_weight, needs_bias, needs_A, needs_B, needs_scales = needs
    dx = x.new_empty(x.shape if needs_x else (0,))
    dweight = weight.new_empty(weight.shape if needs_weight else (0,))
    dbias = dy.new_empty(weight.shape[:1] if needs_bias else (0,))
    dscales = scales.new_empty(scales.shape if needs_scales else (0,))
    dA, dB = ([one.new_empty((0,)) for one in factors] for factors in (A, B))
    dy = passes.readable(dy)
    adapters = _Adapters(A, B, scales.shape[1], index)
    rows = adapters.rows(direct=False)
    Z, gradient_A, gradient_B = passes.backward(
        dy, x, adapters.A, adapters.B, S, scales.contiguous(), 1.0, rows, rows, dx if needs_x else None, needs_A,
        needs_B, needs_scales,
    )  # fmt: skip
    if needs_A:
        dA = adapters.gradients(gradient_A, A)
    if needs_B:
        dB = adapters.gradients(gradient_B, B)
    if needs_scales:
        places = _offsets((adapters.width,) * adapters.n, index.device)
        sums.scale_gradient(S, Z, dscales, 1.0, rows, 0, adapters.width, places, adapters.n)
    passes.base_gradients(dy, x, weight, needs, dx, dweight, dbias)
    return dx, dweight, dbias, dA, dB, dscales
