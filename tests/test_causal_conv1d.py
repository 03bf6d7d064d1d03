"""causal_conv1d: the reference against closed forms, then every kernel that this machine can run
against the reference. On a GPU the same statements are made of `cuda` and `triton`."""

import conv_cases
import pytest
import torch
import torch.nn.functional as F
from backends_here import cpp_only, kernels_of
from conv_cases import check, make, run
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import trifuse

PACKED = torch.tensor([0, 5, 5, 7, 38, 64, 100, 100])

kernels = kernels_of("cuda", "triton")
layouts = pytest.mark.parametrize("layout", ["bdl", "bld"])


@pytest.fixture(autouse=True)
def nan_in_fresh_memory(poisoned_memory):
    """Every test runs on poisoned allocations."""


# ---- the reference, against what can be computed by other means


@pytest.mark.parametrize("width", range(2, 9))
def test_reference_is_torch_conv1d(width):
    t = make(width=width, initial=False)
    with trifuse.backend("reference"):
        y, final = trifuse.causal_conv1d(**t, return_final_states=True, activation="swish")
    padded = F.pad(t["x"], (width - 1, 0))
    expected = F.silu(F.conv1d(padded, t["weight"][:, None], t["bias"], groups=20))
    torch.testing.assert_close(y, expected, rtol=1e-13, atol=1e-13)
    assert torch.equal(final, padded[:, :, -(width - 1) :])


def test_reference_weighs_a_single_one_with_the_weights_in_reverse():
    x = torch.zeros(1, 1, 9, dtype=torch.float64)
    x[0, 0, 3] = 1
    weight = torch.tensor([[1.0, 2.0, 3.0, 4.0]], dtype=torch.float64)
    with trifuse.backend("reference"):
        y = trifuse.causal_conv1d(x, weight)
    assert y[0, 0].tolist() == [0, 0, 0, 4, 3, 2, 1, 0, 0]


def test_reference_gradients_pass_gradcheck_twice():
    tensors = make(batch=2, dim=2, seqlen=6, width=3, dtype=torch.float64)
    names, values = list(tensors), [v.requires_grad_() for v in tensors.values()]
    seq_idx = torch.tensor([[0, 0, 0, 1, 1, -1], [-1, 2, 2, 2, 2, 2]])

    def conv(*args):
        return trifuse.causal_conv1d(
            **dict(zip(names, args, strict=True)), activation="silu", return_final_states=True, seq_idx=seq_idx
        )

    with trifuse.backend("reference"):
        assert torch.autograd.gradcheck(conv, values)
        assert torch.autograd.gradgradcheck(conv, values)


def test_reference_of_ids_is_the_reference_of_every_sequence_alone():
    t = make(batch=1, seqlen=20, initial=True)
    seq_idx = torch.tensor([[-1] * 2 + [3] * 7 + [-1] + [4] * 8 + [-1] * 2])
    with trifuse.backend("reference"):
        y, final = trifuse.causal_conv1d(**t, seq_idx=seq_idx, return_final_states=True)
        for start, end in ((2, 9), (10, 18)):
            alone = trifuse.causal_conv1d(t["x"][:, :, start:end], t["weight"], t["bias"])
            torch.testing.assert_close(y[:, :, start:end], alone)
    assert not y[:, :, [0, 1, 9, 18, 19]].any()
    assert torch.equal(final, t["x"][:, :, 15:18])


# ---- every kernel


@kernels
@layouts
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_all_options_at_once(backend, device, dtype, named, packed, layout):
    cu_seqlens = PACKED if packed else None
    tensors = make(seqlen=100, layout=layout, dtype=dtype, cu_seqlens=cu_seqlens)
    seq_idx = conv_cases.ids(1 if packed else 2, 100) if named else None
    check(backend, tensors, dtype, device, cu_seqlens=cu_seqlens, seq_idx=seq_idx, layout=layout, activation="silu")


@kernels
def test_bare_call_needs_no_optional_argument(backend, device):
    check(backend, make(bias=False, initial=False), device=device, final_grad=False)


@kernels
@layouts
@pytest.mark.parametrize("seqlen", [0, 1, 2, 3, 15, 16, 17, 63, 64, 65, 255, 256, 257, 1000, 1025])
def test_lengths_around_a_piece(backend, device, seqlen, layout):
    check(backend, make(seqlen=seqlen, layout=layout), device=device, activation="silu", layout=layout)


@kernels
@layouts
@pytest.mark.parametrize("width", range(2, 9))
def test_every_width(backend, device, width, layout):
    tensors = make(width=width, seqlen=70, dim=40, layout=layout)
    seq_idx = conv_cases.ids(2, 70, mean=20)
    for options in ({"activation": "silu"}, {"seq_idx": seq_idx}):
        check(backend, tensors, device=device, layout=layout, **options)


@kernels
@layouts
@pytest.mark.parametrize("dim", [1, 7, 16, 31, 33, 511, 512, 513, 1030])
def test_channels_around_a_block(backend, device, dim, layout):
    check(backend, make(dim=dim, seqlen=20, layout=layout), device=device, activation="silu", layout=layout)


@kernels
def test_strided_and_expanded_inputs(backend, device):
    base = make(dim=32, seqlen=40)
    interleaved = base["x"].repeat_interleave(3, dim=2)[:, :, ::3]
    half = torch.cat([base["x"], base["x"]], dim=1)[:, 32:]
    turned = base["x"].transpose(1, 2).contiguous().transpose(1, 2)
    one_channel = base["x"][:, :1].expand(-1, 32, -1)
    one_item = base["x"][:1].expand(2, -1, -1)
    for x in (interleaved, half, turned, one_channel, one_item):
        strided = {"x": x, "weight": base["weight"].t().contiguous().t(), "bias": base["bias"][:1].expand(32),
                   "initial_states": base["initial_states"][:1].expand(2, -1, -1)}  # fmt: skip
        check(backend, strided, device=device, activation="silu")


@kernels
def test_a_transposed_input_gives_an_output_transposed_alike(backend, device):
    x = make(dim=32, seqlen=40, layout="bld")["x"].float().to(device)
    weight = torch.randn(32, 4, device=device)
    with trifuse.backend(backend):
        y = trifuse.causal_conv1d(x.transpose(1, 2), weight)
        assert y.stride() == x.transpose(1, 2).stride()
        assert torch.equal(y.transpose(1, 2), trifuse.causal_conv1d(x, weight, layout="bld"))


@kernels
@layouts
def test_an_expanded_output_gradient(backend, device, layout):
    tensors = {k: v.float().to(device).requires_grad_() for k, v in make(seqlen=70, dim=32, layout=layout).items()}
    grads = []
    for name in ("reference", backend):
        with trifuse.backend(name):
            y = trifuse.causal_conv1d(**tensors, activation="silu", layout=layout)
        grads.append(torch.autograd.grad(y.sum(), list(tensors.values())))
    for expected, found in zip(*grads, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@kernels
def test_empty_batch_and_no_sequences(backend, device):
    results = run(backend, make(batch=0), torch.float32, device=device, activation="silu")
    assert results["y"].shape == (0, 20, 37) and results["final_states"].shape == (0, 20, 3)
    assert not results["dweight"].any() and not results["dbias"].any()
    cu_seqlens = torch.tensor([0])
    results = run(backend, make(seqlen=0, cu_seqlens=cu_seqlens), torch.float32, device=device, cu_seqlens=cu_seqlens)
    assert results["final_states"].shape == results["dinitial_states"].shape == (0, 20, 3)
    assert not results["dweight"].any() and not results["dbias"].any()


@kernels
@layouts
def test_gradients_of_the_final_states_alone(backend, device, layout):
    """They reach the last inputs and, where the sequence is shorter than the window, the initial states."""
    for seqlen in (0, 1, 2, 3, 40):
        tensors = make(seqlen=seqlen, layout=layout)
        args = {k: v.float().to(device).requires_grad_() for k, v in tensors.items()}
        with trifuse.backend(backend):
            _, final = trifuse.causal_conv1d(**args, return_final_states=True, activation="silu", layout=layout)
        weights = torch.arange(final.numel(), dtype=torch.float32, device=device).view_as(final)
        (final * weights).sum().backward()
        dx = args["x"].grad if layout == "bdl" else args["x"].grad.transpose(1, 2)
        assert torch.equal(torch.cat([args["initial_states"].grad, dx], dim=2)[:, :, -3:], weights)
        assert not torch.cat([args["initial_states"].grad, dx], dim=2)[:, :, :-3].any()


@kernels
@layouts
def test_pieces_give_what_the_whole_gives(backend, device, layout):
    tensors = make(seqlen=100, layout=layout)
    time = 1 if layout == "bld" else 2
    whole = run(backend, tensors, torch.float32, grads=False, device=device, layout=layout, activation="silu")
    states, ys, at = tensors["initial_states"], [], 0
    for size in (1, 2, 61, 3, 0, 33):
        piece = dict(tensors, x=tensors["x"].narrow(time, at, size), initial_states=states)
        part = run(backend, piece, torch.float32, grads=False, device=device, layout=layout, activation="silu")
        ys.append(part["y"])
        states, at = part["final_states"].double(), at + size
    torch.testing.assert_close(torch.cat(ys, dim=time), whole["y"])
    assert torch.equal(states.float(), whole["final_states"])


@kernels
@layouts
def test_packed_pieces_with_states_give_what_the_whole_gives(backend, device, layout):
    """Three texts of unequal length, read in two packed calls that cut each of them somewhere."""
    lengths, cuts = (30, 2, 50), (11, 1, 49)
    texts = [make(batch=1, seqlen=n, seed=n, layout=layout)["x"] for n in lengths]
    base = make(batch=3, layout=layout)
    time = 1 if layout == "bld" else 2

    def call(xs, states):
        cu_seqlens = torch.tensor([0, *torch.tensor([x.shape[time] for x in xs]).cumsum(0)])
        tensors = {"x": torch.cat(xs, dim=time), "weight": base["weight"], "bias": base["bias"],
                   "initial_states": states}  # fmt: skip
        found = run(backend, tensors, torch.float32, grads=False, device=device, layout=layout, cu_seqlens=cu_seqlens)
        return found["y"].split([x.shape[time] for x in xs], dim=time), found["final_states"]

    whole, final = call(texts, base["initial_states"])
    first, states = call([x.narrow(time, 0, c) for x, c in zip(texts, cuts, strict=True)], base["initial_states"])
    second, states = call(
        [x.narrow(time, c, x.shape[time] - c) for x, c in zip(texts, cuts, strict=True)], states.double()
    )
    assert torch.equal(states, final)
    for a, b, expected in zip(first, second, whole, strict=True):
        torch.testing.assert_close(torch.cat([a, b], dim=time), expected)


@kernels
@layouts
def test_padding_on_either_side_changes_nothing(backend, device, layout):
    tensors = make(batch=1, seqlen=21, layout=layout, initial=False)
    time = 1 if layout == "bld" else 2
    alone = run(backend, tensors, torch.float32, device=device, layout=layout, activation="silu", final_grad=False)
    for left, right in ((5, 0), (0, 5), (2, 30)):
        shape = list(tensors["x"].shape)
        pieces = []
        for size in (left, right):
            shape[time] = size
            pieces.append(torch.full(shape, float("nan"), dtype=torch.float64))
        padded = dict(tensors, x=torch.cat([pieces[0], tensors["x"], pieces[1]], dim=time))
        seq_idx = torch.tensor([[-1] * left + [0] * 21 + [-1] * right])
        found = run(
            backend,
            padded,
            torch.float32,
            device=device,
            layout=layout,
            activation="silu",
            seq_idx=seq_idx,
            grads=False,
        )
        torch.testing.assert_close(found["y"].narrow(time, left, 21), alone["y"], rtol=1e-6, atol=1e-6)
        assert torch.equal(found["final_states"], alone["final_states"])
        assert not found["y"].narrow(time, 0, left).any() and not found["y"].narrow(time, left + 21, right).any()


@kernels
@layouts
def test_padding_of_nan_has_no_gradient_and_spoils_none(backend, device, layout):
    seq_idx = torch.tensor([[-1] * 3 + [0] * 9 + [-1] * 2 + [4] * 20 + [-1] * 3])
    options = {"layout": layout, "activation": "silu", "seq_idx": seq_idx}
    tensors = make(batch=1, layout=layout)
    spoilt = tensors["x"].clone()
    (spoilt if layout == "bld" else spoilt.transpose(1, 2))[seq_idx < 0] = float("nan")
    for one, on in (("reference", "cpu"), (backend, device)):
        clean = run(one, tensors, torch.float32, device=on, **options)
        found = run(one, dict(tensors, x=spoilt), torch.float32, device=on, **options)
        for name, value in clean.items():
            assert torch.equal(found[name], value), (one, name)
        dx = found["dx"] if layout == "bld" else found["dx"].transpose(1, 2)
        assert not dx[seq_idx < 0].any() and dx[seq_idx >= 0].any(), one


def _spoil(x, layout, position, bad):
    x = x.clone()
    (x if layout == "bdl" else x.transpose(1, 2))[0, 3, position] = bad
    return x


@kernels
@layouts
@pytest.mark.parametrize("how", ["cu_seqlens", "seq_idx"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")], ids=str)
def test_nan_stays_in_its_packed_sequence(backend, device, bad, how, layout):
    bounds = [0, 3, 20, 21, 57]
    cu_seqlens = torch.tensor(bounds)
    options = {"layout": layout, "activation": "silu"}
    if how == "cu_seqlens":
        options["cu_seqlens"] = cu_seqlens
        tensors = make(batch=1, seqlen=57, layout=layout, cu_seqlens=cu_seqlens)
    else:
        options["seq_idx"] = torch.repeat_interleave(torch.arange(4), cu_seqlens.diff())[None]
        tensors = make(batch=1, seqlen=57, layout=layout)
    clean = run(backend, tensors, torch.float32, device=device, **options)
    for sequence, position in ((0, 2), (1, 3), (1, 19), (2, 20), (3, 30)):
        found = run(
            backend,
            dict(tensors, x=_spoil(tensors["x"], layout, position, bad)),
            torch.float32,
            device=device,
            **options,
        )
        keep = torch.ones(20, 57, dtype=torch.bool)
        keep[3, bounds[sequence] : bounds[sequence + 1]] = False
        for name in ("y", "dx"):
            a, b = (r[name][0] if layout == "bdl" else r[name][0].t() for r in (found, clean))
            assert torch.equal(a[keep], b[keep]), (name, position)
        channels = torch.arange(20) != 3
        for name in ("dweight", "dbias"):
            assert torch.equal(found[name][channels], clean[name][channels]), name


@kernels
@layouts
def test_nan_does_not_reach_back_in_time_or_beyond_the_window(backend, device, layout):
    for width in (2, 4, 5, 8):
        tensors = make(seqlen=60, width=width, layout=layout)
        clean, found = (
            run(backend, dict(tensors, x=x), torch.float32, device=device, grads=False, layout=layout)["y"]
            for x in (tensors["x"], _spoil(tensors["x"], layout, 30, float("nan")))
        )
        wrong = ~(clean == found)
        wrong = (wrong if layout == "bdl" else wrong.transpose(1, 2)).nonzero().tolist()
        assert wrong == [[0, 3, 30 + i] for i in range(width)]


@kernels
@layouts
def test_deterministic_gradients_are_bitwise_repeatable(backend, device, layout):
    tensors = make(dim=96, seqlen=700, layout=layout)
    first, second = (
        run(backend, tensors, torch.float32, device=device, activation="silu", deterministic=True, layout=layout)
        for _ in range(2)
    )
    for name in first:
        assert torch.equal(first[name], second[name]), name


@st.composite
def cases(draw):
    dtype = draw(st.sampled_from([torch.float32, torch.float32, torch.bfloat16, torch.float16]))
    layout = draw(st.sampled_from(["bdl", "bld"]))
    seqlen = draw(st.integers(0, 90))
    packed, named = draw(st.booleans()), draw(st.booleans())
    cu_seqlens = None
    if packed:
        cuts = draw(st.lists(st.integers(0, seqlen), max_size=5))
        cu_seqlens = torch.tensor([0, *sorted(cuts), seqlen])
    tensors = make(
        batch=draw(st.integers(1, 3)), dim=draw(st.integers(1, 40)), seqlen=seqlen, width=draw(st.integers(2, 8)),
        layout=layout, dtype=dtype, seed=draw(st.integers(0, 1000)), bias=draw(st.booleans()),
        initial=draw(st.booleans()), cu_seqlens=cu_seqlens,
    )  # fmt: skip
    options = {
        "cu_seqlens": cu_seqlens, "layout": layout, "activation": draw(st.sampled_from([None, "silu"])),
        "final_grad": draw(st.booleans()),
    }  # fmt: skip
    if named:
        options["seq_idx"] = conv_cases.ids(
            tensors["x"].shape[0], seqlen, seed=draw(st.integers(0, 1000)), mean=draw(st.sampled_from([1, 3, 20, 200]))
        )
    return tensors, dtype, options


@kernels
@given(case=cases())
@settings(max_examples=80, deadline=None, derandomize=True,
          suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])  # fmt: skip
def test_any_call_keeps_the_tolerance(backend, device, case):
    tensors, dtype, options = case
    check(backend, tensors, dtype, device, **options)


# ---- what only the CPU kernels do


@cpp_only
@layouts
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_every_instruction_set(isa, dtype, layout):
    tensors = make(dim=37, seqlen=300, layout=layout, dtype=dtype)
    check("cpp", tensors, dtype, layout=layout, activation="silu")
    seq_idx = conv_cases.ids(2, 300, mean=40)
    check("cpp", tensors, dtype, layout=layout, activation="silu", seq_idx=seq_idx)
    cu_seqlens = torch.tensor([0, 1, 100, 102, 102, 299, 300])
    tensors = make(dim=37, seqlen=300, layout=layout, dtype=dtype, cu_seqlens=cu_seqlens, width=5)
    check("cpp", tensors, dtype, layout=layout, cu_seqlens=cu_seqlens)


@cpp_only
@layouts
def test_the_number_of_threads_changes_no_bit(threads, layout):
    tensors = make(dim=520, seqlen=1100, layout=layout)
    results = []
    for count in (1, 2, 3, 7):
        threads(count)
        results.append(run("cpp", tensors, torch.float32, layout=layout, activation="silu"))
    for other in results[1:]:
        for name in other:
            assert torch.equal(other[name], results[0][name]), name


@cpp_only
@layouts
def test_cpp_gradients_pass_gradcheck(layout):
    tensors = make(batch=2, dim=3, seqlen=35, dtype=torch.float64, layout=layout)
    names, values = list(tensors), [v.requires_grad_() for v in tensors.values()]
    seq_idx = conv_cases.ids(2, 35)

    def conv(*args):
        return trifuse.causal_conv1d(
            **dict(zip(names, args, strict=True)), activation="silu", return_final_states=True, layout=layout,
            seq_idx=seq_idx,
        )  # fmt: skip

    with trifuse.backend("cpp"):
        assert torch.autograd.gradcheck(conv, values, fast_mode=True)


@cpp_only
def test_extreme_inputs_reach_the_limits_of_silu():
    x = torch.tensor([-1e30, -200.0, -90.0, -88.0, -20.0, 0.0, 20.0, 88.0, 90.0, 200.0, 1e30, float("inf")] * 4)
    weight = torch.tensor([[0.0, 1.0]])
    for layout, shape in (("bdl", (1, 1, -1)), ("bld", (1, -1, 1))):
        with trifuse.backend("cpp"):
            y = trifuse.causal_conv1d(x[:11].view(shape), weight, activation="silu", layout=layout).flatten()
        torch.testing.assert_close(y, F.silu(x[:11].double()).float(), rtol=1e-6, atol=1e-34)


@cpp_only
def test_what_is_saved_for_the_backward_pass_is_the_inputs():
    saved = []
    tensors = {k: v.float().requires_grad_() for k, v in make().items()}
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.data_ptr()) or x, lambda x: x)
    with hooks, trifuse.backend("cpp"):
        trifuse.causal_conv1d(**tensors, activation="silu")
    assert set(saved) == {x.data_ptr() for x in tensors.values()}
