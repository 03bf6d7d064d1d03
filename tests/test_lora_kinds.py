"""DoRA, embeddings, depthwise convolutions and many adapters at once, against their formulas."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import trifuse
from trifuse.nn import DoRALinear, LoRAConv1d, LoRAEmbedding, MultiLoRALinear

DTYPE = torch.float64


def noise(module, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, one in module.named_parameters():
            if "lora_" in name:
                one.add_(0.3 * torch.randn(one.shape, generator=generator, dtype=one.dtype))
    return module


def gradients(out, parameters):
    weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
    return torch.autograd.grad((out * weight).sum(), parameters)


def dora(**options):
    torch.manual_seed(0)
    return DoRALinear(10, 12, dtype=DTYPE, **{"rank": 3, "alpha": 5, **options})


def tokens(*shape):
    return torch.randn(*(shape or (2, 6)), 10, generator=torch.Generator().manual_seed(1), dtype=DTYPE)


@pytest.mark.parametrize("kind", ["lora", "dylora", "dora", "multi"])
def test_every_kind_compiles_in_one_graph(kind):
    torch.manual_seed(0)
    dropout = 0.0 if kind == "multi" else 0.2
    made = noise(trifuse.apply_lora(nn.Sequential(nn.Linear(10, 12)), "0", 3, dropout=dropout, kind=kind))
    if kind == "dylora":
        trifuse.set_rank(made, 2)
    if kind == "multi":
        made[0].adapter_index = [0, -1]
    made, x = made.double().eval(), tokens()
    compiled = torch.compile(made, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), made(x))
    own = [one for one in made.parameters() if one.requires_grad]
    torch.testing.assert_close(gradients(compiled(x), own), gradients(made(x), own))
    assert torch.isfinite(compiled.train()(x)).all()


# DoRA


def test_dora_starts_without_effect_and_is_its_formula():
    made, x = dora(), tokens()
    torch.testing.assert_close(made(x), F.linear(x, made.weight, made.bias))
    noise(made)
    whole = made.weight + made.scale * made.lora_B @ made.lora_A
    effective = made.lora_magnitude[:, None] * whole / whole.norm(dim=1, keepdim=True).detach()
    expected = F.linear(x, effective, made.bias)
    torch.testing.assert_close(made(x), expected)
    own = (made.lora_A, made.lora_B, made.lora_magnitude)
    torch.testing.assert_close(gradients(made(x), own), gradients(expected, own))


def test_a_plain_checkpoint_brings_its_magnitudes_along():
    made, plain = dora(), nn.Linear(10, 12, dtype=DTYPE)
    made.load_state_dict(plain.state_dict())
    torch.testing.assert_close(made(tokens()), plain(tokens()))
    noise(made)
    state = made.state_dict()
    other = dora()
    other.load_state_dict(state)
    assert torch.equal(other.lora_magnitude, made.lora_magnitude)


def test_dora_refuses_what_it_has_not():
    with pytest.raises(ValueError, match="rows and nested_ranks came"):
        DoRALinear.from_linear(nn.Linear(4, 4), rows=[1])
    with pytest.raises(ValueError, match="rounding is 'stochastic'; it must be \"nearest\""):
        dora().merge(rounding="stochastic")
    made = dora()
    made.merge()
    with pytest.raises(ValueError, match=r"magnitude has shape \(3,\); it must be \(12,\)"):
        made.swap(made.lora_A, made.lora_B, magnitude=torch.ones(3))


# Embedding


def embedding(**options):
    torch.manual_seed(0)
    return LoRAEmbedding(9, 12, dtype=DTYPE, **{"rank": 3, "alpha": 5, **options})


def test_an_embedding_starts_without_effect_and_is_its_formula():
    made, index = embedding(), torch.tensor([[0, 8, 3], [3, 3, 1]])
    assert torch.equal(made(index), F.embedding(index, made.weight))
    assert made.lora_A.shape == (3, 9) and made.lora_B.shape == (12, 3)
    noise(made)
    expected = F.embedding(index, made.weight + made.scale * (made.lora_B @ made.lora_A).t())
    torch.testing.assert_close(made(index), expected)
    own = (made.lora_A, made.lora_B)
    torch.testing.assert_close(gradients(made(index), own), gradients(expected, own))
    torch.testing.assert_close(made.to_embedding()(index), expected)


def test_padding_has_no_gradient_and_half_precision_one_rounding():
    made = noise(embedding(padding_idx=2))
    made(torch.tensor([2, 1])).sum().backward()
    assert made.lora_A.grad[:, 2].abs().max() == 0 and made.lora_A.grad[:, 1].abs().max() > 0
    half = noise(LoRAEmbedding(9, 12, dtype=torch.bfloat16, rank=3))
    index = torch.arange(9)
    wide = half.weight.float() + half.scale * (half.lora_B @ half.lora_A).t()
    torch.testing.assert_close(half(index), wide.bfloat16(), rtol=0.01, atol=0.001)


def test_an_embedding_that_changes_its_weight_is_refused():
    with pytest.raises(ValueError, match=r"max_norm is 1\.0; it must be None"):
        LoRAEmbedding.from_embedding(nn.Embedding(4, 4, max_norm=1.0))
    plain = nn.Embedding(4, 4)
    made = LoRAEmbedding.from_embedding(plain, rank=2, scaling="rslora", alpha=4)
    assert made.weight is plain.weight and made.scale == pytest.approx(4 / 2**0.5)


# Depthwise convolution


def test_the_taps_of_a_convolution_have_the_update():
    torch.manual_seed(0)
    made = noise(LoRAConv1d(6, 6, 4, padding=3, groups=6, dtype=DTYPE, rank=2, alpha=5))
    x = torch.randn(2, 6, 9, dtype=DTYPE)
    taps = made.weight + made.scale * (made.lora_B @ made.lora_A).unsqueeze(1)
    expected = F.conv1d(x, taps, made.bias, padding=3, groups=6)
    torch.testing.assert_close(made(x), expected)
    own = (made.lora_A, made.lora_B)
    torch.testing.assert_close(gradients(made(x), own), gradients(expected, own))
    plain = made.to_conv1d()
    assert type(plain) is nn.Conv1d
    torch.testing.assert_close(plain(x), expected)


def test_only_depthwise_convolutions_are_taken():
    for wrong in (nn.Conv1d(6, 6, 4), nn.Conv1d(6, 12, 4, groups=6)):
        with pytest.raises(ValueError, match="it must be a depthwise convolution"):
            LoRAConv1d.from_conv1d(wrong)


# Many adapters


def multi():
    torch.manual_seed(0)
    made = MultiLoRALinear(10, 12, dtype=DTYPE)
    made.add_adapter("de", rank=2, alpha=3)
    made.add_adapter("fr", rank=5, scaling="rslora")
    made.add_adapter("it")
    return noise(made)


def effective(made, name):
    if name is None:
        return made.weight
    return made.weight + made.scale[name] * made.lora_B[name] @ made.lora_A[name]


def test_each_row_has_its_adapter_and_each_adapter_its_gradient():
    made, x = multi(), tokens()
    assert made.scale == {"de": 1.5, "fr": pytest.approx(5**0.5), "it": 1.0}
    names = ["fr", None]
    with trifuse.adapters(made, names):
        out = made(x)
        got = gradients(out, (made.lora_A["fr"], made.lora_B["fr"]))
    expected = torch.stack([F.linear(x[i], effective(made, name), made.bias) for i, name in enumerate(names)])
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(got, gradients(expected, (made.lora_A["fr"], made.lora_B["fr"])))
    made.adapter_index = torch.tensor([[0, 1, 2, -1, 0, 1], [2, 2, 2, 2, -5, 0]])
    per_row = made(x)
    order = [*made.adapter_names, None]
    for i in range(2):
        for j in range(6):
            name = order[max(int(made.adapter_index[i, j]), -1)]
            torch.testing.assert_close(per_row[i, j], F.linear(x[i, j], effective(made, name), made.bias))


@pytest.mark.parametrize("index", ["fr", 1])
def test_one_adapter_for_all_rows(index):
    made, x = multi(), tokens()
    made.adapter_index = index
    torch.testing.assert_close(made(x), F.linear(x, effective(made, "fr"), made.bias))
    with trifuse.adapters(made, None):
        torch.testing.assert_close(made(x), F.linear(x, made.weight, made.bias))
    assert made.adapter_index == 1


def test_a_layer_of_one_adapter_needs_no_index_and_one_of_many_does():
    made, x = MultiLoRALinear.from_linear(nn.Linear(10, 12, dtype=DTYPE)), tokens()
    torch.testing.assert_close(made(x), F.linear(x, made.weight, made.bias))
    made.add_adapter("only", rank=2)
    noise(made)
    torch.testing.assert_close(made(x), F.linear(x, effective(made, "only"), made.bias))
    with pytest.raises(RuntimeError, match="adapter_index is None, and there are the adapters de, fr, it"):
        multi()(x)


def test_adapters_come_and_go():
    made, x = multi(), tokens()
    kept = effective(made, "it").detach()
    made.adapter_index = "it"
    made.remove_adapter("fr")
    assert made.adapter_names == ("de", "it") and made.adapter_index is None
    made.adapter_index = "it"
    torch.testing.assert_close(made(x), F.linear(x, kept, made.bias))
    state = made.state_dict()
    assert {"lora_A.de", "lora_B.it"} < state.keys() and "lora_A.fr" not in state
    other = copy.deepcopy(made)
    other.load_state_dict(state)
    torch.testing.assert_close(other(x), made(x))
    other.load_state_dict(nn.Linear(10, 12, dtype=DTYPE).state_dict())


def test_a_name_that_another_layer_has_is_no_adapter_here():
    first, second = multi(), MultiLoRALinear(12, 3, dtype=DTYPE)
    second.add_adapter("es")
    noise(second)
    model, x = nn.Sequential(first, second), tokens()
    with trifuse.adapters(model, ["es", "fr"]):
        out = model(x)
    hidden = torch.stack([F.linear(x[0], first.weight, first.bias), F.linear(x[1], effective(first, "fr"), first.bias)])
    weights = (effective(second, "es"), second.weight)
    expected = torch.stack([F.linear(hidden[i], weight, second.bias) for i, weight in enumerate(weights)])
    torch.testing.assert_close(out, expected)
    with pytest.raises(ValueError, match="no layer has an adapter 'xx'; there are de, es, fr, it"), \
            trifuse.adapters(model, "xx"):  # fmt: skip
        pass


def test_bad_indices_and_names_are_refused():
    made = multi()
    for wrong in (3, [0, 3], torch.tensor([0, 7])):
        with pytest.raises(ValueError, match="there are 3 adapters, 0 to 2"):
            made.adapter_index = wrong
    with pytest.raises(ValueError, match="there is no adapter 'xx'; the adapters are de, fr, it"):
        made.adapter_index = ["de", "xx"]
    with pytest.raises(TypeError, match=r"adapter_index is torch.float32; it must be int64"):
        made.adapter_index = torch.ones(2)
    made.adapter_index = [0, 1, 2]
    with pytest.raises(ValueError, match=r"adapter_index has shape \(3,\); .*it must be \(2,\) or \(2, 6\)"):
        made(tokens())
    for name in ("", "a.b", "keys", 3):
        with pytest.raises(ValueError, match="it must be a word without a dot"):
            made.add_adapter(name)
    with pytest.raises(ValueError, match="name is 'de', which is taken"):
        made.add_adapter("de")
    with pytest.raises(ValueError, match="rank is 0"):
        made.add_adapter("es", rank=0)
    with pytest.raises(ValueError, match="there is no adapter 'es'"):
        made.remove_adapter("es")
    with pytest.raises(ValueError, match="the model has no MultiLoRALinear"), trifuse.adapters(nn.Linear(2, 2), 0):
        pass
