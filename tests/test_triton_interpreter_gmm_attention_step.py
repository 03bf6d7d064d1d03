"""gmm_attention_step's Triton kernels in Triton's interpreter, see test_triton_interpreter.py. The process must be its
own: ``TRITON_INTERPRET=1 pytest tests/test_triton_interpreter_gmm_attention_step.py``."""

import os

import gmm_cases
import pytest
import torch
from gmm_cases import run

import trifuse

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("runs only with TRITON_INTERPRET=1 in the environment of its own process", allow_module_level=True)
pytest.importorskip("triton", reason="the package triton is not installed")

from trifuse.triton_kernels import gmm_attention_step as kernels

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def make(**options):
    return gmm_cases.make(**{"length": 40, "width": 20} | options)


def check(tensors, **options):
    gmm_cases.check("triton", tensors, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("mixture", [None, torch.float16])
def test_dtypes_with_and_without_padding(dtype, masked, mixture):
    if dtype == torch.float32 and mixture:
        mixture = torch.float32
    check(make(dtype=dtype, masked=masked, mixture_dtype=mixture))


@pytest.mark.parametrize("length", [0, 1, 15, 16, 17, 65])
def test_any_length(length):
    check(make(length=length))


@pytest.mark.parametrize("width", [0, 1, 16, 17, 130])
def test_any_width(width):
    check(make(width=width))


@pytest.mark.parametrize("components", [0, 1, 2, 16, 17])
def test_any_number_of_components(components):
    check(make(components=components))


@pytest.mark.parametrize("shape", [(0, 37, 20), (2, 0, 20), (2, 37, 0), (2, 0, 0)])
def test_empty_inputs(shape):
    results = run("triton", make(batch=shape[0], length=shape[1], width=shape[2]))
    assert results["dvalues"].shape == shape and not results["context"].any()


@pytest.mark.parametrize("length", [256, 270])
def test_sequences_are_cut_when_they_are_few(monkeypatch, length):
    launches, real = [], kernels.common.launch

    def launch(kernel, grid, *args, **meta):
        launches.append(grid)
        real(kernel, grid, *args, **meta)

    monkeypatch.setattr(kernels.common, "launch", launch)
    monkeypatch.setattr(kernels, "TILE", 512)
    check(make(batch=1, length=length, spread=40.0))
    assert len(launches) == 4 and launches[0][0] > 4


def test_length_1000():
    check(make(batch=1, length=1000, spread=200.0))


@pytest.mark.parametrize("grads", [("context",), ("mean_new",), ("alignment",)])
def test_gradients_of_any_outputs(grads):
    check(make(masked=True), grads=grads)


def test_values_that_need_no_gradient_get_none():
    tensors = make()
    wanted = [tensors[name].requires_grad_() for name in ("weight", "delta", "sigma", "mean")]
    with trifuse.backend("triton"):
        found = torch.autograd.grad(trifuse.gmm_attention_step(**tensors)[0].square().sum(), wanted)
        tensors["values"].requires_grad_()
        expected = torch.autograd.grad(trifuse.gmm_attention_step(**tensors)[0].square().sum(), wanted)
    for got, needed in zip(found, expected, strict=True):
        assert torch.equal(got, needed)


def test_strided_inputs():
    tensors = make(masked=True)
    tensors["values"] = tensors["values"].transpose(1, 2).contiguous().transpose(1, 2)
    tensors["weight"] = tensors["weight"].t().contiguous().t()
    tensors["key_padding_mask"] = tensors["key_padding_mask"][:1].expand(2, -1)
    check(tensors)


@pytest.mark.parametrize("away", [2.0, 11.0, 13.3, 14.2, 15.0])
def test_means_far_from_every_position(away):
    tensors = make(components=1, spread=5.0)
    tensors["mean"] = 39 + away * tensors["sigma"]
    tensors["delta"] = torch.full_like(tensors["delta"], -20.0)
    check(tensors, moved=("values", "weight"))


@pytest.mark.parametrize("sigma", [1e-12, 1e-3, 1e12])
def test_widths_of_any_size(sigma):
    tensors = make()
    tensors["mean"] = tensors["mean"].round()
    tensors["delta"] = torch.full_like(tensors["delta"], -200.0)
    tensors["sigma"] = torch.full_like(tensors["sigma"], sigma)
    check(tensors)


def test_positions_that_take_no_part_are_not_read():
    tensors = make(length=90, spread=2.0, reach=0.2, masked=True)
    clean = run("triton", tensors)
    spoiled = dict(tensors, values=tensors["values"].clone())
    spoiled["values"][tensors["key_padding_mask"]] = float("nan")
    spoiled["values"][:, 70:] = float("inf")
    found = run("triton", spoiled)
    for name, value in found.items():
        assert torch.equal(value, clean[name]), name
    assert not found["alignment"][:, 70:].any() and not found["alignment"][tensors["key_padding_mask"]].any()


@pytest.mark.parametrize("name", ["values", "weight", "sigma", "mean"])
def test_nan_stays_in_its_batch_item(name):
    tensors = make(spread=30.0)
    clean = run("triton", tensors)
    tensors[name][1, 0] = float("nan")
    found = run("triton", tensors)
    for key, value in found.items():
        assert torch.equal(value[0], clean[key][0]), key
    assert not found["context"][1].isfinite().all()
