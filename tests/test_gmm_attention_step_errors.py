"""What bad input of gmm_attention_step gets: one error, before any kernel runs, the same whichever backend is asked
for."""

import re

import pytest
import torch

import trifuse
from trifuse.backends import NAMES

BATCH, LENGTH, WIDTH, COMPONENTS = 2, 6, 5, 3


def arguments(**changes):
    mixture = {name: torch.rand(BATCH, COMPONENTS) + 0.1 for name in ("weight", "delta", "sigma", "mean")}
    return {"values": torch.randn(BATCH, LENGTH, WIDTH), **mixture} | changes


def zeros(*shape, **options):
    return torch.zeros(*shape, **options)


def holding(value):
    sigma = torch.ones(BATCH, COMPONENTS)
    sigma[1, 2] = value
    return sigma


CASES = [
    (arguments(values=[1.0]), TypeError, "values is list; it must be a torch.Tensor"),
    (arguments(weight=1.0), TypeError, "weight is float; it must be a torch.Tensor"),
    (arguments(mean=None), TypeError, "mean is NoneType; it must be a torch.Tensor"),
    (arguments(key_padding_mask=[True]), TypeError, "key_padding_mask is list; it must be a torch.Tensor or None"),
    (arguments(values=zeros(6, 5)), ValueError, "values has shape (6, 5); it must be (B, T, E)"),
    (arguments(values=zeros(2, 6, 5).long()), TypeError, "values is int64; it must be one of float32, float16"),
    (arguments(values=zeros(2, 6, 5).cfloat()), TypeError, "values is complex64; it must be one of float32, float16"),
    (arguments(weight=zeros(2)), ValueError, "weight has shape (2,); it must be (B, K)"),
    (arguments(weight=zeros(3, 3)), ValueError, "weight has shape (3, 3); it must be (B, K) = (2, 3)"),
    (arguments(delta=zeros(2, 4)), ValueError, "delta has shape (2, 4); it must be (B, K) = (2, 3)"),
    (arguments(sigma=zeros(3)), ValueError, "sigma has shape (3,); it must be (B, K) = (2, 3)"),
    (arguments(mean=zeros(2, 3, 1)), ValueError, "mean has shape (2, 3, 1); it must be (B, K) = (2, 3)"),
    (arguments(delta=zeros(2, 3).half()), TypeError, "delta is float16; beside float32 sequences it must be float32"),
    (arguments(mean=zeros(2, 3).double()), TypeError, "mean is float64; beside float32 sequences it must be float32"),
    (arguments(values=zeros(2, 6, 5).half(), mean=zeros(2, 3).bfloat16()), TypeError,
     "mean is bfloat16; beside float16 sequences it must be float32 or float16"),
    (arguments(sigma=zeros(2, 3, device="meta")), ValueError, "sigma is on meta; it must be on cpu like the sequences"),
    (arguments(key_padding_mask=zeros(2, 6)), TypeError, "key_padding_mask is float32; it must be one of bool"),
    (arguments(key_padding_mask=zeros(6).bool()), ValueError, "key_padding_mask has shape (6,); it must be (B, T) = "),
    (arguments(sigma=holding(0.0)), ValueError, "sigma holds 0; it must be above 0"),
    (arguments(sigma=holding(-0.5)), ValueError, "sigma holds -0.5; it must be above 0"),
    (arguments(values=zeros(2, 6, 5).half(), sigma=holding(-0.5).half()), ValueError, "sigma holds -0.5; it must be"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "error", "message"), CASES, ids=[case[2][:40] for case in CASES])
def test_bad_arguments_are_named(call, error, message):
    with pytest.raises(error, match="^gmm_attention_step: " + re.escape(message)) as free:
        trifuse.gmm_attention_step(**call)
    assert type(free.value) is error
    for name in NAMES:
        with trifuse.backend(name), pytest.raises(error) as forced:
            trifuse.gmm_attention_step(**call)
        assert str(forced.value) == str(free.value), name


def test_there_is_no_cuda_kernel_and_explain_says_who_serves_a_gpu():
    choice = trifuse.explain("gmm_attention_step", **arguments())
    assert choice.refusals["cuda"] == ["it has no kernel of this op, whose kernel for GPUs is Triton's"]
    with trifuse.backend("cuda"), pytest.raises(trifuse.BackendUnavailable, match="whose kernel for GPUs is Triton's"):
        trifuse.gmm_attention_step(**arguments())


def test_explain_describes_the_call():
    padding = torch.zeros(BATCH, LENGTH, dtype=torch.bool)
    choice = trifuse.explain("gmm_attention_step", **arguments(key_padding_mask=padding))
    assert choice.inputs == "B=2, T=6, E=5, K=3, float32, key_padding_mask, cpu"


def test_double_precision_is_refused_by_triton_with_a_reason():
    call = {name: tensor.double() for name, tensor in arguments().items()}
    choice = trifuse.explain("gmm_attention_step", **call)
    assert "it computes in float32, and the inputs are float64" in choice.refusals["triton"]
    with trifuse.backend("triton"), pytest.raises(trifuse.BackendUnavailable, match="gmm_attention_step: backend 'tri"):
        trifuse.gmm_attention_step(**call)


@pytest.mark.skipif(trifuse._library.missing("cpp") is not None, reason="the cpp library is not built")
def test_wrong_shapes_are_refused_below_the_checks_too():
    call = arguments()
    mixture = [call[name] for name in ("weight", "delta", "sigma", "mean")]
    fwd = torch.ops.trifuse.gmm_attention_step_fwd
    with pytest.raises(RuntimeError, match=r"parameters must be \(B, K\) in the accumulation dtype"):
        fwd(call["values"], *mixture[:3], zeros(2, 4), None)
    with pytest.raises(RuntimeError, match=r"parameters must be \(B, K\) in the accumulation dtype"):
        fwd(call["values"], *mixture[:3], zeros(2, 3).double(), None)
    with pytest.raises(RuntimeError, match=r"key_padding_mask must be \(B, T\), of bools"):
        fwd(call["values"], *mixture, zeros(2, 5).bool())


def test_arguments_are_left_as_they_were():
    call = arguments()
    before = {name: value.clone() for name, value in call.items()}
    trifuse.gmm_attention_step(**call)
    assert all(torch.equal(call[name], before[name]) for name in call)
