"""What lies at the edges of the Gaussian ops: traced numbers, booleans where numbers belong."""

import pytest
import torch
from backends_here import cpp_only

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
