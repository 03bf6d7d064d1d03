"""Offsets are 64-bit: strides that lead beyond 2^31 elements, without the memory between them.

The tensors are views of one reserved, never committed mapping; only the pages their elements lie on
come to exist. A 32-bit offset would read another page, which is zero, or fall outside the mapping.
"""

import mmap

import pytest
import test_linear_scan_cuda_emulated
import torch
from emulated_cuda import load, make, run_emulated

library = load()
BIG = 2**31
MAP_NORESERVE = 0x4000


@pytest.fixture(scope="module")
def reserved():
    """2^35 bytes of address space, as float32."""
    try:
        mapping = mmap.mmap(-1, 2**36, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE)
    except OSError as error:
        pytest.skip(f"this machine does not reserve 64 GiB of address space: {error}")
    return torch.frombuffer(mapping, dtype=torch.float32)


@pytest.mark.parametrize("batch, channel, step", [(1, 0, 0), (0, 3, 0), (0, 0, 5), (70000, 3, 5), (3, 40000, 90000)])
def test_sequence_offsets_are_exact(batch, channel, step):
    strides = (BIG + 1, BIG + 3, -BIG - 5)
    expected = batch * strides[0] + channel * strides[1] + step * strides[2]
    assert library.trifuse_sequence_offset(*strides, batch, channel, step) == expected


def test_offsets_of_a_long_sequence_with_small_strides():
    batch, channel, step, dim, seqlen = 3, 8191, 10**6 - 1, 8192, 10**6
    offset = library.trifuse_sequence_offset(dim * seqlen, seqlen, 1, batch, channel, step)
    assert offset == (batch * dim + channel) * seqlen + step > 2**34


def test_coefficient_offsets_are_exact():
    strides = (BIG + 1, BIG + 3, BIG + 7, -BIG - 9)
    at = (5, 7, 63, 10**6)
    expected = sum(s * i for s, i in zip(strides, at, strict=True))
    assert library.trifuse_coefficient_offset(*strides, *at) == expected


def spread(reserved, tensor, strides, start):
    """The tensor's values in a view of the reserved mapping with these strides."""
    view = reserved.as_strided(tensor.shape, strides, start)
    view.copy_(tensor)
    assert sum((n - 1) * s for n, s in zip(tensor.shape, strides, strict=True)) > BIG
    return view


@pytest.mark.parametrize("far", [0, 1, 2])
@pytest.mark.parametrize("reverse", [False, True])
def test_scan_reads_beyond_two_to_the_31(reserved, far, reverse):
    tensors = {k: v.float() for k, v in make(dim=3, seqlen=3, dstate=2, batch=2).items()}
    near = run_emulated(tensors, torch.float32, delta_softplus=True, reverse=reverse)
    for start, name in enumerate(("u", "delta", "z")):
        strides = [100, 10, 50000]
        strides[far] = BIG + 64
        tensors[name] = spread(reserved, tensors[name], strides, start)
    for start, name in enumerate(("B", "C"), 3):
        strides = [2000, 7, 500, 50000]
        strides[(0, 2, 3)[far]] = BIG + 64
        tensors[name] = spread(reserved, tensors[name], strides, start)
    distant = run_emulated(tensors, torch.float32, delta_softplus=True, reverse=reverse)
    for name, value in near.items():
        assert torch.equal(value, distant[name]), name


def test_state_update_beyond_two_to_the_31(reserved):
    g = torch.Generator().manual_seed(0)
    state = torch.randn(3, 2, 5, 4, generator=g)
    args = [torch.randn(3, 2, 5, generator=g) for _ in range(2)]
    args += [-torch.rand(2, 5, 4, generator=g), *(torch.randn(3, 1, 4, generator=g) for _ in range(2))]
    distant = spread(reserved, state, (2 * BIG, 16, 50000, 1), 0)
    rest = (None, None, None, True, None)
    out = torch.ops.trifuse_emulated.selective_state_update(state, *args, *rest)
    distant_out = torch.ops.trifuse_emulated.selective_state_update(distant, *args, *rest)
    assert torch.equal(out, distant_out)
    assert torch.equal(state, distant)


@pytest.mark.parametrize("far", [0, 1, 2])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("layout", ["bdl", "bld"])
def test_linear_scan_reads_beyond_two_to_the_31(reserved, layout, reverse, far):
    tensors = test_linear_scan_cuda_emulated.make(dim=3, seqlen=3, layout=layout)
    near = test_linear_scan_cuda_emulated.run_emulated(tensors, reverse=reverse, layout=layout)
    for start, name in enumerate("ab"):
        strides = [100, 10, 50000]
        strides[far] = BIG + 64
        tensors[name] = spread(reserved, tensors[name], strides, start)
    distant = test_linear_scan_cuda_emulated.run_emulated(tensors, reverse=reverse, layout=layout)
    for name, value in near.items():
        assert torch.equal(value, distant[name]), name


@pytest.mark.parametrize("far, inner", [(0, 3), (1, 3), (2, 3), (0, 9), (1, 9)])
@pytest.mark.parametrize("library", ["trifuse", "trifuse_emulated"])
def test_gaussian_gate_reads_beyond_two_to_the_31(reserved, far, inner, library):
    """Rows of 3, columns of 9 where they lie side by side."""
    g = torch.Generator().manual_seed(0)
    x, dout = torch.randn(2, 3, 5, inner, generator=g)
    strides = [1000, 20, 1]
    offset, width = torch.randn(1, 2, generator=g), 1 + torch.rand(1, 2, generator=g)
    mask, flags = torch.rand(3, 5, inner, generator=g) < 0.7, (1, 1, False, 1e-5, False, True)
    ops = getattr(torch.ops, library)

    def run(x, dout):
        out, stats = ops.gaussian_gate_fwd(x, offset, width, None, mask, *flags)
        return out, stats, *ops.gaussian_gate_bwd(dout, x, offset, width, None, mask, stats, *flags)

    def near(tensor, strides):
        return torch.zeros(5000).as_strided(tensor.shape, strides).copy_(tensor)

    strides[far] = 2 if far == 2 else strides[far]
    expected = run(near(x, strides), near(dout, strides))
    strides[far] = BIG + 64
    found = run(spread(reserved, x, strides, 0), spread(reserved, dout, strides, 500))
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


ROWS, COLUMNS, PIECES = (2, 6, 3), (2, 6, 9), (2, 5000, 1)


@pytest.mark.parametrize("shape, far", [(ROWS, 0), (ROWS, 1), (ROWS, 2), (COLUMNS, 0), (COLUMNS, 1), (PIECES, 0)])
@pytest.mark.parametrize("masked", [False, True])
def test_gaussian_adaptive_attention_reads_beyond_two_to_the_31(reserved, masked, shape, far):
    """Rows, columns where they lie side by side, and with a mask rows that are cut in pieces."""
    g = torch.Generator().manual_seed(0)
    x, dout = (torch.randn(shape, generator=g) for _ in range(2))
    offset, width = torch.randn(2, 3, generator=g), 1 + torch.rand(2, 3, generator=g)
    mask = torch.rand(shape, generator=g) < 0.7 if masked else None
    ops, flags = torch.ops.trifuse_emulated, (None, 1e-8, False)

    def run(x, dout):
        out, _, stats = ops.gaussian_adaptive_attention_fwd(x, offset, width, mask, *flags, False)
        return out, *ops.gaussian_adaptive_attention_bwd(dout, None, x, offset, width, mask, stats, *flags)

    strides = [6000, shape[2], 1]
    expected = run(*(torch.zeros(20000).as_strided(shape, strides).copy_(one) for one in (x, dout)))
    strides = [20000, shape[2], 1]
    strides[far] = BIG + 64
    found = run(spread(reserved, x, strides, 0), spread(reserved, dout, strides, 50001))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)
