"""linear_scan: the reference against closed forms, then every kernel that this machine can run against the
reference. On a GPU the same statements are made of `cuda` and `triton`."""

import pytest
import torch
from backends_here import cpp_only, kernels_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from linear_scan_cases import check, make, run
from tolerance import error

import trifuse

PACKED = torch.tensor([0, 5, 5, 38, 64, 100, 100])

kernels = kernels_of("cuda", "triton")
# dtype of b and whether a is real beside it
KINDS = {
    "float32": (torch.float32, False), "float16": (torch.float16, False), "bfloat16": (torch.bfloat16, False),
    "complex64": (torch.complex64, False), "real a": (torch.complex64, True),
}  # fmt: skip
kinds = pytest.mark.parametrize("dtype, real_a", KINDS.values(), ids=KINDS)


@pytest.fixture(autouse=True)
def nan_in_fresh_memory(poisoned_memory):
    """Every test runs on poisoned allocations."""


# ---- the reference, against what can be computed by hand


@pytest.mark.parametrize("reverse", [False, True])
def test_reference_is_a_geometric_sum(reverse):
    T, a = 50, 0.7
    b = torch.ones(1, 1, T, dtype=torch.float64)
    with trifuse.backend("reference"):
        h, last = trifuse.linear_scan(a * b, b, reverse=reverse, return_last_state=True)
    exact = (1 - a ** torch.arange(1, T + 1, dtype=torch.float64)) / (1 - a)
    torch.testing.assert_close(h[0, 0].flip(0) if reverse else h[0, 0], exact, rtol=1e-13, atol=0)
    torch.testing.assert_close(last[0, 0], exact[-1], rtol=1e-13, atol=0)


def test_reference_is_a_cumulative_sum_and_a_cumulative_product():
    x = torch.randn(2, 3, 20, dtype=torch.complex128)
    with trifuse.backend("reference"):
        total = trifuse.linear_scan(torch.ones(1, 1, 1, dtype=x.dtype), x)
        product = trifuse.linear_scan(x, torch.zeros_like(x), torch.ones(2, 3, dtype=x.dtype))
    torch.testing.assert_close(total, x.cumsum(2))
    torch.testing.assert_close(product, x.cumprod(2))


@pytest.mark.parametrize("dtypes", [("f", "f"), ("c", "c"), ("f", "c")])
def test_reference_gradients_pass_gradcheck_twice(dtypes):
    a_dtype, dtype = ({"f": torch.float64, "c": torch.complex128}[one] for one in dtypes)
    tensors = [torch.randn(1, 2, 4, dtype=a_dtype), torch.randn(1, 2, 4, dtype=dtype), torch.randn(1, 2, dtype=dtype)]
    tensors = [tensor.requires_grad_() for tensor in tensors]

    def scan(*args):
        return trifuse.linear_scan(*args, return_last_state=True)

    with trifuse.backend("reference"):
        assert torch.autograd.gradcheck(scan, tensors)
        assert torch.autograd.gradgradcheck(scan, tensors)


# ---- every kernel


@kernels
@kinds
@pytest.mark.parametrize("layout", ["bdl", "bld"])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("reverse", [False, True])
def test_all_options_at_once(backend, device, dtype, real_a, reverse, packed, layout):
    cu_seqlens = PACKED if packed else None
    tensors = make(seqlen=100, layout=layout, dtype=dtype, real_a=real_a, cu_seqlens=cu_seqlens)
    check(backend, tensors, device, cu_seqlens=cu_seqlens, reverse=reverse, layout=layout)


@kernels
@pytest.mark.parametrize("reverse", [False, True])
def test_bare_call_needs_no_optional_argument(backend, device, reverse):
    check(backend, make(initial=False), device, last_grad=False, reverse=reverse)


@kernels
@pytest.mark.parametrize("seqlen", [0, 1, 15, 16, 17, 63, 64, 65, 127, 129, 1000])
@pytest.mark.parametrize("layout", ["bdl", "bld"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64])
def test_lengths_around_a_tile(backend, device, seqlen, layout, dtype):
    check(backend, make(dim=3, seqlen=seqlen, layout=layout, dtype=dtype), device, layout=layout)


@kernels
@pytest.mark.parametrize("dim", [1, 2, 7, 15, 16, 17, 33, 130])
@pytest.mark.parametrize("layout", ["bdl", "bld"])
def test_any_number_of_channels(backend, device, dim, layout):
    check(backend, make(dim=dim, layout=layout), device, layout=layout)


@kernels
@kinds
def test_strided_and_expanded_inputs(backend, device, dtype, real_a):
    tensors = make(dim=32, seqlen=40, dtype=dtype, real_a=real_a)
    tensors["a"] = tensors["a"].repeat_interleave(3, dim=2)[:, :, ::3]
    tensors["b"] = tensors["b"].transpose(1, 2).contiguous().transpose(1, 2)
    check(backend, tensors, device)
    tensors["b"] = tensors["b"].contiguous().flip(2)[:, 1:2].expand(-1, 32, -1)
    check(backend, tensors, device)


@kernels
@kinds
@pytest.mark.parametrize("layout", ["bdl", "bld"])
@pytest.mark.parametrize("shape", [(1, 20, 1), (2, 1, 37), (1, 1, 1)])
def test_a_may_be_given_once_where_it_does_not_vary(backend, device, dtype, real_a, shape, layout):
    tensors = make(dtype=dtype, real_a=real_a, layout=layout)
    whole = tensors["a"] if layout == "bdl" else tensors["a"].transpose(1, 2)
    once = whole[tuple(slice(size) for size in shape)] * 0.95
    tensors["a"] = (once if layout == "bdl" else once.transpose(1, 2)).to(whole.dtype)
    check(backend, tensors, device, layout=layout)


@kernels
def test_conjugate_views_are_conjugated(backend, device):
    tensors = {name: tensor.to(device) for name, tensor in make(dtype=torch.complex64).items()}
    with trifuse.backend(backend):
        found = trifuse.linear_scan(*(tensor.conj() for tensor in tensors.values()))
        wanted = trifuse.linear_scan(*tensors.values()).conj()
    torch.testing.assert_close(found, wanted)


@kernels
@pytest.mark.parametrize("shape", [(0, 20, 37), (2, 0, 37), (2, 20, 0)])
def test_empty_inputs(backend, device, shape):
    batch, dim, seqlen = shape
    tensors = make(batch=batch, dim=dim, seqlen=seqlen)
    results = run(backend, tensors, device=device)
    assert results["h"].shape == shape and results["last_state"].shape == (batch, dim)
    if seqlen == 0:
        assert torch.equal(results["last_state"], tensors["initial_state"])
        assert results["dinitial_state"].abs().min() > 0


@kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64])
@pytest.mark.parametrize("dim", [1, 40])
@pytest.mark.parametrize("seqlen", [60, 1100])
def test_growing_states_stay_right(backend, device, dtype, dim, seqlen):
    tensors = make(dim=dim, seqlen=seqlen, dtype=dtype, size=1.4 if seqlen == 60 else 1.06)
    check(backend, tensors, device)


@kernels
@pytest.mark.parametrize("dim", [1, 40])
def test_a_product_that_overflows_where_there_is_no_state(backend, device, dim):
    """The factors' product over the first half is beyond any float, and there is nothing for it to grow."""
    a, b = torch.full((1, dim, 4096), 1e30), torch.zeros(1, dim, 4096)
    a[..., 2048:], b[..., 2048:] = 0.5, 1.0
    with trifuse.backend(backend):
        h = trifuse.linear_scan(a.to(device), b.to(device)).cpu()
    assert not h[..., :2048].any()
    torch.testing.assert_close(h[..., 2100:], torch.full_like(h[..., 2100:], 2.0))


@kernels
def test_zero_factors_forget(backend, device):
    tensors = make(seqlen=64)
    tensors["a"][..., ::8] = 0
    check(backend, tensors, device)
    found = run(backend, tensors, device=device)
    assert torch.equal(found["h"][..., ::8], tensors["b"][..., ::8])
    assert not found["dinitial_state"].any()


@kernels
@pytest.mark.parametrize("layout", ["bdl", "bld"])
def test_nan_stays_in_its_channel_and_batch_item(backend, device, layout):
    tensors = make(batch=2, dim=32, layout=layout)
    clean = run(backend, tensors, device=device, layout=layout)
    for bad in (float("nan"), float("inf")):
        spoiled = dict(tensors, b=tensors["b"].clone())
        (spoiled["b"] if layout == "bdl" else spoiled["b"].transpose(1, 2))[1, 3, 5] = bad
        found = run(backend, spoiled, device=device, layout=layout)
        same = torch.ones(2, 32, dtype=torch.bool)
        same[1, 3] = False
        for name, value in found.items():
            expected = clean[name]
            if layout == "bld" and value.dim() == 3:
                value, expected = value.transpose(1, 2), expected.transpose(1, 2)
            assert torch.equal(value[same], expected[same]), name
        assert not found["last_state"][1, 3].isfinite()


@kernels
@pytest.mark.parametrize("reverse", [False, True])
def test_nan_stays_in_its_packed_sequence(backend, device, reverse):
    cu_seqlens = torch.tensor([0, 7, 12, 20])
    tensors = make(seqlen=20, cu_seqlens=cu_seqlens)
    options = {"cu_seqlens": cu_seqlens, "reverse": reverse, "device": device}
    clean = run(backend, tensors, **options)
    tensors["b"][..., 9] = float("nan")
    tensors["a"][..., 8] = float("inf")
    dirty = run(backend, tensors, **options)
    for name in ("h", "da", "db"):
        for part in (slice(0, 7), slice(12, 20)):
            assert torch.equal(dirty[name][..., part], clean[name][..., part]), name
    for name in ("last_state", "dinitial_state"):
        assert torch.equal(dirty[name][::2], clean[name][::2]), name


@kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64])
@pytest.mark.parametrize("dim, seqlen", [(1, 5000), (96, 100)])
def test_results_are_bitwise_repeatable(backend, device, dim, seqlen, dtype):
    tensors = make(dim=dim, seqlen=seqlen, dtype=dtype)
    first, second = (run(backend, tensors, device=device) for _ in range(2))
    for name in first:
        assert torch.equal(first[name], second[name]), name


@kernels
@pytest.mark.parametrize("reverse", [False, True])
def test_pieces_give_what_the_whole_gives(backend, device, reverse):
    tensors = make(seqlen=100, layout="bld")
    options = {"grads": False, "device": device, "layout": "bld", "reverse": reverse}
    whole = run(backend, tensors, **options)
    state, outs = tensors["initial_state"], []
    pieces = list(zip(*(tensors[name].split([1, 2, 61, 3, 33], dim=1) for name in "ab"), strict=True))
    for a, b in pieces[::-1] if reverse else pieces:
        part = run(backend, {"a": a, "b": b, "initial_state": state}, **options)
        outs.append(part["h"])
        state = part["last_state"]
    torch.testing.assert_close(torch.cat(outs[::-1] if reverse else outs, 1), whole["h"], rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(state, whole["last_state"], rtol=2e-6, atol=2e-6)


@st.composite
def cases(draw):
    """Any call: shapes, layout, dtype, options."""
    seqlen, cu_seqlens = draw(st.integers(0, 80)), None
    if draw(st.booleans()):
        cuts = sorted(draw(st.lists(st.integers(0, seqlen), max_size=4)))
        cu_seqlens = torch.tensor([0, *cuts, seqlen], dtype=draw(st.sampled_from([torch.int32, torch.int64])))
    dtype, real_a = draw(st.sampled_from(list(KINDS.values())))
    layout = draw(st.sampled_from(["bdl", "bld"]))
    tensors = make(
        batch=draw(st.integers(1, 3)), dim=draw(st.integers(1, 40)), seqlen=seqlen, layout=layout, dtype=dtype,
        real_a=real_a, seed=draw(st.integers(0, 999)), initial=draw(st.booleans()), cu_seqlens=cu_seqlens,
    )  # fmt: skip
    for name in "ab":  # the other layout's strides
        if draw(st.booleans()):
            tensors[name] = tensors[name].transpose(1, 2).contiguous().transpose(1, 2)
    options = {
        "cu_seqlens": cu_seqlens, "layout": layout, "reverse": draw(st.booleans()), "last_grad": draw(st.booleans()),
    }  # fmt: skip
    return tensors, options


@kernels
@given(case=cases())
@settings(max_examples=40, deadline=None, derandomize=True,
          suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])  # fmt: skip
def test_any_call_keeps_the_tolerance(backend, device, case):
    tensors, options = case
    check(backend, tensors, device, **options)


# ---- what only the CPU kernels do


@cpp_only
@pytest.mark.parametrize("layout", ["bdl", "bld"])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(
    "dtype, real_a",
    [*KINDS.values(), (torch.float64, False), (torch.complex128, False), (torch.complex128, True)],
    ids=[*KINDS, "float64", "complex128", "real double a"],
)
def test_every_instruction_set(isa, dtype, real_a, reverse, layout):
    check("cpp", make(dim=37, seqlen=70, layout=layout, dtype=dtype, real_a=real_a), layout=layout, reverse=reverse)


@cpp_only
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("layout", ["bdl", "bld"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize("dim", [1, 20])
def test_time_is_cut_when_channels_are_few(isa, dim, dtype, layout, reverse):
    check("cpp", make(batch=1, dim=dim, seqlen=1301, dtype=dtype, layout=layout), layout=layout, reverse=reverse)


@cpp_only
@pytest.mark.parametrize("dim, seqlen", [(1, 5000), (24, 5000), (200, 300)])
@pytest.mark.parametrize("layout", ["bdl", "bld"])
def test_results_do_not_depend_on_the_number_of_threads(threads, layout, dim, seqlen):
    tensors, results = make(dim=dim, seqlen=seqlen, layout=layout, size=0.95), []
    for count in (1, 3, 8):
        threads(count)
        results.append(run("cpp", tensors, layout=layout))
    for name in results[0]:
        assert all(torch.equal(results[0][name], other[name]) for other in results[1:]), name


@cpp_only
@pytest.mark.parametrize("dtypes", [("f", "f"), ("c", "c"), ("f", "c")])
@pytest.mark.parametrize("reverse", [False, True])
def test_cpp_gradients_pass_gradcheck(dtypes, reverse):
    a_dtype, dtype = ({"f": torch.float64, "c": torch.complex128}[one] for one in dtypes)
    tensors = [torch.randn(1, 3, 19, dtype=a_dtype), torch.randn(1, 3, 19, dtype=dtype), torch.randn(1, 3, dtype=dtype)]
    tensors[0] /= 1.5

    def scan(*args):
        return trifuse.linear_scan(*args, return_last_state=True, reverse=reverse)

    with trifuse.backend("cpp"):
        assert torch.autograd.gradcheck(scan, [tensor.requires_grad_() for tensor in tensors], fast_mode=True)


@cpp_only
@pytest.mark.parametrize("layout", ["bdl", "bld"])
@pytest.mark.parametrize("dim", [1, 40])
def test_rotations_keep_their_size_for_a_hundred_thousand_steps(layout, dim):
    """|a| = 1: nothing decays, so every rounding error stays. In complex64, against powers in complex128."""
    T = 100_000
    g = torch.Generator().manual_seed(0)
    a = torch.exp(2j * torch.pi * torch.rand(dim, generator=g, dtype=torch.float64)).to(torch.complex64)
    steps = torch.arange(1, T + 1, dtype=torch.float64)
    powers = torch.polar(a.to(torch.complex128).abs().log()[:, None].mul(steps).exp(),
                         a.to(torch.complex128).angle()[:, None] * steps)  # fmt: skip
    once = a[None, :, None] if layout == "bdl" else a[None, None, :]
    b = torch.zeros((1, dim, T) if layout == "bdl" else (1, T, dim), dtype=torch.complex64)
    with trifuse.backend("cpp"):
        h = trifuse.linear_scan(once.expand(b.shape), b, torch.ones(1, dim, dtype=torch.complex64), layout=layout)
    h = h[0] if layout == "bdl" else h[0].T
    # One rounding to complex64, and what the angles lose in float64.
    assert error(h, powers) <= torch.finfo(torch.float32).eps * powers.abs().max().item()


@cpp_only
def test_only_h_and_a_are_kept_for_the_backward_pass():
    saved = {}

    def pack(x):
        saved[x.data_ptr()] = x
        return x

    a, b = torch.rand(1, 64, 512, requires_grad=True), torch.randn(1, 64, 512, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x), trifuse.backend("cpp"):
        h = trifuse.linear_scan(a, b)
    assert set(saved) == {a.data_ptr(), h.data_ptr()}
