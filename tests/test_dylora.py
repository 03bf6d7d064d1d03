"""Nested ranks: rank b is an adapter of its own, in training, evaluation and merged, and the others keep still."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import trifuse
from trifuse.nn import DyLoRAConv1d, DyLoRALinear, LoRALinear

RANK, ALPHA = 5, 7.0


def linear(**options):
    torch.manual_seed(0)
    made = DyLoRALinear(10, 12, dtype=torch.float64, **{"rank": RANK, "alpha": ALPHA, **options})
    nn.init.normal_(made.lora_B)
    return made


def conv():
    torch.manual_seed(0)
    made = DyLoRAConv1d(12, 12, 4, groups=12, padding=3, dtype=torch.float64, rank=RANK, alpha=ALPHA)
    nn.init.normal_(made.lora_B)
    return made


def model():
    torch.manual_seed(0)
    made = nn.Sequential(linear(), nn.Tanh(), DyLoRALinear(12, 4, dtype=torch.float64, rank=3, alpha=ALPHA))
    nn.init.normal_(made[2].lora_B)
    return made


def tokens():
    return torch.randn(6, 10, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("scaling", ["lora", "rslora"])
@pytest.mark.parametrize("rank", range(1, RANK + 1))
def test_at_rank_b_it_is_the_adapter_of_the_first_b_ranks(rank, scaling):
    made, x = linear(scaling=scaling), tokens()
    made.set_rank(rank)
    scale = ALPHA / (rank if scaling == "lora" else rank**0.5)
    assert made.scale == pytest.approx(scale)
    other = LoRALinear(10, 12, dtype=torch.float64, rank=rank, alpha=ALPHA, scaling=scaling)
    other.load_state_dict({**made.state_dict(), "lora_A": made.lora_A[:rank], "lora_B": made.lora_B[:, :rank]})
    torch.testing.assert_close(made(x), other(x))
    got = torch.autograd.grad(made(x).square().sum(), (made.lora_A, made.lora_B))
    want = torch.autograd.grad(other(x).square().sum(), (other.lora_A, other.lora_B))
    torch.testing.assert_close(got[0], F.pad(want[0], (0, 0, 0, RANK - rank)))
    torch.testing.assert_close(got[1], F.pad(want[1], (0, RANK - rank)))


@pytest.mark.parametrize("rank", [1, 3, RANK])
@pytest.mark.parametrize("make", [linear, conv])
def test_frozen_training_at_rank_b_trains_row_and_column_b(make, rank):
    made = make()
    x = tokens() if make is linear else torch.randn(2, 12, 7, dtype=torch.float64)
    made.set_rank(rank)
    free = torch.autograd.grad(made(x).square().sum(), (made.lora_A, made.lora_B))
    out = made(x).detach()
    made.frozen = True
    torch.testing.assert_close(made(x).detach(), out)
    bound = torch.autograd.grad(made(x).square().sum(), (made.lora_A, made.lora_B))
    for one, all_of_it in zip((bound[0], bound[1].t()), (free[0], free[1].t()), strict=True):
        torch.testing.assert_close(one[rank - 1], all_of_it[rank - 1])
        assert one[rank - 1].abs().max() > 0
        assert one[: rank - 1].abs().sum() == 0 and one[rank:].abs().sum() == 0


def test_the_factors_say_which_ranks_are_trained():
    made = linear()
    assert made.lora_A.active_rows == made.lora_B.active_rows == (0, RANK)
    made.set_rank(3)
    assert made.lora_A.active_rows == made.lora_B.active_rows == (0, 3)
    made.frozen = True
    assert made.lora_A.active_rows == made.lora_B.active_rows == (2, 3)
    assert copy.deepcopy(made).lora_A.active_rows == (2, 3)
    assert linear(frozen=True).lora_B.active_rows == (4, 5)
    made.change_rank(2)
    assert made.active_rank == 2 and made.lora_A.active_rows == (1, 2)
    assert made.float().lora_B.active_rows == (1, 2)


def test_every_rank_is_visited_and_the_own_one_comes_back():
    made = linear()
    made.set_rank(2)
    seen = {rank: made(tokens()).detach() for rank in made.ranks()}
    assert list(seen) == [1, 2, 3, 4, 5] and made.active_rank == 2
    assert torch.equal(seen[2], made(tokens()))
    for rank in made.ranks((5, 1)):
        assert made.active_rank == rank
        if rank == 1:
            break
    assert made.active_rank == 2


def test_ranks_are_drawn_as_asked():
    made, generator = linear(), torch.Generator().manual_seed(0)
    drawn = torch.tensor([made.sample_rank(generator=generator) for _ in range(4000)])
    assert made.active_rank == drawn[-1]
    counts = drawn.bincount(minlength=RANK + 1)[1:]
    assert (counts / 4000 - 1 / RANK).abs().max() < 0.03 and len(counts) == RANK
    drawn = torch.tensor([made.sample_rank("geometric", generator, p=0.4) for _ in range(4000)])
    wanted = 0.6 ** torch.arange(RANK)
    counts = drawn.bincount(minlength=RANK + 1)[1:]
    assert (counts / 4000 - wanted / wanted.sum()).abs().max() < 0.03
    torch.manual_seed(3)
    first = [made.sample_rank() for _ in range(5)]
    torch.manual_seed(3)
    assert [made.sample_rank() for _ in range(5)] == first


@pytest.mark.parametrize("make", [linear, conv])
def test_merged_it_follows_the_active_rank(make):
    made = make()
    base = made.weight.detach().clone()
    x = tokens() if make is linear else torch.randn(2, 12, 7, dtype=torch.float64)
    wanted = {rank: made(x).detach() for rank in made.ranks()}
    made.merge()
    with torch.no_grad():
        for rank in made.ranks():
            torch.testing.assert_close(made(x), wanted[rank])
    made.unmerge()
    assert torch.equal(made.weight, base)


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("rank", [2, 8])
def test_another_rank_leaves_what_every_rank_does(merged, rank):
    made, x = linear(), tokens()
    wanted = {one: made(x).detach() for one in made.ranks()}
    if merged:
        made.merge()
    made.change_rank(rank)
    assert made.rank == rank and made.alpha == ALPHA and made.active_rank == min(RANK, rank)
    with torch.no_grad():
        for one in made.ranks(range(1, min(RANK, rank) + 1)):
            torch.testing.assert_close(made(x), wanted[one])


def test_one_rank_is_set_and_drawn_for_all_layers_of_a_model():
    made = model()
    trifuse.set_rank(made, 4)
    assert (made[0].active_rank, made[2].active_rank) == (4, 3)
    trifuse.set_rank(made, 2)
    for _ in range(20):
        rank = trifuse.sample_rank(made, "geometric")
        assert (made[0].active_rank, made[2].active_rank) == (rank, min(rank, 3))
    trifuse.set_rank(made, 2)
    outs = {rank: made(tokens()).detach() for rank in trifuse.ranks(made)}
    assert list(outs) == [1, 2, 3, 4, 5]
    assert (made[0].active_rank, made[2].active_rank) == (2, 2)
    assert torch.equal(outs[2], made(tokens()).detach()) and not torch.equal(outs[2], outs[5])


def test_it_learns_every_rank_at_once():
    """After training at drawn ranks each rank is nearer to the target than one less."""
    torch.manual_seed(0)
    target = torch.randn(12, 4, dtype=torch.float64) @ torch.diag(torch.tensor([4.0, 3, 2, 1]).double())
    target = target @ torch.randn(4, 10, dtype=torch.float64) / 10
    made = DyLoRALinear(10, 12, bias=False, dtype=torch.float64, rank=4, scaling="rslora")
    optimizer = torch.optim.Adam([made.lora_A, made.lora_B], lr=0.02)
    generator = torch.Generator().manual_seed(0)
    for _ in range(400):
        made.sample_rank(generator=generator)
        x = torch.randn(64, 10, generator=generator, dtype=torch.float64)
        optimizer.zero_grad()
        F.mse_loss(made(x), F.linear(x, made.weight + target)).backward()
        optimizer.step()
    x = torch.randn(256, 10, generator=generator, dtype=torch.float64)
    losses = [F.mse_loss(made(x), F.linear(x, made.weight + target)).item() for _ in made.ranks()]
    assert losses == sorted(losses, reverse=True) and losses[-1] < 0.2 * losses[0]


def test_frozen_ranks_keep_every_bit_through_an_optimizer_that_knows_them():
    """AdamW with weight decay and momentum at drawn ranks moves the rank that is trained and no other."""
    made, generator = linear(frozen=True), torch.Generator().manual_seed(0)
    optimizer = trifuse.optim.LowRankAdamW(made.parameters(), lr=0.01, weight_decay=0.1)
    moved = set()
    for _ in range(50):
        rank = made.sample_rank(generator=generator)
        before = made.lora_A.detach().clone(), made.lora_B.detach().clone()
        optimizer.zero_grad()
        made(tokens()).square().mean().backward()
        optimizer.step()
        changed = (made.lora_A != before[0]).any(1), (made.lora_B != before[1]).any(0)
        for rows in changed:
            assert rows.nonzero().flatten().tolist() == [rank - 1]
        moved.add(rank)
    assert moved == {1, 2, 3, 4, 5}


@pytest.mark.parametrize("rank", [0, RANK + 1, -1, 1.5, True])
def test_a_rank_outside_is_refused(rank):
    made = linear()
    for wrong in (made.set_rank, lambda rank: trifuse.set_rank(made, rank)):
        with pytest.raises(ValueError, match=f"rank is {rank}; it must be 1 to {RANK}"):
            wrong(rank)
    assert made.active_rank == RANK


def test_other_bad_input_is_named():
    with pytest.raises(ValueError, match='distribution is \'normal\'; it must be "uniform" or "geometric"'):
        linear().sample_rank("normal")
    with pytest.raises(ValueError, match=r"p is 1.0; it must be in \(0, 1\)"):
        linear().sample_rank("geometric", p=1.0)
    for call in (trifuse.set_rank, lambda model, _: trifuse.sample_rank(model)):
        with pytest.raises(ValueError, match="the model has no layer with nested ranks"):
            call(nn.Sequential(LoRALinear(4, 4)), 1)
    with pytest.raises(ValueError, match="rank is 0"):
        linear().change_rank(0)
