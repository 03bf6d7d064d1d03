"""The forward pass of Gaussian attention in Triton: a block of queries walks over the keys that can matter to it."""

import triton
import triton.language as tl

from trifuse.triton_kernels.common import LN2, LOG2E, wide
from trifuse.triton_kernels.gaussian_attention_tile import (
    another_serves,
    dot,
    edges,
    key_range,
    load_tile,
    load_window,
    locate,
    logits,
    products_in_chunks,
    store_tile,
    unpadded,
)

__all__ = ["fwd_kernel", "product_factor", "spread_bits"]


@triton.jit
def product_factor(gamma, scale, head):
    """By what a product of a query and a key counts in the logits."""
    if gamma is None:
        return tl.full((), 1.0, tl.float32) * scale * LOG2E
    else:
        return tl.load(gamma + head) * (2.0 * LOG2E)


@triton.jit
def spread_bits(norms, gamma, factor, batch, kv_heads, kv_head, place, there):
    """Per query, by how many bits at most its logits differ without a window: |q.k| <= |q| |k|, and distances lie
    between 0 and |q| + |k|."""
    q_norm = tl.sqrt(tl.load(norms[0] + place, mask=there, other=0.0))
    k_norm = tl.sqrt(tl.load(norms[2] + batch * kv_heads + kv_head))
    if gamma is None:
        return (2.001 * tl.abs(factor)) * (q_norm * k_norm)
    else:
        return (0.501 * factor) * (q_norm + k_norm) * (q_norm + k_norm)


@triton.jit
def _walk(
    acc, peak, total, q, q_low, k, k_low, v, k_norms, masks, weight, near, lean, factor, q_stride, k_stride,
    v_stride, batch, head, i, low, high, first_query, first_key, queries, keys,
    CAUSAL: tl.constexpr, EDGE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    CHUNK: tl.constexpr, FULL: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Over the keys [low, high), with q a tile or, for products in chunks, where it is:
    the weighted sum, the largest logit and the sum of weights relative to it."""
    d, e = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_V)
    for start in tl.range(low, high, BLOCK_N, num_stages=STAGES):
        j = start + tl.arange(0, BLOCK_N)
        there, keep, key_term = None, None, None
        if EDGE:
            there = j < keys
        if masks[2] is not None:
            there = unpadded(masks, batch, first_key, j, keys)
            keep = there[None, :]
        if CHUNK > 0:
            s = products_in_chunks(
                q, q_low, q_stride, i, i < queries, k, k_low, k_stride, j, there, BLOCK_D, CHUNK, FULL
            )
        else:
            s = dot(q, tl.trans(load_tile(k, k_stride, j, d, there)), None, FULL)
        if k_norms is not None:
            key_term = (tl.load(k_norms + j, mask=j < keys, other=0.0) * (0.5 * factor))[None, :]
        s = logits(
            s, factor, key_term, weight, near, lean, i[:, None], j[None, :], masks, batch, head, first_query, first_key,
            queries, keys, keep, CAUSAL, EDGE,
        )  # fmt: skip
        higher = tl.maximum(peak, tl.max(s, 1))
        base = tl.where(higher == float("-inf"), 0.0, higher)
        p = tl.exp2(s - base[:, None])
        fade = tl.exp2(peak - base)
        total = total * fade + tl.sum(p, 1)
        values = load_tile(v, v_stride, j, e, there)
        acc = dot(p.to(values.dtype), values, acc * fade[:, None], FULL)
        peak = higher
    return acc, peak, total


@triton.jit
def fwd_kernel(
    q, k, v, moved, norms, gamma, window, masks, packed, out, lse, q_strides, k_strides, v_strides, heads, kv_heads,
    queries_all, keys_all, n_blocks, sequences, scale,
    CAUSAL: tl.constexpr, NORMALIZED: tl.constexpr, LOW: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, CHUNK: tl.constexpr,
    FULL: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The output and its logsumexp of one block of queries of a head. `moved`: low halves of q and k and whether
    there are any; `norms`: of q, of k, and the largest of k per head."""
    program = wide(tl.program_id(0))
    block, head, batch = program % n_blocks, program // n_blocks % heads, program // n_blocks // heads
    if CAUSAL:
        block = n_blocks - 1 - block  # the longest first
    kv_head = head // (heads // kv_heads)
    sequence, block, first_query, queries, first_key, keys = locate(block, packed, queries_all, keys_all, False)
    if another_serves(moved, batch, kv_heads, kv_head, sequences, sequence, LOW):
        return
    i = block * BLOCK_M + tl.arange(0, BLOCK_M)
    there = i < queries
    row = (batch * heads + head) * queries_all + first_query
    q_at = batch * q_strides[0] + head * q_strides[1] + first_query * q_strides[2]
    k_at = batch * k_strides[0] + kv_head * k_strides[1] + first_key * k_strides[2]
    q += q_at
    q_held = q if CHUNK > 0 else load_tile(q, q_strides[2], i, tl.arange(0, BLOCK_D), there)

    factor = product_factor(gamma, scale, head)
    center, weight, near, lean = load_window(window, batch, head, first_query, i, queries, keys, CAUSAL)
    weight_2d, near_2d, lean_2d, bounding, spread = None, None, None, None, None
    if weight is not None:
        weight_2d, near_2d, lean_2d = weight[:, None], near[:, None], lean[:, None]
        if masks[0] is None:
            bounding = weight
            spread = spread_bits(norms, gamma, factor, batch, kv_heads, kv_head, row + i, there)
    low, high = key_range(window, batch, first_key, center, bounding, spread, i, queries, keys, CAUSAL)
    low, middle = edges(low, high, block * BLOCK_M, keys, BLOCK_N, CAUSAL)
    q_low, k_low, k_norms = None, None, None
    if LOW:
        q_low, k_low = moved[0] + q_at, moved[1] + k_at
    if gamma is not None:
        k_norms = norms[1] + (batch * kv_heads + kv_head) * keys_all + first_key
    k += k_at
    v += batch * v_strides[0] + kv_head * v_strides[1] + first_key * v_strides[2]
    acc = tl.zeros((BLOCK_M, BLOCK_V), tl.float32)
    peak, total = tl.full((BLOCK_M,), float("-inf"), tl.float32), tl.zeros((BLOCK_M,), tl.float32)
    acc, peak, total = _walk(
        acc, peak, total, q_held, q_low, k, k_low, v, k_norms, masks, weight_2d, near_2d, lean_2d, factor,
        q_strides[2], k_strides[2], v_strides[2], batch, head, i, low, middle, first_query, first_key, queries, keys,
        False, False, BLOCK_N, BLOCK_D, BLOCK_V, CHUNK, FULL, STAGES,
    )  # fmt: skip
    acc, peak, total = _walk(
        acc, peak, total, q_held, q_low, k, k_low, v, k_norms, masks, weight_2d, near_2d, lean_2d, factor,
        q_strides[2], k_strides[2], v_strides[2], batch, head, i, middle, high, first_query, first_key, queries, keys,
        CAUSAL, True, BLOCK_N, BLOCK_D, BLOCK_V, CHUNK, FULL, STAGES,
    )  # fmt: skip

    dead = peak == float("-inf")
    if gamma is not None:
        peak -= tl.load(norms[0] + row + i, mask=there, other=0.0) * (0.5 * factor)
    if weight is not None:
        peak -= (0.25 * weight * lean) * lean
    share = 1.0 / total if NORMALIZED else tl.exp2(peak)
    acc *= tl.where(dead, 0.0, share)[:, None]
    store_tile(out + row * BLOCK_V, i, tl.arange(0, BLOCK_V), there, acc)
    tl.store(lse + row + i, tl.where(dead, float("-inf"), (peak + tl.log2(total)) * LN2), mask=there)
