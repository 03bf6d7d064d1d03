"""``trifuse.analysis.importance_factor``: the mean weight map over a data set."""

from __future__ import annotations

import builtins
import sys

import pytest
import torch
from torch import nn

import trifuse
from trifuse.analysis import importance_factor
from trifuse.nn import GaussianAdaptiveAttention, GaussianBlock, MultiHeadGaussianAdaptiveAttention


class Classifier(nn.Module):
    """Two layers that weigh, on inputs of different shape, and dropout that training would apply."""

    def __init__(self) -> None:
        super().__init__()
        self.first = MultiHeadGaussianAdaptiveAttention(-1, 3, 2)
        self.drop = nn.Dropout(0.5)
        self.block = GaussianBlock([1], [2], [3], 1)
        self.head = nn.Linear(10, 4)

    def forward(self, x, scale=1.0):
        x = self.drop(self.first(x * scale)) + x
        return self.head(self.block(x).mean(1))


@pytest.fixture
def model() -> Classifier:
    torch.manual_seed(0)
    return Classifier()


def batches(count: int = 3, seed: int = 1) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(5 - i, 6, 10, generator=g) for i in range(count)]


def test_it_is_the_mean_of_the_weights_scaled_to_0_and_1(model) -> None:
    found = importance_factor(model, batches(), progress=False)
    assert list(found) == ["first", "block.layers.0"] and len(found) == 2
    x = torch.cat(batches())
    weights = model.first(x, return_attention_details=True)[1].double().mean(0)
    torch.testing.assert_close(found["first"].mean, weights)
    layer = found["first"]
    assert (layer.axis, layer.num_heads, layer.factor.shape) == (1, 3, (6, 10))
    assert layer.factor.min() == 0 and layer.factor.max() == 1
    torch.testing.assert_close(layer.factor, (weights - weights.min()) / (weights.max() - weights.min()))
    assert [piece.shape for piece in layer.heads] == [(6, 3), (6, 3), (6, 4)]
    assert all(piece.min() == 0 and piece.max() == 1 for piece in layer.heads)
    assert found["block.layers.0"].axis == 0 and [len(p) for p in found["block.layers.0"].heads] == [3, 3]


def test_the_mean_counts_samples_and_not_batches(model) -> None:
    x = torch.cat(batches())
    for size in (1, 5, len(x)):
        found = importance_factor(model, x.split(size), progress=False)
        torch.testing.assert_close(found["first"].mean, importance_factor(model, [x], progress=False)["first"].mean)


def test_only_the_axis_of_the_weights_can_be_kept(model) -> None:
    whole = importance_factor(model, batches(), progress=False)
    axis = importance_factor(model, batches(), keep="axis", progress=False)
    torch.testing.assert_close(axis["first"].mean, whole["first"].mean.mean(0))
    torch.testing.assert_close(axis["block.layers.0"].mean, whole["block.layers.0"].mean.mean(1))
    assert axis["first"].axis == axis["block.layers.0"].axis == 0
    uneven = [torch.randn(2, 6, 10), torch.randn(2, 7, 10)]
    with pytest.raises(ValueError, match=r"'first' has shape \(7, 10\) and had \(6, 10\).*keep=\"axis\""):
        importance_factor(model, uneven, progress=False)
    assert importance_factor(model, uneven, keep="axis", layers=["first"], progress=False)["first"].mean.shape == (10,)


def test_the_model_is_left_as_it_was(model) -> None:
    model.train()
    model.head.eval()
    outputs = []
    model.head.register_forward_hook(lambda module, args, out: outputs.append(out))
    importance_factor(model, batches(1), progress=False)
    assert model.training and model.drop.training and not model.head.training
    assert not model.first._forward_hooks and not model.first._forward_pre_hooks
    model.eval()
    assert not outputs[0].requires_grad
    torch.testing.assert_close(outputs[0], model(batches(1)[0]))
    assert all(parameter.grad is None for parameter in model.parameters())


def test_hooks_are_removed_when_the_model_fails(model) -> None:
    with pytest.raises(RuntimeError):
        importance_factor(model, [torch.randn(2, 6, 11)], progress=False)
    assert not model.first._forward_hooks and not model.first._forward_pre_hooks


def test_callers_inside_the_model_get_what_they_asked_for() -> None:
    class Asks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weigh = GaussianAdaptiveAttention(-1, 1, 2, None)

        def forward(self, x):
            assert isinstance(self.weigh(x), torch.Tensor)
            out, weights = self.weigh(x, True)
            again, _ = self.weigh(x=x, return_attention_details=True)
            assert torch.equal(out, again)
            return out * weights

    found = importance_factor(Asks(), batches(1), progress=False)
    assert found["weigh"].num_heads == 1


@pytest.mark.parametrize("form", ["tuple", "list", "mapping", "forward"])
def test_batches_of_every_form(model, form: str) -> None:
    labels = torch.zeros(3)
    expected = importance_factor(model, batches(), progress=False)["first"].mean
    wrapped = {
        "tuple": lambda x: (x, labels), "list": lambda x: [x, labels], "mapping": lambda x: {"x": x, "scale": 1.0},
        "forward": lambda x: ("name", x),
    }[form]  # fmt: skip
    forward = (lambda model, batch: model(batch[1])) if form == "forward" else None
    found = importance_factor(model, (wrapped(x) for x in batches()), forward=forward, progress=False)
    torch.testing.assert_close(found["first"].mean, expected)


def test_layers_and_batches_can_be_chosen(model) -> None:
    found = importance_factor(model, batches(), layers=["first"], max_batches=1, progress=False)
    assert list(found) == ["first"]
    torch.testing.assert_close(found["first"].mean, importance_factor(model, batches(1), progress=False)["first"].mean)


def test_padding_and_masks_do_not_count() -> None:
    torch.manual_seed(0)
    layer = MultiHeadGaussianAdaptiveAttention(-1, 1, 2)

    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weigh = layer

        def forward(self, x):
            return self.weigh(x, mask=x != 0)

    x = torch.randn(4, 6)
    x[:2, 4:] = 0
    x[:, 5] = 0
    found = importance_factor(Masked(), [x[:3], x[3:]], progress=False)["weigh"].mean
    weights = layer(x, True, mask=x != 0)[1].double()
    torch.testing.assert_close(found[:4], weights[:, :4].mean(0))
    torch.testing.assert_close(found[4], weights[2:, 4].mean())
    assert found[5] == 0

    padded = MultiHeadGaussianAdaptiveAttention(-1, 1, 2, 0.0)
    padded.load_state_dict(layer.state_dict())
    found = importance_factor(padded, [x], progress=False)[""].mean
    weights = padded(x, True)[1].double()
    torch.testing.assert_close(found[4], weights[2:, 4].mean())


def test_half_precision_maps_are_summed_in_float64() -> None:
    torch.manual_seed(0)
    layer = MultiHeadGaussianAdaptiveAttention(-1, 1, 2)
    x = torch.randn(4096, 8).half()
    found = importance_factor(layer, x.split(64), progress=False)[""].mean
    torch.testing.assert_close(found, layer(x, True)[1].double().mean(0), rtol=1e-12, atol=0)


def test_compiled_models_are_run_eagerly_and_stay_compiled(model) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    model.eval()
    x = batches(1)
    before = compiled(x[0])
    found = importance_factor(compiled, x, progress=False)
    assert list(found) == ["first", "block.layers.0"]
    torch.testing.assert_close(found["first"].mean, importance_factor(model, x, progress=False)["first"].mean)
    torch.testing.assert_close(compiled(x[0]), before)


def test_the_published_package_is_found_too() -> None:
    published = pytest.importorskip(
        "gaussian_adaptive_attention", reason="the published package gaussian-adaptive-attention is not installed"
    )
    torch.manual_seed(0)
    theirs = published.GaussianBlock([-1, 1], [2, 1], [2, 2], 2)
    ours = GaussianBlock([-1, 1], [2, 1], [2, 2], 2)
    ours.load_state_dict(theirs.state_dict())
    expected = importance_factor(ours, batches(), progress=False)
    found = importance_factor(theirs, batches(), progress=False)
    assert list(found) == list(expected) == ["layers.0", "layers.1"]
    for name in found:
        assert found[name].num_heads == expected[name].num_heads
        torch.testing.assert_close(found[name].mean, expected[name].mean, rtol=1e-4, atol=1e-6)


def test_a_constant_map_has_factor_zero() -> None:
    layer = MultiHeadGaussianAdaptiveAttention(-1, 2, 1)
    found = importance_factor(layer, [torch.ones(2, 8)], progress=False)[""]
    assert not found.factor.any() and not torch.cat(found.heads).any()


def test_the_progress_bar_writes_to_the_standard_error(model, capsys, monkeypatch) -> None:
    importance_factor(model, batches(), progress=False)
    assert capsys.readouterr().err == ""
    importance_factor(model, batches())
    if "rich" in sys.modules:
        assert "3/3" in capsys.readouterr().err
    without(monkeypatch, "rich")
    importance_factor(model, batches())
    captured = capsys.readouterr()
    assert "3/3 batches" in captured.err and captured.out == ""
    importance_factor(model, iter(batches()))  # a loader that does not know its length


def without(monkeypatch, package: str) -> None:
    """As if a package were not installed."""
    real = builtins.__import__

    def hidden(name, *args, **kwargs):
        if name.partition(".")[0] == package:
            raise ImportError(f"no {package}")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", hidden)


def test_plot_says_what_to_install(model, monkeypatch) -> None:
    found = importance_factor(model, batches(1), progress=False)
    without(monkeypatch, "matplotlib")
    with pytest.raises(ImportError, match="pip install matplotlib"):
        found.plot()


def test_plot_draws_a_panel_a_layer(model, tmp_path, monkeypatch) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed").use("Agg")
    import matplotlib.pyplot as plt

    found = importance_factor(model, batches(), progress=False)
    figure = found.plot(path=tmp_path / "map.png")
    assert (tmp_path / "map.png").stat().st_size > 1000
    panels = [axes for axes in figure.axes if axes.images]
    assert [axes.get_title() for axes in panels] == ["first", "block.layers.0"]
    torch.testing.assert_close(torch.as_tensor(panels[0].images[0].get_array()), found["first"].factor)

    flat = importance_factor(model, batches(), keep="axis", progress=False)
    figure = flat.plot(per="head")
    sizes = sorted(axes.images[0].get_array().shape for axes in figure.axes if axes.images)
    assert sizes == [(1, 6), (1, 10)]  # maps of one length share a panel, a row each
    with pytest.raises(ValueError, match=r"shape is \(5, 5\).*'first', 10"):
        flat.plot(shape=(5, 5))
    picture = importance_factor(model, batches(), keep="axis", layers=["first"], progress=False).plot(shape=(2, 5))
    assert picture.axes[0].images[0].get_array().shape == (2, 5)
    with pytest.raises(ValueError, match="per is 'row'"):
        found.plot(per="row")
    plt.close("all")


@pytest.mark.parametrize("options, words", [
    ({"keep": "all"}, "keep is 'all'"),
    ({"max_batches": 0}, "max_batches is 0"),
    ({"layers": ["second"]}, "layers names 'second'; the model has 'first', 'block.layers.0'"),
    ({"batch_axis": 2}, "weights of 'first' run along axis 2, which batch_axis says is the batch"),
    ({"loader": []}, "loader gave no batch"),
    ({"forward": lambda model, batch: model.first(batch)}, "the model never called 'block.layers.0'"),
])  # fmt: skip
def test_errors_say_what_was_wrong(model, options, words) -> None:
    loader = options.pop("loader", batches(1))
    with pytest.raises(ValueError, match=words):
        importance_factor(model, loader, progress=False, **options)


def test_a_model_must_have_something_to_look_at() -> None:
    with pytest.raises(ValueError, match="model is a Linear without Gaussian adaptive attention"):
        importance_factor(nn.Linear(2, 2), [torch.ones(1, 2)], progress=False)
    with pytest.raises(TypeError, match="model is function"):
        importance_factor(lambda x: x, [], progress=False)
    assert trifuse.analysis.importance_factor is importance_factor
