"""nn.GaussianContext2d: what it computes, of what inputs, and that it can be trained."""

import pytest
import torch
from torch import nn

import trifuse
from trifuse.nn import GaussianContext2d


def by_hand(x, width, eps=1e-5):
    means = x.double().mean((2, 3))
    z = (means - means.mean(1, keepdim=True)) / (means.var(1, correction=0, keepdim=True) + eps).sqrt()
    return x.double() * torch.exp(-(z**2) / (2 * width**2))[:, :, None, None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_it_gates_channels_by_their_means(dtype, memory_format):
    x = torch.randn(3, 20, 5, 7, dtype=dtype).contiguous(memory_format=memory_format)
    y = GaussianContext2d(1.5)(x)
    assert y.dtype == dtype and y.is_contiguous(memory_format=memory_format)
    error = (y.double() - by_hand(x, 1.5)).abs().max()
    assert error <= 4 * torch.finfo(dtype).eps * x.abs().max()


def test_it_is_the_published_code_at_another_width():
    x, c = torch.randn(2, 16, 4, 4), 2
    y = x.mean((2, 3), keepdim=True)
    z = (y - y.mean(1, keepdim=True)) / ((y**2).mean(1, keepdim=True) - y.mean(1, keepdim=True) ** 2 + 1e-5).sqrt()
    torch.testing.assert_close(GaussianContext2d(c**-0.5)(x), x * torch.exp(-(z**2) / 2 * c), rtol=1e-5, atol=1e-6)


def test_an_image_without_a_batch():
    x = torch.randn(20, 5, 7)
    torch.testing.assert_close(GaussianContext2d()(x), GaussianContext2d()(x[None])[0])


def test_it_has_a_parameter_only_where_it_learns():
    assert not GaussianContext2d().state_dict()
    module = GaussianContext2d(1.25, learnable=True)
    assert {name: value.item() for name, value in module.state_dict().items()} == {"width": 1.25}
    assert "width=1.25, learnable=True" in repr(module)


@pytest.mark.parametrize("backend", ["reference", None])
def test_gradients_pass_gradcheck(backend):
    module = GaussianContext2d(1.5, learnable=True, dtype=torch.float64)
    x = torch.randn(2, 5, 3, 2, dtype=torch.float64, requires_grad=True)

    def gated(x, width):
        return torch.func.functional_call(module, {"width": width}, (x,))

    with trifuse.backend(backend) if backend else torch.enable_grad():
        assert torch.autograd.gradcheck(gated, (x, module.width))


def test_it_trains_inside_a_network():
    torch.manual_seed(0)
    context = GaussianContext2d(learnable=True)
    net = nn.Sequential(
        nn.Conv2d(3, 16, 3), context, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 2)
    )
    optimizer = torch.optim.Adam(net.parameters(), lr=0.02)
    x = torch.randn(64, 3, 8, 8)
    target = (x.mean((1, 2, 3)) > 0).long()
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(net(x), target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0] and context.width.item() != 2.0


def test_it_compiles_and_runs_under_autocast():
    module, x = GaussianContext2d(learnable=True), torch.randn(2, 8, 4, 4)
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), module(x))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(module(x), module(x.clone())) and module(x).dtype == torch.float32
    assert module.to(torch.bfloat16)(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"width": 0.0}, ValueError, "width is 0.0; it must be finite and not 0"),
        ({"width": float("nan")}, ValueError, "width is nan; it must be finite and not 0"),
        ({"width": "2"}, TypeError, "width is str; it must be a number"),
        ({"eps": 0.0}, ValueError, "eps is 0.0; it must be above 0 and finite"),
        ({"eps": None}, TypeError, "eps is NoneType; it must be a number"),
    ],
)
def test_bad_arguments_are_named(arguments, error, message):
    with pytest.raises(error, match=f"^GaussianContext2d: {message}"):
        GaussianContext2d(**arguments)


def test_bad_input_is_named():
    with pytest.raises(ValueError, match=r"^GaussianContext2d: x has shape \(2, 8\); it must be \(B, C, H, W\)"):
        GaussianContext2d()(torch.randn(2, 8))
    with pytest.raises(TypeError, match=r"^GaussianContext2d: x is list; it must be a torch.Tensor"):
        GaussianContext2d()([1.0])
    with pytest.raises(TypeError, match=r"^GaussianContext2d: x is int64; it must be floating"):
        GaussianContext2d()(torch.ones(2, 8, 3, 3, dtype=torch.int64))
