"""MambaLM: published keys and files, padding, states, and generation."""

import json

import pytest
import torch
import torch.nn.functional as F

from trifuse.nn import InferenceParams, MambaLM, MambaLMConfig
from trifuse.nn.generation import sample

MAMBA1 = {"d_state": 8}
MAMBA2 = {"layer": "Mamba2", "d_state": 16, "headdim": 8, "chunk_size": 16}
KINDS = {"mamba": MAMBA1, "mamba2": MAMBA2}


def build(kind="mamba", seed=0, **options):
    torch.manual_seed(seed)
    # An untied head: with a tied one an untrained model repeats its last token.
    sizes = {"d_model": 32, "n_layer": 2, "vocab_size": 61, "ssm_cfg": dict(KINDS[kind]), "tie_embeddings": False}
    return MambaLM(MambaLMConfig(**sizes | options), initializer_range=0.5)


def tokens(*shape, seed=1):
    return torch.randint(0, 61, shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", KINDS)
def test_keys_are_the_published_ones(kind):
    keys = set(build(kind).state_dict())
    mixer = {"A_log", "D", "in_proj.weight", "conv1d.weight", "conv1d.bias", "out_proj.weight"}
    mixer |= {"x_proj.weight", "dt_proj.weight", "dt_proj.bias"} if kind == "mamba" else {"dt_bias", "norm.weight"}
    expected = {"backbone.embedding.weight", "backbone.norm_f.weight", "lm_head.weight"}
    for i in range(2):
        expected |= {f"backbone.layers.{i}.norm.weight"} | {f"backbone.layers.{i}.mixer.{name}" for name in mixer}
    assert keys == expected


def test_the_vocabulary_is_rounded_up_and_the_head_is_tied():
    model = build(tie_embeddings=True)
    assert model.lm_head.weight is model.backbone.embedding.weight
    assert model.lm_head.weight.shape == (64, 32)
    assert build().lm_head.weight is not model.backbone.embedding.weight


def test_the_residual_terms_start_smaller_in_deeper_models():
    shallow, deep = build(n_layer=1), build(n_layer=16)
    ratio = shallow.backbone.layers[0].mixer.out_proj.weight.std() / deep.backbone.layers[0].mixer.out_proj.weight.std()
    assert ratio.item() == pytest.approx(4, rel=0.1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("safe", [True, False])
@pytest.mark.parametrize("tied", [True, False])
def test_what_is_saved_loads_again(tmp_path, kind, safe, tied):
    model = build(kind, tie_embeddings=tied)
    model.save_pretrained(tmp_path, safe_serialization=safe)
    again = MambaLM.from_pretrained(tmp_path)
    file = tmp_path / ("model.safetensors" if safe else "pytorch_model.bin")
    assert torch.equal(MambaLM.from_pretrained(file)(tokens(2, 9)), model(tokens(2, 9)))
    assert torch.equal(again(tokens(2, 9)), model(tokens(2, 9)))
    assert (again.lm_head.weight is again.backbone.embedding.weight) == tied


def test_a_published_file_written_by_hand_loads(tmp_path):
    """Names, shapes and config of state-spaces' own files, with a tied head that is stored twice."""
    g = torch.Generator().manual_seed(3)
    shapes = {
        "A_log": (64, 16), "D": (64,), "in_proj.weight": (128, 32), "conv1d.weight": (64, 1, 4), "conv1d.bias": (64,),
        "x_proj.weight": (34, 64), "dt_proj.weight": (64, 2), "dt_proj.bias": (64,), "out_proj.weight": (32, 64),
    }  # fmt: skip
    weights = {"backbone.embedding.weight": (56, 32), "backbone.norm_f.weight": (32,)}
    weights |= {f"backbone.layers.0.mixer.{name}": shape for name, shape in shapes.items()}
    weights["backbone.layers.0.norm.weight"] = (32,)
    weights = {name: 0.3 * torch.randn(shape, generator=g) for name, shape in weights.items()}
    weights["lm_head.weight"] = weights["backbone.embedding.weight"]
    torch.save(weights, tmp_path / "pytorch_model.bin")
    config = {
        "d_model": 32, "n_layer": 1, "vocab_size": 50, "ssm_cfg": {}, "rms_norm": True, "residual_in_fp32": True,
        "fused_add_norm": True, "pad_vocab_size_multiple": 8,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = MambaLM.from_pretrained(tmp_path)
    for name, value in model.state_dict().items():
        assert torch.equal(value, weights[name]), name

    ids = tokens(1, 7) % 50
    x = F.embedding(ids, weights["backbone.embedding.weight"])
    y = x + model.backbone.layers[0].mixer(F.rms_norm(x, (32,), weights["backbone.layers.0.norm.weight"], 1e-5))
    y = F.rms_norm(y, (32,), weights["backbone.norm_f.weight"], 1e-5)
    torch.testing.assert_close(model(ids), y @ weights["lm_head.weight"].T)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("safe", [True, False])
def test_a_transformers_file_loads_and_gives_the_same_logits(tmp_path, kind, safe):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 61, "state_size": 16}
    torch.manual_seed(0)
    if kind == "mamba":
        model = transformers.MambaForCausalLM(transformers.MambaConfig(**sizes))
    else:
        more = {"num_heads": 8, "head_dim": 8, "n_groups": 2, "chunk_size": 16, "tie_word_embeddings": False}
        model = transformers.Mamba2ForCausalLM(transformers.Mamba2Config(**sizes, **more))
    model.eval().save_pretrained(tmp_path)
    if not safe:
        torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
        (tmp_path / "model.safetensors").unlink()
    ours = MambaLM.from_pretrained(tmp_path)
    ids = tokens(2, 40)
    with torch.no_grad():
        torch.testing.assert_close(ours(ids), model(ids).logits, atol=1e-4, rtol=1e-4)
        whole = torch.ones_like(ids)  # else it takes a token for padding
        theirs = model.generate(ids, attention_mask=whole, max_new_tokens=8, do_sample=False, eos_token_id=None)
        assert torch.equal(ours.generate(ids, 8), theirs)


def test_an_old_transformers_config_also_says_d_model(tmp_path):
    """As converted in 2024: the words of both layouts in the config, transformers' keys in the weights."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 61, "state_size": 16}
    model = transformers.MambaForCausalLM(transformers.MambaConfig(**sizes)).eval()
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"d_model": 32, "d_inner": 64, "n_layer": 2, "ssm_cfg": {}, "rms_norm": True, "fused_add_norm": True}
    (tmp_path / "config.json").write_text(json.dumps(config | {"pad_vocab_size_multiple": 8}))
    ids = tokens(2, 9)
    with torch.no_grad():
        logits = MambaLM.from_pretrained(tmp_path)(ids)
        torch.testing.assert_close(logits, model(ids).logits, atol=1e-4, rtol=1e-4)


def test_a_sharded_checkpoint_loads(tmp_path):
    model = build()
    model.save_pretrained(tmp_path, safe_serialization=False)
    weights = torch.load(tmp_path / "pytorch_model.bin", weights_only=True)
    (tmp_path / "pytorch_model.bin").unlink()
    place = {name: f"part-{i % 2}.bin" for i, name in enumerate(weights)}
    for file in set(place.values()):
        torch.save({name: one for name, one in weights.items() if place[name] == file}, tmp_path / file)
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": place}))
    assert torch.equal(MambaLM.from_pretrained(tmp_path)(tokens(1, 5)), model(tokens(1, 5)))


def test_a_checkpoint_loads_in_another_dtype(tmp_path):
    build().save_pretrained(tmp_path)
    model = MambaLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    mixer = model.backbone.layers[0].mixer
    assert (mixer.in_proj.weight.dtype, mixer.A_log.dtype) == (torch.bfloat16, torch.float32)
    assert model(tokens(1, 5)).dtype == torch.bfloat16


def test_a_checkpoint_that_does_not_fit_says_where(tmp_path):
    model = build()
    model.save_pretrained(tmp_path, safe_serialization=False)
    weights = torch.load(tmp_path / "pytorch_model.bin", weights_only=True)
    weights["extra"] = weights.pop("backbone.norm_f.weight")
    weights["backbone.layers.0.mixer.D"] = torch.ones(3)
    torch.save(weights, tmp_path / "pytorch_model.bin")
    with pytest.raises(
        ValueError, match=r"lacks backbone.norm_f.weight; it has extra, .* is \(3,\) and must be \(64,\)"
    ):
        MambaLM.from_pretrained(tmp_path)


def test_missing_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no folder or file someone/mamba.*nothing is downloaded"):
        MambaLM.from_pretrained("someone/mamba")
    with pytest.raises(FileNotFoundError, match=r"no config.json in"):
        MambaLM.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"d_model": 32}')
    with pytest.raises(FileNotFoundError, match=r"no model.safetensors, pytorch_model.bin"):
        MambaLM.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"model_type 'llama'"):
        MambaLM.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"d_model": 32, "n_layer": 1, "vocab_size": 8}')
    with pytest.raises(ValueError, match=r"it lacks backbone.embedding.weight"):
        MambaLM.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_layer": 0}, "n_layer is 0; it must be a positive int"),
        ({"attn_layer_idx": [1]}, r"attn_layer_idx is \[1\]; attention blocks are not built here"),
        ({"ssm_cfg": {"layer": "Mamba3"}}, r"is 'Mamba3'; it must be one of Mamba1, Mamba2"),
    ],
)
def test_a_config_that_cannot_be_built_says_why(options, message):
    with pytest.raises(ValueError, match=message):
        MambaLMConfig(**options)


def test_a_config_of_another_kind_is_refused():
    with pytest.raises(TypeError, match="config is dict; it must be a MambaLMConfig"):
        MambaLM({"d_model": 32})


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("side", ["left", "right", "anywhere"])
def test_padding_never_changes_the_rest(kind, side):
    model = build(kind)
    lengths, width = (11, 40, 1), 40
    ids, mask = torch.full((3, width), 60), torch.zeros(3, width, dtype=torch.int64)
    texts = [tokens(n, seed=n) for n in lengths]
    g = torch.Generator().manual_seed(0)
    for row, text in enumerate(texts):
        places = torch.arange(width)[: len(text)] if side == "right" else torch.arange(width)[width - len(text) :]
        if side == "anywhere":
            places = torch.randperm(width, generator=g)[: len(text)].sort().values
        ids[row, places], mask[row, places] = text, 1
    logits = model(ids, mask)
    last = model(ids, mask, num_last_tokens=2)
    for row, text in enumerate(texts):
        alone = model(text[None])[0]
        torch.testing.assert_close(logits[row, mask[row] == 1], alone, atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(last[row, -1], alone[-1], atol=2e-5, rtol=1e-4)
    assert not logits[mask == 0].any()
    assert not last[2, 0].any()  # a row of one token has no last but one
    changed = model(torch.where(mask == 1, ids, 5), mask)
    assert torch.equal(changed, logits)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_states_go_on_from_padded_pieces(kind, side):
    model = build(kind)
    texts = [tokens(30, seed=4), tokens(30, seed=5)]
    pieces = [((9, 3), 9), ((1, 20), 20), ((20, 7), 20)]  # (tokens of each row, width)
    cache, done, found = InferenceParams(), [0, 0], [[], []]
    for counts, width in pieces:
        ids, mask = torch.zeros(2, width, dtype=torch.int64), torch.zeros(2, width)
        for row, count in enumerate(counts):
            where = slice(width - count, width) if side == "left" else slice(0, count)
            ids[row, where], mask[row, where] = texts[row][done[row] : done[row] + count], 1
            done[row] += count
        logits = model(ids, mask, inference_params=cache)
        cache.seqlen_offset += width
        for row in range(2):
            found[row].append(logits[row, mask[row] == 1])
    for row, text in enumerate(texts):
        torch.testing.assert_close(torch.cat(found[row]), model(text[None])[0], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_generation_is_the_argmax_of_the_whole_text(kind):
    model = build(kind)
    ids = tokens(3, 6)
    written = model.generate(ids, 10)
    assert written.shape == (3, 16)
    for length in range(6, 16):
        assert torch.equal(model(written[:, :length])[:, -1, :61].argmax(-1), written[:, length])


@pytest.mark.parametrize("kind", KINDS)
def test_prompts_of_unequal_length_are_written_as_if_alone(kind):
    model = build(kind)
    prompts = [tokens(n, seed=n) for n in (1, 17, 5)]
    alone = [model.generate(one[None], 12)[0] for one in prompts]
    for found, expected in zip(model.generate(prompts, 12), alone, strict=True):
        assert torch.equal(found, expected)
    padded = torch.zeros(3, 17, dtype=torch.int64)
    mask = torch.zeros(3, 17)
    for row, prompt in enumerate(prompts):
        padded[row, 17 - len(prompt) :], mask[row, 17 - len(prompt) :] = prompt, 1
    written = model.generate(padded, 12, attention_mask=mask)
    for row, expected in enumerate(alone):
        assert torch.equal(written[row, 17:], expected[-12:])
    assert [one.tolist() for one in model.generate([one.tolist() for one in prompts], 12)] == [
        one.tolist() for one in alone
    ]


def test_a_text_ends_at_its_end_token():
    model = build()
    ids = tokens(4, 3)
    free = model.generate(ids, 12)[:, 3:]
    end = int(free[0, 4])
    written = model.generate(ids, 12, eos_token_id=end, pad_token_id=7)[:, 3:]
    for row in range(4):
        stop = (free[row] == end).nonzero()
        stop = int(stop[0]) + 1 if len(stop) else 12
        stop = min(stop, written.shape[1])
        assert torch.equal(written[row, :stop], free[row, :stop])
        assert (written[row, stop:] == 7).all()
    listed = model.generate(list(ids), 12, eos_token_id=[end])
    assert listed[0][-1] == end
    assert end not in listed[0][3:-1]


@pytest.mark.parametrize("kind", [torch.tensor, lambda end: torch.tensor([end]), lambda end: (end, torch.tensor(end))])
def test_an_end_token_may_be_of_any_kind(kind):
    model, ids = build(), tokens(1, 5)
    free = model.generate(ids, 6)
    end = int(free[0, 7])
    for prompts in (ids, ids.tolist()):
        expected = model.generate(prompts, 6, eos_token_id=end)
        assert len(expected[0]) < 11
        assert torch.equal(model.generate(prompts, 6, eos_token_id=kind(end))[0], expected[0])


def test_generation_stops_when_every_text_has_ended():
    model = build()
    ids = tokens(1, 3)
    end = int(model.generate(ids, 1)[0, -1])
    assert model.generate(ids, 12, eos_token_id=end).shape == (1, 4)


def test_streaming_gives_the_same_tokens_one_step_at_a_time():
    model = build()
    ids = tokens(2, 4)
    steps = model.stream(ids, 6)
    first = next(steps)
    assert first.shape == (2,)
    assert torch.equal(torch.stack([first, *steps], dim=1), model.generate(ids, 6)[:, 4:])


def test_a_streamer_is_told_prompts_tokens_and_the_end():
    class Streamer:
        def __init__(self):
            self.told, self.ended = [], 0

        def put(self, tokens):
            self.told.append(tokens)

        def end(self):
            self.ended += 1

    model, streamer = build(), Streamer()
    written = model.generate(tokens(1, 4), 3, streamer=streamer)
    assert torch.equal(torch.cat([one.flatten() for one in streamer.told]), written[0])
    assert (len(streamer.told), streamer.ended) == (4, 1)


def test_gradients_still_flow_between_the_steps_of_a_stream():
    model = build()
    for _ in model.stream(tokens(1, 4), 2):
        assert torch.is_grad_enabled()
        assert not torch.is_inference_mode_enabled()


def test_a_seed_fixes_what_is_drawn():
    model = build()
    ids = tokens(2, 4)

    def draw(seed):
        return model.generate(ids, 20, do_sample=True, generator=torch.Generator().manual_seed(seed))

    assert torch.equal(draw(0), draw(0))
    assert not torch.equal(draw(0), draw(1))
    assert draw(0).max() < 61


def frequencies(logits, **options):
    drawn = sample(logits.expand(20000, -1), generator=torch.Generator().manual_seed(0), **options)
    return torch.bincount(drawn, minlength=logits.shape[-1]) / 20000


def test_draws_follow_the_probabilities():
    logits = torch.tensor([2.0, 0.0, 1.0, -1.0])
    torch.testing.assert_close(frequencies(logits), logits.softmax(0), atol=0.015, rtol=0)
    torch.testing.assert_close(frequencies(logits, temperature=0.5), (2 * logits).softmax(0), atol=0.015, rtol=0)


def test_top_k_draws_among_the_likeliest():
    logits = torch.tensor([2.0, 0.0, 1.0, -1.0])
    expected = torch.tensor([2.0, -torch.inf, 1.0, -torch.inf]).softmax(0)
    torch.testing.assert_close(frequencies(logits, top_k=2), expected, atol=0.015, rtol=0)
    assert frequencies(logits, top_k=1)[0] == 1
    assert frequencies(logits, top_k=9)[3] > 0


def test_top_p_draws_among_those_that_make_up_p():
    probabilities = torch.tensor([0.5, 0.1, 0.3, 0.1])
    expected = torch.tensor([0.625, 0.0, 0.375, 0.0])
    torch.testing.assert_close(frequencies(probabilities.log(), top_p=0.75), expected, atol=0.015, rtol=0)
    assert frequencies(probabilities.log(), top_p=0.01)[0] == 1
    torch.testing.assert_close(frequencies(probabilities.log(), top_p=1.0), probabilities, atol=0.015, rtol=0)
    # top_k first: of the two left, 0.625 and 0.375, the first alone is 0.6.
    assert frequencies(probabilities.log(), top_k=2, top_p=0.6)[0] == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, "temperature is 0.0; it must be positive"),
        ({"top_k": 0}, "top_k is 0; it must be a positive int"),
        ({"top_p": 1.5}, r"top_p is 1.5; it must be in \(0, 1\]"),
        ({"max_new_tokens": -1}, "max_new_tokens is -1"),
        ({"input_ids": []}, "input_ids is empty"),
        ({"input_ids": [[1, 2], []]}, "a prompt is empty"),
        ({"input_ids": [[1]], "attention_mask": torch.ones(1, 1)}, "attention_mask came with a list of prompts"),
        ({"attention_mask": torch.ones(1, 3)}, r"attention_mask has shape \(1, 3\)"),
    ],
)
def test_generate_says_what_is_wrong(options, message):
    arguments = {"input_ids": tokens(1, 4), "max_new_tokens": 2} | options
    with pytest.raises(ValueError, match=message):
        build().generate(**arguments)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"input_ids": [1, 2]}, TypeError, "input_ids is list"),
        ({"input_ids": tokens(4)}, ValueError, r"input_ids has shape \(4,\); it must be \(B, L\)"),
        ({"input_ids": torch.ones(1, 4)}, TypeError, "input_ids is float32; it must be one of int64, int32"),
        ({"num_last_tokens": -1}, ValueError, "num_last_tokens is -1"),
        ({"attention_mask": torch.ones(1, 4), "cu_seqlens": torch.tensor([0, 4])}, ValueError, "came with cu_seqlens"),
    ],
)
def test_forward_says_what_is_wrong(arguments, error, message):
    with pytest.raises(error, match=message):
        build()(**{"input_ids": tokens(1, 4)} | arguments)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mlp", [0, 48])
def test_it_trains_on_the_cpu(kind, mlp):
    model = build(kind, d_intermediate=mlp)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    ids = tokens(4, 33)
    mask = torch.ones_like(ids)
    mask[0, 20:] = 0
    losses = []
    for _ in range(12):
        logits = model(ids[:, :-1], mask[:, :-1])
        targets = ids[:, 1:].masked_fill(mask[:, 1:] == 0, -100)
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    assert all(one.grad is not None and one.grad.abs().sum() > 0 for one in model.parameters())


def test_packed_texts_are_texts_alone():
    model = build("mamba2")
    texts = [tokens(1, n, seed=n) for n in (5, 1, 30)]
    packed = model(torch.cat(texts, dim=1), cu_seqlens=torch.tensor([0, 5, 6, 36]))
    for text, found in zip(texts, packed.split([5, 1, 30], dim=1), strict=True):
        torch.testing.assert_close(found, model(text), atol=2e-5, rtol=1e-4)
