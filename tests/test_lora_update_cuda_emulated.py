"""The CUDA kernels of lora_update and lora_adamw, compiled by the host compiler and run on the CPU, against the
reference.

Every comparison runs in ascending and in descending thread order and wants the same bits; memory that nothing wrote is
NaN (see test_cuda_emulated.py)."""

import lora_adamw_cases as adamw
import lora_update_cases as cases
import pytest
import torch
from emulated_cuda import load
from lora_update_cases import HALF, make

from trifuse import reference
from trifuse.ops.lora_adamw import prepare
from trifuse.ops.lora_update import prepare_merge

library = load()
pytestmark = pytest.mark.usefixtures("poisoned_memory")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def descending(call):
    library.trifuse_emulator_set_descending(1)
    try:
        return call()
    finally:
        library.trifuse_emulator_set_descending(0)


def update(out, weight, lora_A, lora_B, scale, active_rank, seed):
    rounding = "nearest" if seed is None else "stochastic"
    call = prepare_merge(out, lora_A, lora_B, scale, active_rank=active_rank, rounding=rounding, seed=seed)
    again = call._replace(out=torch.empty_like(out), weight=out.clone() if weight is None else weight)
    sums = torch.ops.trifuse_emulated.lora_update(*call._replace(weight=weight))
    sums_again = descending(lambda: torch.ops.trifuse_emulated.lora_update(*again))
    assert torch.equal(out, again.out) and torch.equal(sums, sums_again)
    return sums


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("vector", [False, True])
@pytest.mark.parametrize("seed", [None, 3])
@pytest.mark.parametrize("apart", [False, True])
def test_every_dtype_and_rounding(dtype, own, vector, seed, apart):
    cases.check(update, make(dtype=dtype, adapter=dtype if own else None, vector=vector), seed=seed, apart=apart)


@pytest.mark.parametrize("columns", [1, 3, 4, 5, 127, 128, 129, 260])
@pytest.mark.parametrize("rows", [1, 4, 31, 32, 33])
def test_shapes_around_a_tile(rows, columns):
    cases.check(update, make(rows=rows, columns=columns))
    cases.check(update, make(rows=rows, columns=columns, dtype=torch.bfloat16), seed=2)


@pytest.mark.parametrize("rank", [1, 15, 16, 17, 40])
def test_ranks_around_what_shared_memory_holds(rank):
    cases.check(update, make(rank=rank))


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("columns", [3, 66, 140])
def test_stochastic_rounding_draws_the_bits_of_the_reference(dtype, transposed, columns):
    weight, lora_A, lora_B, scale = make(rows=35, columns=columns, dtype=dtype, whole=True)
    weight = (weight + 256).t().contiguous().t() if transposed else weight + 256
    wanted, _ = reference.lora_update(weight, lora_A, lora_B, scale / 64, seed=-(2**40) - 5)
    update(weight, None, lora_A, lora_B, scale / 64, None, -(2**40) - 5)
    assert torch.equal(weight, wanted)


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_stochastic_rounding_of_small_and_special_numbers(dtype):
    sizes = torch.tensor([2.0**-24, 3e-6, 2.0**-14, 1.0, 60000.0, 3e38, float("inf"), float("nan")])
    weight = torch.stack((sizes, -sizes)).to(dtype)
    lora_A = (sizes.nan_to_num(0, posinf=0).clamp(max=3e37) * 2.0**-10)[None, :]
    lora_B = torch.tensor([[0.375], [-0.375]])
    wanted, _ = reference.lora_update(weight, lora_A, lora_B, seed=11)
    call = prepare_merge(weight, lora_A, lora_B, rounding="stochastic", seed=11)
    torch.ops.trifuse_emulated.lora_update(*call)
    torch.testing.assert_close(weight, wanted, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("seed", [None, 3])
def test_strided_weights_and_factors(seed):
    weight, lora_A, lora_B, scale = make(dtype=torch.bfloat16, rows=40, columns=45)
    fresh = weight.clone()
    update(fresh, None, lora_A, lora_B, scale, None, seed)
    A, B = lora_A.t().contiguous().t(), lora_B.t().contiguous().t()
    for whole, turn in (((40, 60), lambda one: one[:, 5:50]), ((60, 40), lambda one: one[5:50].t())):
        part = turn(torch.full(whole, 7.0, dtype=torch.bfloat16))
        part.copy_(weight)
        call = prepare_merge(part, A, B, scale, rounding="stochastic" if seed else "nearest", seed=seed)
        torch.ops.trifuse_emulated.lora_update(*call)
        assert torch.equal(part, fresh)


def test_only_active_ranks_are_read():
    weight, lora_A, lora_B, scale = make(rank=6, vector=True)
    lora_A[4:], lora_B[:, 4:], scale[4:] = float("nan"), float("nan"), float("nan")
    cases.check(update, (weight, lora_A, lora_B, scale), active_rank=4)


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0)])
def test_empty_weights(shape):
    sums = update(torch.zeros(shape), None, torch.zeros(2, shape[1]), torch.zeros(shape[0], 2), 1.0, None, None)
    assert sums.tolist() == [0, 0]


# ---- AdamW


def step(*args, **options):
    call = prepare(*args, **options)
    again = call._replace(**{
        name: [one.clone() for one in getattr(call, name)] for name in ("params", "exp_avgs", "exp_avg_sqs", "steps")
    })  # fmt: skip
    torch.ops.trifuse_emulated.lora_adamw(*call)
    descending(lambda: torch.ops.trifuse_emulated.lora_adamw(*again))
    for name in ("params", "exp_avgs", "exp_avg_sqs", "steps"):
        for one, other in zip(getattr(call, name), getattr(again, name), strict=True):
            assert torch.equal(one, other), f"{name} depends on the order of threads"


def everything(step, ranks):
    return 0, ranks


def last_of_some(step, ranks):
    return (7 * step) % ranks, (7 * step) % ranks + 1


def first_of_some(step, ranks):
    return 0, (5 * step) % ranks + 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("active", [everything, last_of_some, first_of_some])
@pytest.mark.parametrize("maximize", [False, True])
def test_adamw_of_every_dtype_and_any_ranks(dtype, active, maximize):
    shapes = [*adamw.SHAPES[:5], ((300, 6), 1), ((2, 1100), 0)]
    adamw.check(step, adamw.make(dtype, shapes), active, steps=3, maximize=maximize)


def test_adamw_of_many_parameters_and_dtypes():
    """More than a launch takes; those of every dtype have launches of their own."""
    shapes = [((4, 30 + at), 0) if at % 2 else ((30 + at, 4), 1) for at in range(50)]
    made = adamw.make(torch.float32, shapes) + adamw.make(torch.bfloat16, shapes[:3])
    adamw.check(step, made, last_of_some, steps=2)


def test_adamw_leaves_ranks_that_rest_to_the_bit():
    made = adamw.make(torch.float32, adamw.SHAPES[:5])
    found = adamw.run(step, made, lambda at, ranks: (ranks // 3, ranks // 2), steps=3)
    for at, (one, dim) in enumerate(made):
        ranks = one.shape[dim]
        rest = torch.tensor([not ranks // 3 <= i < ranks // 2 for i in range(ranks)])
        assert torch.equal(found[f"param {at}"].movedim(dim, 0)[rest], one.movedim(dim, 0)[rest])
        assert not found[f"exp_avg {at}"].movedim(dim, 0)[rest].any() and not found[f"steps {at}"][rest].any()
