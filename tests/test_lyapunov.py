"""``trifuse.analysis.lyapunov_exponents``: the rate at which a state's deviation dies away, per channel and state."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import trifuse
from trifuse.analysis import lyapunov_exponents
from trifuse.nn import InferenceParams, Mamba, MambaLM, MambaLMConfig

BATCH, LENGTH, WIDTH, STATES = 3, 9, 12, 4


@pytest.fixture
def block() -> Mamba:
    torch.manual_seed(0)
    return Mamba(WIDTH, d_state=STATES, dt_max=0.5, layer_idx=0, dtype=torch.float64)


def text(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@torch.no_grad()
def measured(block: Mamba, x: torch.Tensor) -> torch.Tensor:
    """(B, d_inner, N): log of what a deviation of 1 in the state has become at the end of the text, per step."""

    def last_state(deviation: float) -> torch.Tensor:
        conv, state = block.allocate_inference_cache(len(x))
        cache = InferenceParams(seqlen_offset=1, key_value_memory_dict={0: (conv, state.to(x.dtype) + deviation)})
        block(x, cache)
        return cache.key_value_memory_dict[0][1]

    with trifuse.backend("reference"):
        return (last_state(1.0) - last_state(0.0)).log() / x.shape[1]


def test_they_are_what_becomes_of_a_deviation_of_the_state(block) -> None:
    x = text(BATCH, LENGTH, WIDTH)
    wanted = measured(block, x)
    found = lyapunov_exponents(block, x, per_sequence=True)[""]
    assert found.shape == (BATCH, 24, STATES) and found.dtype == torch.float64
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(lyapunov_exponents(block, x)[""], wanted.mean(0), rtol=1e-6, atol=1e-9)


def test_they_are_the_mean_log_of_the_decays_of_the_scan(block, monkeypatch) -> None:
    """What the block hands to its scan, taken from there."""
    seen = {}
    scan = trifuse.nn.mamba.selective_scan

    def watched(x, dt, A, B, C, D, z, dt_bias, **options):
        seen.update(dt=dt, A=A, bias=dt_bias)
        return scan(x, dt, A, B, C, D, z, dt_bias, **options)

    monkeypatch.setattr(trifuse.nn.mamba, "selective_scan", watched)
    found = lyapunov_exponents(block, text(BATCH, LENGTH, WIDTH))[""]
    steps = torch.nn.functional.softplus(seen["dt"] + seen["bias"])  # (B, L, D)
    decays = torch.exp(steps[..., None] * seen["A"])
    torch.testing.assert_close(found, decays.log().mean((0, 1)))


def test_no_exponent_is_above_zero_and_slow_states_have_the_largest(block) -> None:
    found = lyapunov_exponents(block, text(BATCH, LENGTH, WIDTH))[""]
    assert (found < 0).all()
    assert (found.diff(dim=1) < 0).all()  # A starts as -1, -2, -3, ...
    torch.testing.assert_close(found, found[:, :1] * torch.arange(1.0, STATES + 1, dtype=torch.float64))


def test_every_layer_of_a_language_model_by_its_name() -> None:
    torch.manual_seed(0)
    model = MambaLM(MambaLMConfig(d_model=WIDTH, n_layer=3, vocab_size=20, ssm_cfg={"d_state": STATES}))
    tokens = torch.randint(20, (BATCH, LENGTH))
    found = lyapunov_exponents(model, tokens)
    assert list(found) == [f"backbone.layers.{i}.mixer" for i in range(3)]
    assert all(one.shape == (24, STATES) and (one < 0).all() for one in found.values())
    for batch in ((tokens, "a label"), {"input_ids": tokens}):
        assert all(torch.equal(one, found[name]) for name, one in lyapunov_exponents(model, batch).items())
    compiled = lyapunov_exponents(torch.compile(model), tokens)
    assert list(compiled) == list(found)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_does_not_count(side) -> None:
    torch.manual_seed(0)
    model = MambaLM(MambaLMConfig(d_model=WIDTH, n_layer=2, vocab_size=20, ssm_cfg={"d_state": STATES}))
    lengths, tokens = (9, 4, 1), torch.randint(20, (BATCH, LENGTH))
    mask = torch.stack([torch.arange(LENGTH) < length for length in lengths])
    if side == "left":
        mask = mask.flip(1)
    found = lyapunov_exponents(model, {"input_ids": tokens, "attention_mask": mask}, per_sequence=True)
    alone = [lyapunov_exponents(model, row[keep][None]) for row, keep in zip(tokens, mask, strict=True)]
    for name, one in found.items():
        torch.testing.assert_close(one, torch.stack([other[name] for other in alone]), rtol=1e-5, atol=1e-7)
    mean = lyapunov_exponents(model, {"input_ids": tokens, "attention_mask": mask})
    for name, one in found.items():
        share = torch.tensor(lengths, dtype=torch.float64) / sum(lengths)
        torch.testing.assert_close(mean[name], (one * share[:, None, None]).sum(0))


def test_packed_texts_are_told_apart(block) -> None:
    packed = text(1, 12, WIDTH)
    bounds = torch.tensor([0, 3, 4, 12])
    found = lyapunov_exponents(block, {"hidden_states": packed, "cu_seqlens": bounds}, per_sequence=True)[""]
    for i, (start, end) in enumerate(((0, 3), (3, 4), (4, 12))):
        torch.testing.assert_close(found[i], lyapunov_exponents(block, packed[:, start:end])[""])
    mask = torch.ones(2, 5).index_put((torch.tensor([1]), torch.tensor([4])), torch.tensor(0.0))
    rows = text(2, 5, WIDTH)
    found = lyapunov_exponents(block, {"hidden_states": rows, "attention_mask": mask}, per_sequence=True)[""]
    torch.testing.assert_close(found[0], lyapunov_exponents(block, rows[:1])[""])
    torch.testing.assert_close(found[1], lyapunov_exponents(block, rows[1:, :4])[""])


def test_a_layer_that_is_called_twice_counts_twice(block) -> None:
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.shared = block

        def forward(self, x):
            return self.shared(self.shared(x))

    x = text(BATCH, LENGTH, WIDTH)
    with torch.no_grad():
        both = torch.cat([x, block(x)])
    torch.testing.assert_close(lyapunov_exponents(Twice(), x)["shared"], lyapunov_exponents(block, both)[""])


def test_an_adapter_of_the_step_sizes_counts(block) -> None:
    x, plain = text(BATCH, LENGTH, WIDTH), copy.deepcopy(block)

    class Shifted(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base = base

        def forward(self, x):
            return self.base(x) + 1.5

    block.dt_proj = Shifted(block.dt_proj)
    with torch.no_grad():
        plain.dt_proj.bias += 1.5
    torch.testing.assert_close(lyapunov_exponents(block, x)[""], lyapunov_exponents(plain, x)[""])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_half_precision_adds_the_bias_of_the_steps_in_float32(dtype) -> None:
    torch.manual_seed(0)
    block = Mamba(WIDTH, d_state=STATES, dtype=dtype)
    x = text(BATCH, LENGTH, WIDTH, dtype=dtype)
    block.dt_proj.weight.data.zero_()
    found = lyapunov_exponents(block, x)[""]
    wanted = torch.nn.functional.softplus(block.dt_proj.bias.float()).double()[:, None] * -block.A_log.exp().double()
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=0)


def test_the_model_is_left_as_it_was(block) -> None:
    block.train()
    x = text(BATCH, LENGTH, WIDTH).requires_grad_()
    before = block(x)
    lyapunov_exponents(block, x)
    assert block.training and not block._forward_pre_hooks and not block.x_proj._forward_hooks
    assert torch.equal(block(x), before)
    with pytest.raises(ValueError, match="hidden_states has shape"):
        lyapunov_exponents(block, text(BATCH, LENGTH, WIDTH + 1))
    assert block.training and not block._forward_pre_hooks and not block.x_proj._forward_hooks


@pytest.mark.parametrize("installed", [False, True])
def test_transformers_mixers_count_too(installed) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    import trifuse.integrations

    torch.manual_seed(0)
    config = transformers.MambaConfig(
        vocab_size=20, hidden_size=WIDTH, state_size=STATES, num_hidden_layers=2, use_cache=False
    )
    model = transformers.MambaForCausalLM(config).eval()
    ours = MambaLM(MambaLMConfig(d_model=WIDTH, n_layer=2, vocab_size=20, ssm_cfg={"d_state": STATES}))
    for mine, theirs in zip(ours.backbone.layers, model.backbone.layers, strict=True):
        mine.norm.load_state_dict(theirs.norm.state_dict())
        mine.mixer.load_state_dict(theirs.mixer.state_dict())
    tokens = torch.randint(20, (BATCH, LENGTH))
    ours.backbone.embedding.weight.data[:20] = model.backbone.embeddings.weight.data
    if installed:
        with pytest.warns(RuntimeWarning, match="came after transformers had imported"):
            trifuse.integrations.install()
    try:
        found = lyapunov_exponents(model, {"input_ids": tokens}, per_sequence=True)
    finally:
        if installed:
            trifuse.integrations.uninstall()
    wanted = lyapunov_exponents(ours, tokens, per_sequence=True)
    for (name, one), other in zip(found.items(), wanted.values(), strict=True):
        assert name.endswith(".mixer")
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_bad_arguments_are_named(block) -> None:
    with pytest.raises(TypeError, match=r"^lyapunov_exponents: model is function; it must be a torch\.nn\.Module"):
        lyapunov_exponents(lambda x: x, text(1, 2, WIDTH))
    with pytest.raises(ValueError, match=r"^lyapunov_exponents: model is a Linear without Mamba layers; it must hold"):
        lyapunov_exponents(nn.Linear(2, 2), torch.ones(1, 2))
    with pytest.raises(ValueError, match=r"^lyapunov_exponents: batch has a sequence without tokens"):
        lyapunov_exponents(block, text(2, 0, WIDTH))

    class Idle(nn.Module):
        def __init__(self):
            super().__init__()
            self.mixer = block

        def forward(self, x):
            return x

    with pytest.raises(ValueError, match="the model never called x_proj of 'mixer' on this batch"):
        lyapunov_exponents(Idle(), text(1, 2, WIDTH))
