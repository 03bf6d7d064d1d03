"""gaussian_adaptive_attention's Triton kernels in Triton's interpreter, see test_triton_interpreter.py. The process
must be its own: ``TRITON_INTERPRET=1 pytest tests/test_triton_interpreter_gaussian_adaptive_attention.py``."""

import os

import gaussian_adaptive_attention_cases as cases
import pytest
import torch
from gaussian_adaptive_attention_cases import make

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("runs only with TRITON_INTERPRET=1 in the environment of its own process", allow_module_level=True)
pytest.importorskip("triton", reason="the package triton is not installed")

from trifuse.triton_kernels import gaussian_adaptive_attention as kernels
from trifuse.triton_kernels import gaussian_adaptive_attention_pieces as pieces

pytestmark = pytest.mark.usefixtures("poisoned_memory")
DTYPES = [torch.float32, torch.float16, torch.float64]


@pytest.fixture(params=["held", "pieces"], autouse=True)
def way(request, monkeypatch):
    """Slices held by one program, and slices cut in pieces; small tiles, so that there is more than one."""
    monkeypatch.setattr(kernels, "TILE", 256)
    if request.param == "pieces":
        monkeypatch.setattr(kernels, "LONGEST", {"forward": 0, "backward": 0})
        monkeypatch.setattr(pieces, "CHUNK", 64)
        monkeypatch.setattr(pieces, "LEAST_CHUNKS", 1)
        monkeypatch.setattr(pieces, "PROGRAMS", 12)


def check(tensors, **options):
    return cases.check("triton", tensors, **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("normalization", ["stable", "clamped"])
@pytest.mark.parametrize("shape, dim", [((3, 37), 1), ((2, 33, 10), 1)])
def test_all_options_at_once(shape, dim, normalization, dtype):
    tensors = make(shape, dtype, heads=3, keep=0.8)
    check(tensors, dim=dim, num_heads=3, normalization=normalization, return_weights=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("normalization", ["stable", "clamped"])
@pytest.mark.parametrize("shape, dim", [((3, 37), 1), ((2, 33, 10), 1)])
def test_a_padding_value(shape, dim, normalization, dtype):
    tensors = make(shape, dtype, heads=2, padding=-0.1)
    options = {"dim": dim, "num_heads": 2, "normalization": normalization, "padding_value": -0.1}
    check(tensors, **options, return_weights=True)


@pytest.mark.parametrize("gaussians", [1, 16])
def test_where_the_clamp_acts(gaussians):
    """Sixteen wide Gaussians multiply to less than eps, one does not."""
    tensors = make((4, 40), gaussians=gaussians, least=2.0)
    found = check(tensors, normalization="clamped", return_weights=True)
    assert (found["weights"].sum(1) < 0.5).all() == (gaussians == 16)


@pytest.mark.parametrize("length", [1, 2, 63, 64, 65])
def test_lengths(length):
    check(make((3, length)))
    check(make((1, length, 9)), dim=1)


def test_length_1000():
    check(make((1, 1000)))


@pytest.mark.parametrize("dout", [False, True])
def test_gradients_of_the_weights_alone_and_of_both(dout):
    check(make((4, 30)), return_weights=True, dout=dout)


def test_far_from_zero_and_narrow():
    check(make((2, 90), offset=1e4))
    check(make((2, 90), gaussians=1, least=0.05))
    check(make((2, 90), gaussians=2, spread=1e-3))


def test_a_centre_outside_of_the_slice():
    tensors = make((2, 90), least=2.0)
    tensors["mean_offset"] += 8
    check(tensors)


@pytest.mark.parametrize("shape, dim", [((2, 4, 9), 1), ((3, 2, 4), 0), ((2, 2, 20), 2), ((9, 3), 0)])
def test_any_axis_and_any_strides(shape, dim):
    check(make(shape), dim=dim)
    tensors = make(shape)
    tensors["x"] = tensors["x"].transpose(0, 1).contiguous().transpose(0, 1)
    check(tensors, dim=dim)
    tensors["x"] = tensors["x"].repeat_interleave(3, dim=-1)[..., ::3]
    check(tensors, dim=dim)
    tensors["x"] = tensors["x"][:1].expand(shape)
    check(tensors, dim=dim)


@pytest.mark.parametrize("normalization", ["stable", "clamped"])
def test_masked_entries_may_hold_anything_and_whole_slices_be_masked(normalization):
    tensors = make((4, 40), heads=2, keep=0.5)
    tensors["mask"][0] = False
    tensors["mask"][1, 1:20] = False
    tensors["mask"][1, 0] = True
    options = {"num_heads": 2, "normalization": normalization, "return_weights": True}
    clean = check(tensors, **options)
    assert not clean["out"][0].any() and not clean["dx"][0].any()
    assert normalization == "clamped" or clean["weights"][1, 0] == 1
    tensors["x"] = tensors["x"].masked_fill(~tensors["mask"], float("nan"))
    for name, value in cases.run("triton", tensors, **options).items():
        assert torch.equal(value, clean[name]), name


def test_a_mask_that_is_given_once():
    tensors = make((4, 40))
    tensors["mask"] = torch.rand(1, 40, generator=torch.Generator().manual_seed(1)) < 0.5
    check(tensors)
    tensors["mask"] = tensors["mask"][0]
    check(tensors)


def test_a_constant_slice_has_uniform_weights():
    tensors = make((2, 40))
    tensors["x"][:] = 1234.5
    found = cases.run("triton", tensors, return_weights=True)
    torch.testing.assert_close(found["weights"], torch.full((2, 40), 1 / 40))
    assert all(value.isfinite().all() for value in found.values())


def test_nan_stays_in_its_slice():
    tensors = make((6, 40), heads=2)
    clean = cases.run("triton", tensors, num_heads=2)
    tensors["x"][2, 3] = float("nan")
    dirty = cases.run("triton", tensors, num_heads=2)
    for name in ("out", "dx"):
        assert dirty[name][2, :20].isnan().all(), name
        clean[name][2, :20], dirty[name][2, :20] = 0, 0
        assert torch.equal(dirty[name], clean[name]), name


def test_nothing():
    for shape, dim in (((0, 8), 1), ((3, 0), 1), ((3, 8, 0), 1)):
        found = cases.run("triton", make(shape), dim=dim)
        assert found["out"].shape == found["dx"].shape == shape
        assert not found["dmean_offset"].any() and not found["dwidth"].any()
