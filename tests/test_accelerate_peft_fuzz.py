"""``accelerate_peft`` beside PEFT for settings that hypothesis draws."""

import copy
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import trifuse

pytest.importorskip("peft", reason="PEFT is not installed: its layers are not tested")

from peft import LoraConfig, get_peft_model
from transformers.pytorch_utils import Conv1D

from trifuse.integrations.peft_fused import FusedLinear

SIZES = st.sampled_from([1, 2, 7, 16, 33])
ADAPTER = st.fixed_dictionaries(
    {
        "r": st.integers(1, 9),
        "lora_alpha": st.sampled_from([0.5, 1, 8]),
        "use_rslora": st.booleans(),
        "use_dora": st.booleans(),
        "lora_dropout": st.sampled_from([0.0, 0.3]),
    }
)


def gradients(model, x, **options):
    model.zero_grad()
    x = x.clone().requires_grad_()
    y = model(x, **options)
    y.square().sum().backward()
    return [y.detach(), x.grad, *(None if p.grad is None else p.grad.clone() for p in model.parameters())]


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_outputs_and_gradients_are_pefts(data):
    """Of a random layer, with random adapters in random states; dropout is off, or PEFT's own call is made."""
    draw = data.draw
    torch.manual_seed(draw(st.integers(0, 99)))
    columns, out, rows = draw(SIZES), draw(SIZES), draw(st.sampled_from([(), (1,), (5,), (0,), (2, 3), (2, 0, 3)]))
    kind = draw(st.sampled_from(["linear", "without a bias", "Conv1D"]))
    layer = Conv1D(out, columns) if kind == "Conv1D" else nn.Linear(columns, out, bias=kind == "linear")
    names = [f"adapter{i}" for i in range(draw(st.integers(1, 3)))]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        configs = [LoraConfig(target_modules=["0"], init_lora_weights=False, **draw(ADAPTER)) for _ in names]
        model = get_peft_model(nn.Sequential(layer.double()), configs[0], adapter_name=names[0])
        for name, config in zip(names[1:], configs[1:], strict=True):
            model.add_adapter(name, config)
    model.base_model.set_adapter(draw(st.lists(st.sampled_from(names), unique=True)) or names[:1])
    if draw(st.booleans()):
        layer.requires_grad_(True)
    x = torch.randn(*rows, columns, dtype=torch.float64)
    model.train(draw(st.booleans()))
    options = {}
    if rows and not any(config.use_dora for config in configs) and draw(st.booleans()):
        model.eval()
        choice = st.sampled_from([*names, "__base__"])
        options["adapter_names"] = [draw(choice) for _ in range(rows[0])]
    fused_layer = copy.deepcopy(model)
    assert trifuse.accelerate_peft(fused_layer).fused == ("base_model.model.0",)
    assert type(fused_layer.base_model.model[0]) is FusedLinear
    if model.training and any(config.lora_dropout for config in configs):
        for one in (model, fused_layer):  # masks differ
            for module in one.modules():
                if isinstance(module, nn.Dropout):
                    module.p = 0.0
    for ours, theirs in zip(gradients(fused_layer, x, **options), gradients(model, x, **options), strict=True):
        if ours is None or theirs is None:  # PEFT leaves none where no row has the adapter
            assert (ours if theirs is None else theirs) is None or not (ours if theirs is None else theirs).any()
        else:
            torch.testing.assert_close(ours, theirs)
