"""lora_linear in Triton: the adapter's passes beside the products of cuBLAS.

What the adapter gives to y and dx is written first, and the matrix product adds to what is there: reading it hides
behind the product, where adding up afterwards would be a pass of its own. The kernels are in lora_linear_passes.py;
sums split among programs are added in a fixed order (lora_linear_sums.py), so that results repeat bit for bit.
"""

import torch

from trifuse.triton_kernels import lora_linear_passes as passes
from trifuse.triton_kernels import lora_linear_sums as sums
from trifuse.triton_kernels.lora_linear_passes import Factor, Rows

__all__ = ["lora_down", "lora_down_bwd", "lora_linear_bwd", "lora_linear_fwd"]


def _dropout(seed, rate):
    """What the kernels are told: the seed, the least word that is kept, and what the kept ones are multiplied by."""
    if seed is None:
        return None, 0, 1.0
    return seed, min(int(rate * 2**32 + 0.5), 2**32 - 1), 1 / (1 - rate)


def _tiles(n):
    """Rows in chunks of one tile each."""
    return Rows(n, 32 if n > 16 else 16)


def _factor_A(lora_A, rank):
    return Factor(lora_A, (lora_A.stride(0), 1), rank, rank, lora_A.shape[1])


def _factor_B(lora_B, rank):
    return Factor(lora_B, (1, lora_B.stride(0)), rank, rank, lora_B.shape[0], by_column=True)


def lora_linear_fwd(
    x, weight, bias, lora_A, lora_B, scale, p, active_rank, frozen, dropout, seed, merged, save
):  # fmt: skip
    n, out = x.shape[0], weight.shape[0]
    y = x.new_empty((n, out))
    S = x.new_empty((n if save else 0, active_rank), dtype=torch.float32)
    if out == 0:
        return y, S.zero_()
    A, B = _factor_A(lora_A, active_rank), _factor_B(lora_B, active_rank)
    S_parts = passes.down(x, A, _tiles(n), _dropout(seed, dropout))
    rows = Rows(n, passes.chunk_size(n, out, active_rank))
    passes.up(S_parts, B, p, scale, rows, y, bias=bias, S=S if save else None)
    return y.addmm_(x, weight.t()), S


def lora_linear_bwd(
    dy, x, weight, lora_A, lora_B, S, scale, p, active_rank, frozen, dropout, seed, merged, needs
):  # fmt: skip
    like = (x, weight, dy, lora_A, lora_B, S)
    shapes = (x.shape, weight.shape, weight.shape[:1], lora_A.shape, lora_B.shape, lora_A.shape[:1])
    grads = [one.new_empty(shape if need else (0,)) for one, shape, need in zip(like, shapes, needs, strict=True)]
    dx, dweight, dbias, dA, dB, dp = grads
    needs_x, _, _, needs_A, needs_B, needs_p = needs
    dy = passes.readable(dy)
    A, B = _factor_A(lora_A, active_rank), _factor_B(lora_B, active_rank)
    rows_out, rows_in = (Rows(x.shape[0], passes.chunk_size(x.shape[0], f.columns, active_rank)) for f in (B, A))
    Z, gradient_A, gradient_B = passes.backward(
        dy, x, A, B, S, p, scale, rows_out, rows_in, dx if needs_x else None, needs_A, needs_B, needs_p,
        _dropout(seed, dropout),
    )  # fmt: skip
    first = active_rank - 1 if frozen else 0
    if needs_A:
        sums.join(gradient_A, dA, first, active_rank)
    if needs_B:
        sums.join(gradient_B, dB, first, active_rank)
    if needs_p:
        sums.scale_gradient(S, Z, dp, scale, Rows(x.shape[0], 128), first, active_rank)
    passes.base_gradients(dy, x, weight, needs, dx, dweight, dbias)
    return tuple(grads)


def lora_down(x, lora_A):
    A = _factor_A(lora_A, lora_A.shape[0])
    return sums.add_up(passes.down(passes.readable(x), A, _tiles(x.shape[0])))


def lora_down_bwd(dS, x, lora_A, x_grad, A_grad):
    x = passes.readable(x)
    dx, dA = x.new_empty(x.shape if x_grad else (0,)), lora_A.new_empty(lora_A.shape if A_grad else (0,))
    A = _factor_A(lora_A, lora_A.shape[0])
    rows = Rows(x.shape[0], passes.chunk_size(*x.shape, A.rank))
    if x_grad or A_grad:
        gradient = passes.up(
            dS.contiguous()[None], A, None, 1.0, rows, dx if x_grad else None, x=x if A_grad else None
        )  # fmt: skip
        if A_grad:
            sums.join(gradient, dA, 0, A.rank)
    return dx, dA
