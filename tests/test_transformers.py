"""transformers' models with a Mamba mixer, with and without ``trifuse.integrations.install()``.

Here the models are imported before install(), which warns and switches them in place; in ``test_integrations.py``
a process of its own calls install() first, as it should be.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import sys
import warnings
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

pytest.importorskip("transformers", reason="transformers is not installed: its models are not tested")

import transformers_cases as cases
from transformers.utils import logging

from trifuse import integrations
from trifuse.integrations import transformers_hook

logging.set_verbosity_error()


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """These models are tiny: more threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


every_model = pytest.mark.parametrize("case", cases.CONFIGS)


@contextlib.contextmanager
def installed() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # the models were imported before
        integrations.install()
    try:
        yield
    finally:
        integrations.uninstall()


def outputs(model: nn.Module, batch: cases.Batch) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Logits, greedy texts, and the gradients of a training step."""
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    with torch.no_grad():
        logits = model(**inputs).logits
        texts = model.generate(**inputs, max_new_tokens=10, do_sample=False)
    model.train()
    model.zero_grad()
    model(**inputs, labels=batch.labels).loss.backward()
    model.eval()
    return logits, texts, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@every_model
def test_logits_gradients_and_greedy_texts_are_those_without_trifuse(case: str) -> None:
    model, batch = cases.model(case), cases.batch()
    logits, texts, gradients = outputs(model, batch)
    with installed():
        assert "transformers_hook" in type(cases.mixer_of(model)).forward.__code__.co_filename
        logits_ours, texts_ours, gradients_ours = outputs(model, batch)
    assert (logits_ours - logits).abs().max() <= 1e-4
    assert torch.equal(texts_ours, texts)
    assert gradients_ours.keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert (gradients_ours[name] - gradient).norm() <= 1e-3 * gradient.norm() + 1e-7, name


@every_model
def test_decoding_with_a_cache_gives_the_logits_of_the_whole_text(case: str) -> None:
    model = unlimited(cases.model(case))
    ids = cases.batch(lengths=(14, 14)).input_ids
    with installed(), torch.no_grad():
        whole = model(input_ids=ids, use_cache=False).logits
        step = model(input_ids=ids[:, :9], use_cache=True)
        pieces = [step.logits[:, -1]]
        for place in range(9, 13):
            step = next_token(model, ids, place, step)
            pieces.append(step.logits[:, -1])
    assert (torch.stack(pieces, 1) - whole[:, 8:13]).abs().max() <= 1e-4


def unlimited(model: nn.Module) -> nn.Module:
    """transformers limits the steps of a text and not those of a token: here neither."""
    for module in model.modules():
        if hasattr(module, "time_step_limit"):
            module.time_step_limit = (0.0, float("inf"))
    return model


def next_token(model: nn.Module, ids: Tensor, place: int, step):
    """The output for the token of `ids` at `place`, with the cache of the output before."""
    cache = next(name for name in ("cache", "cache_params", "past_key_values") if step.get(name) is not None)
    # A hybrid model would count the positions in the cache of its first layer, which counts none.
    hybrid = model.config.model_type not in ("mamba", "falcon_mamba", "mamba2")
    positions = {"position_ids": torch.tensor([[place]])} if hybrid else {}
    return model(input_ids=ids[:, place : place + 1], use_cache=True, **{cache: step[cache]}, **positions)


@pytest.mark.parametrize("case", ["mamba", "zamba", "mamba2", "falcon_h1"])
def test_a_prompt_shorter_than_the_convolution_and_one_token(case: str) -> None:
    model = cases.model(case)
    for length in (1, 2):
        batch = cases.batch(lengths=(length, length))
        logits, texts, _ = outputs(model, batch)
        with installed():
            logits_ours, texts_ours, _ = outputs(model, batch)
        assert (logits_ours - logits).abs().max() <= 1e-4
        assert torch.equal(texts_ours, texts)


@every_model
def test_bfloat16_models_stay_near_their_float32_selves(case: str) -> None:
    """No nearer than transformers' own bfloat16 model would be too much to ask; twice as far would be a fault."""
    model, batch = cases.model(case), cases.batch()
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    kept = batch.attention_mask.bool()
    with torch.no_grad():
        exact = model(**inputs).logits[kept]
        half = copy.deepcopy(model).to(torch.bfloat16)
        theirs = half(**inputs).logits[kept].float()
        with installed():
            ours = half(**inputs).logits[kept].float()
    assert (ours - exact).norm() <= 2 * (theirs - exact).norm() + 1e-3


class Adapted(nn.Module):
    """A module with a low-rank adapter beside it, as PEFT wraps one: its weights alone are not what it computes."""

    def __init__(self, base: nn.Module):
        super().__init__()
        self.base_layer = base
        if isinstance(base, nn.Conv1d):
            self.adapter: nn.Module = nn.Conv1d(
                base.in_channels, base.out_channels, base.kernel_size, padding=base.padding, bias=False
            )
            nn.init.normal_(self.adapter.weight, std=0.1)
        else:
            self.adapter = nn.Sequential(
                nn.Linear(base.in_features, 2, bias=False), nn.Linear(2, base.out_features, bias=False)
            )
            for layer in self.adapter:
                nn.init.normal_(layer.weight, std=0.3)

    @property
    def weight(self) -> Tensor:
        return self.base_layer.weight

    @property
    def bias(self) -> Tensor | None:
        return self.base_layer.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.adapter(x)


# Mamba-2 has neither x_proj nor dt_proj, and zamba's are parameters.
ADAPTED = [(case, name) for case in ("mamba", "jamba", "zamba", "mamba2", "falcon_h1")
           for name in ("in_proj", "conv1d", "x_proj", "dt_proj", "out_proj")
           if case in ("mamba", "jamba") or name not in ("x_proj", "dt_proj")]  # fmt: skip


@pytest.mark.parametrize(("case", "name"), ADAPTED)
def test_an_adapter_on_a_submodule_counts(case: str, name: str) -> None:
    """In training it has a gradient, and it changes the output, also of a cached token."""
    model, batch = unlimited(cases.model(case)), cases.batch(lengths=(12, 12))
    mixer = cases.mixer_of(model)
    with installed():
        with torch.no_grad():
            before = decoded(model, batch.input_ids)
        setattr(mixer, name, Adapted(getattr(mixer, name)))
        with torch.no_grad():
            after = decoded(model, batch.input_ids)
        for place, (old, new) in enumerate(zip(before, after, strict=True)):
            assert (old - new).abs().max() > 1e-4, f"the adapter changed nothing in call {place}"
        with torch.no_grad():
            whole = model(input_ids=batch.input_ids, use_cache=False).logits
        assert (after[-1][:, -1] - whole[:, -1]).abs().max() <= 1e-4
        model.train()
        model(input_ids=batch.input_ids, labels=batch.input_ids).loss.backward()
    for parameter in getattr(mixer, name).adapter.parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0


def decoded(model: nn.Module, ids: Tensor) -> list[Tensor]:
    """Logits of a prompt, and of one more token with its cache."""
    step = model(input_ids=ids[:, :-1], use_cache=True)
    return [step.logits, next_token(model, ids, ids.shape[1] - 1, step).logits]


def test_peft_lora_trains_the_projections_of_a_mixer() -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed: its adapters are not tested")
    torch.manual_seed(0)
    model = peft.get_peft_model(
        cases.model("mamba"),
        peft.LoraConfig(r=2, target_modules=["in_proj", "x_proj", "dt_proj"], init_lora_weights=False),
    )
    ids = cases.batch(lengths=(12, 12)).input_ids
    with installed():
        model.train()
        model(input_ids=ids, labels=ids).loss.backward()
        adapters = {name: p for name, p in model.named_parameters() if "lora_" in name}
        assert len(adapters) == 2 * 2 * 3
        assert all(p.grad is not None and p.grad.abs().max() > 0 for p in adapters.values())
        model.eval()
        with torch.no_grad():
            adapted = decoded(model, ids)
            with model.disable_adapter():
                plain = decoded(model, ids)
            merged = decoded(model.merge_and_unload(), ids)
    for new, old, same in zip(adapted, plain, merged, strict=True):
        assert (new - old).abs().max() > 1e-3
        assert (new - same).abs().max() <= 1e-4


@pytest.mark.parametrize("case", ["mamba", "mamba2"])
def test_peft_lora_trains_the_output_projection_that_it_refuses_by_model_type(case: str) -> None:
    """PEFT looks for a model type, which the list of layers has not; README names this way."""
    peft = pytest.importorskip("peft", reason="peft is not installed: its adapters are not tested")
    torch.manual_seed(0)
    model, ids = cases.model(case), cases.batch(lengths=(12, 12)).input_ids
    settings = peft.LoraConfig(r=2, target_modules=["out_proj"], init_lora_weights=False)
    peft.inject_adapter_in_model(settings, model.backbone.layers)
    with installed():
        model(input_ids=ids, labels=ids).loss.backward()
    gradients = [p.grad for name, p in model.named_parameters() if "lora_" in name]
    assert len(gradients) == 2 * 2
    assert all(gradient is not None and gradient.abs().max() > 0 for gradient in gradients)


def test_packed_sequences_do_not_see_each_other() -> None:
    """``seq_idx``, which transformers refuses without mamba_ssm and causal_conv1d."""
    model = cases.model("bamba", attn_layer_indices=[])
    ids = cases.batch(lengths=(16,)).input_ids
    seq_idx = torch.tensor([[0] * 7 + [1] * 9], dtype=torch.int32)
    with installed(), torch.no_grad():
        packed = model(input_ids=ids, seq_idx=seq_idx, use_cache=False).logits
        apart = [model(input_ids=piece, use_cache=False).logits for piece in (ids[:, :7], ids[:, 7:])]
    assert (packed - torch.cat(apart, dim=1)).abs().max() <= 1e-4


@pytest.mark.parametrize("case", ["mamba", "jamba", "zamba", "mamba2", "falcon_h1"])
def test_a_mixer_keeps_packed_texts_apart(case: str) -> None:
    """Convolution and state both start anew where ``seq_idx`` changes; the cache keeps the last text's state."""
    from transformers import DynamicCache

    mixer = cases.mixer_of(model := cases.model(case))
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 16, 32, generator=generator)
    places = torch.arange(16)
    seq_idx = torch.stack([(places >= 7).int() + (places >= 10).int(), (places >= 4).int()])
    with installed(), torch.no_grad():
        cache = DynamicCache(config=model.config)
        packed = mixer(hidden, cache, seq_idx=seq_idx)
        for row, bounds in enumerate(((0, 7, 10, 16), (0, 4, 16))):
            for start, end in itertools.pairwise(bounds):
                own = DynamicCache(config=model.config)
                alone = mixer(hidden[row : row + 1, start:end], own)
                torch.testing.assert_close(packed[row : row + 1, start:end], alone, rtol=0, atol=1e-5)
            state, last = (one.get_recurrent_state(mixer.layer_idx, state_idx=0) for one in (cache, own))
            torch.testing.assert_close(state[row : row + 1], last, rtol=0, atol=1e-5)


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    batch = cases.batch()
    with installed():
        gradients = []
        for checkpointing in (False, True):
            model = cases.model("mamba")
            if checkpointing:
                model.gradient_checkpointing_enable()
            model.train()
            model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels).loss.backward()
            gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)


@pytest.mark.parametrize("case", ["mamba", "mamba2"])
def test_a_model_compiles_to_one_graph_and_exports(case: str) -> None:
    model, ids = cases.model(case), cases.batch(lengths=(9, 9)).input_ids
    with installed(), torch.no_grad():
        logits = model(ids, use_cache=False).logits
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)(ids, use_cache=False).logits
        exported = torch.export.export(model, (), {"input_ids": ids, "use_cache": False}, strict=False).module()
        torch.testing.assert_close(compiled, logits)
        torch.testing.assert_close(exported(input_ids=ids, use_cache=False).logits, logits)
    torch._dynamo.reset()


def test_beams_are_reordered_with_their_states() -> None:
    model, batch = cases.model("mamba2"), cases.batch(lengths=(9, 9))
    beams = {"max_new_tokens": 6, "num_beams": 3, "do_sample": False}
    texts = model.generate(batch.input_ids, attention_mask=batch.attention_mask, **beams)
    with installed():
        ours = model.generate(batch.input_ids, attention_mask=batch.attention_mask, **beams)
    assert torch.equal(ours, texts)


def test_an_activation_other_than_silu_is_taken_after_the_convolution() -> None:
    model, batch = cases.model("mamba", hidden_act="gelu"), cases.batch()
    logits, texts, _ = outputs(model, batch)
    with installed():
        logits_ours, texts_ours, _ = outputs(model, batch)
    assert (logits_ours - logits).abs().max() <= 1e-4
    assert torch.equal(texts_ours, texts)


def test_every_mixer_that_transformers_has_is_known() -> None:
    """A new model that asks for mamba_ssm should be looked at, and its mixer named in MIXERS."""
    from pathlib import Path

    import transformers

    asking = {
        path.parent.name
        for path in Path(transformers.__file__).parent.glob("models/*/modeling_*.py")
        if '"mamba_ssm"' in path.read_text()
    }
    assert asking, "transformers no longer asks for mamba_ssm by this name"
    assert asking == set(transformers_hook.MIXERS)


def test_uninstall_gives_the_mixers_and_the_functions_back() -> None:
    cases.model("mamba")
    modeling = sys.modules["transformers.models.mamba.modeling_mamba"]
    forward = modeling.MambaMixer.forward
    found = transformers_hook._lookup_of(modeling.causal_conv1d_fn)
    assert found is not None
    with installed():
        assert modeling.MambaMixer.forward is not forward
        x, weight = torch.randn(2, 6, 9), torch.randn(6, 4)
        ours = modeling.causal_conv1d_fn(x, weight, activation="silu")
        seq_idx = torch.zeros(2, 9, dtype=torch.int32)
        torch.testing.assert_close(modeling.causal_conv1d_fn(x, weight, activation="silu", seq_idx=seq_idx), ours)
    assert modeling.MambaMixer.forward is forward
    assert transformers_hook._lookup_of(modeling.causal_conv1d_fn) == found
    with pytest.raises(ValueError, match="packed sequences"):
        modeling.causal_conv1d_fn(x, weight, seq_idx=seq_idx)
    expected = F.silu(F.conv1d(x, weight.unsqueeze(1), padding=3, groups=6)[..., :9])
    torch.testing.assert_close(ours, expected)
