"""dora_linear and dora_norm: the reference against closed forms and PEFT, then every kernel that this machine can run
against the reference."""

import pytest
import torch
import torch.nn.functional as F
from backends_here import cpp_only, kernels_of
from dora_linear_cases import FLOATS, check, make, run
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import trifuse

pytestmark = pytest.mark.usefixtures("poisoned_memory")
kernels = kernels_of("cuda", "triton")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
every_dtype = pytest.mark.parametrize("dtype", DTYPES)
detached = pytest.mark.parametrize("detach_norm", [True, False])
NORM = ("weight", "lora_A", "lora_B", "scale")


def only_norm(tensors):
    return {name: tensors[name] for name in NORM}


def explicit(x, weight, bias, lora_A, lora_B, magnitude, scale, detach_norm):
    """By the paper: the whole adapted weight, its norms, the weight that has them replaced."""
    adapted = weight + (lora_B * scale) @ lora_A
    norm = adapted.norm(dim=1, keepdim=True)
    return F.linear(x, magnitude[:, None] * adapted / (norm.detach() if detach_norm else norm), bias)


# ---- the reference, against what can be computed by hand


@detached
@pytest.mark.parametrize("vector", [False, True])
@pytest.mark.parametrize("backend", ["reference", pytest.param("cpp", marks=cpp_only)])
def test_it_is_a_linear_layer_of_the_adapted_weight(backend, detach_norm, vector):
    tensors = make(dtype=torch.float64, vector=vector)
    found = run(backend, tensors, detach_norm=detach_norm)
    expected = run("reference", tensors, function=explicit, detach_norm=detach_norm)
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], msg=name)
    other = run(backend, tensors, detach_norm=not detach_norm)
    torch.testing.assert_close(other["y"], found["y"])
    assert not torch.allclose(other["dlora_A"], found["dlora_A"])


@pytest.mark.parametrize("backend", ["reference", pytest.param("cpp", marks=cpp_only)])
def test_the_norm_is_that_of_the_rows(backend):
    tensors = only_norm(make(dtype=torch.float64, vector=True))

    def rows(weight, lora_A, lora_B, scale):
        return (weight + lora_B * scale @ lora_A).norm(dim=1)

    found = run(backend, tensors, function=trifuse.dora_norm)
    for name, value in run("reference", tensors, function=rows).items():
        torch.testing.assert_close(found[name], value, msg=name)


@pytest.mark.parametrize("backend", ["reference", pytest.param("cpp", marks=cpp_only)])
def test_magnitudes_that_are_the_norms_give_lora_linear(backend):
    tensors = make()
    with trifuse.backend(backend):
        plain = {name: x for name, x in tensors.items() if name != "magnitude"}
        tensors["magnitude"] = trifuse.dora_norm(**only_norm(tensors))
        torch.testing.assert_close(trifuse.dora_linear(**tensors), trifuse.lora_linear(**plain), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ["reference", pytest.param("cpp", marks=cpp_only)])
def test_it_computes_what_peft_does(backend):
    peft = pytest.importorskip("peft", reason="the package peft is not installed")
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, lora_alpha=6, lora_dropout=0.0, use_dora=True, target_modules=["0"])
    model = peft.get_peft_model(torch.nn.Sequential(torch.nn.Linear(40, 24)), config)
    layer = model.base_model.model[0]
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    magnitude = layer.lora_magnitude_vector["default"].weight
    torch.testing.assert_close(trifuse.dora_norm(layer.weight, A, B), magnitude.detach())
    torch.nn.init.normal_(B)
    x = torch.randn(3, 7, 40, requires_grad=True)
    wanted = [x, A, B, magnitude]
    theirs = layer(x)
    with trifuse.backend(backend):
        ours = trifuse.dora_linear(x, layer.weight, layer.bias, A, B, magnitude, 6 / 4)
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
        found = torch.autograd.grad(ours.square().sum(), wanted)
    for got, expected in zip(found, torch.autograd.grad(theirs.square().sum(), wanted), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-3)


def differentiable(detach_norm):
    """Where the norm is a constant, only what it does not depend on has the gradient of finite differences."""
    tensors = make(rows=3, columns=4, out=3, rank=2, dtype=torch.float64, vector=True)
    names = FLOATS if not detach_norm else ("x", "bias", "magnitude")

    def dora(*values):
        call = tensors | dict(zip(names, values, strict=True))
        return trifuse.dora_linear(**call, dropout=0.3, seed=2, detach_norm=detach_norm)

    return dora, [tensors[name].clone().requires_grad_() for name in names]


@detached
def test_reference_gradients_pass_gradcheck_twice(detach_norm):
    with trifuse.backend("reference"):
        assert torch.autograd.gradcheck(*differentiable(detach_norm))
        assert torch.autograd.gradgradcheck(*differentiable(detach_norm))


# ---- every kernel


@kernels
@every_dtype
@pytest.mark.parametrize("adapter", ["float32", "of x"])
@pytest.mark.parametrize("vector", [False, True])
@detached
def test_every_dtype(backend, device, dtype, adapter, vector, detach_norm):
    adapter = torch.float32 if adapter == "float32" else dtype
    tensors = make(dtype=dtype, adapter_dtype=adapter, magnitude_dtype=adapter, vector=vector, bias=vector)
    check(backend, tensors, device, detach_norm=detach_norm)


@kernels
@pytest.mark.parametrize("rows", [0, 1, 63, 64, 65, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_number_of_rows(backend, device, rows, dtype):
    check(backend, make(rows=rows, dtype=dtype), device)


@kernels
@pytest.mark.parametrize("columns, out", [(3, 0), (1, 1), (3, 130), (131, 3), (260, 270)])
@detached
def test_any_width(backend, device, columns, out, detach_norm):
    check(backend, make(rows=20, columns=columns, out=out), device, detach_norm=detach_norm)


@kernels
@pytest.mark.parametrize("rank", [1, 2, 5, 16, 17, 33])
def test_any_rank(backend, device, rank):
    check(backend, make(rows=20, rank=rank, vector=True), device, detach_norm=False)


@kernels
@every_dtype
@detached
def test_dropout_is_the_adapters_alone(backend, device, dtype, detach_norm):
    check(backend, make(dtype=dtype), device, dropout=0.3, seed=9, detach_norm=detach_norm)
    tensors = make(dtype=dtype)
    dropped = run(backend, tensors, device=device, needs=(), dropout=0.3, seed=9)["y"]
    assert not torch.equal(dropped, run(backend, tensors, device=device, needs=())["y"])
    eval_mode = run(backend, tensors, device=device, needs=(), dropout=0.3, seed=9, training=False)["y"]
    assert torch.equal(eval_mode, run(backend, tensors, device=device, needs=())["y"])
    tensors["lora_B"].zero_()
    found = [run(backend, tensors, device=device, needs=(), **drop)["y"] for drop in ({}, {"dropout": 0.3, "seed": 9})]
    assert torch.equal(*found)


@kernels
@every_dtype
def test_leading_axes_and_strides(backend, device, dtype):
    check(backend, make(lead=(2, 3), rows=5, dtype=dtype), device)
    check(backend, make(dtype=dtype) | {"x": make(rows=1, dtype=dtype)["x"][0]}, device)
    tensors = make(rows=40, columns=80, dtype=dtype)
    tensors |= {"x": tensors["x"][::2, 1::2], "bias": tensors["bias"].repeat_interleave(2)[::2]}
    tensors |= {"weight": tensors["weight"][:, ::2], "lora_A": tensors["lora_A"][:, ::2]}
    tensors |= {"magnitude": tensors["magnitude"].repeat_interleave(3)[::3]}
    tensors |= {"lora_B": tensors["lora_B"].t().contiguous().t()}
    check(backend, tensors, device, detach_norm=False)
    tensors |= {"magnitude": tensors["magnitude"][:1].expand(24), "x": tensors["x"].contiguous()[:1].expand(20, -1)}
    check(backend, tensors, device, detach_norm=False)


@kernels
@pytest.mark.parametrize("name", FLOATS)
@detached
def test_each_gradient_alone(backend, device, name, detach_norm):
    tensors = make(vector=True)
    alone = run(backend, tensors, device=device, needs=(name,), detach_norm=detach_norm)
    together = run(backend, tensors, device=device, detach_norm=detach_norm)
    assert alone.keys() == {"y", f"d{name}"}
    for key, value in alone.items():
        torch.testing.assert_close(value, together[key], rtol=1e-5, atol=1e-5)


@kernels
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("rank, vector", [(1, False), (9, True)])
def test_norms_of_every_dtype(backend, device, dtype, rank, vector):
    if device == "cuda" and dtype == torch.float64:
        pytest.skip("the kernels for GPUs compute in float32")
    for adapter in (torch.float32, dtype):
        tensors = only_norm(make(rank=rank, vector=vector, dtype=dtype, adapter_dtype=adapter))
        check(backend, tensors, device, function=trifuse.dora_norm)
    with trifuse.backend(backend):
        found = trifuse.dora_norm(*(x.to(device) if torch.is_tensor(x) else x for x in tensors.values()))
    assert found.dtype == torch.promote_types(dtype, torch.float32)


@kernels
def test_results_are_bitwise_repeatable(backend, device):
    tensors = make(rows=100, columns=130, out=130, vector=True)
    first, second = (run(backend, tensors, device=device, detach_norm=False) for _ in range(2))
    for name in first:
        assert torch.equal(first[name], second[name]), name


@st.composite
def cases(draw):
    """Any call: sizes, dtypes, ranks, dropout, the gradient of the norm. That gradient cancels most of the adapter's:
    of a few numbers the error that eager PyTorch happens to make says nothing."""
    dtype = draw(st.sampled_from(DTYPES))
    adapter = draw(st.sampled_from([None, dtype]))
    tensors = make(
        rows=draw(st.integers(0, 80)), columns=draw(st.integers(8, 90)), out=draw(st.integers(8, 90)),
        rank=draw(st.integers(1, 20)), dtype=dtype, adapter_dtype=adapter, magnitude_dtype=adapter,
        bias=draw(st.booleans()), vector=draw(st.booleans()), seed=draw(st.integers(0, 999)),
        lead=draw(st.sampled_from([(), (2,)])),
    )  # fmt: skip
    options = {"detach_norm": draw(st.booleans())}
    return tensors, options | draw(st.sampled_from([{}, {"dropout": 0.4, "seed": 2**50 + 3}]))


@kernels
@given(case=cases())
@settings(max_examples=40, deadline=None, derandomize=True,
          suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])  # fmt: skip
def test_any_call_keeps_the_tolerance(backend, device, case):
    tensors, options = case
    check(backend, tensors, device, **options)


# ---- what only the CPU kernels do


@cpp_only
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("rows, columns, out", [(130, 45, 83), (3, 70, 530)])
def test_every_instruction_set(isa, dtype, rows, columns, out):
    check("cpp", make(rows=rows, columns=columns, out=out, dtype=dtype, vector=True), dropout=0.1, seed=1)


@cpp_only
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("columns, out, rank", [(1, 1, 1), (45, 83, 5), (530, 300, 17), (0, 3, 2), (3, 0, 2)])
def test_norms_of_every_instruction_set(isa, dtype, columns, out, rank):
    """Without a gradient they are a pass of their own."""
    for adapter in (torch.float32, dtype):
        tensors = make(1, columns=columns, out=out, rank=rank, dtype=dtype, adapter_dtype=adapter, vector=rank > 1)
        tensors = only_norm(tensors)
        check("cpp", tensors, function=trifuse.dora_norm, needs=())
        tensors |= {name: tensors[name].t().contiguous().t() for name in ("weight", "lora_A", "lora_B")}
        check("cpp", tensors, function=trifuse.dora_norm, needs=())


@cpp_only
def test_norms_do_not_depend_on_the_number_of_threads(threads):
    tensors, results = only_norm(make(1, columns=700, out=900, rank=9)), []
    for count in (1, 2, 3, 8):
        threads(count)
        results.append(run("cpp", tensors, function=trifuse.dora_norm, needs=())["y"])
    assert all(torch.equal(results[0], other) for other in results[1:])


@cpp_only
@detached
def test_cpp_gradients_pass_gradcheck(isa, detach_norm):
    with trifuse.backend("cpp"):
        assert torch.autograd.gradcheck(*differentiable(detach_norm))


@cpp_only
@pytest.mark.parametrize("rows, columns, out", [(1, 600, 700), (200, 300, 300)])
def test_results_do_not_depend_on_the_number_of_threads(threads, rows, columns, out):
    """Of an adapter of one rank that is powers of 2, beside a weight of zeros: what else is summed is BLAS's, which
    cuts some sums by threads."""
    tensors, results = make(rows=rows, columns=columns, out=out, rank=1), []
    tensors["weight"].zero_(), tensors["lora_A"].sign_(), tensors["lora_B"].sign_()
    for count in (1, 2, 3, 8):
        threads(count)
        results.append(run("cpp", tensors, needs=("x", "bias", "lora_A", "lora_B", "magnitude")))
    for name in results[0]:
        assert all(torch.equal(results[0][name], other[name]) for other in results[1:]), name


class Made(TorchDispatchMode):
    """The sizes of all memory that ops returned, by data pointer."""

    def __init__(self):
        super().__init__()
        self.numbers = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **kwargs or {})
        for x in torch.utils._pytree.tree_leaves(found):
            if torch.is_tensor(x) and x.numel():
                self.numbers[x.data_ptr()] = x.untyped_storage().nbytes() // x.itemsize
        return found


@kernels
@every_dtype
@detached
def test_nothing_of_the_size_of_the_weight_is_made(backend, device, dtype, detach_norm):
    rows, columns, out, rank = 5, 300, 280, 4
    tensors = make(rows=rows, columns=columns, out=out, rank=rank, dtype=dtype)
    tensors = {name: x.to(device) if torch.is_tensor(x) else x for name, x in tensors.items()}
    wanted = [tensors[name].requires_grad_() for name in ("x", "bias", "lora_A", "lora_B", "magnitude")]
    given = {x.data_ptr() for x in tensors.values() if torch.is_tensor(x)}
    with trifuse.backend(backend), Made() as made:
        y = trifuse.dora_linear(**tensors, detach_norm=detach_norm)
        torch.autograd.grad(y.sum(), wanted)
    sizes = [size for pointer, size in made.numbers.items() if pointer not in given]
    assert sizes and max(sizes) < out * columns / 4, max(sizes)


@cpp_only
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_saved_for_backward_are_x_s_the_seed_and_what_the_magnitude_scales(dropout):
    tensors = {name: x.requires_grad_() if torch.is_tensor(x) else x for name, x in make(rows=60, columns=80).items()}
    owned, saved = {x.data_ptr() for name, x in tensors.items() if torch.is_tensor(x) and name != "x"}, {}

    def pack(x):
        if x.data_ptr() not in owned:
            saved[x.data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x), trifuse.backend("cpp"):
        y = trifuse.dora_linear(**tensors, dropout=dropout)
    large = sorted(size for size in saved.values() if size > 24 * 4)
    assert large == sorted([60 * 80 * 4, 60 * 24 * 4, 60 * 4 * 4])
    assert y.data_ptr() not in saved
    assert sorted(size for size in saved.values() if size <= 24 * 4)[: int(dropout > 0)] == ([8] if dropout else [])
