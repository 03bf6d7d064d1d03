"""What bad input to ssd gets: one error, before any kernel runs, the same whichever backend is asked for."""

import re

import pytest
import torch
from ssd_cases import make

import trifuse
from trifuse import _library
from trifuse.backends import NAMES
from trifuse.ops.ssd import SSD, prepare


def arguments(**options):
    """B 2, L 5, H 4, P 3, G 2, N 6."""
    tensors = make(seqlen=5, headdim=3, groups=2, dstate=6, gate=True, **options)
    return {name: value.float() for name, value in tensors.items()} | {"dt_softplus": True}


def zeros(*shape, **options):
    return torch.zeros(*shape, **options)


# argument, its bad value, the error, and what the message says after "ssd: "
CASES = [
    # what is no tensor
    ("x", None, TypeError, "x is NoneType; it must be a torch.Tensor"),
    ("D", 1.0, TypeError, "D is float; it must be a torch.Tensor or None"),
    ("seq_idx", [0] * 5, TypeError, "seq_idx is list; it must be a torch.Tensor or None"),
    # wrong rank
    ("x", zeros(2, 5, 12), ValueError, "x has shape (2, 5, 12); it must be (B, L, H, P)"),
    ("dt", zeros(2, 5, 4, 3), ValueError, "dt has shape (2, 5, 4, 3); it must be (B, L, H) = (2, 5, 4)"),
    ("A", zeros(4, 6), ValueError, "A has shape (4, 6); it must be (H,) = (4,)"),
    ("B", zeros(2, 5, 6), ValueError, "B has shape (2, 5, 6); it must be (B, L, G, N)"),
    ("C", zeros(2, 5, 6), ValueError, "C has shape (2, 5, 6); it must have the shape of B, (2, 5, 2, 6)"),
    ("initial_states", zeros(4, 3, 6), ValueError, "initial_states has shape (4, 3, 6); it must be (B, H, P, N) = (2"),
    ("seq_idx", zeros(5, dtype=torch.int32), ValueError, "seq_idx has shape (5,); it must be (B, L) = (2, 5)"),
    # mismatched sizes
    ("dt", zeros(2, 4, 4), ValueError, "dt has shape (2, 4, 4); it must be (B, L, H) = (2, 5, 4)"),
    ("A", zeros(3), ValueError, "A has shape (3,); it must be (H,) = (4,)"),
    ("B", zeros(2, 4, 2, 6), ValueError, "B has batch 2 and length 4; they must be 2 and L = 5"),
    ("B", zeros(2, 5, 3, 6), ValueError, "B has 3 groups, which does not divide H = 4"),
    ("B", zeros(2, 5, 0, 6), ValueError, "B has 0 groups, which does not divide H = 4"),
    ("C", zeros(2, 5, 1, 6), ValueError, "C has shape (2, 5, 1, 6); it must have the shape of B, (2, 5, 2, 6)"),
    ("D", zeros(3), ValueError, "D has shape (3,); it must be (H,) = (4,) or (H, P) = (4, 3)"),
    ("D", zeros(4, 2), ValueError, "D has shape (4, 2); it must be (H,) = (4,) or (H, P) = (4, 3)"),
    ("z", zeros(2, 5, 4, 2), ValueError, "z has shape (2, 5, 4, 2); it must have the shape of x, (2, 5, 4, 3)"),
    ("dt_bias", zeros(1), ValueError, "dt_bias has shape (1,); it must be (H,) = (4,)"),
    ("initial_states", zeros(2, 4, 6, 3), ValueError, "initial_states has shape (2, 4, 6, 3); it must be (B, H, P, N)"),
    # dtypes
    ("x", zeros(2, 5, 4, 3, dtype=torch.int64), TypeError, "x is int64; it must be one of float32, float16, bfloat16"),
    ("dt", zeros(2, 5, 4).half(), TypeError, "dt is float16; beside float32 sequences it must be float32"),
    ("B", zeros(2, 5, 2, 6).half(), TypeError, "B is float16; it must be float32 like x"),
    ("C", zeros(2, 5, 2, 6).double(), TypeError, "C is float64; it must be float32 like x"),
    ("z", zeros(2, 5, 4, 3).bfloat16(), TypeError, "z is bfloat16; it must be float32 like x"),
    ("A", zeros(4, dtype=torch.complex64), TypeError, "A is complex64; beside float32 sequences it must be float32"),
    ("D", zeros(4).double(), TypeError, "D is float64; beside float32 sequences it must be float32"),
    ("initial_states", zeros(2, 4, 3, 6).half(), TypeError, "initial_states is float16; beside float32 sequences it"),
    ("seq_idx", zeros(2, 5), TypeError, "seq_idx is float32; it must be int32 or int64"),
    ("seq_idx", torch.full((2, 5), 2**31), ValueError, "seq_idx holds 2147483648; its values must fit into int32"),
    ("cu_seqlens", zeros(2), TypeError, "cu_seqlens is float32; it must be int32 or int64"),
    # offsets
    (
        "cu_seqlens",
        torch.tensor([0, 5]),
        ValueError,
        "cu_seqlens packs sequences in a batch of one, and the batch is 2",
    ),
    # numbers
    ("dt_limit", 0.1, TypeError, "dt_limit is 0.1; it must be a pair of numbers"),
    ("dt_limit", (0.1, 0.2, 0.3), TypeError, "dt_limit is (0.1, 0.2, 0.3); it must be a pair of numbers"),
    ("dt_limit", (None, 0.1), TypeError, "dt_limit is (None, 0.1); it must be a pair of numbers"),
    ("dt_limit", "ab", TypeError, "dt_limit is 'ab'; it must be a pair of numbers"),
    ("dt_limit", (0.2, 0.1), ValueError, "dt_limit is (0.2, 0.1); its first number must not exceed its second"),
    (
        "dt_limit",
        (float("nan"), 1.0),
        ValueError,
        "dt_limit is (nan, 1.0); its first number must not exceed its second",
    ),
    ("chunk_size", 0, ValueError, "chunk_size is 0; it must be at least 1"),
    ("chunk_size", 64.0, TypeError, "chunk_size is 64.0; it must be a positive int or None"),
]


def assert_refused(values, error, message):
    with pytest.raises(error, match=message) as free:
        trifuse.ssd(**values)
    assert type(free.value) is error
    for name in NAMES:
        with trifuse.backend(name), pytest.raises(error) as forced:
            trifuse.ssd(**values)
        assert str(forced.value) == str(free.value), name


@pytest.mark.parametrize(("name", "value", "error", "message"), CASES)
def test_an_argument_is_refused_by_name(name, value, error, message):
    assert_refused(arguments() | {name: value}, error, re.escape("ssd: " + message))


@pytest.mark.parametrize(
    ("offsets", "message"),
    [
        ([1, 5], "cu_seqlens starts at 1; it must start at 0"),
        ([0, 3, 2, 5], "cu_seqlens decreases from 3 to 2 at index 2"),
        ([0, 4], "cu_seqlens ends at 4; it must end at L = 5"),
        ([0, 2, 5], "initial_states has shape (1, 4, 3, 6); it must be (S, H, P, N) = (2, 4, 3, 6)"),
    ],
)
def test_offsets_are_checked(offsets, message):
    values = arguments(batch=1) | {"cu_seqlens": torch.tensor(offsets)}
    assert_refused(values, ValueError, re.escape("ssd: " + message))


@pytest.mark.parametrize("name", ["dt", "A", "B", "C", "D", "z", "dt_bias", "initial_states"])
def test_an_argument_on_another_device_is_refused(name):
    values = arguments()
    values[name] = values[name].to("meta")
    assert_refused(values, ValueError, f"ssd: {name} is on meta; it must be on cpu like the sequences")


def test_cuda_says_what_serves_instead():
    with trifuse.backend("cuda"), pytest.raises(trifuse.BackendUnavailable) as error:
        trifuse.ssd(**arguments())
    assert "a decode step is selective_state_update with heads" in str(error.value)
    assert "Backends that can: reference" in str(error.value)


def test_explain_names_the_choice_and_the_refusals(capsys):
    choice = trifuse.explain(trifuse.ssd, **arguments())
    assert choice.chosen == ("cpp" if _library.missing("cpp") is None else "reference")
    printed = capsys.readouterr().out
    assert "ssd(B=2, L=5, H=4, P=3, G=2, N=6, float32, cpu)" in printed and "cuda cannot: " in printed


@pytest.mark.skipif(_library.missing("cpp") is not None, reason="the cpp library is not built")
def test_the_op_itself_refuses_what_would_be_read_past_an_end():
    call = [value.detach() if isinstance(value, torch.Tensor) else value for value in prepare(**arguments(batch=1))]
    op = torch.ops.trifuse.ssd_fwd
    for offsets in ([0, 9], [0, 4], [1, 5], [0, 3, 2, 5]):
        packed = [*call[:8], None, None, torch.tensor(offsets), *call[11:-1], 16, False]
        with pytest.raises(RuntimeError, match="ssd: cu_seqlens must start at 0, never decrease and end at L = 5"):
            op(*packed)
    with pytest.raises(RuntimeError, match="ssd: chunk_size is 0; on the CPU it must be from 1 to 1024"):
        op(*call[:-1], 0, False)
    narrow = [*call[:4], call[4][:, :, :1], *call[5:-1], 16, False]
    with pytest.raises(RuntimeError, match="ssd: B has 2 groups of 6 states and C has 1 of 6"):
        op(*narrow)


def test_every_backend_states_its_reasons_for_float64():
    call = prepare(**{k: v.double() if torch.is_tensor(v) else v for k, v in arguments().items()})
    assert any("float64" in reason for reason in SSD.refusals["triton"](call))
