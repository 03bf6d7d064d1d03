"""What was once wrong with the low-rank layers, kept right."""

import pytest
import torch
from backends_here import cpp_only
from torch import nn

import trifuse


@cpp_only
@pytest.mark.parametrize("rows", [3, 300])
def test_many_rows_of_no_outputs_have_gradients_of_zero(rows):
    A, B = torch.randn(4, 8, requires_grad=True), torch.zeros(0, 4, requires_grad=True)
    with trifuse.backend("cpp"):
        trifuse.lora_linear(torch.randn(rows, 8), torch.zeros(0, 8), None, A, B).sum().backward()
    assert torch.equal(A.grad, torch.zeros(4, 8)) and B.grad.shape == (0, 4)


@cpp_only
def test_the_mask_that_is_drawn_does_not_depend_on_memory_or_backend():
    x, weight, A, B = torch.randn(6, 8), torch.randn(5, 8), torch.randn(2, 8), torch.randn(5, 2)
    outs, after = [], []
    for backend, one in (("cpp", x), ("cpp", x.t().contiguous().t()), ("reference", x)):
        torch.manual_seed(0)
        with trifuse.backend(backend):
            outs.append(trifuse.lora_linear(one, weight, None, A, B, dropout=0.5))
        after.append(torch.rand(1))  # as much of the generator is used
    assert after[0] == after[1] == after[2]
    for one in outs[1:]:
        torch.testing.assert_close(one, outs[0])


@pytest.mark.parametrize("backend", [pytest.param("cpp", marks=cpp_only), "reference"])
def test_a_row_of_zeros_stays_zero_under_dora(backend):
    linear = nn.Linear(8, 5)
    with torch.no_grad():
        linear.weight[2] = 0
    layer, x = trifuse.nn.DoRALinear.from_linear(linear), torch.randn(7, 8)
    with trifuse.backend(backend):
        out = layer(x)
        torch.testing.assert_close(out, linear(x))
        out.square().sum().backward()
        assert all(one.grad.isfinite().all() for one in layer.parameters() if one.requires_grad)
        layer.merge()
    assert layer.weight.isfinite().all()


def test_a_name_that_only_contains_lora_is_no_adapter():
    model = nn.ModuleDict({"flora_net": nn.Linear(4, 4), "q": nn.Linear(4, 4)})
    trifuse.apply_lora(model, "q", rank=2)
    trifuse.mark_only_lora_as_trainable(model)
    trained = {name for name, one in model.named_parameters() if one.requires_grad}
    assert trained == {"q.lora_A", "q.lora_B"} == set(trifuse.lora_state_dict(model))


def test_the_state_of_another_optimizer_is_refused():
    layer = trifuse.nn.LoRALinear(4, 4, rank=2)
    optimizer = trifuse.optim.LowRankAdamW(layer.named_parameters())
    other = torch.optim.AdamW(layer.parameters())
    with pytest.raises(ValueError, match="state_dict is that of another optimizer"):
        optimizer.load_state_dict(other.state_dict())


def test_a_pattern_that_is_no_regular_expression_is_refused():
    with pytest.raises(ValueError, match="no regular expression"):
        trifuse.apply_lora(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), "0", rank=2, rank_pattern={"[": 3})
