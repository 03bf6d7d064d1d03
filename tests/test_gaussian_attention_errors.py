"""What bad input of gaussian_attention gets: one error, before any kernel runs, the same whichever backend is asked
for; and what each backend says when it cannot serve a call."""

import math
import re

import pytest
import torch
from backends_here import cpp_only

import trifuse
from trifuse.backends import NAMES
from trifuse.ops.gaussian_attention import prepare

BATCH, HEADS, QUERIES, KEYS, DIM = 2, 4, 5, 7, 3


def zeros(*shape, **options):
    return torch.zeros(*shape, **options)


def arguments(**changes):
    made = {"q": torch.randn(BATCH, HEADS, QUERIES, DIM), "gamma": 0.5}
    made |= {name: torch.randn(BATCH, HEADS, KEYS, DIM) for name in "kv"}
    return made | changes


def window(**changes):
    return arguments(gamma=None, sigma=2.0) | changes


def packed(**changes):
    made = {name: tensor[:1] for name, tensor in arguments().items() if name != "gamma"}
    return (
        made
        | {"gamma": 0.5, "cu_seqlens_q": torch.tensor([0, 2, 5]), "cu_seqlens_k": torch.tensor([0, 3, 7])}
        | changes
    )


CASES = [
    (arguments(q=[1.0]), TypeError, "q is list; it must be a torch.Tensor"),
    (arguments(k=None), TypeError, "k is NoneType; it must be a torch.Tensor"),
    (arguments(v=1), TypeError, "v is int; it must be a torch.Tensor"),
    (arguments(attn_mask=True), TypeError, "attn_mask is bool; it must be a torch.Tensor or None"),
    (arguments(key_padding_mask=[1]), TypeError, "key_padding_mask is list; it must be a torch.Tensor or None"),
    (arguments(gamma=None), ValueError, "gamma and sigma are both None; give gamma for attention by distance or sigma "
     "for a window, or call torch.nn.functional.scaled_dot_product_attention"),
    (arguments(center=1.0), ValueError, "center was given without sigma; it must come with the width of its window"),
    (arguments(scale=1.0), ValueError, "scale was given with gamma; distances have no scale but gamma, so it must be"),
    (window(scale="1"), TypeError, "scale is str; it must be a number or None"),
    (window(scale=True), TypeError, "scale is bool; it must be a number or None"),
    (window(scale=math.nan), ValueError, "scale is nan; it must be finite"),
    (window(normalized=False), ValueError, "normalized is False without gamma; only the kernel of distances has an"),
    (arguments(q=zeros(4, 5, 3)), ValueError, "q has shape (4, 5, 3); it must be (B, H, L, d)"),
    (arguments(k=zeros(7, 3)), ValueError, "k has shape (7, 3); it must be (B, Hk, S, d)"),
    (arguments(v=zeros(7, 3)), ValueError, "v has shape (7, 3); it must be (B, Hk, S, dv)"),
    (arguments(q=zeros(2, 4, 5, 3).long()), TypeError, "q is int64; it must be one of float32, float16, bfloat16"),
    (arguments(k=zeros(2, 4, 7, 3).half()), TypeError, "k is float16; it must be float32 like q"),
    (arguments(v=zeros(2, 4, 7, 3).double()), TypeError, "v is float64; it must be float32 like q"),
    (arguments(k=zeros(2, 4, 7, 8)), ValueError, "k has shape (2, 4, 7, 8); its batch and head size must be those of"),
    (arguments(k=zeros(1, 4, 7, 3)), ValueError, "k has shape (1, 4, 7, 3); its batch and head size must be those of"),
    (arguments(v=zeros(2, 4, 8, 3)), ValueError, "v has shape (2, 4, 8, 3); it must be (B, Hk, S, dv) with (2, 4, 7)"),
    (arguments(k=zeros(2, 2, 7, 3), v=zeros(2, 2, 7, 3)), ValueError, "k has 2 heads and q 4; they must be as many "
     "without enable_gqa=True"),
    (arguments(k=zeros(2, 3, 7, 3), v=zeros(2, 3, 7, 3), enable_gqa=True), ValueError, "k has 3 heads, which does not "
     "divide the H = 4 of q"),
    (arguments(k=zeros(2, 0, 7, 3), v=zeros(2, 0, 7, 3), enable_gqa=True), ValueError, "k has 0 heads, which does not"),
    (arguments(k=zeros(2, 4, 7, 3, device="meta")), ValueError, "k is on meta; it must be on cpu like the sequences"),
    (arguments(gamma="1"), TypeError, "gamma is str; it must be a number or a tensor () or (H,) or None"),
    (arguments(gamma=True), TypeError, "gamma is bool; it must be a number or a tensor () or (H,) or None"),
    (arguments(gamma=-0.5), ValueError, "gamma was -0.5; it must be at least 0"),
    (arguments(gamma=torch.tensor([1.0, 2.0, -3.0, 4.0])), ValueError, "gamma was -3.0; it must be at least 0"),
    (arguments(gamma=math.inf), ValueError, "gamma was inf; it must be finite"),
    (arguments(gamma=torch.full((4,), math.nan)), ValueError, "gamma was nan; it must be finite"),
    (arguments(gamma=zeros(3)), ValueError, "gamma has shape (3,); it must be () or (H,) with H = 4"),
    (arguments(gamma=zeros(2, 4)), ValueError, "gamma has shape (2, 4); it must be () or (H,) with H = 4"),
    (arguments(gamma=zeros(4).double()), TypeError, "gamma is float64; beside float32 sequences it must be float32"),
    (arguments(gamma=zeros(4).long()), TypeError, "gamma is int64; beside float32 sequences it must be float32"),
    (arguments(sigma=[1.0]), TypeError, "sigma is list; it must be a number or a tensor broadcastable to (B, H, L), or "
     "(H,), or None"),
    (arguments(sigma=0), ValueError, "sigma was 0; it must be above 0"),
    (arguments(sigma=math.nan), ValueError, "sigma was nan; it must be above 0"),
    (arguments(sigma=torch.tensor([1.0, 2.0, -3.0, 4.0])), ValueError, "sigma was -3.0; it must be above 0"),
    (arguments(sigma=torch.tensor([1.0, 2.0, math.nan, 4.0])), ValueError, "sigma was nan; it must be above 0"),
    (arguments(sigma=torch.ones(5)), ValueError, "sigma has shape (5,); it must be broadcastable to (B, H, L), or"),
    (arguments(sigma=torch.ones(2, 4)), ValueError, "sigma has shape (2, 4); it must be broadcastable to (B, H, L)"),
    (arguments(sigma=1.0, center=zeros(2, 4, 5, 1)), ValueError, "center has shape (2, 4, 5, 1); it must be broadcast"),
    (arguments(sigma=1.0, center=math.inf), ValueError, "center was inf; it must be finite"),
    (arguments(sigma=1.0, center=torch.full((4, 5), math.nan)), ValueError, "center was nan; it must be finite"),
    (arguments(sigma=1.0, center=torch.arange(4)), TypeError, "center is int64; beside float32 sequences it must be"),
    (arguments(sigma=torch.ones(4, device="meta")), ValueError, "sigma is on meta; it must be on cpu like the"),
    (arguments(attn_mask=zeros(5, 7).long()), TypeError, "attn_mask is int64; it must be bool or float32"),
    (arguments(attn_mask=zeros(5, 7).half()), TypeError, "attn_mask is float16; it must be bool or float32"),
    (arguments(attn_mask=zeros(5, 6)), ValueError, "attn_mask has shape (5, 6); it must be broadcastable to (B, H, L,"),
    (arguments(attn_mask=zeros(1, 2, 4, 5, 7)), ValueError, "attn_mask has shape (1, 2, 4, 5, 7); it must be"),
    (arguments(key_padding_mask=zeros(2, 7)), TypeError, "key_padding_mask is float32; it must be bool, True where a"),
    (arguments(key_padding_mask=zeros(2, 5).bool()), ValueError, "key_padding_mask has shape (2, 5); it must be (B,"),
    (arguments(cu_seqlens_k=torch.tensor([0, 7])), ValueError, "cu_seqlens_k was given without cu_seqlens_q; it must"),
    (arguments(cu_seqlens_q=torch.tensor([0, 5])), ValueError, "cu_seqlens_q packs sequences in a batch of one, and"),
    (packed(cu_seqlens_q=torch.tensor([0.0, 5.0])), TypeError, "cu_seqlens_q is float32; it must be int32 or int64"),
    (packed(cu_seqlens_q=torch.tensor([[0, 5]])), ValueError, "cu_seqlens_q has shape (1, 2); it must be (S + 1,)"),
    (packed(cu_seqlens_q=torch.tensor([1, 2, 5])), ValueError, "cu_seqlens_q starts at 1; it must start at 0"),
    (packed(cu_seqlens_q=torch.tensor([0, 3, 2, 5])), ValueError, "cu_seqlens_q decreases from 3 to 2 at index 2"),
    (packed(cu_seqlens_q=torch.tensor([0, 2, 4])), ValueError, "cu_seqlens_q ends at 4; it must end at L = 5"),
    (packed(cu_seqlens_k=torch.tensor([0, 2, 5])), ValueError, "cu_seqlens_k ends at 5; it must end at S = 7"),
    (packed(cu_seqlens_k=None), ValueError, "cu_seqlens_q (of k, without cu_seqlens_k) ends at 5; it must end at S ="),
    (packed(cu_seqlens_k=torch.tensor([0, 7])), ValueError, "cu_seqlens_k holds 1 sequences; it must hold as many as "
     "cu_seqlens_q, 2"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "error", "message"), CASES, ids=[case[2][:40] for case in CASES])
def test_bad_arguments_are_named(call, error, message):
    with pytest.raises(error, match="^gaussian_attention: " + re.escape(message)) as free:
        trifuse.gaussian_attention(**call)
    assert type(free.value) is error
    for name in NAMES:
        with trifuse.backend(name), pytest.raises(error) as forced:
            trifuse.gaussian_attention(**call)
        assert str(forced.value) == str(free.value), name


def test_explain_says_which_backend_a_gpu_has_and_why_there_is_no_cuda_kernel():
    choice = trifuse.explain(trifuse.gaussian_attention, **arguments())
    assert choice.refusals["cuda"] == [
        "gaussian_attention has no kernel in CUDA C++; the Triton kernel is its backend on a GPU"
    ]
    with trifuse.backend("cuda"), pytest.raises(trifuse.BackendUnavailable, match="no kernel in CUDA C\\+\\+"):
        trifuse.gaussian_attention(**arguments())


def test_explain_describes_the_call():
    call = packed(sigma=1.0, is_causal=True, normalized=False, attn_mask=torch.ones(5, 7).bool())
    assert trifuse.explain("gaussian_attention", **call).inputs == (
        "B=1, H=4, Hk=4, L=5, S=7, d=3, dv=3, float32, by distance, in a window, attn_mask, packed, causal, "
        "unnormalized, cpu"
    )


def test_a_mask_that_wants_a_gradient_is_served_by_the_reference_only():
    mask = torch.zeros(QUERIES, KEYS, requires_grad=True)
    choice = trifuse.explain("gaussian_attention", **arguments(attn_mask=mask))
    assert choice.chosen == "reference"
    for name in ("cpp", "triton"):
        assert "it gives no gradient to attn_mask, which requires one; the reference does" in choice.refusals[name]
    trifuse.gaussian_attention(**arguments(attn_mask=mask)).square().sum().backward()
    assert mask.grad.abs().min() > 0
    with torch.no_grad():
        refusals = trifuse.explain("gaussian_attention", **arguments(attn_mask=mask)).refusals
    assert not any("attn_mask" in reason for name in ("cpp", "triton") for reason in refusals[name])


def test_double_precision_and_wide_heads_are_refused_by_triton_with_a_reason():
    double = {name: tensor.double() for name, tensor in arguments(gamma=torch.ones(4)).items()}
    refusals = trifuse.explain("gaussian_attention", **double).refusals["triton"]
    assert "it computes in float32, and the inputs are float64" in refusals
    wide = arguments(v=torch.zeros(BATCH, HEADS, KEYS, 300))
    refusals = trifuse.explain("gaussian_attention", **wide).refusals["triton"]
    assert "it holds heads of up to 128 numbers, and those of v have 300" in refusals


@cpp_only
@pytest.mark.parametrize("offsets", [[1, 2, 5], [0, 9, 5], [0, 4, 3, 5], [0, 2, 4]])
@pytest.mark.parametrize("name", ["cu_seqlens_q", "cu_seqlens_k"])
def test_wrong_offsets_are_refused_below_the_checks_too(name, offsets):
    call = prepare(**packed(k=torch.randn(1, HEADS, QUERIES, DIM), v=torch.randn(1, HEADS, QUERIES, DIM),
                            cu_seqlens_k=None))._replace(**{name: torch.tensor(offsets)})  # fmt: skip
    with pytest.raises(RuntimeError, match="gaussian_attention: cu_seqlens_"):
        torch.ops.trifuse.gaussian_attention_fwd(*call)


def test_arguments_are_left_as_they_were():
    call = packed(gamma=torch.rand(4), sigma=torch.rand(4, 5) + 1, attn_mask=torch.randn(5, 7),
                  key_padding_mask=torch.rand(1, 7) < 0.5)  # fmt: skip
    before = {name: value.clone() for name, value in call.items()}
    trifuse.gaussian_attention(**call)
    assert all(torch.equal(call[name], before[name]) for name in call)
