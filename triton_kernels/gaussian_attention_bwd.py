"""The backward pass of Gaussian attention in Triton: one kernel over blocks of queries, one over blocks of keys.

With `w = a exp2(s - shift)` the weight of a pair and `dp[i, j] = dout[i] . v[j]`, the gradient of a logit is
`ds = w (dp - delta)` with `delta[i] = dout[i] . out[i] - dlse[i]`. Unnormalized it is `w dp - delta exp2(s - shift)`,
and delta what dlse amounts to there.

The kernel over queries runs first. It finds what lse and out lost when they were rounded, and mends it: `a` makes the
weights add up to one (float32 keeps 4e-6 of a sum whose logarithm is -80), and the sum of ds, which must be dlse, gives
the error of delta in half precision (out has 8 or 11 bits there, and the gradients of gamma, center and sigma float32).
shift, delta and a are left to the kernel over keys. No program adds to what another writes.
"""

import triton
import triton.language as tl

from trifuse.triton_kernels.common import LN2, LOG2E, wide
from trifuse.triton_kernels.gaussian_attention_fwd import product_factor, spread_bits
from trifuse.triton_kernels.gaussian_attention_tile import (
    another_serves,
    dot,
    edges,
    key_range,
    load_tile,
    load_window,
    locate,
    logits,
    narrow,
    products_in_chunks,
    store_tile,
    unpadded,
)

__all__ = ["keys_kernel", "queries_kernel"]


@triton.jit
def _over_keys(
    dq, sums, q, q_low, k, k_low, v, dout, k_norms, masks, weight, near, lean, shift, delta, a, factor, gain,
    dout_stride, q_stride, k_stride, v_stride, batch, head, i, low, high, first_query, first_key, queries, keys,
    CAUSAL: tl.constexpr, EDGE: tl.constexpr, MEND: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr, CHUNK: tl.constexpr, FULL: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Over the keys [low, high), with `a` None where it is one, or not known yet. `sums`: of p and ds; of both times
    the squared distances, less those of q from the origin; of both times t, of both times t^2 (see `load_window`).
    Those of p only to MEND what delta lacks."""
    d, e = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_V)
    for start in tl.range(low, high, BLOCK_N, num_stages=STAGES):
        j = start + tl.arange(0, BLOCK_N)
        there, keep = None, None
        if EDGE:
            there = j < keys
        if masks[2] is not None:
            there = unpadded(masks, batch, first_key, j, keys)
            keep = there[None, :]
        if CHUNK > 0:
            product = products_in_chunks(
                q, q_low, q_stride, i, i < queries, k, k_low, k_stride, j, there, BLOCK_D, CHUNK, FULL
            )
        else:
            keys_tile = load_tile(k, k_stride, j, d, there)
            product = dot(q, tl.trans(keys_tile), None, FULL)
        if k_norms is not None:
            product = tl.load(k_norms + j, mask=j < keys, other=0.0)[None, :] - 2.0 * product  # D - ||q||^2
        s = logits(
            product, factor, None, weight, near, lean, i[:, None], j[None, :], masks, batch, head, first_query,
            first_key, queries, keys, keep, CAUSAL, EDGE,
        )  # fmt: skip
        p = tl.exp2(s - shift[:, None])
        if CHUNK > 0:
            dp = products_in_chunks(
                dout, None, dout_stride, i, i < queries, v, None, v_stride, j, there, BLOCK_V, CHUNK, FULL
            )
            keys_tile = load_tile(k, k_stride, j, d, there)
        else:
            dp = dot(dout, tl.trans(load_tile(v, v_stride, j, e, there)), None, FULL)
        if a is not None:
            dp *= a[:, None]
        ds = p * (dp - delta[:, None])
        p_sum, ds_sum, far, far_ds, aside, aside_ds, square, square_ds = sums
        p_sum += tl.sum(p, 1)
        ds_sum += tl.sum(ds, 1)
        if k_norms is not None:
            far_ds += tl.sum(ds * product, 1)
            if MEND:
                far += tl.sum(p * product, 1)
        if weight is not None:
            distance = j.to(tl.float32)[None, :] - near
            side = ds * distance
            aside_ds += tl.sum(side, 1)
            square_ds += tl.sum(side * distance, 1)
            if MEND:
                side = p * distance
                aside += tl.sum(side, 1)
                square += tl.sum(side * distance, 1)
        sums = p_sum, ds_sum, far, far_ds, aside, aside_ds, square, square_ds
        if gain is not None:
            ds *= gain
        dq = dot(ds.to(keys_tile.dtype), keys_tile, dq, FULL)
    return dq, sums


@triton.jit
def queries_kernel(
    dout, dlse, q, k, v, moved, norms, gamma, window, masks, packed, out, lse, gains, dq, dgamma, dcenter, dsigma,
    for_keys, ranges, dout_strides, q_strides, k_strides, v_strides, heads, kv_heads, queries_all, keys_all, n_blocks,
    sequences, scale,
    CAUSAL: tl.constexpr, NORMALIZED: tl.constexpr, LOW: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, CHUNK: tl.constexpr, FULL: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Of one block of queries of a head: the gradients of q, center and sigma, the block's share of that of gamma,
    and `for_keys`: shift, delta and a. `ranges` are the keys that matter to the block."""
    program = wide(tl.program_id(0))
    place, head, batch = program % n_blocks, program // n_blocks % heads, program // n_blocks // heads
    if CAUSAL:
        place = n_blocks - 1 - place  # the longest first
    kv_head = head // (heads // kv_heads)
    sequence, block, first_query, queries, first_key, keys = locate(place, packed, queries_all, keys_all, False)
    if another_serves(moved, batch, kv_heads, kv_head, sequences, sequence, LOW):
        return
    i = block * BLOCK_M + tl.arange(0, BLOCK_M)
    d, e = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_V)
    there = i < queries
    row = (batch * heads + head) * queries_all + first_query
    q_at = batch * q_strides[0] + head * q_strides[1] + first_query * q_strides[2]
    k_at = batch * k_strides[0] + kv_head * k_strides[1] + first_key * k_strides[2]
    q += q_at
    q_held = q if CHUNK > 0 else load_tile(q, q_strides[2], i, d, there)
    dout += batch * dout_strides[0] + head * dout_strides[1] + first_query * dout_strides[2]
    grad = load_tile(dout, dout_strides[2], i, e, there)
    grad_held = dout if CHUNK > 0 else grad

    factor = product_factor(gamma, scale, head)
    log_sum = tl.load(lse + row + i, mask=there, other=float("-inf"))
    dead = log_sum == float("-inf")
    incoming = tl.zeros((BLOCK_M,), tl.float32)
    if dlse is not None:
        incoming += tl.where(dead, 0.0, tl.load(dlse + row + i, mask=there, other=0.0))
    exponent, a = log_sum * LOG2E, None
    MEND: tl.constexpr = NORMALIZED and q.dtype.element_ty != tl.float32
    if NORMALIZED:
        result = load_tile(out + row * BLOCK_V, BLOCK_V, i, e, there)
        delta = tl.sum(grad.to(tl.float32) * result.to(tl.float32), 1) - incoming
    else:  # as it stands, but for rows so small that next to gradients of lse those of the output are nothing
        exponent = tl.where(exponent < -24.0, exponent, 0.0)
        a = tl.exp2(exponent)
        delta = -incoming * tl.exp2(exponent - log_sum * LOG2E)
    delta = tl.where(dead, 0.0, delta)
    shift = tl.where(dead, float("inf"), exponent)

    center, weight, near, lean = load_window(window, batch, head, first_query, i, queries, keys, CAUSAL)
    weight_2d, near_2d, lean_2d, bounding, spread = None, None, None, None, None
    if weight is not None:
        weight_2d, near_2d, lean_2d = weight[:, None], near[:, None], lean[:, None]
        if masks[0] is None:
            bounding = weight
            spread = spread_bits(norms, gamma, factor, batch, kv_heads, kv_head, row + i, there)
    low, high = key_range(window, batch, first_key, center, bounding, spread, i, queries, keys, CAUSAL)
    if ranges[0] is not None:
        tl.store(ranges[0] + (batch * heads + head) * n_blocks + place, low)
        tl.store(ranges[1] + (batch * heads + head) * n_blocks + place, high)
    low, middle = edges(low, high, block * BLOCK_M, keys, BLOCK_N, CAUSAL)
    q_low, k_low, k_norms, gain, loop_factor = None, None, None, None, factor
    if LOW:
        q_low, k_low = moved[0] + q_at, moved[1] + k_at
    if gamma is not None:
        loop_factor = -0.5 * factor  # of squared distances
        shift += tl.load(norms[0] + row + i, mask=there, other=0.0) * (0.5 * factor)
        k_norms = norms[1] + (batch * kv_heads + kv_head) * keys_all + first_key
    if weight is not None:
        shift += (0.25 * weight * lean) * lean
    if gains is not None:
        gain = tl.load(gains)
    k += k_at
    v += batch * v_strides[0] + kv_head * v_strides[1] + first_key * v_strides[2]
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    nothing = tl.zeros((BLOCK_M,), tl.float32)
    sums = nothing, nothing, nothing, nothing, nothing, nothing, nothing, nothing
    acc, sums = _over_keys(
        acc, sums, q_held, q_low, k, k_low, v, grad_held, k_norms, masks, weight_2d, near_2d, lean_2d, shift, delta, a,
        loop_factor, gain, dout_strides[2], q_strides[2], k_strides[2], v_strides[2], batch, head, i, low, middle,
        first_query, first_key, queries, keys,  False, False, MEND, BLOCK_N, BLOCK_D, BLOCK_V, CHUNK, FULL, STAGES,
    )  # fmt: skip
    acc, sums = _over_keys(
        acc, sums, q_held, q_low, k, k_low, v, grad_held, k_norms, masks, weight_2d, near_2d, lean_2d, shift, delta, a,
        loop_factor, gain, dout_strides[2], q_strides[2], k_strides[2], v_strides[2], batch, head, i, middle, high,
        first_query, first_key, queries, keys,  CAUSAL, True, MEND, BLOCK_N, BLOCK_D, BLOCK_V, CHUNK, FULL, STAGES,
    )  # fmt: skip

    p_sum, ds_sum, far, far_ds, aside, aside_ds, square, square_ds = sums
    wrong = nothing
    if NORMALIZED:
        a = 1.0 / tl.where(dead, 1.0, p_sum)
        # What ds adds up to beside dlse is the error of delta.
        wrong = tl.where(dead, 0.0, a * ds_sum - incoming)
        delta += wrong
    if not MEND:
        wrong = nothing
    unit = a
    if not NORMALIZED:
        # Of a row that small, lse has lost what it was rounded by: its gradients are those of weights that add up to
        # one.
        unit = tl.where((a < 1.0) & (delta != 0.0), 1.0 / tl.where(dead, 1.0, p_sum), 1.0)
        delta *= unit
    tl.store(for_keys[0] + row + i, shift, mask=there)
    tl.store(for_keys[1] + row + i, delta, mask=there)
    tl.store(for_keys[2] + row + i, a, mask=there)
    if gain is not None:
        acc /= gain
    if gamma is not None:
        # Loaded again: kept until here, it would take registers of the loop.
        q_tile = load_tile(q, q_strides[2], i, d, there)
        acc = (acc - q_tile.to(tl.float32) * ds_sum[:, None]) * (unit * (factor * LN2))[:, None]
        q_norm = tl.load(norms[0] + row + i, mask=there, other=0.0)
        far_ds += q_norm * ds_sum
        far += q_norm * p_sum
        share = -tl.sum(tl.where(there, unit * (far_ds - wrong * far), 0.0), 0)
        tl.store(dgamma + (batch * heads + head) * n_blocks + place, share)
    else:
        acc *= (unit * scale)[:, None]
    store_tile(dq + row * BLOCK_D, i, d, there, acc)
    if weight is not None:
        inverse = weight * (2.0 * LN2)  # 1 / sigma^2
        share = unit * inverse
        # From places around `near` to those around the center.
        ahead = 0.5 * lean
        square += (2.0 * ahead) * aside + (ahead * ahead) * p_sum
        square_ds += (2.0 * ahead) * aside_ds + (ahead * ahead) * ds_sum
        aside += ahead * p_sum
        aside_ds += ahead * ds_sum
        if dcenter is not None:
            tl.store(dcenter + row + i, (aside_ds - wrong * aside) * share, mask=there)
        tl.store(dsigma + row + i, (square_ds - wrong * square) * share * tl.sqrt(inverse), mask=there)


@triton.jit
def _over_queries(
    dk, dv, ds_sum, k, k_low, v, q, q_low, dout, k_norm, masks, window, for_keys, factor, gain, keep, j,
    q_stride, k_stride, v_stride, dout_stride, batch, head, low, high, row, first_query, first_key, queries, keys,
    CAUSAL: tl.constexpr, IN_ORDER: tl.constexpr, NORMALIZED: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, CHUNK: tl.constexpr, FULL: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Over the queries [low, high) of one head, IN_ORDER if the call is causal, CAUSAL if that takes a mask here. Tiles
    have keys in rows. A query that is not there has an infinite shift, and a key that is not there only rows of its
    own, which nobody stores."""
    d, e = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_V)
    for start in tl.range(low, high, BLOCK_M, num_stages=STAGES):
        i = start + tl.arange(0, BLOCK_M)
        there = i < queries
        if CHUNK > 0:
            product = products_in_chunks(
                k, k_low, k_stride, j, keep, q, q_low, q_stride, i, there, BLOCK_D, CHUNK, FULL
            )
        else:
            queries_tile = load_tile(q, q_stride, i, d, there)
            product = dot(k, tl.trans(queries_tile), None, FULL)
        if k_norm is not None:
            product = k_norm[:, None] - 2.0 * product  # as over keys, to the last bit: `a` sums up those weights
        _, weight, near, lean = load_window(window, batch, head, first_query, i, queries, keys, IN_ORDER)
        if weight is not None:
            weight, near, lean = weight[None, :], near[None, :], lean[None, :]
        s = logits(
            product, factor, None, weight, near, lean, i[None, :], j[:, None], masks, batch, head, first_query,
            first_key, queries, keys, keep[:, None] if masks[2] is not None else None, CAUSAL, False,
        )  # fmt: skip
        shift = tl.load(for_keys[0] + row + i, mask=there, other=float("inf"))
        p = tl.exp2(s - shift[None, :])
        grad = load_tile(dout, dout_stride, i, e, there)
        if CHUNK > 0:
            dp = products_in_chunks(v, None, v_stride, j, keep, dout, None, dout_stride, i, there, BLOCK_V, CHUNK, FULL)
        else:
            dp = dot(v, tl.trans(grad), None, FULL)
        delta = tl.load(for_keys[1] + row + i, mask=there, other=0.0)
        weights = p * tl.load(for_keys[2] + row + i, mask=there, other=0.0)[None, :]
        dv = dot(weights.to(grad.dtype), grad, dv, FULL)
        ds = weights * (dp - delta[None, :]) if NORMALIZED else weights * dp - p * delta[None, :]
        if gain is not None:
            ds *= gain
        if k_norm is not None:
            ds_sum += tl.sum(ds, 1)
        if CHUNK > 0:
            queries_tile = load_tile(q, q_stride, i, d, there)
        dk = dot(ds.to(queries_tile.dtype), queries_tile, dk, FULL)
    return dk, dv, ds_sum


@triton.jit
def _reached(ranges, row, first_key, last_key, n_queries):
    """The queries [low, high) between the first and the last block whose keys meet [first_key, last_key). `row` is
    where the blocks of the head and sequence begin."""
    range_m = narrow(ranges[2])
    n = tl.cdiv(n_queries, range_m)
    first, last = n, n * 0
    for start in range(0, n, 256):
        block = start + tl.arange(0, 256)
        low = tl.load(ranges[0] + row + block, mask=block < n, other=0)
        high = tl.load(ranges[1] + row + block, mask=block < n, other=0)
        meets = (low < last_key) & (high > first_key)
        first = tl.minimum(first, tl.min(tl.where(meets, block, n), 0))
        last = tl.maximum(last, tl.max(tl.where(meets, block + 1, 0), 0))
    return first * range_m, tl.minimum(last * range_m, n_queries)


@triton.jit
def keys_kernel(
    dout, q, k, v, moved, norms, gamma, window, masks, packed, gains, for_keys, ranges, dk, dv,
    dout_strides, q_strides, k_strides, v_strides, batches, heads, kv_heads, queries_all, keys_all,
    n_blocks, n_slabs, heads_each, sequences, scale,
    CAUSAL: tl.constexpr, NORMALIZED: tl.constexpr, LOW: tl.constexpr, SCALED: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, CHUNK: tl.constexpr,
    FULL: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Of one block of keys of a head: the gradients of k and v, over a slab of the heads of queries that read them.
    `ranges`: of blocks of queries the keys that matter, how many queries they have, how many there are, and the first
    of each sequence. SCALED: the heads have a gamma each, which ds is multiplied with."""
    program = wide(tl.program_id(0))
    place, rest = program % n_blocks, program // n_blocks
    slab, rest = rest % n_slabs, rest // n_slabs
    kv_head, batch = rest % kv_heads, rest // kv_heads
    sequence, block, first_query, queries, first_key, keys = locate(place, packed, queries_all, keys_all, True)
    if another_serves(moved, batch, kv_heads, kv_head, sequences, sequence, LOW):
        return
    j = block * BLOCK_N + tl.arange(0, BLOCK_N)
    d, e = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_V)
    there = j < keys
    if masks[2] is not None:
        there = there & unpadded(masks, batch, first_key, j, keys)
    k += batch * k_strides[0] + kv_head * k_strides[1] + first_key * k_strides[2]
    v += batch * v_strides[0] + kv_head * v_strides[1] + first_key * v_strides[2]
    k_held, v_held = k, v
    if CHUNK == 0:
        k_held, v_held = load_tile(k, k_strides[2], j, d, there), load_tile(v, v_strides[2], j, e, there)
    k_norm, k_low = None, None
    if LOW:
        k_low = moved[1] + batch * k_strides[0] + kv_head * k_strides[1] + first_key * k_strides[2]
    if gamma is not None:
        k_norm = tl.load(norms[1] + (batch * kv_heads + kv_head) * keys_all + first_key + j, mask=there, other=0.0)
    unit = 1.0
    if gains is not None:
        unit = tl.load(gains)

    dk_acc, dv_acc = tl.zeros((BLOCK_N, BLOCK_D), tl.float32), tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
    ds_sum = tl.zeros((BLOCK_N,), tl.float32)
    group = heads // kv_heads
    first_head = kv_head * group + slab * heads_each
    for head in range(first_head, tl.minimum(first_head + heads_each, (kv_head + 1) * group)):
        row = (batch * heads + head) * queries_all + first_query
        factor = product_factor(gamma, scale, head)
        gain = None
        if SCALED:
            gain = factor * unit
        elif gains is not None:
            gain = unit
        if k_norm is not None:
            factor *= -0.5  # of squared distances
        low, high = narrow(0), tl.where(keys > block * BLOCK_N, queries, 0)
        if CAUSAL:
            low = block * BLOCK_N
        if ranges[0] is not None:
            blocks = (batch * heads + head) * ranges[3]
            if ranges[4] is not None:
                blocks += tl.load(ranges[4] + sequence)
            last_key = tl.minimum(block * BLOCK_N + BLOCK_N, keys)
            reached, end = _reached(ranges, blocks, block * BLOCK_N, last_key, high)
            low, high = tl.maximum(low, reached), end
        q_at = q + batch * q_strides[0] + head * q_strides[1] + first_query * q_strides[2]
        q_low = None
        if LOW:
            q_low = moved[0] + batch * q_strides[0] + head * q_strides[1] + first_query * q_strides[2]
        grad_at = dout + batch * dout_strides[0] + head * dout_strides[1] + first_query * dout_strides[2]
        middle = low
        if CAUSAL:
            past = block * BLOCK_N + BLOCK_N - 1  # from here on, queries see every key of the block
            middle = low + tl.cdiv(tl.maximum(past - low, 0), BLOCK_M) * BLOCK_M
            middle = tl.minimum(middle, tl.maximum(high, low))
            dk_acc, dv_acc, ds_sum = _over_queries(
                dk_acc, dv_acc, ds_sum, k_held, k_low, v_held, q_at, q_low, grad_at, k_norm, masks, window, for_keys,
                factor, gain, there, j, q_strides[2], k_strides[2], v_strides[2], dout_strides[2], batch, head, low,
                middle, row, first_query, first_key, queries, keys, True, True, NORMALIZED, BLOCK_M, BLOCK_D,
                BLOCK_V, CHUNK, FULL, STAGES,
            )  # fmt: skip
        dk_acc, dv_acc, ds_sum = _over_queries(
            dk_acc, dv_acc, ds_sum, k_held, k_low, v_held, q_at, q_low, grad_at, k_norm, masks, window, for_keys,
            factor, gain, there, j, q_strides[2], k_strides[2], v_strides[2], dout_strides[2], batch, head, middle,
            high, row, first_query, first_key, queries, keys, False, CAUSAL, NORMALIZED, BLOCK_M, BLOCK_D,
            BLOCK_V, CHUNK, FULL, STAGES,
        )  # fmt: skip

    if gamma is not None:
        # Loaded again: kept until here, it would take registers of the loop.
        k_tile = load_tile(k, k_strides[2], j, d, there)
        dk_acc -= k_tile.to(tl.float32) * ds_sum[:, None]
    if SCALED:
        dk_acc *= LN2 / unit
    elif gamma is not None:
        dk_acc *= tl.load(gamma + first_head) * 2.0 / unit
    else:
        dk_acc *= scale / unit
    row = ((slab * batches + batch) * kv_heads + kv_head) * keys_all + first_key
    store_tile(dk + row * BLOCK_D, j, d, j < keys, dk_acc)
    store_tile(dv + row * BLOCK_V, j, e, j < keys, dv_acc)
