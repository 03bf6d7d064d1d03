"""loralib's state dicts, loaded onto plain models and into layers of trifuse, beside loralib's own layers."""

import copy

import pytest
import torch
from torch import nn

import trifuse
from trifuse.nn import LoRAEmbedding, LoRALinear

loralib = pytest.importorskip("loralib", reason="loralib is not installed: its state dicts are not tested")


def plain():
    torch.manual_seed(0)
    made = nn.Sequential(nn.Embedding(7, 6), nn.Linear(6, 12), nn.Linear(12, 5))
    return made.double()


def theirs(enable=None, alpha=3):
    """The plain model with loralib's layers, whose adapters have an effect."""
    made, weights = plain(), plain().state_dict()
    made[0] = loralib.Embedding(7, 6, r=2, lora_alpha=alpha)
    if enable is None:
        made[1] = loralib.Linear(6, 12, r=3, lora_alpha=alpha)
    else:
        made[1] = loralib.MergedLinear(6, 12, r=3, lora_alpha=alpha, enable_lora=list(enable))
    made.double().load_state_dict(weights, strict=False)
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "lora_" in name:
                parameter.add_(torch.randn(parameter.shape, generator=g, dtype=torch.float64))
    return made.train()


def index():
    return torch.tensor([[0, 6, 3], [2, 2, 1]])


@pytest.mark.parametrize("whole", [False, True])
def test_linear_layers_and_embeddings_give_the_same_outputs(whole):
    source = theirs()
    state = copy.deepcopy(source.state_dict() if whole else loralib.lora_state_dict(source))
    made = plain()
    if whole:
        nn.init.zeros_(made[2].weight)
    assert trifuse.load_loralib(made, state, alpha=3) is made
    assert type(made[0]) is LoRAEmbedding and type(made[1]) is LoRALinear and type(made[2]) is nn.Linear
    torch.testing.assert_close(made(index()), source(index()))
    assert {name for name, p in made.named_parameters() if p.requires_grad} == {
        "0.lora_A", "0.lora_B", "1.lora_A", "1.lora_B"
    }  # fmt: skip


ENABLED = [(True, False, True), (True, True, True), (False, True), (True,), (False, True, False, True)]


@pytest.mark.parametrize("enable", ENABLED, ids=str)
def test_a_merged_linear_becomes_one_adapter(enable):
    source = theirs(enable)
    made = trifuse.load_loralib(plain(), loralib.lora_state_dict(source), alpha=3, enable_lora=enable)
    torch.testing.assert_close(made(index()), source(index()))
    assert made[1].rank == 3 * sum(enable)


def test_parts_that_all_have_adapters_need_no_more_words():
    source = theirs((True, True))
    made = trifuse.load_loralib(plain(), loralib.lora_state_dict(source), alpha=3)
    torch.testing.assert_close(made(index()), source(index()))


def test_layers_of_trifuse_load_such_a_state_dict_by_themselves():
    source, made = theirs(alpha=2), plain()
    trifuse.apply_lora(made, ["0", "1"], 3, alpha=2.0, rank_pattern={"0": 2})
    left = made.load_state_dict(loralib.lora_state_dict(source), strict=False)
    assert not left.unexpected_keys
    torch.testing.assert_close(made(index()), source(index()))


def test_what_does_not_fit_is_refused_and_changes_nothing():
    good = loralib.lora_state_dict(theirs())
    merged = loralib.lora_state_dict(theirs((True, False, True)))
    for state, match, options in (
        ({}, "has no lora_A", {}),
        ({**good, "9.lora_A": torch.ones(2, 2)}, "there are adapters of 9; the model has no such", {}),
        ({key: value for key, value in good.items() if key != "1.lora_B"}, "'1' must have lora_A and lora_B", {}),
        ({**good, "1.lora_A": torch.ones(3, 5)}, r"lora_A of '1' has shape \(3, 5\)", {}),
        ({**good, "2.weight": torch.ones(1)}, r"2.weight has shape \(1,\); the model has one of shape", {}),
        ({**good, "8.weight": torch.ones(1)}, "the model has nothing of the name", {}),
        (merged, r"with 12 outputs and enable_lora \[True, True\]", {}),
        (merged, "enable_lora", {"enable_lora": [True, False, False]}),
    ):
        made = plain()
        before = list(made.modules())
        with pytest.raises(ValueError, match=f"^load_loralib: .*{match}"):
            trifuse.load_loralib(made, state, **options)
        assert list(made.modules()) == before and all(p.requires_grad for p in made.parameters())
