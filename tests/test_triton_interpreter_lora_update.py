"""The Triton kernels of lora_update and lora_adamw in Triton's interpreter, see test_triton_interpreter.py. The process
must be its own: ``TRITON_INTERPRET=1 pytest tests/test_triton_interpreter_lora_update.py``."""

import os

import lora_adamw_cases as adamw
import pytest
import torch
from lora_update_cases import check, make, native

import trifuse
from trifuse import reference

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("runs only with TRITON_INTERPRET=1 in the environment of its own process", allow_module_level=True)
pytest.importorskip("triton", reason="the package triton is not installed")

pytestmark = pytest.mark.usefixtures("poisoned_memory")
update = native("triton")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("vector", [False, True])
@pytest.mark.parametrize("seed", [None, 3])
def test_dtypes_and_roundings(dtype, own, vector, seed):
    check(update, make(dtype=dtype, adapter=dtype if own else None, vector=vector), seed=seed, apart=own)


@pytest.mark.parametrize("columns", [1, 127, 128, 130])
@pytest.mark.parametrize("rows", [1, 32, 33])
def test_shapes_around_a_tile(rows, columns):
    check(update, make(rows=rows, columns=columns, rank=2))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("seed", [5, -(2**40) - 5, 2**63 - 1])
def test_stochastic_rounding_draws_the_bits_of_the_reference(transposed, seed):
    weight, lora_A, lora_B, scale = make(rows=35, columns=133, rank=3, dtype=torch.float16, whole=True)
    weight = (weight + 256).t().contiguous().t() if transposed else weight + 256
    wanted, _ = reference.lora_update(weight, lora_A, lora_B, scale / 64, seed=seed)
    update(weight, None, lora_A, lora_B, scale / 64, None, seed)
    assert torch.equal(weight, wanted)


def test_stochastic_rounding_of_small_and_special_numbers():
    sizes = torch.tensor([2.0**-24, 3e-6, 2.0**-14, 1.0, 60000.0, float("inf"), float("nan")])
    weight = torch.stack((sizes, -sizes)).half()
    lora_A = (sizes.nan_to_num(0, posinf=0) * 2.0**-10)[None, :]
    lora_B = torch.tensor([[0.375], [-0.375]])
    wanted, _ = reference.lora_update(weight, lora_A, lora_B, seed=11)
    update(weight, None, lora_A, lora_B, 1.0, None, 11)
    torch.testing.assert_close(weight, wanted, rtol=0, atol=0, equal_nan=True)


def test_only_active_ranks_are_read():
    weight, lora_A, lora_B, scale = make(rank=6, vector=True)
    lora_A[4:], lora_B[:, 4:], scale[4:] = float("nan"), float("nan"), float("nan")
    check(update, (weight, lora_A, lora_B, scale), active_rank=4)


def test_empty_weights_and_no_measure():
    assert update(torch.zeros(0, 5), None, torch.zeros(2, 5), torch.zeros(0, 2), 1.0, None, None).tolist() == [0, 0]
    weight, *adapter = make(rank=2)
    found = weight.clone()
    sums = torch.ops.trifuse.lora_update_triton(found, None, *adapter[:2], adapter[2], None, 2, None, False)
    assert sums.shape == (0,)
    torch.testing.assert_close(found, reference.lora_update(weight, *adapter)[0])


def test_merging_swapping_and_unmerging():
    weight, *adapter = make(dtype=torch.float16)
    before = weight.clone()
    with trifuse.backend("triton"):
        merge = trifuse.lora_merge_(weight, *adapter)
        merged = weight.clone()
        trifuse.lora_swap_(weight, merge, *make(dtype=torch.float16, rank=3, seed=1)[1:])
        trifuse.lora_swap_(weight, merge, *adapter)
    assert torch.equal(weight, merged)
    trifuse.lora_unmerge_(weight, merge)
    assert torch.equal(weight, before)


# ---- AdamW

SHAPES = [((5, 70), 0), ((33, 5), 1), ((1, 17), 1), ((3, 4, 6), 1)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize(
    "active", [lambda at, n: (0, n), lambda at, n: (7 * at % n, 7 * at % n + 1), lambda at, n: (n // 3, n // 3)]
)
def test_adamw_of_any_ranks(dtype, maximize, active):
    adamw.check(adamw.by("triton"), adamw.make(dtype, SHAPES), active, steps=3, maximize=maximize)


def test_adamw_without_momentum():
    adamw.check(adamw.by("triton"), adamw.make(torch.float32, SHAPES[:2]), lambda at, n: (0, n), beta1=0.0, beta2=0.0)


def test_adamw_of_more_numbers_and_ranks_than_a_program_takes():
    made = adamw.make(torch.float32, [((300, 5), 0), ((1100, 3), 1)])
    adamw.check(adamw.by("triton"), made, lambda at, n: (0, n - 1), steps=2)
