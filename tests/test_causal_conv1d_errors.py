"""What bad input of causal_conv1d gets: one error, before any kernel runs, the same whichever backend is asked for."""

import re

import pytest
import torch
from test_errors import assert_refused

import trifuse
from trifuse.ops.causal_conv1d import CONV, prepare

BATCH, DIM, LENGTH, WIDTH = 2, 6, 5, 4
zeros = torch.zeros


def conv_arguments(layout="bdl", batch=BATCH):
    return {
        "x": torch.randn((batch, DIM, LENGTH) if layout == "bdl" else (batch, LENGTH, DIM)),
        "weight": torch.randn(DIM, WIDTH), "bias": torch.randn(DIM), "seq_idx": torch.zeros(batch, LENGTH).int(),
        "initial_states": torch.randn(batch, DIM, WIDTH - 1), "activation": "silu", "layout": layout,
    }  # fmt: skip


def update_arguments():
    return {
        "x": torch.randn(BATCH, DIM), "conv_state": torch.randn(BATCH, DIM, WIDTH), "weight": torch.randn(DIM, WIDTH),
        "bias": torch.randn(DIM), "activation": "silu", "cache_seqlens": torch.tensor([3, 0]),
        "conv_state_indices": torch.tensor([1, 0]),
    }  # fmt: skip


# argument, its bad value, the error, and what the message says after "causal_conv1d: "
CONV_CASES = [
    ("x", zeros(2, 6), ValueError, "x has shape (2, 6); it must be (B, D, L)"),
    ("x", zeros(2, 6, 5).long(), TypeError, "x is int64; it must be one of float32, float16, bfloat16, float64"),
    ("x", zeros(2, 6, 5).cfloat(), TypeError, "x is complex64; it must be one of float32, float16, bfloat16, float64"),
    ("x", [[[1.0]]], TypeError, "x is list; it must be a torch.Tensor"),
    ("weight", None, TypeError, "weight is NoneType; it must be a torch.Tensor"),
    ("weight", zeros(6), ValueError, "weight has shape (6,); it must be (D, W)"),
    ("weight", zeros(6, 1, 4), ValueError, "weight has shape (6, 1, 4); it must be (D, W)"),
    ("weight", zeros(5, 4), ValueError, "weight has shape (5, 4); its first size must be D = 6"),
    ("weight", zeros(6, 1), ValueError, "weight has width 1; it must be from 2 to 8"),
    ("weight", zeros(6, 9), ValueError, "weight has width 9; it must be from 2 to 8"),
    ("weight", zeros(6, 4).double(), TypeError, "weight is float64; beside float32 sequences it must be float32"),
    ("weight", zeros(6, 4).half(), TypeError, "weight is float16; beside float32 sequences it must be float32"),
    ("weight", zeros(6, 4).int(), TypeError, "weight is int32; beside float32 sequences it must be float32"),
    ("bias", zeros(5), ValueError, "bias has shape (5,); it must be (D,) = (6,)"),
    ("bias", zeros(6).bfloat16(), TypeError, "bias is bfloat16; beside float32 sequences it must be float32"),
    ("bias", 1.0, TypeError, "bias is float; it must be a torch.Tensor or None"),
    ("seq_idx", zeros(2, 5), TypeError, "seq_idx is float32; it must be int32 or int64"),
    ("seq_idx", zeros(2, 4).int(), ValueError, "seq_idx has shape (2, 4); it must be (B, L) = (2, 5)"),
    ("seq_idx", zeros(5).int(), ValueError, "seq_idx has shape (5,); it must be (B, L) = (2, 5)"),
    ("seq_idx", torch.full((2, 5), 2**32), ValueError, "seq_idx holds 4294967296; its values must fit into int32"),
    ("seq_idx", torch.full((2, 5), -(2**32)), ValueError, "seq_idx holds -4294967296; its values must fit into int32"),
    ("initial_states", zeros(2, 6, 4), ValueError, "initial_states has shape (2, 6, 4); it must be (B, D, W - 1) = (2"),
    ("initial_states", zeros(1, 6, 3), ValueError, "initial_states has shape (1, 6, 3); it must be (B, D, W - 1) = (2"),
    ("initial_states", zeros(2, 6, 3).half(), TypeError, "initial_states is float16; it must be float32 like x"),
    ("activation", "relu", ValueError, "activation is 'relu'; it must be None, \"silu\" or \"swish\""),
    ("activation", True, ValueError, 'activation is True; it must be None, "silu" or "swish"'),
    ("layout", "ldb", ValueError, "layout is 'ldb'; it must be \"bdl\" or \"bld\""),
    ("cu_seqlens", [0, 5], TypeError, "cu_seqlens is list; it must be a torch.Tensor or None"),
    ("cu_seqlens", torch.tensor([0, 5]), ValueError, "cu_seqlens packs sequences in a batch of one, and the batch is"),
    *((name, value.to("meta"), ValueError, f"{name} is on meta; it must be on cpu like the sequences")
      for name, value in conv_arguments().items() if isinstance(value, torch.Tensor) and name != "x"),
]  # fmt: skip
PACKED_CASES = [
    (torch.tensor([1, 2, 5]), ValueError, "cu_seqlens starts at 1; it must start at 0"),
    (torch.tensor([0, 2, 4]), ValueError, "cu_seqlens ends at 4; it must end at L = 5"),
    (torch.tensor([0, 6, 5]), ValueError, "cu_seqlens decreases from 6 to 5 at index 2"),
    (torch.tensor([[0, 2, 5]]), ValueError, "cu_seqlens has shape (1, 3); it must be (S + 1,)"),
    (torch.tensor([0.0, 2.0, 5.0]), TypeError, "cu_seqlens is float32; it must be int32 or int64"),
]  # fmt: skip
UPDATE_CASES = [
    ("x", zeros(2), ValueError, "x has shape (2,); it must be (B, D) or (B, D, L)"),
    ("x", zeros(2, 6).long(), TypeError, "x is int64; it must be one of float32"),
    ("conv_state", zeros(2, 6), ValueError, "conv_state has shape (2, 6); it must be (R, D, K)"),
    ("conv_state", zeros(2, 5, 4), ValueError, "conv_state has shape (2, 5, 4); it must be (R, D, K) with D = 6"),
    ("conv_state", zeros(2, 6, 2), ValueError, "conv_state has shape (2, 6, 2); it must be (R, D, K) with D = 6 and K"),
    ("conv_state", zeros(2, 6, 4).int(), TypeError, "conv_state is int32; it must be one of float32"),
    ("conv_state", zeros(2, 1, 4).expand(2, 6, 4), ValueError, "conv_state has strides (4, 0, 1), so elements share"),
    ("weight", zeros(6, 9), ValueError, "weight has width 9; it must be from 2 to 8"),
    ("weight", zeros(5, 4), ValueError, "weight has shape (5, 4); its first size must be D = 6"),
    ("bias", zeros(6, 1), ValueError, "bias has shape (6, 1); it must be (D,) = (6,)"),
    ("activation", "gelu", ValueError, "activation is 'gelu'; it must be None, \"silu\" or \"swish\""),
    ("cache_seqlens", torch.tensor([1.0, 2.0]), TypeError, "cache_seqlens is float32; it must be int32 or int64"),
    ("cache_seqlens", torch.tensor([1]), ValueError, "cache_seqlens has shape (1,); it must be (B,) = (2,)"),
    ("conv_state_indices", torch.tensor([0, 2]), ValueError, "conv_state_indices holds 2; conv_state has only 2 rows"),
    ("conv_state_indices", torch.tensor([0]), ValueError, "conv_state_indices has shape (1,); it must be (B,) = (2,)"),
    ("conv_state_indices", torch.tensor([0.0, 1.0]), TypeError, "conv_state_indices is float32; it must be int32 or"),
    *((name, value.to("meta"), ValueError, f"{name} is on meta; it must be on cpu like the sequences")
      for name, value in update_arguments().items() if isinstance(value, torch.Tensor) and name != "x"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value", "error", "message"), CONV_CASES)
def test_an_argument_is_refused_by_name(name, value, error, message):
    arguments = conv_arguments() | {name: value}
    assert_refused(trifuse.causal_conv1d, arguments, error, re.escape("causal_conv1d: " + message))


@pytest.mark.parametrize(("offsets", "error", "message"), PACKED_CASES)
def test_offsets_of_packed_sequences_are_refused(offsets, error, message):
    arguments = conv_arguments(batch=1) | {"cu_seqlens": offsets, "initial_states": None}
    assert_refused(trifuse.causal_conv1d, arguments, error, re.escape("causal_conv1d: " + message))


def test_the_initial_states_of_packed_sequences_have_a_row_per_sequence():
    arguments = conv_arguments(batch=1) | {"cu_seqlens": torch.tensor([0, 2, 5])}
    message = "initial_states has shape (1, 6, 3); it must be (S, D, W - 1) = (2, 6, 3)"
    assert_refused(trifuse.causal_conv1d, arguments, ValueError, re.escape("causal_conv1d: " + message))


def test_the_other_layout_is_refused_in_its_own_words():
    arguments = conv_arguments("bld") | {"x": zeros(2, 5)}
    assert_refused(trifuse.causal_conv1d, arguments, ValueError, re.escape("it must be (B, L, D)"))


@pytest.mark.parametrize(("name", "value", "error", "message"), UPDATE_CASES)
def test_an_update_argument_is_refused_by_name(name, value, error, message):
    arguments = update_arguments() | {name: value}
    assert_refused(trifuse.causal_conv1d_update, arguments, error, re.escape("causal_conv1d_update: " + message))


def test_without_indices_the_state_has_a_row_per_item():
    arguments = update_arguments() | {"conv_state": zeros(3, DIM, WIDTH), "conv_state_indices": None}
    message = "conv_state has 3 rows; without conv_state_indices it must have B = 2"
    assert_refused(trifuse.causal_conv1d_update, arguments, ValueError, re.escape("causal_conv1d_update: " + message))


def test_wrong_offsets_do_not_pass_the_kernel_either():
    """Traced code reaches the kernel without the checks of the public function."""
    if CONV.refusals["cpp"](prepare(**conv_arguments())):
        pytest.skip("the cpp library is not built")
    x, weight = torch.randn(1, DIM, LENGTH), torch.randn(DIM, WIDTH)
    for offsets in ([1, 5], [0, 4], [0, 6], [0, 4, 3, 5]):
        with pytest.raises(RuntimeError, match="cu_seqlens must start at 0, never decrease and end at L = 5"):
            torch.ops.trifuse.causal_conv1d_fwd(
                x, weight, None, None, None, torch.tensor(offsets), False, False, False, False
            )
    with pytest.raises(RuntimeError, match="conv_state_indices holds 7; conv_state has only 2 rows"):
        torch.ops.trifuse.causal_conv1d_update(
            x, torch.zeros(2, DIM, WIDTH), weight, None, False, None, torch.tensor([7])
        )


def test_a_forced_backend_never_falls_back():
    for backend in ("cuda", "triton"):
        if CONV.refusals[backend](prepare(**conv_arguments())):
            with trifuse.backend(backend), pytest.raises(trifuse.BackendUnavailable, match="causal_conv1d"):
                trifuse.causal_conv1d(**conv_arguments())
