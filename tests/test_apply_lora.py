"""``apply_lora`` and its companions: which layers get an adapter, what is trained, what is saved, what is refused."""

import copy

import pytest
import torch
from torch import nn

import trifuse
from trifuse.nn import (
    DoRALinear,
    DyLoRALinear,
    LoRAConv1d,
    LoRAEmbedding,
    LoRALinear,
    Mamba,
    MambaLM,
    MambaLMConfig,
    MultiLoRALinear,
)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj, self.k_proj, self.o_proj = nn.Linear(8, 8), nn.Linear(8, 8, bias=False), nn.Linear(8, 8)

    def forward(self, x):
        return self.o_proj(torch.tanh(self.q_proj(x)) * self.k_proj(x))


class Model(nn.Module):
    """Two layers with an embedding, norms, and a head that is tied to the embedding."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.layers = nn.ModuleList([Attention(), Attention()])
        self.norm = nn.LayerNorm(8)
        self.classifier = nn.Linear(8, 11, bias=False)
        self.classifier.weight = self.embedding.weight

    def forward(self, index):
        x = self.embedding(index)
        for layer in self.layers:
            x = x + layer(self.norm(x))
        return self.classifier(x)


def model():
    torch.manual_seed(0)
    return Model()


def index():
    return torch.tensor([[1, 2, 10], [0, 3, 3]])


def adapted(made):
    return [name for name, module in made.named_modules() if getattr(module, "has_adapter", False)]


LAYERS = [f"layers.{i}.{name}" for i in range(2) for name in ("q_proj", "k_proj", "o_proj")]
CHOICES = {
    "an ending": ("q_proj", ["layers.0.q_proj", "layers.1.q_proj"]),
    "a name": ("layers.1.k_proj", ["layers.1.k_proj"]),
    "a longer ending": ("1.k_proj", ["layers.1.k_proj"]),
    "several": (["q_proj", "layers.0.o_proj"], ["layers.0.q_proj", "layers.0.o_proj", "layers.1.q_proj"]),
    "an expression": (r"layers\.\d\.[qk]_proj", [name for name in LAYERS if "o_proj" not in name]),
    "an expression and a name": (["layers.0.*", "1.o_proj"], [*LAYERS[:3], "layers.1.o_proj"]),
    "every linear layer": ("all-linear", LAYERS),
    "an embedding": ("embedding", ["embedding"]),
    "the head": ("classifier", ["classifier"]),
}


@pytest.mark.parametrize(("targets", "expected"), CHOICES.values(), ids=list(CHOICES))
def test_layers_are_found_by_name_expression_or_kind(targets, expected):
    plain, made = model(), model()
    assert trifuse.apply_lora(made, targets, rank=2) is made
    assert adapted(made) == expected
    torch.testing.assert_close(made(index()), plain(index()))
    trained = {name for name, one in made.named_parameters() if one.requires_grad}
    assert trained == {f"{name}.lora_{factor}" for name in expected for factor in "AB"}


def test_layers_can_be_left_out():
    assert adapted(trifuse.apply_lora(model(), exclude_modules="k_proj")) == [
        name for name in LAYERS if "k_" not in name
    ]
    made = trifuse.apply_lora(model(), "q_proj", exclude_modules=[r"layers\.1\..*"])
    assert adapted(made) == ["layers.0.q_proj"]


def test_the_head_by_any_of_its_marks_is_no_part_of_all_linear():
    made = trifuse.apply_lora(MambaLM(MambaLMConfig(d_model=16, n_layer=1, vocab_size=20, tie_embeddings=False)))
    assert "lm_head" not in adapted(made) and len(adapted(made)) == 4
    other = model()
    other.get_output_embeddings = lambda: other.layers[0].q_proj
    assert adapted(trifuse.apply_lora(other)) == LAYERS[1:]


def test_the_kind_decides_what_takes_a_layers_place():
    kinds = {"lora": LoRALinear, "dylora": DyLoRALinear, "dora": DoRALinear, "multi": MultiLoRALinear}
    for kind, expected in kinds.items():
        made = trifuse.apply_lora(model(), "q_proj", rank=3, alpha=6, kind=kind)
        assert type(made.layers[0].q_proj) is expected
        made(index()).sum().backward()
    assert type(trifuse.apply_lora(model(), "embedding").embedding) is LoRAEmbedding
    assert type(trifuse.apply_lora(Mamba(8), "conv1d").conv1d) is LoRAConv1d


def test_options_reach_the_layers():
    made = trifuse.apply_lora(model(), ["q_proj", "k_proj"], 4, 8, 0.1, scaling="rslora", nested_ranks=(2, 4))
    layer = made.layers[1].q_proj
    assert (layer.rank, layer.alpha, layer.dropout, layer.scaling) == (4, 8, 0.1, "rslora")
    assert layer.nested_ranks == (2, 4)
    made = trifuse.apply_lora(
        model(),
        "all-linear",
        4,
        alpha=8,
        rank_pattern={"q_proj": 2, r"layers\.1\.k.*": 3},
        alpha_pattern={"0.q_proj": 5},
    )
    layers = dict(made.named_modules())
    assert [layers[name].rank for name in LAYERS] == [2, 4, 4, 2, 3, 4]
    assert [layers[name].alpha for name in LAYERS] == [5, 8, 8, 8, 8, 8]
    assert trifuse.apply_lora(model(), "q_proj", kind="dylora", frozen=True).layers[0].q_proj.frozen
    made = trifuse.apply_lora(model(), "q_proj", kind="multi", adapters=["de", "fr"])
    assert made.layers[0].q_proj.adapter_names == ("de", "fr")
    half = trifuse.apply_lora(model().bfloat16(), "q_proj", adapter_dtype=torch.bfloat16)
    assert half.layers[0].q_proj.lora_A.dtype == torch.bfloat16


def test_a_convolution_has_no_more_ranks_than_taps_and_the_same_scale():
    block = trifuse.apply_lora(Mamba(8, d_conv=3), ["conv1d", "out_proj"], rank=12, alpha=6)
    assert (block.out_proj.rank, block.out_proj.scale) == (12, 0.5)
    assert (block.conv1d.rank, block.conv1d.scale) == (3, 0.5)
    block = trifuse.apply_lora(Mamba(8, d_conv=3), ["conv1d", "out_proj"], rank=12, alpha=6, kind="dylora")
    trifuse.set_rank(block, 2)
    assert block.conv1d.scale == block.out_proj.scale == 3


def test_a_shared_layer_stays_shared():
    made = model()
    made.layers[1].q_proj = made.layers[0].q_proj
    trifuse.apply_lora(made, "layers.0.q_proj", rank=2)
    assert made.layers[1].q_proj is made.layers[0].q_proj and isinstance(made.layers[0].q_proj, LoRALinear)


def test_a_second_call_adds_adapters_to_other_layers():
    made = trifuse.apply_lora(model(), "q_proj", rank=2)
    trifuse.apply_lora(made, "k_proj", rank=3)
    assert adapted(made) == [name for name in LAYERS if "o_proj" not in name]
    assert sum(one.requires_grad for one in made.parameters()) == 8


def test_a_weight_that_another_module_shares_is_not_merged_into():
    made = trifuse.apply_lora(model(), ["classifier", "q_proj"], rank=2)
    assert made.classifier.weight is made.embedding.weight
    with pytest.raises(RuntimeError, match="merge on a weight that 'embedding' shares"):
        made.classifier.merge()
    made.layers[0].q_proj.merge()


def test_torchs_transformer_counts_the_adapter_without_gradients_too():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
    x = torch.randn(2, 5, 8)
    before = layer(x).detach()
    trifuse.apply_lora(layer, "all-linear", rank=2)
    assert adapted(layer) == ["linear1", "linear2"]
    for one in (layer.linear1, layer.linear2):
        nn.init.normal_(one.lora_B)
    trained = layer(x).detach()
    assert (trained - before).abs().max() > 1e-2
    with torch.no_grad():
        torch.testing.assert_close(layer.eval()(x), trained)


@pytest.mark.parametrize("bias", ["none", "all", "lora_only"])
def test_what_is_trained_is_what_is_saved(bias):
    made = trifuse.apply_lora(model(), ["q_proj", "k_proj"], rank=2, bias=bias)
    factors = {f"{name}.lora_{factor}" for name in LAYERS if "o_proj" not in name for factor in "AB"}
    own = {"layers.0.q_proj.bias", "layers.1.q_proj.bias"}
    biases = {
        "none": set(),
        "lora_only": own,
        "all": own | {f"layers.{i}.o_proj.bias" for i in range(2)} | {"norm.bias"},
    }
    expected = factors | biases[bias]
    assert {name for name, one in made.named_parameters() if one.requires_grad} == expected
    state = trifuse.lora_state_dict(made, bias)
    assert state.keys() == expected
    with torch.no_grad():
        for name, one in made.named_parameters():
            if name in expected:
                one.add_(torch.randn_like(one))
    other = trifuse.apply_lora(model(), ["q_proj", "k_proj"], rank=2)
    unexpected = other.load_state_dict(trifuse.lora_state_dict(made, bias), strict=False).unexpected_keys
    assert unexpected == []
    assert torch.equal(other(index()), made(index()))


def test_adapters_are_saved_whether_they_are_merged_or_not():
    made = trifuse.apply_lora(model(), "q_proj", rank=2)
    for layer in made.layers:
        nn.init.normal_(layer.q_proj.lora_B)
    wanted, base = trifuse.lora_state_dict(made), {k: v.clone() for k, v in made.state_dict().items()}
    expected = made(index()).detach()
    for layer in made.layers:
        layer.q_proj.merge()
    state = trifuse.lora_state_dict(made)
    assert all(torch.equal(state[name], wanted[name]) for name in wanted)
    assert all(torch.equal(one, base[name]) for name, one in made.state_dict().items())
    plain = model()
    plain.load_state_dict({name: one for name, one in made.state_dict().items() if "lora_" not in name})
    trifuse.apply_lora(plain, "q_proj", rank=2).load_state_dict(state, strict=False)
    torch.testing.assert_close(plain(index()).detach(), expected)


def test_which_parameters_are_trained_can_be_said_again():
    made = trifuse.apply_lora(model(), "q_proj", kind="dora", rank=2).requires_grad_(True)
    trifuse.mark_only_lora_as_trainable(made, bias="lora_only")
    trained = {name.rpartition(".")[2] for name, one in made.named_parameters() if one.requires_grad}
    assert trained == {"lora_A", "lora_B", "lora_magnitude", "bias"}
    assert not made.norm.bias.requires_grad


class Bypassing(nn.Module):
    __module__ = "mamba_ssm.modules.mamba_simple"

    def __init__(self):
        super().__init__()
        self.in_proj, self.A_log = nn.Linear(4, 4), nn.Parameter(torch.zeros(4))


REFUSED = {
    "no such name": ({"target_modules": ["q_proj", "v_proj"]}, "target 'v_proj' matches no layer of the model"),
    "no such expression": ({"target_modules": r"layers\.7\..*"}, "matches no layer of the model"),
    "no expression": ({"target_modules": "(("}, "is the end of no name, and no regular expression"),
    "all left out": ({"target_modules": "q_proj", "exclude_modules": "q_proj"}, "target 'q_proj' matches no layer"),
    "none": ({"target_modules": []}, "target_modules is empty"),
    "no Mamba": ({"target_modules": "mamba-buffers"}, "target 'mamba-buffers' matches no layer"),
    "a norm": ({"target_modules": "norm"}, "'norm' is a LayerNorm; it must be a torch.nn.Linear"),
    "a container": ({"target_modules": "layers"}, "'layers' is a ModuleList; it must be"),
    "an embedding": (
        {"target_modules": "embedding", "kind": "dylora"},
        "is a Embedding; kind 'dylora' does not serve it",
    ),
    "kind": ({"kind": "vera"}, "kind is 'vera'; it must be one of 'lora', 'dylora', 'dora', 'multi'"),
    "rank": ({"rank": 0}, "rank is 0; it must be an int of at least 1"),
    "alpha": ({"alpha": -2}, "alpha is -2; it must be a positive number"),
    "dropout": ({"dropout": 1}, "dropout is 1; it must be in"),
    "scaling": ({"scaling": "x"}, "scaling is 'x'"),
    "bias": ({"bias": "some"}, 'bias is \'some\'; it must be "none", "all" or "lora_only"'),
    "a pattern's rank": ({"rank_pattern": {"k_proj": 0}}, r"layers\.0\.k_proj: rank is 0"),
    "nested": ({"nested_ranks": (1, 8), "kind": "dora"}, "nested_ranks came with kind 'dora'"),
    "frozen": ({"frozen": True}, "frozen came with kind 'lora'"),
    "dropout of many": ({"dropout": 0.1, "kind": "multi"}, 'for kind "multi" it must be 0'),
    "a taken name": ({"kind": "multi", "adapters": ["a", "a"]}, "name is 'a', which is taken"),
}


@pytest.mark.parametrize(("options", "error"), REFUSED.values(), ids=list(REFUSED))
def test_what_cannot_be_done_is_refused_and_nothing_is_changed(options, error):
    made = model()
    with pytest.raises(ValueError, match=error):
        trifuse.apply_lora(made, **{"target_modules": "all-linear", **options})
    assert adapted(made) == [] and all(one.requires_grad for one in made.parameters())


def test_a_layer_that_has_an_adapter_gets_no_other():
    made = trifuse.apply_lora(model(), "q_proj", rank=2)
    for targets in ("q_proj", "all-linear", ["k_proj", "layers.0.q_proj"]):
        with pytest.raises(ValueError, match=r"'layers\.0\.q_proj' is a LoRALinear; it has an adapter already"):
            trifuse.apply_lora(made, targets)
    assert adapted(made) == ["layers.0.q_proj", "layers.1.q_proj"]
    with pytest.raises(ValueError, match="target 'all-linear' matches no layer"):
        trifuse.apply_lora(nn.Linear(4, 4))


def test_an_adapter_that_would_not_count_is_refused():
    with pytest.raises(ValueError, match=r"would not count: a torch\.nn\.MultiheadAttention reads its weights"):
        trifuse.apply_lora(nn.MultiheadAttention(8, 2), "out_proj")
    with pytest.raises(ValueError, match="mamba_ssm's Bypassing reads the weights"):
        trifuse.apply_lora(Bypassing(), "in_proj")
    pytest.importorskip("transformers")
    import transformers_cases

    made = transformers_cases.model("mamba")
    with pytest.raises(ValueError, match=r"call trifuse\.integrations\.install\(\) first"):
        trifuse.apply_lora(made, "mamba-buffers")
    assert adapted(made) == []


def test_parts_go_with_adapters_that_know_rows_only():
    for kind in ("dora", "multi"):
        with pytest.raises(ValueError, match=f"parts of 'in_proj' came with kind '{kind}'"):
            trifuse.apply_lora(Mamba(8), "in_proj.x", kind=kind)
    with pytest.raises(ValueError, match="'conv1d' is a Conv1d; kind 'multi' does not serve it"):
        trifuse.apply_lora(Mamba(8), "conv1d", kind="multi")
    block = trifuse.apply_lora(Mamba(8), ["in_proj.x", "in_proj"], rank=2)
    assert block.in_proj.rows is None


def test_adapters_of_peft_are_not_wrapped():
    peft = pytest.importorskip("peft")
    made = peft.get_peft_model(model(), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="the model has adapters of PEFT"):
        trifuse.apply_lora(made, "k_proj")


def test_an_adapted_model_can_be_copied():
    made = trifuse.apply_lora(model(), "all-linear", rank=2, kind="dylora")
    other = copy.deepcopy(made)
    trifuse.set_rank(other, 1)
    assert made.layers[0].q_proj.active_rank == 2
    torch.testing.assert_close(other(index()), made(index()))


def test_a_model_without_adapters_is_named():
    with pytest.raises(ValueError, match="the model has no adapters"):
        trifuse.mark_only_lora_as_trainable(model())
    for call in (trifuse.mark_only_lora_as_trainable, trifuse.lora_state_dict):
        with pytest.raises(ValueError, match="bias is 'x'"):
            call(model(), bias="x")
