"""What bad input of the low-rank ops gets: one error before any kernel runs, the same whatever backend is asked for."""

import re

import pytest
import torch

import trifuse
from trifuse.backends import NAMES
from trifuse.ops.lora_linear_multi import prepare as prepare_multi

NAN = float("nan")
zeros = torch.zeros


def linear(**changes):
    call = {"x": torch.randn(2, 6, 5), "weight": torch.randn(4, 5), "bias": torch.randn(4)}
    return call | {"lora_A": torch.randn(3, 5), "lora_B": torch.randn(4, 3)} | changes


def multi(**changes):
    call = {"x": torch.randn(2, 6, 5), "weight": torch.randn(4, 5), "bias": torch.randn(4)}
    call |= {"A_list": [torch.randn(3, 5), torch.randn(2, 5)], "B_list": [torch.randn(4, 3), torch.randn(4, 2)]}
    return call | {"scales": [1.0, 0.5], "index": torch.randint(-1, 2, (2, 6))} | changes


def dora(**changes):
    return linear(magnitude=torch.rand(4) + 0.5) | changes


def norm(**changes):
    return {"weight": torch.randn(4, 5), "lora_A": torch.randn(3, 5), "lora_B": torch.randn(4, 3)} | changes


BASE = [  # of every op that takes x
    ({"x": [1.0]}, TypeError, "x is list; it must be a torch.Tensor"),
    ({"weight": None}, TypeError, "weight is NoneType; it must be a torch.Tensor"),
    ({"bias": 0.0}, TypeError, "bias is float; it must be a torch.Tensor or None"),
    ({"x": zeros(())}, ValueError, "x has shape (); it must be (..., K)"),
    ({"x": zeros(6, 7)}, ValueError, "x has shape (6, 7); its last size must be the weight's, K = 5"),
    ({"x": zeros(2, 6, 5).long()}, TypeError, "x is int64; it must be one of float32, float16, bfloat16, float64"),
    ({"weight": zeros(5)}, ValueError, "weight has shape (5,); it must be (N, K)"),
    ({"weight": zeros(4, 5).half()}, TypeError, "weight is float16; it must be float32 like x"),
    ({"weight": zeros(4, 5, device="meta")}, ValueError, "weight is on meta; it must be on cpu"),
    ({"bias": zeros(5)}, ValueError, "bias has shape (5,); it must be (N,) = (4,)"),
    ({"bias": zeros(4).double()}, TypeError, "bias is float64; it must be float32 like x"),
    ({"bias": zeros(4, device="meta")}, ValueError, "bias is on meta; it must be on cpu"),
]  # fmt: skip
ADAPTER = [  # of every op with one adapter
    ({"lora_A": None}, TypeError, "lora_A is NoneType; it must be a torch.Tensor"),
    ({"lora_B": 1.0}, TypeError, "lora_B is float; it must be a torch.Tensor"),
    ({"lora_A": zeros(5)}, ValueError, "lora_A has shape (5,); it must be (r, K)"),
    ({"lora_A": zeros(0, 5), "lora_B": zeros(4, 0)}, ValueError,
     "lora_A has shape (0, 5); its rank must be at least 1"),
    ({"lora_A": zeros(3, 6)}, ValueError, "lora_A has shape (3, 6); it must be (r, K) = (3, 5)"),
    ({"lora_A": zeros(5, 3)}, ValueError, "lora_A has shape (5, 3); it must be (r, K) = (5, 5)"),
    ({"lora_B": zeros(3, 4)}, ValueError, "lora_B has shape (3, 4); it must be (N, r) = (4, 3)"),
    ({"lora_B": zeros(4, 2)}, ValueError, "lora_B has shape (4, 2); it must be (N, r) = (4, 3)"),
    ({"lora_A": zeros(3, 5).half()}, TypeError, "lora_B is float32; it must be float16 like lora_A"),
    ({"lora_A": zeros(3, 5).half(), "lora_B": zeros(4, 3).half()}, TypeError,
     "lora_A is float16; beside float32 sequences it must be float32"),
    ({"lora_A": zeros(3, 5, device="meta")}, ValueError, "lora_A is on meta; it must be on cpu"),
    ({"lora_B": zeros(4, 3, device="meta")}, ValueError, "lora_B is on meta; it must be on cpu"),
    ({"scale": "1"}, TypeError, "scale is str; it must be a number or a tensor (r,)"),
    ({"scale": True}, TypeError, "scale is bool; it must be a number or a tensor (r,)"),
    ({"scale": None}, TypeError, "scale is NoneType; it must be a number or a tensor (r,)"),
    ({"scale": zeros(4)}, ValueError, "scale has shape (4,); it must be a number or (r,) = (3,)"),
    ({"scale": zeros(3, 1)}, ValueError, "scale has shape (3, 1); it must be a number or (r,) = (3,)"),
    ({"scale": zeros(3).long()}, TypeError, "scale is int64; it must be a floating-point tensor"),
    ({"scale": zeros(3, device="meta")}, ValueError, "scale is on meta; it must be on cpu"),
]  # fmt: skip
DROPOUT = [
    ({"dropout": 1.0}, ValueError, "dropout is 1.0; it must be in [0, 1)"),
    ({"dropout": -0.1}, ValueError, "dropout is -0.1; it must be in [0, 1)"),
    ({"dropout": NAN}, ValueError, "dropout is nan; it must be in [0, 1)"),
    ({"dropout": 1.5, "training": False}, ValueError, "dropout is 1.5; it must be in [0, 1)"),
    ({"dropout": "0.1"}, TypeError, "dropout is str; it must be a number"),
    ({"dropout": True}, TypeError, "dropout is bool; it must be a number"),
    ({"seed": 0.5}, TypeError, "seed is float; it must be a number or an int64 tensor of one element"),
    ({"seed": "7", "dropout": 0.5}, TypeError, "seed is str; it must be a number or an int64 tensor of one element"),
    ({"seed": zeros(1), "dropout": 0.5}, TypeError,
     "seed is float32 of shape (1,); it must be a number or an int64 tensor of one element"),
    ({"seed": zeros(2).long(), "dropout": 0.5}, TypeError, "seed is int64 of shape (2,); it must be a number or"),
    ({"seed": zeros(1, device="meta").long(), "dropout": 0.5}, ValueError, "seed is on meta; it must be on cpu"),
]  # fmt: skip
RANKS = [
    ({"active_rank": 0}, ValueError, "active_rank is 0; it must be 1 to the rank of lora_A, 3"),
    ({"active_rank": 4}, ValueError, "active_rank is 4; it must be 1 to the rank of lora_A, 3"),
    ({"active_rank": -1}, ValueError, "active_rank is -1; it must be 1 to the rank of lora_A, 3"),
    ({"active_rank": 2.0}, TypeError, "active_rank is float; it must be an int"),
    ({"active_rank": True}, TypeError, "active_rank is bool; it must be an int"),
]
ADAPTERS = [
    ({"A_list": []}, ValueError, "A_list is empty; there must be at least one adapter (lora_linear needs none)"),
    ({"A_list": None}, TypeError, "A_list is NoneType; it must be a sequence, one entry per adapter"),
    ({"B_list": 1.0}, TypeError, "B_list is float; it must be a sequence, one entry per adapter"),
    ({"scales": 1.0}, TypeError, "scales is float; it must be a sequence, one entry per adapter"),
    ({"scales": torch.tensor(1.0)}, TypeError, "scales is Tensor; it must be a sequence, one entry per adapter"),
    ({"B_list": [zeros(4, 3)]}, ValueError, "B_list has 1 entries; it must have one per adapter, 2"),
    ({"scales": [1.0] * 3}, ValueError, "scales has 3 entries; it must have one per adapter, 2"),
    ({"A_list": [zeros(3, 5), None]}, TypeError, "A_list[1] is NoneType; it must be a torch.Tensor"),
    ({"A_list": [zeros(3, 5), zeros(2, 6)]}, ValueError, "A_list[1] has shape (2, 6); it must be (r, K) = (2, 5)"),
    ({"B_list": [zeros(4, 3), zeros(4, 3)]}, ValueError, "B_list[1] has shape (4, 3); it must be (N, r) = (4, 2)"),
    ({"A_list": [zeros(3, 5), zeros(2, 5).half()]}, TypeError,
     "B_list[1] is float32; it must be float16 like A_list[1]"),
    ({"scales": [1.0, "2"]}, TypeError, "scales[1] is str; it must be a number or a tensor (r,)"),
    ({"scales": [1.0, zeros(3)]}, ValueError, "scales[1] has shape (3,); it must be a number or (r,) = (2,)"),
    ({"scales": zeros(2, 2)}, ValueError, "scales has shape (2, 2); it must be (adapters, largest rank) = (2, 3)"),
    ({"scales": zeros(2, 3).long()}, TypeError, "scales is int64; it must be a floating-point tensor"),
    ({"scales": zeros(2, 3, device="meta")}, ValueError, "scales is on meta; it must be on cpu"),
    ({"index": [0, 1]}, TypeError, "index is list; it must be a torch.Tensor"),
    ({"index": zeros(2, 6)}, TypeError, "index is float32; it must be int32 or int64"),
    ({"index": zeros(2, 6).bool()}, TypeError, "index is bool; it must be int32 or int64"),
    ({"index": zeros(12).long()}, ValueError, "index has shape (12,); it must be x.shape[:-1] = (2, 6)"),
    ({"index": zeros(2, 6, device="meta").long()}, ValueError, "index is on meta; it must be on cpu"),
    ({"index": zeros(2, 6).long() + 2}, ValueError, "index holds 2; there are only 2 adapters"),
    ({"index": torch.full((2, 6), 7, dtype=torch.int32)}, ValueError, "index holds 7; there are only 2 adapters"),
]  # fmt: skip
MAGNITUDE = [
    ({"magnitude": None}, TypeError, "magnitude is NoneType; it must be a torch.Tensor"),
    ({"magnitude": zeros(5)}, ValueError, "magnitude has shape (5,); it must be (N,) = (4,)"),
    ({"magnitude": zeros(4, 1)}, ValueError, "magnitude has shape (4, 1); it must be (N,) = (4,)"),
    ({"magnitude": zeros(4).half()}, TypeError, "magnitude is float16; beside float32 sequences it must be float32"),
    ({"magnitude": zeros(4).long()}, TypeError, "magnitude is int64; beside float32 sequences it must be float32"),
    ({"magnitude": zeros(4, device="meta")}, ValueError, "magnitude is on meta; it must be on cpu"),
]
NORM = [
    ({"weight": [1.0]}, TypeError, "weight is list; it must be a torch.Tensor"),
    ({"weight": zeros(5)}, ValueError, "weight has shape (5,); it must be (N, K)"),
    ({"weight": zeros(4, 5).long()}, TypeError, "weight is int64; it must be one of float32"),
]
CASES = [
    *((trifuse.lora_linear, linear, *case) for case in BASE + ADAPTER + DROPOUT + RANKS),
    *((trifuse.lora_linear_multi, multi, *case) for case in BASE + ADAPTERS),
    *((trifuse.dora_linear, dora, *case) for case in BASE + ADAPTER + DROPOUT + MAGNITUDE),
    *((trifuse.dora_norm, norm, *case) for case in NORM + ADAPTER),
]


@pytest.mark.parametrize(
    ("op", "make", "changes", "error", "message"), CASES, ids=[f"{case[0].__name__} {case[4][:40]}" for case in CASES]
)
def test_bad_arguments_are_named(op, make, changes, error, message):
    call = make(**changes)
    with pytest.raises(error, match=f"^{op.__name__}: " + re.escape(message)) as free:
        op(**call)
    assert type(free.value) is error
    for name in NAMES:
        with trifuse.backend(name), pytest.raises(error) as forced:
            op(**call)
        assert str(forced.value) == str(free.value), name


OPS = [(trifuse.lora_linear, linear), (trifuse.lora_linear_multi, multi), (trifuse.dora_linear, dora)]
every_op = pytest.mark.parametrize(("op", "make"), OPS, ids=[op.__name__ for op, _ in OPS])


@every_op
@pytest.mark.parametrize("name", ["cuda", "triton"])
def test_a_forced_backend_says_why_it_cannot(op, make, name):
    wide = {key: x.double() if torch.is_tensor(x) and x.is_floating_point() else x for key, x in make().items()}
    if op is trifuse.lora_linear_multi:
        wide |= {key: [x.double() for x in wide[key]] for key in ("A_list", "B_list")}
    with trifuse.backend(name), pytest.raises(trifuse.BackendUnavailable, match=f"^{op.__name__}: backend '{name}'"):
        op(**wide)


@every_op
def test_explain_names_the_choice_and_the_sizes(op, make, capsys):
    choice = trifuse.explain(op, **make())
    assert choice.chosen in ("cpp", "reference") and choice.order == ("cpp", "reference")
    text = capsys.readouterr().out
    assert text.startswith(f"{op.__name__}(rows 12, 5 -> 4, ") and "float32" in text and "cuda cannot: " in text
    with trifuse.backend("reference"):
        assert trifuse.explain(op.__name__, **make()).chosen == "reference"


def test_explain_says_what_is_special_about_a_call(capsys):
    trifuse.explain("lora_linear", **linear(active_rank=2, dropout=0.1))
    trifuse.explain("dora_linear", **dora(detach_norm=False))
    trifuse.explain("lora_linear_multi", **multi())
    text = capsys.readouterr().out
    assert "rank 2 of 3" in text and "dropout 0.1" in text
    assert "gradient of the norm" in text and "2 adapters of rank 2 to 3" in text


def test_double_precision_is_refused_by_gpu_kernels_with_a_reason():
    wide = {name: x.double() for name, x in linear().items()}
    choice = trifuse.explain("lora_linear", **wide)
    for name in ("cuda", "triton"):
        assert "it computes in float32, and the inputs are float64" in choice.refusals[name]


def test_an_index_beyond_the_adapters_is_refused_below_the_checks_too():
    call = prepare_multi(**multi(x=torch.randn(3, 5), index=torch.zeros(3).long()))
    if trifuse._library.missing("cpp") is not None:
        pytest.skip("the cpp library is not built")
    with pytest.raises(RuntimeError, match="lora_linear_multi: index holds 2; there are only 2 adapters"):
        torch.ops.trifuse.lora_linear_multi_fwd(*call[:-1], torch.tensor([0, 2, 1]), False)


@every_op
def test_arguments_are_left_as_they_were(op, make):
    call = make()
    before = {name: value.clone() for name, value in call.items() if torch.is_tensor(value)}
    op(**call)
    assert all(torch.equal(call[name], before[name]) for name in before)
