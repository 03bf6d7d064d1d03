"""lora_linear: the reference against closed forms, then every kernel that this machine can run against the reference.
Dropout has a file of its own."""

import mmap

import pytest
import torch
import torch.nn.functional as F
from backends_here import cpp_only, kernels_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lora_linear_cases import FLOATS, eager_errors, make, run
from lora_linear_cases import check as check_rounded
from tolerance import compare, in_double, incoming

import trifuse
from trifuse.registration import lora_linear as registration

pytestmark = pytest.mark.usefixtures("poisoned_memory")
kernels = kernels_of("cuda", "triton")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
every_dtype = pytest.mark.parametrize("dtype", DTYPES)
NAN = float("nan")


@pytest.fixture
def merged(monkeypatch):
    """The merged form wherever it can be had, and the sizes it was had for."""
    sizes = []
    monkeypatch.setattr(registration, "merged_is_cheaper", lambda *size: sizes.append(size) or True)
    return sizes


def call(backend, tensors, **options):
    with trifuse.backend(backend):
        return trifuse.lora_linear(**{"bias": None} | tensors, **options)


def check(backend, tensors, device="cpu", **options):
    """Assert the rule for everything that `backend` returns."""
    if tensors["x"].dtype != torch.float64:
        return check_rounded(backend, tensors, device, **options)
    exact, kernel = run("reference", tensors, exact=True, **options), run(backend, tensors, device=device, **options)
    single = {name: x.float() if isinstance(x, torch.Tensor) else x for name, x in tensors.items()}
    compare(kernel, exact, in_double(eager_errors(single, **options)))


def by_columns(matrix):
    """The same numbers, their columns contiguous."""
    return matrix.t().contiguous().t()


# ---- the reference, against what can be computed by hand


@pytest.mark.parametrize("vector", [False, True])
def test_reference_is_a_linear_layer_of_the_sum_of_the_weights(vector):
    tensors = make(dtype=torch.float64, vector=vector)
    weight = tensors["weight"] + tensors["lora_B"] * tensors["scale"] @ tensors["lora_A"]
    torch.testing.assert_close(call("reference", tensors), F.linear(tensors["x"], weight, tensors["bias"]))


def test_reference_at_an_active_rank_is_an_adapter_of_that_rank():
    """DyLoRA: alpha / b at rank b."""
    tensors = make(rank=7, dtype=torch.float64)
    for b in (1, 4, 7):
        nested = tensors | {"scale": 16 / b}
        cut = nested | {"lora_A": tensors["lora_A"][:b], "lora_B": tensors["lora_B"][:, :b]}
        torch.testing.assert_close(call("reference", nested, active_rank=b), call("reference", cut))


def test_reference_with_sums_of_scales_is_the_sum_of_nested_adapters():
    """Matryoshka: p_i is the sum of the scales of all ranks that hold i."""
    tensors, ranks, scales = make(rank=8, dtype=torch.float64), (2, 4, 8), (1.5, 0.75, 0.25)
    vector = sum(scale * (torch.arange(8) < rank).double() for rank, scale in zip(ranks, scales, strict=True))
    base = F.linear(tensors["x"], tensors["weight"], tensors["bias"])
    parts = [
        call("reference", tensors | {"scale": scale}, active_rank=rank) - base
        for rank, scale in zip(ranks, scales, strict=True)
    ]
    torch.testing.assert_close(call("reference", tensors | {"scale": vector}), base + sum(parts))


def test_reference_gradients_are_the_formulas():
    tensors = make(dtype=torch.float64, vector=True)
    found = run("reference", tensors)
    x, weight, _, A, B, p = (tensors[name] for name in FLOATS)
    dy = incoming(found["y"].shape, torch.Generator().manual_seed(99)).double()  # as run draws it
    S, Z = x @ A.t(), dy @ B
    expected = {"dlora_B": dy.t() @ (S * p), "dlora_A": (Z * p).t() @ x, "dx": dy @ weight + (Z * p) @ A}
    expected |= {"dscale": (S * Z).sum(0), "dweight": dy.t() @ x, "dbias": dy.sum(0)}
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, msg=name)


def floats():
    tensors = make(rows=3, columns=5, out=3, rank=3, dtype=torch.float64, vector=True)
    return [tensors[name].requires_grad_() for name in FLOATS]


def linear(x, weight, bias, lora_A, lora_B, scale):
    return trifuse.lora_linear(x, weight, bias, lora_A, lora_B, scale, active_rank=2, dropout=0.3, seed=11)


def test_reference_gradients_pass_gradcheck_twice():
    with trifuse.backend("reference"):
        assert torch.autograd.gradcheck(linear, floats())
        assert torch.autograd.gradgradcheck(linear, floats())


# ---- every kernel


@kernels
@every_dtype
@pytest.mark.parametrize("adapter", ["float32", "of x"])
@pytest.mark.parametrize("vector", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_every_dtype(backend, device, dtype, adapter, vector, bias):
    adapter = torch.float32 if adapter == "float32" else dtype
    check(backend, make(dtype=dtype, adapter_dtype=adapter, vector=vector, bias=bias), device)


@kernels
@pytest.mark.parametrize("rows", [0, 1, 63, 64, 65, 255, 256, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_number_of_rows(backend, device, rows, dtype):
    check(backend, make(rows=rows, dtype=dtype, vector=True), device)
    check(backend, make(rows=rows, dtype=dtype), device)


@kernels
@pytest.mark.parametrize("columns, out", [(0, 3), (3, 0), (1, 1), (3, 130), (131, 3), (16, 64), (257, 33), (530, 65)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_any_width(backend, device, columns, out, dtype):
    check(backend, make(rows=20, columns=columns, out=out, dtype=dtype), device)
    check(backend, make(rows=20, columns=columns, out=out, dtype=dtype, vector=True), device)


@kernels
@pytest.mark.parametrize("rank", range(1, 34))
def test_any_rank(backend, device, rank):
    check(backend, make(rows=20, rank=rank, vector=True), device)


@kernels
@pytest.mark.parametrize("rank, active", [(2, 1), (8, 3), (9, 8), (16, 5), (33, 32), (64, 17)])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("vector", [False, True])
def test_any_active_rank(backend, device, rank, active, frozen, vector):
    check(backend, make(rank=rank, vector=vector), device, active_rank=active, frozen=frozen)


@kernels
@every_dtype
@pytest.mark.parametrize("active", [1, 4, 5, 6])
def test_frozen_moves_the_last_active_rank_alone(backend, device, dtype, active):
    tensors = make(rank=6, dtype=dtype, vector=True)
    whole = run(backend, tensors, device=device, active_rank=active)
    found = run(backend, tensors, device=device, active_rank=active, frozen=True)
    here = torch.arange(6) == active - 1
    for name, axis in (("dlora_A", 0), ("dlora_B", 1), ("dscale", 0)):
        moved = found[name].movedim(axis, 0)
        assert not moved[~here].any() and moved[here].any(), name
        torch.testing.assert_close(moved[here], whole[name].movedim(axis, 0)[here])
    for name in ("y", "dx", "dweight", "dbias"):
        assert torch.equal(found[name], whole[name]), name


@kernels
def test_ranks_that_are_not_active_are_not_read(backend, device):
    tensors = make(rank=9, vector=True)
    clean = run(backend, tensors, device=device, active_rank=2)
    tensors["lora_A"][2:], tensors["lora_B"][:, 2:], tensors["scale"][2:] = NAN, NAN, NAN
    found = run(backend, tensors, device=device, active_rank=2)
    for name, value in found.items():
        assert torch.equal(value, clean[name]), name
    assert not (found["dlora_A"][2:].any() or found["dlora_B"][:, 2:].any() or found["dscale"][2:].any())


@kernels
@every_dtype
@pytest.mark.parametrize("vector", [False, True])
def test_leading_axes_and_strides(backend, device, dtype, vector):
    check(backend, make(lead=(2, 3), rows=5, dtype=dtype, vector=vector), device)
    check(backend, make(rows=5, dtype=dtype, vector=vector) | {"x": make(rows=1, dtype=dtype)["x"][0]}, device)
    tensors = make(rows=40, columns=80, out=48, dtype=dtype, vector=vector)
    tensors |= {"x": tensors["x"][::2, 1::2], "bias": tensors["bias"].repeat_interleave(2)[::2]}
    tensors |= {"weight": by_columns(tensors["weight"][:, ::2]), "lora_A": tensors["lora_A"][:, ::2]}
    check(backend, tensors, device)
    tensors |= {"lora_A": tensors["lora_A"].repeat(1, 2)[:, :40], "lora_B": by_columns(tensors["lora_B"])}
    tensors |= {"x": tensors["x"].contiguous()[:1].expand(20, -1), "bias": tensors["bias"][:1].expand(48)}
    check(backend, tensors, device)
    tensors |= {"x": torch.randn(4, 40, 3).permute(2, 0, 1).to(dtype), "lora_A": tensors["lora_A"][:1].expand(4, -1)}
    check(backend, tensors, device)


@kernels
@pytest.mark.parametrize("name", FLOATS)
@pytest.mark.parametrize("frozen", [False, True])
def test_each_gradient_alone_is_that_of_all_together(backend, device, name, frozen):
    tensors, options = make(rows=300, columns=70, vector=True), {"frozen": frozen, "dropout": 0.1, "seed": 8}
    alone = run(backend, tensors, device=device, needs=(name,), **options)
    together = run(backend, tensors, device=device, **options)
    assert alone.keys() == {"y", f"d{name}"}
    for one, value in alone.items():
        torch.testing.assert_close(value, together[one], rtol=1e-6, atol=1e-6)


@kernels
def test_no_gradient_no_difference(backend, device):
    for vector in (False, True):
        tensors = make(vector=vector)
        with torch.inference_mode():
            y = run(backend, tensors, device=device, needs=())["y"]
        assert torch.equal(y, run(backend, tensors, device=device)["y"])


@kernels
@pytest.mark.parametrize("bad", [NAN, float("inf")])
def test_nan_stays_in_its_row(backend, device, bad):
    tensors = make(rows=40)
    clean = run(backend, tensors, device=device, needs=("x",))
    tensors["x"][7, 3] = bad
    found = run(backend, tensors, device=device, needs=("x",))
    others = torch.arange(40) != 7
    assert torch.equal(found["y"][others], clean["y"][others]) and not found["y"][7].isfinite().any()
    assert torch.equal(found["dx"], clean["dx"])


@kernels
def test_an_adapter_of_zeros_is_the_layer_alone_and_still_learns(backend, device):
    tensors = make(bias=False)
    tensors["lora_B"][:] = 0
    found = run(backend, tensors, device=device)
    torch.testing.assert_close(found["y"], F.linear(tensors["x"], tensors["weight"]))
    assert not found["dlora_A"].any() and found["dlora_B"].any()


@kernels
def test_results_are_bitwise_repeatable(backend, device):
    tensors = make(rows=300, columns=130, out=130, vector=True)
    first, second = (run(backend, tensors, device=device, dropout=0.2, seed=4) for _ in range(2))
    for name in first:
        assert torch.equal(first[name], second[name]), name


@st.composite
def cases(draw):
    """Any call: sizes, strides, dtypes, ranks, dropout, which gradients are asked for."""
    dtype, rank = draw(st.sampled_from(DTYPES)), draw(st.integers(1, 20))
    tensors = make(
        rows=draw(st.integers(0, 90)), columns=draw(st.integers(1, 150)), out=draw(st.integers(1, 150)), rank=rank,
        dtype=dtype, adapter_dtype=draw(st.sampled_from([None, dtype])), bias=draw(st.booleans()),
        vector=draw(st.booleans()), seed=draw(st.integers(0, 999)), lead=draw(st.sampled_from([(), (2,), (1, 2)])),
    )  # fmt: skip
    for name in ("weight", "lora_A", "lora_B"):
        if draw(st.booleans()):
            tensors[name] = by_columns(tensors[name])
    options = {"active_rank": draw(st.integers(1, rank)), "frozen": draw(st.booleans())}
    if draw(st.booleans()):
        options |= {"dropout": draw(st.sampled_from([0.05, 0.5])), "seed": draw(st.integers(-(2**63), 2**63 - 1))}
    return tensors, options | {"needs": draw(st.sampled_from([FLOATS, ("x",), ("lora_A", "lora_B"), ("weight",)]))}


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
@pytest.mark.parametrize("adapter", [torch.float32, None])
@pytest.mark.parametrize("rows, columns, out, rank", [(20, 530, 301, 9), (300, 140, 83, 5), (257, 516, 3, 2)])
def test_every_instruction_set(isa, dtype, adapter, rows, columns, out, rank):
    """Rows and columns beyond one task: chunks of columns, groups of rows, groups whose rows are taken in steps."""
    tensors = make(rows, columns, out, rank, dtype=dtype, adapter_dtype=adapter or dtype, vector=True)
    check("cpp", tensors, dropout=0.1, seed=3, active_rank=rank - 1)


@cpp_only
@pytest.mark.parametrize("rank", [1, 2, 3, 4, 5, 8, 11, 16, 17, 33])
def test_every_rank_of_every_instruction_set(isa, rank):
    for rows in (1, 5, 70):
        check("cpp", make(rows=rows, columns=37, out=41, rank=rank))
        check("cpp", make(rows=rows, columns=37, out=41, rank=rank), frozen=True, active_rank=(rank + 1) // 2)


@cpp_only
def test_cpp_gradients_pass_gradcheck(isa):
    with trifuse.backend("cpp"):
        assert torch.autograd.gradcheck(linear, floats())


@cpp_only
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("vector", [False, True])
@pytest.mark.parametrize("options", [{}, {"active_rank": 3}, {"active_rank": 4, "frozen": True}], ids=str)
def test_the_merged_form(isa, merged, dtype, vector, options):
    tensors = make(rows=70, columns=50, out=60, rank=5, dtype=dtype, vector=vector)
    check("cpp", tensors, **options)
    assert {size[:3] for size in merged} == {(70, 50, 60)}
    tensors |= {"weight": by_columns(tensors["weight"]), "bias": tensors["bias"].repeat_interleave(2)[::2]}
    tensors |= {"lora_A": tensors["lora_A"].repeat(1, 2)[:, :50], "lora_B": by_columns(tensors["lora_B"])}
    check("cpp", tensors, **options)


@cpp_only
def test_neither_dropout_nor_half_precision_is_merged(merged):
    run("cpp", make(rows=70), dropout=0.1, seed=1)
    run("cpp", make(rows=70, vector=True), dropout=0.1, seed=1)
    for dtype in (torch.float16, torch.bfloat16):
        run("cpp", make(rows=70, dtype=dtype))
        run("cpp", make(rows=70, dtype=dtype, vector=True))
    assert not merged


@cpp_only
def test_many_rows_are_merged_because_it_is_cheaper(monkeypatch):
    tensors = make(rows=1000, columns=64, out=64, rank=8)
    check("cpp", tensors)
    chosen = run("cpp", tensors)
    for cheaper, same in ((True, True), (False, False)):
        monkeypatch.setattr(registration, "merged_is_cheaper", lambda *size, cheaper=cheaper: cheaper)
        assert torch.equal(run("cpp", tensors)["y"], chosen["y"]) == same
    assert not registration.merged_is_cheaper(1, 4096, 4096, 8, False)


@cpp_only
@pytest.mark.parametrize("options", [{}, {"active_rank": 2, "frozen": True}, {"dropout": 0.3, "seed": 5}], ids=str)
def test_the_short_way_of_plain_arguments_is_the_long_one(monkeypatch, options):
    for sizes in ({}, {"dtype": torch.bfloat16}, {"lead": (2, 3), "bias": False}):
        tensors = make(**sizes)
        short = run("cpp", tensors, **options)
        with monkeypatch.context() as patch:
            patch.setattr(trifuse.registration.lora_linear, "plain", lambda *_: None)
            long = run("cpp", tensors, **options)
        for name, value in short.items():
            assert torch.equal(value, long[name]), name


@cpp_only
@pytest.mark.parametrize("rows, columns, out, rank", [(1, 600, 700, 8), (64, 130, 1000, 9), (900, 300, 300, 8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_results_do_not_depend_on_the_number_of_threads(threads, dtype, rows, columns, out, rank):
    """Beside a weight of zeros: the base product is BLAS's, which cuts some sums by threads."""
    tensors, results = make(rows, columns, out, rank, dtype=dtype, vector=True), []
    tensors["weight"].zero_()
    for count in (1, 2, 3, 8):
        threads(count)
        results.append(run("cpp", tensors, needs=("x", "bias", "lora_A", "lora_B", "scale"), dropout=0.1, seed=2))
    for name in results[0]:
        assert all(torch.equal(results[0][name], other[name]) for other in results[1:]), name


@cpp_only
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_saved_for_backward_are_x_s_and_the_seed(dtype, dropout):
    saved = {}
    tensors = make(rows=60, columns=80, out=50, rank=5, dtype=dtype)
    tensors = {name: x.requires_grad_() if isinstance(x, torch.Tensor) else x for name, x in tensors.items()}
    owned = {x.data_ptr() for name, x in tensors.items() if isinstance(x, torch.Tensor) and name != "x"}

    def pack(x):
        if x.data_ptr() not in owned:
            saved[x.data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        for options in ({}, {"active_rank": 3}):
            saved.clear()
            y = call("cpp", tensors, dropout=dropout, **options)
            rank = options.get("active_rank", 5)
            assert saved.pop(tensors["x"].data_ptr()) == 60 * 80 * dtype.itemsize
            assert sorted(saved.values()) == ([8] if dropout else []) + [60 * rank * 4]
            assert y.data_ptr() not in saved


@cpp_only
@pytest.mark.parametrize("name", ["x", "lora_A", "lora_B"])
def test_offsets_beyond_32_bits(name):
    """In address space that is reserved and never filled: a 32-bit offset would read zeros, or fall outside."""
    tensors = make(rows=3, columns=5, out=3, rank=3, vector=True)
    try:
        mapping = mmap.mmap(-1, 2**36, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000)  # without reserving memory
    except OSError as error:
        pytest.skip(f"this machine does not reserve 64 GiB of address space: {error}")
    far = torch.frombuffer(mapping, dtype=torch.float32).as_strided(tensors[name].shape, (2**31 + 3, 1))
    far.copy_(tensors[name])
    near, found = run("cpp", tensors), run("cpp", tensors | {name: far})
    for key, value in found.items():
        torch.testing.assert_close(value, near[key])
