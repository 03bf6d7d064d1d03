"""The CUDA kernels of causal_conv1d, compiled by the host compiler and run on the CPU, against the float64
reference.

Every comparison runs in ascending and in descending thread order and wants the same bits; memory that nothing
wrote is NaN. `wide_device` has many multiprocessors: time is then cut into segments. Offsets beyond 2^31 are at
the end.
"""

import functools

import conv_cases as cases
import pytest
import torch
from conv_cases import cast, eager_errors, output_gradients, recurring_ids, run
from emulated_cuda import load
from test_offsets import BIG, reserved, spread  # noqa: F401 (a fixture)
from tolerance import compare

from trifuse.ops.causal_conv1d import prepare
from trifuse.ops.causal_conv1d_update import prepare_update

library = load()
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
WIDTHS = range(2, 9)
PACKED = torch.tensor([0, 5, 5, 18, 51, 64, 65, 100, 100])
ops = torch.ops.trifuse_emulated
make = functools.partial(cases.make, dim=10)
pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.fixture
def wide_device():
    library.trifuse_emulator_set_multiprocessors(132)
    yield
    library.trifuse_emulator_set_multiprocessors(1)


def run_emulated(tensors, dtype, final=True, **options):
    """What conv_cases.run returns, by the emulated kernels; without `final`, no final states."""
    args = {name: None if tensor is None else cast(name, tensor, dtype) for name, tensor in tensors.items()}
    call = prepare(**args, **options)

    def public(sequence):
        return sequence.transpose(1, 2) if call.bld else sequence

    y, states = ops.causal_conv1d_fwd(*call, final)
    dy, dstates = output_gradients(public(y), states)
    dx, dweight, dbias, dinitial = ops.causal_conv1d_bwd(public(dy), dstates if final else None, *call)
    found = {"y": public(y), "dx": public(dx), "dweight": dweight}
    if final:
        found["final_states"] = states
    else:
        assert states.shape == (0,)
    for name, grad in (("bias", dbias), ("initial_states", dinitial)):
        if args[name] is None:
            assert grad.shape == (0,), name
        else:
            found[f"d{name}"] = grad
    return found


def in_both_orders(function):
    """What it returns in ascending thread order, whose bits those in descending order must have."""
    found = function()
    library.trifuse_emulator_set_descending(1)
    try:
        again = function()
    finally:
        library.trifuse_emulator_set_descending(0)
    for name, value in found.items():
        assert torch.equal(value, again[name]), f"{name} depends on the order of threads"
    return found


def check(tensors, dtype=torch.float32, final=True, **options):
    found = in_both_orders(lambda: run_emulated(tensors, dtype, final=final, **options))
    options["final_grad"] = final
    eager = run("reference", tensors, dtype, **options)
    assert found.keys() == eager.keys() - ({"final_states"} if not final else set())
    for name, value in found.items():
        assert value.dtype == eager[name].dtype, name
    compare(found, run("reference", tensors, torch.float64, **options), eager_errors(tensors, dtype, **options))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["bdl", "bld"])
@pytest.mark.parametrize("cu_seqlens", [None, PACKED])
@pytest.mark.parametrize("with_ids", [False, True])
def test_all_options_at_once(with_ids, cu_seqlens, layout, dtype):
    tensors = make(seqlen=100, layout=layout, dtype=dtype, cu_seqlens=cu_seqlens)
    ids = recurring_ids(1 if cu_seqlens is not None else 2, 100) if with_ids else None
    check(tensors, dtype, layout=layout, cu_seqlens=cu_seqlens, seq_idx=ids, activation="silu")


@pytest.mark.parametrize("layout", ["bdl", "bld"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
def test_widths(width, dtype, layout):
    seqlen = 270 if layout == "bdl" else 21  # beyond a tile
    tensors = make(width=width, dim=3, batch=1, seqlen=seqlen, layout=layout, dtype=dtype)
    check(tensors, dtype, layout=layout, activation="silu")


@pytest.mark.parametrize("layout", ["bdl", "bld"])
@pytest.mark.parametrize("width", WIDTHS)
def test_widths_with_boundaries(width, layout):
    tensors = make(width=width, dim=3, seqlen=140, layout=layout)
    check(tensors, layout=layout, seq_idx=recurring_ids(2, 140), activation="silu")


@pytest.mark.parametrize("layout", ["bdl", "bld"])
@pytest.mark.parametrize("options", [{}, {"bias": False}, {"initial": False}, {"bias": False, "initial": False}])
def test_optional_arguments_may_be_absent(options, layout):
    check(make(layout=layout, **options), layout=layout)
    check(make(layout=layout, **options), layout=layout, final=False)


@pytest.mark.parametrize("layout", ["bdl", "bld"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seqlen", [0, 1, 2, 3, 63, 64, 65, 1000])
def test_lengths(seqlen, dtype, layout):
    tensors = make(seqlen=seqlen, dim=2, batch=2 if seqlen < 100 else 1, dtype=dtype, layout=layout)
    check(tensors, dtype, layout=layout, activation="silu")


@pytest.mark.parametrize("layout", ["bdl", "bld"])
@pytest.mark.parametrize("dim", [1, 3, 63, 64, 65, 130])
def test_channels_around_a_warp(dim, layout):
    check(make(dim=dim, seqlen=9, layout=layout), layout=layout, activation="silu")


@pytest.mark.parametrize("layout", ["bdl", "bld"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [4, 8])
def test_time_is_cut_when_channels_are_few(wide_device, width, dtype, layout):
    seqlen = 1100 if layout == "bdl" else 150
    tensors = make(seqlen=seqlen, dim=3, width=width, batch=1, layout=layout, dtype=dtype)
    check(tensors, dtype, layout=layout, activation="silu")


@pytest.mark.parametrize("layout", ["bdl", "bld"])
def test_boundaries_at_the_cuts_of_time(wide_device, layout):
    seqlen = 600 if layout == "bdl" else 150
    cuts = [0, 31, 32, 33, 63, 65, 128, 129, 131, 140, seqlen] if layout == "bld" else [0, 127, 129, 256, 510, 515, 600]
    cu_seqlens = torch.tensor(cuts)
    tensors = make(seqlen=seqlen, dim=3, layout=layout, cu_seqlens=cu_seqlens)
    check(tensors, layout=layout, cu_seqlens=cu_seqlens, activation="silu")
    check(tensors, layout=layout, cu_seqlens=cu_seqlens, seq_idx=recurring_ids(1, seqlen, run=40), activation="silu")


@pytest.mark.parametrize("first", [256, 257, 258, 259, 384, 385])
@pytest.mark.parametrize("width", [4, 8])
def test_a_boundary_just_after_a_tile_without_one(wide_device, width, first):
    tensors = make(seqlen=600, dim=2, width=width, batch=1)
    check(tensors, seq_idx=(torch.arange(600) >= first)[None].int(), activation="silu")


@pytest.mark.parametrize("layout", ["bdl", "bld"])
def test_final_gradients_at_the_cuts_of_time(wide_device, layout):
    for seqlen in (257, 258, 260) if layout == "bdl" else (65, 66, 68):
        check(make(seqlen=seqlen, dim=2, batch=1, width=5, layout=layout), layout=layout, activation="silu")


@pytest.mark.parametrize("ids", [
    [0, 0, 0, 0, 0, 0], [-1, -1, -1, -1, -1, -1], [-1, -1, 2, 2, 2, 2], [3, 3, 3, -1, -1, -1], [0, 0, 1, 1, 0, 0],
    [5, 5, 5, 5, 5, 6], [1, -1, 1, -1, 1, -1], [7, -1, -1, -1, -1, -1],
])  # fmt: skip
@pytest.mark.parametrize("layout", ["bdl", "bld"])
@pytest.mark.parametrize("initial", [False, True])
def test_ids_of_every_kind(initial, layout, ids):
    seq_idx = torch.tensor([ids, list(reversed(ids))])
    for width in (2, 4, 8):
        check(make(seqlen=6, width=width, layout=layout, initial=initial), layout=layout, seq_idx=seq_idx)


def test_long_padding_at_the_end_is_passed_over():
    ids = torch.full((2, 150), -1)
    ids[0, :70], ids[1, 50:81] = 3, 1
    for layout in ("bdl", "bld"):
        check(make(seqlen=150, layout=layout), layout=layout, seq_idx=ids, activation="silu")


@pytest.mark.parametrize("layout", ["bdl", "bld"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_inputs_are_read_in_place(dtype, layout):
    tensors = make(dim=8, seqlen=65, layout=layout, dtype=dtype)
    wide = torch.full((*tensors["x"].shape[:-1], 3 * tensors["x"].shape[-1]), float("nan")).double()
    wide[..., 1::3] = tensors["x"]
    tensors["x"] = wide[..., 1::3]
    check(tensors, dtype, layout=layout)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_expanded_inputs(axis):
    tensors = make(dim=8, seqlen=65)
    tensors["x"] = tensors["x"].narrow(axis, 0, 1).expand(tensors["x"].shape)
    check(tensors, activation="silu")


@pytest.mark.parametrize("layout", ["bdl", "bld"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_view_of_the_other_layout(dtype, layout):
    tensors = make(dim=70, seqlen=40, dtype=dtype, layout=layout)
    tensors["x"] = tensors["x"].transpose(1, 2).contiguous().transpose(1, 2)
    check(tensors, dtype, layout=layout, activation="silu", seq_idx=recurring_ids(2, 40))


@pytest.mark.parametrize("layout", ["bdl", "bld"])
@pytest.mark.parametrize("start", [1, 2, 8])
def test_unaligned_inputs(start, layout):
    tensors = make(dim=64, seqlen=64, dtype=torch.float16, layout=layout)
    wide = torch.zeros(2, 64, 80).double()
    wide[..., start : start + 64] = tensors["x"]
    tensors["x"] = wide[..., start : start + 64]
    check(tensors, torch.float16, layout=layout)


@pytest.mark.parametrize("layout", ["bdl", "bld"])
@pytest.mark.parametrize("shape", [{"batch": 0}, {"seqlen": 0}, {"dim": 0}, {"batch": 0, "seqlen": 0}])
def test_empty_inputs(shape, layout):
    check(make(layout=layout, **shape), layout=layout, activation="silu")


def test_packed_sequences_may_all_be_empty():
    cu_seqlens = torch.tensor([0, 0, 0])
    check(make(seqlen=0, cu_seqlens=cu_seqlens), cu_seqlens=cu_seqlens)


@pytest.mark.parametrize("layout", ["bdl", "bld"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_inf_stay_in_their_window(bad, layout):
    tensors = make(dim=70, seqlen=40, layout=layout)
    clean = run_emulated(tensors, torch.float32, layout=layout, activation="silu")
    tensors["x"][(1, 20, 3) if layout == "bld" else (1, 3, 20)] = bad
    dirty = run_emulated(tensors, torch.float32, layout=layout, activation="silu")
    touched = torch.zeros(2, 70, 40, dtype=torch.bool)
    touched[1, 3, 20:24] = True
    for name, first in (("y", 20), ("dx", 17)):
        touched[1, 3, first:20] = True
        where = touched.transpose(1, 2) if layout == "bld" else touched
        assert torch.equal(clean[name][~where], dirty[name][~where]), name
    others = [d for d in range(70) if d != 3]
    for name in ("dweight", "dbias"):
        assert torch.equal(clean[name][others], dirty[name][others]), name


@pytest.mark.parametrize("layout", ["bdl", "bld"])
@pytest.mark.parametrize("by_id", [False, True])
def test_nan_does_not_cross_the_boundary_of_sequences(wide_device, by_id, layout):
    cu_seqlens = torch.tensor([0, 67, 141, 200])
    tensors = make(dim=3, seqlen=200, batch=1, layout=layout, cu_seqlens=None if by_id else cu_seqlens)
    ids = torch.repeat_interleave(torch.arange(3), cu_seqlens.diff())[None]
    options = {"layout": layout, "activation": "silu"} | ({"seq_idx": ids} if by_id else {"cu_seqlens": cu_seqlens})
    clean = run_emulated(tensors, torch.float32, **options)
    tensors["x"].transpose(1, 2 if layout == "bdl" else 1)[0, [67, 68, 139, 140]] = float("nan")
    dirty = run_emulated(tensors, torch.float32, **options)
    time = -1 if layout == "bdl" else 1
    for name in ("y", "dx"):
        for start, length in ((0, 67), (141, 59)):
            parts = [found[name].narrow(time, start, length) for found in (clean, dirty)]
            assert torch.equal(*parts), name
    assert torch.equal(clean["final_states"][-1], dirty["final_states"][-1])
    assert torch.equal(clean["dinitial_states"][0], dirty["dinitial_states"][0])


@pytest.mark.parametrize("layout", ["bdl", "bld"])
def test_padding_may_hold_anything_and_gives_nothing(layout):
    ids = torch.tensor([[-1, -1, -1, 0, 0, 0, 0, -1, -1, 1, 1, 1, -1, -1]])
    tensors = make(batch=1, seqlen=14, dim=3, layout=layout)
    clean = run_emulated(tensors, torch.float32, layout=layout, seq_idx=ids, activation="silu")
    x = tensors["x"] if layout == "bld" else tensors["x"].transpose(1, 2)
    x[ids < 0] = float("nan")
    dirty = run_emulated(tensors, torch.float32, layout=layout, seq_idx=ids, activation="silu")
    for name, value in clean.items():
        assert torch.equal(value, dirty[name]), name


def test_gradients_repeat_bit_for_bit(wide_device):
    tensors = make(dim=140, seqlen=100, dtype=torch.bfloat16, layout="bld")
    first, second = (run_emulated(tensors, torch.bfloat16, layout="bld") for _ in range(2))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def test_what_is_not_served_is_an_error():
    call = prepare(*list(make().values())[:2])
    with pytest.raises(RuntimeError, match="CUDA error 1"):
        ops.causal_conv1d_fwd(*call, False)


# The update.


def update_emulated(tensors, **options):
    args = dict(tensors)
    args["conv_state"] = args["conv_state"].clone(memory_format=torch.preserve_format)
    y = ops.causal_conv1d_update(*prepare_update(**args, **options))
    return {"y": y.squeeze(2) if tensors["x"].dim() == 2 else y, "conv_state": args["conv_state"]}


check_update = functools.partial(
    cases.check_update, lambda tensors, **options: in_both_orders(lambda: update_emulated(tensors, **options))
)


@pytest.mark.parametrize("state_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_update(dtype, state_dtype):
    check_update(cases.make_update(dim=130, seqlen=0, dtype=dtype, state_dtype=state_dtype), activation="silu")


@pytest.mark.parametrize("size", [None, 9])
@pytest.mark.parametrize("seqlen", [1, 2, 5, 30])
@pytest.mark.parametrize("width", WIDTHS)
def test_update_of_any_width_by_several_tokens(width, seqlen, size):
    tensors = cases.make_update(width=width, seqlen=seqlen, size=size)
    check_update(tensors)
    check_update(tensors, cache_seqlens=torch.tensor([0, 4, 1000003]), activation="silu")


def test_update_after_more_inputs_than_a_float_can_count():
    for size in (3, 7, 65537):
        tensors = cases.make_update(batch=2, dim=2, seqlen=2, size=size)
        check_update(tensors, cache_seqlens=torch.tensor([2**40 + 12345, 2**50 - 1]))


def test_update_picks_rows_and_leaves_padding_alone():
    tensors = cases.make_update(batch=4, rows=7, seqlen=2)
    indices = torch.tensor([5, -1, 0, -1])
    check_update(tensors, conv_state_indices=indices)
    check_update(tensors, conv_state_indices=indices.int(), cache_seqlens=torch.tensor([9, 1, 2, 0], dtype=torch.int32))


def test_update_without_bias_and_with_any_strides():
    tensors = cases.make_update(dim=6, size=5, seqlen=2)
    tensors["bias"] = None
    tensors["conv_state"] = tensors["conv_state"].transpose(0, 2).contiguous().transpose(0, 2)
    tensors["x"] = tensors["x"].transpose(1, 2).contiguous().transpose(1, 2)
    check_update(tensors, activation="silu")
    tensors["x"] = tensors["x"][:, :1].expand(3, 6, 2)
    check_update(tensors, activation="silu")


@pytest.mark.parametrize("shape", [{"batch": 0}, {"dim": 0}])
def test_update_of_nothing(shape):
    tensors = {name: x[:0] if shape == {"batch": 0} and name in ("x", "conv_state") else x
               for name, x in cases.make_update(**(shape if "dim" in shape else {})).items()}  # fmt: skip
    check_update(tensors)


def test_tokens_one_by_one_equal_the_sequence():
    tensors = {name: x.float() for name, x in make(seqlen=11, dim=5).items()}
    y, final = ops.causal_conv1d_fwd(*prepare(**tensors, activation="silu"), True)
    state = tensors["initial_states"].clone()
    for t in range(11):
        token = prepare_update(tensors["x"][:, :, t], state, tensors["weight"], tensors["bias"], "silu")
        torch.testing.assert_close(ops.causal_conv1d_update(*token)[:, :, 0], y[:, :, t])
    assert torch.equal(state, final)


# Offsets are 64-bit: see test_offsets.py.


@pytest.mark.parametrize("far", [0, 1, 2])
@pytest.mark.parametrize("layout", ["bdl", "bld"])
def test_inputs_beyond_two_to_the_31(reserved, layout, far):  # noqa: F811
    tensors = {name: x.float() for name, x in make(dim=3, seqlen=6).items()}
    near = run_emulated(tensors, torch.float32, activation="silu")
    strides = [100, 10, 1] if layout == "bdl" else [100, 1, 10]
    strides[far] = BIG + 64
    tensors["x"] = spread(reserved, tensors["x"], strides, 0)
    distant = run_emulated(tensors, torch.float32, activation="silu")
    for name, value in near.items():
        torch.testing.assert_close(distant[name], value, rtol=1e-6, atol=1e-6)


def test_state_beyond_two_to_the_31(reserved):  # noqa: F811
    tensors = cases.make_update(size=4)
    near = update_emulated(tensors)
    state = spread(reserved, tensors["conv_state"], (2 * BIG, 16, BIG + 5), 0)
    y = ops.causal_conv1d_update(*prepare_update(**(tensors | {"conv_state": state})))
    assert torch.equal(y, near["y"])
    assert torch.equal(state, near["conv_state"])
