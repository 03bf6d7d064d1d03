"""linear_scan's Triton kernels in Triton's interpreter, see test_triton_interpreter.py. The process must be its own:
``TRITON_INTERPRET=1 pytest tests/test_triton_interpreter_linear_scan.py``."""

import os

import linear_scan_cases
import pytest
import torch
from linear_scan_cases import run

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("runs only with TRITON_INTERPRET=1 in the environment of its own process", allow_module_level=True)
pytest.importorskip("triton", reason="the package triton is not installed")

from trifuse.triton_kernels import linear_scan as kernels

pytestmark = pytest.mark.usefixtures("poisoned_memory")
PACKED = torch.tensor([0, 5, 5, 18, 40])
KINDS = {"float32": (torch.float32, False), "complex64": (torch.complex64, False), "real a": (torch.complex64, True)}
kinds = pytest.mark.parametrize("dtype, real_a", KINDS.values(), ids=KINDS)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    monkeypatch.setattr(kernels, "TILE", 64)


@pytest.fixture
def no_pieces(monkeypatch):
    monkeypatch.setattr(kernels, "PROGRAMS", 1)


def make(**options):
    return linear_scan_cases.make(**{"batch": 2, "dim": 3, "seqlen": 40} | options)


def check(tensors, **options):
    linear_scan_cases.check("triton", tensors, **options)


@kinds
@pytest.mark.parametrize("layout", ["bdl", "bld"])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("reverse", [False, True])
def test_all_options_at_once(no_pieces, dtype, real_a, reverse, packed, layout):
    cu_seqlens = PACKED if packed else None
    tensors = make(layout=layout, cu_seqlens=cu_seqlens, dtype=dtype, real_a=real_a)
    check(tensors, cu_seqlens=cu_seqlens, reverse=reverse, layout=layout)


@kinds
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("seqlen", [256, 270])
def test_time_is_cut_when_rows_are_few(monkeypatch, dtype, real_a, reverse, seqlen):
    launches, real = [], kernels.common.launch

    def launch(kernel, grid, *args, **meta):
        launches.append(grid)
        real(kernel, grid, *args, **meta)

    monkeypatch.setattr(kernels.common, "launch", launch)
    monkeypatch.setattr(kernels, "LEAST_TILES", 2)
    check(make(batch=1, dim=2, seqlen=seqlen, dtype=dtype, real_a=real_a), reverse=reverse)
    assert len(launches) == 4 and all(grid[1] > 2 for grid in launches)


@pytest.mark.parametrize("seqlen", [0, 1, 15, 16, 17, 65])
def test_lengths_around_a_tile(seqlen):
    check(make(seqlen=seqlen, dim=5))


def test_length_1000():
    check(make(seqlen=1000, dim=1, batch=1))


@pytest.mark.parametrize("reverse", [False, True])
def test_real_tiles(monkeypatch, reverse):
    monkeypatch.undo()
    assert kernels.TILE == 1024
    check(make(batch=1, seqlen=260, dim=5, layout="bld"), layout="bld", reverse=reverse)


@pytest.mark.parametrize("reverse", [False, True])
def test_bare_call_needs_no_optional_argument(reverse):
    check(make(initial=False), reverse=reverse, last_grad=False)


def test_float16():
    check(make(dtype=torch.float16))


@kinds
def test_a_given_once_and_strided_inputs(dtype, real_a):
    tensors = make(dtype=dtype, real_a=real_a)
    tensors["a"] = tensors["a"][:1, :, :1] * 0.95
    tensors["b"] = tensors["b"].transpose(1, 2).contiguous().transpose(1, 2)
    check(tensors)


@pytest.mark.parametrize("programs", [1, 512])
def test_a_product_that_overflows_where_there_is_no_state(monkeypatch, programs):
    monkeypatch.setattr(kernels, "PROGRAMS", programs)
    for dtype in (torch.float32, torch.complex64):
        a, b = torch.full((1, 1, 600), 1e30, dtype=dtype), torch.zeros(1, 1, 600, dtype=dtype)
        a[..., 300:], b[..., 300:] = 0.5, 1.0
        found = run("triton", {"a": a, "b": b}, grads=False)["h"]
        assert not found[..., :300].any()
        torch.testing.assert_close(found[..., 400:], torch.full_like(found[..., 400:], 2.0))


@pytest.mark.parametrize("reverse", [False, True])
def test_nan_stays_in_its_packed_sequence(reverse):
    cu_seqlens = torch.tensor([0, 7, 12, 20])
    tensors = make(dim=2, seqlen=20, cu_seqlens=cu_seqlens)
    options = {"cu_seqlens": cu_seqlens, "reverse": reverse}
    clean = run("triton", tensors, **options)
    tensors["b"][..., 9] = float("nan")
    dirty = run("triton", tensors, **options)
    for name in ("h", "da", "db"):
        for part in (slice(0, 7), slice(12, 20)):
            assert torch.equal(dirty[name][..., part], clean[name][..., part]), name
    for name in ("last_state", "dinitial_state"):
        assert torch.equal(dirty[name][::2], clean[name][::2]), name
