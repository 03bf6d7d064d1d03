"""lora_linear's Triton kernels in Triton's interpreter, see test_triton_interpreter.py. The
process must be its own: ``TRITON_INTERPRET=1 pytest tests/test_triton_interpreter_lora_linear.py``."""

import os

import lora_linear_cases as cases
import pytest
import torch
from lora_linear_cases import make, run

import trifuse
from trifuse import reference

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("runs only with TRITON_INTERPRET=1 in the environment of its own process", allow_module_level=True)
pytest.importorskip("triton", reason="the package triton is not installed")

from trifuse.triton_kernels import lora_linear_passes as passes

pytestmark = pytest.mark.usefixtures("poisoned_memory")
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
EVERYTHING = {"dropout": 0.3, "seed": 2**40 + 17, "active_rank": 3}


def check(tensors, **options):
    cases.check("triton", tensors, **options)


def launches_of(monkeypatch):
    """The name and grid of every launch from here on."""
    launches, real = [], passes.common.launch

    def launch(kernel, grid, *args, **meta):
        launches.append((kernel.fn.__name__, grid))
        real(kernel, grid, *args, **meta)

    monkeypatch.setattr(passes.common, "launch", launch)
    return launches


@dtypes
@pytest.mark.parametrize("adapter", ["float32", "of x"])
@pytest.mark.parametrize("vector", [False, True])
def test_dtypes_and_scales(dtype, adapter, vector):
    adapter = torch.float32 if adapter == "float32" else dtype
    check(make(dtype=dtype, adapter_dtype=adapter, vector=vector))


@dtypes
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_all_options_at_once(dtype, frozen, bias):
    check(make(dtype=dtype, vector=not frozen, bias=bias), frozen=frozen, **EVERYTHING)


@pytest.mark.parametrize("rows", [0, 1, 15, 16, 17, 65])
def test_any_number_of_rows(rows):
    check(make(rows=rows, vector=True), **EVERYTHING)


@pytest.mark.parametrize("columns, out", [(0, 3), (3, 0), (1, 1), (3, 130), (130, 3), (16, 64), (63, 65)])
def test_any_width(columns, out):
    check(make(columns=columns, out=out), **EVERYTHING)


@pytest.mark.parametrize("rank, active", [(1, 1), (2, 1), (16, 16), (17, 17), (33, 32), (64, 64), (65, 65), (140, 130)])
def test_any_rank(rank, active):
    check(make(rows=20, rank=rank, vector=True), active_rank=active)
    check(make(rows=20, rank=rank), active_rank=active, frozen=True, dropout=0.5, seed=3)


def test_leading_axes_and_strides():
    check(make(lead=(2, 3), rows=5), **EVERYTHING)
    tensors = make(rows=20, columns=80)
    tensors["x"], tensors["weight"], tensors["lora_A"] = (
        tensors["x"][::2, 1::2], tensors["weight"][:, ::2], tensors["lora_A"][:, ::2],
    )  # fmt: skip
    tensors["lora_B"] = tensors["lora_B"].t().contiguous().t()
    check(tensors, **EVERYTHING)
    tensors["x"] = tensors["x"][:1].expand(10, -1)
    check(tensors, **EVERYTHING)


@pytest.mark.parametrize("name", cases.FLOATS)
def test_each_gradient_alone(name):
    tensors = make(vector=True)
    alone = run("triton", tensors, needs=(name,), **EVERYTHING)
    together = run("triton", tensors, **EVERYTHING)
    assert alone.keys() == {"y", f"d{name}"}
    torch.testing.assert_close(alone[f"d{name}"], together[f"d{name}"], rtol=1e-6, atol=1e-6)


def test_rows_and_columns_are_cut_into_pieces_for_small_shapes(monkeypatch):
    launches = launches_of(monkeypatch)
    check(make(rows=100, columns=270, out=260), **EVERYTHING)
    grids = dict(launches)
    assert grids["down_kernel"][1] > 1, "pieces of columns"
    assert grids["out_kernel"][0] > 1 and grids["up_kernel"][0] > 1, "chunks of rows"


def test_chunks_of_several_tiles(monkeypatch):
    monkeypatch.setattr(passes, "PROGRAMS", 1)
    launches = launches_of(monkeypatch)
    check(make(rows=100, vector=True), **EVERYTHING)
    assert dict(launches)["out_kernel"][0] == 1


@pytest.mark.parametrize("rank", [4, 70])
def test_factors_in_parts_of_half_precision(monkeypatch, rank):
    """As bfloat16 takes them, which the interpreter cannot; of these numbers float16 holds the range too."""
    monkeypatch.setattr(passes, "PART_DTYPES", (torch.float16,))
    check(make(rank=rank, dtype=torch.float16, vector=True), **EVERYTHING | {"active_rank": rank})


def test_parts_lose_nothing_of_float32(monkeypatch):
    """Sums over 400 columns to float32's precision, which two parts of 11 bits would miss."""
    tensors = make(rows=16, columns=400, dtype=torch.float16)
    tensors["lora_A"] *= 16
    A, rows = tensors["lora_A"], passes.Rows(16, 16)
    factor = passes.Factor(A, (A.stride(0), 1), 4, 4, 400)
    monkeypatch.setattr(passes, "PART_DTYPES", (torch.float16,))
    found = passes.down(tensors["x"], factor, rows).sum(0)
    exact = tensors["x"].double() @ A.double().t()
    assert (found - exact).abs().max() < 4e-7 * exact.abs().max()


@pytest.mark.parametrize("rate", [1e-12, 0.1, 0.999])
@pytest.mark.parametrize("columns", [3, 64, 130])
@pytest.mark.parametrize("seed", [0, 1, -1, 2**62 + 12345])
def test_the_mask_is_that_of_the_reference(rate, columns, seed):
    x, eye = torch.ones(9, columns), torch.eye(columns)
    with trifuse.backend("triton"):
        y = trifuse.lora_linear(x, torch.zeros(columns, columns), None, eye, eye, 1.0, dropout=rate, seed=seed)
    assert torch.equal(y != 0, reference.lora_dropout_mask(seed, 9, columns, rate))


def test_ranks_that_are_not_active_are_not_read():
    tensors = make()
    clean = run("triton", tensors, active_rank=2)
    tensors["lora_A"][2:], tensors["lora_B"][:, 2:] = float("nan"), float("nan")
    found = run("triton", tensors, active_rank=2)
    for name, value in found.items():
        assert torch.equal(value, clean[name]), name
    assert not found["dlora_A"][2:].any() and not found["dlora_B"][:, 2:].any()


def test_nan_stays_in_its_row():
    tensors = make(rows=40)
    clean = run("triton", tensors, needs=("x",))
    tensors["x"][7, 3] = float("nan")
    found = run("triton", tensors, needs=("x",))
    others = torch.arange(40) != 7
    assert torch.equal(found["y"][others], clean["y"][others]) and found["y"][7].isnan().all()


def test_gradients_repeat_bit_for_bit():
    tensors = make(rows=100, columns=130, out=130, vector=True)
    first, second = (run("triton", tensors, **EVERYTHING) for _ in range(2))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


@dtypes
@pytest.mark.parametrize("adapter", ["float32", "of x"])
def test_norms_of_dora_from_the_factors(dtype, adapter):
    adapter = torch.float32 if adapter == "float32" else dtype
    tensors = make(out=50, columns=140, dtype=dtype, adapter_dtype=adapter)
    leaves = [tensors[name] for name in ("weight", "lora_A", "lora_B")]
    grads = {}
    for backend, cast in (("triton", lambda x: x), ("reference", lambda x: x.double())):
        ready = [cast(leaf).detach().requires_grad_() for leaf in leaves]
        with trifuse.backend(backend):
            norms = trifuse.dora_norm(*ready, 0.7)
            grads[backend] = norms, *torch.autograd.grad(norms.square().sum(), ready)
    for found, exact in zip(grads["triton"], grads["reference"], strict=True):
        eps = torch.finfo(found.dtype).eps
        assert (found - exact).abs().max() <= 4 * eps * exact.abs().max()
