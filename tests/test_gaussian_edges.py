"""What lies at the edges of the Gaussian ops: traced numbers, booleans where numbers belong, padding
that holds NaN, values far from all others."""

import math

import pytest
import torch
from backends_here import HAS_CPP, cpp_only

import trifuse

PARAMETERS = torch.zeros(2, 3), torch.ones(2, 3)


@cpp_only
def test_traced_numbers_are_checked_without_leaving_the_graph():
    def attend(x, eps, padding):
        return trifuse.gaussian_adaptive_attention(x, *PARAMETERS, num_heads=2, eps=eps, padding_value=padding)

    compiled = torch.compile(attend, backend="aot_eager", fullgraph=True, dynamic=True)
    for call in ((torch.randn(3, 9), 1e-8, 0.0), (torch.randn(5, 12), 1e-3, 1.5)):
        assert torch.equal(compiled(*call), attend(*call))


@pytest.mark.parametrize("name", ["dim", "num_heads", "eps", "padding_value"])
def test_a_bool_is_no_number(name):
    with pytest.raises(TypeError, match=f"gaussian_adaptive_attention: {name} is bool; it must be"):
        trifuse.gaussian_adaptive_attention(torch.randn(4, 6), *(one[:1] for one in PARAMETERS), **{name: True})


@pytest.mark.parametrize("backend", ["reference", *(["cpp"] if HAS_CPP else [])])
@pytest.mark.parametrize("kind", [{"gamma": 0.5}, {"sigma": 2.0}, {"gamma": 0.5, "sigma": 2.0, "is_causal": True}])
def test_padding_of_attention_may_hold_anything(backend, kind):
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 2, 9, 8, generator=g) for _ in range(3))
    padding = torch.rand(2, 9, generator=g) < 0.4
    padding[1] = True

    def results(fill):
        kv = (torch.where(padding[:, None, :, None], fill, one) for one in (k, v))
        tensors = [one.requires_grad_() for one in (q.clone(), *kv)]
        with trifuse.backend(backend):
            out = trifuse.gaussian_attention(*tensors, key_padding_mask=padding, **kind)
        return [out, *torch.autograd.grad(out.square().sum(), tensors)]

    for found, expected in zip(results(float("nan")), results(0.0), strict=True):
        assert expected.isfinite().all() and torch.equal(found, expected)


@pytest.mark.parametrize("backend", ["reference", *(["cpp"] if HAS_CPP else [])])
@pytest.mark.parametrize("sentinel", [-1e9, -1e18, float("-inf"), float("inf")])
@pytest.mark.parametrize("dim", [0, 1])
def test_a_padding_value_may_be_far_from_everything(backend, sentinel, dim):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(3, 40, generator=g)
    x[torch.rand(3, 40, generator=g) < 0.3] = sentinel
    x[:, 7] = sentinel  # along dim 0 a slice of nothing else
    options = {"padding_value": sentinel, "dim": dim, "return_weights": True}
    parameters = torch.tensor([[0.1, 0.2]]), torch.tensor([[1.0, 0.8]])
    with trifuse.backend(backend):
        out, weights = trifuse.gaussian_adaptive_attention(x, *parameters, **options)
    options["padding_value"] = torch.tensor(sentinel).item()  # as float32 holds it
    expected = trifuse.reference.gaussian_adaptive_attention(
        x.double(), *(one.double() for one in parameters), **{k: v for k, v in options.items() if k != "return_weights"}
    )
    there = x != sentinel
    torch.testing.assert_close(out[there].double(), expected[0][there], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(weights[there].double(), expected[1][there], atol=1e-6, rtol=1e-5)
    assert torch.equal(out[~there], x[~there])
    if backend == "cpp" and not math.isinf(sentinel):  # in float32 the reference's exponents overflow
        assert weights.isfinite().all()


@cpp_only
@pytest.mark.parametrize("dim", [0, 1])
def test_a_first_entry_far_from_all_others_costs_no_digits(isa, dim):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2, 4000, generator=g)
    x[:, 0] = 1e6
    x = x.T.contiguous().repeat(1, 20) if dim == 0 else x
    parameters = torch.tensor([[0.1, 0.2]]), torch.full((1, 2), 1e-3)

    def weights(function, dtype):
        return function(x.to(dtype), *(one.to(dtype) for one in parameters), dim=dim, return_weights=True)[1].double()

    def reference(x, mean_offset, width, dim, return_weights):
        return trifuse.reference.gaussian_adaptive_attention(x, mean_offset, width, dim=dim)

    exact, eager = weights(reference, torch.float64), weights(reference, torch.float32)
    found = weights(trifuse.gaussian_adaptive_attention, torch.float32)
    assert (found - exact).abs().max() <= 2 * (eager - exact).abs().max() + 5e-7 * exact.max()
