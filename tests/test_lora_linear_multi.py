"""lora_linear_multi: the reference against lora_linear row by row, then every kernel that this machine can run against
the reference."""

import lora_linear_multi_cases as cases
import pytest
import torch
from backends_here import cpp_only, kernels_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lora_linear_cases import eager_errors
from lora_linear_multi_cases import make, run
from tolerance import compare, in_double
from torch.utils._python_dispatch import TorchDispatchMode

import trifuse

pytestmark = pytest.mark.usefixtures("poisoned_memory")
kernels = kernels_of("triton")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
every_dtype = pytest.mark.parametrize("dtype", DTYPES)
NAN = float("nan")


def check(backend, tensors, device="cpu", **options):
    """Assert the rule for everything that `backend` returns."""
    if tensors["x"].dtype != torch.float64:
        return cases.check(backend, tensors, device, **options)
    exact, kernel = run("reference", tensors, exact=True, **options), run(backend, tensors, device=device, **options)
    single = {name: x.float() if x.is_floating_point() else x for name, x in tensors.items()}
    compare(kernel, exact, in_double(eager_errors(single, run=run, **options)))


def adapters_of(tensors):
    n = tensors["scales"].shape[0]
    return [tensors[f"A{i}"] for i in range(n)], [tensors[f"B{i}"] for i in range(n)]


def call(backend, tensors, **changes):
    A, B = adapters_of(tensors)
    given = {"bias": None} | {
        name: tensors[name] for name in ("x", "weight", "bias", "scales", "index") if name in tensors
    }
    with trifuse.backend(backend):
        return trifuse.lora_linear_multi(**given | {"A_list": A, "B_list": B} | changes)


# ---- the reference


def test_reference_is_lora_linear_of_each_row_with_its_adapter():
    tensors = make(dtype=torch.float64)
    A, B = adapters_of(tensors)
    found = call("reference", tensors)
    with trifuse.backend("reference"):
        for row, i in enumerate(tensors["index"].tolist()):
            x, base = tensors["x"][row], (tensors["weight"], tensors["bias"])
            if i < 0:
                expected = torch.nn.functional.linear(x, *base)
            else:
                expected = trifuse.lora_linear(x, *base, A[i], B[i], tensors["scales"][i, : A[i].shape[0]])
            torch.testing.assert_close(found[row], expected)


def differentiable():
    tensors = make(rows=5, columns=3, out=3, ranks=(2, 1), dtype=torch.float64)
    tensors["index"] = torch.tensor([1, -1, 0, 0, 1])
    names = ("x", "weight", "bias", "scales", "A0", "A1", "B0", "B1")

    def multi(x, weight, bias, scales, *factors):
        return trifuse.lora_linear_multi(x, weight, bias, factors[:2], factors[2:], scales, tensors["index"])

    return multi, [tensors[name].requires_grad_() for name in names]


def test_reference_gradients_pass_gradcheck_twice():
    multi, inputs = differentiable()
    with trifuse.backend("reference"):
        assert torch.autograd.gradcheck(multi, inputs)
        assert torch.autograd.gradgradcheck(multi, inputs)


# ---- every kernel


@kernels
@every_dtype
@pytest.mark.parametrize("adapter", ["float32", "of x"])
@pytest.mark.parametrize("bias", [False, True])
def test_every_dtype(backend, device, dtype, adapter, bias):
    adapter = torch.float32 if adapter == "float32" else dtype
    check(backend, make(dtype=dtype, adapter_dtype=adapter, bias=bias), device)


@kernels
@pytest.mark.parametrize("rows", [0, 1, 2, 63, 64, 65, 300])
def test_any_number_of_rows(backend, device, rows):
    check(backend, make(rows=rows), device)


@kernels
@pytest.mark.parametrize("columns, out", [(0, 3), (3, 0), (1, 1), (3, 130), (131, 3), (600, 33), (33, 600)])
def test_any_width(backend, device, columns, out):
    check(backend, make(columns=columns, out=out), device)


@kernels
@pytest.mark.parametrize("ranks", [(1,), (4, 4, 4), (70, 2), (16, 17, 1, 33), (1, 2, 3, 4, 5, 6, 7, 8, 9), (1,) * 40])
def test_mixed_ranks(backend, device, ranks):
    check(backend, make(ranks=ranks), device)


@kernels
@pytest.mark.parametrize("whose", ["one has all", "none has one", "the last has one", "turns", "falling"])
def test_any_distribution_of_rows(backend, device, whose):
    tensors, place = make(rows=70), torch.arange(70)
    tensors["index"] = {
        "one has all": torch.full((70,), 1), "none has one": torch.full((70,), -5),
        "the last has one": torch.where(place < 69, 0, 2), "turns": place % 4 - 1, "falling": 2 - place // 24,
    }[whose]  # fmt: skip
    check(backend, tensors, device)


@kernels
def test_rows_without_an_adapter_are_the_layer_alone(backend, device):
    tensors = make()
    tensors["index"][:] = torch.randint(-(2**62), 0, (24,))
    found = run(backend, tensors, device=device)
    torch.testing.assert_close(found["y"], torch.nn.functional.linear(tensors["x"], tensors["weight"], tensors["bias"]))
    assert not any(value.any() for name, value in found.items() if name[1:2] in ("A", "B") or name == "dscales")


@kernels
@every_dtype
def test_leading_axes_and_strides(backend, device, dtype):
    tensors = make(lead=(2, 3), rows=5, dtype=dtype)
    tensors["index"] = tensors["index"].to(torch.int32)
    check(backend, tensors, device)
    tensors = make(rows=20, columns=80, dtype=dtype)
    for name in ("x", "weight", "A0", "A1", "A2"):
        tensors[name] = tensors[name][:, ::2]
    tensors |= {"B1": tensors["B2"][:, 4:5], "B2": tensors["B2"].t().contiguous().t()}
    tensors |= {"bias": tensors["bias"].repeat_interleave(2)[::2], "weight": tensors["weight"].t().contiguous().t()}
    tensors |= {"scales": tensors["scales"].t().contiguous().t(), "index": tensors["index"].repeat_interleave(3)[::3]}
    check(backend, tensors, device)
    tensors |= {"x": tensors["x"].contiguous()[:1].expand(20, -1), "index": tensors["index"][3:4].expand(20)}
    check(backend, tensors, device)
    one = make(rows=1, dtype=dtype)
    check(backend, one | {"x": one["x"][0], "index": torch.tensor(2)}, device)


@kernels
def test_scales_are_numbers_vectors_or_one_matrix(backend, device):
    tensors = {name: x.to(device) for name, x in make(ranks=(3, 1, 5)).items()}
    vectors = [row[:rank] for row, rank in zip(tensors["scales"], (3, 1, 5), strict=True)]
    assert torch.equal(call(backend, tensors, scales=vectors), call(backend, tensors))
    numbers = torch.tensor([0.5, 2.0, -1.0], device=device)
    expected = call(backend, tensors, scales=numbers[:, None].expand(-1, 5))
    for scales in ([0.5, 2, -1.0], numbers, (0.5, numbers[1], torch.full((5,), -1.0, device=device))):
        assert torch.equal(call(backend, tensors, scales=scales), expected)
    for one in (numbers.requires_grad_(), [row.clone().requires_grad_() for row in vectors]):
        wanted = one if isinstance(one, list) else [one]
        grads = torch.autograd.grad(call(backend, tensors, scales=one).sum(), wanted)
        assert [grad.shape for grad in grads] == [x.shape for x in wanted]
        assert all(grad.any() for grad in grads)


@kernels
@pytest.mark.parametrize("name", cases.FLOATS)
def test_each_gradient_alone(backend, device, name):
    tensors = make()
    alone, together = run(backend, tensors, device=device, needs=(name,)), run(backend, tensors, device=device)
    assert all(key == "y" or key.startswith(f"d{name}") for key in alone)
    for key, value in alone.items():
        torch.testing.assert_close(value, together[key], rtol=1e-6, atol=1e-6)


@kernels
def test_an_adapter_reaches_its_own_rows_alone(backend, device):
    tensors = make()
    clean = run(backend, tensors, device=device, needs=("x",))
    tensors["A1"][:], tensors["B1"][:], tensors["scales"][1] = NAN, NAN, NAN
    tensors["scales"][0, 3:] = NAN  # beyond its rank
    found = run(backend, tensors, device=device, needs=("x",))
    others = tensors["index"] != 1
    assert others.any() and not others.all()
    for name, value in found.items():
        assert torch.equal(value[others], clean[name][others]), name
        assert value[~others].isnan().all(), name


@kernels
def test_an_adapter_without_rows_gets_a_gradient_of_zeros(backend, device):
    tensors = make()
    tensors["index"][tensors["index"] == 2] = 0
    found = run(backend, tensors, device=device)
    for name in ("dA2", "dB2"):
        assert not found[name].any(), name
    assert not found["dscales"][2].any() and not found["dscales"][1, 1:].any()
    assert found["dA0"].any() and found["dB1"].any()


@kernels
def test_one_adapter_for_all_rows_is_lora_linear(backend, device):
    tensors = make(ranks=(6,))
    tensors["index"][:] = 0
    found = run(backend, tensors, device=device)
    exact = run("reference", tensors, exact=True)["y"]
    args = [tensors[name].to(device) for name in ("x", "weight", "bias", "A0", "B0")]
    with trifuse.backend(backend):
        other = trifuse.lora_linear(*args, tensors["scales"][0].to(device)).cpu()
    assert (found["y"] - exact).abs().max() < 1e-5 > (other - exact).abs().max()


@kernels
def test_results_are_bitwise_repeatable(backend, device):
    tensors = make(rows=200, columns=130)
    first, second = (run(backend, tensors, device=device) for _ in range(2))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


@st.composite
def drawn(draw):
    """Any call: sizes, ranks, dtypes, whose the rows are, which gradients are asked for."""
    dtype = draw(st.sampled_from(DTYPES))
    ranks = draw(st.lists(st.integers(1, 20), min_size=1, max_size=6))
    tensors = make(
        rows=draw(st.integers(0, 80)), columns=draw(st.integers(1, 90)), out=draw(st.integers(1, 90)), ranks=ranks,
        dtype=dtype, adapter_dtype=draw(st.sampled_from([None, dtype])), bias=draw(st.booleans()),
        seed=draw(st.integers(0, 999)), lead=draw(st.sampled_from([(), (2,)])),
    )  # fmt: skip
    tensors["index"] = tensors["index"].clamp(max=draw(st.integers(-1, len(ranks) - 1)))
    return tensors, draw(st.sampled_from([cases.FLOATS, ("x",), ("A", "B"), ("B", "scales"), ("A",)]))


@kernels
@given(case=drawn())
@settings(max_examples=40, deadline=None, derandomize=True,
          suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])  # fmt: skip
def test_any_call_keeps_the_tolerance(backend, device, case):
    tensors, needs = case
    check(backend, tensors, device, needs=needs)


# ---- what only the CPU kernels do


@cpp_only
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("adapter", [torch.float32, None])
@pytest.mark.parametrize("rows, columns, out", [(20, 530, 301), (130, 45, 83)])
def test_every_instruction_set(isa, dtype, adapter, rows, columns, out):
    check("cpp", make(rows, columns, out, (3, 9, 1, 16), dtype=dtype, adapter_dtype=adapter or dtype))


@cpp_only
def test_cpp_gradients_pass_gradcheck(isa):
    multi, inputs = differentiable()
    with trifuse.backend("cpp"):
        assert torch.autograd.gradcheck(multi, inputs)


@cpp_only
@pytest.mark.parametrize("rows, columns, out", [(1, 600, 700), (200, 300, 300)])
def test_results_do_not_depend_on_the_number_of_threads(threads, rows, columns, out):
    """Beside a weight of zeros: the base product is BLAS's, which cuts some sums by threads."""
    tensors, results = make(rows, columns, out, (8, 3, 16)), []
    tensors["weight"].zero_()
    for count in (1, 2, 3, 8):
        threads(count)
        results.append(run("cpp", tensors, needs=("x", "bias", "A", "B", "scales")))
    for name in results[0]:
        assert all(torch.equal(results[0][name], other[name]) for other in results[1:]), name


class Largest(TorchDispatchMode):
    """The most numbers that a tensor had which some op returned."""

    def __init__(self):
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **kwargs or {})
        leaves = torch.utils._pytree.tree_leaves(found)
        self.numbers = max(
            [self.numbers, *(x.untyped_storage().nbytes() // x.itemsize for x in leaves if torch.is_tensor(x))]
        )
        return found


@cpp_only
def test_no_weights_are_copied_per_row_and_x_s_and_the_index_are_saved():
    rows, columns, out, ranks = 64, 96, 80, (8, 2, 16)
    tensors = make(rows, columns, out, ranks)
    floats = [x.requires_grad_() for name, x in tensors.items() if name != "index"]
    owned, saved = {x.data_ptr() for x in floats}, {}

    def pack(x):
        if x.data_ptr() not in owned:
            saved[x.data_ptr()] = x.untyped_storage().nbytes()
        return x

    with Largest() as largest, torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        y = call("cpp", tensors)
        torch.autograd.grad(y.sum(), floats)
    assert largest.numbers <= max(rows * columns, rows * out, out * columns)
    saved.pop(tensors["index"].data_ptr())
    assert list(saved.values()) == [rows * max(ranks) * 4]
