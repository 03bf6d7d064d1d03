"""What lies at the edges of the Gaussian ops: traced numbers, booleans where numbers belong, padding
that holds NaN."""

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
