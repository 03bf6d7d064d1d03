"""What bad input of gaussian_adaptive_attention gets: one error, before any kernel runs, the same whichever backend is
asked for."""

import re

import pytest
import torch
from backends_here import cpp_only

import trifuse
from trifuse.backends import NAMES


def arguments(**changes):
    torch.manual_seed(0)
    call = {"x": torch.randn(4, 6), "mean_offset": torch.randn(2, 3), "width": torch.rand(2, 3) + 1, "num_heads": 2}
    return call | changes


def with_width(head, k, value, dtype=torch.float32):
    width = torch.ones(2, 3, dtype=dtype)
    width[head, k] = value
    return arguments(width=width)


def zeros(*shape, **options):
    return torch.zeros(*shape, **options)


NAN, INF = float("nan"), float("inf")
CASES = [
    (arguments(x=[1.0]), TypeError, "x is list; it must be a torch.Tensor"),
    (arguments(mean_offset=0.0), TypeError, "mean_offset is float; it must be a torch.Tensor"),
    (arguments(width=None), TypeError, "width is NoneType; it must be a torch.Tensor"),
    (arguments(mask=True), TypeError, "mask is bool; it must be a torch.Tensor or None"),
    (arguments(x=zeros(4, 6).long()), TypeError, "x is int64; it must be one of float32, float16, bfloat16, float64"),
    (arguments(x=zeros(())), ValueError, "x has shape (); it must have at least one axis"),
    (arguments(dim=1.0), TypeError, "dim is float; it must be an int"),
    (arguments(dim=2), ValueError, "dim is 2; beside x (4, 6) it must be from -2 to 1"),
    (arguments(dim=-3), ValueError, "dim is -3; beside x (4, 6) it must be from -2 to 1"),
    (arguments(num_heads=2.0), TypeError, "num_heads is float; it must be an int"),
    (arguments(num_heads=0), ValueError, "num_heads is 0; it must be at least 1"),
    (arguments(num_heads=7), ValueError, "num_heads is 7; it must be at most N = 6, the size of dim -1"),
    (arguments(dim=0, num_heads=5), ValueError, "num_heads is 5; it must be at most N = 4, the size of dim 0"),
    (arguments(normalization="softmax"), ValueError, "normalization is 'softmax'; it must be \"stable\" or"),
    (arguments(eps="small"), TypeError, "eps is str; it must be a float"),
    (arguments(eps=0.0), ValueError, "eps is 0.0; it must be positive and finite"),
    (arguments(eps=-1e-8), ValueError, "eps is -1e-08; it must be positive and finite"),
    (arguments(eps=NAN), ValueError, "eps is nan; it must be positive and finite"),
    (arguments(padding_value="0"), TypeError, "padding_value is str; it must be a float or None"),
    (arguments(mean_offset=zeros(3, 3)), ValueError, "mean_offset has shape (3, 3); it must be (num_heads, K) = (2"),
    (arguments(width=zeros(2, 0)), ValueError, "width has shape (2, 0); it must be (num_heads, K) = (2, K) or (K,)"),
    (arguments(width=zeros(1, 2, 3)), ValueError, "width has shape (1, 2, 3); it must be (num_heads, K) = (2, K)"),
    (arguments(width=torch.ones(2, 4)), ValueError, "mean_offset has 3 Gaussians; it must have 4 like width"),
    (arguments(mean_offset=zeros(2, 3).double()), TypeError, "mean_offset is float64; beside float32 x it must be"),
    (arguments(width=torch.ones(2, 3).half()), TypeError, "width is float16; beside float32 x it must be float32"),
    (arguments(x=zeros(4, 6).half(), width=torch.ones(2, 3).bfloat16()), TypeError,
     "width is bfloat16; beside float16 x it must be float32 or float16"),
    (arguments(width=torch.ones(2, 3, device="meta")), ValueError, "width is on meta; it must be on cpu like x"),
    (with_width(0, 2, 0.0), ValueError, "width[0, 2] is 0.0; it must be finite and not zero"),
    (with_width(1, 0, -0.0), ValueError, "width[1, 0] is -0.0; it must be finite and not zero"),
    (with_width(1, 1, NAN), ValueError, "width[1, 1] is nan; it must be finite and not zero"),
    (with_width(0, 1, -INF), ValueError, "width[0, 1] is -inf; it must be finite and not zero"),
    (arguments(mask=zeros(4, 6)), TypeError, "mask is float32; it must be bool"),
    (arguments(mask=zeros(3, 6).bool()), ValueError, "mask has shape (3, 6); it must broadcast to the shape of x, (4"),
    (arguments(mask=zeros(1, 4, 6).bool()), ValueError, "mask has shape (1, 4, 6); it must broadcast to the shape of"),
    (arguments(mask=zeros(4, 6, device="meta").bool()), ValueError, "mask is on meta; it must be on cpu like x"),
    (arguments(mask=zeros(4, 6).bool(), padding_value=0.0), ValueError, "mask and padding_value are both given; one"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "error", "message"), CASES, ids=[case[2][:40] for case in CASES])
def test_bad_arguments_are_named(call, error, message):
    with pytest.raises(error, match="^gaussian_adaptive_attention: " + re.escape(message)) as free:
        trifuse.gaussian_adaptive_attention(**call)
    assert type(free.value) is error
    for name in NAMES:
        with trifuse.backend(name), pytest.raises(error) as forced:
            trifuse.gaussian_adaptive_attention(**call)
        assert str(forced.value) == str(free.value), name


def test_a_forced_backend_says_why_it_cannot():
    for name in ("cuda", "triton"):
        with (
            trifuse.backend(name),
            pytest.raises(trifuse.BackendUnavailable, match=f"gaussian_adaptive_attention: backend '{name}' was asked"),
        ):
            trifuse.gaussian_adaptive_attention(**arguments(x=torch.randn(4, 6).bfloat16()))


@cpp_only
def test_wrong_tensors_are_refused_below_the_checks_too():
    call = arguments()
    x, mean_offset, width = call["x"][:, :, None], call["mean_offset"], call["width"]
    options = (None, 1e-8, False, False)
    forward = torch.ops.trifuse.gaussian_adaptive_attention_fwd
    with pytest.raises(RuntimeError, match=r"gaussian_adaptive_attention: x must be \(outer, axis, inner\)"):
        forward(call["x"], mean_offset, width, None, *options)
    with pytest.raises(RuntimeError, match="mean_offset and width must be"):
        forward(x, mean_offset[:, :2], width, None, *options)
    with pytest.raises(RuntimeError, match=r"mask \(bool\) must have the shape of x"):
        forward(x, mean_offset, width, torch.ones(4, 6, 2).bool(), *options)
    with pytest.raises(RuntimeError, match="more heads than entries"):
        forward(x[:, :1], mean_offset, width, None, *options)


def test_arguments_are_left_as_they_were():
    call = arguments(mask=torch.rand(4, 6) < 0.5)
    before = {name: value.clone() for name, value in call.items() if isinstance(value, torch.Tensor)}
    trifuse.gaussian_adaptive_attention(**call)
    assert all(torch.equal(call[name], before[name]) for name in before)
