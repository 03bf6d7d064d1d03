"""gmm_attention_step: the reference against closed forms, then every kernel that this machine can run against the
reference. On a GPU the same statements are made of `triton`."""

import math
import mmap

import pytest
import torch
from backends_here import cpp_only, kernels_of
from gmm_cases import check, make, run
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tolerance import compare, error

import trifuse

kernels = kernels_of("triton")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
every_dtype = pytest.mark.parametrize("dtype", DTYPES)


@pytest.fixture(autouse=True)
def nan_in_fresh_memory(poisoned_memory):
    """Every test runs on poisoned allocations."""


def call(backend, tensors, device="cpu", **options):
    with trifuse.backend(backend):
        return trifuse.gmm_attention_step(**{name: x.to(device) for name, x in tensors.items()}, **options)


# ---- the reference, against what can be computed by hand


def test_reference_is_the_normal_density_at_the_moved_mean():
    tensors = make(batch=1, components=1, length=50, dtype=torch.float64)
    context, mean_new, alignment = call("reference", tensors, return_alignment=True)
    mean = tensors["mean"] + torch.log1p(tensors["delta"].exp())
    torch.testing.assert_close(mean_new, mean)
    normal = torch.distributions.Normal(mean[0, 0], tensors["sigma"][0, 0])
    density = tensors["weight"][0, 0] * normal.log_prob(torch.arange(50, dtype=torch.float64)).exp()
    torch.testing.assert_close(alignment[0], density)
    torch.testing.assert_close(context[0], density @ tensors["values"][0])


def test_reference_attends_to_one_position_when_the_widths_are_small():
    """A mean on a whole number with a width of 0.01: the density there, nothing anywhere else."""
    values = torch.randn(1, 12, 5, dtype=torch.float64)
    delta = torch.full((1, 1), math.log(math.expm1(3.0)), dtype=torch.float64)  # softplus of it is 3
    narrow = torch.full((1, 1), 0.01, dtype=torch.float64)
    weight, mean = torch.full((1, 1), math.sqrt(2 * math.pi) * 0.01), torch.full((1, 1), 4.0)
    with trifuse.backend("reference"):
        context, mean_new = trifuse.gmm_attention_step(values, weight.double(), delta, narrow, mean.double())
    torch.testing.assert_close(mean_new, torch.full_like(mean_new, 7.0))
    torch.testing.assert_close(context, values[:, 7], rtol=1e-6, atol=1e-6)


def test_a_wide_mixture_inside_a_long_sequence_sums_to_its_weights():
    tensors = make(length=2000, spread=10.0, dtype=torch.float64)
    tensors["mean"] = tensors["mean"] * 0.5 + 600
    _, _, alignment = call("reference", tensors, return_alignment=True)
    torch.testing.assert_close(alignment.sum(1), tensors["weight"].sum(1))


def test_reference_gradients_pass_gradcheck_twice():
    tensors = make(length=7, width=3, dtype=torch.float64, masked=True)
    padding = tensors.pop("key_padding_mask")

    def step(*args):
        return trifuse.gmm_attention_step(*args, key_padding_mask=padding, return_alignment=True)

    with trifuse.backend("reference"):
        inputs = [tensor.requires_grad_() for tensor in tensors.values()]
        assert torch.autograd.gradcheck(step, inputs)
        assert torch.autograd.gradgradcheck(step, inputs)


# ---- every kernel


@kernels
@every_dtype
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("mixture", [None, "values"])
def test_every_dtype_with_and_without_padding(backend, device, dtype, masked, mixture):
    check(backend, make(dtype=dtype, masked=masked, mixture_dtype=dtype if mixture else None), device)


@kernels
@pytest.mark.parametrize("length", [0, 1, 2, 15, 16, 17, 63, 64, 65, 1000])
def test_any_length(backend, device, length):
    check(backend, make(length=length, spread=12.0), device)


@kernels
@pytest.mark.parametrize("width", [0, 1, 7, 15, 16, 17, 64, 130, 512])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_width(backend, device, width, dtype):
    check(backend, make(width=width, dtype=dtype), device)


@kernels
@pytest.mark.parametrize("components", [0, 1, 2, 8, 16, 17, 33])
def test_any_number_of_components(backend, device, components):
    check(backend, make(components=components), device)


@kernels
@pytest.mark.parametrize("shape", [(0, 37, 20), (2, 0, 20), (2, 37, 0), (2, 0, 0)])
def test_empty_inputs(backend, device, shape):
    batch, length, width = shape
    results = run(backend, make(batch=batch, length=length, width=width), device=device)
    assert results["context"].shape == (batch, width) and not results["context"].any()
    assert results["dvalues"].shape == shape and results["alignment"].shape == (batch, length)


@kernels
@every_dtype
def test_strided_and_expanded_inputs(backend, device, dtype):
    tensors = make(length=40, width=24, dtype=dtype, masked=True)
    tensors["values"] = tensors["values"].transpose(1, 2).contiguous().transpose(1, 2)  # time innermost
    stacked = torch.stack([tensors[name] for name in ("weight", "delta", "sigma")], dim=2)  # a projection's chunks
    tensors |= dict(zip(("weight", "delta", "sigma"), stacked.unbind(2), strict=True))
    tensors["key_padding_mask"] = tensors["key_padding_mask"][:1].expand(2, -1)
    check(backend, tensors, device)
    tensors["values"] = tensors["values"].contiguous().flip(1)[:1].expand(2, -1, -1)
    check(backend, tensors, device)
    tensors["values"] = tensors["values"].contiguous()[:, ::2, ::3]
    tensors["key_padding_mask"] = tensors["key_padding_mask"][:, ::2]
    check(backend, tensors, device)


@kernels
@pytest.mark.parametrize("grads", [("context",), ("mean_new",), ("alignment",), ("context", "mean_new")])
def test_gradients_of_any_outputs(backend, device, grads):
    check(backend, make(masked=True), device, grads=grads)


@kernels
def test_values_that_need_no_gradient_get_none(backend, device):
    tensors = {name: x.to(device) for name, x in make().items()}
    wanted = [tensors[name].requires_grad_() for name in ("weight", "delta", "sigma", "mean")]
    with trifuse.backend(backend):
        found = torch.autograd.grad(trifuse.gmm_attention_step(**tensors)[0].square().sum(), wanted)
        tensors["values"].requires_grad_()
        expected = torch.autograd.grad(trifuse.gmm_attention_step(**tensors)[0].square().sum(), wanted)
    for got, needed in zip(found, expected, strict=True):
        assert torch.equal(got, needed)


@kernels
@pytest.mark.parametrize("away", [1.0, 2.0, 11.0, 13.3, 14.2, 15.0, 30.0])
def test_means_far_from_every_position(backend, device, away):
    """At 13 to 14 widths a float density is subnormal, beyond that 0."""
    tensors = make(length=50, components=1, spread=5.0)
    tensors["mean"] = 49 + away * tensors["sigma"]
    tensors["delta"] = torch.full_like(tensors["delta"], -20.0)
    check(backend, tensors, device, moved=("values", "weight"))
    assert run(backend, tensors, device=device)["alignment"].any() == (away < 14.5)


@kernels
@pytest.mark.parametrize("sigma", [1e-12, 1e-3, 0.05, 1e4, 1e12])
def test_widths_of_any_size(backend, device, sigma):
    tensors = make(length=80)
    tensors["mean"] = tensors["mean"].round()
    tensors["delta"] = torch.full_like(tensors["delta"], -200.0)  # the means stay on positions
    tensors["sigma"] = torch.full_like(tensors["sigma"], sigma)
    check(backend, tensors, device)


@kernels
@pytest.mark.parametrize("sigma", [1e-20, 1e-25])
def test_a_width_next_to_nothing_is_a_density_next_to_infinity(backend, device, sigma):
    tensors = make(length=80)
    tensors["mean"] = tensors["mean"].round()
    tensors["delta"] = torch.full_like(tensors["delta"], -200.0)
    tensors["sigma"] = torch.full_like(tensors["sigma"], sigma)
    check(backend, tensors, device, grads=(), moved=("values", "weight"))


@kernels
def test_softplus_at_both_ends(backend, device):
    tensors = make(components=8)
    tensors["delta"] = torch.tensor([-200.0, -87.0, -20.0, -1e-3, 0.0, 19.9, 20.1, 25.0]).expand(2, -1)
    tensors["mean"] = torch.zeros(2, 8)
    check(backend, tensors, device)


@kernels
def test_a_weight_of_zero_still_gets_its_gradient(backend, device):
    tensors = make(components=2)
    tensors["weight"][:] = torch.tensor([0.0, 1.0])
    check(backend, tensors, device)
    tensors["weight"][:] = 0.0
    check(backend, tensors, device)
    assert run(backend, tensors, device=device)["dweight"].abs().min() > 0


@kernels
def test_positions_that_take_no_part_are_not_read(backend, device):
    """NaN in padding, and where no density reaches, comes out nowhere."""
    tensors = make(length=200, spread=2.0, reach=0.2, masked=True)
    clean = run(backend, tensors, device=device)
    spoiled = dict(tensors, values=tensors["values"].clone())
    spoiled["values"][tensors["key_padding_mask"]] = float("nan")
    spoiled["values"][:, 150:] = float("inf")
    found = run(backend, spoiled, device=device)
    for name, value in found.items():
        assert torch.equal(value, clean[name]), name
    assert not found["alignment"][:, 150:].any() and not found["alignment"][tensors["key_padding_mask"]].any()
    assert not found["dvalues"][:, 150:].any()


@kernels
def test_a_sequence_of_padding_gives_zero(backend, device):
    tensors = make() | {"key_padding_mask": torch.tensor([True, False])[:, None].expand(2, 37)}
    found = run(backend, tensors, device=device, grads=("context", "alignment"))
    for name in ("context", "alignment", "dvalues", "dweight", "dsigma", "ddelta", "dmean"):
        assert not found[name][0].any() and found[name][1].any(), name
    check(backend, tensors, device)


@kernels
@pytest.mark.parametrize("name", ["values", "weight", "delta", "sigma", "mean"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_stays_in_its_batch_item(backend, device, name, bad):
    tensors = make(spread=30.0)
    clean = run(backend, tensors, device=device)
    spoiled = dict(tensors, **{name: tensors[name].clone()})
    spoiled[name][1, 0] = bad
    found = run(backend, spoiled, device=device)
    for key, value in found.items():
        assert torch.equal(value[0], clean[key][0]), key
    if math.isnan(bad) or name in ("values", "weight"):
        assert not found["context"][1].isfinite().all()


@kernels
@pytest.mark.parametrize("batch, length, width", [(1, 900, 512), (3, 100, 96)])
def test_results_are_bitwise_repeatable(backend, device, batch, length, width):
    tensors = make(batch=batch, length=length, width=width)
    first, second = (run(backend, tensors, device=device) for _ in range(2))
    for name in first:
        assert torch.equal(first[name], second[name]), name


@kernels
@pytest.mark.parametrize("length, spread", [(1000, 300.0), (1000, 8.0)])
def test_typical_sizes(backend, device, length, spread):
    check(backend, make(length=length, width=256, components=10, spread=spread), device)


@st.composite
def cases(draw):
    """Any call: shapes, strides, dtypes, mask, which gradients come in."""
    dtype = draw(st.sampled_from(DTYPES))
    tensors = make(
        batch=draw(st.integers(1, 4)), length=draw(st.integers(0, 90)), width=draw(st.integers(0, 70)),
        components=draw(st.integers(1, 20)), dtype=dtype, mixture_dtype=draw(st.sampled_from([None, dtype])),
        seed=draw(st.integers(0, 999)), masked=draw(st.booleans()),
        spread=draw(st.sampled_from([0.3, 2.0, 9.0, 60.0])), reach=draw(st.sampled_from([0.0, 0.5, 1.5])),
    )  # fmt: skip
    if draw(st.booleans()):
        tensors["values"] = tensors["values"].transpose(1, 2).contiguous().transpose(1, 2)
    return tensors, draw(st.sampled_from([("context",), ("alignment",), ("context", "mean_new", "alignment")]))


@kernels
@given(case=cases())
@settings(max_examples=60, deadline=None, derandomize=True,
          suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])  # fmt: skip
def test_any_call_keeps_the_tolerance(backend, device, case):
    tensors, grads = case
    check(backend, tensors, device, grads=grads)


# ---- what only the CPU kernels do


@cpp_only
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("length, spread, reach", [(70, 4.0, 0.7), (300, 0.5, 1.0), (100, 5.0, 2.0), (65, 1e3, 0.5)])
def test_every_instruction_set(isa, dtype, length, spread, reach):
    check("cpp", make(length=length, width=45, components=9, dtype=dtype, spread=spread, reach=reach, masked=True))


@cpp_only
@pytest.mark.parametrize("away", [11.0, 13.3, 14.2, 15.0])
def test_subnormal_densities_of_every_instruction_set(isa, away):
    tensors = make(length=50, components=1, spread=5.0)
    tensors["mean"] = 49 + away * tensors["sigma"]
    tensors["delta"] = torch.full_like(tensors["delta"], -20.0)
    tensors["values"][:, :47] *= 1e6  # far rows that would be missed
    check("cpp", tensors, moved=("values", "weight"))


@cpp_only
@pytest.mark.parametrize("batch, length, width", [(1, 900, 512), (5, 300, 200), (2, 300, 40)])
def test_results_do_not_depend_on_the_number_of_threads(threads, batch, length, width):
    tensors, results = make(batch=batch, length=length, width=width, spread=40.0), []
    for count in (1, 2, 3, 8):
        threads(count)
        results.append(run("cpp", tensors))
    for name in results[0]:
        assert all(torch.equal(results[0][name], other[name]) for other in results[1:]), name


@cpp_only
def test_cpp_gradients_pass_gradcheck(isa):
    tensors = make(length=19, width=5, dtype=torch.float64, masked=True)
    padding = tensors.pop("key_padding_mask")

    def step(*args):
        return trifuse.gmm_attention_step(*args, key_padding_mask=padding, return_alignment=True)

    with trifuse.backend("cpp"):
        assert torch.autograd.gradcheck(step, [tensor.requires_grad_() for tensor in tensors.values()], fast_mode=True)


@cpp_only
def test_long_sums_stay_as_exact_as_short_ones():
    """A hundred thousand positions of about equal weight."""
    tensors = make(batch=1, length=100_000, width=4, components=2, spread=60_000.0)
    exact, found = run("reference", tensors, exact=True), run("cpp", tensors)
    compare(found, exact, {name: error(x, exact[name]) for name, x in run("reference", tensors).items()})


@cpp_only
def test_nothing_of_the_size_of_positions_times_components_is_kept():
    saved = []
    tensors = {name: x.requires_grad_() for name, x in make(length=512, width=64, components=16).items()}
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x), trifuse.backend("cpp"):
        trifuse.gmm_attention_step(**tensors)
    assert max(x.numel() for x in saved if x.data_ptr() != tensors["values"].data_ptr()) == 2 * 512


@cpp_only
@pytest.mark.parametrize("strides", [(2**31 + 3, 50, 1), (500, 2**31 + 5, 1), (500, 20, 2**31 + 7)])
def test_offsets_beyond_32_bits(strides):
    """Values in address space that is reserved and never filled: a 32-bit offset would read zeros, or fall outside."""
    tensors = make(batch=2, length=5, width=3)
    try:
        mapping = mmap.mmap(-1, 2**36, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000)  # without reserving memory
    except OSError as error:
        pytest.skip(f"this machine does not reserve 64 GiB of address space: {error}")
    far = torch.frombuffer(mapping, dtype=torch.float32).as_strided((2, 5, 3), strides)
    far.copy_(tensors["values"])
    assert sum((n - 1) * s for n, s in zip(far.shape, strides, strict=True)) > 2**31
    near, found = run("cpp", tensors), run("cpp", dict(tensors, values=far))
    for name, value in found.items():
        torch.testing.assert_close(value, near[name])
