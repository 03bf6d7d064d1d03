"""lora_linear's CUDA kernels, compiled by the host compiler and run on the CPU, against the float64 reference.

Every comparison runs in ascending and in descending thread order and wants the same bits; memory that nothing wrote
is NaN (see test_cuda_emulated.py)."""

import pytest
import torch
from emulated_cuda import load
from lora_linear_cases import FLOATS, eager_errors, make, run
from tolerance import compare, error, incoming

from trifuse import reference
from trifuse.ops.lora_linear import prepare

library = load()
pytestmark = pytest.mark.usefixtures("poisoned_memory")
HALF = [torch.float16, torch.bfloat16]
dtypes = pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
GRADIENTS = {"x": 0, "weight": 1, "bias": 2, "lora_A": 3, "lora_B": 4, "scale": 5}


def run_emulated(tensors, needs=FLOATS, save=True, **options):
    """y and the gradients of `needs` by the emulated kernels; rows of x may be strided."""
    call = prepare(**{"bias": None} | tensors, **options)
    x = call.x.flatten(0, -2)
    tail = (call.scale, call.p, call.active_rank, call.frozen, call.dropout, call.seed, False)
    ops = torch.ops.trifuse_emulated
    y, S = ops.lora_linear_fwd(x, *call[1:5], *tail, save)
    found = {"y": y.view(*call.x.shape[:-1], y.shape[1])}
    needs = [name for name in needs if isinstance(tensors.get(name), torch.Tensor)]
    dy = incoming(found["y"].shape, torch.Generator().manual_seed(99)).to(y.dtype).view(y.shape)
    wanted = [name in needs for name in GRADIENTS]
    grads = ops.lora_linear_bwd(dy, x, call.weight, call.lora_A, call.lora_B, S, *tail, wanted)
    for name, grad, want in zip(GRADIENTS, grads, wanted, strict=True):
        if want:
            found[f"d{name}"] = grad.view(tensors[name].shape)
        else:
            assert grad.shape == (0,), name
    return found


def check(tensors, needs=FLOATS, **options):
    kernel = run_emulated(tensors, needs, **options)
    assert_no_order(kernel, tensors, needs, **options)
    options.pop("save", None)
    exact = run("reference", tensors, exact=True, needs=needs, **options)
    assert kernel.keys() == exact.keys()
    compare(kernel, exact, eager_errors(tensors, needs=needs, **options))
    return kernel


def assert_no_order(kernel, tensors, needs, **options):
    library.trifuse_emulator_set_descending(1)
    try:
        again = run_emulated(tensors, needs, **options)
    finally:
        library.trifuse_emulator_set_descending(0)
    for name, value in kernel.items():
        assert torch.equal(value, again[name]), f"{name} depends on the order of threads"


@dtypes
@pytest.mark.parametrize("vector", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_all_at_once(dtype, vector, dropout):
    options = {"dropout": dropout, "seed": 2**40 + 3} if dropout else {}
    check(make(70, 264, 300, 5, dtype, vector=vector), **options)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("adapter_dtype", ["half", torch.float32], ids=str)
def test_adapters_of_either_dtype_beside_half_precision(dtype, adapter_dtype):
    check(make(65, 130, 140, 6, dtype, dtype if adapter_dtype == "half" else adapter_dtype))


@pytest.mark.parametrize("rank", [1, 2, 3, 4, 5, 8, 9, 12, 16, 17, 64, 65, 130])
def test_ranks(rank):
    """A group has 8 ranks or 4, and 64 are in shared memory at once."""
    check(make(70, 40, 36, rank, vector=rank % 2 == 1))


@pytest.mark.parametrize("rows", [0, 1, 7, 8, 9, 63, 64, 65, 129, 1000])
def test_rows(rows):
    """A warp has 4 rows at once or 8, a block 64."""
    check(make(rows, 24, 20, 2))


@dtypes
@pytest.mark.parametrize("columns, out", [(1, 1), (2, 3), (127, 129), (128, 132), (255, 257), (260, 256), (513, 1000)])
def test_columns(dtype, columns, out):
    """A strip has 128 columns; of half precision some passes take two at once."""
    check(make(20, columns, out, 3, dtype), dropout=0.2, seed=5)


def test_of_many_rows_a_block_walks_over_several_strips():
    """And adds Z over them; a number is a sum of so many products that one draw of eager's error is enough."""
    tensors, needs = make(27000, 8, 650, 3), ("lora_A", "lora_B")
    exact, eager = (run("reference", tensors, exact=one, needs=needs) for one in (True, False))
    kernel = run_emulated(tensors, needs)
    compare(kernel, exact, {name: error(eager[name], value) for name, value in exact.items()})
    assert_no_order(kernel, tensors, needs)


@pytest.mark.parametrize("columns, out", [(0, 5), (5, 0)])
def test_empty_axes(columns, out):
    found = run_emulated(make(9, columns, out, 3))
    assert found["y"].shape == (9, out) and all(value.isfinite().all() for value in found.values())
    if columns == 0:
        assert torch.equal(found["y"], make(9, columns, out, 3)["bias"].expand(9, out))


@dtypes
@pytest.mark.parametrize("active_rank, frozen", [(1, False), (5, False), (11, False), (1, True), (9, True), (11, True)])
def test_only_active_ranks_are_touched(dtype, active_rank, frozen):
    tensors = make(40, 36, 28, 11, dtype, vector=True)
    ruined = dict(tensors)
    ruined["lora_A"], ruined["lora_B"] = tensors["lora_A"].clone(), tensors["lora_B"].clone()
    ruined["lora_A"][active_rank:], ruined["lora_B"][:, active_rank:] = float("nan"), float("nan")
    options = {"active_rank": active_rank, "frozen": frozen, "dropout": 0.3, "seed": 8}
    whole, found = check(tensors, **options), run_emulated(ruined, **options)
    for name, value in whole.items():
        assert torch.equal(value, found[name]), name
    first = active_rank - 1 if frozen else 0
    for grad in (found["dlora_A"], found["dlora_B"].T):
        assert not grad[:first].any() and not grad[active_rank:].any() and grad[first:active_rank].all(dim=1).any()


@dtypes
@pytest.mark.parametrize("where", ["rows apart", "an odd start", "a column of a batch", "one row for all"])
def test_strided_inputs(dtype, where):
    g = torch.Generator().manual_seed(3)
    whole = torch.randn(24, 300, generator=g).to(dtype)
    x = {
        "rows apart": whole[::2, :132], "an odd start": whole[:, 1:133],
        "one row for all": whole[:1, :132].expand(12, -1), "a column of a batch": whole.view(12, 2, 300)[:, 1, :132],
    }[where]  # fmt: skip
    tensors = make(1, 132, 133, 6, dtype) | {"x": x}
    big = torch.randn(9, 150, generator=g).to(tensors["lora_A"].dtype)
    tensors["lora_A"] = big[:6, 3:135]
    tensors["lora_B"] = torch.randn(133, 9, generator=g).to(big.dtype)[:, 2:8]
    check(tensors, dropout=0.25, seed=11)


@dtypes
@pytest.mark.parametrize("seed", [0, 1, 2**32 - 1, 2**63 + 12345, -1])
def test_dropout_has_the_bits_of_the_reference(dtype, seed):
    """x of ones against A of ones in one column at a time, so that S says which elements were kept."""
    rows, columns, rate = 70, 140, 0.3
    kept = reference.lora_dropout_mask(seed, rows, columns, rate)
    x, eye = torch.ones(rows, columns, dtype=dtype), torch.eye(columns)
    tensors = {"x": x, "weight": torch.zeros(1, columns, dtype=dtype), "lora_A": eye, "lora_B": torch.zeros(1, columns)}
    call = prepare(**tensors, bias=None, dropout=rate, seed=seed)
    tail = (call.scale, call.p, columns, False, rate, call.seed, False)
    ops = torch.ops.trifuse_emulated
    _, S = ops.lora_linear_fwd(*call[:5], *tail, True)
    assert torch.equal(S != 0, kept)
    assert torch.allclose(S[kept], torch.tensor(1 / (1 - rate)))
    # dx is Z A o mask with Z = 1 in every rank, dA the sums of the columns of x~
    grads = ops.lora_linear_bwd(
        x[:, :1].contiguous(), x, call.weight, call.lora_A, torch.ones(1, columns), S, *tail, [True, *[False] * 2, True,
        False, False],
    )  # fmt: skip
    assert torch.equal(grads[0] != 0, kept)
    compare({"dA": grads[3]}, {"dA": (kept.double().sum(0) / (1 - rate)).expand(columns, -1)}, {"dA": 0.0})


@pytest.mark.parametrize("needs", [("x",), ("lora_A",), ("lora_B",), ("scale",), ("weight", "bias"), ("x", "scale")])
@pytest.mark.parametrize("rows", [50, 130])
def test_what_is_not_asked_for_is_not_made(needs, rows):
    check(make(rows, 140, 150, 6, vector=True), needs=needs, dropout=0.1, seed=1)


def test_without_kept_sums_they_are_made_again():
    tensors = make(30, 140, 150, 6, vector=True)
    check(tensors, save=False, dropout=0.1, seed=1)


def test_few_rows_and_many_columns_are_summed_in_pieces():
    check(make(3, 1300, 1100, 5, torch.bfloat16))


@dtypes
def test_lead_axes_and_no_bias(dtype):
    check(make(5, 48, 56, 4, dtype, bias=False, lead=(2, 3)))


def test_the_numbers_do_not_depend_on_the_gpu():
    tensors = make(300, 300, 300, 9)
    before = run_emulated(tensors)
    library.trifuse_emulator_set_multiprocessors(132)
    try:
        after = run_emulated(tensors)
    finally:
        library.trifuse_emulator_set_multiprocessors(1)
    assert all(torch.equal(value, after[name]) for name, value in before.items())
