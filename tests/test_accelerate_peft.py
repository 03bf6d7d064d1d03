"""``accelerate_peft``: the LoRA layers of live PEFT models, fused in place, beside what PEFT computes, and back."""

import copy
import io
import pickle
import subprocess
import sys
import warnings

import pytest
import torch
from tolerance import compare, error, incoming
from torch import nn

pytest.importorskip("peft", reason="PEFT is not installed: its layers are not tested")

import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import Linear
from peft.utils import save_and_load
from transformers.pytorch_utils import Conv1D

import trifuse
from trifuse.integrations.peft_fused import FusedLinear

transformers.utils.logging.set_verbosity_error()
OPTIONS = {
    "lora": {},
    "rslora": {"use_rslora": True, "lora_alpha": 3},
    "dora": {"use_dora": True},
    "dropout in evaluation": {"lora_dropout": 0.3},
}


@pytest.fixture(autouse=True)
def one_thread(threads):
    """These models are tiny: more threads only wait for each other."""
    threads(1)


def network():
    return nn.Sequential(nn.Linear(13, 24), nn.Tanh(), Conv1D(9, 24), nn.Linear(9, 24, bias=False), nn.Linear(24, 5))


# In half precision layers are compared one by one: what lies between two of them is rounded too.
LAYERS = {
    "linear": lambda: nn.Linear(13, 24),
    "without a bias": lambda: nn.Linear(13, 24, bias=False),
    "Conv1D": lambda: Conv1D(24, 13),
}
every_layer = pytest.mark.parametrize("layer", LAYERS.values(), ids=list(LAYERS))


def adapted(*adapters, model=None, **options):
    """A PEFT model whose adapters have an effect, the first of them active."""
    torch.manual_seed(0)
    model = network() if model is None else model
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT sets fan_in_fan_out as each layer needs it, and says so
        for place, name in enumerate(adapters or ("default",)):
            settings = {"r": 3 + 2 * place, "target_modules": ["0", "2", "3"], **options}
            settings["lora_dropout"] = settings.get("lora_dropout", 0.0)
            config = LoraConfig(**settings)
            if place == 0:
                model = get_peft_model(model, config, adapter_name=name)
            else:
                model.add_adapter(name, config)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.3) if "magnitude" not in name else parameter.data.mul_(1.3)
    return model.eval()


def batch(dtype=torch.float32, rows=(2, 7)):
    g = torch.Generator().manual_seed(1)
    return torch.randn(*rows, 13, generator=g, dtype=torch.float64).to(torch.bfloat16).to(dtype)


def outputs_and_gradients(model, x, **options):
    """Output and gradients by name, in what dtype each is."""
    model.zero_grad()
    x = x.clone().requires_grad_()
    y = model(x, **options)
    y.backward(incoming(y.shape, torch.Generator().manual_seed(2)).to(y.dtype))
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad and p.grad is not None}
    return {"output": y.detach(), "x": x.grad, **copy.deepcopy(gradients)}


def check(model, x, autocast=None, eager_dtype=None, **options):
    """The fused layers are as near to float64 as the rule asks; returns what they gave."""
    exact = outputs_and_gradients(copy.deepcopy(model).double(), x.double(), **options)
    with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
        eager = outputs_and_gradients(copy.deepcopy(model).to(eager_dtype), x, **options)
        trifuse.accelerate_peft(model)
        fused = outputs_and_gradients(model, x, **options)
    assert fused.keys() == exact.keys() == eager.keys()
    assert all(fused[name].dtype == (eager_dtype or eager[name].dtype) or "lora_" in name for name in fused)
    compare(fused, exact, {name: error(value, exact[name]) for name, value in eager.items()})
    return fused


def counting(monkeypatch, name):
    """Counts the calls of a function of trifuse."""
    calls, own = [], getattr(trifuse.ops, name)
    monkeypatch.setattr(trifuse.ops, name, lambda *args, **kwargs: calls.append(name) or own(*args, **kwargs))
    return calls


@pytest.mark.parametrize("options", OPTIONS.values(), ids=list(OPTIONS))
def test_outputs_and_gradients_are_those_of_peft_in_float32(options, monkeypatch):
    calls = counting(monkeypatch, "dora_linear" if "use_dora" in options else "lora_linear")
    check(adapted(**options), batch())
    assert len(calls) == 3


@every_layer
@pytest.mark.parametrize("options", OPTIONS.values(), ids=list(OPTIONS))
def test_under_bfloat16_autocast(options, layer, monkeypatch):
    calls = counting(monkeypatch, "dora_linear" if "use_dora" in options else "lora_linear")
    check(adapted(model=nn.Sequential(layer()), target_modules=["0"], **options), batch(), autocast=torch.bfloat16)
    assert len(calls) == 1


@every_layer
@pytest.mark.parametrize("options", OPTIONS.values(), ids=list(OPTIONS))
def test_float32_adapters_on_a_bfloat16_model(options, layer, monkeypatch):
    calls = counting(monkeypatch, "dora_linear" if "use_dora" in options else "lora_linear")
    model = adapted(model=nn.Sequential(layer()).bfloat16(), target_modules=["0"], **options)
    assert {p.dtype for name, p in model.named_parameters() if "lora_A" in name} == {torch.float32}
    # What DoRA's factors scale is rounded to the layer's dtype, as it is by eager code with adapters in that dtype.
    check(model, batch(torch.bfloat16), eager_dtype=torch.bfloat16 if "use_dora" in options else None)
    assert len(calls) == 1


@pytest.mark.parametrize("layer", LAYERS.values(), ids=list(LAYERS))
def test_a_base_layer_that_is_trained_too_and_adapters_in_the_dtype_of_autocast(layer, monkeypatch):
    calls = counting(monkeypatch, "lora_linear")
    model = adapted(model=nn.Sequential(layer()), target_modules=["0"])
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(True)
        parameter.data = parameter.data.bfloat16() if "lora_" in name else parameter.data
    assert "base_model.model.0.base_layer.weight" in check(model, batch(), autocast=torch.bfloat16)
    assert len(calls) == 1


@pytest.mark.parametrize("alphas", [(8, 8), (8, 2)], ids=["of one scale", "of two scales"])
def test_several_active_adapters_add_up(alphas, monkeypatch):
    calls = counting(monkeypatch, "lora_linear")
    model = adapted("one", "two")
    for layer in model.modules():
        if isinstance(layer, Linear):
            layer.scaling.update({"one": alphas[0] / 4, "two": alphas[1] / 4})
    model.base_model.set_adapter(["one", "two"])
    gradients = check(model, batch())
    assert len(calls) == 3
    assert {name.split(".")[-2] for name in gradients if "lora_A" in name} == {"one", "two"}


def test_a_scale_that_is_changed_counts():
    model = adapted()
    trifuse.accelerate_peft(model)
    before = model(batch())
    for layer in model.modules():
        if isinstance(layer, Linear):
            layer.scale_layer(0.0)
    base = model(batch())
    with model.disable_adapter():
        torch.testing.assert_close(base, model(batch()))
    assert (before - base).abs().max() > 0.1


@pytest.mark.parametrize("rows", [(6,), (6, 7)])
def test_a_batch_of_mixed_adapters_is_one_op_and_trains(rows, monkeypatch):
    calls = counting(monkeypatch, "lora_linear_multi")
    model = adapted("one", "two", "unused")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    names = ["two", "__base__", "one", "two", "one", "__base__"]
    gradients = check(model, batch(rows=rows), adapter_names=names)
    assert len(calls) == 3
    trained = {name.split(".")[-2] for name, value in gradients.items() if "lora_A" in name and value.abs().max() > 0}
    assert trained == {"one", "two"}


def test_what_peft_refuses_of_a_mixed_batch_stays_refused():
    model, x = adapted("one", use_dora=True), batch()
    trifuse.accelerate_peft(model)
    with pytest.raises(ValueError, match="Cannot pass `adapter_names` when DoRA"):
        model(x, adapter_names=["one", "one"])
    with pytest.raises(ValueError, match="same as the number of inputs"):
        model(x, adapter_names=["one"])


def test_disabled_and_merged_adapters_give_the_bits_of_peft():
    model = adapted("one", "two")
    theirs, x = copy.deepcopy(model), batch()
    trifuse.accelerate_peft(model)
    with model.disable_adapter(), theirs.disable_adapter():
        assert torch.equal(model(x), theirs(x))
    for one in (model, theirs):
        one.merge_adapter(["one"])
    assert torch.equal(model(x), theirs(x))
    for one in (model, theirs):
        one.unmerge_adapter()
    torch.testing.assert_close(model(x), theirs(x))
    assert all(torch.equal(value, theirs.state_dict()[name]) for name, value in model.state_dict().items())


def test_pefts_bookkeeping_goes_on_in_an_accelerated_model(tmp_path):
    model = adapted("one", "two")
    theirs, x = copy.deepcopy(model), batch()
    trifuse.accelerate_peft(model)
    for one in (model, theirs):
        one.add_weighted_adapter(["one", "two"], [0.7, 0.4], "both", combination_type="cat")
        one.set_adapter("both")
    torch.testing.assert_close(model(x), theirs(x))
    for one in (model, theirs):
        one.delete_adapter("one")
        one.set_adapter("two")
    torch.testing.assert_close(model(x), theirs(x))
    assert [name for name, p in model.named_parameters() if p.requires_grad] == [
        name for name, p in theirs.named_parameters() if p.requires_grad
    ]
    model.save_pretrained(tmp_path, selected_adapters=["two"])
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = PeftModel.from_pretrained(network(), tmp_path / "two")
    torch.testing.assert_close(loaded(x), theirs(x))
    assert type(model.merge_and_unload()[0]) is nn.Linear


def test_restoring_gives_the_same_classes_parameters_and_bits_back():
    model, x = adapted(), batch()
    theirs = model(x)
    modules = [(name, module, type(module)) for name, module in model.named_modules()]
    parameters, keys = list(model.parameters()), list(model.state_dict())
    report = trifuse.accelerate_peft(model)
    assert [type(model.get_submodule(name)) for name in report.fused] == [FusedLinear] * 3
    assert list(model.state_dict()) == keys and str(model.base_model.model[0]).startswith("lora.FusedLinear(")
    assert trifuse.accelerate_peft(model) == report
    assert trifuse.restore_peft(model) == report.fused
    assert [(name, module, type(module)) for name, module in model.named_modules()] == modules
    assert all(now is before for now, before in zip(model.parameters(), parameters, strict=True))
    assert torch.equal(model(x), theirs)
    assert trifuse.restore_peft(model) == ()


def test_an_accelerated_model_is_copied_and_pickled_as_it_is():
    model, x = adapted(), batch()
    trifuse.accelerate_peft(model)
    whole = io.BytesIO()
    torch.save(model, whole)
    whole.seek(0)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(whole, weights_only=False)):
        assert torch.equal(other(x), model(x))
        assert len(trifuse.restore_peft(other)) == 3
    assert isinstance(model.base_model.model[0], FusedLinear)


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_dropout_has_pefts_distribution(rate, monkeypatch):
    """An adapter that is the identity shows its mask."""
    calls = counting(monkeypatch, "lora_linear")
    options = {"target_modules": ["0"], "r": 64, "lora_alpha": 64, "lora_dropout": rate}
    model = adapted(model=nn.Sequential(nn.Linear(64, 64)), **options)
    layer = model.base_model.model[0]
    with torch.no_grad():
        for factor in (layer.lora_A["default"].weight, layer.lora_B["default"].weight):
            factor.copy_(torch.eye(64))
        layer.base_layer.weight.zero_()
        layer.base_layer.bias.zero_()
    trifuse.accelerate_peft(model)
    x = torch.ones(400, 64)
    torch.testing.assert_close(model(x), x)
    model.train()
    y = model(x)
    dropped = y.abs() < 1e-6
    torch.testing.assert_close(y[~dropped], torch.full_like(y[~dropped], 1 / (1 - rate)))
    deviation = (rate * (1 - rate) / y.numel()) ** 0.5
    assert abs(dropped.double().mean().item() - rate) <= 5 * deviation
    assert not torch.equal(model(x), y) and len(calls) == 3


@pytest.mark.parametrize("reentrant", [False, True])
def test_dropout_drops_the_same_again_under_gradient_checkpointing(reentrant):
    model = adapted(lora_dropout=0.4).train()
    trifuse.accelerate_peft(model)
    x = batch().requires_grad_()

    def gradients(forward):
        model.zero_grad()
        x.grad = None
        torch.manual_seed(5)
        forward(x).square().sum().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    plain = gradients(model)
    again = gradients(lambda x: torch.utils.checkpoint.checkpoint(model, x, use_reentrant=reentrant))
    assert len(plain) == 6 and plain.keys() == again.keys()
    assert all(torch.equal(plain[name], again[name]) for name in plain)


LEFT_TO_PEFT = {
    "dora and dropout": {"use_dora": True, "lora_dropout": 0.3},
    "two adapters and dropout": {"adapters": ("one", "two"), "lora_dropout": 0.3},
    "two adapters of dora": {"adapters": ("one", "two"), "use_dora": True},
    "a bias in lora_B": {"lora_bias": True},
}


@pytest.mark.parametrize("options", LEFT_TO_PEFT.values(), ids=list(LEFT_TO_PEFT))
def test_what_is_not_reproduced_is_pefts_own_bit_for_bit(options):
    adapters = options.get("adapters", ("default",))
    model = adapted(*adapters, **{name: value for name, value in options.items() if name != "adapters"})
    if "lora_bias" in options:
        model.base_model.model[3].lora_B["default"].bias = nn.Parameter(torch.ones(24))
    model.base_model.set_adapter(list(adapters))
    model.train()
    theirs, x = copy.deepcopy(model), batch()
    trifuse.accelerate_peft(model)
    torch.manual_seed(3)
    expected = theirs(x)
    torch.manual_seed(3)
    assert torch.equal(model(x), expected)


def test_the_report_says_which_layers_stay_pefts_and_why():
    class Own(nn.Linear):
        def forward(self, x):
            return super().forward(x) + 1

    model = nn.ModuleDict(
        {
            "plain": nn.Linear(4, 4),
            "own": Own(4, 4),
            "embedding": nn.Embedding(4, 4),
            "conv": nn.Conv1d(4, 4, 3),
            "hooked": nn.Linear(4, 4),
        }
    )
    model = get_peft_model(model, LoraConfig(target_modules=list(model), lora_dropout=0.1, use_dora=True))
    model.base_model.model.hooked.base_layer.register_forward_hook(lambda *_: None)
    report = trifuse.accelerate_peft(model)
    prefix = "base_model.model."
    assert report.fused == (prefix + "plain",)
    assert {name.removeprefix(prefix): why for name, why in report.left.items()} == {
        "own": "its base layer is a Own; trifuse reproduces torch.nn.Linear and transformers' Conv1D",
        "embedding": "it is an embedding, for which trifuse has no kernel",
        "conv": "it is a Conv1d; trifuse reproduces peft.tuners.lora.layer.Linear",
        "hooked": "its base layer, a Linear, has hooks or a forward of its own, which a fused op would not call",
    }
    assert "training" in report.sometimes[prefix + "plain"]
    assert str(report).startswith("1 of 5 LoRA layers are fused\n")
    half = adapted().bfloat16()
    half.base_model.model.float()
    for name, parameter in half.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.bfloat16()
    report = trifuse.accelerate_peft(half)
    assert all("torch.bfloat16 beside torch.float32" in when for when in report.sometimes.values())
    assert len(report.sometimes) == 3


def test_variants_of_lora_stay_pefts():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(model, LoraConfig(target_modules=["0"], alora_invocation_tokens=[1]))
    report = trifuse.accelerate_peft(model)
    assert report.fused == () and "ALoraLinearVariant" in report.left["base_model.model.0"]


def test_hooks_that_come_later_are_called():
    model, seen = adapted(), []
    trifuse.accelerate_peft(model)
    layer = model.base_model.model[0]
    for module in (layer, layer.base_layer, layer.lora_A["default"]):
        module.register_forward_hook(lambda module, *_: seen.append(module))
    model(batch())
    assert seen == [layer.base_layer, layer.lora_A["default"], layer]


def test_functional_transforms_go_through_peft():
    model, x = adapted(), batch(rows=(3,))
    trifuse.accelerate_peft(model)
    torch.testing.assert_close(torch.vmap(model)(x), model(x))
    _, tangent = torch.func.jvp(model, (x,), (torch.ones_like(x),))
    assert torch.isfinite(tangent).all()


def test_a_model_without_peft_layers_is_refused():
    for call in (trifuse.accelerate_peft, trifuse.restore_peft):
        with pytest.raises(ValueError, match="a Linear, has no LoRA layers of PEFT"):
            call(nn.Linear(2, 2))


def test_trifuse_is_imported_without_peft():
    code = "import sys, trifuse; sys.exit(any(name in sys.modules for name in ('peft', 'transformers')))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_peft_saves_an_accelerated_model_as_its_own():
    model = adapted()
    own = save_and_load.get_peft_model_state_dict(model)
    trifuse.accelerate_peft(model)
    saved = save_and_load.get_peft_model_state_dict(model)
    assert saved.keys() == own.keys() and all(torch.equal(saved[name], own[name]) for name in own)
