"""Modules of Gaussian adaptive attention: the published package's interface and numbers, and what PyTorch expects."""

from __future__ import annotations

import copy
import inspect
import pickle

import pytest
import torch
from tolerance import error
from torch import nn

import trifuse
from trifuse.nn import GaussianAdaptiveAttention, GaussianBlock, MultiHeadGaussianAdaptiveAttention

CLASSES = ("GaussianAdaptiveAttention", "GaussianBlock", "MultiHeadGaussianAdaptiveAttention")


@pytest.fixture(scope="module")
def published():
    return pytest.importorskip(
        "gaussian_adaptive_attention", reason="the published package gaussian-adaptive-attention is not installed"
    )


def block(module=trifuse.nn, **options) -> nn.Module:
    torch.manual_seed(0)
    return module.GaussianBlock([-1, 1], [3, 2], [4, 5], 2, **options)


def clear(one: nn.Module) -> nn.Module:
    """Widths away from zero: numbers of a moderate size, so that an error is one of ours."""
    with torch.no_grad():
        for name, parameter in one.named_parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3 + (1.6 if name.endswith("c") else 0.0))
    return one


def outcome(module: nn.Module, x: torch.Tensor, **options) -> dict[str, torch.Tensor]:
    """Output and all gradients, those of the weight map included where it is a part of the graph."""
    x = x.detach().clone().requires_grad_()
    module.zero_grad()
    out = module(x, **options)
    out.backward(torch.linspace(-1, 1, out.numel(), dtype=out.dtype).reshape(out.shape))
    return {"out": out.detach(), "dx": x.grad} | {name: p.grad.clone() for name, p in module.named_parameters()}


@pytest.mark.parametrize("name", CLASSES)
def test_the_arguments_are_the_published_ones(published, name: str) -> None:
    theirs = inspect.signature(getattr(published, name)).parameters
    ours = inspect.signature(getattr(trifuse.nn, name)).parameters
    assert list(ours)[: len(theirs)] == list(theirs)
    assert all(ours[key].default == theirs[key].default for key in theirs)
    assert all(ours[key].kind is inspect.Parameter.KEYWORD_ONLY for key in list(ours)[len(theirs) :])


@pytest.mark.parametrize("name", CLASSES)
def test_forward_takes_the_published_arguments(published, name: str) -> None:
    theirs = inspect.signature(getattr(published, name).forward).parameters
    ours = inspect.signature(getattr(trifuse.nn, name).forward).parameters
    assert list(ours)[: len(theirs)] == list(theirs)


def test_the_same_seed_gives_the_published_parameters_by_the_same_names(published) -> None:
    theirs, ours = block(published).state_dict(), block().state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("direction", ["to us", "from us"])
def test_state_dicts_load_in_both_directions(published, direction: str) -> None:
    theirs, ours = clear(block(published)), block(normalization="clamped")
    ours, theirs = (ours, theirs) if direction == "to us" else (theirs, ours)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x = torch.randn(2, 7, 11)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("gaussians", [1, 2, 5, 16])
@pytest.mark.parametrize("axis, heads", [(-1, 1), (-1, 3), (1, 3), (0, 2), (2, 5)])
def test_clamped_is_the_package(published, axis: int, heads: int, gaussians: int) -> None:
    torch.manual_seed(gaussians)
    theirs = clear(published.MultiHeadGaussianAdaptiveAttention(axis, heads, gaussians))
    ours = MultiHeadGaussianAdaptiveAttention(axis, heads, gaussians, normalization="clamped")
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(14, 20, 37) * 2 + 1
    single, eager = outcome(ours, x), outcome(theirs, x)
    exact = outcome(theirs.double(), x.double())
    double = outcome(ours.double(), x.double())
    for name, true in exact.items():
        scale = max(1.0, true.abs().max().item())
        assert error(double[name], true) <= 1e-12 * scale, name
        # What the package rounds away in float32 is no part of the parity.
        assert error(single[name], true) <= 1e-6 * scale + 2 * error(eager[name], true), name


@pytest.mark.parametrize("normalization", ["clamped", "stable"])
def test_one_head_alone_is_the_package(published, normalization: str) -> None:
    torch.manual_seed(0)
    theirs = clear(published.GaussianAdaptiveAttention(1, 4, 3, None)).double()
    ours = GaussianAdaptiveAttention(1, 4, 3, None, normalization=normalization, dtype=torch.float64)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 6, 5, dtype=torch.float64)
    out, weights = ours(x, True)
    expected, expected_weights = theirs(x, return_attention_details=True)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(weights, expected_weights, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("padding_value", [0.0, -100.0])
def test_padding_values_are_treated_as_in_the_package(published, padding_value: float) -> None:
    theirs = clear(block(published, padding_value=padding_value)).double()
    ours = block(padding_value=padding_value, normalization="clamped", dtype=torch.float64)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(3, 6, 10, dtype=torch.float64)
    x[0, :, 7:] = x[2, 4:] = padding_value
    expected = outcome(theirs, x)
    for name, value in outcome(ours, x).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-10, atol=1e-10, msg=lambda m, name=name: name + m)


def test_attention_details_are_the_package_s(published) -> None:
    theirs = clear(block(published)).double()
    ours = block(normalization="clamped", dtype=torch.float64)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 5, 9, dtype=torch.float64)
    out, details = ours(x.requires_grad_(), return_attention_details=True)
    expected, expected_details = theirs(x, return_attention_details=True)
    torch.testing.assert_close(out, expected)
    assert list(details) == list(expected_details) == ["layer_0", "layer_1"]
    for name, weights in details.items():
        assert not weights.requires_grad and weights.shape == x.shape
        torch.testing.assert_close(weights, expected_details[name])


def test_one_call_of_the_op_serves_all_heads() -> None:
    layer = clear(MultiHeadGaussianAdaptiveAttention(-1, 3, 2, dtype=torch.float64))
    x = torch.randn(4, 10, dtype=torch.float64)
    offsets, widths = (torch.stack([getattr(head, name) for head in layer.attention_heads])
                       for name in ("mean_offsets", "c"))  # fmt: skip
    out, weights = trifuse.reference.gaussian_adaptive_attention(x, offsets, widths, num_heads=3)
    torch.testing.assert_close(layer(x), out, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(layer(x, True)[1], weights, rtol=1e-13, atol=1e-13)
    totals = torch.stack([piece.sum(-1) for piece in weights.split([3, 3, 4], -1)])
    torch.testing.assert_close(totals, torch.ones_like(totals))


def test_a_stack_of_heads_gives_each_its_own_gradient() -> None:
    layer = clear(MultiHeadGaussianAdaptiveAttention(-1, 2, 3))
    layer(torch.randn(4, 8))[..., :4].sum().backward()  # the first head's entries only
    first, second = layer.attention_heads
    assert first.c.grad.abs().min() > 0 and first.mean_offsets.grad.abs().min() > 0
    assert second.c.grad.abs().max() == 0 and second.mean_offsets.grad.abs().max() == 0


def test_eps_is_obeyed() -> None:
    x = torch.tensor([[1.0, 2.0, 4.0, 3.0]])
    for make in (
        lambda eps: GaussianAdaptiveAttention(-1, 1, 1, None, 0, eps),
        lambda eps: MultiHeadGaussianAdaptiveAttention(-1, 1, 1, None, eps),
        lambda eps: GaussianBlock([-1], [1], [1], 1, None, eps),
    ):
        uneven = []
        for eps in (1e-8, 1e3):
            module = make(eps)
            for name, parameter in module.named_parameters():
                nn.init.constant_(parameter, float(name.endswith("c")))
            weights = module(x, True)[1]
            weights = weights["layer_0"] if isinstance(weights, dict) else weights
            uneven.append((weights - 0.25).abs().max())
        assert uneven[0] > 0.05 and uneven[1] < 1e-2  # with so large a variance all weights are equal


def test_mean_offsets_start_where_they_are_told_to() -> None:
    assert torch.equal(GaussianAdaptiveAttention(-1, 1, 3, None, 0.5).mean_offsets, torch.full((3,), 0.5))
    assert not any(head.mean_offsets.any() for head in MultiHeadGaussianAdaptiveAttention(-1, 2, 3).attention_heads)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_where_the_package_underflows_stable_weights_sum_to_one(dtype) -> None:
    layer = MultiHeadGaussianAdaptiveAttention(-1, 2, 16)
    for head in layer.attention_heads:
        nn.init.constant_(head.c, 10.0)
    x = torch.randn(3, 64, dtype=dtype)
    out, weights = layer(x, True)
    assert out.dtype == weights.dtype == dtype and out.isfinite().all()
    totals = weights.float().unflatten(-1, (2, 32)).sum(-1)
    torch.testing.assert_close(totals, torch.ones_like(totals), rtol=1e-2, atol=1e-2)
    clamped = copy.deepcopy(layer)
    clamped.normalization = "clamped"
    assert clamped(x, True)[1].float().unflatten(-1, (2, 32)).sum(-1).max() < 0.1


def test_masked_entries_leave_a_block_as_they_came_and_change_nothing_else() -> None:
    layer = clear(GaussianBlock([-1, -1], [2, 1], [3, 3], 2))
    x = torch.randn(4, 10)
    mask = torch.rand(4, 10) > 0.3
    mask[0] = False
    out = layer(x, mask=mask)
    assert torch.equal(out[~mask], x[~mask])
    other = torch.where(mask, x, torch.full_like(x, 1e4))
    assert torch.equal(layer(other, mask=mask)[mask], out[mask])
    grads = outcome(layer, x, mask=mask)
    assert all(value.isfinite().all() for value in grads.values())


@pytest.mark.parametrize("make, words", [
    (lambda: GaussianAdaptiveAttention("1", 1, 1, None), "norm_axis must be an integer"),
    (lambda: MultiHeadGaussianAdaptiveAttention(1.0, 1, 1), "norm_axis must be an integer"),
    (lambda: MultiHeadGaussianAdaptiveAttention(1, 0, 1), "num_heads is 0; num_heads must be a positive integer"),
    (lambda: MultiHeadGaussianAdaptiveAttention(1, 2.5, 1), "num_heads must be a positive integer"),
    (lambda: GaussianAdaptiveAttention(1, 1, -2, None), "num_gaussians is -2"),
    (lambda: GaussianAdaptiveAttention(1, 1, 1, None, normalization="soft"), "normalization is 'soft'"),
    (lambda: GaussianBlock([1], [1, 2], [1], 1), "num_heads has 2 entries; .* must match num_layers"),
    (lambda: MultiHeadGaussianAdaptiveAttention(1, 9, 1)(torch.ones(2, 8)), "8 entries along norm_axis .*heads, 9"),
    (lambda: MultiHeadGaussianAdaptiveAttention(2, 1, 1)(torch.ones(2, 8)), "norm_axis is 2, out of bounds"),
    (lambda: GaussianAdaptiveAttention(-3, 1, 1, None)(torch.ones(2, 8)), "norm_axis is -3, out of bounds"),
    (lambda: GaussianAdaptiveAttention(0, 1, 1, None)(torch.ones(8)), "at least 2 dimensions"),
])  # fmt: skip
def test_errors_say_what_was_wrong(make, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make()


def test_a_width_of_zero_is_an_error_that_names_it() -> None:
    layer = MultiHeadGaussianAdaptiveAttention(-1, 2, 3)
    with torch.no_grad():
        layer.attention_heads[1].c[2] = 0
    with pytest.raises(ValueError, match=r"width\[1, 2\]"):
        layer(torch.ones(2, 8))


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_parameters_and_inputs_may_differ_in_dtype(dtype, x_dtype) -> None:
    layer = clear(MultiHeadGaussianAdaptiveAttention(-1, 2, 3, dtype=dtype))
    grads = outcome(layer, torch.randn(3, 8, dtype=x_dtype))
    assert grads["out"].dtype == grads["dx"].dtype == x_dtype
    assert all(value.dtype == dtype for name, value in grads.items() if name.startswith("attention_heads"))
    assert all(value.isfinite().all() for value in grads.values())


def test_factory_arguments_reach_every_parameter() -> None:
    made = block(device="meta", dtype=torch.float64)
    assert all(p.device.type == "meta" and p.dtype == torch.float64 for p in made.parameters())
    assert all(p.dtype == torch.bfloat16 for p in block().to(torch.bfloat16).parameters())


def test_copies_and_pickles_are_the_same_module() -> None:
    made = clear(block(eps=1e-4, normalization="clamped"))
    x = torch.randn(2, 6, 9)
    for other in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        assert torch.equal(other(x), made(x))
        assert repr(other) == repr(made) and "eps=0.0001" in repr(made)


def test_parametrized_heads_are_honoured() -> None:
    layer = clear(MultiHeadGaussianAdaptiveAttention(-1, 2, 3))
    x = torch.randn(2, 8)
    expected = copy.deepcopy(layer)
    with torch.no_grad():
        for head in expected.attention_heads:
            head.c.mul_(2)

    class Double(nn.Module):
        def forward(self, c):
            return 2 * c

    for head in layer.attention_heads:
        nn.utils.parametrize.register_parametrization(head, "c", Double())
    assert torch.equal(layer(x), expected(x))


def test_compiles_to_one_graph_with_gradients() -> None:
    torch._dynamo.reset()
    made = clear(block())
    x = torch.randn(2, 6, 9)
    expected = outcome(made, x)
    for name, value in outcome(torch.compile(made, fullgraph=True, backend="aot_eager"), x).items():
        torch.testing.assert_close(value, expected[name.removeprefix("_orig_mod.")], msg=lambda m, n=name: n + m)


def test_under_autocast_the_dtype_is_that_of_x() -> None:
    made = clear(block())
    x = torch.randn(2, 6, 9)
    with torch.autocast("cpu", torch.bfloat16):
        assert made(x).dtype == torch.float32
        assert torch.equal(made(x), made(x.float()))
        assert made(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.gpu
def test_on_a_gpu_as_on_a_cpu() -> None:
    made = clear(block())
    x = torch.randn(3, 40, 50)
    expected = outcome(made, x)
    for name, value in outcome(made.cuda(), x.cuda()).items():
        scale = expected[name].abs().max().item()
        torch.testing.assert_close(value.cpu(), expected[name], rtol=1e-4, atol=1e-5 * max(scale, 1.0))
