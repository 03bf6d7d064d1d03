"""What bad input of gaussian_gate gets: one error, before any kernel runs, the same whichever backend is asked for."""

import re

import pytest
import torch

import trifuse
from trifuse.backends import NAMES

NAN, INF = float("nan"), float("inf")


def feature(**changes):
    call = {"x": torch.randn(2, 6, 5), "mean_offset": torch.randn(5), "width": torch.rand(5) + 0.5, "dim": 1}
    return call | changes


def context(**changes):
    return {"x": torch.randn(2, 6, 5), "kind": "context"} | changes


def density(**changes):
    call = {"x": torch.randn(2, 6, 5), "mean_offset": torch.randn(2, 3), "width": torch.rand(2, 3) + 0.5}
    return call | {"kind": "density", "dim": 1, "num_heads": 2} | changes


def filled(value, *index, shape=(5,)):
    width = torch.ones(shape)
    width[index] = value
    return width


def zeros(*shape, **options):
    return torch.zeros(*shape, **options)


BEGIN = "it must be from 1 to the size of dim, 6"
CASES = [
    (feature(kind="gate"), ValueError, 'kind is \'gate\'; it must be "feature", "context" or "density"'),
    (feature(kind=["feature"]), ValueError, "kind is ['feature']; it must be"),
    (feature(x=[1.0]), TypeError, "x is list; it must be a torch.Tensor"),
    (feature(x=zeros(2, 6, 5).long()), TypeError, "x is int64; it must be one of float32, float16, bfloat16"),
    (feature(x=zeros(())), ValueError, "x has shape (); it must have at least one axis"),
    (feature(dim=3), ValueError, "dim is 3; for x of shape (2, 6, 5) it must be -3 to 2"),
    (feature(dim=-4), ValueError, "dim is -4; for x of shape (2, 6, 5) it must be -3 to 2"),
    (feature(dim=1.0), TypeError, "dim is float; it must be an int"),
    (feature(feature_dim=5), ValueError, "feature_dim is 5; for x of shape (2, 6, 5) it must be -3 to 2"),
    (feature(dim=-1), ValueError, "feature_dim and dim are both axis 2 of x; they must be two axes"),
    (feature(mean_offset=0.0), TypeError, "mean_offset is float; it must be a torch.Tensor or None"),
    (feature(mean_offset=zeros(6)), ValueError, "mean_offset has shape (6,); it must be (F,) = (5,)"),
    (feature(mean_offset=zeros(5).double()), TypeError, "mean_offset is float64; beside float32 sequences it must be"),
    (feature(mean_offset=zeros(5, device="meta")), ValueError, "mean_offset is on meta; it must be on cpu"),
    (feature(width=None), TypeError, "width is NoneType; it must be a torch.Tensor"),
    (feature(width=1.0), TypeError, "width is float; it must be a torch.Tensor"),
    (feature(width=zeros(5, 1)), ValueError, "width has shape (5, 1); it must be (F,) = (5,)"),
    (feature(width=zeros(5).half()), TypeError, "width is float16; beside float32 sequences it must be float32"),
    (feature(width=filled(0, 3)), ValueError, "width is 0.0 at index 3; it must be above 0 and finite"),
    (feature(width=filled(-1, 2)), ValueError, "width is -1.0 at index 2; it must be above 0 and finite"),
    (feature(width=filled(NAN, 4)), ValueError, "width is nan at index 4; it must be above 0 and finite"),
    (feature(alpha=1.0), ValueError, "alpha was given; only kind \"density\" has one, and kind is 'feature'"),
    (feature(num_heads=2), ValueError, 'num_heads is 2; it must be 1, only kind "density" has heads'),
    (feature(mask=zeros(2, 6, 5)), TypeError, "mask is float32; it must be bool, True where an entry takes part"),
    (feature(mask=zeros(6).bool()), ValueError, "mask has shape (6,); it must broadcast to the shape of x, (2, 6, 5)"),
    (feature(mask=zeros(1, 2, 6, 5).bool()), ValueError, "mask has shape (1, 2, 6, 5); it must broadcast to the shape"),
    (feature(mask=1), TypeError, "mask is int; it must be a torch.Tensor or None"),
    (feature(eps=0), ValueError, "eps is 0; it must be above 0 and finite"),
    (feature(eps=NAN), ValueError, "eps is nan; it must be above 0 and finite"),
    (feature(eps="1e-5"), TypeError, "eps is str; it must be a number"),
    (context(mean_offset=zeros(())), ValueError, 'mean_offset was given; kind "context" has none'),
    (context(width=zeros(5)), ValueError, 'width has shape (5,); for kind "context" it must be a number or ()'),
    (context(width=0.0), ValueError, "width is 0.0; it must be finite and not 0"),
    (context(width=INF), ValueError, "width is inf; it must be finite and not 0"),
    (context(width="2"), TypeError, "width is str; it must be a torch.Tensor or a number"),
    (context(width=torch.tensor(2)), TypeError, "width is int64; beside float32 sequences it must be float32"),
    (density(num_heads=0), ValueError, f"num_heads is 0; {BEGIN}"),
    (density(num_heads=7), ValueError, f"num_heads is 7; {BEGIN}"),
    (density(num_heads=2.0), TypeError, "num_heads is float; it must be an int"),
    (density(mean_offset=zeros(3, 3)), ValueError, "mean_offset has shape (3, 3); it must be (H, K) or (K,), with H"),
    (density(width=zeros(2, 0)), ValueError, "width has shape (2, 0); it must be (H, K) or (K,), with H = 2 and at"),
    (density(mean_offset=zeros(2)), ValueError, "mean_offset has shape (2,); it must have as many Gaussians as width"),
    (density(width=filled(0, 1, 2, shape=(2, 3))), ValueError, "width is 0.0 at index (1, 2); it must be finite and"),
    (density(width=filled(INF, 0, 1, shape=(2, 3))), ValueError, "width is inf at index (0, 1); it must be finite and"),
    (density(alpha=zeros(3)), ValueError, "alpha has shape (3,); it must be a number, () or (H,) = (2,)"),
    (density(alpha="1"), TypeError, "alpha is str; it must be a torch.Tensor or a number"),
    (density(alpha=zeros(2).double()), TypeError, "alpha is float64; beside float32 sequences it must be float32"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "error", "message"), CASES, ids=[case[2][:40] for case in CASES])
def test_bad_arguments_are_named(call, error, message):
    with pytest.raises(error, match="^gaussian_gate: " + re.escape(message)) as free:
        trifuse.gaussian_gate(**call)
    assert type(free.value) is error
    for name in NAMES:
        with trifuse.backend(name), pytest.raises(error) as forced:
            trifuse.gaussian_gate(**call)
        assert str(forced.value) == str(free.value), name


def test_negative_widths_are_widths_where_only_their_square_counts():
    for call in (context(width=-2.0), density(width=-torch.rand(2, 3) - 0.5)):
        other = call | {"width": -call["width"]}
        torch.testing.assert_close(trifuse.gaussian_gate(**call), trifuse.gaussian_gate(**other))


def test_a_forced_backend_says_why_it_cannot():
    with trifuse.backend("cuda"), pytest.raises(trifuse.BackendUnavailable, match="it computes on CUDA tensors, and"):
        trifuse.gaussian_gate(**feature())
    with trifuse.backend("triton"), pytest.raises(trifuse.BackendUnavailable, match="gaussian_gate: backend 'triton'"):
        trifuse.gaussian_gate(**context(x=torch.randn(2, 3, dtype=torch.float64)))


def test_double_precision_is_refused_by_gpu_kernels_with_a_reason(capsys):
    choice = trifuse.explain("gaussian_gate", **context(x=torch.randn(2, 3, dtype=torch.float64)))
    for name in ("cuda", "triton"):
        assert "it computes in float32, and x is float64" in choice.refusals[name]
    assert choice.chosen in ("cpp", "reference")
    assert "gaussian_gate(context, x (2, 3) along axis 1, float64, cpu)" in capsys.readouterr().out


@pytest.mark.skipif(trifuse._library.missing("cpp") is not None, reason="the cpp library is not built")
def test_parameters_of_another_number_of_heads_are_refused_below_the_checks_too():
    x, width = torch.randn(2, 6, 5), torch.ones(3, 1)
    with pytest.raises(RuntimeError, match="gaussian_gate: parameters must have a row for each of the 2 heads"):
        torch.ops.trifuse.gaussian_gate_fwd(x, width, width, None, None, 2, 1, False, 1e-5, False, True)


@pytest.mark.parametrize("make", [feature, context, density])
def test_arguments_are_left_as_they_were(make):
    call = make()
    before = {name: value.clone() for name, value in call.items() if torch.is_tensor(value)}
    trifuse.gaussian_gate(**call)
    assert all(torch.equal(call[name], before[name]) for name in before)
