"""Dropout of lora_linear: the random words against published ones, the mask against the words, on every kernel that
this machine can run."""

import pytest
import torch
import torch.nn.functional as F
from backends_here import cpp_only, kernels_of
from lora_linear_cases import check, make, run
from torch.utils.checkpoint import checkpoint

import trifuse
from trifuse.reference import lora_dropout_mask
from trifuse.reference.philox import philox_words

pytestmark = pytest.mark.usefixtures("poisoned_memory")
kernels = kernels_of("cuda", "triton")
SEEDS = (0, 1, -1, 2**32, 2**62 + 12345)
every_seed = pytest.mark.parametrize("seed", SEEDS)


# ---- the words


def philox4x32_10(counter, key):
    """The rounds of the paper, in Python's whole numbers."""
    word, (left, right), low = list(counter), key, 0xFFFFFFFF
    for _ in range(10):
        first, second = word[0] * 0xD2511F53, word[2] * 0xCD9E8D57
        word = [second >> 32 ^ word[1] ^ left, second & low, first >> 32 ^ word[3] ^ right, first & low]
        left, right = left + 0x9E3779B9 & low, right + 0xBB67AE85 & low
    return word


PI = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)
KNOWN = [  # kat_vectors of Random123
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (PI, (0xA4093822, 0x299F31D0), (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
]


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN)
def test_the_rounds_give_the_published_words(counter, key, words):
    assert tuple(philox4x32_10(counter, key)) == words


@every_seed
def test_reference_words_are_those_of_the_rounds(seed):
    found = philox_words(seed, 3, 10)
    assert found.shape == (3, 10) and found.dtype == torch.int64
    key = seed % 2**32, seed % 2**64 >> 32
    for row in range(3):
        wanted = [word for group in range(3) for word in philox4x32_10((group, 0, row, 0), key)]
        assert found[row].tolist() == wanted[:10]
    assert torch.equal(found, philox_words(torch.tensor([seed]), 3, 10))
    if seed == 0:
        assert found[0, :4].tolist() == list(KNOWN[0][2])


# ---- the mask


@every_seed
@pytest.mark.parametrize("rate", [0.0, 1e-12, 0.25, 1 - 1e-9])
def test_reference_mask_compares_words_with_the_rate(seed, rate):
    mask, words = lora_dropout_mask(seed, 40, 70, rate), philox_words(seed, 40, 70)
    assert mask.dtype == torch.bool and torch.equal(mask, words >= round(rate * 2**32))


def test_reference_drops_then_adapts():
    tensors = make(rows=9, dtype=torch.float64)
    kept = lora_dropout_mask(5, 9, 40, 0.4)
    update = F.linear(F.linear(tensors["x"] * kept / 0.6, tensors["lora_A"]), tensors["lora_B"]) * tensors["scale"]
    found = run("reference", tensors, needs=(), dropout=0.4, seed=5)["y"]
    torch.testing.assert_close(found, F.linear(tensors["x"], tensors["weight"], tensors["bias"]) + update)


@pytest.mark.parametrize("rate", [0.05, 0.5, 0.9])
def test_the_share_of_kept_elements_is_what_was_asked_for(rate):
    n, masks = 64 * 1024, [lora_dropout_mask(seed, 64, 1024, rate) for seed in (3, 4)]
    keep = 1 - rate
    for mask in masks:
        assert abs(mask.sum() - n * keep) < 5 * (n * keep * rate) ** 0.5
        for axis in (0, 1):  # no row, and no column, is favoured
            count = mask.shape[axis]
            assert (mask.sum(axis) - count * keep).abs().max() < 6 * (count * keep * rate) ** 0.5 + 1
    same, chance = (masks[0] == masks[1]).sum(), keep**2 + rate**2
    assert abs(same - n * chance) < 5 * (n * chance * (1 - chance)) ** 0.5


def masks_of(backend, device, rows, columns, rate, seed, dtype=torch.float32):
    """What a kernel keeps in the forward pass, in dx and in dA, of ones: the weight is zero, the factors one."""
    eye = torch.eye(columns, dtype=dtype, device=device)
    x = torch.ones(rows, columns, dtype=dtype, device=device, requires_grad=True)
    A = eye.clone().requires_grad_()
    with trifuse.backend(backend):
        y = trifuse.lora_linear(x, torch.zeros_like(eye), None, A, eye, dropout=rate, seed=seed)
        dx, _ = torch.autograd.grad(y.sum(), (x, A), retain_graph=True)
        dA = [torch.autograd.grad(y[row, 0], A, retain_graph=True)[0][0] for row in range(rows)]
    return y.detach().cpu(), dx.cpu(), torch.stack(dA).cpu()


@kernels
@every_seed
@pytest.mark.parametrize("rate", [1e-12, 0.1, 0.999])
@pytest.mark.parametrize("columns", [3, 64, 130])
def test_forward_and_backward_keep_what_the_reference_keeps(backend, device, seed, rate, columns):
    kept = lora_dropout_mask(seed, 9, columns, rate)
    for found in masks_of(backend, device, 9, columns, rate, seed):
        assert torch.equal(found != 0, kept)
        torch.testing.assert_close(found[kept], torch.full_like(found[kept], 1 / (1 - rate)), rtol=1e-6, atol=0)


@cpp_only
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_every_instruction_set_keeps_the_same(isa, dtype):
    kept = lora_dropout_mask(77, 5, 333, 0.3)
    for found in masks_of("cpp", "cpu", 5, 333, 0.3, 77, dtype):
        assert torch.equal(found != 0, kept)


@kernels
def test_rows_are_counted_through_all_leading_axes(backend, device):
    tensors = make(rows=30)
    folded = tensors | {"x": tensors["x"].view(2, 5, 3, 40)}
    flat, deep = (run(backend, one, device=device, needs=(), dropout=0.5, seed=3)["y"] for one in (tensors, folded))
    assert torch.equal(deep.view(30, 24), flat)


@kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("adapter", ["float32", "of x"])
@pytest.mark.parametrize("vector", [False, True])
@pytest.mark.parametrize("options", [{}, {"active_rank": 3, "frozen": True}], ids=["", "frozen"])
def test_gradients_through_dropout(backend, device, dtype, adapter, vector, options):
    adapter = torch.float32 if adapter == "float32" else dtype
    check(backend, make(dtype=dtype, adapter_dtype=adapter, vector=vector), device, dropout=0.3, seed=9, **options)


@kernels
@pytest.mark.parametrize("rows, columns", [(1, 40), (65, 63), (300, 70)])
@pytest.mark.parametrize("rate", [0.01, 0.8])
def test_any_size_and_rate(backend, device, rows, columns, rate):
    check(backend, make(rows=rows, columns=columns), device, dropout=rate, seed=2**40 + 1)


@kernels
def test_the_expectation_is_the_layer_without_dropout(backend, device):
    tensors, count = make(rows=4), 600
    plain = run(backend, tensors, device=device, needs=())["y"].double()
    draws = torch.stack(
        [run(backend, tensors, device=device, needs=(), dropout=0.3, seed=seed)["y"].double() for seed in range(count)]
    )
    assert ((draws.mean(0) - plain).abs() < 5 * draws.std(0) / count**0.5).all()


# ---- seeds


@kernels
def test_a_seed_is_a_number_or_a_tensor(backend, device):
    tensors = make()
    number, tensor, wrapped = (
        run(backend, tensors, device=device, needs=(), dropout=0.5, seed=seed)["y"]
        for seed in (-3, torch.tensor(-3, device=device), 2**64 - 3)
    )
    assert torch.equal(number, tensor) and torch.equal(number, wrapped)


@kernels
def test_without_a_seed_torchs_generator_gives_one(backend, device):
    tensors = make()

    def draw():
        return run(backend, tensors, device=device, needs=(), dropout=0.5)["y"]

    torch.manual_seed(1)
    first, second = draw(), draw()
    torch.manual_seed(1)
    assert torch.equal(draw(), first) and not torch.equal(first, second)


@kernels
@pytest.mark.parametrize("options", [{"training": False, "dropout": 0.5, "seed": 3}, {"dropout": 0.0, "seed": 3}])
def test_nothing_is_dropped_outside_of_training_or_at_rate_0(backend, device, options):
    tensors = make()
    state = torch.get_rng_state()
    found, plain = run(backend, tensors, device=device, **options), run(backend, tensors, device=device)
    for name, value in found.items():
        assert torch.equal(value, plain[name]), name
    assert torch.equal(torch.get_rng_state(), state)


@kernels
@pytest.mark.parametrize("vector", [False, True])
def test_checkpointing_draws_the_same_mask_again(backend, device, vector):
    tensors = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in make(vector=vector).items()}
    wanted = [tensors["x"].requires_grad_(), tensors["lora_A"].requires_grad_(), tensors["lora_B"].requires_grad_()]

    def layer(x):
        return trifuse.lora_linear(**tensors | {"x": x}, dropout=0.4).tanh()

    results = []
    for step in (layer, lambda x: checkpoint(layer, x, use_reentrant=False, preserve_rng_state=True)):
        torch.manual_seed(12)
        with trifuse.backend(backend):
            y = step(tensors["x"])
            torch.rand(7)  # what else the model draws meanwhile
            results.append((y, *torch.autograd.grad(y.square().sum(), wanted)))
    for got, expected in zip(*results, strict=True):
        assert torch.equal(got, expected)


@cpp_only
def test_the_mask_does_not_depend_on_the_number_of_threads(threads):
    found = []
    for count in (1, 2):
        threads(count)
        found.append(masks_of("cpp", "cpu", 7, 700, 0.5, 31))
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)
