"""gaussian_gate's Triton kernels in Triton's interpreter, see test_triton_interpreter.py. The process must be its own:
``TRITON_INTERPRET=1 pytest tests/test_triton_interpreter_gaussian_gate.py``."""

import os

import pytest
import torch
from gate_cases import KINDS, check, make, run

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("runs only with TRITON_INTERPRET=1 in the environment of its own process", allow_module_level=True)
pytest.importorskip("triton", reason="the package triton is not installed")

from trifuse.triton_kernels import gaussian_gate as kernels

pytestmark = pytest.mark.usefixtures("poisoned_memory")
kinds = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture
def short_tiles(monkeypatch):
    """Everything of some length is walked tile after tile."""
    monkeypatch.setattr(kernels, "TILE", 256)
    monkeypatch.setattr(kernels, "LONGEST", 64)


@kinds
@pytest.mark.parametrize("dim", [0, 1, 2])
@pytest.mark.parametrize("mask", [None, 0.6])
def test_slices_that_a_tile_holds(kind, dim, mask):
    heads = 2 if kind == "density" else 1
    check("triton", make(kind, (3, 20, 9), dim, (dim + 1) % 3, heads, mask=mask, multiply=mask is None))


@kinds
@pytest.mark.parametrize("shape, dim", [((3, 1000), 1), ((130, 9), 0)])
@pytest.mark.parametrize("mask", [None, 0.6])
def test_slices_longer_than_a_tile(short_tiles, kind, shape, dim, mask):
    heads = 2 if kind == "density" else 1
    check("triton", make(kind, shape, dim, 1 - dim, heads, mask=mask, multiply=mask is None))


@kinds
@pytest.mark.parametrize("length", [1, 15, 16, 17, 65])
def test_lengths_around_a_tile(kind, length):
    check("triton", make(kind, (2, length, 3), 1, 2))


@kinds
def test_float16(kind):
    check("triton", make(kind, (3, 30, 9), 1, 2, dtype=torch.float16))


@kinds
def test_strided_and_permuted_inputs(kind):
    call = make(kind, (4, 20, 9), 1, 2, mask=0.7)
    whole = call["x"]
    for x in (whole.repeat_interleave(3, dim=2)[:, :, ::3], whole.permute(2, 0, 1).contiguous().permute(1, 2, 0)):
        check("triton", call | {"x": x, "mask": call["mask"][:, :, :1]})


@pytest.mark.parametrize("heads, gaussians", [(3, 1), (7, 5)])
@pytest.mark.parametrize("dim", [1, 2])
def test_heads_that_do_not_divide(heads, gaussians, dim):
    check("triton", make("density", (2, 20, 23), dim, heads=heads, gaussians=gaussians))


@kinds
@pytest.mark.parametrize("dim", [0, 1])
def test_entries_far_from_zero_keep_their_precision(short_tiles, kind, dim):
    check("triton", make(kind, (40, 41), dim, 1 - dim, away=1e4))


@kinds
@pytest.mark.parametrize("kept", [0, 1])
def test_slices_with_one_entry_or_none(kind, kept):
    call = make(kind, (10, 20), 1, 0) | {"mask": torch.arange(20) < kept}
    call["x"][:, 5:] = float("nan")
    found = run("triton", call)
    assert all(value.isfinite().all() for value in found.values())
    assert kept or not any(value.any() for value in found.values())
    call["x"][:, 5:] = 0
    check("triton", call)


@kinds
def test_constant_slices_have_one_gate(kind):
    call = make(kind, (10, 33), 1, 0, multiply=False)
    call["x"] = torch.full_like(call["x"], 3.0)
    found = run("triton", call)
    assert torch.equal(found["out"], found["out"][:, :1].expand(10, 33))
    check("triton", call)


@kinds
@pytest.mark.parametrize("shape, dim", [((0, 5), 1), ((5, 0), 1), ((0, 5), 0)])
def test_empty_inputs(kind, shape, dim):
    results = run("triton", make(kind, shape, dim, 1 - dim))
    assert results["out"].shape == shape and results["dx"].shape == shape
    assert not any(value.any() for value in results.values())
