"""What bad input gets: one error, before any kernel runs, the same whichever backend is asked for."""

import functools
import re

import pytest
import torch

import trifuse
from trifuse.backends import NAMES
from trifuse.ops.selective_scan import SCAN, prepare
from trifuse.ops.selective_state_update import UPDATE, prepare_update

BATCH, DIM, LENGTH, STATE, PACKED = 2, 6, 5, 3, 2


def scan_arguments(layout="bdl", batch=BATCH, dtype=torch.float32):
    def sequence(channels):
        return torch.randn((batch, channels, LENGTH) if layout == "bdl" else (batch, LENGTH, channels), dtype=dtype)

    return {
        "u": sequence(DIM), "delta": sequence(DIM), "A": -torch.rand(DIM, STATE), "B": sequence(STATE),
        "C": sequence(STATE), "D": torch.randn(DIM), "z": sequence(DIM), "delta_bias": torch.randn(DIM),
        "delta_softplus": True, "initial_state": torch.randn(batch, DIM, STATE), "layout": layout,
    }  # fmt: skip


def packed_arguments():
    arguments = scan_arguments(batch=1)
    arguments["initial_state"] = torch.randn(PACKED, DIM, STATE)
    return arguments | {"cu_seqlens": torch.tensor([0, 2, LENGTH])}


def update_arguments(heads=None):
    channels = (DIM,) if heads is None else (heads, DIM)
    return {
        "state": torch.randn(BATCH, *channels, STATE), "x": torch.randn(BATCH, *channels),
        "dt": torch.randn(BATCH, *channels), "A": -torch.rand(*channels, STATE), "B": torch.randn(BATCH, STATE),
        "C": torch.randn(BATCH, STATE), "D": torch.randn(*channels), "z": torch.randn(BATCH, *channels),
        "dt_bias": torch.randn(*channels), "dt_softplus": True,
    }  # fmt: skip


DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def on(device, arguments):
    """Copies of the tensors among the arguments, on a device."""
    return {k: v.to(device, copy=True) if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}


def available(op, prepare, arguments):
    """Every (device, backend) of this machine that serves the call."""
    calls = {device: prepare(**on(device, arguments)) for device in DEVICES}
    return [(device, name) for device in DEVICES for name in NAMES if not op.refusals[name](calls[device])]


SCAN_BACKENDS = available(SCAN, prepare, scan_arguments())
UPDATE_BACKENDS = available(UPDATE, prepare_update, update_arguments())


def assert_refused(function, arguments, error, message):
    """The call raises `error` with `message`, forced or not, and leaves every argument as it was."""
    before = {name: value.clone() for name, value in arguments.items() if isinstance(value, torch.Tensor)}
    with pytest.raises(error, match=message) as free:
        function(**arguments)
    assert type(free.value) is error
    for name in NAMES:
        with trifuse.backend(name), pytest.raises(error) as forced:
            function(**arguments)
        assert str(forced.value) == str(free.value), name
    for name, value in before.items():
        if not value.is_meta:
            torch.testing.assert_close(arguments[name], value, rtol=0, atol=0, equal_nan=True)


def zeros(*shape, **options):
    return torch.zeros(*shape, **options)


# argument, its bad value, the error, and what the message says after "selective_scan: "
SCAN_CASES = [
    # wrong rank
    ("u", zeros(2, 6), ValueError, "u has shape (2, 6); it must be (B, D, L)"),
    ("u", zeros(2, 6, 5, 1), ValueError, "u has shape (2, 6, 5, 1); it must be (B, D, L)"),
    ("delta", zeros(2, 6), ValueError, "delta has shape (2, 6); it must have the shape of u, (2, 6, 5)"),
    ("A", zeros(6), ValueError, "A has shape (6,); it must be (D, N)"),
    ("A", zeros(6, 3, 1), ValueError, "A has shape (6, 3, 1); it must be (D, N)"),
    ("B", zeros(3), ValueError, "B has shape (3,); it must be (D, N), (B, N, L) or (B, G, N, L)"),
    ("C", zeros(1, 2, 1, 3, 5), ValueError, "C has shape (1, 2, 1, 3, 5); it must be (D, N), (B, N, L) or"),
    ("D", zeros(6, 1), ValueError, "D has shape (6, 1); it must be (D,) = (6,)"),
    ("z", zeros(6), ValueError, "z has shape (6,); it must have the shape of u, (2, 6, 5)"),
    ("delta_bias", zeros(()), ValueError, "delta_bias has shape (); it must be (D,) = (6,)"),
    ("initial_state", zeros(6, 3), ValueError, "initial_state has shape (6, 3); it must be (B, D, N) = (2, 6, 3)"),
    # mismatched sizes
    ("delta", zeros(2, 6, 4), ValueError, "delta has shape (2, 6, 4); it must have the shape of u, (2, 6, 5)"),
    ("z", zeros(2, 5, 6), ValueError, "z has shape (2, 5, 6); it must have the shape of u, (2, 6, 5)"),
    ("A", zeros(5, 3), ValueError, "A has shape (5, 3); its first size must be D = 6"),
    ("B", zeros(6, 4), ValueError, "B has shape (6, 4); it must be (D, N) = (6, 3)"),
    ("B", zeros(1, 3, 5), ValueError, "B has batch 1, state size 3 and length 5; they must be B = 2, N = 3 and L = 5"),
    ("B", zeros(2, 4, 5), ValueError, "B has batch 2, state size 4 and length 5; they must be B = 2, N = 3 and L = 5"),
    ("C", zeros(2, 3, 6), ValueError, "C has batch 2, state size 3 and length 6; they must be B = 2, N = 3 and L = 5"),
    ("C", zeros(2, 2, 5, 3), ValueError, "C has batch 2, state size 5 and length 3; they must be B = 2, N = 3 and L"),
    ("D", zeros(5), ValueError, "D has shape (5,); it must be (D,) = (6,)"),
    ("delta_bias", zeros(1), ValueError, "delta_bias has shape (1,); it must be (D,) = (6,)"),
    ("initial_state", zeros(1, 6, 3), ValueError, "initial_state has shape (1, 6, 3); it must be (B, D, N) = (2, 6"),
    ("initial_state", zeros(2, 3, 6), ValueError, "initial_state has shape (2, 3, 6); it must be (B, D, N) = (2, 6"),
    # groups
    ("B", zeros(2, 4, 3, 5), ValueError, "B has 4 groups, which does not divide D = 6"),
    ("C", zeros(2, 12, 3, 5), ValueError, "C has 12 groups, which does not divide D = 6"),
    ("C", zeros(2, 0, 3, 5), ValueError, "C has 0 groups, which does not divide D = 6"),
    # mixed dtypes
    ("delta", zeros(2, 6, 5).half(), TypeError, "delta is float16; it must be float32 like u"),
    ("z", zeros(2, 6, 5).double(), TypeError, "z is float64; it must be float32 like u"),
    ("B", zeros(2, 3, 5).bfloat16(), TypeError, "B is bfloat16; it must be float32 like u"),
    ("C", zeros(2, 3, 5).half(), TypeError, "C is float16; it must be float32 like u"),
    ("C", zeros(6, 3).half(), TypeError, "C is float16; beside float32 sequences it must be float32"),
    ("A", zeros(6, 3).double(), TypeError, "A is float64; beside float32 sequences it must be float32"),
    ("D", zeros(6).bfloat16(), TypeError, "D is bfloat16; beside float32 sequences it must be float32"),
    ("delta_bias", zeros(6).double(), TypeError, "delta_bias is float64; beside float32 sequences it must be float32"),
    ("initial_state", zeros(2, 6, 3).half(), TypeError, "initial_state is float16; beside float32 sequences it must"),
    # integers, booleans, complex
    ("u", zeros(2, 6, 5).long(), TypeError, "u is int64; it must be one of float32, float16, bfloat16, float64"),
    ("u", zeros(2, 6, 5).cfloat(), TypeError, "u is complex64; it must be one of float32, float16, bfloat16, float64"),
    ("delta", zeros(2, 6, 5).int(), TypeError, "delta is int32; it must be float32 like u"),
    ("A", zeros(6, 3).long(), TypeError, "A is int64; beside float32 sequences it must be float32 or complex64"),
    ("B", zeros(2, 3, 5).long(), TypeError, "B is int64; it must be float32 like u"),
    ("C", zeros(6, 3).long(), TypeError, "C is int64; beside float32 sequences it must be float32"),
    ("D", zeros(6).bool(), TypeError, "D is bool; beside float32 sequences it must be float32"),
    ("delta_bias", zeros(6).int(), TypeError, "delta_bias is int32; beside float32 sequences it must be float32"),
    ("initial_state", zeros(2, 6, 3).int(), TypeError, "initial_state is int32; beside float32 sequences it must be"),
    ("B", zeros(6, 3).cfloat(), TypeError, "B is complex and A is real; make A complex or B real"),
    ("C", zeros(2, 3, 5).cfloat(), TypeError, "C is complex and A is real; make A complex or C real"),
    ("D", zeros(6).cfloat(), TypeError, "D is complex64; beside float32 sequences it must be float32"),
    ("initial_state", zeros(2, 6, 3).cfloat(), TypeError, "initial_state is complex64; beside float32 sequences it"),
    # not tensors
    ("u", [[[1.0]]], TypeError, "u is list; it must be a torch.Tensor"),
    ("delta", None, TypeError, "delta is NoneType; it must be a torch.Tensor"),
    ("D", 1.0, TypeError, "D is float; it must be a torch.Tensor or None"),
    ("cu_seqlens", [0, 5], TypeError, "cu_seqlens is list; it must be a torch.Tensor or None"),
    # options
    ("layout", "ldb", ValueError, "layout is 'ldb'; it must be \"bdl\" or \"bld\""),
    ("layout", None, ValueError, 'layout is None; it must be "bdl" or "bld"'),
    ("cu_seqlens", torch.tensor([0, 5]), ValueError, "cu_seqlens packs sequences in a batch of one, and the batch is"),
]  # fmt: skip
PACKED_CASES = [
    (torch.tensor([1, 2, 5]), ValueError, "cu_seqlens starts at 1; it must start at 0"),
    (torch.tensor([0, 2, 4]), ValueError, "cu_seqlens ends at 4; it must end at L = 5"),
    (torch.tensor([0, 2, 6]), ValueError, "cu_seqlens ends at 6; it must end at L = 5"),
    (torch.tensor([0, 6, 5]), ValueError, "cu_seqlens decreases from 6 to 5 at index 2"),
    (torch.tensor([0, -1, 5]), ValueError, "cu_seqlens decreases from 0 to -1 at index 1"),
    (torch.tensor([0]), ValueError, "cu_seqlens ends at 0; it must end at L = 5"),
    (torch.tensor([], dtype=torch.int64), ValueError, "cu_seqlens has shape (0,); it must be (S + 1,)"),
    (torch.tensor([[0, 2, 5]]), ValueError, "cu_seqlens has shape (1, 3); it must be (S + 1,)"),
    (torch.tensor(5), ValueError, "cu_seqlens has shape (); it must be (S + 1,)"),
    (torch.tensor([0.0, 2.0, 5.0]), TypeError, "cu_seqlens is float32; it must be int32 or int64"),
    (torch.tensor([0, 2, 5], dtype=torch.int16), TypeError, "cu_seqlens is int16; it must be int32 or int64"),
    (torch.tensor([0, 2, 5], device="meta"), ValueError, "cu_seqlens is on meta; it must be on cpu"),
]  # fmt: skip
UPDATE_CASES = [
    ("state", zeros(2, 6), ValueError, "state has shape (2, 6); it must be (R, D, N) or (R, H, P, N)"),
    ("state", zeros(3, 6, 3), ValueError, "state has 3 rows; without state_batch_indices it must have B = 2"),
    ("state", zeros(2, 5, 3), ValueError, "x has shape (2, 6); it must be (B, *state.shape[1:-1]) = (2, 5)"),
    ("state", zeros(2, 6, 3).int(), TypeError, "state is int32; it must be one of float32"),
    ("state", zeros(2, 6, 3).cfloat(), TypeError, "state is complex64; it must be one of float32"),
    ("x", zeros(2, 6, 1), ValueError, "x has shape (2, 6, 1); it must be (B, D)"),
    ("x", zeros(2, 6).long(), TypeError, "x is int64; it must be one of float32"),
    ("dt", zeros(2, 1), ValueError, "dt has shape (2, 1); it must have the shape of x, (2, 6)"),
    ("dt", zeros(2, 6).half(), TypeError, "dt is float16; it must be float32 like x"),
    ("A", zeros(3, 6), ValueError, "A has shape (3, 6); it must be (D, N) = (6, 3)"),
    ("A", zeros(6, 3).cfloat(), TypeError, "A is complex64; beside float32 sequences it must be float32"),
    ("B", zeros(3), ValueError, "B has shape (3,); it must be (B, N) or (B, G, N) with B = 2 and N = 3"),
    ("B", zeros(2, 4), ValueError, "B has shape (2, 4); it must be (B, N) or (B, G, N) with B = 2 and N = 3"),
    ("B", zeros(2, 4, 3), ValueError, "B has 4 groups, which does not divide D = 6"),
    ("C", zeros(2, 4, 3), ValueError, "C has 4 groups, which does not divide D = 6"),
    ("C", zeros(2, 0, 3), ValueError, "C has 0 groups, which does not divide D = 6"),
    ("C", zeros(2, 3).double(), TypeError, "C is float64; beside float32 sequences it must be float32"),
    ("B", zeros(2, 3).half(), TypeError, "B is float16; beside float32 sequences it must be float32"),
    ("D", zeros(3), ValueError, "D has shape (3,); it must be (D,) = (6,)"),
    ("D", zeros(6).int(), TypeError, "D is int32; beside float32 sequences it must be float32"),
    ("z", zeros(6), ValueError, "z has shape (6,); it must have the shape of x, (2, 6)"),
    ("dt_bias", zeros(6, 1), ValueError, "dt_bias has shape (6, 1); it must be (D,) = (6,)"),
    ("dt_bias", 0.5, TypeError, "dt_bias is float; it must be a torch.Tensor or None"),
    ("state_batch_indices", torch.tensor([0, 2]), ValueError, "state_batch_indices holds 2; state has only 2 rows"),
    ("state_batch_indices", torch.tensor([0]), ValueError, "state_batch_indices has shape (1,); it must be (B,) = (2"),
    ("state_batch_indices", torch.tensor([0.0, 1.0]), TypeError, "state_batch_indices is float32; it must be int32 or"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value", "error", "message"), SCAN_CASES)
def test_a_scan_argument_is_refused_by_name(name, value, error, message):
    arguments = scan_arguments() | {name: value}
    assert_refused(trifuse.selective_scan, arguments, error, re.escape("selective_scan: " + message))


@pytest.mark.parametrize(("offsets", "error", "message"), PACKED_CASES)
def test_offsets_of_packed_sequences_are_refused(offsets, error, message):
    arguments = packed_arguments() | {"cu_seqlens": offsets, "initial_state": None}
    assert_refused(trifuse.selective_scan, arguments, error, re.escape("selective_scan: " + message))


def test_the_initial_state_of_packed_sequences_has_a_row_per_sequence():
    arguments = packed_arguments() | {"initial_state": torch.zeros(1, DIM, STATE)}
    message = "selective_scan: initial_state has shape (1, 6, 3); it must be (S, D, N) = (2, 6, 3)"
    assert_refused(trifuse.selective_scan, arguments, ValueError, re.escape(message))


def test_the_other_layout_is_refused_in_its_own_words():
    u = torch.zeros(2, LENGTH)
    assert_refused(
        trifuse.selective_scan, scan_arguments("bld") | {"u": u}, ValueError, re.escape("it must be (B, L, D)")
    )
    assert_refused(
        trifuse.selective_scan, scan_arguments("bld") | {"B": torch.zeros(2, STATE, LENGTH)}, ValueError,
        re.escape("B has batch 2, state size 5 and length 3; they must be B = 2, N = 3 and L = 5 in the form (B, L"),
    )  # fmt: skip


@pytest.mark.parametrize("name", ["delta", "A", "B", "C", "D", "z", "delta_bias", "initial_state"])
def test_a_scan_argument_on_another_device_is_refused(name):
    arguments = scan_arguments()
    arguments[name] = arguments[name].to("meta")
    message = f"selective_scan: {name} is on meta; it must be on cpu like the sequences"
    assert_refused(trifuse.selective_scan, arguments, ValueError, message)


@pytest.mark.parametrize(("name", "value", "error", "message"), UPDATE_CASES)
def test_an_update_argument_is_refused_by_name(name, value, error, message):
    arguments = update_arguments() | {name: value}
    assert_refused(trifuse.selective_state_update, arguments, error, re.escape("selective_state_update: " + message))


@pytest.mark.parametrize("name", ["state", "dt", "A", "B", "C", "D", "z", "dt_bias", "state_batch_indices"])
def test_an_update_argument_on_another_device_is_refused(name):
    arguments = update_arguments() | {"state_batch_indices": torch.tensor([1, 0])}
    arguments[name] = arguments[name].to("meta")
    message = f"selective_state_update: {name} is on meta; it must be on cpu"
    assert_refused(trifuse.selective_state_update, arguments, ValueError, message)


def test_heads_are_checked_as_heads():
    arguments = update_arguments(heads=4) | {"C": torch.zeros(BATCH, 3, STATE)}
    message = "selective_state_update: C has 3 groups, which does not divide H = 4"
    assert_refused(trifuse.selective_state_update, arguments, ValueError, message)


def test_a_state_that_is_read_where_it_is_written_is_refused():
    arguments = update_arguments() | {"state": torch.zeros(1, DIM, STATE).expand(BATCH, DIM, STATE)}
    message = re.escape("selective_state_update: state has strides (0, 3, 1), so elements share memory")
    assert_refused(trifuse.selective_state_update, arguments, ValueError, message)


def test_a_backend_name_that_does_not_exist():
    for name in ("metal", "", None):
        message = f"there is no backend {name!r}; choose one of reference, cpp, cuda, triton"
        with pytest.raises(ValueError, match=message), trifuse.backend(name):
            pytest.fail("the block of an unknown backend was entered")


@pytest.mark.parametrize("call", ["scan", "update"])
def test_an_environment_variable_that_names_no_backend(monkeypatch, call):
    monkeypatch.setenv("TRIFUSE_BACKEND", "metal")
    arguments = scan_arguments() if call == "scan" else update_arguments()
    state = arguments["state"].clone() if call == "update" else None
    function = trifuse.selective_scan if call == "scan" else trifuse.selective_state_update
    with pytest.raises(ValueError, match="TRIFUSE_BACKEND: there is no backend 'metal'; choose one of reference, cpp"):
        function(**arguments)
    assert state is None or torch.equal(arguments["state"], state)
    with trifuse.backend("reference"):  # the nearer choice wins
        function(**arguments)


def test_explain_knows_its_ops():
    with pytest.raises(ValueError, match=r"there is no op 'selective_scam'; choose one of .*selective_scan"):
        trifuse.explain("selective_scam")


def test_a_forced_backend_never_falls_back():
    for name in (name for name in NAMES if ("cpu", name) not in SCAN_BACKENDS):
        with trifuse.backend(name), pytest.raises(trifuse.BackendUnavailable) as error:
            trifuse.selective_scan(**scan_arguments())
        assert f"backend '{name}' was asked for and cannot serve this call: " in str(error.value)
        assert "Backends that can: reference" in str(error.value)
    for name in (name for name in NAMES if ("cpu", name) not in UPDATE_BACKENDS):
        arguments = update_arguments()
        before = arguments["state"].clone()
        with trifuse.backend(name), pytest.raises(trifuse.BackendUnavailable):
            trifuse.selective_state_update(**arguments)
        assert torch.equal(arguments["state"], before)


# What a NaN or an infinity in one place may reach. Length and channels are no multiple of any
# vector or chunk, so that a leak through padding shows.
LONG, CHANNELS, GROUPS = 70, 10, 2
SICK_BATCH, SICK_CHANNEL = 1, 3
GRADIENTS = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "initial_state")


@functools.cache
def healthy_arguments(layout):
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(shape, generator=generator)

    u, delta, z = (random(BATCH, CHANNELS, LONG) for _ in range(3))
    B, C = (random(BATCH, GROUPS, STATE, LONG) for _ in range(2))
    if layout == "bld":
        u, delta, z = (one.transpose(1, 2).contiguous() for one in (u, delta, z))
        B, C = (one.permute(0, 3, 1, 2).contiguous() for one in (B, C))
    return {
        "u": u, "delta": delta, "A": -random(CHANNELS, STATE).exp(), "B": B, "C": C, "D": random(CHANNELS), "z": z,
        "delta_bias": random(CHANNELS), "delta_softplus": True, "return_last_state": True,
        "initial_state": random(BATCH, CHANNELS, STATE), "layout": layout,
    }  # fmt: skip


def outputs_and_gradients(arguments):
    """All results by name, sequences as (B, D, L) and coefficients as (B, G, N, L)."""
    arguments = on(arguments["u"].device, arguments)
    for name in GRADIENTS:
        arguments[name].requires_grad_()
    out, last_state = trifuse.selective_scan(**arguments)
    grads = torch.autograd.grad((out, last_state), [arguments[name] for name in GRADIENTS],
                                (torch.ones_like(out), torch.ones_like(last_state)))  # fmt: skip
    results = {"out": out.detach(), "last_state": last_state.detach()} | dict(zip(GRADIENTS, grads, strict=True))
    if arguments["layout"] == "bld":
        for name in ("out", "u", "delta", "z"):
            results[name] = results[name].transpose(1, 2)
        for name in ("B", "C"):
            results[name] = results[name].permute(0, 2, 3, 1)
    return results


def assert_only_reached(sick, healthy, batch, channel):
    """Whatever lies outside the batch item and the channel (None: all of them) is as it was."""
    for name, value in healthy.items():
        reached = torch.zeros_like(value, dtype=torch.bool)
        if name in ("B", "C"):
            group = slice(None) if channel is None else channel // (CHANNELS // GROUPS)
            reached[slice(None) if batch is None else batch, group] = True
        elif name in ("A", "D", "delta_bias"):  # summed over the batch
            reached[slice(None) if channel is None else channel] = True
        else:
            reached[slice(None) if batch is None else batch, slice(None) if channel is None else channel] = True
        torch.testing.assert_close(
            sick[name][~reached], value[~reached], msg=lambda text, name=name: f"{name} was reached: {text}"
        )


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")], ids=str)
@pytest.mark.parametrize("layout", ["bdl", "bld"])
@pytest.mark.parametrize(("device", "backend"), SCAN_BACKENDS)
def test_a_bad_value_stays_in_its_channel_and_batch_item(device, backend, layout, bad):
    with trifuse.backend(backend):
        arguments = on(device, healthy_arguments(layout))
        healthy = outputs_and_gradients(arguments)
        for name, position in (("u", 0), ("delta", LONG // 2), ("z", LONG - 1), ("initial_state", 0)):
            sick = on(device, arguments)
            place = (SICK_CHANNEL, position) if layout == "bdl" or name == "initial_state" else (position, SICK_CHANNEL)
            sick[name][SICK_BATCH][place] = bad
            assert_only_reached(outputs_and_gradients(sick), healthy, SICK_BATCH, SICK_CHANNEL)
        for name in ("A", "D", "delta_bias"):
            sick = arguments | {name: arguments[name].clone()}
            sick[name][SICK_CHANNEL] = bad
            assert_only_reached(outputs_and_gradients(sick), healthy, None, SICK_CHANNEL)


@pytest.mark.parametrize(("device", "backend"), SCAN_BACKENDS)
def test_a_bad_value_does_not_reach_back_in_time(device, backend):
    arguments = on(device, healthy_arguments("bdl"))
    sick = arguments | {"u": arguments["u"].clone()}
    sick["u"][SICK_BATCH, SICK_CHANNEL, 40] = float("nan")
    with trifuse.backend(backend):
        out, _ = trifuse.selective_scan(**sick)
        expected, _ = trifuse.selective_scan(**arguments)
    torch.testing.assert_close(out[..., :40], expected[..., :40])
    assert out[SICK_BATCH, SICK_CHANNEL, 40:].isnan().all()


@pytest.mark.parametrize(("device", "backend"), SCAN_BACKENDS)
def test_a_bad_value_stays_in_its_packed_sequence(device, backend):
    generator = torch.Generator().manual_seed(1)
    u, delta = torch.randn(2, 1, CHANNELS, LONG, generator=generator).to(device)
    B, C = torch.randn(2, 1, STATE, LONG, generator=generator).to(device)
    A, offsets = -torch.ones(CHANNELS, STATE, device=device), torch.tensor([0, 33, 50, LONG], device=device)
    sick = u.clone()
    sick[0, SICK_CHANNEL, 40] = float("inf")
    with trifuse.backend(backend):
        out = trifuse.selective_scan(sick, delta, A, B, C, delta_softplus=True, cu_seqlens=offsets)
        expected = trifuse.selective_scan(u, delta, A, B, C, delta_softplus=True, cu_seqlens=offsets)
    assert not out[0, SICK_CHANNEL, 40:50].isfinite().any()
    out[0, SICK_CHANNEL, 40:50] = expected[0, SICK_CHANNEL, 40:50]
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")], ids=str)
@pytest.mark.parametrize(("device", "backend"), UPDATE_BACKENDS)
def test_a_bad_value_stays_in_its_channel_of_a_state_update(device, backend, bad):
    torch.manual_seed(0)
    arguments = update_arguments()
    for name in ("state", "x", "dt", "z"):
        healthy, sick = on(device, arguments), on(device, arguments)
        sick[name][SICK_BATCH, SICK_CHANNEL] = bad
        with trifuse.backend(backend):
            expected, out = trifuse.selective_state_update(**healthy), trifuse.selective_state_update(**sick)
        for got, wanted in ((out, expected), (sick["state"], healthy["state"])):
            got[SICK_BATCH, SICK_CHANNEL] = wanted[SICK_BATCH, SICK_CHANNEL]
            torch.testing.assert_close(got, wanted)
