"""Merging adapters into weights, undoing it, swapping them, and changing their rank."""

import copy
import gc
import pickle
import warnings

import pytest
import torch
from backends_here import kernels_of
from lora_update_cases import HALF, make, moved

import trifuse
from trifuse import reference
from trifuse.ops import lora_update

kernels = kernels_of("cuda", "triton")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.fixture(autouse=True)
def quiet(monkeypatch, poisoned_memory):
    """Merges of random adapters lose little or much: only the tests of the warning hear of it."""
    monkeypatch.setattr(lora_update, "_warned", {torch.float32, torch.float64, *HALF})


@kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_unmerging_restores_every_bit(backend, device, dtype, transposed, rounding):
    weight, *adapter = moved(make(dtype=dtype, rows=40, columns=70), device)
    weight = weight.t().contiguous().t() if transposed else weight
    before = weight.clone()
    with trifuse.backend(backend):
        merge = trifuse.lora_merge_(weight, *adapter, rounding=rounding)
    assert merge.is_merged and not torch.equal(weight, before)
    trifuse.lora_unmerge_(weight, merge)
    assert torch.equal(weight, before) and not merge.is_merged and merge.original is None


@kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_hundred_swaps_are_a_fresh_merge(backend, device, dtype):
    weight = make(dtype=dtype)[0].to(device)
    before = weight.clone()
    with trifuse.backend(backend):
        for seed in range(101):
            _, *adapter = moved(make(dtype=dtype, rank=1 + seed % 9, seed=seed), device)
            if seed == 0:
                merge = trifuse.lora_merge_(weight, *adapter)
            else:
                trifuse.lora_swap_(weight, merge, *adapter)
        fresh = before.clone()
        trifuse.lora_merge_(fresh, *adapter)
    assert torch.equal(weight, fresh)
    trifuse.lora_unmerge_(weight, merge)
    assert torch.equal(weight, before)


@kernels
def test_a_seed_fixes_a_stochastic_merge_and_none_draws_from_torchs_generator(backend, device):
    weight, *adapter = moved(make(dtype=torch.bfloat16), device)

    def merged(**options):
        fresh = weight.clone()
        with trifuse.backend(backend):
            trifuse.lora_merge_(fresh, *adapter, rounding="stochastic", **options)
        return fresh

    assert torch.equal(merged(seed=5), merged(seed=torch.tensor([5], device=device)))
    assert not torch.equal(merged(seed=5), merged(seed=6))
    torch.manual_seed(1)
    drawn = merged()
    assert not torch.equal(drawn, merged())
    torch.manual_seed(1)
    assert torch.equal(drawn, merged())


@kernels
def test_stochastic_merges_are_unbiased_where_nearest_ones_lose_the_update(backend, device):
    """An update of a tenth of a step: nearest never takes it, stochastic rounding takes it a tenth of the time."""
    one = torch.ones(256, 256, dtype=torch.bfloat16, device=device)
    adapter = torch.full((1, 256), 0.1 * 2.0**-7, device=device), torch.ones(256, 1, device=device)
    with trifuse.backend(backend):
        nearest, stochastic = one.clone(), one.clone()
        merge = trifuse.lora_merge_(nearest, *adapter)
        trifuse.lora_merge_(stochastic, *adapter, rounding="stochastic", seed=0)
    assert torch.equal(nearest, one) and merge.lost == pytest.approx(1)
    share = (stochastic - one).float().mean().item() * 2.0**7
    assert abs(share - 0.1) < 4 * (0.1 * 0.9 / 2**16) ** 0.5


@kernels
def test_a_parameter_is_merged_under_autograd(backend, device):
    """In place on a leaf that needs a gradient; a graph that kept the weight is told."""
    weight, *adapter = moved(make(), device)
    weight = torch.nn.Parameter(weight)
    adapter[0].requires_grad_(), adapter[1].requires_grad_()
    kept = (weight * weight).sum()
    with trifuse.backend(backend):
        merge = trifuse.lora_merge_(weight, *adapter)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        kept.backward()
    assert weight.requires_grad and weight.grad_fn is None and not merge.original.requires_grad
    version = weight._version
    with trifuse.backend(backend):
        trifuse.lora_swap_(weight, merge, *adapter)
    assert weight._version > version
    trifuse.lora_unmerge_(weight, merge)


def test_inference_tensors_are_merged():
    with torch.inference_mode():
        weight, *adapter = make()
        before = weight.clone()
        merge = trifuse.lora_merge_(weight, *adapter)
        trifuse.lora_swap_(weight, merge, *adapter)
        trifuse.lora_unmerge_(weight, merge)
        assert torch.equal(weight, before)


@kernels
def test_active_ranks_and_a_scale_per_rank(backend, device):
    weight, lora_A, lora_B, scale = make(rank=6, vector=True)
    wanted, _ = reference.lora_update(weight, lora_A[:4], lora_B[:, :4], scale[:4])
    lora_A[4:] = float("nan")
    weight, *adapter = moved((weight, lora_A, lora_B, scale), device)
    with trifuse.backend(backend):
        trifuse.lora_merge_(weight, *adapter, active_rank=4)
    torch.testing.assert_close(weight.cpu(), wanted)


def test_without_a_copy_nothing_is_kept():
    weight, *adapter = make()
    merge = trifuse.lora_merge_(weight, *adapter, keep=False)
    assert merge.original is None and merge.is_merged
    with pytest.raises(ValueError, match=r"lora_unmerge_: merge kept no copy .* keep=True"):
        trifuse.lora_unmerge_(weight, merge)
    with pytest.raises(ValueError, match=r"lora_swap_: merge kept no copy"):
        trifuse.lora_swap_(weight, merge, *adapter)


def test_a_merge_that_was_undone_is_over():
    weight, *adapter = make()
    merge = trifuse.lora_merge_(weight, *adapter)
    trifuse.lora_unmerge_(weight, merge)
    for call in (lambda: trifuse.lora_unmerge_(weight, merge), lambda: trifuse.lora_swap_(weight, merge, *adapter)):
        with pytest.raises(ValueError, match="merge was undone by lora_unmerge_; the weight must be merged"):
            call()


def test_the_weight_of_another_merge_is_refused():
    weight, *adapter = make()
    other = weight.clone()
    merge = trifuse.lora_merge_(weight, *adapter)
    with pytest.raises(ValueError, match="lora_unmerge_: merge is one of another weight"):
        trifuse.lora_unmerge_(other, merge)
    with pytest.raises(ValueError, match="lora_swap_: merge is one of another weight"):
        trifuse.lora_swap_(other, merge, *adapter)
    with pytest.raises(ValueError, match=r"weight has shape \(37, 69\); it must be the shape of the merged weight"):
        trifuse.lora_unmerge_(weight[:, 1:], merge)
    trifuse.lora_unmerge_(weight.view(weight.shape), merge)  # another tensor on the same memory


def test_copies_of_a_merge_are_those_of_copies_of_the_weight():
    weight, *adapter = make(dtype=torch.bfloat16)
    before = weight.clone()
    merge = trifuse.lora_merge_(weight, *adapter)
    for again in (copy.deepcopy(merge), pickle.loads(pickle.dumps(merge))):
        copied = weight.clone()
        trifuse.lora_unmerge_(copied, again)
        assert torch.equal(copied, before)
    assert merge.is_merged


def test_a_weight_whose_dtype_changed_becomes_the_original_in_that_dtype():
    layer = torch.nn.Linear(8, 6)
    before = layer.weight.detach().clone()
    merge = trifuse.lora_merge_(layer.weight, torch.randn(2, 8), torch.randn(6, 2))
    layer.bfloat16()
    trifuse.lora_swap_(layer.weight, merge, torch.randn(3, 8), torch.randn(6, 3))
    trifuse.lora_unmerge_(layer.weight, merge)
    assert torch.equal(layer.weight, before.bfloat16())


def test_a_merge_does_not_keep_the_weight_alive():
    weight, *adapter = make()
    merge = trifuse.lora_merge_(weight, *adapter)
    reference_to = merge._weight
    del weight
    gc.collect()
    assert reference_to() is None


# ---- the warning


def small_update(dtype):
    """An update of about a thousandth of the weight, which bfloat16 loses a good part of."""
    torch.manual_seed(0)
    weight = torch.randn(64, 64).to(dtype)
    return weight, torch.randn(4, 64), torch.randn(64, 4) * 1e-3


def test_a_lossy_merge_warns_once_with_the_loss_that_was_measured(monkeypatch):
    monkeypatch.setattr(lora_update, "_warned", set())
    weight, *adapter = small_update(torch.bfloat16)
    wanted, _ = reference.lora_update(weight, *adapter)
    update = adapter[1] @ adapter[0]
    lost = ((wanted.float() - weight.float() - update).norm() / update.norm()).item()
    assert lost > 0.05
    says = rf"lora_merge_: rounding to bfloat16 took {lost:.1%} of this update .* float32 copy .*stochastic"
    with pytest.warns(UserWarning, match=says) as caught:
        merge = trifuse.lora_merge_(weight, *adapter)
    assert len(caught) == 1 and caught[0].filename == __file__
    assert merge.lost == pytest.approx(lost, rel=1e-4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trifuse.lora_swap_(weight, merge, *adapter)


def test_a_merge_that_loses_little_says_nothing(monkeypatch):
    monkeypatch.setattr(lora_update, "_warned", set())
    weight, lora_A, lora_B = small_update(torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert trifuse.lora_merge_(weight, lora_A, lora_B).lost < 1e-3
        assert trifuse.lora_merge_(weight.bfloat16(), lora_A, lora_B * 1e3).lost < 0.05
        assert trifuse.lora_merge_(weight, lora_A, lora_B * 0).lost == 0


# ---- another rank


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(40, 30), (6, 50), (50, 6), (3, 4)])
def test_truncation_is_the_nearest_product_of_that_rank(dtype, shape):
    rows, columns = shape
    _, lora_A, lora_B, scale = make(rows, columns, rank=8, dtype=dtype, adapter=dtype, vector=True)
    product = (lora_B.double() * scale) @ lora_A.double()
    left, values, right = torch.linalg.svd(product, full_matrices=False)
    for rank in (1, 3, 8):
        A, B = trifuse.lora_truncate(lora_A, lora_B, rank, scale)
        assert A.shape == (rank, columns) and B.shape == (rows, rank) and A.dtype == B.dtype == dtype
        best = (left[:, :rank] * values[:rank]) @ right[:rank]
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(B.double() @ A.double(), best, rtol=0, atol=8 * eps * values[0].item())
        torch.testing.assert_close(A.double() @ A.double().mT, B.double().mT @ B.double(), rtol=0,
                                   atol=8 * eps * values[0].item())  # fmt: skip


def test_a_larger_rank_has_the_same_product_and_learns():
    _, lora_A, lora_B, _ = make(rank=3)
    A, B = trifuse.lora_change_rank(lora_A, lora_B, 7, 0.5, new_scale=0.25)
    assert A.shape == (7, 70) and B.shape == (37, 7)
    torch.testing.assert_close(0.25 * B @ A, 0.5 * lora_B @ lora_A)
    assert torch.equal(A[:3], lora_A) and not B[:, 3:].any()
    assert 0 < A[3:].abs().max() <= 70**-0.5 and A[3:].std() == pytest.approx((70 * 3) ** -0.5, rel=0.1)


def test_a_smaller_rank_is_truncated_and_uses_the_new_scale():
    _, lora_A, lora_B, _ = make(rank=6)
    A, B = trifuse.lora_change_rank(lora_A, lora_B, 2, 0.5, new_scale=4.0)
    wanted = trifuse.lora_truncate(lora_A, lora_B, 2, 0.5)
    torch.testing.assert_close(4.0 * B @ A, wanted[1] @ wanted[0])


def test_a_merged_layer_changes_its_rank():
    """Truncate, then swap: the weight is the original with the truncated adapter, rounded once."""
    weight, lora_A, lora_B, scale = make(dtype=torch.bfloat16)
    before = weight.clone()
    merge = trifuse.lora_merge_(weight, lora_A, lora_B, scale)
    factors = trifuse.lora_truncate(lora_A, lora_B, 2, scale)
    trifuse.lora_swap_(weight, merge, *factors)
    fresh = before.clone()
    trifuse.lora_merge_(fresh, *factors)
    assert torch.equal(weight, fresh)
