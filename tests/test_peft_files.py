"""Adapters in PEFT's files: what PEFT saves is loaded, and what we save PEFT loads."""

import warnings

import pytest
import torch
from torch import nn

import trifuse
from trifuse.nn import DoRALinear, DyLoRALinear, LoRAEmbedding, LoRALinear, MambaLM, MambaLMConfig

pytest.importorskip("peft", reason="PEFT is not installed: its files are not tested")

import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from peft_cases import index, model, saved_by_peft, shaken

from trifuse.integrations.transposed import LoRATransposed

pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out is set", "ignore:Setting `save_embedding_layers`")


OPTIONS = {
    "lora": {},
    "alpha": {"lora_alpha": 5},
    "rslora": {"use_rslora": True, "lora_alpha": 4},
    "dora": {"use_dora": True},
    "ranks and alphas of their own": {
        "rank_pattern": {r"layers\.\d\.q": 2, "^q": 5},
        "alpha_pattern": {"v": 1, r"^layers.0.q": 7},
    },
    "biases of adapted layers": {"bias": "lora_only"},
    "all biases": {"bias": "all"},
    "a regular expression": {"target_modules": r"layers\.1\.(q|v)"},
    "all linear layers": {"target_modules": "all-linear", "exclude_modules": ["head"]},
    "transposed weights": {"target_modules": ["q", "out"], "fan_in_fan_out": True},
    "biases of transposed weights": {"target_modules": ["q", "out"], "fan_in_fan_out": True, "bias": "lora_only"},
    "only transposed weights": {"target_modules": ["out"], "fan_in_fan_out": True},
    "an embedding": {"target_modules": ["q", "embedding"]},
    "one layer": {"layers_to_transform": 1, "layers_pattern": "layers"},
    "some layers": {"layers_to_transform": [0]},
    "excluded layers": {"exclude_modules": ["layers.0.q"]},
    "whole modules": {"modules_to_save": ["norm"]},
    "a whole module with a shared weight": {"modules_to_save": ["head"]},
    "biases and whole modules": {"bias": "all", "modules_to_save": ["norm", "head"]},
    "no start": {"init_lora_weights": False},
}
every_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=list(OPTIONS))


@every_option
def test_what_peft_saved_gives_the_same_outputs(options, tmp_path):
    theirs, ours = saved_by_peft(tmp_path, **options), model()
    assert trifuse.load_peft(ours, tmp_path) is ours
    assert (ours(index()) - model()(index())).abs().max() > 0.01
    torch.testing.assert_close(ours(index()), theirs(index()))


@every_option
def test_what_was_loaded_and_saved_again_gives_peft_the_same_outputs(options, tmp_path):
    theirs, ours = saved_by_peft(tmp_path / "theirs", **options), model()
    trifuse.load_peft(ours, tmp_path / "theirs")
    trifuse.save_peft(ours, tmp_path / "ours")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Found missing adapter keys")
        again = PeftModel.from_pretrained(model(), tmp_path / "ours")
    torch.testing.assert_close(again(index()), theirs(index()))
    adapters = {name for name, _ in theirs.named_parameters() if "lora_" in name}
    assert adapters == {name for name, _ in again.named_parameters() if "lora_" in name}
    once_more = model()
    trifuse.load_peft(once_more, tmp_path / "ours")
    assert all(torch.equal(value, once_more.state_dict()[name]) for name, value in ours.state_dict().items())


@every_option
def test_the_same_parameters_are_trained_and_get_the_same_gradients(options, tmp_path):
    saved_by_peft(tmp_path, **options)
    theirs, ours = PeftModel.from_pretrained(model(), tmp_path, is_trainable=True), model()
    trifuse.load_peft(ours, tmp_path)
    for one in (theirs, ours):
        one(index()).square().sum().backward()

    def gradients(one):
        found = {}
        for name, parameter in one.named_parameters():
            if parameter.grad is not None:
                for old, new in (("base_model.model.", ""), (".default", ""), (".base_layer", ""), ("embedding_", ""),
                                 (".modules_to_save", ""), ("magnitude_vector", "magnitude")):  # fmt: skip
                    name = name.replace(old, new)
                if "lora_" in name:
                    name = name.removesuffix(".weight")
                found[name] = parameter.grad
        return found

    expected, found = gradients(theirs), gradients(ours)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, msg=lambda text, name=name: f"{name}: {text}")


def test_each_kind_of_layer_becomes_its_counterpart(tmp_path):
    saved_by_peft(tmp_path, target_modules=["q", "v", "out", "embedding"], lora_dropout=0.2)
    ours = trifuse.load_peft(model().bfloat16(), tmp_path)
    kinds = {name: type(module) for name, module in ours.named_modules() if getattr(module, "has_adapter", False)}
    assert kinds["embedding"] is LoRAEmbedding and kinds["layers.1.out"] is LoRATransposed
    assert {kinds[name] for name in ("q", "layers.0.q", "layers.1.v")} == {LoRALinear}
    assert ours.q.dropout == ours.layers[0].out.dropout == 0.2
    assert ours.q.weight.dtype == torch.bfloat16 and ours.q.lora_A.dtype == torch.float32
    trained = {name for name, p in ours.named_parameters() if p.requires_grad}
    assert trained == {f"{name}.{factor}" for name in kinds for factor in ("lora_A", "lora_B")}
    half = trifuse.load_peft(model().bfloat16(), tmp_path, adapter_dtype=torch.bfloat16)
    assert half.q.lora_A.dtype == half.layers[0].out.lora_A.dtype == torch.bfloat16


def test_dora_becomes_dora(tmp_path):
    saved_by_peft(tmp_path, use_dora=True)
    ours = trifuse.load_peft(model(), tmp_path)
    assert type(ours.q) is DoRALinear


def test_a_transposed_layer_merges_and_keeps_its_checkpoints(tmp_path):
    saved_by_peft(tmp_path, target_modules=["out"])
    ours, plain = trifuse.load_peft(model(), tmp_path), model()
    layer = ours.layers[0].out
    before, weight = ours(index()), layer.weight.detach().clone()
    assert layer.weight.shape == (6, 8) and layer.lora_A.shape == (3, 6)
    for one in ours.layers:
        one.out.merge()
    with torch.no_grad():
        torch.testing.assert_close(ours(index()), before)
        assert torch.equal(layer.state_dict()["weight"], weight) and not torch.equal(layer.weight, weight)
    with pytest.raises(RuntimeError, match="would get no gradient"):
        ours(index())
    ours.load_state_dict(plain.state_dict(), strict=False)
    assert not layer.merged and torch.equal(layer.weight, weight)


def applied(*args, **options):
    made = trifuse.apply_lora(model(), *args, **options)
    return shaken(made).eval()


def through_peft(made, folder, base=None):
    trifuse.save_peft(made, folder)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Found missing adapter keys")
        return PeftModel.from_pretrained(model() if base is None else base, folder).eval()


@pytest.mark.parametrize("scaling", ["lora", "rslora"])
@pytest.mark.parametrize("rank", [1, 3, 4])
def test_nested_ranks_are_saved_at_the_active_one(rank, scaling, tmp_path):
    made = applied(["q", "v"], 4, alpha=6.0, kind="dylora", scaling=scaling)
    trifuse.set_rank(made, rank)
    theirs = through_peft(made, tmp_path)
    torch.testing.assert_close(theirs(index()), made(index()))
    assert theirs.base_model.model.q.r["default"] == rank
    back = trifuse.load_peft(model(), tmp_path)
    assert torch.equal(back(index()), made(index()))
    assert type(made.q) is DyLoRALinear and type(back.q) is LoRALinear and back.q.alpha == 6.0


def test_factors_of_nested_ranks_go_into_b(tmp_path):
    made = applied(["q"], 4, alpha=2.0, nested_ranks=[1, 2, 4])
    torch.testing.assert_close(through_peft(made, tmp_path)(index()), made(index()))


def test_scales_of_both_kinds_in_one_model(tmp_path):
    made = applied(["q"], 4, alpha=2.0, scaling="rslora")
    layer = LoRALinear.from_linear(made.layers[1].v, rank=3, alpha=2.0)
    made.layers[1].v = shaken(layer)
    theirs = through_peft(made, tmp_path)
    torch.testing.assert_close(theirs(index()), made(index()))
    assert not theirs.peft_config["default"].use_rslora


def test_merged_layers_are_saved_as_adapters(tmp_path):
    made = applied(["q", "v"], 2)
    expected = made(index())
    for layer in made.modules():
        if getattr(layer, "has_adapter", False):
            layer.merge()
    torch.testing.assert_close(through_peft(made, tmp_path)(index()), expected)


def test_what_else_is_trained_is_saved(tmp_path):
    made = trifuse.apply_lora(model(), ["v"], 2)
    for module in (made.layers[1].norm, made.q):
        module.requires_grad_(True)
    made.layers[0].norm.bias.requires_grad_(True)
    made.head.weight = nn.Parameter(made.head.weight.detach().clone())
    shaken(made)
    theirs = through_peft(made, tmp_path)
    torch.testing.assert_close(theirs(index()), made(index()))
    saved = set(theirs.peft_config["default"].modules_to_save)
    assert saved == {"layers.0.norm", "layers.1.norm", "q", "head"}


@pytest.mark.parametrize("trained", ["layers.0.q.bias", "layers.1.norm.bias"])
def test_one_trained_bias_is_saved(trained, tmp_path):
    made = trifuse.apply_lora(model(), ["v", "layers.0.q"], 2)
    made.get_parameter(trained).requires_grad_(True)
    shaken(made)
    torch.testing.assert_close(through_peft(made, tmp_path)(index()), made(index()))


def test_the_configuration_says_what_it_is_told(tmp_path):
    trifuse.save_peft(applied(["q"], 2), tmp_path, "a/model", "FEATURE_EXTRACTION")
    config = LoraConfig.from_pretrained(tmp_path)
    assert (config.base_model_name_or_path, config.task_type) == ("a/model", "FEATURE_EXTRACTION")
    assert config.target_modules == {"q"} and config.lora_alpha == 2


def test_only_the_named_layers_are_targets(tmp_path):
    """ "q" is the ending of other names too."""
    made = applied(["(?:q)", "layers.1.q"], 2, rank_pattern={"(?:q)": 3})
    assert sorted(n for n, m in made.named_modules() if getattr(m, "has_adapter", False)) == ["layers.1.q", "q"]
    theirs = through_peft(made, tmp_path)
    adapted = {name.rpartition(".lora_A")[0] for name, _ in theirs.named_parameters() if "lora_A" in name}
    assert adapted == {"base_model.model.q", "base_model.model.layers.1.q"}
    torch.testing.assert_close(theirs(index()), made(index()))
    torch.testing.assert_close(trifuse.load_peft(model(), tmp_path)(index()), made(index()))


def test_adapters_of_mambas_buffers_and_their_parts(tmp_path):
    def language_model():
        torch.manual_seed(0)
        return MambaLM(MambaLMConfig(d_model=16, n_layer=2, vocab_size=13, ssm_cfg={"d_state": 4})).double()

    made = language_model()
    shaken(trifuse.apply_lora(made, ["in_proj.z", "x_proj.B", "x_proj.dt", "dt_proj", "out_proj"], 3)).eval()
    ids = torch.randint(13, (2, 9))

    def logits(one):
        out = one(ids)
        return getattr(out, "logits", out)

    theirs = through_peft(made, tmp_path, language_model())
    torch.testing.assert_close(logits(theirs), logits(made))
    back = trifuse.load_peft(language_model(), tmp_path)
    torch.testing.assert_close(logits(back), logits(made))
    taps = trifuse.apply_lora(language_model(), "mamba-buffers", 2)
    with pytest.raises(
        ValueError, match=r"conv1d' is a LoRAConv1d; PEFT has no low-rank update of a convolution's taps"
    ):
        trifuse.save_peft(taps, tmp_path / "taps")
    assert not (tmp_path / "taps").exists()


def test_layers_where_peft_refuses_adapters_are_named(tmp_path):
    config = transformers.MambaConfig(vocab_size=61, hidden_size=16, num_hidden_layers=1, state_size=4)
    made = transformers.MambaForCausalLM(config).requires_grad_(False)
    layer = made.backbone.layers[0].mixer
    layer.in_proj = LoRALinear.from_linear(layer.in_proj)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trifuse.save_peft(made, tmp_path)
    layer.out_proj = LoRALinear.from_linear(layer.out_proj)
    with pytest.warns(
        UserWarning, match=r"on backbone\.layers\.0\.mixer\.out_proj of a mamba model, where PEFT refuses"
    ):
        trifuse.save_peft(made, tmp_path)


CONFIGS = {
    "llama": lambda: transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2,
        )
    ),
    "gpt2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=61, n_embd=32, n_layer=2, n_head=4, n_positions=32, bos_token_id=0,
                                eos_token_id=0)
    ),
}  # fmt: skip


@pytest.mark.parametrize("make", CONFIGS.values(), ids=list(CONFIGS))
def test_transformers_models_there_and_back(make, tmp_path):
    def base():
        torch.manual_seed(0)
        return make().double().eval()

    ids = torch.randint(61, (2, 9))
    options = {"target_modules": "all-linear", "r": 4, "task_type": "CAUSAL_LM", "modules_to_save": ["lm_head"]}
    theirs = shaken(get_peft_model(base(), LoraConfig(**options))).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    ours = trifuse.load_peft(base(), tmp_path / "theirs")
    with torch.no_grad():
        expected = theirs(input_ids=ids).logits
        torch.testing.assert_close(ours(input_ids=ids).logits, expected)
        again = through_peft(ours, tmp_path / "ours", base())
        torch.testing.assert_close(again(input_ids=ids).logits, expected)
