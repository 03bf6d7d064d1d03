"""What only a GPU shows of lora_linear and lora_linear_multi: bfloat16 on tensor cores, tiles of their real sizes, many
programs, loads that run ahead, offsets beyond 2^31. The tests of test_lora_linear.py run there too."""

import functools

import lora_linear_cases as cases
import lora_linear_multi_cases as multi
import pytest
import torch
from lora_linear_cases import make, run

import trifuse
from trifuse import reference

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poisoned_memory")]
check = functools.partial(cases.check, device="cuda")
check_multi = functools.partial(multi.check, "triton", device="cuda")
backends = pytest.mark.parametrize("backend", ["cuda", "triton"])
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
halves = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
adapters = pytest.mark.parametrize("adapter", ["float32", "of x"])
EVERYTHING = {"dropout": 0.1, "seed": 2**40 + 17}


def adapter_dtype(adapter, dtype):
    return torch.float32 if adapter == "float32" else dtype


def on_gpu(tensors):
    return {name: x.cuda() if isinstance(x, torch.Tensor) else x for name, x in tensors.items()}


@backends
@dtypes
@adapters
@pytest.mark.parametrize("shape", [(1, 2048, 1024), (32, 768, 3072), (700, 768, 1536), (2100, 512, 520)])
def test_sizes_of_models(shape, adapter, dtype, backend):
    rows, columns, out = shape
    check(backend, make(rows, columns, out, 8, dtype, adapter_dtype(adapter, dtype)))
    check(backend, make(rows, columns, out, 16, dtype, adapter_dtype(adapter, dtype)), **EVERYTHING)


@backends
@dtypes
@adapters
@pytest.mark.parametrize("rank", [1, 15, 16, 17, 32, 33, 64, 65, 130, 256])
def test_ranks(rank, adapter, dtype, backend):
    tensors = make(300, 260, 390, rank, dtype, adapter_dtype(adapter, dtype), vector=True)
    check(backend, tensors, **EVERYTHING)
    check(backend, tensors, frozen=True, active_rank=(rank + 1) // 2)


@backends
@dtypes
@pytest.mark.parametrize("columns, out", [(50, 23), (129, 1001), (1001, 129)])
@pytest.mark.parametrize("rows", [1, 17, 1000])
def test_odd_sizes(rows, columns, out, dtype, backend):
    check(backend, make(rows, columns, out, 5, dtype, vector=True), **EVERYTHING)


@backends
@dtypes
def test_masks_are_those_of_the_reference(dtype, backend):
    x, eye = torch.ones(700, 515, dtype=dtype, device="cuda"), torch.eye(515, dtype=dtype, device="cuda")
    zero = torch.zeros_like(eye)
    for seed in (0, -1, 2**62 + 12345):
        with trifuse.backend(backend):
            y = trifuse.lora_linear(x, zero, None, eye, eye, 1.0, dropout=0.3, seed=seed)
        assert torch.equal((y != 0).cpu(), reference.lora_dropout_mask(seed, 700, 515, 0.3))


@backends
def test_gradients_of_any_size_stay_in_float32(backend):
    """float16's range holds dy and dx, and not what lies between them."""
    tensors = make(64, 128, 128, 8, torch.float16)
    tensors["lora_A"], tensors["lora_B"] = tensors["lora_A"] * 2.0**-20, tensors["lora_B"] * 2.0**20
    check(backend, tensors, **EVERYTHING)


@backends
@dtypes
@pytest.mark.parametrize("rows", [1, 512, 4096])
def test_results_repeat_bit_for_bit(rows, dtype, backend):
    tensors = make(rows, 1024, 1024, 16, dtype, vector=True)
    first, second = (run(backend, tensors, device="cuda", **EVERYTHING) for _ in range(2))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


@backends
@halves
def test_autocast_around_the_backward_pass_changes_nothing(dtype, backend):
    tensors = on_gpu(make(100, 256, 256, dtype=dtype))
    wanted = [tensors[name].requires_grad_() for name in ("x", "weight", "bias", "lora_A", "lora_B")]
    with trifuse.backend(backend):
        y = trifuse.lora_linear(**tensors)
    expected = torch.autograd.grad(y.sum(), wanted, retain_graph=True)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        found = torch.autograd.grad(y.sum(), wanted)
    for got, needed in zip(found, expected, strict=True):
        assert got.dtype == needed.dtype and torch.equal(got, needed)


@backends
@pytest.mark.parametrize("rows, columns, out", [(2**21 + 5, 1030, 16), (2**21 + 5, 16, 1030)])
def test_more_than_two_to_the_31_elements(rows, columns, out, backend):
    if torch.cuda.get_device_properties(0).total_memory < 60 * 2**30:
        pytest.skip("needs a GPU with 60 GiB of memory")
    tensors = on_gpu(make(40, columns, out, dtype=torch.bfloat16))
    x = torch.zeros(rows, columns, dtype=torch.bfloat16, device="cuda")
    x[-40:] = tensors["x"]
    grads = {}
    for name, given, which in (("native", x, backend), ("reference", tensors["x"], "reference")):
        leaf = given.detach().requires_grad_()
        factors = [tensors[key].detach().requires_grad_() for key in ("lora_A", "lora_B")]
        with trifuse.backend(which):
            y = trifuse.lora_linear(leaf, tensors["weight"], tensors["bias"], *factors)
        grads[name] = y[-40:], *torch.autograd.grad(y[-40:].float().square().sum(), [leaf, *factors])
    native, expected = grads["native"], grads["reference"]
    torch.testing.assert_close(native[0], expected[0], rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(native[1][-40:], expected[1], rtol=2e-2, atol=0.3)
    assert not native[1][:-40].any()
    for got, needed in zip(native[2:], expected[2:], strict=True):
        torch.testing.assert_close(got, needed, rtol=2e-2, atol=2e-2 * needed.abs().max().item())


@backends
def test_in_a_cuda_graph(backend):
    tensors = on_gpu(make(64, 256, 256, dtype=torch.bfloat16))
    seed = torch.tensor([5], device="cuda")

    def call():
        with trifuse.backend(backend):
            return trifuse.lora_linear(**tensors, dropout=0.3, seed=seed)

    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    for value in (5, 6):
        seed.fill_(value)
        graph.replay()
        assert torch.equal(captured, call())


# ---- many adapters


@dtypes
@adapters
@pytest.mark.parametrize("rows, n", [(1, 3), (64, 32), (65, 2), (700, 5), (2100, 40)])
def test_many_adapters(rows, n, adapter, dtype):
    ranks = [(8, 16, 1, 33)[i % 4] for i in range(n)]
    check_multi(multi.make(rows, 520, 390, ranks, dtype, adapter_dtype(adapter, dtype)))


@dtypes
def test_many_adapters_repeat_bit_for_bit(dtype):
    tensors = multi.make(1000, 512, 512, (8, 16, 64), dtype)
    first, second = (multi.run("triton", tensors, device="cuda") for _ in range(2))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def test_the_host_does_not_wait_for_the_gpu():
    tensors = on_gpu(multi.make(700, 256, 256, (8, 16), torch.bfloat16))
    lists = [[tensors[f"{name}{i}"].requires_grad_() for i in range(2)] for name in "AB"]
    x = tensors["x"].requires_grad_()

    def step():
        with trifuse.backend("triton"):
            y = trifuse.lora_linear_multi(
                x, tensors["weight"], tensors["bias"], *lists, tensors["scales"], tensors["index"]
            )
        torch.autograd.grad(y, [x, *lists[0], *lists[1]], torch.ones_like(y))

    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
