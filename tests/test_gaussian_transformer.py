"""GaussianTransformerLayer: torch's encoder layer with other attention, and adaptive attention over features."""

from __future__ import annotations

import copy
import inspect

import pytest
import torch
from torch import nn

from trifuse.nn import GaussianTransformerLayer


def test_the_arguments_are_torch_s() -> None:
    for ours, theirs in (
        (GaussianTransformerLayer, nn.TransformerEncoderLayer),
        (GaussianTransformerLayer.forward, nn.TransformerEncoderLayer.forward),
    ):
        mine, other = inspect.signature(ours).parameters, inspect.signature(theirs).parameters
        assert list(mine)[: len(other)] == list(other)
        assert all(mine[name].default == other[name].default for name in other)


@pytest.mark.parametrize("norm_first", [False, True])
def test_the_layer_is_torch_s_with_other_attention(norm_first: bool) -> None:
    torch.manual_seed(0)
    theirs = nn.TransformerEncoderLayer(12, 3, 16, 0.0, "gelu", batch_first=True, norm_first=norm_first)
    ours = GaussianTransformerLayer(12, 3, 16, 0.0, "gelu", batch_first=True, norm_first=norm_first, kind="local")
    ours.load_state_dict(theirs.state_dict(), strict=True)
    theirs.self_attn = ours.self_attn
    x, padding = torch.randn(2, 5, 12), torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    mask = nn.Transformer.generate_square_subsequent_mask(5)
    for options in ({}, {"src_key_padding_mask": padding}, {"src_mask": mask, "is_causal": True}):
        torch.testing.assert_close(ours(x, **options), theirs(x, **options))
    encoder = nn.TransformerEncoder(ours, 2, enable_nested_tensor=False)
    torch.testing.assert_close(encoder(x), ours(ours(x)))


@pytest.mark.parametrize("norm_first", [False, True])
def test_the_layer_with_adaptive_attention_over_features(norm_first: bool) -> None:
    torch.manual_seed(0)
    layer = GaussianTransformerLayer(
        12, 3, 16, 0.0, norm_first=norm_first, kind="rbf+local", gaam_heads=2, gaam_gaussians=4
    )
    x = torch.randn(5, 2, 12)
    inner = copy.deepcopy(layer)
    inner.gaam = None
    y = inner(x)
    wanted = y + layer.gaam(layer.norm3(y)) if norm_first else layer.norm3(y + layer.gaam(y))
    torch.testing.assert_close(layer(x), wanted)
    layer(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())
    twin = GaussianTransformerLayer(12, 3, 16, kind="rbf+local", gaam_heads=2, gaam_gaussians=4, device="meta")
    assert [p.shape for p in twin.parameters()] == [p.shape for p in layer.parameters()]


def test_the_layer_exports_with_dynamic_shapes() -> None:
    torch.manual_seed(0)
    layer = GaussianTransformerLayer(12, 3, 16, batch_first=True, kind="rbf+local", gaam_heads=2).eval()
    sizes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length")}
    exported = torch.export.export(layer, (torch.randn(2, 6, 12),), dynamic_shapes=(sizes,)).module()
    x = torch.randn(3, 9, 12)
    torch.testing.assert_close(exported(x), layer(x))


def test_a_padded_encoder_of_torch_in_inference() -> None:
    layer = GaussianTransformerLayer(12, 3, 16, batch_first=True)
    with pytest.warns(UserWarning, match="use_nested_tensor is False"):
        encoder = nn.TransformerEncoder(layer, 2).eval()
    x, padding = torch.randn(2, 6, 12), torch.tensor([[False] * 6, [False] * 3 + [True] * 3])
    with torch.no_grad():
        torch.testing.assert_close(encoder(x, src_key_padding_mask=padding)[1:, :3], encoder(x[1:, :3]))


def test_the_layer_trains_with_dropout_and_keeps_to_the_kernel() -> None:
    torch.manual_seed(0)
    layer = GaussianTransformerLayer(12, 3, 16, batch_first=True)
    x = torch.randn(2, 5, 12)
    assert layer.self_attn.dropout == 0
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))
    assert GaussianTransformerLayer(12, 3, attention_dropout=0.2).self_attn.dropout == 0.2


def test_errors_say_what_was_wrong() -> None:
    with pytest.raises(ValueError, match="activation is 'tanh'"):
        GaussianTransformerLayer(12, 3, activation="tanh")
    with pytest.raises(ValueError, match="gaam_heads is 13; it must be from 0 to d_model, 12"):
        GaussianTransformerLayer(12, 3, gaam_heads=13)
