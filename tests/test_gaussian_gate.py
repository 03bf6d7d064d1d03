"""gaussian_gate: the reference against closed forms, then every kernel that this machine can run against the
reference. On a GPU the same statements are made of `cuda` and `triton`."""

import math

import pytest
import torch
from backends_here import cpp_only, kernels_of
from gate_cases import KINDS, check, make, run
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import trifuse

kernels = kernels_of("cuda", "triton")
kinds = pytest.mark.parametrize("kind", KINDS)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)


@pytest.fixture(autouse=True)
def nan_in_fresh_memory(poisoned_memory):
    """Every test runs on poisoned allocations."""


def double(call):
    wide = {
        name: value.double() for name, value in call.items() if torch.is_tensor(value) and value.is_floating_point()
    }
    return call | {name: value.requires_grad_() for name, value in wide.items()}


# ---- the reference, against what can be computed by hand


def test_reference_feature_gate_is_the_papers_formula():
    call = double(make("feature", (4, 9, 5), dim=1))
    x, offset, width = call["x"], call["mean_offset"], call["width"]
    mean = x.mean(1, keepdim=True)
    v = ((x**2).mean(1, keepdim=True) - mean**2).abs() + 1e-8
    expected = x * torch.exp(-(((x - mean - offset) / (v + 1e-5).sqrt()) ** 2) / (2 * width))
    with trifuse.backend("reference"):
        torch.testing.assert_close(trifuse.gaussian_gate(**call), expected)


def test_reference_context_gate_is_what_its_published_code_computes():
    x, c = torch.randn(3, 16, 1, 1, dtype=torch.float64), 2.0
    mean = x.mean(1, keepdim=True)
    z = (x - mean) / ((x**2).mean(1, keepdim=True) - mean**2 + 1e-5).sqrt()
    with trifuse.backend("reference"):
        gate = trifuse.gaussian_gate(x, width=c**-0.5, kind="context", dim=1, multiply=False)
    torch.testing.assert_close(gate, torch.exp(-(z**2) / 2 * c), rtol=1e-7, atol=1e-9)  # the width is a float32


def test_reference_density_gate_is_one_plus_a_mean_of_normal_densities():
    call = double(make("density", (2, 11), heads=2, gaussians=3, multiply=False))
    with trifuse.backend("reference"):
        gate = trifuse.gaussian_gate(**call)
    for h, part in enumerate((slice(0, 5), slice(5, 11))):
        x = call["x"][:, part]
        sigma = call["width"][h] * (x.var(1, keepdim=True) + 1e-8).sqrt()
        z = (x - x.mean(1, keepdim=True))[..., None] - call["mean_offset"][h]
        density = torch.exp(-((z / sigma[:, None]) ** 2) / 2) / math.sqrt(2 * math.pi)
        torch.testing.assert_close(gate[:, part], 1 + call["alpha"][h] * density.mean(-1))


@kinds
@pytest.mark.parametrize("mask", [None, 0.6])
def test_reference_gradients_pass_gradcheck_twice(kind, mask):
    call = double(make(kind, (2, 5, 3), heads=2 if kind == "density" else 1, gaussians=2, mask=mask))
    names = [name for name in ("x", "mean_offset", "width", "alpha") if name in call]

    def gate(*tensors):
        return trifuse.gaussian_gate(**(call | dict(zip(names, tensors, strict=True))))

    with trifuse.backend("reference"):
        assert torch.autograd.gradcheck(gate, [call[name] for name in names])
        assert torch.autograd.gradgradcheck(gate, [call[name] for name in names])


# ---- every kernel


@kernels
@kinds
@dtypes
@pytest.mark.parametrize("dim", [0, 1, 2])
@pytest.mark.parametrize("mask", [None, 0.6])
@pytest.mark.parametrize("multiply", [True, False])
def test_all_options_at_once(backend, device, kind, dtype, dim, mask, multiply):
    heads = 3 if kind == "density" else 1
    check(
        backend, make(kind, (9, 20, 37), dim, (dim + 1) % 3, heads, dtype=dtype, mask=mask, multiply=multiply), device
    )


@kernels
@kinds
@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 63, 64, 65, 1000])
@pytest.mark.parametrize("last", [True, False])
def test_lengths_around_a_vector(backend, device, kind, length, last):
    shape, dim = ((3, 5, length), 2) if last else ((3, length, 18), 1)
    check(backend, make(kind, shape, dim, 0), device)


@kernels
@kinds
@pytest.mark.parametrize("inner", [1, 2, 7, 8, 15, 16, 17, 63, 64, 65, 130])
def test_any_number_of_slices_side_by_side(backend, device, kind, inner):
    check(backend, make(kind, (2, 19, inner), 1, 2), device)


@kernels
@kinds
@pytest.mark.parametrize("shape, dim", [((1, 70001), 1), ((9001, 20), 0)])
def test_slices_longer_than_any_cache(backend, device, kind, shape, dim):
    check(backend, make(kind, shape, dim, 1 - dim, mask=0.9), device)


@kernels
@pytest.mark.parametrize("feature_dim", [0, 1, 3, -1])
def test_features_lie_on_any_axis(backend, device, feature_dim):
    check(backend, make("feature", (3, 4, 6, 5), 2, feature_dim), device)
    permuted = make("feature", (3, 4, 6, 5), 2, feature_dim)
    permuted["x"] = permuted["x"].permute(3, 1, 2, 0).contiguous().permute(3, 1, 2, 0)
    check(backend, permuted, device)


@kernels
@kinds
@dtypes
def test_strided_permuted_and_expanded_inputs(backend, device, kind, dtype):
    call = make(kind, (4, 20, 33), 1, 2, dtype=dtype, mask=0.7)
    whole = call["x"]
    for x in (
        whole.repeat_interleave(3, dim=2)[:, :, ::3],
        whole.transpose(0, 2).contiguous().transpose(0, 2),
        whole.transpose(1, 2).contiguous().transpose(1, 2),
        whole.flip(1)[:1].expand(4, -1, -1),
    ):
        assert x.shape == whole.shape
        check(backend, call | {"x": x}, device)
    for mask in (
        call["mask"][:, :, :1],
        call["mask"][0, :, 0][:, None],
        call["mask"].transpose(0, 2).contiguous().mT.mT,
    ):
        if mask.shape[0] == 33:
            mask = mask.transpose(0, 2)
        check(backend, call | {"mask": mask}, device)


@kernels
@kinds
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 2, 0)])
def test_the_output_lies_in_memory_as_x_does(backend, device, kind, order):
    call = make(kind, (4, 5, 6), 1, 2)
    inverse = sorted(range(3), key=order.__getitem__)
    call["x"] = call["x"].permute(order).contiguous().permute(inverse).to(device)
    call |= {name: value.to(device) for name, value in call.items() if torch.is_tensor(value)}
    with trifuse.backend(backend):
        assert trifuse.gaussian_gate(**call).stride() == call["x"].stride()


@kernels
@pytest.mark.parametrize("heads", [1, 3, 7, 20])
@pytest.mark.parametrize("gaussians", [1, 2, 16])
@pytest.mark.parametrize("dim", [1, 2])
def test_heads_that_do_not_divide_and_any_number_of_gaussians(backend, device, heads, gaussians, dim):
    check(backend, make("density", (2, 20, 23), dim, heads=heads, gaussians=gaussians), device)


@kernels
@kinds
@pytest.mark.parametrize("dim", [0, 1])
def test_entries_far_from_zero_keep_their_precision(backend, device, kind, dim):
    check(backend, make(kind, (64, 65), dim, 1 - dim, away=1e4), device)
    first_far = make(kind, (64, 65), dim, 1 - dim)
    first_far["x"].select(dim, 0).mul_(1e4)
    check(backend, first_far, device)


@kernels
@dtypes
@kinds
def test_parameters_may_have_the_dtype_of_x(backend, device, kind, dtype):
    check(backend, make(kind, (3, 20, 18), 1, dtype=dtype, parameters=dtype), device)


@kernels
def test_shared_and_plain_parameters(backend, device):
    call = make("density", (2, 20, 5), heads=4)
    shared = call | {"mean_offset": call["mean_offset"][0], "width": call["width"][0], "alpha": torch.tensor(0.7)}
    check(backend, shared, device)
    check(backend, call | {"alpha": 0.25, "mean_offset": None}, device)
    check(backend, call | {"alpha": None, "eps": 0.5}, device)
    check(backend, make("context") | {"width": None}, device)
    check(backend, make("context") | {"width": -0.75, "eps": 0.5}, device)
    check(backend, make("context") | {"width": torch.tensor([0.75])}, device)
    check(backend, make("feature") | {"mean_offset": None, "eps": 0.5}, device)


@kernels
@kinds
@pytest.mark.parametrize("shape, dim", [((0, 5), 1), ((5, 0), 1), ((0, 5), 0), ((3, 0, 4), 0)])
def test_empty_inputs(backend, device, kind, shape, dim):
    results = run(backend, make(kind, shape, dim, 1 - dim), device=device)
    assert results["out"].shape == shape and results["dx"].shape == shape
    assert not any(value.any() for value in results.values())


@kernels
@kinds
@pytest.mark.parametrize("dim", [0, 1])
def test_what_a_mask_leaves_out_takes_no_part_whatever_it_holds(backend, device, kind, dim):
    call = make(kind, (40, 41), dim, 1 - dim, mask=0.5)
    clean = run(backend, call, device=device)
    call["x"][~call["mask"]] = float("nan")
    dirty = run(backend, call, device=device)
    for name, value in clean.items():
        assert torch.equal(dirty[name], value), name
    for name in ("out", "dx"):
        assert not clean[name][~call["mask"]].any(), name


@kernels
@kinds
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("kept", [0, 1])
def test_slices_with_one_entry_or_none(backend, device, kind, dim, kept):
    call = make(kind, (20, 20), dim, 1 - dim)
    call["mask"] = torch.arange(20) < kept
    call["mask"] = call["mask"] if dim else call["mask"][:, None]
    check(backend, call, device)
    found = run(backend, call, device=device)
    assert all(value.isfinite().all() for value in found.values())
    if kept == 0:
        assert not any(value.any() for value in found.values())


@kernels
@kinds
@dtypes
@pytest.mark.parametrize("dim", [0, 1])
def test_constant_slices_have_one_gate_and_finite_gradients(backend, device, kind, dtype, dim):
    call = make(kind, (20, 33), dim, 1 - dim, dtype=dtype, multiply=False)
    call["x"] = torch.full_like(call["x"], 3.0)
    found = run(backend, call, device=device)
    assert all(value.isfinite().all() for value in found.values())
    assert torch.equal(found["out"], found["out"].select(dim, 0).unsqueeze(dim).expand(20, 33))
    check(backend, call, device)


@kernels
@kinds
@pytest.mark.parametrize("dim", [0, 1])
def test_nan_stays_in_its_slice(backend, device, kind, dim):
    call = make(kind, (33, 34), dim, 1 - dim, multiply=False)
    clean = run(backend, call, device=device)
    for bad in (float("nan"), float("inf")):
        spoiled = call | {"x": call["x"].clone()}
        spoiled["x"][7, 9] = bad
        found = run(backend, spoiled, device=device)
        for name in ("out", "dx"):
            for i in range(33 if dim else 34):
                same = torch.equal(found[name].select(1 - dim, i), clean[name].select(1 - dim, i))
                assert same == (i != (7 if dim else 9)), (name, i)
        assert not found["out"].select(1 - dim, 7 if dim else 9).isfinite().any()


@kernels
@kinds
@pytest.mark.parametrize("shape, dim", [((40, 300), 1), ((300, 70), 0)])
def test_results_are_bitwise_repeatable(backend, device, kind, shape, dim):
    call = make(kind, shape, dim, 1 - dim)
    first, second = (run(backend, call, device=device) for _ in range(2))
    for name in first:
        assert torch.equal(first[name], second[name]), name


@st.composite
def cases(draw):
    """Any call: shapes, axes, dtypes, options, orders of memory."""
    kind = draw(st.sampled_from(KINDS))
    shape = tuple(draw(st.lists(st.integers(1, 20), min_size=2 if kind == "feature" else 1, max_size=4)))
    dim = draw(st.integers(0, len(shape) - 1))
    feature_dim = draw(st.integers(0, len(shape) - 1).filter(lambda axis: axis != dim)) if kind == "feature" else None
    dtype = draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
    call = make(
        kind, shape, dim, feature_dim, dtype=dtype, seed=draw(st.integers(0, 999)),
        heads=draw(st.integers(1, shape[dim])) if kind == "density" else 1, gaussians=draw(st.integers(1, 5)),
        mask=draw(st.sampled_from([None, 0.3, 0.8])), multiply=draw(st.booleans()),
        away=draw(st.sampled_from([0.0, 50.0])), parameters=draw(st.sampled_from([torch.float32, dtype])),
    )  # fmt: skip
    order = draw(st.permutations(range(len(shape))))
    inverse = sorted(range(len(shape)), key=order.__getitem__)
    call["x"] = call["x"].permute(order).contiguous().permute(inverse)
    return call


@kernels
@given(call=cases())
@settings(max_examples=60, deadline=None, derandomize=True,
          suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])  # fmt: skip
def test_any_call_keeps_the_tolerance(backend, device, call):
    check(backend, call, device)


# ---- what only the CPU kernels do


@cpp_only
@kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("shape, dim", [((3, 70, 37), 1), ((5, 71), 1)])
def test_every_instruction_set(isa, kind, dtype, shape, dim):
    for mask in (None, 0.7):
        heads = 2 if kind == "density" else 1
        check("cpp", make(kind, shape, dim, 0, heads, dtype=dtype, mask=mask, parameters=None))


@cpp_only
@kinds
@pytest.mark.parametrize("shape, dim", [((5, 30011), 1), ((5003, 20), 0)])
def test_long_slices_in_double_precision(isa, kind, shape, dim):
    check("cpp", make(kind, shape, dim, 1 - dim, dtype=torch.float64, parameters=None))


@cpp_only
@kinds
@pytest.mark.parametrize("shape, dim", [((40, 300), 1), ((300, 70), 0), ((3, 50, 9, 20), 1)])
def test_results_do_not_depend_on_the_number_of_threads(threads, kind, shape, dim):
    call, results = make(kind, shape, dim, 0 if dim else 1), []
    for count in (1, 3, 8):
        threads(count)
        results.append(run("cpp", call))
    for name in results[0]:
        assert all(torch.equal(results[0][name], other[name]) for other in results[1:]), name


@cpp_only
@kinds
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("mask", [None, 0.6])
def test_cpp_gradients_pass_gradcheck(kind, dim, mask):
    heads = 2 if kind == "density" else 1
    call = double(make(kind, (9, 11), dim, 1 - dim, heads, 2, dtype=torch.float64, parameters=None, mask=mask))
    names = [name for name in ("x", "mean_offset", "width", "alpha") if name in call]

    def gate(*tensors):
        return trifuse.gaussian_gate(**(call | dict(zip(names, tensors, strict=True))))

    with trifuse.backend("cpp"):
        assert torch.autograd.gradcheck(gate, [call[name] for name in names])


@cpp_only
def test_only_x_three_numbers_per_slice_and_parameters_are_kept_for_the_backward_pass():
    saved = {}

    def pack(x):
        saved[x.data_ptr()] = x.numel()
        return x

    call = make("feature", (4, 512, 64))
    for name in ("x", "mean_offset", "width"):
        call[name].requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x), trifuse.backend("cpp"):
        trifuse.gaussian_gate(**call)
    assert saved.pop(call["x"].data_ptr()) == call["x"].numel()
    assert sorted(saved.values()) == [64, 64, 3 * 4 * 64]
