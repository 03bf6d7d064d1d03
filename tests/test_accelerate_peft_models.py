"""transformers' models with PEFT's adapters, before and after ``accelerate_peft``."""

import copy
import warnings

import pytest
import torch

import trifuse

pytest.importorskip("peft", reason="PEFT is not installed: its layers are not tested")

import transformers
from peft import LoraConfig, get_peft_model

transformers.utils.logging.set_verbosity_error()


@pytest.fixture(autouse=True)
def one_thread(threads):
    """These models are tiny: more threads only wait for each other."""
    threads(1)


def llama():
    config = transformers.LlamaConfig(
        vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=32,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config), "all-linear"


def gpt2():
    config = transformers.GPT2Config(
        vocab_size=61, n_embd=32, n_layer=2, n_head=4, n_positions=32, bos_token_id=0, eos_token_id=0,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config), ["c_attn", "c_proj", "c_fc"]


def mamba():
    config = transformers.MambaConfig(vocab_size=61, hidden_size=32, num_hidden_layers=2, state_size=4)
    return transformers.MambaForCausalLM(config), ["in_proj", "x_proj", "dt_proj"]


def loss_curve(model, ids, steps=20):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    losses = []
    for _ in range(steps):
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return torch.tensor(losses, dtype=torch.float64)


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("make", [llama, gpt2, mamba])
def test_a_transformers_model_has_the_same_loss_curve(make, kind):
    torch.manual_seed(0)
    model, targets = make()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(model, LoraConfig(r=4, target_modules=targets, use_dora=kind == "dora"))
    model.train()
    ours, ids = copy.deepcopy(model), torch.randint(61, (3, 16))
    report = trifuse.accelerate_peft(ours)
    assert report.fused and not report.left
    theirs, curve = loss_curve(model, ids), loss_curve(ours, ids)
    assert theirs[-1] < theirs[0] - 0.05
    assert (curve - theirs).abs().max() <= 1e-4


def test_gradient_checkpointing_of_transformers():
    torch.manual_seed(0)
    model, targets = llama()
    model = get_peft_model(model, LoraConfig(r=4, target_modules=targets, lora_dropout=0.2, init_lora_weights=False))
    trifuse.accelerate_peft(model)
    model.train()
    ids, curves = torch.randint(61, (3, 16)), []
    for checkpoint in (False, True):
        one = copy.deepcopy(model)
        if checkpoint:
            one.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        torch.manual_seed(1)
        curves.append(loss_curve(one, ids, steps=3))
    assert torch.equal(*curves) and curves[0].isfinite().all()
