"""gaussian_adaptive_attention: the reference against closed forms, then every kernel that this machine can run against
the reference. On a GPU the same statements are made of `cuda` and `triton`."""

import math

import pytest
import torch
from backends_here import cpp_only, kernels_of
from gaussian_adaptive_attention_cases import check, make, run
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tolerance import error

import trifuse

kernels = kernels_of("cuda", "triton")
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
normalizations = pytest.mark.parametrize("normalization", ["stable", "clamped"])


@pytest.fixture(autouse=True)
def nan_in_fresh_memory(poisoned_memory):
    """Every test runs on poisoned allocations."""


def attend(backend, tensors, device="cpu", **options):
    with trifuse.backend(backend):
        return trifuse.gaussian_adaptive_attention(
            **{name: None if value is None else value.to(device) for name, value in tensors.items()}, **options
        )


# ---- the reference, against what can be computed by hand


def test_reference_is_a_softmax_of_squared_scores():
    x = torch.tensor([0.0, 1.0, 2.0, 5.0], dtype=torch.float64)
    c, delta = 0.7, 0.3
    scores = (x - x.mean() - delta) / (x.var() + 1e-8).sqrt()
    expected = torch.softmax(-scores.square() / (2 * c * c), 0)
    parameters = (torch.tensor([value], dtype=torch.float64) for value in (delta, c))
    with trifuse.backend("reference"):
        out, weights = trifuse.gaussian_adaptive_attention(x, *parameters, return_weights=True)
    torch.testing.assert_close(weights, expected, rtol=1e-14, atol=0)
    torch.testing.assert_close(out, x * expected, rtol=1e-14, atol=0)


def test_reference_product_of_gaussians_is_one_gaussian():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(4, 30, generator=g, dtype=torch.float64)
    delta, c = (torch.randn(1, 6, generator=g, dtype=torch.float64) for _ in range(2))
    a, b = (1 / c**2).sum(1, keepdim=True), (delta / c**2).sum(1, keepdim=True)
    with trifuse.backend("reference"):
        many = trifuse.gaussian_adaptive_attention(x, delta, c)
        one = trifuse.gaussian_adaptive_attention(x, b / a, a.rsqrt())
    torch.testing.assert_close(many, one, rtol=1e-11, atol=1e-14)


@normalizations
@pytest.mark.parametrize("options", [{}, {"keep": 0.6}, {"padding": 0.5}], ids=["all", "mask", "padding"])
def test_reference_gradients_pass_gradcheck_twice(normalization, options):
    tensors = make((2, 9), torch.float64, heads=2, **options)
    mask = tensors.pop("mask")

    def attention(x, mean_offset, width):
        return trifuse.gaussian_adaptive_attention(
            x, mean_offset, width, num_heads=2, mask=mask, padding_value=options.get("padding"),
            normalization=normalization, eps=1e-2, return_weights=True,
        )  # fmt: skip

    inputs = [tensor.requires_grad_() for tensor in tensors.values()]
    if "padding" in options:  # a step of finite differences would make an entry another than the sentinel
        inputs[0].requires_grad_(False)
    with trifuse.backend("reference"):
        assert torch.autograd.gradcheck(attention, inputs)
        assert torch.autograd.gradgradcheck(attention, inputs)


# ---- every kernel


@kernels
@dtypes
@normalizations
@pytest.mark.parametrize("options", [{}, {"keep": 0.7}, {"padding": 0.5}], ids=["all", "mask", "padding"])
@pytest.mark.parametrize("dim", [0, 1, 2])
def test_all_options_at_once(backend, device, dtype, normalization, options, dim):
    tensors = make((19, 43, 50), dtype, heads=2, gaussians=5, **options)
    check(backend, tensors, device, dim=dim, num_heads=2, normalization=normalization, return_weights=True,
          padding_value=options.get("padding"))  # fmt: skip


@kernels
def test_bare_call_needs_no_optional_argument(backend, device):
    tensors = make()
    del tensors["mask"]
    check(backend, tensors, device)


@kernels
@pytest.mark.parametrize("length", [2, 15, 16, 17, 63, 64, 65, 127, 129, 1000, 4100])
@pytest.mark.parametrize("shape", ["rows", "columns", "few columns"])
def test_lengths_around_a_vector(backend, device, length, shape):
    shape = {"rows": (7, length, 1), "columns": (1, length, 70), "few columns": (2, length, 3)}[shape]
    check(backend, make(shape, gaussians=5, keep=0.8 if length == 64 else None), device, dim=1, eps=1e-3)


@kernels
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 8])
@pytest.mark.parametrize("length", [33, 3000])
def test_any_number_of_rows(backend, device, rows, length):
    check(backend, make((rows, length), heads=2), device, num_heads=2)


@kernels
@pytest.mark.parametrize("columns", [1, 2, 7, 8, 15, 16, 17, 63, 64, 65, 130])
def test_any_number_of_columns(backend, device, columns):
    check(backend, make((2, 21, columns)), device, dim=1)


@kernels
@pytest.mark.parametrize("heads", [1, 2, 3, 7, 20, 43])
@pytest.mark.parametrize("dim", [0, 1])
def test_heads_that_do_not_divide_the_axis(backend, device, heads, dim):
    shape = (43, 29) if dim == 0 else (29, 43)
    check(backend, make(shape, heads=heads, gaussians=2), device, dim=dim, num_heads=heads, eps=1e-2)


@kernels
@pytest.mark.parametrize("gaussians", [1, 2, 16])
@normalizations
def test_any_number_of_gaussians(backend, device, gaussians, normalization):
    check(backend, make((11, 64), gaussians=gaussians), device, normalization=normalization, return_weights=True)


@kernels
@dtypes
@pytest.mark.parametrize("dim", [0, 1, 2, 3])
def test_strided_and_expanded_inputs(backend, device, dtype, dim):
    tensors = make((4, 18, 6, 20), dtype, keep=0.8)
    x = tensors["x"]
    views = [
        x.permute(2, 0, 3, 1).contiguous().permute(1, 3, 0, 2),
        x.repeat_interleave(2, 3)[..., ::2],
        x.flip(1)[:, :, :1].expand(-1, -1, 6, -1),
    ]
    for view in views[:2] if dim == 2 else views:  # along the axis that repeats itself the gradients are only rounding
        assert view.shape == x.shape
        check(backend, dict(tensors, x=view), device, dim=dim, eps=1e-2)
        check(backend, dict(tensors, x=view, mask=tensors["mask"][:, :, :1]), device, dim=dim, eps=1e-2)


@kernels
@pytest.mark.parametrize("shape", [(20,), (1, 20), (6, 1, 1, 20), (6, 5, 1, 1)])
def test_masks_that_broadcast(backend, device, shape):
    g = torch.Generator().manual_seed(3)
    tensors = make((6, 5, 7, 20))
    tensors["mask"] = torch.rand(shape, generator=g) < 0.6
    for dim in (0, 3):
        check(backend, tensors, device, dim=dim, return_weights=True)


@kernels
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2), (0, 2, 1)])
def test_the_output_has_the_memory_order_of_the_input(backend, device, order):
    inverse = sorted(range(3), key=order.__getitem__)
    tensors = make((4, 33, 17))
    tensors["x"] = tensors["x"].permute(order).contiguous().permute(inverse)
    out, weights = attend(backend, tensors, device, dim=1, return_weights=True)
    assert out.stride() == weights.stride() == tensors["x"].stride()


@kernels
@pytest.mark.parametrize("shape, dim", [((0, 5), 1), ((5, 0), 1), ((5, 0), 0), ((0,), 0), ((2, 0, 3), 1)])
def test_empty_inputs(backend, device, shape, dim):
    found = run(backend, make(shape, heads=2), device=device, dim=dim, num_heads=2, return_weights=True)
    assert found["out"].shape == found["weights"].shape == found["dx"].shape == shape
    assert not found["dmean_offset"].any() and not found["dwidth"].any()


@kernels
@dtypes
@normalizations
def test_one_entry_has_weight_one_and_no_gradient_through_the_statistics(backend, device, dtype, normalization):
    tensors = make((6, 1), dtype, least=0.9)
    tensors["mean_offset"] *= 0  # of an entry that is its own mean the product is then not below eps
    found = run(backend, tensors, device=device, normalization=normalization, return_weights=True)
    assert torch.equal(found["out"], tensors["x"])
    assert (found["weights"] == 1).all()
    assert not found["dwidth"].any() and not found["dmean_offset"].any()
    masked = make((6, 9), dtype, least=0.9)
    masked["mask"] = torch.zeros(6, 9, dtype=torch.bool)
    masked["mask"][:, 4] = True
    if normalization == "clamped":
        masked["mean_offset"] *= 0
    found = run(backend, masked, device=device, normalization=normalization, return_weights=True)
    assert torch.equal(found["out"], torch.where(masked["mask"], masked["x"], 0))
    assert torch.equal(found["weights"], masked["mask"].to(dtype))
    assert not found["dx"][~masked["mask"]].any() and not found["dwidth"].any()


@kernels
@dtypes
@normalizations
@pytest.mark.parametrize("dim", [0, 1])
def test_what_is_masked_counts_nowhere_whatever_it_holds(backend, device, dtype, normalization, dim):
    tensors = make((23, 34), dtype, keep=0.5)
    tensors["mask"][:, 3] = tensors["mask"][5] = False  # whole slices, along either axis
    options = {"dim": dim, "normalization": normalization, "return_weights": True, "device": device}
    clean = run(backend, tensors, **options)
    for bad in (float("nan"), float("inf"), -1e4):
        spoiled = dict(tensors, x=torch.where(tensors["mask"], tensors["x"], bad))
        found = run(backend, spoiled, **options)
        for name, value in found.items():
            assert torch.equal(value, clean[name]), (bad, name)
    for name in ("out", "weights", "dx"):
        assert clean[name].isfinite().all() and not clean[name][~tensors["mask"]].any(), name


@kernels
@dtypes
@normalizations
@pytest.mark.parametrize("value", [0.0, 1.0, -37.25])
@pytest.mark.parametrize("dim", [0, 1])
def test_constant_slices_have_uniform_weights(backend, device, dtype, normalization, value, dim):
    tensors = make((32, 64), dtype)
    tensors["mean_offset"] *= 0
    tensors["x"] = torch.full_like(tensors["x"], value)
    found = run(backend, tensors, device=device, dim=dim, normalization=normalization, return_weights=True)
    length = tensors["x"].shape[dim]
    assert (found["weights"] == 1 / length).all() and (found["out"] == value / length).all()
    assert all(found[name].isfinite().all() for name in ("dx", "dmean_offset", "dwidth"))


@kernels
@pytest.mark.parametrize("offset", [100.0, 1e4, -1e4])
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("length", [60, 1000])
def test_entries_far_from_zero(backend, device, offset, dim, length):
    shape = (length, 20) if dim == 0 else (20, length)
    check(backend, make(shape, offset=offset), device, dim=dim, return_weights=True)


@kernels
@pytest.mark.parametrize("dim", [0, 1])
def test_one_entry_far_from_the_others(backend, device, dim):
    tensors = make((200, 200))
    tensors["x"][0] += 1e4
    tensors["x"][:, 0] -= 1e4
    check(backend, tensors, device, dim=dim, return_weights=True)


@kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("gaussians, least", [(16, 2.0), (16, 9.5), (400, 0.5)])
def test_weights_sum_to_one_where_the_products_underflow(backend, device, dtype, gaussians, least):
    tensors = make((9, 128), dtype, gaussians=gaussians, least=least)
    found = run(backend, tensors, device=device, return_weights=True)
    total = found["weights"].double().sum(1)
    torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=128 * torch.finfo(dtype).eps / 8)
    assert all(value.isfinite().all() for value in found.values())
    clamped = attend(backend, tensors, device, normalization="clamped", return_weights=True)[1]
    assert clamped.isfinite().all() and (clamped.double().sum(1) < 0.1).all()


@kernels
@pytest.mark.parametrize("dim", [0, 1])
def test_nan_stays_in_its_slice(backend, device, dim):
    tensors = make((70, 80))
    clean = run(backend, tensors, device=device, dim=dim)
    for bad in (float("nan"), float("inf")):
        x = tensors["x"].clone()
        x[33, 35] = bad
        found = run(backend, dict(tensors, x=x), device=device, dim=dim)
        for name in ("out", "dx"):
            value, expected = (one[name].transpose(0, dim) for one in (found, clean))
            slice_, others = (35, [i for i in range(80) if i != 35]) if dim == 0 else (33, [
                i for i in range(70) if i != 33])  # fmt: skip
            assert value[:, slice_].isnan().any(), name
            assert torch.equal(value[:, others], expected[:, others]), name


@kernels
@normalizations
def test_weights_alone_have_gradients(backend, device, normalization):
    tensors = make((13, 40), keep=0.7)
    kernel = run(backend, tensors, device=device, dout=False, normalization=normalization, return_weights=True)
    exact = run("reference", tensors, exact=True, dout=False, normalization=normalization, return_weights=True)
    eager = run("reference", tensors, dout=False, normalization=normalization, return_weights=True)
    for name in ("dx", "dmean_offset", "dwidth"):
        allowed = 4 * error(eager[name], exact[name]) + 1e-6 * exact[name].abs().max().item()
        assert error(kernel[name], exact[name]) <= allowed, name


@kernels
def test_parameters_may_be_shared_by_the_heads_and_in_the_dtype_of_x(backend, device):
    tensors = make((5, 40), torch.bfloat16, heads=1)
    tensors |= {name: tensors[name][0].bfloat16().to(device).requires_grad_() for name in ("mean_offset", "width")}
    out = attend(backend, tensors, device, num_heads=3)
    out.float().sum().backward()
    whole = {name: tensors[name].detach().float().expand(3, -1).contiguous() for name in ("mean_offset", "width")}
    assert torch.equal(out, attend(backend, tensors | whole, device, num_heads=3))
    assert all(tensors[name].grad.dtype == torch.bfloat16 for name in whole)


@kernels
@pytest.mark.parametrize("shape, dim", [((1, 50000), 1), ((64, 129), 1), ((1200, 130), 0)])
def test_results_are_bitwise_repeatable(backend, device, shape, dim):
    tensors = make(shape, heads=3)
    first, second = (run(backend, tensors, device=device, dim=dim, num_heads=3) for _ in range(2))
    for name in first:
        assert torch.equal(first[name], second[name]), name


@st.composite
def cases(draw):
    """Any call: shapes, memory order, axis, heads, dtype, options."""
    # Of a few numbers the error is a lottery: one axis is not short.
    shape = tuple(draw(st.permutations([draw(st.integers(20, 40)), *draw(st.lists(st.integers(1, 24), max_size=3))])))
    dim = draw(st.integers(-len(shape), len(shape) - 1))
    heads = draw(st.integers(1, min(4, shape[dim])))
    kind = draw(st.sampled_from(["all", "mask", "padding"]))
    tensors = make(
        shape, draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16])), heads,
        gaussians=draw(st.integers(1, 6)), seed=draw(st.integers(0, 999)), keep=0.7 if kind == "mask" else None,
        padding=0.5 if kind == "padding" else None,
    )  # fmt: skip
    order = draw(st.permutations(range(len(shape))))
    inverse = sorted(range(len(shape)), key=order.__getitem__)
    tensors["x"] = tensors["x"].permute(order).contiguous().permute(inverse)
    return tensors, {
        "dim": dim, "num_heads": heads, "normalization": draw(st.sampled_from(["stable", "clamped"])), "eps": 0.01,
        "return_weights": draw(st.booleans()), "padding_value": 0.5 if kind == "padding" else None,
    }  # fmt: skip


@kernels
@given(case=cases())
@settings(max_examples=60, deadline=None, derandomize=True,
          suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])  # fmt: skip
def test_any_call_keeps_the_tolerance(backend, device, case):
    tensors, options = case
    check(backend, tensors, device, **options)


# ---- what only the CPU kernels do


@cpp_only
@dtypes
@normalizations
@pytest.mark.parametrize("options", [{}, {"keep": 0.7}, {"padding": 0.5}], ids=["all", "mask", "padding"])
@pytest.mark.parametrize("shape, dim", [((6, 64), 1), ((5, 33), 1), ((40, 70), 0), ((2, 30, 3), 1)])
def test_every_instruction_set(isa, dtype, normalization, options, shape, dim):
    check("cpp", make(shape, dtype, heads=2, **options), dim=dim, num_heads=2, normalization=normalization,
          return_weights=True, padding_value=options.get("padding"))  # fmt: skip


@cpp_only
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("keep", [None, 0.9])
@pytest.mark.parametrize("shape, dim", [((1, 40001), 1), ((5, 17000), 1), ((1200, 33), 0)])
def test_slices_longer_than_a_tile(isa, dtype, keep, shape, dim):
    """They are read block by block, and the blocks joined."""
    check("cpp", make(shape, dtype, keep=keep, offset=3.0), dim=dim, return_weights=True)


@cpp_only
@pytest.mark.parametrize("shape, dim", [((1, 50000), 1), ((300, 129), 1), ((60, 700), 0)])
def test_results_do_not_depend_on_the_number_of_threads(threads, shape, dim):
    tensors, results = make(shape, heads=3), []
    for count in (1, 3, 8):
        threads(count)
        results.append(run("cpp", tensors, dim=dim, num_heads=3))
    for name in results[0]:
        assert all(torch.equal(results[0][name], other[name]) for other in results[1:]), name


@cpp_only
@normalizations
@pytest.mark.parametrize("options", [{}, {"keep": 0.6}, {"padding": 0.5}], ids=["all", "mask", "padding"])
@pytest.mark.parametrize("shape, dim", [((3, 19), 1), ((7, 18), 0)])
def test_cpp_gradients_pass_gradcheck(normalization, options, shape, dim):
    tensors = make(shape, torch.float64, heads=2, **options)
    mask = tensors.pop("mask")

    def attention(x, mean_offset, width):
        return trifuse.gaussian_adaptive_attention(
            x, mean_offset, width, dim=dim, num_heads=2, mask=mask, padding_value=options.get("padding"),
            normalization=normalization, eps=1e-2, return_weights=True,
        )  # fmt: skip

    inputs = [tensor.requires_grad_() for tensor in tensors.values()]
    if "padding" in options:
        inputs[0].requires_grad_(False)
    with trifuse.backend("cpp"):
        assert torch.autograd.gradcheck(attention, inputs)


@cpp_only
@pytest.mark.parametrize("eps, clamped", [(1e-8, False), (1e3, True)])
def test_gradients_where_the_clamp_acts(eps, clamped):
    tensors = make((4, 30), torch.float64, gaussians=4)
    weights = attend("cpp", tensors, normalization="clamped", eps=eps, return_weights=True)[1]
    assert (bool((weights.sum(1) < 0.9).all()), bool((weights.sum(1) > 1 - 1e-12).all())) == (clamped, not clamped)
    check("cpp", tensors, normalization="clamped", eps=eps, return_weights=True)


@cpp_only
@pytest.mark.parametrize("dim", [1, 2])
def test_little_is_kept_for_the_backward_pass(dim):
    kept = {}

    def pack(x):
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    x = torch.randn(8, 512, 1024, requires_grad=True)
    parameters = [torch.randn(8, 5, requires_grad=True) for _ in range(2)]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x), trifuse.backend("cpp"):
        trifuse.gaussian_adaptive_attention(x, *parameters, dim=dim, num_heads=8)
    assert x.data_ptr() in kept
    assert sum(kept.values()) < 1.1 * x.nbytes


@cpp_only
def test_a_width_may_be_so_small_that_one_entry_takes_all():
    x = torch.tensor([[0.0, 1.0, 2.0, 4.0]])
    found = attend("cpp", {"x": x, "mean_offset": torch.zeros(1), "width": torch.tensor([1e-9])}, return_weights=True)
    assert torch.equal(found[1], torch.tensor([[0.0, 0.0, 1.0, 0.0]]))
    assert math.isclose(found[0].sum().item(), 2.0)
