"""The low-rank update of a weight: the reference against what is known, then every kernel that this machine can run
against the reference; merging, unmerging and swapping are in test_lora_merge.py."""

import pytest
import torch
from backends_here import cpp_only, kernels_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lora_update_cases import HALF, check, make, native

import trifuse
from trifuse import reference

kernels = kernels_of("cuda", "triton")
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


@pytest.fixture(autouse=True)
def nan_in_fresh_memory(poisoned_memory):
    """Every test runs on poisoned allocations."""


def gpu_dtypes(device):
    return DTYPES[:3] if device == "cuda" else DTYPES


# ---- the reference, against what is known


def test_the_random_words_are_those_of_the_published_generator():
    """The known answers of Random123 for philox4x32-10: key and counter zero, and all ones."""
    assert [hex(word) for word in reference.philox_words(0, 1, 4)[0].tolist()] == [
        "0x6627e8d5", "0xe169c58d", "0xbc57ac4c", "0x9b00dbd8",
    ]  # fmt: skip


def test_words_depend_on_the_place_alone():
    words = reference.philox_words(7, 20, 33)
    assert torch.equal(reference.philox_words(7, 9, 17), words[:9, :17])
    assert words.unique().numel() == words.numel()


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("size", [1.0, 3e4, 2.0**-14, 3e-6, 1e-7])
def test_stochastic_rounding_is_unbiased_and_takes_a_neighbour(dtype, size):
    """Of 2^16 copies of a number the mean is off by less than four standard deviations."""
    words = reference.philox_words(1, 256, 256)
    for fraction in (0.0, 0.1, 0.37, 0.5, 0.9):
        low = torch.tensor(size, dtype=dtype)
        high = torch.nextafter(low.cpu(), torch.tensor(float("inf"), dtype=dtype))
        step = high.double() - low.double()
        value = torch.full((256, 256), float(low.double() + fraction * step), dtype=torch.float32)
        for sign in (1, -1):
            found = reference.round_stochastically(sign * value, dtype, words) * sign
            assert ((found == low) | (found == high)).all()
            share = (found == high).double().mean().item()
            here = float((value[0, 0].double() - low.double()) / step)
            assert abs(share - here) <= 4 * (here * (1 - here) / 2**16) ** 0.5 + 2**-12


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_stochastic_rounding_leaves_what_every_dtype_holds(dtype):
    special = torch.tensor([0.0, -0.0, 1.0, -2.5, float("inf"), -float("inf"), float("nan"), 2.0**-24 * 3])
    for word in (0, 2**32 - 1):
        found = reference.round_stochastically(special, dtype, torch.full((8,), word))
        assert torch.equal(found[:6].float(), special[:6]) and found[6].isnan() and found[7] == special[7]
        assert found[1].signbit()


def test_reference_is_the_sum_of_outer_products():
    weight, lora_A, lora_B, scale = make(dtype=torch.float64, vector=True)
    value, sums = reference.lora_update(weight, lora_A, lora_B, scale)
    update = sum(scale[i] * torch.outer(lora_B[:, i], lora_A[i]) for i in range(5))
    torch.testing.assert_close(value, weight + update)
    torch.testing.assert_close(sums[0], update.square().sum())
    assert sums[1] < 1e-25 * sums[0]


# ---- every kernel


@kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("vector", [False, True])
@pytest.mark.parametrize("seed", [None, 3])
@pytest.mark.parametrize("apart", [False, True])
def test_every_dtype_and_rounding(backend, device, dtype, own, vector, seed, apart):
    if dtype not in gpu_dtypes(device):
        pytest.skip("GPUs compute in float32")
    args = make(dtype=dtype, adapter=dtype if own else None, vector=vector)
    check(native(backend), args, seed=seed, device=device, apart=apart)


@kernels
@pytest.mark.parametrize("columns", [1, 3, 4, 15, 16, 17, 63, 64, 65, 1000, 1024, 1027])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_number_of_columns(backend, device, columns, dtype):
    check(native(backend), make(columns=columns, dtype=dtype), device=device)


@kernels
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 31, 32, 33, 100])
def test_any_number_of_rows(backend, device, rows):
    check(native(backend), make(rows=rows), device=device, apart=True)


@kernels
@pytest.mark.parametrize("rank", [1, 2, 15, 16, 17, 64, 100])
def test_any_rank(backend, device, rank):
    check(native(backend), make(rank=rank), device=device)


@kernels
@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0)])
def test_empty_weights(backend, device, shape):
    weight, lora_A, lora_B, scale = (torch.zeros(shape), torch.zeros(2, shape[1]), torch.zeros(shape[0], 2), 1.0)
    sums = native(backend)(weight.to(device), None, lora_A.to(device), lora_B.to(device), scale, None, None)
    assert sums.tolist() == [0, 0]


@kernels
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("columns", [3, 66, 1030])
def test_stochastic_rounding_draws_the_bits_of_the_reference(backend, device, dtype, transposed, columns):
    """Products of whole numbers are exact in any order: then every backend has the same bits, however it lies."""
    weight, lora_A, lora_B, scale = make(rows=9, columns=columns, dtype=dtype, whole=True)
    weight = weight + 256  # where neighbours are far apart
    scale = scale / 64
    if transposed:
        weight = weight.t().contiguous().t()
    seed = -(2**40) - 5
    wanted, _ = reference.lora_update(weight, lora_A, lora_B, scale, seed=seed)
    found = weight.to(device)
    native(backend)(found, None, lora_A.to(device), lora_B.to(device), scale, None, seed)
    assert torch.equal(found.cpu(), wanted)
    assert not torch.equal(wanted, reference.lora_update(weight, lora_A, lora_B, scale)[0])


@kernels
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_stochastic_rounding_of_small_and_special_numbers(backend, device, dtype):
    """Subnormals of half precision, the largest numbers, infinities and NaN: those of the reference."""
    sizes = torch.tensor([2.0**-24, 3e-6, 2.0**-14, 1.0, 60000.0, 3e38, float("inf"), float("nan")])
    weight = torch.stack((sizes, -sizes)).to(dtype)
    lora_A = (sizes.nan_to_num(0, posinf=0).clamp(max=3e37) * 2.0**-10)[None, :]
    lora_B = torch.tensor([[0.375], [-0.375]])
    wanted, _ = reference.lora_update(weight, lora_A, lora_B, seed=11)
    found = weight.to(device)
    native(backend)(found, None, lora_A.to(device), lora_B.to(device), 1.0, None, 11)
    torch.testing.assert_close(found.cpu(), wanted, rtol=0, atol=0, equal_nan=True)


@kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("seed", [None, 3])
def test_strided_weights_and_factors(backend, device, dtype, seed):
    """Rows of a larger matrix, transposed weights (as GPT-2's), factors that lie any way; what lies between stays."""
    weight, lora_A, lora_B, scale = make(dtype=dtype, rows=23, columns=45)
    wide = torch.full((23, 60), 7.0, dtype=dtype)
    wide[:, 5:50] = weight
    tall = torch.full((60, 23), 7.0, dtype=dtype)
    tall[5:50] = weight.t()
    A, B = lora_A.t().contiguous().t(), lora_B.t().contiguous().t()
    for whole, view in ((wide, lambda one: one[:, 5:50]), (tall, lambda one: one[5:50].t())):
        for factors in ((lora_A, lora_B), (A, B), (lora_A.repeat(2, 1)[:5], lora_B.repeat(1, 2)[:, :5])):
            here = whole.clone().to(device)
            part = view(here)
            native(backend)(part, None, *(one.to(device) for one in factors), scale, None, seed)
            fresh = weight.clone().to(device)
            native(backend)(fresh, None, lora_A.to(device), lora_B.to(device), scale, None, seed)
            assert torch.equal(part, fresh)
            view(here).fill_(7.0)
            assert (here == 7.0).all()


@kernels
def test_only_active_ranks_are_read(backend, device):
    weight, lora_A, lora_B, scale = make(rank=6, vector=True)
    short = (weight, lora_A[:4].clone(), lora_B[:, :4].clone(), scale[:4].clone())
    lora_A[4:], lora_B[:, 4:], scale[4:] = float("nan"), float("nan"), float("nan")
    found = check(native(backend), (weight.clone(), lora_A, lora_B, scale), active_rank=4, device=device)
    assert torch.equal(found, check(native(backend), short, device=device))


@kernels
def test_a_weight_apart_gives_what_changing_it_in_place_gives(backend, device):
    args = make(dtype=torch.bfloat16, columns=300)
    apart = check(native(backend), (args[0].clone(), *args[1:]), seed=5, device=device, apart=True)
    assert torch.equal(apart, check(native(backend), args, seed=5, device=device))


@kernels
def test_what_rounding_lost_is_measured(backend, device):
    """An update that bfloat16 cannot hold at all is lost, one of whole steps is not."""
    weight = torch.ones(20, 30, dtype=torch.bfloat16, device=device)
    one, row = torch.ones(20, 1, device=device), torch.ones(1, 30, device=device)
    sums = native(backend)(weight.clone(), None, row, one, 2.0**-10, None, None)
    torch.testing.assert_close(sums.cpu(), torch.tensor([600 * 2.0**-20] * 2, dtype=torch.float64))
    sums = native(backend)(weight.clone(), None, row, one, 2.0**-5, None, None)
    assert sums.tolist() == [600 * 2.0**-10, 0]


@st.composite
def cases(draw):
    dtype = draw(st.sampled_from(DTYPES[:3]))
    rank = draw(st.integers(1, 40))
    made = make(
        rows=draw(st.integers(1, 70)), columns=draw(st.integers(1, 300)), rank=rank, dtype=dtype,
        adapter=draw(st.sampled_from([None, dtype])), vector=draw(st.booleans()), seed=draw(st.integers(0, 99)),
    )  # fmt: skip
    if draw(st.booleans()):
        made = (made[0].t().contiguous().t(), *made[1:])
    options = {"active_rank": draw(st.integers(1, rank)), "apart": draw(st.booleans())}
    return made, options | {"seed": draw(st.one_of(st.none(), st.integers(-(2**63), 2**63 - 1)))}


@kernels
@given(case=cases())
@settings(max_examples=60, deadline=None, derandomize=True,
          suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])  # fmt: skip
def test_any_call_keeps_the_tolerance(backend, device, case):
    args, options = case
    check(native(backend), args, device=device, **options)


@cpp_only
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("seed", [None, 3])
def test_every_instruction_set(isa, dtype, seed):
    check(native("cpp"), make(rows=70, columns=150, rank=9, dtype=dtype), seed=seed)
    weight, *rest = make(rows=38, columns=70, rank=9, dtype=dtype)
    check(native("cpp"), (weight.t().contiguous().t(), *rest), seed=seed)


@cpp_only
def test_every_instruction_set_draws_the_same_bits(isa):
    weight, lora_A, lora_B, scale = make(rows=21, columns=1100, dtype=torch.bfloat16, whole=True)
    weight += 256
    wanted, _ = reference.lora_update(weight, lora_A, lora_B, scale, seed=2**63 - 1)
    native("cpp")(weight, None, lora_A, lora_B, scale, None, 2**63 - 1)
    assert torch.equal(weight, wanted)


@cpp_only
def test_results_do_not_depend_on_the_number_of_threads(threads):
    found = []
    for count in (1, 2, 3):
        threads(count)
        weight, *rest = make(rows=130, columns=2100, dtype=torch.bfloat16)
        found.append((native("cpp")(weight, None, *rest, None, 9), weight))
    for sums, weight in found[1:]:
        assert torch.equal(sums, found[0][0]) and torch.equal(weight, found[0][1])


@cpp_only
def test_wrong_shapes_are_refused_below_the_checks_too():
    weight, lora_A, lora_B, _ = make()
    update = torch.ops.trifuse.lora_update
    with pytest.raises(RuntimeError, match=r"lora_A must be \(r, K\) and lora_B \(N, r\)"):
        update(weight, None, lora_A, lora_B[:-1], 1.0, None, 5, None, True)
    with pytest.raises(RuntimeError, match="active_rank must be 0 to r"):
        update(weight, None, lora_A, lora_B, 1.0, None, 6, None, True)
    with pytest.raises(RuntimeError, match="weight and out must have one shape and one dtype"):
        update(weight, weight.half(), lora_A, lora_B, 1.0, None, 5, None, True)
    with pytest.raises(RuntimeError, match="rows or columns of weight and out must be contiguous"):
        update(weight[:, ::2], None, lora_A[:, ::2], lora_B, 1.0, None, 5, None, True)
    with pytest.raises(RuntimeError, match="seed must be an int64 tensor of one element"):
        update(weight, None, lora_A, lora_B, 1.0, None, 5, torch.zeros(2).long(), True)


def test_weights_that_lie_loosely_take_the_reference():
    weight, lora_A, lora_B, scale = make()
    loose = weight.repeat_interleave(2, 0).repeat_interleave(3, 1)[::2, ::3]
    choice = trifuse.explain(trifuse.lora_merge_, loose, lora_A, lora_B, scale)
    assert choice.chosen == "reference" and "rows or columns are contiguous" in choice.refusals["cpp"][-1]
    trifuse.lora_merge_(loose, lora_A, lora_B, scale)
    torch.testing.assert_close(loose, reference.lora_update(weight, lora_A, lora_B, scale)[0])
