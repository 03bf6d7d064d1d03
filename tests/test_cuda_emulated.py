"""The CUDA kernels, compiled by the host compiler and run on the CPU, against the float64 reference.

Every comparison runs in ascending and in descending thread order and wants the same bits; memory that
nothing wrote is NaN, in allocations and in shared memory. Some devices have few multiprocessors and
some many: `wide_device` makes the launch split time.
"""

import ctypes

import pytest
import torch
from emulated_cuda import PACKED, check, check_update, load, make, run_emulated

library = load()
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
packed = torch.tensor(PACKED)
pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.fixture
def wide_device():
    library.trifuse_emulator_set_multiprocessors(132)
    yield
    library.trifuse_emulator_set_multiprocessors(1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["bdl", "bld"])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("cu_seqlens", [None, packed])
def test_all_options_at_once(cu_seqlens, reverse, layout, dtype):
    tensors = make(seqlen=100, layout=layout, dtype=dtype, cu_seqlens=cu_seqlens)
    check(tensors, dtype, cu_seqlens=cu_seqlens, reverse=reverse, layout=layout, delta_softplus=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cu_seqlens", [None, packed])
def test_bare_call_needs_no_optional_argument(cu_seqlens, dtype):
    tensors = make(seqlen=100, dtype=dtype, skip=False, gate=False, bias=False, initial=False, cu_seqlens=cu_seqlens)
    tensors["delta"] = tensors["delta"].abs()
    check(tensors, dtype, cu_seqlens=cu_seqlens, last_grad=False)


@pytest.mark.parametrize("option", ["skip", "gate", "bias", "initial"])
def test_each_optional_argument_may_be_absent(option):
    check(make(**{option: False}), delta_softplus=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seqlen", [0, 1, 63, 64, 65, 200])
def test_lengths_around_a_tile(seqlen, dtype):
    check(make(seqlen=seqlen, dtype=dtype), dtype, delta_softplus=True)


@pytest.mark.parametrize("layout", ["bdl", "bld"])
@pytest.mark.parametrize("dstate", [1, 4, 5, 16, 20, 64])
def test_state_sizes(dstate, layout):
    check(make(dstate=dstate, seqlen=40, layout=layout), layout=layout, delta_softplus=True)


@pytest.mark.parametrize("layout", ["bdl", "bld"])
@pytest.mark.parametrize("dim", [1, 63, 64, 65, 130])
def test_channels_around_a_block(dim, layout):
    check(make(dim=dim, dstate=4, layout=layout), layout=layout, delta_softplus=True)


@pytest.mark.parametrize("constant", ["B", "C", "BC"])
@pytest.mark.parametrize("dstate", [3, 16, 20])
def test_constant_coefficients(dstate, constant):
    check(make(constant=constant, dstate=dstate, seqlen=65), delta_softplus=True)


@pytest.mark.parametrize("layout", ["bdl", "bld"])
@pytest.mark.parametrize("groups", [(2, 2), (1, 6), (3, 2), (6, 6)])
def test_groups_of_b_and_c_may_differ(groups, layout):
    check(make(groups=groups, dstate=5, layout=layout), layout=layout, delta_softplus=True)


def test_groups_wider_than_a_block():
    check(make(dim=140, groups=(2, 1), dstate=4, batch=1), delta_softplus=True)


@pytest.mark.parametrize("chunk_size", [16, 48, 64, 1024])
def test_any_chunk_size_is_honoured(chunk_size):
    check(make(seqlen=130), chunk_size=chunk_size, delta_softplus=True)


def test_state_at_each_chunk_is_the_state_of_a_shorter_sequence():
    tensors = make(seqlen=100, dtype=torch.float32)
    args = [None if t is None else t.float() for t in tensors.values()]
    u, delta, A, B, C, D, z, bias, initial = args
    ops = torch.ops.trifuse_emulated
    flags = (None, True, False, False, False)
    chunk_states = ops.selective_scan_fwd(u, delta, A, B, C, D, z, bias, initial, *flags, 48)[2]
    assert chunk_states.shape == (2, 3, 16, 6)
    for chunk in range(3):
        cut = [None if t is None else t[..., : 48 * chunk] for t in (u, delta, B, C, z)]
        last = ops.selective_scan_fwd(cut[0], cut[1], A, cut[2], cut[3], D, cut[4], bias, initial, *flags, 0)[1]
        torch.testing.assert_close(chunk_states[:, chunk].transpose(1, 2), last, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("reverse", [False, True])
def test_time_is_split_when_channels_are_few(wide_device, reverse):
    check(make(seqlen=600, dim=3), delta_softplus=True, reverse=reverse)


@pytest.mark.parametrize("reverse", [False, True])
def test_packed_sequences_across_splits_of_time(wide_device, reverse):
    cu_seqlens = torch.tensor([0, 300, 301, 301, 511, 512, 600])
    check(make(seqlen=600, dim=3, dstate=4, cu_seqlens=cu_seqlens), delta_softplus=True, reverse=reverse,
          cu_seqlens=cu_seqlens)  # fmt: skip


def test_split_time_with_states_in_several_goes(wide_device):
    check(make(seqlen=513, dim=3, dstate=20, constant="C"), delta_softplus=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["bdl", "bld"])
def test_strided_and_expanded_inputs_are_read_in_place(layout, dtype):
    tensors = make(dim=8, seqlen=65, layout=layout, dtype=dtype)
    for name in ("u", "z", "B"):
        wide = torch.full((*tensors[name].shape[:-1], 3 * tensors[name].shape[-1]), float("nan")).double()
        wide[..., 1::3] = tensors[name]
        tensors[name] = wide[..., 1::3]
    tensors["delta"] = tensors["delta"][:, :1].expand(tensors["delta"].shape)
    tensors["C"] = tensors["C"][..., :1].expand(tensors["C"].shape)
    check(tensors, dtype, layout=layout, delta_softplus=True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_view_of_the_other_layout(dtype):
    tensors = make(dim=8, seqlen=40, dtype=dtype)
    for name in ("delta", "z", "C"):
        tensors[name] = tensors[name].transpose(-1, -2).contiguous().transpose(-1, -2)
    check(tensors, dtype, delta_softplus=True)


@pytest.mark.parametrize("offset", [1, 2, 8])
def test_unaligned_sequences(offset):
    tensors = make(dim=8, seqlen=64, dtype=torch.float16)
    for name in ("u", "delta", "z"):
        wide = torch.zeros(*tensors[name].shape[:-1], 80).double()
        wide[..., offset : offset + 64] = tensors[name]
        tensors[name] = wide[..., offset : offset + 64]
    check(tensors, torch.float16, delta_softplus=True)


@pytest.mark.parametrize("shape", [{"batch": 0}, {"seqlen": 0}, {"batch": 0, "seqlen": 0}])
@pytest.mark.parametrize("constant", ["", "BC"])
def test_empty_inputs(shape, constant):
    check(make(constant=constant, **shape), delta_softplus=True)


def test_packed_sequences_may_all_be_empty():
    cu_seqlens = torch.tensor([0, 0, 0])
    check(make(seqlen=0, cu_seqlens=cu_seqlens), cu_seqlens=cu_seqlens)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_inf_stay_in_their_channel_and_batch_item(bad):
    tensors = make(dim=70, seqlen=40)
    clean = run_emulated(tensors, torch.float32, delta_softplus=True)
    tensors["u"][1, 3, 20] = bad
    dirty = run_emulated(tensors, torch.float32, delta_softplus=True)
    others = [d for d in range(70) if d != 3]
    assert not dirty["out"][1, 3, 20:].isfinite().any()
    for name in ("out", "last_state", "du", "ddelta", "dz", "dinitial_state"):
        assert torch.equal(clean[name][0], dirty[name][0]), name
        assert torch.equal(clean[name][1, others], dirty[name][1, others]), name
    for name in ("dA", "dD", "ddelta_bias"):
        assert torch.equal(clean[name][others], dirty[name][others]), name
    for name in ("dB", "dC"):
        assert torch.equal(clean[name][0], dirty[name][0]), name


def test_nan_does_not_cross_the_boundary_of_packed_sequences(wide_device):
    cu_seqlens = torch.tensor([0, 200, 450, 600])
    tensors = make(dim=3, seqlen=600, cu_seqlens=cu_seqlens)
    clean = run_emulated(tensors, torch.float32, delta_softplus=True, cu_seqlens=cu_seqlens)
    tensors["u"][0, :, 210] = float("nan")
    dirty = run_emulated(tensors, torch.float32, delta_softplus=True, cu_seqlens=cu_seqlens)
    for name in ("out", "du", "ddelta", "dz", "dB", "dC"):
        assert torch.equal(clean[name][..., :200], dirty[name][..., :200]), name
        assert torch.equal(clean[name][..., 450:], dirty[name][..., 450:]), name
    for name in ("last_state", "dinitial_state"):
        assert torch.equal(clean[name][[0, 2]], dirty[name][[0, 2]]), name


def test_gradients_repeat_bit_for_bit():
    tensors = make(dim=140, dtype=torch.bfloat16)
    first, second = (run_emulated(tensors, torch.bfloat16, delta_softplus=True) for _ in range(2))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def test_large_and_small_step_sizes():
    tensors = make(seqlen=64)
    tensors["delta"] = 12 * tensors["delta"]  # beyond both ends of softplus
    check(tensors, delta_softplus=True)


def test_what_is_not_served_is_an_error():
    args = [None if t is None else t for t in make().values()]
    with pytest.raises(RuntimeError, match="CUDA error 1"):
        torch.ops.trifuse_emulated.selective_scan_fwd(*args, None, True, False, False, False, 0)


@pytest.mark.parametrize("state_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_state_update(dtype, state_dtype):
    check_update(dtype, state_dtype)


@pytest.mark.parametrize("dstate", [1, 5, 16, 20, 64])
def test_state_update_of_any_size_and_stride(dstate):
    for strided in (False, True):
        check_update(torch.float32, torch.float32, dstate=dstate, strided=strided)


def test_state_update_with_heads_and_groups():
    check_update(torch.bfloat16, torch.float32, shape=(6, 5), groups=3)
    check_update(torch.float32, torch.float32, shape=(12,), groups=4)


def test_state_update_reads_expanded_arguments_in_place():
    dt = torch.randn(3, 6, 1).expand(3, 6, 5)
    A = -torch.rand(6, 1, 1).expand(6, 5, 16)
    check_update(torch.float32, torch.float32, shape=(6, 5), dt=dt, A=A)


def test_state_update_bare():
    check_update(torch.float32, torch.float32, D=None, z=None, dt_bias=None, dt_softplus=False)


def test_state_update_leaves_padding_alone():
    check_update(torch.float32, torch.bfloat16, batch=4, indices=torch.tensor([5, -1, 0, -1]))


# The emulator itself.


def run_small(kernel, barrier, descending=0):
    out = torch.arange(64, dtype=torch.float32)
    library.trifuse_emulator_set_descending(descending)
    try:
        error = library.trifuse_emulator_run_small(kernel.encode(), ctypes.c_void_p(out.data_ptr()), barrier)
    finally:
        library.trifuse_emulator_set_descending(0)
    return error, out, library.trifuse_emulator_message().decode()


@pytest.mark.parametrize("descending", [0, 1])
def test_emulator_runs_a_correct_block(descending):
    error, out, message = run_small("mirror", 2, descending)
    assert (error, message) == (0, "")
    assert torch.equal(out, torch.arange(63, -1, -1, dtype=torch.float32))
    error, out, _ = run_small("warp_sum", 2, descending)
    assert error == 0
    assert torch.equal(out, torch.tensor([1520.0] * 32 + [496.0] * 32))


@pytest.mark.parametrize("kernel", ["mirror", "warp_sum"])
@pytest.mark.parametrize("descending", [0, 1])
def test_emulator_shows_a_missing_barrier(descending, kernel):
    error, out, _ = run_small(kernel, 0, descending)
    assert error == 0
    assert out.isnan().any()


def test_emulator_shows_a_missing_wait_for_a_copy():
    for barrier, wrong in ((2, False), (0, True)):
        error, out, _ = run_small("copy", barrier)
        assert error == 0
        assert out.isnan().all() == wrong


def test_emulator_reports_a_barrier_that_some_threads_skip():
    error, _, message = run_small("mirror", 1)
    assert error == 719
    assert "barrier" in message and "never reach" in message


def test_emulator_reports_a_write_past_shared_memory():
    assert run_small("overrun", 2)[0] == 0
    error, _, message = run_small("overrun", 0)
    assert error == 719
    assert "past its shared memory" in message


def test_emulator_recovers_after_an_error():
    run_small("mirror", 1)
    assert run_small("mirror", 2)[0] == 0
    check(make(seqlen=5), delta_softplus=True)
