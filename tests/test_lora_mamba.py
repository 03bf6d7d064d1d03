"""Adapters on every buffer of every Mamba block, and on parts of them: always effective, merged or not."""

import copy

import pytest
import torch
import torch.nn.functional as F
import transformers_cases as cases
from test_adapters import forward, make, packed, padded, pieces, step
from test_transformers import installed
from tolerance import compare, error
from torch import nn

import trifuse
from trifuse.nn import Mamba, MambaLM, MambaLMConfig
from trifuse.nn.block import product_and_bias
from trifuse.nn.low_rank import LowRank
from trifuse.nn.mamba_buffers import mamba_buffers

MAMBA = ["in_proj", "in_proj.x", "in_proj.z", "x_proj", "x_proj.dt", "x_proj.B", "x_proj.C", "dt_proj", "out_proj"]
TARGETS = {
    "Mamba": [*MAMBA, "conv1d", ("x_proj.dt", "x_proj.C"), ("in_proj.x", "in_proj.z")],
    "Mamba2": ["in_proj", *(f"in_proj.{part}" for part in ("z", "x", "B", "C", "dt")), "out_proj", "conv1d"],
    "BidirectionalMamba": [
        "in_proj", "in_proj.x", "in_proj.z", "out_proj",
        *(name + suffix for name in ("conv1d", "x_proj", "dt_proj") for suffix in ("", "_b")),
        *(f"x_proj_b.{part}" for part in ("dt", "B", "C")),
    ],
}  # fmt: skip
CASES = [(block, target) for block, targets in TARGETS.items() for target in targets]


def listed(target):
    return [target] if isinstance(target, str) else list(target)


def adapters_of(model):
    return [module for module in model.modules() if isinstance(module, LowRank)]


def noise(model, seed=0):
    """Adapters that have an effect."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, one in model.named_parameters():
            if "lora_" in name:
                one.add_(0.5 * torch.randn(one.shape, generator=generator, dtype=one.dtype))
    return model


def runs(block):
    return (forward, padded, packed) + (() if block == "BidirectionalMamba" else (step, pieces))


@pytest.mark.parametrize(("block", "target"), CASES, ids=str)
def test_an_adapter_counts_is_trained_and_can_be_merged(block, target):
    plain = make(block)
    adapted = noise(trifuse.apply_lora(copy.deepcopy(plain), listed(target), rank=3, alpha=2))
    (layer,) = adapters_of(adapted)
    merged, name = copy.deepcopy(plain), listed(target)[0].partition(".")[0]
    weight = getattr(merged, name).weight
    A, B, factor = layer._update()
    weight.data += (factor * B @ A).detach().view(weight.shape)
    merged.requires_grad_(False)
    weight.requires_grad_()
    for run in runs(block):
        before, expected = run(plain).detach(), run(merged)
        out = run(adapted)
        assert (out - before).abs().max() > 1e-3 * before.abs().max(), run
        torch.testing.assert_close(out.detach(), expected.detach())
        with torch.no_grad():  # decode proper: without gradients the blocks go another way
            torch.testing.assert_close(run(adapted), expected.detach())
        incoming = torch.randn_like(out)
        got = torch.autograd.grad((out * incoming).sum(), [layer.lora_A, layer.lora_B])
        (wanted,) = torch.autograd.grad((expected * incoming).sum(), weight)
        wanted = factor * wanted.view(B.shape[0], A.shape[1])
        rows = range(B.shape[0]) if getattr(layer, "rows", None) is None else list(layer.rows)
        for one, want in zip(got, (B.T @ wanted, (wanted @ A.T)[list(rows)]), strict=True):
            assert one.abs().max() > 0, run
            torch.testing.assert_close(one, want.detach())
    layer.merge()
    assert torch.equal(getattr(adapted, name).original_weight(), getattr(plain, name).weight)
    with torch.no_grad():
        for run in runs(block):
            torch.testing.assert_close(run(adapted), run(merged), rtol=1e-5, atol=1e-5)
    with pytest.raises(RuntimeError, match="would get no gradient"):
        forward(adapted)


@pytest.mark.parametrize(("block", "target"), CASES, ids=str)
def test_an_adapter_of_a_part_leaves_the_other_rows(block, target):
    adapted = noise(trifuse.apply_lora(make(block), listed(target), rank=3))
    (layer,) = adapters_of(adapted)
    A, B, factor = layer._update()
    changed = (factor * B @ A).abs().sum(1) > 0
    buffers = mamba_buffers(make(block))
    rows = set()
    for one in listed(target):
        rows.update(range(B.shape[0]) if buffers[one] is None else buffers[one])
    assert changed.nonzero().flatten().tolist() == sorted(rows)


@pytest.mark.parametrize("block", TARGETS)
def test_the_parts_of_a_buffer_are_its_rows(block):
    buffers = mamba_buffers(make(block))
    for name, rows in buffers.items():
        if rows is None and any(other.startswith(f"{name}.") for other in buffers):
            parts = [row for other, own in buffers.items() if other.startswith(f"{name}.") for row in own]
            assert parts == list(range(getattr(make(block), name).out_features))


@pytest.mark.parametrize("kind", ["lora", "dylora", "dora", "multi"])
@pytest.mark.parametrize("block", TARGETS)
def test_the_preset_adapts_every_buffer_and_every_adapter_learns(block, kind):
    plain = make(block)
    adapted = trifuse.apply_lora(copy.deepcopy(plain), "mamba-buffers", rank=3, kind=kind)
    torch.testing.assert_close(forward(adapted), forward(plain))
    noise(adapted)
    buffers = {name for name, rows in mamba_buffers(plain).items() if rows is None}
    if kind == "multi":
        buffers -= {"conv1d", "conv1d_b"}
    assert {name for name, module in adapted.named_modules() if getattr(module, "has_adapter", False)} == buffers
    trained = dict(one for one in adapted.named_parameters() if one[1].requires_grad)
    assert {name.partition(".lora_")[0] for name in trained} == buffers
    out = forward(adapted)
    for name, grad in zip(trained, torch.autograd.grad(out.square().sum(), list(trained.values())), strict=True):
        assert grad.abs().max() > 0, name
    with torch.no_grad():
        before = [run(adapted) for run in runs(block)]
        assert all((one - run(plain)).abs().max() > 1e-3 for one, run in zip(before, runs(block), strict=True))
        if kind != "multi":
            for layer in adapters_of(adapted):
                layer.merge()
            for one, run in zip(before, runs(block), strict=True):
                torch.testing.assert_close(run(adapted), one, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["lora", "dylora"])
def test_the_fused_convolution_runs_with_the_taps_of_the_adapter(kind, monkeypatch):
    for block in TARGETS:
        adapted = noise(trifuse.apply_lora(make(block), "mamba-buffers", rank=3, kind=kind))
        expected = forward(adapted)

        def refuse(*arguments):
            raise AssertionError("the convolution was called by itself")

        monkeypatch.setattr(nn.Conv1d, "_conv_forward", refuse)
        torch.testing.assert_close(forward(adapted), expected)
        with torch.no_grad():
            for run in runs(block):
                run(adapted)
        monkeypatch.undo()


def test_a_merged_block_decodes_in_one_call_and_only_then():
    block = noise(trifuse.apply_lora(Mamba(16, layer_idx=0), "mamba-buffers", rank=3))
    with torch.no_grad():
        assert block._plain_weights() is None
        states = block.allocate_inference_cache(2)
        tokens = torch.randn(3, 2, 1, 16)
        expected = [block.step(token, *states)[0] for token in tokens]
        for layer in adapters_of(block):
            layer.merge()
        assert block._plain_weights() is not None
        states = block.allocate_inference_cache(2)
        for token, want in zip(tokens, expected, strict=True):
            torch.testing.assert_close(block.step(token, *states)[0], want, rtol=1e-5, atol=1e-5)
    with pytest.raises(RuntimeError, match="would get no gradient"):
        block(torch.randn(1, 4, 16))
    conv_only = noise(trifuse.apply_lora(Mamba(16, layer_idx=0), "conv1d", rank=3))
    with torch.no_grad():
        states, others = conv_only.allocate_inference_cache(2), conv_only.allocate_inference_cache(2)
        assert conv_only._plain_weights() is not None
        for token in tokens:
            torch.testing.assert_close(
                conv_only.step(token, *states)[0], conv_only._token(token.squeeze(1), *others).unsqueeze(1)
            )


def test_the_bias_of_an_adapted_dt_proj_is_added_in_float32():
    block = noise(trifuse.apply_lora(Mamba(16, dtype=torch.bfloat16), "dt_proj", rank=2))
    dt = torch.randn(2, 5, block.dt_rank, dtype=torch.bfloat16)
    product, bias = product_and_bias(block.dt_proj, dt)
    assert bias is block.dt_proj.bias
    A, B = block.dt_proj.lora_A, block.dt_proj.lora_B
    weight = block.dt_proj.weight.float() + block.dt_proj.scale * B @ A
    torch.testing.assert_close(product.float(), F.linear(dt.float(), weight), rtol=0.01, atol=0.01)
    hooked = block.dt_proj.register_forward_hook(lambda module, x, out: out + 1)
    product, bias = product_and_bias(block.dt_proj, dt)
    assert bias is None
    hooked.remove()


@pytest.mark.parametrize("half", ["bfloat16", "autocast"])
@pytest.mark.parametrize("block", TARGETS)
def test_in_half_precision_the_adapters_stay_in_float32(block, half):
    exact = noise(trifuse.apply_lora(make(block), "mamba-buffers", rank=3), seed=1)
    base = copy.deepcopy(exact).float()
    plain = make(block).float()
    if half == "bfloat16":  # the numbers of the base are rounded in both
        for one in (base, exact):
            for name, parameter in one.named_parameters():
                if "lora_" not in name:
                    parameter.data = parameter.data.bfloat16().to(parameter.dtype)
        base = trifuse.apply_lora(plain.bfloat16(), "mamba-buffers", rank=3)
        base.load_state_dict(exact.state_dict())
    x, dtype = torch.randn(2, 9, 16, dtype=torch.float64), {"bfloat16": torch.bfloat16, "autocast": torch.float32}[half]

    def run():
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=half == "autocast"):
            return base(x.to(dtype))

    out = run()
    for layer in adapters_of(base):
        layer.merge()
    with torch.no_grad():  # plain layers with the sum of base and update as their weights
        compare({"out": out}, {"out": exact(x)}, {"out": error(run(), exact(x))})
    for layer in adapters_of(base):
        layer.unmerge()
    run().float().square().sum().backward()
    for name, one in base.named_parameters():
        if "lora_" in name:
            assert one.dtype == one.grad.dtype == torch.float32
            assert one.grad.abs().max() > 0 and torch.isfinite(one.grad).all(), name


@pytest.mark.parametrize("layer", ["Mamba1", "Mamba2"])
@pytest.mark.parametrize("kind", ["lora", "dylora", "dora"])
def test_a_language_model_writes_the_same_text_merged_or_not(layer, kind):
    torch.manual_seed(0)
    sizes = {"Mamba1": {}, "Mamba2": {"headdim": 8, "d_state": 8}}[layer]
    config = MambaLMConfig(d_model=16, n_layer=2, vocab_size=40, ssm_cfg={"layer": layer, **sizes})
    plain = MambaLM(config)
    model = trifuse.apply_lora(copy.deepcopy(plain), "mamba-buffers", rank=3, kind=kind)
    prompt = torch.randint(40, (2, 6))
    assert torch.equal(model.generate(prompt, 12), plain.generate(prompt, 12))
    noise(model)
    text = model.generate(prompt, 12)
    assert not torch.equal(text, plain.generate(prompt, 12))
    for adapter in adapters_of(model):
        adapter.merge()
    assert torch.equal(model.generate(prompt, 12), text)
    for adapter in adapters_of(model):
        adapter.unmerge()
    assert torch.equal(model.generate(prompt, 12), text)


@pytest.mark.parametrize("layer", ["Mamba1", "Mamba2"])
def test_each_text_of_a_batch_has_its_own_adapter(layer):
    torch.manual_seed(0)
    sizes = {"Mamba1": {}, "Mamba2": {"headdim": 8, "d_state": 8}}[layer]
    config = MambaLMConfig(d_model=16, n_layer=2, vocab_size=40, ssm_cfg={"layer": layer, **sizes})
    model = trifuse.apply_lora(MambaLM(config), "mamba-buffers", rank=3, kind="multi", adapters=["de", "fr"])
    noise(model)
    texts, names = [torch.randint(40, (length,)).tolist() for length in (7, 4, 5)], ["fr", "de", None]
    alone = []
    for text, name in zip(texts, names, strict=True):
        with trifuse.adapters(model, name):
            alone.append(model.generate([text], 6)[0])
    with trifuse.adapters(model, names):
        together = model.generate(texts, 6)
    assert [one.tolist() for one in together] == [one.tolist() for one in alone]
    batch, mask = torch.tensor([text + [0] * (7 - len(text)) for text in texts]), torch.ones(3, 7)
    mask[1, 4:] = mask[2, 5:] = 0
    per_token = torch.tensor([1, 0, -1])[:, None].expand(3, 7)
    logits = []
    for index in (names, per_token):
        with trifuse.adapters(model, index):
            out = model(batch, attention_mask=mask)
            logits.append(getattr(out, "logits", out).detach())
    torch.testing.assert_close(logits[0], logits[1])
    with trifuse.adapters(model, "de"):
        out = model(batch[1:2, :4])
        torch.testing.assert_close(logits[0][1:2, :4], getattr(out, "logits", out).detach())


@pytest.mark.parametrize("case", ["mamba", "jamba", "zamba", "mamba2", "falcon_h1"])
def test_the_mixers_of_transformers_take_the_preset(case):
    pytest.importorskip("transformers")
    with installed():
        plain = cases.model(case)
        model = noise(trifuse.apply_lora(copy.deepcopy(plain), "mamba-buffers", rank=3))
        mixer = cases.mixer_of(model)
        own = [name for name in ("in_proj", "x_proj", "dt_proj", "conv1d", "out_proj") if hasattr(mixer, name)]
        assert all(isinstance(getattr(mixer, name), LowRank) for name in own) and len(own) >= 3
        ids = cases.batch(lengths=(9, 9)).input_ids
        out = model(input_ids=ids, use_cache=False).logits
        assert (out - plain(input_ids=ids, use_cache=False).logits).abs().max() > 1e-3
        out.square().sum().backward()
        grads = {name: one.grad for name, one in mixer.named_parameters() if "lora_" in name}
        assert len(grads) == 2 * len(own) and all(grad.abs().max() > 0 for grad in grads.values())
        with torch.no_grad():
            greedy = {"max_new_tokens": 5, "do_sample": False, "min_new_tokens": 5}
            text = model.generate(ids, **greedy)
            for place in range(9, 14):  # what is decoded from the cache is what the whole text gives
                logits = model(input_ids=text[:, :place], use_cache=False).logits[:, -1]
                assert (logits.gather(1, text[:, place, None])[:, 0] >= logits.max(1).values - 1e-4).all()
            for layer in adapters_of(model):
                layer.merge()
            merged = model(input_ids=ids, use_cache=False).logits
            assert (merged - out).abs().max() <= 1e-5 * out.abs().max()
            assert torch.equal(model.generate(ids, **greedy), text)
        parts = mamba_buffers(cases.mixer_of(plain))
        assert {"in_proj.x", "in_proj.z"} <= parts.keys()
        half = trifuse.apply_lora(copy.deepcopy(plain), ["in_proj.x"], rank=2)
        assert list(cases.mixer_of(half).in_proj.rows) == list(parts["in_proj.x"])


def test_the_halves_of_in_proj_are_those_of_the_mixers_of_transformers():
    """An adapter on the gate's half leaves what the convolution sees, and one on the other leaves the gate."""
    pytest.importorskip("transformers")
    with installed():
        for case in ("mamba", "zamba", "mamba2"):
            for part, kept in (("in_proj.z", True), ("in_proj.x", False)):
                model = cases.model(case)
                mixer, seen = cases.mixer_of(model), []
                hook = lambda module, inputs, seen=seen: seen.append(inputs[0].detach()[..., :9])  # noqa: E731
                mixer.conv1d.register_forward_pre_hook(hook)
                ids = cases.batch(lengths=(9, 9)).input_ids
                model(input_ids=ids, use_cache=False)
                noise(trifuse.apply_lora(model, [part], rank=2))
                model(input_ids=ids, use_cache=False)
                assert torch.equal(*seen) == kept, (case, part)
