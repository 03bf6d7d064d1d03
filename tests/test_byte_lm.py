"""examples/byte_lm.py learns, checks itself against the reference, and says so in its exit code."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

import trifuse

EXAMPLE = Path(__file__).parent.parent / "examples" / "byte_lm.py"


@pytest.fixture
def example(monkeypatch):
    """The example as a module, with windows so short that the reference is quick."""
    spec = importlib.util.spec_from_file_location("byte_lm", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "LENGTH", 24)
    monkeypatch.setattr(module, "BATCH", 2)
    monkeypatch.setattr(module, "DEVICE", "cpu")
    return module


def run(example, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["byte_lm.py", *arguments])
    return example.main()


def test_it_learns_agrees_and_writes_its_figures(example, monkeypatch, tmp_path, capsys):
    written = tmp_path / "figures.json"
    assert run(example, monkeypatch, "--steps", "20", "--reference-steps", "3", "--json", str(written)) == 0
    figures = json.loads(written.read_text())
    assert figures["bits_per_byte_before"] == pytest.approx(8, abs=0.2)
    if figures["backend"] != "reference":  # with nothing but the reference, it stops after the shared steps
        assert len(figures["losses"]) == figures["steps"] == 20
        assert figures["bits_per_byte_after"] < figures["bits_per_byte_before"] - 1
    assert len(figures["reference_losses"]) == 3
    assert figures["largest_loss_difference"] <= 1e-3
    assert figures["tokens_per_second"] > 0 and figures["reference_tokens_per_second"] > 0
    assert figures["sample"].startswith("def ")
    printed = capsys.readouterr().out
    assert "bits per byte" in printed and "tokens per second" in printed and figures["sample"] in printed


def test_a_disagreement_is_an_error(example, monkeypatch, capsys):
    train = example.train

    def off_by_a_little(text, steps, schedule, seed, label):
        model, losses, speed = train(text, steps, schedule, seed, label)
        if label != "reference":
            losses[1] += 2e-3
        return model, losses, speed

    monkeypatch.setattr(example, "train", off_by_a_little)
    assert run(example, monkeypatch, "--steps", "2", "--reference-steps", "2") == 1
    assert "and the reference differ by 2.0e-03; it must be at most 1e-03" in capsys.readouterr().out


def test_a_seed_gives_the_same_batches_and_losses(example):
    text, _ = example.standard_library()
    with trifuse.backend("reference"):
        runs = [example.train(text, 2, 9, seed, "reference")[1] for seed in (0, 0, 1)]
    assert runs[0] == runs[1] != runs[2]


def test_the_held_out_files_are_not_trained_on(example):
    text, held_out = example.standard_library()
    assert len(text) > len(held_out) > 10_000
    assert bytes(held_out[1000:3000].tolist()) not in bytes(text.tolist())


def test_writing_byte_by_byte_is_reading_the_whole(example):
    torch.manual_seed(0)
    model = example.ByteLM(d_model=32, n_layers=2)
    written, _ = example.write(model, "import os\n", length=12, seed=0, temperature=1e-6)
    tokens = list(b"import os\n")
    with torch.no_grad():
        for _ in range(12):
            tokens.append(model(torch.tensor([tokens]))[0, -1].argmax().item())
    assert written == bytes(tokens).decode(errors="replace")


def test_it_runs_without_rich(example, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "rich.progress", None)
    with example.progress("a label", 20) as show:
        for _ in range(20):
            show(1.5)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 10 and lines[-1] == "a label  20/20  loss 1.500"


@pytest.mark.parametrize("count", ["0", "9"])
def test_steps_that_cannot_be_compared_are_refused(example, monkeypatch, capsys, count):
    with pytest.raises(SystemExit) as stop:
        run(example, monkeypatch, "--steps", "8", "--reference-steps", count)
    assert stop.value.code == 2
    assert f"--reference-steps is {count}; it must be from 1 to --steps, 8" in capsys.readouterr().err
