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

# Kernel: BLOCK_M, BLOCK_N, warps and stages, per size of a head that is a power of two, for half precision, for half
# precision in two halves (with the same BLOCK_M for "queries"), and for float32.
TILES = {
    "fwd": {
        64: ((128, 64, 4, 3), (64, 32, 4, 1), (64, 32, 4, 2)),
        128: ((128, 64, 8, 2), (64, 32, 4, 1), (64, 32, 4, 2)),
        256: ((64, 32, 8, 2), (64, 32, 8, 1), (32, 16, 4, 1)),
    },
    "queries": {
        64: ((64, 64, 4, 2), (64, 32, 4, 1), (32, 32, 4, 1)),
        128: ((64, 64, 8, 2), (64, 32, 8, 1), (32, 32, 4, 1)),
        256: ((64, 32, 8, 1), (64, 32, 8, 1), (16, 16, 4, 1)),
    },
    "keys": {
        64: ((64, 64, 4, 2), (32, 64, 4, 1), (32, 32, 4, 1)),
        128: ((64, 64, 8, 2), (32, 64, 8, 1), (32, 32, 4, 1)),
        256: ((32, 64, 8, 1), (32, 64, 8, 1), (16, 16, 4, 1)),
    },
}


def _precision():
    """How tl.dot multiplies float32 to nearly its own precision on the matrix cores of this GPU."""
    if interpreting() or triton.runtime.driver.active.get_current_target().backend != "cuda":
        return "ieee"
    return "tf32x3"


def _side_by_side(x):
    """x, its last axis contiguous."""
    return x if x.stride(-1) == 1 else x.contiguous()


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
        self.block_d = common.power_of_2(self.head_dim, 16, 256)
        self.block_v = common.power_of_2(self.value_dim, 16, 256)
        self.low, self.norms = (None, None, None), (None, None, None)
        self.q, self.k, self.v = q, k, _side_by_side(v)
        if gamma is not None or self.skips:
            self._move(q, k, key_padding_mask)
        if gamma is None:
            self.q, self.k = _side_by_side(q), _side_by_side(k)
        self.meta = {
            "BLOCK_D": self.block_d, "BLOCK_V": self.block_v, "EVEN_D": self.block_d == self.head_dim,
            "EVEN_V": self.block_v == self.value_dim, "FULL": _precision(), "CAUSAL": is_causal,
            "NORMALIZED": normalized,
        }  # fmt: skip

    def _unpadded(self, padding):
        """Per place, the last key up to it and the first from it on that are no padding."""
        if padding is None or not self.skips:
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
                k, padding, self.packing.offsets[1], centre, k.stride(), padding_strides, self.kv_heads, self.keys,
                self.head_dim, self.packing.sequences,
                HALF=self.half, BLOCK_R=16, BLOCK_D=self.block_d, num_warps=4,
            )  # fmt: skip
            seen = torch.zeros((rows,), dtype=torch.int32, device=q.device) if self.half else None
        found = []
        for x, heads, mask in ((q, self.heads, None), (k, self.kv_heads, padding)):
            length = x.shape[2]
            blocks = triton.cdiv(length, 32)
            moved = torch.empty(x.shape, dtype=x.dtype, device=x.device) if moves else None
            low = torch.empty(x.shape, dtype=x.dtype, device=x.device) if moves and self.half else None
            norms = torch.empty(x.shape[:3], dtype=torch.float32, device=x.device)
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
        half, two_halves, full = TILES[kernel][max(self.block_d, self.block_v, 64)]
        tiles = [(half, False)] if self.half else [(full, False)]
        if self.low[0] is not None:
            tiles.append((two_halves, True))
        for (block_m, block_n, warps, stages), low in tiles:
            sizes = {"BLOCK_M": block_m, "BLOCK_N": block_n, "STAGES": stages, "LOW": low, "num_warps": warps}
            yield block_m, block_n, self.meta | sizes

    def sizes(self):
        return self.heads, self.kv_heads, self.queries, self.keys, self.head_dim, self.value_dim


def gaussian_attention_fwd(
    q, k, v, gamma, center, sigma, attn_mask, key_padding_mask, cu_seqlens_q, cu_seqlens_k, scale, is_causal,
    normalized,
):  # fmt: skip
    out = q.new_empty((*q.shape[:3], v.shape[3]))
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    if lse.numel() == 0:
        return out, lse, torch.zeros_like(lse)
    if k.shape[2] == 0:
        return out.zero_(), lse.fill_(-float("inf")), torch.zeros_like(lse)
    o = _Operands(
        q, k, v, gamma, center, sigma, attn_mask, key_padding_mask, cu_seqlens_q, cu_seqlens_k, scale, is_causal,
        normalized,
    )  # fmt: skip
    for block_m, _, meta in o.variants("fwd"):
        blocks, packed = o.packing.blocks(block_m, o.queries)
        common.launch(
            fwd_kernel, (o.batch * o.heads * blocks,),
            o.q, o.k, o.v, o.low, o.norms, gamma, o.window, o.masks, packed, out, lse, o.q.stride(), o.k.stride(),
            o.v.stride(), *o.sizes(), blocks, o.packing.sequences, scale, **meta,
        )  # fmt: skip
    return out, lse, torch.zeros_like(lse)


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


def _keys(o, dout, gain, for_keys, ranges, dk, dv):
    """Launch the kernel over blocks of keys: the gradients of k and v, into `dk` and `dv` or instead of them."""
    group, slabs = o.heads // o.kv_heads, 0
    parts = dk, dv
    for _, block_n, meta in o.variants("keys"):
        blocks, packed = o.packing.blocks(block_n, o.keys, of_keys=True)
        if not slabs:
            heads_each = triton.cdiv(group, min(group, triton.cdiv(PROGRAMS, o.batch * o.kv_heads * blocks)))
            slabs = triton.cdiv(group, heads_each)
            if slabs > 1:
                parts = [one.new_empty((slabs, *one.shape), dtype=torch.float32) for one in (dk, dv)]
        common.launch(
            keys_kernel, (o.batch * o.kv_heads * slabs * blocks,),
            dout, o.q, o.k, o.v, o.low, o.norms, o.gamma, o.window, o.masks, packed, gain, for_keys, ranges, *parts,
            dout.stride(), o.q.stride(), o.k.stride(), o.v.stride(), o.batch, *o.sizes(), blocks, slabs, heads_each,
            o.packing.sequences, o.scale,
            SCALED=o.gamma is not None and heads_each > 1, **meta,
        )  # fmt: skip
    if slabs > 1:
        dk, dv = (part.sum(0).to(one.dtype) for part, one in zip(parts, (dk, dv), strict=True))
    return dk, dv


def gaussian_attention_bwd(
    dout, dlse, q, k, v, gamma, center, sigma, attn_mask, key_padding_mask, cu_seqlens_q, cu_seqlens_k, out, lse,
    lse_rest, scale, is_causal, normalized,
):  # fmt: skip
    dq, dk, dv = (one.new_empty(one.shape) for one in (q, k, v))
    dgamma, dcenter, dsigma = (lse.new_empty((0,) if one is None else one.shape) for one in (gamma, center, sigma))
    if lse.numel() == 0 or k.shape[2] == 0:
        return tuple(one.zero_() for one in (dq, dk, dv, dgamma, dcenter, dsigma))
    o = _Operands(
        q, k, v, gamma, center, sigma, attn_mask, key_padding_mask, cu_seqlens_q, cu_seqlens_k, scale, is_causal,
        normalized,
    )  # fmt: skip
    dout = _side_by_side(dout)
    if dlse is not None:
        dlse = dlse.contiguous()
    gain = _gain(dout, dlse) if q.dtype == torch.float16 and dout.numel() else None
    for_keys = tuple(torch.empty_like(lse) for _ in range(3))
    window = [None if one is None else grad for one, grad in ((center, dcenter), (sigma, dsigma))]
    shares, ranges = _queries(o, dout, dlse, out, lse, gain, dq, *window, for_keys)
    if gamma is not None:
        dgamma = shares.sum((0, 2), dtype=torch.float64).to(lse.dtype)
    dk, dv = _keys(o, dout, gain, for_keys, ranges, dk, dv)
    return dq, dk, dv, dgamma, dcenter, dsigma
