"""gaussian_adaptive_attention on a GPU: every way to hold a slice, sizes that fill the device, offsets beyond 2^31."""

import functools

import gaussian_adaptive_attention_cases as cases
import pytest
import torch
from gaussian_adaptive_attention_cases import make

import trifuse

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poisoned_memory")]
BACKENDS = ["cuda", "triton"]
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
check = functools.partial(cases.check, device="cuda")
backends = pytest.mark.parametrize("backend", BACKENDS)
dtypes = pytest.mark.parametrize("dtype", DTYPES)
# Eight lanes, a warp and a block for a row, columns, and both cut in pieces.
SHAPES = [((300, 96), 1), ((300, 384), 1), ((70, 3000), 1), ((20, 40, 65), 1), ((2, 100001), 1), ((2, 9000, 33), 1)]
shapes = pytest.mark.parametrize("shape, dim", SHAPES)


@backends
@shapes
@dtypes
def test_slices_alone(dtype, shape, dim, backend):
    check(backend, make(shape, dtype), dim=dim)


@backends
@shapes
@dtypes
@pytest.mark.parametrize("normalization", ["stable", "clamped"])
def test_all_options_at_once(normalization, dtype, shape, dim, backend):
    tensors = make(shape, dtype, heads=3, keep=0.8)
    check(backend, tensors, dim=dim, num_heads=3, normalization=normalization, return_weights=True)


@backends
@shapes
@dtypes
def test_a_padding_value(dtype, shape, dim, backend):
    tensors = make(shape, dtype, heads=2, padding=-0.1)
    check(backend, tensors, dim=dim, num_heads=2, padding_value=-0.1, return_weights=True)


@backends
@shapes
def test_far_from_zero_narrow_and_off_centre(shape, dim, backend):
    check(backend, make(shape, offset=1e4), dim=dim)
    check(backend, make(shape, gaussians=1, least=0.05), dim=dim)
    tensors = make(shape, least=2.0)
    tensors["mean_offset"] += 8
    check(backend, tensors, dim=dim)


@backends
@pytest.mark.parametrize("length", [1, 2, 7, 63, 64, 65, 128, 129, 512, 513, 1000, 8192, 8193, 16384, 16385])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lengths(dtype, length, backend):
    check(backend, make((9, length), dtype))
    if length <= 1000:
        check(backend, make((2, length, 35), dtype), dim=1)


@backends
@pytest.mark.parametrize("dim, heads", [(2, 8), (1, 8), (0, 1)])
def test_gradients_repeat_bit_for_bit(dim, heads, backend):
    tensors = make((8, 512, 1024), heads=heads)
    first, second = (cases.run(backend, tensors, device="cuda", dim=dim, num_heads=heads) for _ in range(2))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


@backends
@pytest.mark.parametrize("shape, dim", [((2**22 + 3, 520), 1), ((4, 520, 2**20 + 3), 1), ((3, 2**30), 1)])
def test_more_than_two_to_the_31_elements(shape, dim, backend):
    if torch.cuda.get_device_properties(0).total_memory < 100 * 2**30:
        pytest.skip("needs a GPU with 100 GiB of memory")
    x = torch.zeros(shape, dtype=torch.bfloat16, device="cuda")
    assert x.numel() > 2**31
    last = x[-1:] if len(shape) == 2 else x[-1:, :, -2:]
    last.normal_()
    offset, width = torch.full((1, 2), 0.3, device="cuda"), torch.full((1, 2), 1.2, device="cuda")
    with trifuse.backend(backend):
        y = trifuse.gaussian_adaptive_attention(x, offset, width, dim=dim)
    found = y[-1:] if len(shape) == 2 else y[-1:, :, -2:]
    with trifuse.backend("reference"):
        expected = trifuse.gaussian_adaptive_attention(last, offset, width, dim=dim)
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=1e-20)
    assert found.any()


@backends
def test_explain_names_the_kernel(backend):
    tensors = {name: None if x is None else x.cuda() for name, x in make((4, 30)).items()}
    with trifuse.backend(backend):
        assert trifuse.explain("gaussian_adaptive_attention", **tensors).chosen == backend
