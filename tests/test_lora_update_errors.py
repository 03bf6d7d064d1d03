"""What bad input of the updates of a weight gets: one error, before the weight is touched, the same whichever backend
is asked for."""

import re

import pytest
import torch

import trifuse
from trifuse.backends import NAMES

ROWS, COLUMNS, RANK = 6, 5, 3


def zeros(*shape, **options):
    return torch.zeros(*shape, **options)


def arguments(**changes):
    made = {"weight": zeros(ROWS, COLUMNS), "lora_A": zeros(RANK, COLUMNS), "lora_B": zeros(ROWS, RANK)}
    return made | changes


CASES = [
    (arguments(weight=[1.0]), TypeError, "weight is list; it must be a torch.Tensor"),
    (arguments(lora_A=None), TypeError, "lora_A is NoneType; it must be a torch.Tensor"),
    (arguments(lora_B=1.0), TypeError, "lora_B is float; it must be a torch.Tensor"),
    (arguments(weight=zeros(5)), ValueError, "weight has shape (5,); it must be (N, K)"),
    (arguments(weight=zeros(6, 5).long()), TypeError, "weight is int64; it must be one of float32, float16"),
    (arguments(weight=zeros(1, 5).expand(6, 5)), ValueError, "weight has strides (0, 1), so elements share memory"),
    (arguments(lora_A=zeros(3)), ValueError, "lora_A has shape (3,); it must be (r, K)"),
    (arguments(lora_A=zeros(0, 5), lora_B=zeros(6, 0)), ValueError,
     "lora_A has shape (0, 5); its rank must be at least 1"),
    (arguments(lora_A=zeros(3, 4)), ValueError, "lora_A has shape (3, 4); it must be (r, K) = (3, 5)"),
    (arguments(lora_B=zeros(6, 4)), ValueError, "lora_B has shape (6, 4); it must be (N, r) = (6, 3)"),
    (arguments(lora_B=zeros(6, 3).double()), TypeError, "lora_B is float64; it must be float32 like lora_A"),
    (arguments(weight=zeros(6, 5).half(), lora_A=zeros(3, 5).bfloat16(), lora_B=zeros(6, 3).bfloat16()), TypeError,
     "lora_A is bfloat16; beside float16 sequences it must be float32 or float16"),
    (arguments(lora_B=zeros(6, 3, device="meta")), ValueError, "lora_B is on meta; it must be on cpu"),
    (arguments(scale="2"), TypeError, "scale is str; it must be a number or a tensor (r,)"),
    (arguments(scale=zeros(2)), ValueError, "scale has shape (2,); it must be a number or (r,) = (3,)"),
    (arguments(active_rank=0), ValueError, "active_rank is 0; it must be 1 to the rank of lora_A, 3"),
    (arguments(active_rank=4), ValueError, "active_rank is 4; it must be 1 to the rank of lora_A, 3"),
    (arguments(active_rank=1.0), TypeError, "active_rank is float; it must be an int"),
    (arguments(rounding="up"), ValueError, "rounding is 'up'; it must be one of 'nearest', 'stochastic'"),
    (arguments(seed=1), ValueError, 'seed is 1 and rounding "nearest"; only rounding="stochastic" takes a seed'),
    (arguments(seed=1.0, rounding="stochastic"), TypeError, "seed is float; it must be a number or an int64 tensor"),
    (arguments(seed=zeros(1), rounding="stochastic"), TypeError,
     "seed is float32 of shape (1,); it must be a number or an int64 tensor of one element"),
    (arguments(seed=zeros(2).long(), rounding="stochastic"), TypeError, "seed is int64 of shape (2,); it must be a"),
    (arguments(seed=zeros(1, device="meta").long(), rounding="stochastic"), ValueError, "seed is on meta; it must be"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "error", "message"), CASES, ids=[case[2][:45] for case in CASES])
@pytest.mark.parametrize("swap", [False, True])
def test_bad_arguments_are_named(call, error, message, swap):
    weight = call["weight"]
    if swap:
        if not torch.is_tensor(weight) or "weight" in message:
            pytest.skip("a weight that cannot be merged has nothing to swap")
        start = torch.ones_like(weight[:1]), torch.ones_like(weight[:, :1])
        call = call | {"merge": trifuse.lora_merge_(weight, *start)}
    name, function = ("lora_swap_", trifuse.lora_swap_) if swap else ("lora_merge_", trifuse.lora_merge_)
    before = weight.clone() if torch.is_tensor(weight) else None
    with pytest.raises(error, match=f"^{name}: " + re.escape(message)) as free:
        function(**call)
    assert type(free.value) is error
    for backend in NAMES:
        with trifuse.backend(backend), pytest.raises(error) as forced:
            function(**call)
        assert str(forced.value) == str(free.value), backend
    assert before is None or torch.equal(weight, before)


def test_a_merge_must_be_one():
    call = arguments()
    with pytest.raises(TypeError, match="lora_unmerge_: merge is dict; it must be what lora_merge_ returned"):
        trifuse.lora_unmerge_(call["weight"], {})
    with pytest.raises(TypeError, match="lora_swap_: merge is NoneType; it must be what lora_merge_ returned"):
        trifuse.lora_swap_(call["weight"], None, call["lora_A"], call["lora_B"])


def test_explain_describes_the_call():
    weight = zeros(6, 5).bfloat16()
    choice = trifuse.explain(trifuse.lora_merge_, **arguments(weight=weight, rounding="stochastic", active_rank=2))
    assert choice.inputs == "N=6, K=5, rank 2 of 3, bfloat16, adapter float32, rounding stochastic, cpu"
    merge = trifuse.lora_merge_(weight, zeros(3, 5), zeros(6, 3))
    assert trifuse.explain("lora_swap_", weight, merge, zeros(2, 5), zeros(6, 2)).op == "lora_swap_"


@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_double_precision_is_refused_on_gpus_with_a_reason(backend):
    call = {name: tensor.double() for name, tensor in arguments().items()}
    choice = trifuse.explain("lora_merge_", **call)
    assert "it computes in float32, and the weight is float64" in choice.refusals[backend]
    with trifuse.backend(backend), pytest.raises(trifuse.BackendUnavailable, match=r"^lora_merge_: backend"):
        trifuse.lora_merge_(**call)


@pytest.mark.parametrize(("changes", "error", "message"), [
    ({"rank": 0}, ValueError, "rank is 0; it must be 1 to the rank of lora_A, 3"),
    ({"rank": 4}, ValueError, "rank is 4; it must be 1 to the rank of lora_A, 3"),
    ({"rank": 2.0}, TypeError, "rank is float; it must be an int"),
    ({"lora_B": zeros(6, 2)}, ValueError, "lora_B has shape (6, 2); it must be (N, r) = (6, 3)"),
    ({"lora_B": zeros(6, 3).half()}, TypeError, "lora_B is float16; it must be float32 like lora_A"),
    ({"lora_A": [0]}, TypeError, "lora_A is list; it must be a torch.Tensor"),
    ({"scale": None}, TypeError, "scale is NoneType; it must be a number or a tensor (r,)"),
    ({"scale": zeros(2)}, ValueError, "scale has shape (2,); it must be a number or (r,) = (3,)"),
])  # fmt: skip
def test_bad_arguments_of_another_rank(changes, error, message):
    call = {"lora_A": zeros(3, 5), "lora_B": zeros(6, 3), "rank": 2} | changes
    with pytest.raises(error, match="^lora_truncate: " + re.escape(message)):
        trifuse.lora_truncate(**call)
    if changes.get("rank") != 4:
        with pytest.raises(error, match="^lora_change_rank: " + re.escape(message.split(" 1 to")[0])):
            trifuse.lora_change_rank(**call)


@pytest.mark.parametrize("new_scale", [0.0, float("inf"), "1"])
def test_a_new_scale_must_be_a_number_to_divide_by(new_scale):
    with pytest.raises((ValueError, TypeError), match="lora_change_rank: new_scale is"):
        trifuse.lora_change_rank(zeros(3, 5), zeros(6, 3), 2, new_scale=new_scale)
