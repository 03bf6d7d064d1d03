"""gaussian_gate's CUDA kernels, compiled by the host compiler and run on the CPU, against the float64 reference.

Every comparison runs in ascending and in descending thread order and wants the same bits; memory that nothing wrote
is NaN (see test_cuda_emulated.py)."""

import pytest
import torch
from emulated_cuda import load
from gate_cases import KINDS, eager_errors, make, run
from tolerance import compare

from trifuse.ops._slices import slices_along
from trifuse.ops.gaussian_gate import kernel_arguments, prepare

library = load()
pytestmark = pytest.mark.usefixtures("poisoned_memory")
kinds = pytest.mark.parametrize("kind", KINDS)
dims = pytest.mark.parametrize("dim", [0, 1])  # columns and rows


class Emulated(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *args):
        out, stats = torch.ops.trifuse_emulated.gaussian_gate_fwd(*args)
        ctx.save_for_backward(*args[:5], stats)
        ctx.flags = args[5:]
        return out

    @staticmethod
    def backward(ctx, dout):
        *tensors, stats = ctx.saved_tensors
        grads = torch.ops.trifuse_emulated.gaussian_gate_bwd(dout, *tensors, stats, *ctx.flags)
        dx, doffset, dwidth, dalpha = grads
        assert tensors[3] is not None or dalpha.shape == (0,)
        return dx, doffset, dwidth, None if tensors[3] is None else dalpha, *(None,) * 7


def emulated(**call):
    call = prepare(**call)
    slices = slices_along(call.x, call.dim)
    return slices.put_back(Emulated.apply(*kernel_arguments(call, slices)))


def check(call):
    kernel = run("reference", call, function=emulated)
    compare(kernel, run("reference", call, exact=True), eager_errors(call))
    library.trifuse_emulator_set_descending(1)
    try:
        again = run("reference", call, function=emulated)
    finally:
        library.trifuse_emulator_set_descending(0)
    for name, value in kernel.items():
        assert torch.equal(value, again[name]), f"{name} depends on the order of threads"


@kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dim", [0, 1, 2])
@pytest.mark.parametrize("mask", [None, 0.6])
def test_all_options_at_once(kind, dtype, dim, mask):
    heads = 2 if kind == "density" else 1
    call = make(kind, (3, 20, 9), dim, (dim + 1) % 3, heads, dtype=dtype, mask=mask, multiply=mask is None)
    check(call)


@kinds
@pytest.mark.parametrize("length", [1, 2, 31, 32, 33, 255, 256, 257, 512, 513, 2048, 2049, 4096, 4097])
def test_row_lengths_around_what_threads_hold(kind, length):
    """A warp holds 512 entries of a row, 256 going backward, a block 4096 and 2048; longer rows are read again."""
    check(make(kind, (2, length), 1, 0))


@kinds
@pytest.mark.parametrize("length", [1, 2, 31, 32, 33, 255, 256, 257, 512, 513])
def test_column_lengths_around_what_threads_hold(kind, length):
    """32 threads hold 512 entries of a column, 256 going backward; longer columns are read again."""
    check(make(kind, (length, 9), 0, 1))


@kinds
@pytest.mark.parametrize("inner", [1, 7, 8, 31, 32, 33, 65])
def test_columns_around_a_block(kind, inner):
    check(make(kind, (2, 19, inner), 1, 2))


@pytest.mark.parametrize("feature_dim", [0, 1, 3])
@pytest.mark.parametrize("shape", [(3, 4, 6, 5), (40, 2, 6, 2), (2, 3, 5, 40)])
def test_features_lie_on_any_axis(feature_dim, shape):
    check(make("feature", shape, 2, feature_dim))


@pytest.mark.parametrize("heads, gaussians", [(3, 1), (7, 5), (20, 2)])
@pytest.mark.parametrize("dim", [1, 2])
def test_heads_that_do_not_divide(heads, gaussians, dim):
    check(make("density", (2, 20, 23), dim, heads=heads, gaussians=gaussians))


@kinds
@pytest.mark.parametrize("shape, dim", [((9000, 5), 1), ((3, 9000), 0)])
def test_many_slices_are_added_in_chunks(kind, shape, dim):
    check(make(kind, shape, dim, 1 - dim))


@kinds
@pytest.mark.parametrize("mask", [None, 0.7])
def test_strided_and_permuted_inputs(kind, mask):
    call = make(kind, (4, 20, 9), 1, 2, mask=mask)
    whole = call["x"]
    for x in (whole.repeat_interleave(3, dim=2)[:, :, ::3], whole.permute(2, 0, 1).contiguous().permute(1, 2, 0)):
        check(call | {"x": x})


@kinds
@dims
def test_entries_far_from_zero_keep_their_precision(kind, dim):
    check(make(kind, (40, 41), dim, 1 - dim, away=1e4))


@kinds
@dims
@pytest.mark.parametrize("kept", [0, 1])
def test_slices_with_one_entry_or_none(kind, dim, kept):
    call = make(kind, (20, 20), dim, 1 - dim)
    here = torch.arange(20) < kept
    call["mask"] = here if dim else here[:, None]
    call["x"][~call["mask"].expand(20, 20)] = float("nan")
    found = run("reference", call, function=emulated)
    assert all(value.isfinite().all() for value in found.values())
    assert kept or not any(value.any() for value in found.values())
    call["x"] = call["x"].nan_to_num()
    check(call)


@kinds
@dims
def test_constant_slices_have_one_gate(kind, dim):
    call = make(kind, (20, 33), dim, 1 - dim, multiply=False)
    call["x"] = torch.full_like(call["x"], 3.0)
    found = run("reference", call, function=emulated)
    assert torch.equal(found["out"], found["out"].select(dim, 0).unsqueeze(dim).expand(20, 33))
    check(call)


@kinds
@pytest.mark.parametrize("shape, dim", [((0, 5), 1), ((5, 0), 1), ((0, 5), 0), ((3, 0, 4), 0)])
def test_empty_inputs(kind, shape, dim):
    results = run("reference", make(kind, shape, dim, 1 - dim), function=emulated)
    assert results["out"].shape == shape and results["dx"].shape == shape
    assert not any(value.any() for value in results.values())
