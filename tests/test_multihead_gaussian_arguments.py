"""Any combination of MultiheadGaussianAttention's arguments: its ways of computing agree, and mean what torch means."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from trifuse.nn import MultiheadGaussianAttention, gaussian_multihead

KINDS = ("rbf", "local", "rbf+local")


TOLERANCE = {"rtol": 1e-10, "atol": 1e-10}


def drawn(pick, **options):
    """Any module, and arguments that its forward takes."""
    heads, head_dim, batch, queries, keys = (pick(st.integers(1, most), name) for most, name in (
        (4, "heads"), (5, "head_dim"), (3, "batch"), (9, "L"), (9, "S")))  # fmt: skip
    torch.manual_seed(pick(st.integers(0, 99), "seed"))
    flags = {name: pick(st.booleans(), name) for name in ("bias", "add_bias_kv", "add_zero_attn", "batch_first")}
    sizes = {name: pick(st.sampled_from((None, 3)), name) for name in ("kdim", "vdim")}
    module = MultiheadGaussianAttention(heads * head_dim, heads, **flags, **sizes, dtype=torch.float64, **options)
    shapes = ((queries, module.embed_dim), (keys, module.kdim), (keys, module.vdim))
    batched = pick(st.booleans(), "batched")
    if not batched:
        batch = 1
    first = module.batch_first or not batched
    shapes = [(batch, *shape) if first else (shape[0], batch, shape[1]) for shape in shapes]
    inputs = [torch.randn(shape if batched else shape[1:], dtype=torch.float64, requires_grad=True) for shape in shapes]
    if module.kdim == module.vdim == module.embed_dim and pick(st.booleans(), "self-attention"):
        inputs = inputs[:1]
    padding = mask = None
    keys = inputs[-1].shape[1 if first and batched else 0]
    queries = inputs[0].shape[1 if first and batched else 0]
    if pick(st.booleans(), "padded"):
        padding = torch.rand(*([batch] if batched else []), keys) < 0.3
    if pick(st.booleans(), "masked"):
        full = (batch * heads, queries, keys) if pick(st.booleans(), "3-D") else (queries, keys)
        floating = pick(st.booleans(), "floating")
        mask = torch.randn(full, dtype=torch.float64) if floating else torch.rand(full) < 0.3
    return module, inputs, {"key_padding_mask": padding, "attn_mask": mask}


def called(module, inputs, **options) -> list[torch.Tensor]:
    """Output, weights if any, and gradients."""
    query, key, value = inputs if len(inputs) == 3 else inputs * 3
    out, weights = module(query, key, value, **options)
    loss = (out * out.detach().cos()).sum()
    if weights is not None:
        loss = loss + (weights * weights.detach().cos()).sum()
    wanted = [*inputs, *(p for p in module.parameters() if p.requires_grad)]
    return [out, *([] if weights is None else [weights]), *torch.autograd.grad(loss, wanted)]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_the_kernel_and_the_stored_weights_agree(data) -> None:
    kind = data.draw(st.sampled_from(KINDS), "kind")
    module, inputs, masks = drawn(data.draw, kind=kind, sigma=2.0 if "local" in kind else None)
    causal = masks["attn_mask"] is None and data.draw(st.booleans(), "causal")
    out, *grads = called(module, inputs, need_weights=False, **masks, is_causal=causal)
    kept, weights, *_ = called(module, inputs, need_weights=True, **masks, is_causal=causal)
    torch.testing.assert_close(out, kept, **TOLERANCE)
    assert weights.shape[-2] == out.shape[-2 if module.batch_first or out.dim() == 2 else 0]
    dropping = copy.deepcopy(module)
    dropping.dropout = 1e-300  # goes the way of dropout, and drops nothing
    again, *others = called(dropping, inputs, need_weights=False, **masks, is_causal=causal)
    torch.testing.assert_close(out, again, **TOLERANCE)
    for one, other in zip(grads, others, strict=True):
        torch.testing.assert_close(one, other, **TOLERANCE)


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_a_window_without_end_is_torch_s_attention(data) -> None:
    """Every argument means what it means in torch.nn.MultiheadAttention."""
    ours, inputs, masks = drawn(data.draw, kind="local", sigma=1e9)
    for mask in masks.values():
        if mask is not None and mask.dtype == torch.bool:
            mask[..., 0] = False  # where no key is left torch gives NaN
    theirs = nn.MultiheadAttention(
        ours.embed_dim, ours.num_heads, bias=ours.in_proj_bias is not None, add_bias_kv=ours.bias_k is not None,
        add_zero_attn=ours.add_zero_attn, kdim=ours.kdim, vdim=ours.vdim, batch_first=ours.batch_first,
        dtype=torch.float64,
    )  # fmt: skip
    ours.load_state_dict(theirs.state_dict(), strict=True)
    ours.log_sigma.requires_grad_(False)
    options = {name: data.draw(st.booleans(), name) for name in ("need_weights", "average_attn_weights")}
    if (
        masks["attn_mask"] is not None
        and masks["attn_mask"].is_floating_point()
        and masks["key_padding_mask"] is not None
    ):
        padding = masks["key_padding_mask"]  # torch warns where their kinds differ
        masks["key_padding_mask"] = torch.zeros_like(padding, dtype=torch.float64).masked_fill_(padding, -math.inf)
    for one, other in zip(
        called(ours, inputs, **masks, **options), called(theirs, inputs, **masks, **options), strict=True
    ):
        torch.testing.assert_close(one, other, **TOLERANCE)


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_padding_may_hold_anything(kind: str, need_weights: bool, added: bool) -> None:
    """NaN, and numbers so large that a mean over them would leave no digits of the distances."""
    torch.manual_seed(0)
    module = MultiheadGaussianAttention(12, 3, kind=kind, batch_first=True, add_bias_kv=added)
    query, key = torch.randn(2, 5, 12), torch.randn(2, 7, 12)
    padding = torch.tensor([[False] * 7, [False] * 3 + [True] * 4])
    as_numbers = torch.zeros(2, 7).masked_fill(padding, -math.inf)
    learned = as_numbers + torch.tensor([0.0, 0.5, -0.5, 0, 0, 0, 0])
    for mask in (padding, as_numbers, learned):
        true = copy.deepcopy(module).double()(*(x.double() for x in (query, key, key)), mask, need_weights)[0]
        for content in (1e5, math.nan):
            held = key.masked_fill(padding[..., None], content)
            out = module(query, held, held, mask, need_weights)[0]
            torch.testing.assert_close(out.double(), true, rtol=1e-5, atol=1e-5)


def test_padding_as_numbers_lets_keys_be_passed_over(monkeypatch) -> None:
    """torch's encoder makes numbers of a bool mask, and an added mask looks at every key."""
    given_masks = []

    def attention(q, k, v, **options):
        given_masks.append((options["attn_mask"], options["key_padding_mask"]))
        return torch.zeros_like(q)

    monkeypatch.setattr(gaussian_multihead, "gaussian_attention", attention)
    layer = nn.TransformerEncoderLayer(12, 3, batch_first=True)
    layer.self_attn = MultiheadGaussianAttention(12, 3, kind="local", batch_first=True)
    encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
    padding = torch.tensor([[False] * 7, [False] * 3 + [True] * 4])
    encoder(torch.randn(2, 7, 12), src_key_padding_mask=padding)
    ((mask, kept_padding),) = given_masks
    assert mask is None and torch.equal(kept_padding, padding)
