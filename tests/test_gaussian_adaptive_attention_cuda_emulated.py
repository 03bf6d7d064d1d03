"""gaussian_adaptive_attention's CUDA kernels, compiled by the host compiler and run on the CPU, against the float64
reference.

Every comparison runs in ascending and in descending thread order and wants the same bits; memory that nothing wrote
is NaN (see test_cuda_emulated.py)."""

import ctypes

import pytest
import torch
from emulated_cuda import load
from gaussian_adaptive_attention_cases import against_the_reference, make
from tolerance import incoming

from trifuse.ops.gaussian_adaptive_attention import prepare

library = load()
pytestmark = pytest.mark.usefixtures("poisoned_memory")
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
dtypes = pytest.mark.parametrize("dtype", DTYPES)
# Where a slice lies in registers: eight lanes, a warp, a block and its columns; and in pieces.
WAYS = {
    "eight lanes": ((5, 96), 1), "a warp": ((3, 384), 1), "a block": ((2, 1536), 1), "columns": ((2, 40, 33), 1),
    "rows in pieces": ((1, 20001), 1), "columns in pieces": ((1, 4200, 9), 1),
}  # fmt: skip
ways = pytest.mark.parametrize("shape, dim", WAYS.values(), ids=WAYS)


def run_emulated(tensors, dout=True, **options):
    call = prepare(**tensors, **options)
    ops = torch.ops.trifuse_emulated
    out, weights, stats = ops.gaussian_adaptive_attention_fwd(*call[:8])
    found = {"out": call.slices.put_back(out)}
    if call.return_weights:
        found["weights"] = call.slices.put_back(weights)
    else:
        assert weights.shape == (0,)
    g = torch.Generator().manual_seed(99)
    gradients = {name: call.slices.take(incoming(one.shape, g).to(one.dtype)) for name, one in found.items()}
    dx, dmean_offset, dwidth = ops.gaussian_adaptive_attention_bwd(
        gradients["out"] if dout else None, gradients.get("weights"), *call[:4], stats, *call[4:7]
    )
    return found | {"dx": call.slices.put_back(dx), "dmean_offset": dmean_offset, "dwidth": dwidth}


def check(tensors, **options):
    kernel = run_emulated(tensors, **options)
    against_the_reference(kernel, tensors, **options)
    library.trifuse_emulator_set_descending(1)
    try:
        again = run_emulated(tensors, **options)
    finally:
        library.trifuse_emulator_set_descending(0)
    for name, value in kernel.items():
        assert torch.equal(value, again[name]), f"{name} depends on the order of threads"
    return kernel


@ways
@dtypes
@pytest.mark.parametrize("normalization", ["stable", "clamped"])
def test_slices_alone(normalization, dtype, shape, dim):
    """What the fast kernels take: no mask, no weights."""
    check(make(shape, dtype), dim=dim, normalization=normalization)


@ways
@dtypes
@pytest.mark.parametrize("normalization", ["stable", "clamped"])
def test_all_options_at_once(normalization, dtype, shape, dim):
    tensors = make(shape, dtype, heads=3, keep=0.8)
    check(tensors, dim=dim, num_heads=3, normalization=normalization, return_weights=True)


@ways
@dtypes
@pytest.mark.parametrize("normalization", ["stable", "clamped"])
def test_a_padding_value(normalization, dtype, shape, dim):
    tensors = make(shape, dtype, heads=2, padding=-0.1)
    options = {"dim": dim, "num_heads": 2, "normalization": normalization, "padding_value": -0.1}
    check(tensors, **options, return_weights=True)


@ways
@pytest.mark.parametrize("gaussians", [1, 16, 40])
def test_where_the_clamp_acts(gaussians, shape, dim):
    """Many wide Gaussians multiply to less than eps, one does not."""
    found = check(make(shape, gaussians=gaussians, least=2.0), dim=dim, normalization="clamped", return_weights=True)
    assert (found["weights"].sum(dim) < 0.5).all() == (gaussians > 1)


@pytest.mark.parametrize("length", [1, 2, 7, 8, 63, 64, 65, 127, 128, 129, 511, 512, 513, 1000, 8191, 8192, 8193])
def test_row_lengths(length):
    check(make((3, length)))
    check(make((17 if length <= 1000 else 1, length), torch.bfloat16))


@pytest.mark.parametrize("length", [120, 128, 136, 248, 256, 264, 1016, 1024, 1032, 16384, 16392])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_row_lengths_of_two_byte_vectors(dtype, length):
    """Four lanes, eight, a warp, a block, pieces: forward they hold twice as many entries as of four bytes."""
    check(make((9 if length < 2000 else 1, length), dtype))


def test_rows_are_read_in_vectors_where_they_can_be():
    """Only then a block holds 8192 entries; half as many otherwise."""
    workspace = library.trifuse_gaussian_adaptive_attention_workspace
    workspace.argtypes, workspace.restype = [ctypes.c_int64, ctypes.c_int], ctypes.c_int64
    assert not workspace(8192, 0) and workspace(8193, 0) and workspace(8196, 0)
    assert not workspace(4096, 1) and not workspace(4095, 0) and workspace(4100, 1) and workspace(4099, 0)


@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 63, 64, 65, 255, 256, 257, 1000, 1025])
@pytest.mark.parametrize("inner", [8, 33])
def test_column_lengths(inner, length):
    check(make((2, length, inner)), dim=1)


@pytest.mark.parametrize("inner", [1, 2, 7, 8, 15, 16, 31, 32, 65])
def test_numbers_of_columns(inner):
    check(make((3, 20, inner)), dim=1)


@pytest.mark.parametrize("heads", [1, 2, 3, 5, 12])
def test_heads_that_divide_the_axis_and_that_do_not(heads):
    check(make((40, 96), heads=heads), num_heads=heads)
    check(make((2, 25, 12), heads=heads), num_heads=heads, dim=1)


@pytest.mark.parametrize("shape, dim, heads", [((1400, 4), 1, 1), ((100, 80), 1, 40), ((40, 9, 20), 1, 1)])
def test_more_tiles_than_blocks(shape, dim, heads):
    """The emulator's one multiprocessor has 32 blocks, which share the tiles; with more of them each has its own."""
    tensors = make(shape, heads=heads)
    shared = check(tensors, dim=dim, num_heads=heads)
    library.trifuse_emulator_set_multiprocessors(1000)
    try:
        alone = check(tensors, dim=dim, num_heads=heads)
    finally:
        library.trifuse_emulator_set_multiprocessors(1)
    assert torch.equal(shared["out"], alone["out"]) and torch.equal(shared["dx"], alone["dx"])


@dtypes
@pytest.mark.parametrize("dout", [False, True])
def test_gradients_of_the_weights_alone_and_of_both(dout, dtype):
    for shape in ((4, 30), (4, 30, 8)):
        check(make(shape, dtype), dim=1, return_weights=True, dout=dout)


@ways
def test_far_from_zero_and_narrow(shape, dim):
    check(make(shape, offset=1e4), dim=dim)
    check(make(shape, gaussians=1, least=0.05), dim=dim)
    check(make(shape, gaussians=2, spread=1e-3), dim=dim)


@ways
def test_a_centre_outside_of_the_slice(shape, dim):
    tensors = make(shape, least=2.0)
    tensors["mean_offset"] += 8
    check(tensors, dim=dim)


@pytest.mark.parametrize("shape, dim", [((3, 5, 48), 1), ((3, 5, 48), 0), ((2, 3, 48), 2), ((70, 3), 0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_axis_and_any_strides(dtype, shape, dim):
    check(make(shape, dtype), dim=dim)
    tensors = make(shape, dtype)
    tensors["x"] = tensors["x"].transpose(0, 1).contiguous().transpose(0, 1)
    check(tensors, dim=dim)
    tensors["x"] = tensors["x"].repeat_interleave(3, dim=-1)[..., ::3]
    check(tensors, dim=dim)
    tensors["x"] = tensors["x"][:1].expand(shape)
    check(tensors, dim=dim)


def test_rows_that_are_not_aligned():
    tensors = make((6, 68))
    tensors["x"] = tensors["x"][:, 1:65]
    check(tensors)
    tensors["x"] = torch.cat([tensors["x"]] * 2, 1)[:, 4:68]
    check(tensors)


@ways
@pytest.mark.parametrize("normalization", ["stable", "clamped"])
def test_masked_entries_may_hold_anything_and_whole_slices_be_masked(normalization, shape, dim):
    tensors = make((4, *shape), heads=2, keep=0.5)
    tensors["mask"][0] = False
    one = tensors["mask"].movedim(dim + 1, 0)
    one[1:, 1], one[0, 1] = False, True
    options = {"dim": dim + 1, "num_heads": 2, "normalization": normalization, "return_weights": True}
    clean = check(tensors, **options)
    assert not clean["out"][0].any() and not clean["dx"][0].any()
    assert normalization == "clamped" or (clean["weights"].movedim(dim + 1, 0)[0, 1] == 1).all()
    tensors["x"] = tensors["x"].masked_fill(~tensors["mask"], float("nan"))
    for name, value in run_emulated(tensors, **options).items():
        assert torch.equal(value, clean[name]), name


def test_a_mask_that_is_given_once():
    tensors = make((4, 40))
    tensors["mask"] = torch.rand(1, 40, generator=torch.Generator().manual_seed(1)) < 0.5
    check(tensors)
    tensors["mask"] = tensors["mask"][0]
    check(tensors)


@ways
def test_a_constant_slice_has_uniform_weights(shape, dim):
    tensors = make(shape)
    tensors["x"][:] = 1234.5
    found = run_emulated(tensors, dim=dim, return_weights=True)
    torch.testing.assert_close(found["weights"], torch.full(shape, 1 / shape[dim]))
    assert all(value.isfinite().all() for value in found.values())


def test_nan_stays_in_its_slice():
    for shape in ((6, 96), (6, 40, 8)):
        tensors = make(shape, heads=2)
        clean = run_emulated(tensors, dim=1, num_heads=2)
        tensors["x"][(2, 3, *[0] * (len(shape) - 2))] = float("nan")
        dirty = run_emulated(tensors, dim=1, num_heads=2)
        for name in ("out", "dx"):
            bad = dirty[name].isnan()
            assert bad.sum() == shape[1] // 2, name
            assert torch.equal(dirty[name][~bad], clean[name][~bad]), name


def test_nothing():
    for shape, dim in (((0, 8), 1), ((3, 0), 1), ((3, 8, 0), 1)):
        found = run_emulated(make(shape), dim=dim)
        assert found["out"].shape == found["dx"].shape == shape
        assert not found["dmean_offset"].any() and not found["dwidth"].any()
