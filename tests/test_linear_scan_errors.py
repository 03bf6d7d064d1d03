"""What bad input of linear_scan gets: one error, before any kernel runs, the same whichever backend is asked for."""

import re

import pytest
import torch

import trifuse
from trifuse.backends import NAMES

BATCH, DIM, LENGTH = 2, 6, 5


def arguments(**changes):
    shape = (BATCH, DIM, LENGTH)
    return {"a": torch.rand(shape), "b": torch.randn(shape), "initial_state": torch.randn(BATCH, DIM)} | changes


def packed(**changes):
    a, b = torch.rand(2, 1, DIM, LENGTH)
    return {"a": a, "b": b, "cu_seqlens": torch.tensor([0, 2, LENGTH])} | changes


def zeros(*shape, **options):
    return torch.zeros(*shape, **options)


CASES = [
    (arguments(a=[1.0]), TypeError, "a is list; it must be a torch.Tensor"),
    (arguments(b=None), TypeError, "b is NoneType; it must be a torch.Tensor"),
    (arguments(initial_state=0.0), TypeError, "initial_state is float; it must be a torch.Tensor or None"),
    (arguments(layout="blt"), ValueError, "layout is 'blt'; it must be \"bdl\" or \"bld\""),
    (arguments(b=zeros(6, 5)), ValueError, "b has shape (6, 5); it must be (B, D, T)"),
    (arguments(b=zeros(6, 5), layout="bld"), ValueError, "b has shape (6, 5); it must be (B, T, D)"),
    (arguments(a=zeros(6, 5)), ValueError, "a has shape (6, 5); it must have the shape of b, (2, 6, 5), or 1 in its"),
    (arguments(a=zeros(2, 6, 4)), ValueError, "a has shape (2, 6, 4); it must have the shape of b, (2, 6, 5), or 1"),
    (arguments(b=zeros(2, 6, 5).long()), TypeError, "b is int64; it must be one of float32, float16, bfloat16"),
    (arguments(a=zeros(2, 6, 5).long()), TypeError, "a is int64; it must be float32 like b"),
    (arguments(a=zeros(2, 6, 5).double()), TypeError, "a is float64; it must be float32 like b"),
    (arguments(a=zeros(2, 6, 5).half()), TypeError, "a is float16; it must be float32 like b"),
    (arguments(a=zeros(2, 6, 5).cfloat()), TypeError, "a is complex and b is real; make b complex or a real"),
    (arguments(b=zeros(2, 6, 5).cdouble()), TypeError, "a is float32; it must be complex128 or float64 like b"),
    (arguments(initial_state=zeros(2, 6, 1)), ValueError, "initial_state has shape (2, 6, 1); it must be (B, D)"),
    (arguments(initial_state=zeros(3, 6)), ValueError, "initial_state has shape (3, 6); it must be (B, D) = (2, 6)"),
    (arguments(initial_state=zeros(2, 6).double()), TypeError, "initial_state is float64; beside float32 sequences"),
    (arguments(initial_state=zeros(2, 6).cfloat()), TypeError, "initial_state is complex64; beside float32"),
    (arguments(a=zeros(2, 6, 5).half(), b=zeros(2, 6, 5).half(), initial_state=zeros(2, 6).bfloat16()), TypeError,
     "initial_state is bfloat16; beside float16 sequences it must be float16 or float32"),
    (arguments(a=zeros(2, 6, 5, device="meta")), ValueError, "a is on meta; it must be on cpu like the sequences"),
    (arguments(cu_seqlens=torch.tensor([0, 5])), ValueError, "cu_seqlens packs sequences in a batch of one"),
    (packed(cu_seqlens=torch.tensor([0.0, 5.0])), TypeError, "cu_seqlens is float32; it must be int32 or int64"),
    (packed(cu_seqlens=torch.tensor([[0, 5]])), ValueError, "cu_seqlens has shape (1, 2); it must be (S + 1,)"),
    (packed(cu_seqlens=torch.tensor([1, 5])), ValueError, "cu_seqlens starts at 1; it must start at 0"),
    (packed(cu_seqlens=torch.tensor([0, 3, 2, 5])), ValueError, "cu_seqlens decreases from 3 to 2 at index 2"),
    (packed(cu_seqlens=torch.tensor([0, 4])), ValueError, "cu_seqlens ends at 4; it must end at L = 5"),
    (packed(initial_state=zeros(1, 6)), ValueError, "initial_state has shape (1, 6); it must be (S, D) = (2, 6)"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "error", "message"), CASES, ids=[case[2][:40] for case in CASES])
def test_bad_arguments_are_named(call, error, message):
    with pytest.raises(error, match="^linear_scan: " + re.escape(message)) as free:
        trifuse.linear_scan(**call)
    assert type(free.value) is error
    for name in NAMES:
        with trifuse.backend(name), pytest.raises(error) as forced:
            trifuse.linear_scan(**call)
        assert str(forced.value) == str(free.value), name


def test_a_forced_backend_says_why_it_cannot():
    with trifuse.backend("cuda"), pytest.raises(trifuse.BackendUnavailable, match="it computes on CUDA tensors, and"):
        trifuse.linear_scan(**arguments())
    with trifuse.backend("triton"), pytest.raises(trifuse.BackendUnavailable, match="linear_scan: backend 'triton'"):
        trifuse.linear_scan(**{name: tensor.double() for name, tensor in arguments().items()})


def test_double_precision_is_refused_by_gpu_kernels_with_a_reason():
    choice = trifuse.explain("linear_scan", **{name: tensor.double() for name, tensor in arguments().items()})
    for name in ("cuda", "triton"):
        assert "it computes in float32, and the inputs are float64" in choice.refusals[name]
    assert choice.chosen in ("cpp", "reference")


@pytest.mark.skipif(trifuse._library.missing("cpp") is not None, reason="the cpp library is not built")
@pytest.mark.parametrize("offsets", [[1, 5], [0, 9], [0, 4, 3, 5], [0, 4]])
def test_wrong_offsets_are_refused_below_the_checks_too(offsets):
    call = packed()
    with pytest.raises(RuntimeError, match="linear_scan: cu_seqlens must start at 0, never decrease and end at T = 5"):
        torch.ops.trifuse.linear_scan_fwd(call["a"], call["b"], None, torch.tensor(offsets), False, False)


def test_arguments_are_left_as_they_were():
    call = arguments()
    before = {name: value.clone() for name, value in call.items()}
    trifuse.linear_scan(**call)
    assert all(torch.equal(call[name], before[name]) for name in call)
