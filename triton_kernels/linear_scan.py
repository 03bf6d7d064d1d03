"""The linear scan in Triton, forward and backward, real and complex.

A program walks one row (a batch item, or a packed sequence), a block of channels and a piece of time, tile after
tile of channels x steps; each tile is one associative scan in float32, and the state goes from tile to tile in
registers. Where the rows are few, time is cut into pieces: a first pass finds how each piece's end depends on its
begin, and every program of the second joins the pieces before its own. The cuts depend on the shape alone.

Triton has no complex numbers: a complex tensor comes as the view of its real and imaginary parts, and strides count
reals. In helpers, A and B say whether factors and terms are complex; where one is not, its imaginary part is a name
for its real part that nothing reads.

Everything runs in processing order: "first", "before" and "last" mean that order, which is that of the scan going
forward, and against it going backward.
"""

import torch
import triton
import triton.language as tl

from trifuse.triton_kernels import common
from trifuse.triton_kernels.common import wide

__all__ = ["linear_scan_bwd", "linear_scan_fwd"]

TILE = 1024  # numbers in a tile
PROGRAMS = 512  # what fills a large GPU; fewer rows than that are cut in time
LEAST_TILES = 4  # in a piece


# A term of zero stays zero whatever it is multiplied by: a product of factors may overflow where there is no state.
@triton.jit
def _compose_real(a1, b1, a2, b2):
    return a1 * a2, tl.where(b1 == 0, b2, a2 * b1 + b2)


@triton.jit
def _compose_mixed(a1, br1, bi1, a2, br2, bi2):
    nothing = (br1 == 0) & (bi1 == 0)
    return a1 * a2, tl.where(nothing, br2, a2 * br1 + br2), tl.where(nothing, bi2, a2 * bi1 + bi2)


@triton.jit
def _compose_complex(ar1, ai1, br1, bi1, ar2, ai2, br2, bi2):
    nothing = (br1 == 0) & (bi1 == 0)
    br = tl.where(nothing, br2, ar2 * br1 - ai2 * bi1 + br2)
    bi = tl.where(nothing, bi2, ar2 * bi1 + ai2 * br1 + bi2)
    return ar2 * ar1 - ai2 * ai1, ar2 * ai1 + ai2 * ar1, br, bi


@triton.jit
def _scan(ar, ai, br, bi, A: tl.constexpr, B: tl.constexpr):
    """Along each row: the products of the factors, and the states from zero."""
    if A:
        pr, pi, hr, hi = tl.associative_scan((ar, ai, br, bi), 1, _compose_complex)
    elif B:
        pr, hr, hi = tl.associative_scan((ar, br, bi), 1, _compose_mixed)
        pi = pr
    else:
        pr, hr = tl.associative_scan((ar, br), 1, _compose_real)
        pi, hi = pr, hr
    return pr, pi, hr, hi


@triton.jit
def _step(ar, ai, xr, xi, br, bi, A: tl.constexpr, B: tl.constexpr):
    """a x + b, and b where x is zero."""
    if A:
        nothing = (xr == 0) & (xi == 0)
        yr = tl.where(nothing, br, ar * xr - ai * xi + br)
        yi = tl.where(nothing, bi, ar * xi + ai * xr + bi)
    elif B:
        yr, yi = tl.where(xr == 0, br, ar * xr + br), tl.where(xi == 0, bi, ar * xi + bi)
    else:
        yr = tl.where(xr == 0, br, ar * xr + br)
        yi = yr
    return yr, yi


@triton.jit
def _load(ptr, strides, batch, d, t, mask, other, COMPLEX: tl.constexpr):
    at = ptr + (batch * strides[0] + d * strides[1])[:, None] + (t * strides[2])[None, :]
    re = tl.load(at, mask=mask, other=other).to(tl.float32)
    im = re
    if COMPLEX:
        im = tl.load(at + 1, mask=mask, other=0.0).to(tl.float32)
    return re, im


@triton.jit
def _store(ptr, strides, batch, d, t, mask, re, im, COMPLEX: tl.constexpr):
    at = ptr + (batch * strides[0] + d * strides[1])[:, None] + (t * strides[2])[None, :]
    tl.store(at, re.to(ptr.dtype.element_ty), mask=mask)
    if COMPLEX:
        tl.store(at + 1, im.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def _load_state(ptr, i, mask, COMPLEX: tl.constexpr):
    if ptr is None:
        re = tl.zeros(mask.shape, tl.float32)
        im = re
    elif COMPLEX:
        re, im = tl.load(ptr + 2 * i, mask=mask, other=0.0), tl.load(ptr + 2 * i + 1, mask=mask, other=0.0)
    else:
        re = tl.load(ptr + i, mask=mask, other=0.0)
        im = re
    return re, im


@triton.jit
def _store_state(ptr, i, mask, re, im, COMPLEX: tl.constexpr):
    if COMPLEX:
        tl.store(ptr + 2 * i, re, mask=mask)
        tl.store(ptr + 2 * i + 1, im, mask=mask)
    else:
        tl.store(ptr + i, re, mask=mask)


@triton.jit
def _column(x, here):
    return tl.sum(tl.where(here[None, :], x, 0.0), 1)


@triton.jit
def _kernel(
    a, b, h, initial_state, first_state, last_state, cu_seqlens, products, ends, out, da,
    a_strides, b_strides, h_strides, out_strides, da_strides, rows, dim, seqlen, n_blocks, piece_length,
    A: tl.constexpr, B: tl.constexpr, DOWN: tl.constexpr, ADJOINT: tl.constexpr, COMPOSE: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """The scan of b from first_state to `out` and last_state. With ADJOINT b is the gradient of h, a step's factor
    is the conjugate of the step before's, the first one's is 1, last_state is that of one step more, and da is asked
    for too, from h and the scan's own initial_state. With COMPOSE only what a piece does to its begin."""
    row = wide(tl.program_id(0) // n_blocks)
    piece, n_pieces = tl.program_id(1), tl.num_programs(1)
    d = wide(tl.program_id(0) % n_blocks) * BLOCK_D + tl.arange(0, BLOCK_D)
    d_mask = d < dim
    i = tl.arange(0, BLOCK_T)
    batch, start, length = row, wide(0), wide(seqlen)
    if cu_seqlens is not None:
        batch, start = wide(0), tl.load(cu_seqlens + row)
        length = tl.load(cu_seqlens + row + 1) - start
    begin = wide(piece) * piece_length
    end = tl.minimum(begin + piece_length, length)
    state = row * dim + d

    one = tl.full((BLOCK_D,), 1.0, tl.float32)
    total_r, total_i = one, one - 1.0
    cr, ci = tl.zeros((BLOCK_D,), tl.float32), tl.zeros((BLOCK_D,), tl.float32)
    if not COMPOSE:
        cr, ci = _load_state(first_state, state, d_mask, B)
        if products is not None:
            for before in range(piece):
                at = (wide(before) * rows + row) * dim + d
                pr, pi = _load_state(products, at, d_mask, A)
                er, ei = _load_state(ends, at, d_mask, B)
                cr, ci = _step(pr, pi, cr, ci, er, ei, A, B)

    for k in range(tl.cdiv(end - begin, BLOCK_T)):
        s = begin + wide(k) * BLOCK_T + i
        t = start + (length - 1 - s if DOWN else s)
        mask = d_mask[:, None] & (s < end)[None, :]
        # Steps that do not exist keep the state: their factor is 1.
        if ADJOINT:
            ar, ai = _load(a, a_strides, batch, d, t + 1 if DOWN else t - 1, mask & (s > 0)[None, :], 1.0, A)
            ai = -ai
        else:
            ar, ai = _load(a, a_strides, batch, d, t, mask, 1.0, A)
        br, bi = _load(b, b_strides, batch, d, t, mask, 0.0, B)
        xr, xi = _step(ar, ai, cr[:, None], ci[:, None], br, bi, A, B)
        first = (i == 0)[None, :]
        br = tl.where(first, xr, br)
        bi = tl.where(first, xi, bi)
        pr, pi, hr, hi = _scan(ar, ai, br, bi, A, B)
        if COMPOSE:
            qr, qi = _column(pr, i == BLOCK_T - 1), _column(pi, i == BLOCK_T - 1)
            if A:
                total_r, total_i = qr * total_r - qi * total_i, qr * total_i + qi * total_r
            else:
                total_r = qr * total_r
        else:
            _store(out, out_strides, batch, d, t, mask, hr, hi, B)
        if ADJOINT and not COMPOSE:
            inside = (s + 1 < length)[None, :]
            zr, zi = _load(h, h_strides, batch, d, t - 1 if DOWN else t + 1, mask & inside, 0.0, B)
            fr, fi = _load_state(initial_state, state, d_mask, B)
            zr = tl.where(inside, zr, fr[:, None])
            gr, gi = hr * zr, hi
            if B:
                zi = tl.where(inside, zi, fi[:, None])
                gr = hr * zr + hi * zi
                gi = hi * zr - hr * zi
            _store(da, da_strides, batch, d, t, mask, gr, gi, A)
        cr, ci = _column(hr, i == BLOCK_T - 1), _column(hi, i == BLOCK_T - 1)

    if COMPOSE:
        at = (wide(piece) * rows + row) * dim + d
        _store_state(products, at, d_mask, total_r, total_i, A)
        _store_state(ends, at, d_mask, cr, ci, B)
    elif last_state is not None:
        zeroth = tl.zeros((1,), tl.int64)
        if piece == n_pieces - 1:
            if ADJOINT:
                t = start + (zeroth if DOWN else zeroth + length - 1)
                ar, ai = _load(a, a_strides, batch, d, t, d_mask[:, None] & (zeroth < length)[None, :], 1.0, A)
                ar, ai = tl.sum(ar, 1), -tl.sum(ai, 1)
                zero = tl.zeros((BLOCK_D,), tl.float32)
                cr, ci = _step(ar, ai, cr, ci, zero, zero, A, B)
            _store_state(last_state, state, d_mask, cr, ci, B)


def _reals(x):
    """A tensor as the kernels take it: itself, or the view of its parts; and the strides of its sequence."""
    if x is None:
        return None, (0, 0, 0)
    if not x.is_complex():
        return x, x.stride()[:3]
    x = torch.view_as_real(x)
    return x, x.stride()[:3]


def _state(x):
    return None if x is None else _reals(x.contiguous())[0]


def _walk(a, b, h, initial_state, first_state, last_state, cu_seqlens, out, da, down, adjoint):
    from trifuse.registration.common import state_rows

    _, dim, seqlen = b.shape
    rows = state_rows(b, cu_seqlens)
    if rows * dim == 0:
        return
    A, B = a.is_complex(), b.is_complex()
    neighbours = out.stride(1) == 1 and dim > 1
    block_d = common.power_of_2(dim, 1, (16 if B else 32) if neighbours else 4)
    block_t = common.power_of_2(max(seqlen, 1), 16, max(TILE // block_d // (2 if B else 1), 16))
    n_blocks = triton.cdiv(dim, block_d)
    pieces = 1
    if cu_seqlens is None:
        pieces = max(min(triton.cdiv(PROGRAMS, rows * n_blocks), seqlen // (LEAST_TILES * block_t)), 1)
    piece_length = triton.cdiv(triton.cdiv(max(seqlen, 1), pieces), block_t) * block_t
    pieces = triton.cdiv(max(seqlen, 1), piece_length)
    products = ends = None
    if pieces > 1:
        products, ends = (
            torch.empty((pieces, rows, dim, 1 + kind), dtype=torch.float32, device=b.device) for kind in (A, B)
        )
    views = [_reals(x) for x in (a, b, h, out, da)]
    tensors, strides = [view[0] for view in views], [view[1] for view in views]
    for compose in (True, False) if pieces > 1 else (False,):
        warps = 8 if compose and A else 4  # 4 spill eight bytes
        common.launch(
            _kernel, (rows * n_blocks, pieces),
            *tensors[:3], _state(initial_state), _state(first_state), _state(last_state), cu_seqlens, products, ends,
            *tensors[3:], *strides, rows, dim, seqlen, n_blocks, piece_length,
            A=A, B=B, DOWN=down, ADJOINT=adjoint, COMPOSE=compose, BLOCK_D=block_d, BLOCK_T=block_t, num_warps=warps,
        )  # fmt: skip


def linear_scan_fwd(a, b, initial_state, cu_seqlens, reverse, bld):
    from trifuse.registration.common import empty_sequence, state_rows

    h = empty_sequence(b, bld)
    last_state = b.new_empty((state_rows(b, cu_seqlens), b.shape[1]), dtype=torch.promote_types(b.dtype, torch.float32))
    _walk(a, b, None, None, initial_state, last_state, cu_seqlens, h, None, reverse, False)
    return h, last_state


def linear_scan_bwd(dh, dlast_state, a, h, initial_state, cu_seqlens, reverse, bld):
    from trifuse.registration.common import empty_sequence

    da, db = empty_sequence(a, bld), empty_sequence(h, bld)
    if initial_state is None:
        dinitial_state, asked = h.new_empty((0,), dtype=torch.promote_types(h.dtype, torch.float32)), None
    else:
        dinitial_state = asked = torch.empty_like(initial_state)
    _walk(a, dh, h, initial_state, dlast_state, asked, cu_seqlens, db, da, not reverse, True)
    return da, db, dinitial_state
