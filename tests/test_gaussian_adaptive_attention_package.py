"""gaussian_adaptive_attention beside the published package, `normalization="clamped"`: its outputs, weights and
gradients, for every number of Gaussians, heads that do not divide, any axis, and its sentinel."""

import copy

import pytest
import torch
from backends_here import cpp_only
from tolerance import FEW_ULP

import trifuse

published = pytest.importorskip("gaussian_adaptive_attention", reason="the published package is not installed")

pytestmark = cpp_only
NAMES = ("out", "weights", "dx", "dmean_offset", "dwidth")


def model(dim, heads, gaussians, padding_value, dtype, least=0.0):
    torch.manual_seed(gaussians)
    made = published.MultiHeadGaussianAdaptiveAttention(dim, heads, gaussians, padding_value, eps=1e-3).to(dtype)
    with torch.no_grad():
        for head in made.attention_heads:
            head.mean_offsets.normal_()
            head.c.copy_(head.c.sign() * head.c.abs().clamp(min=least))
    return made


def by_the_package(made, x, gradient):
    x = x.detach().requires_grad_()
    out, weights = made(x, return_attention_details=True)
    parameters = [p for head in made.attention_heads for p in (head.mean_offsets, head.c)]
    dx, *rest = torch.autograd.grad(out, [x, *parameters], gradient.to(x.dtype))
    return dict(zip(NAMES, (out, weights, dx, torch.stack(rest[::2]), torch.stack(rest[1::2])), strict=True))


def by_us(made, x, gradient):
    heads = made.attention_heads
    mean_offset = torch.stack([head.mean_offsets for head in heads]).detach().requires_grad_()
    width = torch.stack([head.c for head in heads]).detach().requires_grad_()
    x = x.detach().requires_grad_()
    out, weights = trifuse.gaussian_adaptive_attention(
        x, mean_offset, width, dim=made.norm_axis, num_heads=len(heads), normalization="clamped",
        padding_value=heads[0].padding_value, return_weights=True,
    )  # fmt: skip
    grads = torch.autograd.grad(out, [x, mean_offset, width], gradient)
    return dict(zip(NAMES, (out, weights, *grads), strict=True))


def inputs(dtype, padding_value, shape):
    g = torch.Generator().manual_seed(1)
    x = torch.randn(shape, generator=g, dtype=dtype)
    if padding_value is not None:
        x[torch.rand(shape, generator=g) < 0.3] = padding_value
    return x, torch.randn(shape, generator=g, dtype=dtype)


every_kind = [
    pytest.mark.parametrize("dim", [0, 1, 2, -1]),
    pytest.mark.parametrize("heads", [1, 3]),
    pytest.mark.parametrize("gaussians", [1, 5, 16]),
    pytest.mark.parametrize("padding_value", [None, 0.0]),
]


def every(test):
    for mark in every_kind:
        test = mark(test)
    return test


@every
def test_the_package_in_float64(dim, heads, gaussians, padding_value):
    """Its eps argument is ignored by it: it is always 1e-8, which is our default."""
    made = model(dim, heads, gaussians, padding_value, torch.float64)
    x, gradient = inputs(torch.float64, padding_value, (26, 31, 28))
    theirs, ours = by_the_package(made, x, gradient), by_us(made, x, gradient)
    for name in NAMES:
        largest = max(1.0, theirs[name].abs().max().item())
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=1e-12 * largest, msg=lambda m, n=name: n + m)


@every
def test_the_package_in_float32(dim, heads, gaussians, padding_value):
    """To 1e-6, or within the tolerance of its own float64 result (tests/tolerance.py)."""
    made = model(dim, heads, gaussians, padding_value, torch.float32, least=0.5)
    shape = [11, 12, 13]
    shape[dim] = 200  # heads of a few entries only would have errors of any size, of both
    x, gradient = inputs(torch.float32, padding_value, tuple(shape))
    ours, wide = by_us(made, x, gradient), copy.deepcopy(made).double()
    exact = by_the_package(wide, x.double(), gradient)
    errors = dict.fromkeys(NAMES, 0.0)  # its own, the largest of a few draws: of a few numbers the error is a lottery
    for draw in range(4):
        near = x if draw == 0 else torch.where(x == 0, x, x + 0.02 * torch.randn_like(x))
        theirs, right = by_the_package(made, near, gradient), by_the_package(wide, near.double(), gradient)
        errors = {name: max(errors[name], (theirs[name] - right[name]).abs().max().item()) for name in NAMES}
    for name in NAMES:
        largest = max(1.0, exact[name].abs().max().item())
        its_own = errors[name]
        distance = (ours[name] - exact[name]).abs().max().item()
        allowed = max(1e-6 * largest, 2 * its_own + FEW_ULP * torch.finfo(torch.float32).eps * largest)
        assert distance <= allowed, (name, distance, its_own, largest)


def test_the_package_underflows_where_ours_does_not():
    made = model(-1, 2, 16, None, torch.float32)
    with torch.no_grad():
        for head in made.attention_heads:
            head.c.fill_(9.0)
    x, gradient = inputs(torch.float32, None, (7, 64))
    theirs, ours = by_the_package(made, x, gradient), by_us(made, x, gradient)
    assert theirs["weights"].sum(1).max() < 1e-6
    torch.testing.assert_close(ours["weights"], theirs["weights"])
    stable = trifuse.gaussian_adaptive_attention(
        x, torch.stack([head.mean_offsets for head in made.attention_heads]),
        torch.stack([head.c for head in made.attention_heads]), num_heads=2, return_weights=True,
    )[1]  # fmt: skip
    torch.testing.assert_close(stable.sum(1), torch.full((7,), 2.0))
