"""examples/digits_gaam.py trains three classifiers, prints and writes what it found, and says in its exit code whether
they learned."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

import trifuse

pytest.importorskip(
    "sklearn.datasets", reason="scikit-learn, which has the digits, is not installed", exc_type=ImportError
)

EXAMPLE = Path(__file__).parent.parent / "examples" / "digits_gaam.py"


@pytest.fixture
def example(monkeypatch):
    """The example as a module, on the CPU."""
    spec = importlib.util.spec_from_file_location("digits_gaam", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "DEVICE", "cpu")
    return module


def run(example, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["digits_gaam.py", *arguments])
    return example.main()


def test_it_learns_prints_and_writes_its_figures(example, monkeypatch, tmp_path, capsys):
    written = tmp_path / "figures.json"
    assert run(example, monkeypatch, "--seeds", "1", "--epochs", "5", "--json", str(written)) == 0
    figures = json.loads(written.read_text())
    assert figures["accuracies"].keys() == {"GAAM", "RBF", "dot product"}
    assert all(len(found) == 1 and found[0] >= 0.9 for found in figures["accuracies"].values())
    factor = torch.tensor(figures["importance_factor"])
    assert factor.shape == (8, 8) and factor.min() == 0 and factor.max() == 1
    printed = capsys.readouterr().out
    assert all(f"{found[0]:.1%}" in printed for found in figures["accuracies"].values())
    for line in example.picture(factor):
        assert line in printed


def test_what_does_not_learn_is_an_error(example, monkeypatch, capsys):
    monkeypatch.setattr(example, "accuracy", lambda model, data: 0.5)
    monkeypatch.setattr(example, "train", lambda attention, *rest: example.Classifier(attention))
    assert run(example, monkeypatch, "--seeds", "2") == 1
    assert "digits_gaam: RBF reached 50.0%; it must be at least 90%" in capsys.readouterr().out


def test_images_held_out_are_not_trained_on(example):
    (images, labels), (held_out, _) = example.digits()
    assert len(images) == len(labels) == 1437 and len(held_out) == 360
    assert images.min() == -1 and images.max() == 1
    seen = {tuple(image) for image in images.mul(8).int().tolist()}
    assert sum(tuple(image) in seen for image in held_out.mul(8).int().tolist()) <= 2  # a few are drawn alike


def test_classifiers_of_a_seed_start_alike_where_they_can(example):
    (images, _), _ = example.digits()
    started = []
    for attention in example.ATTENTIONS.values():
        torch.manual_seed(3)
        started.append(example.Classifier(attention))
    shared = [{name: x for name, x in model.state_dict().items() if not name.startswith(("attention", "out"))}
              for model in started]  # fmt: skip
    for other in shared[1:]:
        assert all(torch.equal(shared[0][name], other[name]) for name in shared[0])
    assert all(model(images[:3]).shape == (3, 10) for model in started)


def test_a_seed_gives_the_same_classifier(example):
    (images, labels), _ = example.digits()
    few = images[:192], labels[:192]
    with trifuse.backend("reference"):
        models = [example.train(example.RBFAttention, few, 1, seed, lambda: None) for seed in (0, 0, 1)]
    first, again, other = (model.state_dict()["out.weight"] for model in models)
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_the_importance_of_pixels_is_the_mean_weight(example):
    torch.manual_seed(0)
    models, images = [example.Classifier(example.GaussianAdaptive) for _ in range(2)], torch.rand(70, 64) * 2 - 1
    _, factor = example.importance(models, (images, None))
    ratios = []
    for model in models:
        model.attention.attention.register_forward_hook(lambda module, args, out: ratios.append(out / args[0]))
        with torch.no_grad():
            model(images)
    mean = torch.stack(ratios).double().mean((0, 1, 3)).view(8, 8)
    torch.testing.assert_close(factor, (mean - mean.min()) / (mean.max() - mean.min()), rtol=1e-4, atol=1e-5)


def test_pictures_go_from_empty_to_full(example):
    lines = example.picture(torch.tensor([[0.0, 1.0], [0.5, 2.0]]))
    assert lines == ["+----+", "|  @@|", "|==@@|", "+----+"]


def test_without_scikit_learn_it_says_so(example, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(SystemExit) as stop:
        example.digits()
    assert "scikit-learn has the digits and cannot be imported" in stop.value.code


@pytest.mark.parametrize("option", ["--seeds", "--epochs"])
def test_counts_below_one_are_refused(example, monkeypatch, capsys, option):
    with pytest.raises(SystemExit) as stop:
        run(example, monkeypatch, option, "0")
    assert stop.value.code == 2
    assert f"{option} is 0; it must be at least 1" in capsys.readouterr().err
