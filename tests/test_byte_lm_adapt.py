"""examples/byte_lm_adapt.py adapts at every rank at once, saves and loads, and says in its exit code if it did not."""

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch

import trifuse

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture
def example(monkeypatch, threads):
    """The example as a module, with windows so short that a step takes little, and one thread is the fastest."""
    threads(1)
    monkeypatch.syspath_prepend(str(EXAMPLES))
    for name in ("byte_lm", "byte_lm_adapt"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    module = importlib.import_module("byte_lm_adapt")
    monkeypatch.setattr(module.byte_lm, "LENGTH", 32)
    monkeypatch.setattr(module.byte_lm, "BATCH", 4)
    monkeypatch.setattr(module.byte_lm, "DEVICE", "cpu")
    yield module
    for name in ("byte_lm", "byte_lm_adapt"):
        sys.modules.pop(name, None)


def run(example, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["byte_lm_adapt.py", *arguments])
    return example.main()


@pytest.fixture
def base(example):
    torch.manual_seed(0)
    return example.ByteLM(d_model=32, n_layers=2)


def test_every_rank_of_one_run_adapts_and_the_loaded_adapter_is_the_saved_one(example, monkeypatch, tmp_path, capsys):
    written, folder = tmp_path / "figures.json", tmp_path / "adapter"
    arguments = ("--base-steps", "15", "--steps", "5", "--json", str(written), "--folder", str(folder))
    assert run(example, monkeypatch, *arguments) == 0
    figures = json.loads(written.read_text())
    before = figures["bits_per_byte_before"]
    nested, separate = (list(figures[f"bits_per_byte_{kind}"].values()) for kind in ("dylora", "lora"))
    assert len(nested) == len(separate) == 5
    assert all(bits < before - 0.1 for bits in nested + separate)
    assert nested[-1] <= nested[0] + 0.02  # all sixteen ranks know no less than the first alone
    assert figures["bits_per_byte_reloaded"] == nested[-1]
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {file.name for file in folder.iterdir()}

    assert [one["parameters"] for one in figures["lora"].values()] == [6336 * rank for rank in example.RANKS]
    assert figures["dylora"]["parameters"] == 6336 * 16
    assert all(one["seconds"] > 0 for one in (figures["dylora"], *figures["lora"].values()))
    drift = figures["drift"]
    assert len(drift["differences"]) == drift["steps"] + 1 and drift["at_start"] == drift["differences"][0]
    assert 0 < drift["at_start"] <= drift["largest"] < drift["logit_std"]
    assert all(len(found) == 4 and max(found) < 0 for found in drift["largest_exponents"].values())
    printed = capsys.readouterr().out
    assert f"{nested[2]:.3f}" in printed and "largest Lyapunov exponent of each layer" in printed


def test_the_base_model_keeps_every_bit(example, base):
    text, _ = example.encodings()
    model = example.with_adapters(base, "dylora", 16, seed=0)
    example.fit(model, text, 3, 0, "a label")
    frozen = base.state_dict()
    changed = {
        name for name, value in model.state_dict().items() if not torch.equal(value, frozen.get(name, value + 1))
    }
    assert changed and all("lora_" in name for name in changed)
    assert {name.rpartition(".")[2] for name in changed} == {"lora_A", "lora_B"}


def test_a_dylora_is_trained_at_ranks_drawn_for_all_layers(example, base, monkeypatch):
    text, _ = example.encodings()
    model, seen = example.with_adapters(base, "dylora", 16, seed=0), []

    def after():
        seen.append({one.active_rank for one in model.modules() if isinstance(one, trifuse.nn.DyLoRALinear)})

    example.fit(model, text, 12, 0, "a label", after)
    assert all(len(one) == 1 for one in seen) and len(set().union(*seen)) > 4


def test_a_seed_gives_the_same_adapters(example, base):
    text, _ = example.encodings()
    found = []
    for seed in (0, 0, 1):
        model = example.with_adapters(base, "lora", 2, seed)
        example.fit(model, text, 2, seed, "a label")
        found.append(model.mixers[0].in_proj.lora_B.detach())
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


def test_the_comparison_starts_from_the_same_adapters_and_differs_by_rounding(example, base):
    text, held_out = example.encodings()
    probe = held_out[:64].long().view(2, 32)
    drift = example.drift(base, text, probe, 2, seed=0)
    wide = example.with_adapters(base, "lora", 16, 0)
    narrow = example.with_adapters(example.in_bfloat16(base), "lora", 16, 0)
    assert torch.equal(wide.mixers[0].in_proj.lora_A, narrow.mixers[0].in_proj.lora_A)
    assert narrow.mixers[0].A_log.dtype == torch.float32 and narrow.mixers[0].in_proj.weight.dtype == torch.bfloat16
    with torch.no_grad():
        rounding = (wide(probe) - narrow(probe).float()).abs().max().item()
    assert drift["at_start"] == pytest.approx(rounding) and rounding > 0
    exponents = trifuse.analysis.lyapunov_exponents(base, probe)
    largest = drift["largest_exponents"]["float32, before"]
    assert largest == pytest.approx([one.max().item() for one in exponents.values()])


def test_the_held_out_files_are_not_trained_on(example):
    text, held_out = example.encodings()
    assert len(text) > len(held_out) > 10_000
    assert bytes(held_out[1000:3000].tolist()) not in bytes(text.tolist())


def test_what_is_wrong_is_said_and_is_an_error(example, monkeypatch, capsys):
    good = {
        "bits_per_byte_before": 3.0, "bits_per_byte_dylora": {1: 2.5, 16: 2.0}, "bits_per_byte_lora": {1: 2.4, 16: 1.9},
        "bits_per_byte_reloaded": 2.0,
    }  # fmt: skip
    assert example.complaints(good) == []
    worse = good | {"bits_per_byte_lora": {1: 3.5, 16: 1.9}, "bits_per_byte_reloaded": 2.0000001}
    first, second = example.complaints(worse)
    assert first == "lora at rank 1 has 3.500 bits per byte; the base model had 3.000"
    assert second == "the loaded adapter has 2.0000001 bits per byte; the saved had 2.0"
    monkeypatch.setattr(example, "measure", lambda *args: worse)
    monkeypatch.setattr(example, "show", lambda figures: None)
    assert run(example, monkeypatch) == 1
    assert f"byte_lm_adapt: {second}" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [("--steps", "0"), ("--base-steps", "0")])
def test_no_steps_are_refused(example, monkeypatch, capsys, arguments):
    with pytest.raises(SystemExit) as stop:
        run(example, monkeypatch, *arguments)
    assert stop.value.code == 2
    assert "both must be at least 1" in capsys.readouterr().err
