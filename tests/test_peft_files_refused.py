"""What ``load_peft`` refuses and leaves the model as it was, and what ``save_peft`` refuses and writes nothing of."""

import copy
import json

import pytest
import torch
from torch import nn

import trifuse
from trifuse.integrations.placing import Adapter, place

pytest.importorskip("peft", reason="PEFT is not installed: its files are not tested")

from peft import LoraConfig, get_peft_model
from peft_cases import model, of_peft, saved_by_peft
from safetensors.torch import load_file, save_file

UNSUPPORTED = {
    "lora_bias": True,
    "layer_replication": [[0, 2]],
    "trainable_token_indices": [1],
    "target_parameters": ["x.weight"],
    "use_qalora": True,
    "alora_invocation_tokens": [3],
    "use_bdlora": {"nblocks": 2},
    "arrow_config": {"top_k": 2},
    "an_option_of_tomorrow": 1,
    "init_lora_weights": "pissa",
    "peft_type": "LOHA",
    "bias": "some",
    "r": 0,
    "rank_pattern": {"q": "two"},
    "lora_alpha": -1,
    "lora_dropout": 1.0,
    "target_modules": None,
    "use_rslora": "x",
}
MALFORMED = {"rank_pattern": {"[": 2}, "alpha_pattern": [1]}


def refused(made, folder, match, error=ValueError):
    """The load raises, and the model is as it was."""
    state, modules = copy.deepcopy(made.state_dict()), list(made.modules())
    trained = [p.requires_grad for p in made.parameters()]
    with pytest.raises(error, match=match):
        trifuse.load_peft(made, folder)
    assert list(made.modules()) == modules and [p.requires_grad for p in made.parameters()] == trained
    assert all(torch.equal(value, state[name]) for name, value in made.state_dict().items())


@pytest.mark.parametrize(("option", "value"), UNSUPPORTED.items(), ids=list(UNSUPPORTED))
def test_an_unsupported_option_is_named(option, value, tmp_path):
    saved_by_peft(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), option: value}))
    refused(model(), tmp_path, f"^load_peft: {option} is ")


@pytest.mark.parametrize(("option", "value"), MALFORMED.items(), ids=list(MALFORMED))
def test_a_malformed_pattern_is_named(option, value, tmp_path):
    saved_by_peft(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), option: value}))
    refused(model(), tmp_path, f"^load_peft: {option} (is|holds) ")


@pytest.mark.parametrize("text", ["[]", "{"])
def test_a_configuration_that_is_none_is_refused(text, tmp_path):
    saved_by_peft(tmp_path)
    (tmp_path / "adapter_config.json").write_text(text)
    refused(model(), tmp_path, "^load_peft: .*adapter_config.json")


def test_a_file_that_holds_no_tensors_is_refused(tmp_path):
    saved_by_peft(tmp_path)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"nothing of the kind")
    refused(model(), tmp_path, "^load_peft: .*no safetensors file")


def edited(folder, edit, **options):
    saved_by_peft(folder, **options)
    tensors = load_file(folder / "adapter_model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")


Q = "base_model.model.layers.0.q"
FILES = {
    "a factor too few": (lambda t: t.pop(f"{Q}.lora_B.weight"), "holds lora_A; it must be lora_A, lora_B"),
    "a layer too few": (
        lambda t: [t.pop(f"{Q}.lora_{one}.weight") for one in "AB"],
        "lacks the adapters of layers.0.q, which adapter_config.json means",
    ),
    "a layer too many": (
        lambda t: t.update({f"base_model.model.head.lora_{one}.weight": torch.ones(2, 2) for one in "AB"}),
        "has adapters of head, which adapter_config.json does not mean",
    ),
    "a layer that is not there": (
        lambda t: t.update({f"base_model.model.o.lora_{one}.weight": torch.ones(2, 2) for one in "AB"}),
        "has adapters of o; the model has no such modules",
    ),
    "a shape": (
        lambda t: t.update({f"{Q}.lora_B.weight": torch.ones(7, 3)}),
        r"lora_B of 'layers.0.q' has shape \(7, 3\); .* it must be \(8, 3\)",
    ),
    "a rank": (
        lambda t: t.update({f"{Q}.lora_A.weight": torch.ones(2, 8), f"{Q}.lora_B.weight": torch.ones(8, 2)}),
        "'layers.0.q' has rank 2; by adapter_config.json it must be 3",
    ),
    "no matrix": (lambda t: t.update({f"{Q}.lora_A.weight": torch.ones(3)}), "it must be a matrix"),
    "a key": (lambda t: t.update({"base_model.model.o.weight": torch.ones(1)}), "has o.weight; the model has nothing"),
    "a weight": (lambda t: t.update({"base_model.model.q.weight": torch.ones(1)}), "q.weight has shape"),
}


@pytest.mark.parametrize(("edit", "match"), FILES.values(), ids=list(FILES))
def test_a_file_that_does_not_fit_is_refused(edit, match, tmp_path):
    edited(tmp_path, edit)
    refused(model(), tmp_path, match)


def test_what_must_be_there_beside_the_adapters(tmp_path):
    edited(tmp_path / "a", lambda t: t.pop("base_model.model.layers.1.norm.bias"), modules_to_save=["norm"])
    refused(model(), tmp_path / "a", r"lacks layers\.1\.norm\.bias")
    edited(tmp_path / "b", lambda t: t.pop(f"{Q}.base_layer.bias"), bias="lora_only")
    refused(model(), tmp_path / "b", r"lacks layers\.0\.q\.bias")


def test_a_folder_or_a_model_that_is_none(tmp_path):
    refused(model(), tmp_path, "there is no .*adapter_config.json", FileNotFoundError)
    saved_by_peft(tmp_path)
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "adapter_model.bin")
    refused(model(), tmp_path, "adapter_model.bin is a pickle, which is not read", FileNotFoundError)
    (tmp_path / "adapter_model.bin").rename(tmp_path / "adapter_model.safetensors")
    refused(trifuse.apply_lora(model(), ["head"]), tmp_path, r"has adapters already \(head\)")
    refused(of_peft(target_modules=["head"]), tmp_path, r"has adapters already \(base_model.model.head\)")
    convolution = nn.ModuleDict({"q": nn.Conv1d(4, 4, 3), "v": nn.Linear(4, 4)})
    get_peft_model(copy.deepcopy(convolution), LoraConfig(target_modules=["q"])).save_pretrained(tmp_path / "conv")
    refused(convolution, tmp_path / "conv", "lora_A of 'q' has shape|'q' is a Conv1d")


def test_what_peft_cannot_hold_is_refused_and_nothing_written(tmp_path):
    folder = tmp_path / "none"
    multi = trifuse.apply_lora(model(), ["q"], kind="multi")
    mixed = trifuse.apply_lora(model(), ["q", "embedding"], kind="dora")
    rates = trifuse.apply_lora(model(), ["q"], dropout=0.1)
    rates.q.dropout = 0.2
    inside = trifuse.apply_lora(model(), ["q"])
    inside.q.weight.requires_grad_(True)
    for made, match in (
        (model(), "has no adapters of trifuse"),
        (of_peft(), "has no adapters of trifuse"),
        (multi, "MultiLoRALinear of several adapters"),
        (mixed, "embedding have not; PEFT knows all or none"),
        (rates, r"dropout \[0.1, 0.2\]"),
        (inside, "q.weight are trained, in or around 'layers.0.q'"),
    ):
        with pytest.raises(ValueError, match=f"^save_peft: .*{match}"):
            trifuse.save_peft(made, folder)
    assert not folder.exists()


def test_a_layer_that_is_refused_late_leaves_every_other_as_it_was():
    conv1d = pytest.importorskip("transformers.pytorch_utils", reason="transformers is not installed").Conv1D
    model = torch.nn.ModuleDict({"linear": torch.nn.Linear(4, 6), "conv": conv1d(6, 4), "quantized": conv1d(6, 4)})
    model["quantized"].weight = torch.nn.Parameter(torch.ones(4, 6, dtype=torch.int8), requires_grad=False)
    before = {name: (type(one), one) for name, one in model.named_modules()}
    required = {name: one.requires_grad for name, one in model.named_parameters()}
    adapter = Adapter(torch.zeros(2, 4), torch.zeros(6, 2), 2.0)
    with pytest.raises(TypeError, match=r"weight is torch\.int8"):
        place(model, dict.fromkeys(("linear", "conv", "quantized"), adapter))
    assert {name: (type(one), one) for name, one in model.named_modules()} == before
    assert {name: one.requires_grad for name, one in model.named_parameters()} == required
