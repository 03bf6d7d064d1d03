"""Before the products of Gaussian attention, in Triton: q and k moved to a common centre, and their squared norms.

Distances do not change when q and k are moved alike, and `||q||^2 + ||k||^2 - 2 q.k` keeps its digits only near the
origin. The centre is a mean of keys, one per batch item, head of keys and sequence. What is moved goes to memory, where
the products' kernels find it as they would find q and k.

In half precision the moved numbers must still be exact, since lse and the gradient of gamma are float32. Per column the
centre is either 0, or, where the keys all lie far to one side of it, their mean rounded to the dtype: what lies within
a factor of two of that moves without rounding. What does not is kept whole as a sum of two numbers, and `low_seen`
tells the kernels, which otherwise take one product, to take the others too.
"""

import triton
import triton.language as tl

from trifuse.triton_kernels.common import wide

__all__ = ["centre_kernel", "move_kernel"]

SAMPLES = tl.constexpr(128)  # of keys, at even steps, that are enough for a mean


@triton.jit
def _sample(k, strides, after, r, d, keys, head_dim):
    """Keys r, or the next that are no padding, as float32, and which of their numbers count: not NaN and infinity."""
    there = r < keys
    if after is not None:
        r = tl.load(after + r, mask=there, other=0).to(tl.int64)
        there = there & (r >= 0) & (r < keys)
    mask = there[:, None] & (d < head_dim)[None, :]
    x = tl.load(k + r[:, None] * strides[2] + d[None, :] * strides[3], mask=mask, other=0.0).to(tl.float32)
    return x, mask & (tl.abs(x) < float("inf"))


@triton.jit
def centre_kernel(
    k, after, offsets, centre, k_strides, kv_heads, keys, head_dim, sequences,
    HALF: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The centre of one sequence and head of keys. `after`: per place, the first key from it on that is no padding."""
    program = wide(tl.program_id(0))
    sequence, head, batch = program % sequences, program // sequences % kv_heads, program // sequences // kv_heads
    d = tl.arange(0, BLOCK_D).to(tl.int64)
    k += batch * k_strides[0] + head * k_strides[1]
    n = wide(keys)
    first = wide(0)
    if offsets is not None:
        first = tl.load(offsets + sequence)
        n = tl.load(offsets + sequence + 1) - first
    if after is not None:
        after += batch * keys
    step = tl.maximum(n // SAMPLES, 1)
    total, count = tl.zeros((BLOCK_D,), tl.float32), tl.zeros((BLOCK_D,), tl.float32)
    for start in range(0, tl.cdiv(n, step), BLOCK_R):
        r = first + (start + tl.arange(0, BLOCK_R)) * step
        x, counts = _sample(k, k_strides, after, r, d, first + n, head_dim)
        total += tl.sum(tl.where(counts, x, 0.0), 0)
        count += tl.sum(counts.to(tl.float32), 0)
    mean = total / tl.maximum(count, 1.0)
    mean = tl.where(tl.abs(mean) < float("inf"), mean, 0.0)
    if HALF:
        mean = mean.to(k.dtype.element_ty).to(tl.float32)
        farthest = tl.zeros((BLOCK_D,), tl.float32)
        for start in range(0, tl.cdiv(n, step), BLOCK_R):
            r = first + (start + tl.arange(0, BLOCK_R)) * step
            x, counts = _sample(k, k_strides, after, r, d, first + n, head_dim)
            farthest = tl.maximum(farthest, tl.max(tl.where(counts, tl.abs(x - mean[None, :]), 0.0), 0))
        mean = tl.where(farthest < tl.abs(mean), mean, 0.0)
    tl.store(centre + program * head_dim + d, mean, mask=d < head_dim)


@triton.jit
def move_kernel(
    x, centre, sequence_of, padding, moved, low, low_seen, norms, x_strides, padding_strides, heads, kv_heads, length,
    head_dim, sequences, n_blocks,
    BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Of a block of rows of q or k: moved by the centre, in its dtype and what that rounds off, with zeros up to
    BLOCK_D columns, and the squared norms. Without a centre the norms alone."""
    program = wide(tl.program_id(0))
    block, head, batch = program % n_blocks, program // n_blocks % heads, program // n_blocks // heads
    r = block * BLOCK_R + tl.arange(0, BLOCK_R)
    d = tl.arange(0, BLOCK_D).to(tl.int64)
    there = r < length
    mask = there[:, None] & (d < head_dim)[None, :]
    counts = mask
    if padding is not None:  # may hold NaN, which no product with a weight of 0 takes away
        keep = tl.load(padding + batch * padding_strides[0] + r * padding_strides[1], mask=there, other=1) == 0
        counts = mask & keep[:, None]
    at = x + batch * x_strides[0] + head * x_strides[1] + r[:, None] * x_strides[2] + d[None, :] * x_strides[3]
    value = tl.load(at, mask=counts, other=0.0).to(tl.float32)
    row = (batch * heads + head) * length + r
    if centre is not None:
        place = (batch * kv_heads + head // (heads // kv_heads)) * sequences
        if sequence_of is not None:
            place += tl.load(sequence_of + r, mask=there, other=0)
        else:
            place += r * 0
        shift = tl.load(centre + place[:, None] * head_dim + d[None, :], mask=mask, other=0.0)
        value = tl.where(counts, value - shift, 0.0)
        high = value.to(moved.dtype.element_ty)
        tl.store(moved + row[:, None] * BLOCK_D + d[None, :], high, mask=there[:, None])
        if low is not None:
            rest = value - high.to(tl.float32)
            tl.store(low + row[:, None] * BLOCK_D + d[None, :], rest.to(low.dtype.element_ty), mask=there[:, None])
            # Every program that writes writes the same.
            tl.store(low_seen + place, 1, mask=there & (tl.max((rest != 0.0).to(tl.int32), 1) > 0))
    tl.store(norms + row, tl.sum(value * value, 1), mask=there)
