"""Gaussian attention in Triton: tiled online softmax on tensor cores, forward and backward.

A program of the forward pass holds a block of queries and walks over the keys, those that its window reaches
(gaussian_attention_fwd.py); backward, one kernel does the same and a second holds keys and walks over queries
(gaussian_attention_bwd.py). With gamma, q and k are moved to a common centre first (gaussian_attention_centre.py).
Nothing of size (L, S) is stored, and no program adds to what another writes: results repeat bit for bit.

Where a window can be trusted to (no attn_mask, which is as large as all tiles), tiles are passed over whose keys weigh
less than 2 ** -32 of a row's largest weight all together: see `key_range`.

Products of float32 are "tf32x3" on NVIDIA, about 22 bits, and float32 where matrix cores have it. Those of half
precision take one pass; weights and gradients of logits are rounded to the dtype for the products that end in it.
float16 lacks the range for gradients: those of logits are scaled by a power of two that follows the largest of `dout`.
"""

import torch
import triton

from trifuse.registration.common import interpreting
from trifuse.triton_kernels import common
from trifuse.triton_kernels.gaussian_attention_bwd import keys_kernel, queries_kernel
from trifuse.triton_kernels.gaussian_attention_centre import centre_kernel, move_kernel
from trifuse.triton_kernels.gaussian_attention_fwd import fwd_kernel

__all__ = ["gaussian_attention_bwd", "gaussian_attention_fwd"]

PROGRAMS = 264  # two for each of 132 multiprocessors: fewer blocks of keys share their heads of queries out in slabs

# Kernel and size of a head: BLOCK_M, BLOCK_N, warps, stages, and columns in a chunk (0: tiles hold all, and loads run
# ahead), for half precision with one kind of logit, no masks and nothing packed ("plain"), for half precision else
# ("mixed"), for half precision with low halves ("low"; of "queries" all three have one BLOCK_M), and for float32.
KINDS = ("plain", "mixed", "low", "float32")
TILES = {
    ("fwd", 64): ((128, 64, 8, 3, 0), (128, 64, 8, 2, 0), (64, 32, 4, 1, 32), (64, 32, 4, 1, 32)),
    ("fwd", 128): ((128, 64, 8, 2, 0), (128, 32, 8, 2, 0), (64, 32, 4, 1, 32), (64, 32, 8, 1, 32)),
    ("queries", 64): ((64, 32, 4, 2, 0), (64, 16, 4, 2, 0), (64, 32, 4, 1, 32), (32, 16, 4, 1, 32)),
    ("queries", 128): ((128, 32, 8, 2, 0), (128, 16, 8, 2, 0), (128, 16, 8, 1, 32), (32, 16, 8, 1, 32)),
    ("keys", 64): ((32, 64, 4, 2, 0), (16, 64, 4, 2, 0), (16, 64, 4, 1, 32), (16, 32, 4, 1, 32)),
    ("keys", 128): ((16, 128, 8, 2, 0), (32, 64, 8, 1, 64), (16, 64, 8, 1, 32), (16, 32, 8, 1, 32)),
}


# Blackwell of data centres sums up in a memory of its own.
BLACKWELL_TILES = TILES | {("keys", 128): ((64, 64, 8, 2, 0), *TILES["keys", 128][1:])}
# Where matrix cores read both operands from registers: NVIDIA's but for Hopper and the Blackwell of data centres, and
# AMD's.
SMALL_TILES = {
    ("fwd", 64): ((128, 64, 8, 3, 0), (64, 32, 8, 2, 0), (64, 32, 4, 1, 32), (32, 32, 4, 1, 32)),
    ("fwd", 128): ((64, 32, 8, 2, 0), (64, 32, 8, 2, 0), (64, 32, 4, 1, 32), (64, 32, 8, 1, 32)),
    ("queries", 64): ((64, 32, 4, 2, 0), (64, 16, 4, 2, 0), (64, 16, 4, 1, 32), (32, 16, 4, 1, 32)),
    ("queries", 128): ((128, 16, 8, 2, 0), (128, 16, 8, 2, 0), (128, 16, 8, 1, 32), (32, 16, 8, 1, 32)),
    ("keys", 64): ((32, 64, 4, 2, 0), (16, 64, 4, 1, 64), (16, 32, 4, 1, 32), (16, 32, 4, 1, 32)),
    ("keys", 128): ((32, 64, 8, 1, 64), (32, 64, 8, 1, 64), (16, 64, 8, 1, 32), (16, 32, 8, 1, 32)),
}


def _machine():
    """How tl.dot multiplies float32 to nearly its own precision on the matrix cores of this GPU, and the tiles
    whose registers suffice there (as compiled; not yet measured on a GPU)."""
    if interpreting():
        return "ieee", TILES
    target = triton.runtime.driver.active.get_current_target()
    if target.backend != "cuda":
        return "ieee", SMALL_TILES
    if 90 <= target.arch < 120:
        return "tf32x3", TILES if target.arch < 100 else BLACKWELL_TILES
    return "tf32x3", SMALL_TILES


def _fit(x, width):
    """x with its last axis contiguous, and zeros up to a width that is a power of two: tiles without masks load faster
    and take fewer registers."""
    if x.shape[-1] < width:
        return torch.nn.functional.pad(x, (0, width - x.shape[-1]))
    return x if x.stride(-1) == 1 else x.contiguous()


def _cut(x, like):
    """x without the columns that were added."""
    return x if x.shape[-1] == like.shape[-1] else x[..., : like.shape[-1]].contiguous()


class _Packing:
    """Where the blocks of packed sequences are; of sequences that are not packed, nothing."""

    def __init__(self, cu_seqlens_q, cu_seqlens_k):
        self.offsets = cu_seqlens_q, cu_seqlens_k
        self.sequences = 1 if cu_seqlens_q is None else cu_seqlens_q.shape[0] - 1

    def blocks(self, block, length, of_keys=False):
        """How many blocks cover a length, or may be needed for it where each sequence begins one; and what locate()
        is told."""
        queries, keys = self.offsets
        if queries is None:
            return triton.cdiv(length, block), (None, None, None, None)
        offsets = keys if of_keys else queries
        counts = (offsets.diff() + (block - 1)) // block
        first = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
        n = length // block + self.sequences
        sequence = torch.searchsorted(first, torch.arange(n, device=first.device), right=True) - 1
        return n, (queries, keys, first, torch.where(sequence < self.sequences, sequence, -1))

    def sequence_of(self, length, of_keys):
        offsets = self.offsets[of_keys]
        if offsets is None:
            return None
        return torch.searchsorted(offsets, torch.arange(length, device=offsets.device), right=True) - 1


class _Operands:
    """What the kernels of both passes are given alike."""

    def __init__(
        self, q, k, v, gamma, center, sigma, attn_mask, key_padding_mask, cu_seqlens_q, cu_seqlens_k, scale, is_causal,
        normalized,
    ):  # fmt: skip
        self.batch, self.heads, self.queries, self.head_dim = q.shape
        self.kv_heads, self.keys, self.value_dim = k.shape[1], k.shape[2], v.shape[3]
        self.gamma, self.scale, self.causal, self.normalized = gamma, scale, is_causal, normalized
        self.half = q.dtype != torch.float32
        self.packing = _Packing(cu_seqlens_q, cu_seqlens_k)
        self.skips = sigma is not None and attn_mask is None
        self.masks = (
            attn_mask, (0, 0, 0, 0) if attn_mask is None else attn_mask.stride(),
            key_padding_mask, (0, 0) if key_padding_mask is None else key_padding_mask.stride(),
        )  # fmt: skip
        self.window = (
            center, (0, 0, 0) if center is None else center.stride(), sigma,
            (0, 0, 0) if sigma is None else sigma.stride(), *self._unpadded(key_padding_mask), self.keys,
        )  # fmt: skip
        self.block_d = common.power_of_2(self.head_dim, 16, 128)
        self.block_v = common.power_of_2(self.value_dim, 16, 128)
        self.low, self.norms = (None, None, None), (None, None, None)
        self.q, self.k, self.v = q, k, _fit(v, self.block_v)
        if gamma is not None or self.skips:
            self._move(q, k, key_padding_mask)
        if gamma is None:
            self.q, self.k = _fit(q, self.block_d), _fit(k, self.block_d)
        full, self.tiles = _machine()
        self.meta = {
            "BLOCK_D": self.block_d, "BLOCK_V": self.block_v, "FULL": full, "CAUSAL": is_causal,
            "NORMALIZED": normalized,
        }  # fmt: skip

    def _unpadded(self, padding):
        """Per place, the last key up to it and the first from it on that are no padding."""
        if padding is None:
            return None, None
        place = torch.arange(self.keys, dtype=torch.int32, device=padding.device)
        before = torch.where(padding, -1, place).cummax(1).values
        after = torch.where(padding, self.keys, place).flip(1).cummin(1).values.flip(1)
        return before, after.contiguous()

    def _move(self, q, k, padding):
        """q and k moved to their centre if there is gamma, their norms, and the largest of those of k."""
        centre = seen = None
        moves = self.gamma is not None
        padding_strides = self.masks[3]
        if moves:
            rows = self.batch * self.kv_heads * self.packing.sequences
            centre = q.new_empty((rows, self.head_dim), dtype=torch.float32)
            common.launch(
                centre_kernel, (rows,),
                k, self.window[5], self.packing.offsets[1], centre, k.stride(), self.kv_heads, self.keys, self.head_dim,
                self.packing.sequences,
                HALF=self.half, BLOCK_R=32, BLOCK_D=self.block_d, num_warps=4,
            )  # fmt: skip
            seen = torch.zeros((rows,), dtype=torch.int32, device=q.device) if self.half else None
        found = []
        for x, heads, mask in ((q, self.heads, None), (k, self.kv_heads, padding)):
            length = x.shape[2]
            blocks = triton.cdiv(length, 32)
            moved = self.empty(x) if moves else None
            low = self.empty(x) if moves and self.half else None
            norms = x.new_empty(x.shape[:3], dtype=torch.float32)
            sequence_of = self.packing.sequence_of(length, x is k) if moves else None
            common.launch(
                move_kernel, (self.batch * heads * blocks,),
                x, centre, sequence_of, mask, moved, low, seen, norms, x.stride(), padding_strides, heads,
                self.kv_heads, length, self.head_dim, self.packing.sequences, blocks,
                BLOCK_R=32, BLOCK_D=self.block_d, num_warps=4,
            )  # fmt: skip
            found.append((moved, low, norms))
        (q_moved, q_low, q_norms), (k_moved, k_low, k_norms) = found
        self.low, self.norms = (q_low, k_low, seen), (q_norms, k_norms, k_norms.amax(2))
        if moves:
            self.q, self.k = q_moved, k_moved

    def variants(self, kernel):
        """The launches that a kernel takes: its block sizes and the other arguments that are constants."""
        tiles = self.tiles[kernel, max(self.block_d, self.block_v, 64)]
        one_kind = self.gamma is None or self.window[2] is None
        plain = one_kind and self.masks[0] is None and self.masks[2] is None and self.packing.offsets[0] is None
        kinds = [("plain" if plain else "mixed") if self.half else "float32"]
        if self.low[0] is not None:
            kinds.append("low")
        for kind in kinds:
            block_m, block_n, warps, stages, chunk = tiles[KINDS.index(kind)]
            sizes = {"BLOCK_M": block_m, "BLOCK_N": block_n, "num_warps": warps, "STAGES": stages}
            sizes |= {"LOW": kind == "low", "CHUNK": min(chunk, self.block_d, self.block_v)}
            yield block_m, block_n, self.meta | sizes

    def sizes(self):
        return self.heads, self.kv_heads, self.queries, self.keys

    def empty(self, like, values=False, slabs=0):
        """For a result shaped like q or k, or like v, as wide as tiles are; float32 and several for slabs."""
        shape = (*like.shape[:3], self.block_v if values else self.block_d)
        if slabs:
            return like.new_empty((slabs, *shape), dtype=torch.float32)
        return like.new_empty(shape)


def gaussian_attention_fwd(
    q, k, v, gamma, center, sigma, attn_mask, key_padding_mask, cu_seqlens_q, cu_seqlens_k, scale, is_causal,
    normalized,
):  # fmt: skip
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    if lse.numel() == 0 or k.shape[2] == 0:
        return q.new_zeros((*q.shape[:3], v.shape[3])), lse.fill_(-float("inf")), torch.zeros_like(lse)
    o = _Operands(
        q, k, v, gamma, center, sigma, attn_mask, key_padding_mask, cu_seqlens_q, cu_seqlens_k, scale, is_causal,
        normalized,
    )  # fmt: skip
    out = o.empty(q, values=True)
    for block_m, _, meta in o.variants("fwd"):
        blocks, packed = o.packing.blocks(block_m, o.queries)
        common.launch(
            fwd_kernel, (o.batch * o.heads * blocks,),
            o.q, o.k, o.v, o.low, o.norms, gamma, o.window, o.masks, packed, out, lse, o.q.stride(), o.k.stride(),
            o.v.stride(), *o.sizes(), blocks, o.packing.sequences, scale, **meta,
        )  # fmt: skip
    return _cut(out, v), lse, torch.zeros_like(lse)  # the backward pass finds itself what lse was rounded by


def _gain(dout, dlse):
    """A power of two that brings the largest incoming gradient between 1 and 2."""
    largest = torch.stack([one.abs().max().float() for one in (dout, dlse) if one is not None]).max()
    gain = torch.ldexp(torch.ones_like(largest), 1 - torch.frexp(largest).exponent)
    return torch.where(largest.isfinite(), gain, 1.0)


def _queries(o, dout, dlse, out, lse, gain, dq, dcenter, dsigma, for_keys):
    """Launch the kernel over blocks of queries: the shares of the blocks in dgamma; and for the kernel over keys what
    keys each block needs, how many queries a block and how many blocks there are, and the first of each sequence."""
    shares = ranges = None
    for block_m, _, meta in o.variants("queries"):
        blocks, packed = o.packing.blocks(block_m, o.queries)
        if ranges is None:
            shape = (o.batch, o.heads, blocks)
            shares = None if o.gamma is None else lse.new_empty(shape)
            ranges = [torch.empty(shape, dtype=torch.int32, device=lse.device) if o.skips else None for _ in range(2)]
        common.launch(
            queries_kernel, (o.batch * o.heads * blocks,),
            dout, dlse, o.q, o.k, o.v, o.low, o.norms, o.gamma, o.window, o.masks, packed, out, lse, gain, dq, shares,
            dcenter, dsigma, for_keys, tuple(ranges), dout.stride(), o.q.stride(), o.k.stride(), o.v.stride(),
            *o.sizes(), blocks, o.packing.sequences, o.scale, **meta,
        )  # fmt: skip
    return shares, (*ranges, block_m, blocks, packed[2])


def _keys(o, dout, gain, for_keys, ranges, k, v):
    """Launch the kernel over blocks of keys: the gradients of k and v."""
    group, slabs = o.heads // o.kv_heads, 0
    for _, block_n, meta in o.variants("keys"):
        blocks, packed = o.packing.blocks(block_n, o.keys, of_keys=True)
        if not slabs:
            heads_each = triton.cdiv(group, min(group, triton.cdiv(PROGRAMS, o.batch * o.kv_heads * blocks)))
            slabs = triton.cdiv(group, heads_each)
            parts = [o.empty(one, one is v, slabs if slabs > 1 else 0) for one in (k, v)]
        common.launch(
            keys_kernel, (o.batch * o.kv_heads * slabs * blocks,),
            dout, o.q, o.k, o.v, o.low, o.norms, o.gamma, o.window, o.masks, packed, gain, for_keys, ranges, *parts,
            dout.stride(), o.q.stride(), o.k.stride(), o.v.stride(), o.batch, *o.sizes(), blocks, slabs, heads_each,
            o.packing.sequences, o.scale,
            SCALED=o.gamma is not None and heads_each > 1, **meta,
        )  # fmt: skip
    if slabs > 1:
        parts = [part.sum(0).to(k.dtype) for part in parts]
    return _cut(parts[0], k), _cut(parts[1], v)


def gaussian_attention_bwd(
    dout, dlse, q, k, v, gamma, center, sigma, attn_mask, key_padding_mask, cu_seqlens_q, cu_seqlens_k, out, lse,
    lse_rest, scale, is_causal, normalized,
):  # fmt: skip
    dgamma, dcenter, dsigma = (lse.new_empty((0,) if one is None else one.shape) for one in (gamma, center, sigma))
    if lse.numel() == 0 or k.shape[2] == 0:
        dq, dk, dv = (one.new_zeros(one.shape) for one in (q, k, v))
        return dq, dk, dv, dgamma.zero_(), dcenter.zero_(), dsigma.zero_()
    o = _Operands(
        q, k, v, gamma, center, sigma, attn_mask, key_padding_mask, cu_seqlens_q, cu_seqlens_k, scale, is_causal,
        normalized,
    )  # fmt: skip
    dout, out = (_fit(one, o.block_v) for one in (dout, out))
    if dlse is not None:
        dlse = dlse.contiguous()
    gain = _gain(dout, dlse) if q.dtype == torch.float16 else None
    for_keys = tuple(torch.empty_like(lse) for _ in range(3))
    window = [None if one is None else grad for one, grad in ((center, dcenter), (sigma, dsigma))]
    dq = o.empty(q)
    shares, ranges = _queries(o, dout, dlse, out, lse, gain, dq, *window, for_keys)
    if gamma is not None:
        dgamma = shares.sum((0, 2), dtype=torch.float64).to(lse.dtype)
    dk, dv = _keys(o, dout, gain, for_keys, ranges, k, v)
    return _cut(dq, q), dk, dv, dgamma, dcenter, dsigma
