"""lora_linear_multi's Triton kernels in Triton's interpreter, see test_triton_interpreter.py. The process must be its
own: ``TRITON_INTERPRET=1 pytest tests/test_triton_interpreter_lora_linear_multi.py``."""

import os

import lora_linear_multi_cases as cases
import pytest
import torch
from lora_linear_multi_cases import make, run

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("runs only with TRITON_INTERPRET=1 in the environment of its own process", allow_module_level=True)
pytest.importorskip("triton", reason="the package triton is not installed")

from trifuse.triton_kernels import lora_linear_multi as kernels
from trifuse.triton_kernels import lora_linear_passes as passes

pytestmark = pytest.mark.usefixtures("poisoned_memory")
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float16])


@pytest.fixture(params=["few rows", "sorted"])
def form(request, monkeypatch):
    """Rows one by one, and rows sorted by adapter."""
    if request.param == "sorted":
        monkeypatch.setattr(
            kernels._Adapters, "rows", lambda self, direct, rows=kernels._Adapters.rows: rows(self, False)
        )


def check(tensors, **options):
    cases.check("triton", tensors, **options)


@dtypes
@pytest.mark.parametrize("adapter", ["float32", "of x"])
def test_dtypes(form, dtype, adapter):
    check(make(dtype=dtype, adapter_dtype=torch.float32 if adapter == "float32" else dtype))


@pytest.mark.parametrize("rows", [0, 1, 16, 65])
def test_any_number_of_rows(form, rows):
    check(make(rows=rows))


@pytest.mark.parametrize("columns, out", [(1, 1), (3, 130), (130, 3)])
def test_any_width(form, columns, out):
    check(make(columns=columns, out=out))


@pytest.mark.parametrize("ranks", [(1,), (4, 4, 4), (70, 2), (16, 17, 1, 33), (1,) * 20])
def test_mixed_ranks(form, ranks):
    check(make(ranks=ranks))


@pytest.mark.parametrize("whose", ["one has all", "none has one", "the last", "adapters take turns"])
def test_any_distribution_of_rows(form, whose):
    tensors = make(rows=40, bias=whose != "the last")
    place = torch.arange(40)
    tensors["index"] = {
        "one has all": torch.full((40,), 1), "none has one": torch.full((40,), -5),
        "the last": torch.where(place < 39, 0, 2), "adapters take turns": place % 3,
    }[whose]  # fmt: skip
    check(tensors)


def test_chunks_of_several_tiles(monkeypatch):
    monkeypatch.setattr(passes, "PROGRAMS", 1)
    tensors = make(rows=150, ranks=(3, 5))
    tensors["index"][:110] = 1
    check(tensors)


def test_leading_axes_and_strides(form):
    tensors = make(lead=(2, 3), rows=5)
    tensors["index"] = tensors["index"].to(torch.int32)
    check(tensors)
    tensors = make(columns=80)
    for name in ("x", "weight", "A0", "A1", "A2"):
        tensors[name] = tensors[name][:, ::2]
    tensors["B1"] = tensors["B2"][:, 4:5]
    check(tensors)


def test_factors_that_lie_in_one_tensor_are_not_copied(monkeypatch):
    """Views of one tensor, one after the other."""
    tensors = make(ranks=(3, 1, 17, 5))
    packed = torch.cat([tensors[f"A{i}"] for i in range(4)])
    views = packed.split((3, 1, 17, 5))
    assert kernels._packed(views).data_ptr() == packed.data_ptr()
    assert torch.equal(kernels._packed(views), packed.view(-1))
    for one, apart in ((views[0], views[2]), (views[0], views[1].clone()), (packed[:3, ::2], packed[3:, ::2])):
        assert torch.equal(kernels._packed((one, apart)), torch.cat((one.reshape(-1), apart.reshape(-1))))


@pytest.mark.parametrize("name", cases.FLOATS)
def test_each_gradient_alone(name):
    tensors = make()
    alone, together = run("triton", tensors, needs=(name,)), run("triton", tensors)
    assert all(key == "y" or key.startswith(f"d{name}") for key in alone)
    for key, value in alone.items():
        torch.testing.assert_close(value, together[key], rtol=1e-6, atol=1e-6)


def test_an_adapter_reaches_its_own_rows_alone(form):
    tensors = make()
    clean = run("triton", tensors, needs=("x",))
    tensors["A1"][:], tensors["B1"][:], tensors["scales"][1] = (float("nan"),) * 3
    tensors["scales"][0, 3:] = float("nan")  # beyond its rank
    found = run("triton", tensors, needs=("x",))
    others = tensors["index"] != 1
    assert others.any() and not others.all()
    for name, value in found.items():
        assert torch.equal(value[others], clean[name][others]), name
        assert value[~others].isnan().all(), name


def test_an_adapter_without_rows_gets_a_gradient_of_zeros():
    tensors = make()
    tensors["index"][tensors["index"] == 2] = 0
    found = run("triton", tensors)
    for name in ("dA2", "dB2"):
        assert not found[name].any(), name
    assert not found["dscales"][2].any() and not found["dscales"][1, 1:].any()


def test_gradients_repeat_bit_for_bit():
    tensors = make(rows=70, columns=130)
    first, second = (run("triton", tensors) for _ in range(2))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
