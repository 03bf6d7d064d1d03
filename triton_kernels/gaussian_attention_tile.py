"""The pieces of a tile that the kernels of Gaussian attention share, in Triton.

Logits are in powers of two: those of the op times log2(e). Terms of the query alone are left out of them, which the
softmax does not see: `-gamma ||q||^2`, and of windows see `load_window`; kernels put them back into the logsumexp.

Arguments travel in tuples, each entry a pointer (or None, what is absent) or the strides that belong to it:

- `window`: center, its strides, sigma, its strides, the keys before and after each place that are no padding;
- `masks`: attn_mask, its strides, key_padding_mask, its strides;
- `packed`: the offsets of queries and of keys, and of the blocks at hand: the first of each sequence, the sequence of
  each.
"""

import triton
import triton.language as tl

from trifuse.triton_kernels.common import LOG2E, wide

__all__ = [
    "NEGLIGIBLE_BITS", "another_serves", "dot", "edges", "key_range", "last_key", "load_tile", "load_window", "locate",
    "logits", "narrow", "products_in_chunks", "store_tile", "unpadded",
]  # fmt: skip

# Keys are passed over if all of them together weigh less than 2 ** -32 of a row's largest weight.
NEGLIGIBLE_BITS = tl.constexpr(32.0)


@triton.jit
def dot(a, b, acc, FULL: tl.constexpr):
    """acc + a @ b, of float32 to nearly its own precision; operands of half precision are exact."""
    if a.dtype == tl.float32:
        return tl.dot(a, b, acc, input_precision=FULL)
    else:
        return tl.dot(a, b, acc)


@triton.jit
def narrow(n):
    """A place or a number of places, in 32 bits."""
    return wide(n).to(tl.int32)


@triton.jit
def locate(block, packed, queries, keys, KEYS: tl.constexpr):
    """Of a block of queries (or of keys): its sequence, its place among the blocks of that, where the queries and the
    keys of the sequence start and how many they are. A block that is left over has none of its own."""
    if packed[0] is None:
        return wide(0), narrow(block), wide(0), narrow(queries), wide(0), narrow(keys)
    else:
        sequence = tl.load(packed[3] + block)
        there = sequence >= 0
        sequence = tl.where(there, sequence, 0)
        first_query, first_key = tl.load(packed[0] + sequence), tl.load(packed[1] + sequence)
        n_queries = tl.load(packed[0] + sequence + 1) - first_query
        n_keys = tl.load(packed[1] + sequence + 1) - first_key
        if KEYS:
            n_keys = tl.where(there, n_keys, 0)
        else:
            n_queries = tl.where(there, n_queries, 0)
        place = block - tl.load(packed[2] + sequence)
        return sequence, place.to(tl.int32), first_query, n_queries.to(tl.int32), first_key, n_keys.to(tl.int32)


@triton.jit
def load_tile(ptr, stride, row, col, there):
    """Rows of a matrix from `ptr` on, the columns of which lie side by side; those that are `there` (None: all)."""
    at = ptr + row.to(tl.int64)[:, None] * stride + col[None, :]
    return tl.load(at) if there is None else tl.load(at, mask=there[:, None], other=0.0)


@triton.jit
def store_tile(ptr, row, col, there, value):
    """Rows of a contiguous matrix as wide as the tile."""
    at = ptr + row.to(tl.int64)[:, None] * value.shape[1] + col[None, :]
    tl.store(at, value.to(ptr.dtype.element_ty), mask=there[:, None])


@triton.jit
def products_in_chunks(
    a, a_low, a_stride, row, a_there, b, b_low, b_stride, col, b_there,
    WIDTH: tl.constexpr, CHUNK: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """a @ b^T of rows of two matrices, CHUNK columns at a time, for what leaves no registers to hold either: float32,
    whose products are split in parts, and half precision with low halves, which are added to both."""
    s = tl.zeros((row.shape[0], col.shape[0]), tl.float32)
    for start in range(0, WIDTH, CHUNK):
        d = start + tl.arange(0, CHUNK)
        x, y = load_tile(a, a_stride, row, d, a_there), load_tile(b, b_stride, col, d, b_there)
        s = dot(x, tl.trans(y), s, FULL)
        if a_low is not None:
            x_low, y_low = load_tile(a_low, a_stride, row, d, a_there), load_tile(b_low, b_stride, col, d, b_there)
            s = tl.dot(x_low, tl.trans(y_low), s)
            s = tl.dot(x_low, tl.trans(y), s)
            s = tl.dot(x, tl.trans(y_low), s)
    return s


@triton.jit
def another_serves(moved, batch, kv_heads, kv_head, sequences, sequence, LOW: tl.constexpr):
    """Of the two launches that half precision with gamma takes, LOW serves the sequences and heads in which q and k
    when moved have low halves, the other those which have none, and more registers for it."""
    if moved[2] is None:
        return False
    else:
        return (tl.load(moved[2] + (batch * kv_heads + kv_head) * sequences + sequence) != 0) != LOW


@triton.jit
def load_window(window, batch, head, first, i, rows, keys, CAUSAL: tl.constexpr):
    """Per query: where its window stands and weight = log2(e) / (2 sigma^2), the place `near` of the key next to that
    and lean = 2 (near - center); Nones where there is no window.

    With t = j - near the squared distance (j - center)^2 is t (t + lean), plus a term of the query alone, which is left
    out: nothing large is subtracted, however far from all keys the window stands."""
    if window[2] is None:
        return None, None, None, None
    else:
        at = i + first
        if window[0] is None:
            center = i.to(tl.float32)
        else:
            strides = window[1]
            ptr = window[0] + batch * strides[0] + head * strides[1]
            center = tl.load(ptr + at * strides[2], mask=i < rows, other=0.0)
        strides = window[3]
        ptr = window[2] + batch * strides[0] + head * strides[1]
        sigma = tl.load(ptr + at * strides[2], mask=i < rows, other=1.0)
        # Bounded: where sigma is next to nothing, infinity times a distance of zero is NaN.
        weight = tl.minimum(1.0 / (sigma * sigma) * (0.5 * LOG2E), 1e30)
        near = tl.minimum(tl.maximum(tl.floor(center + 0.5), 0.0), last_key(i, keys, CAUSAL).to(tl.float32))
        return center, weight, near, 2.0 * (near - center)


@triton.jit
def last_key(i, keys, CAUSAL: tl.constexpr):
    """The last key of the sequence that each query may see, 0 where there is none."""
    last = tl.broadcast_to(keys - 1, i.shape)
    if CAUSAL:
        last = tl.minimum(last, i)
    return tl.maximum(last, 0)


@triton.jit
def unpadded(masks, batch, first, j, keys):
    """Which of the keys j, that are below `keys`, are no padding."""
    strides = masks[3]
    ptr = masks[2] + batch * strides[0] + (j + first) * strides[1]
    return tl.load(ptr, mask=j < keys, other=1) == 0


@triton.jit
def logits(
    product, factor, key_term, weight, near, lean, i, j, masks, batch, head, first_query, first_key, queries, keys,
    keep,
    CAUSAL: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """From products of queries and keys, in either orientation: what belongs to queries or to keys has an axis of one.

    CAUSAL: keys may come after queries. EDGE: there may be fewer keys than in the tile."""
    s = product * factor
    if key_term is not None:
        s -= key_term
    if weight is not None:
        t = j.to(tl.float32) - near
        s -= (weight * t) * (t + lean)
    if masks[0] is not None:
        strides = masks[1]
        ptr = masks[0] + batch * strides[0] + head * strides[1]
        at = (i + first_query) * strides[2] + (j + first_key) * strides[3]
        there = (i < queries) & (j < keys)
        if masks[0].dtype.element_ty == tl.int1:
            s = tl.where(tl.load(ptr + at, mask=there, other=0) != 0, s, float("-inf"))
        else:
            s += tl.load(ptr + at, mask=there, other=float("-inf")).to(tl.float32) * LOG2E
    if keep is not None:
        s = tl.where(keep, s, float("-inf"))
    if CAUSAL:
        s = tl.where(j <= i, s, float("-inf"))
    if EDGE:
        s = tl.where(j < keys, s, float("-inf"))
    return s


@triton.jit
def key_range(window, batch, first_key, center, weight, spread, i, queries, keys, CAUSAL: tl.constexpr):
    """The keys [low, high) outside of which nothing can matter to the queries i, of which there are `queries`.

    `spread` bounds by how many bits the logits of a query differ without its window. A key at distance x of a center
    then lies below the row's best by weight (x^2 - near^2) - spread bits at least, `near` being the distance of the
    nearest key that takes part: what is below by NEGLIGIBLE_BITS and the logarithm of the number of keys is left out.
    """
    last = tl.broadcast_to(keys - 1, i.shape)
    if CAUSAL:
        last = tl.minimum(last, i)
    high = tl.minimum(tl.max(tl.where(i < queries, last, -1), 0) + 1, keys)
    low = high * 0
    if weight is not None:
        known = tl.abs(center) < 1e9
        at = tl.minimum(tl.maximum(tl.where(known, center, 0.0).to(tl.int32), 0), tl.maximum(last, 0))
        if window[4] is None:
            near = tl.abs(at.to(tl.float32) - center)
        else:
            place = batch * window[6] + first_key + at
            there = (i < queries) & (last >= 0)
            before = tl.load(window[4] + place, mask=there, other=-1) - first_key
            after = tl.load(window[5] + place, mask=there, other=0) - first_key
            near = tl.where(before >= 0, tl.abs(before.to(tl.float32) - center), float("inf"))
            usable = (after <= last) & (after >= 0)
            near = tl.minimum(near, tl.where(usable, tl.abs(after.to(tl.float32) - center), float("inf")))
        bits = spread + NEGLIGIBLE_BITS + tl.log2(tl.maximum(keys, 1).to(tl.float32))
        near += 1.0  # of rounding to whole places, and of rounding at large ones
        reach = tl.sqrt(near * near + bits / weight) * 1.0001 + 2.0
        # Written so that NaN leaves nothing out.
        known = known & (reach < 1e9)
        first = tl.where(known, tl.maximum(center - reach, 0.0), 0.0)
        last_place = tl.where(known, tl.maximum(center + reach, 0.0), 2e9)
        none = i >= queries
        low = tl.minimum(tl.min(tl.where(none, 2e9, first), 0).to(tl.int32), high)
        high = tl.minimum(high, tl.max(tl.where(none, 0.0, last_place), 0).to(tl.int32) + 1)
    return low, high


@triton.jit
def edges(low, high, first_query, keys, BLOCK: tl.constexpr, CAUSAL: tl.constexpr):
    """Where the tiles of keys that reach [low, high) begin, and from where on they need masks for the end of the keys
    or the causal order of queries from `first_query` on."""
    start = low // BLOCK * BLOCK
    whole = keys
    if CAUSAL:
        whole = tl.minimum(whole, first_query + 1)
    return start, tl.maximum(tl.minimum(whole, high) // BLOCK * BLOCK, start)
