"""linear_scan's CUDA kernels, compiled by the host compiler and run on the CPU, against the float64 reference.

Every comparison runs in ascending and in descending thread order and wants the same bits; memory that nothing wrote
is NaN (see test_cuda_emulated.py)."""

import linear_scan_cases
import pytest
import torch
from emulated_cuda import PACKED, load
from linear_scan_cases import eager_errors, output_gradients, run
from tolerance import compare

from trifuse.ops.linear_scan import prepare

library = load()
packed = torch.tensor(PACKED)
pytestmark = pytest.mark.usefixtures("poisoned_memory")
KINDS = {
    "float32": (torch.float32, False), "float16": (torch.float16, False), "bfloat16": (torch.bfloat16, False),
    "complex64": (torch.complex64, False), "real a": (torch.complex64, True),
}  # fmt: skip
kinds = pytest.mark.parametrize("dtype, real_a", KINDS.values(), ids=KINDS)
layouts = pytest.mark.parametrize("layout", ["bdl", "bld"])  # a warp, and a thread, per channel
reverses = pytest.mark.parametrize("reverse", [False, True])


def make(**options):
    return linear_scan_cases.make(**{"dim": 6} | options)


def run_emulated(tensors, last_grad=True, **options):
    call = prepare(**tensors, return_last_state=True, **options)
    ops = torch.ops.trifuse_emulated
    h, last = ops.linear_scan_fwd(*call)
    public = (lambda x: x.transpose(1, 2)) if call.bld else (lambda x: x)
    dh, dlast = output_gradients((public(h), last))
    da, db, dinitial = ops.linear_scan_bwd(
        public(dh), dlast if last_grad else None, call.a, h, call.initial_state, *call[3:]
    )
    found = {"h": public(h), "last_state": last, "da": public(da), "db": public(db)}
    found["da"] = found["da"].sum_to_size(tensors["a"].shape)
    if call.initial_state is None:
        assert dinitial.shape == (0,)
        return found
    return found | {"dinitial_state": dinitial}


def check(tensors, **options):
    exact = run("reference", tensors, exact=True, **options)
    kernel = run_emulated(tensors, **options)
    compare(kernel, exact, eager_errors(tensors, **options))
    library.trifuse_emulator_set_descending(1)
    try:
        again = run_emulated(tensors, **options)
    finally:
        library.trifuse_emulator_set_descending(0)
    for name, value in kernel.items():
        assert torch.equal(value, again[name]), f"{name} depends on the order of threads"


@kinds
@layouts
@reverses
@pytest.mark.parametrize("cu_seqlens", [None, packed])
def test_all_options_at_once(cu_seqlens, reverse, layout, dtype, real_a):
    tensors = make(seqlen=100, layout=layout, dtype=dtype, real_a=real_a, cu_seqlens=cu_seqlens)
    check(tensors, cu_seqlens=cu_seqlens, reverse=reverse, layout=layout)


@layouts
@pytest.mark.parametrize("cu_seqlens", [None, packed])
def test_bare_call_needs_no_optional_argument(cu_seqlens, layout):
    tensors = make(seqlen=100, layout=layout, initial=False, cu_seqlens=cu_seqlens)
    check(tensors, cu_seqlens=cu_seqlens, layout=layout, last_grad=False)


@layouts
@reverses
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64])
@pytest.mark.parametrize("seqlen", [0, 1, 3, 4, 7, 8, 9, 63, 127, 128, 129, 260])
def test_lengths_around_a_tile(seqlen, dtype, reverse, layout):
    check(make(seqlen=seqlen, dim=3, layout=layout, dtype=dtype), layout=layout, reverse=reverse)


@layouts
@pytest.mark.parametrize("dim", [1, 3, 4, 5, 127, 128, 129])
def test_channels_around_a_block(dim, layout):
    check(make(dim=dim, seqlen=20, layout=layout), layout=layout)


@kinds
@layouts
@reverses
def test_time_is_cut_when_rows_are_few(layout, reverse, dtype, real_a):
    """2300 steps are 2 pieces for a warp and 17 for a thread, the last of them short."""
    tensors = make(batch=1, dim=2, seqlen=2300, layout=layout, dtype=dtype, real_a=real_a)
    check(tensors, layout=layout, reverse=reverse)


@layouts
@kinds
def test_strided_and_expanded_inputs(layout, dtype, real_a):
    tensors = make(seqlen=70, layout=layout, dtype=dtype, real_a=real_a)
    tensors["a"] = tensors["a"].transpose(1, 2).contiguous().transpose(1, 2)
    tensors["b"] = tensors["b"].repeat_interleave(3, dim=2)[:, :, ::3]
    check(tensors, layout=layout)
    tensors["a"] = tensors["a"][:1, :1, :1] / tensors["a"][:1, :1, :1].abs()
    tensors["b"] = tensors["b"][:, :1].expand(tensors["b"].shape)
    check(tensors, layout=layout)


@layouts
@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64])
def test_growing_states_stay_right(layout, dtype):
    check(make(seqlen=60, layout=layout, dtype=dtype, size=1.4), layout=layout)


@layouts
@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64])
def test_a_product_that_overflows_where_there_is_no_state(layout, dtype):
    a, b = torch.full((1, 1, 4096), 1e30, dtype=dtype), torch.zeros(1, 1, 4096, dtype=dtype)
    a[..., 2048:], b[..., 2048:] = 0.5, 1.0
    if layout == "bld":
        a, b = (x.transpose(1, 2).expand(1, 4096, 2) for x in (a, b))
    call = prepare(a, b, layout=layout)
    h = torch.ops.trifuse_emulated.linear_scan_fwd(*call)[0]
    assert not h[..., :2048].any()
    torch.testing.assert_close(h[..., 2100:], torch.full_like(h[..., 2100:], 2.0))


@layouts
@reverses
def test_nan_stays_in_its_packed_sequence(layout, reverse):
    cu_seqlens = torch.tensor([0, 7, 12, 20])
    tensors = make(seqlen=20, layout=layout, cu_seqlens=cu_seqlens)
    options = {"cu_seqlens": cu_seqlens, "layout": layout, "reverse": reverse}
    clean = run_emulated(tensors, **options)
    time = 2 if layout == "bdl" else 1
    tensors["b"].select(time, 9).fill_(float("nan"))
    dirty = run_emulated(tensors, **options)
    for name in ("h", "da", "db"):
        for begin, length in ((0, 7), (12, 8)):
            parts = (results[name].narrow(time, begin, length) for results in (dirty, clean))
            assert torch.equal(*parts), name
    for name in ("last_state", "dinitial_state"):
        assert torch.equal(dirty[name][::2], clean[name][::2]), name


def test_empty_batch():
    found = run_emulated(make(batch=0))
    assert found["h"].shape == (0, 6, 37) and found["last_state"].shape == (0, 6)
