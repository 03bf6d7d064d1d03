"""Merged layers: every bit comes back, a checkpoint never holds the sum, and no gradient is lost without a word."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

from trifuse.nn import DoRALinear, DyLoRAConv1d, DyLoRALinear, LoRAConv1d, LoRAEmbedding, LoRALinear

CONV = {"groups": 12, "padding": 3}
LAYERS = {
    "LoRALinear": lambda dtype: LoRALinear(10, 12, dtype=dtype, rank=4, alpha=6),
    "rows": lambda dtype: LoRALinear(10, 12, dtype=dtype, rank=4, alpha=6, rows=[0, 3, 4]),
    "DyLoRALinear": lambda dtype: DyLoRALinear(10, 12, dtype=dtype, rank=4, alpha=6),
    "DoRALinear": lambda dtype: DoRALinear(10, 12, dtype=dtype, rank=4, alpha=6),
    "LoRAConv1d": lambda dtype: LoRAConv1d(12, 12, 4, dtype=dtype, rank=3, alpha=6, **CONV),
    "DyLoRAConv1d": lambda dtype: DyLoRAConv1d(12, 12, 4, dtype=dtype, rank=3, alpha=6, **CONV),
    "LoRAEmbedding": lambda dtype: LoRAEmbedding(9, 12, dtype=dtype, rank=4, alpha=6),
}
every_layer = pytest.mark.parametrize("kind", LAYERS)
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def layer(kind, dtype=torch.float64, seed=0):
    torch.manual_seed(seed)
    made = LAYERS[kind](dtype)
    with torch.no_grad():
        for name, one in made.named_parameters():
            if name.startswith("lora_"):
                one.add_(0.2 * torch.randn_like(one))
    return made


def run(made):
    generator = torch.Generator().manual_seed(1)
    if isinstance(made, nn.Embedding):
        return made(torch.randint(9, (2, 5), generator=generator))
    shape = (2, 12, 7) if isinstance(made, nn.Conv1d) else (2, 5, 10)
    return made(torch.randn(shape, generator=generator, dtype=torch.float64).to(made.weight.dtype))


def saved(made):
    kept = io.BytesIO()
    torch.save(made.state_dict(), kept)
    kept.seek(0)
    return torch.load(kept)


@every_layer
@pytest.mark.filterwarnings("ignore:lora_merge_")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_unmerging_gives_every_bit_back(kind, dtype):
    made = layer(kind, dtype)
    before = made.weight.detach().clone()
    made.merge()
    assert made.merged and not torch.equal(made.weight, before)
    assert torch.equal(made.original_weight(), before)
    made.unmerge()
    assert not made.merged and torch.equal(made.weight, before)


@every_layer
def test_merged_it_does_what_it_did(kind):
    made = layer(kind)
    expected = run(made).detach()
    made.merge()
    with torch.no_grad():
        torch.testing.assert_close(run(made), expected)
    plain = copy.deepcopy(made)
    plain.requires_grad_(False)
    torch.testing.assert_close(run(plain), expected)


@every_layer
def test_eval_and_train_do_not_merge(kind):
    made = layer(kind)
    before = made.weight.detach().clone()
    made.eval()
    assert not made.merged and torch.equal(made.weight, before)
    made.merge()
    made.train()
    assert made.merged


@every_layer
def test_the_adapter_of_a_merged_layer_does_not_lose_its_gradient_in_silence(kind):
    made = layer(kind)
    made.merge()
    with pytest.raises(RuntimeError, match=r"would get no gradient; unmerge\(\)"):
        run(made)
    made.unmerge()
    run(made).square().sum().backward()
    assert made.lora_A.grad.abs().max() > 0


@every_layer
def test_a_checkpoint_of_a_merged_layer_holds_the_base_and_the_adapter(kind):
    made = layer(kind)
    expected, wanted = run(made).detach(), {name: one.clone() for name, one in made.state_dict().items()}
    made.merge()
    state = saved(made)
    assert state.keys() == wanted.keys()
    assert all(torch.equal(state[name], wanted[name]) for name in wanted)
    assert made.merged
    fresh = layer(kind, seed=1)
    fresh.load_state_dict(state)
    torch.testing.assert_close(run(fresh).detach(), expected, rtol=0, atol=0)


@every_layer
def test_a_checkpoint_that_is_loaded_into_a_merged_layer_unmerges_it(kind):
    made, other = layer(kind), layer(kind, seed=1)
    made.merge()
    made.load_state_dict(other.state_dict())
    assert not made.merged
    assert torch.equal(run(made), run(other))
    base = made.weight.detach().clone()
    made.merge()
    adapter = {name: one for name, one in layer(kind, seed=2).state_dict().items() if name.startswith("lora_")}
    made.load_state_dict(adapter, strict=False)
    assert not made.merged and torch.equal(made.weight, base)


@every_layer
def test_a_merged_layer_can_be_copied_and_pickled(kind):
    made = layer(kind)
    base = made.weight.detach().clone()
    made.merge()
    merged = made.weight.detach().clone()
    kept = io.BytesIO()
    torch.save(made, kept)
    kept.seek(0)
    for other in (copy.deepcopy(made), pickle.loads(pickle.dumps(made)), torch.load(kept, weights_only=False)):
        assert other.merged and torch.equal(other.weight, merged)
        other.unmerge()
        assert torch.equal(other.weight, base)
        assert torch.equal(made.weight, merged) and torch.equal(made.original_weight(), base)


@every_layer
@pytest.mark.filterwarnings("ignore:lora_merge_")
def test_a_merged_layer_that_is_cast_is_the_cast_base_merged_anew(kind):
    made, other = layer(kind, torch.float32), layer(kind, torch.float32)
    made.merge()
    nn.Sequential(made).bfloat16()
    other.bfloat16()
    assert made.merged and made.weight.dtype == torch.bfloat16
    assert torch.equal(made.original_weight(), other.weight)
    other.merge()
    assert torch.equal(made.weight, other.weight)
    made.to("cpu")
    assert torch.equal(made.weight, other.weight)


@pytest.mark.parametrize("kind", ["LoRALinear", "rows", "DyLoRALinear", "LoRAConv1d"])
@pytest.mark.filterwarnings("ignore:lora_merge_")
def test_swapping_is_a_fresh_merge_of_the_other_adapter(kind):
    made, other = layer(kind, torch.bfloat16), layer(kind, torch.bfloat16, seed=1)
    base = made.weight.detach().clone()
    other.load_state_dict({"weight": base, **{k: v for k, v in made.state_dict().items() if k == "bias"}})
    made.merge()
    for scale in (None, 0.3):
        made.swap(other.lora_A, other.lora_B, scale)
        fresh = copy.deepcopy(other)
        if scale is not None:
            fresh.alpha = scale * fresh.rank
        assert made.scale == pytest.approx(fresh.scale)
        fresh.merge()
        assert torch.equal(made.weight, fresh.weight)
    made.unmerge()
    assert torch.equal(made.weight, base) and torch.equal(made.lora_A, other.lora_A)


def test_an_adapter_of_another_rank_can_be_swapped_in():
    made, other = layer("LoRALinear"), LoRALinear(10, 12, dtype=torch.float64, rank=2, alpha=6)
    nn.init.normal_(other.lora_B)
    made.merge()
    made.swap(other.lora_A, other.lora_B)
    assert made.rank == 2 and made.scale == 3
    torch.testing.assert_close(made.weight, made.original_weight() + 3 * other.lora_B @ other.lora_A)


def test_dora_swaps_its_magnitudes_too():
    made, other = layer("DoRALinear"), layer("DoRALinear", seed=1)
    base = made.weight.detach().clone()
    other.load_state_dict({**other.state_dict(), "weight": base, "bias": made.bias})
    made.merge()
    made.swap(other.lora_A, other.lora_B, magnitude=other.lora_magnitude)
    with torch.no_grad():
        torch.testing.assert_close(run(made), run(other))
    made.unmerge()
    assert torch.equal(made.weight, base)


@pytest.mark.parametrize("kind", [kind for kind in LAYERS if not kind.startswith("Dy")])  # those: tests/test_dylora.py
@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("rank", [1, 2, 7])
def test_the_rank_changes_and_the_update_is_the_nearest(kind, merged, rank):
    made = layer(kind)
    A, B, factor = made._update()
    u, s, vh = torch.linalg.svd(factor * B @ A, full_matrices=False)
    nearest = (u[:, :rank] * s[:rank]) @ vh[:rank]
    scale = made.scale
    if merged:
        made.merge()
    made.change_rank(rank)
    assert made.rank == rank and made.lora_A.shape[0] == made.lora_B.shape[1] == rank
    assert made.scale == pytest.approx(scale) and made.merged == merged
    A, B, factor = made._update()
    torch.testing.assert_close(factor * B @ A, nearest)
    if merged and kind != "DoRALinear":
        matrix = made._matrix(made.original_weight()) + nearest
        torch.testing.assert_close(made._matrix(made.weight.detach()), matrix)
    with torch.no_grad():
        out = run(made)
        if merged:
            made.unmerge()
        torch.testing.assert_close(run(made), out)
    if rank == 7:  # the new ranks do nothing yet, and can learn
        run(made).square().sum().backward()
        grown = made.lora_A if kind == "LoRAEmbedding" else made.lora_B
        assert grown.grad.abs().max() > 0


def test_nested_scales_become_part_of_the_factors_when_the_rank_changes():
    torch.manual_seed(0)
    made = LoRALinear(10, 12, dtype=torch.float64, rank=4, nested_ranks=(1, 2, 4))
    nn.init.normal_(made.lora_B)
    expected = run(made).detach()
    made.change_rank(6)
    assert made.nested_ranks is None
    torch.testing.assert_close(run(made).detach(), expected)


@every_layer
def test_what_needs_a_merged_layer_says_so(kind):
    made = layer(kind)
    with pytest.raises(RuntimeError, match="unmerge on a layer that is not merged"):
        made.unmerge()
    with pytest.raises(RuntimeError, match="swap on a layer that is not merged"):
        made.swap(made.lora_A, made.lora_B)
    made.merge()
    with pytest.raises(RuntimeError, match="merge on a layer that is merged"):
        made.merge()
    with pytest.raises(RuntimeError, match="the update is merged"):
        made.reset_lora_parameters()
    with pytest.raises(ValueError, match="they must be"):
        made.swap(made.lora_A[:, 1:], made.lora_B)
    with pytest.raises(ValueError, match="scale is -1; it must be a positive number"):
        made.swap(made.lora_A, made.lora_B, -1)
    with pytest.raises(ValueError, match="rank is 0"):
        made.change_rank(0)


def test_stochastic_rounding_is_repeated_when_a_layer_is_moved():
    made = layer("LoRALinear", torch.bfloat16)
    made.merge(rounding="stochastic")
    merged = made.weight.detach().clone()
    made.to("cpu")
    assert torch.equal(made.weight, merged)
