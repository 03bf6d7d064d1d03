"""ssd: the reference against closed forms and against selective_scan, then every kernel that this machine can
run against the reference. On a GPU the same statements are made of `triton`."""

import math
import subprocess
import sys
import textwrap

import pytest
import torch
from backends_here import cpp_only, kernels_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ssd_cases import check, make, run
from tolerance import error

import trifuse

PACKED = torch.tensor([0, 5, 5, 38, 64, 150, 150])

kernels = kernels_of("triton")


@pytest.fixture(autouse=True)
def nan_in_fresh_memory(poisoned_memory):
    """Every test runs on poisoned allocations."""


def runs_of(batch, seqlen, seed=0):
    """seq_idx with runs of random lengths; a value may come back."""
    g = torch.Generator().manual_seed(seed)
    change = torch.rand(batch, seqlen, generator=g) < 0.06
    return change.cumsum(1) % 3


# ---- the reference, against what can be computed by hand


def test_reference_is_a_geometric_sum_for_constant_input():
    L, a, dt = 50, -0.7, 0.3
    ones = torch.ones(1, L, 1, 1, dtype=torch.float64)
    with trifuse.backend("reference"):
        out, final = trifuse.ssd(
            ones, dt * ones[..., 0], a * ones[0, 0, 0], ones, 2 * ones, D=5 * ones[0, 0, 0], return_final_states=True
        )
    decay = math.exp(a * dt) ** torch.arange(1, L + 1, dtype=torch.float64)
    state = dt * (1 - decay) / (1 - math.exp(a * dt))
    torch.testing.assert_close(out[0, :, 0, 0], 2 * state + 5, rtol=1e-13, atol=0)
    torch.testing.assert_close(final[0, 0, 0, 0], state[-1], rtol=1e-13, atol=0)


def test_reference_clamps_the_step_after_the_softplus():
    dt = torch.tensor([-3.0, 0.1, 5.0], dtype=torch.float64).reshape(1, 3, 1).requires_grad_()
    ones = torch.ones(1, 3, 1, 1, dtype=torch.float64)
    with trifuse.backend("reference"):
        out = trifuse.ssd(ones, dt, -1e9 * ones[0, 0, 0], ones, ones, dt_softplus=True, dt_limit=(0.5, 2.0))
    soft = torch.nn.functional.softplus(dt.detach()).flatten()
    torch.testing.assert_close(out.flatten(), soft.clamp(0.5, 2.0))  # a state lasts one step
    (grad,) = torch.autograd.grad(out.sum(), dt)
    assert grad[0, 0, 0] == 0 and grad[0, 2, 0] == 0 and grad[0, 1, 0] > 0


@pytest.mark.parametrize(
    "options",
    [{}, {"seq_idx": torch.tensor([[0, 0, 1]])}, {"cu_seqlens": torch.tensor([0, 2, 3])}],
    ids=["plain", "seq_idx", "cu_seqlens"],
)
def test_reference_gradients_pass_gradcheck_twice(options):
    rows = 2 if "cu_seqlens" in options else 1
    tensors = make(batch=1, seqlen=3, heads=1, headdim=2, dstate=2, gate=True, dtype=torch.float64, rows=rows)
    names, values = list(tensors), [value.requires_grad_() for value in tensors.values()]

    def function(*args):
        given = dict(zip(names, args, strict=True))
        return trifuse.ssd(**given, dt_softplus=True, return_final_states=True, **options)

    with trifuse.backend("reference"):
        assert torch.autograd.gradcheck(function, values)
        assert torch.autograd.gradgradcheck(function, values)


def as_scan(tensors, seqlen_first=False):
    """The arguments of selective_scan that say the same: every channel of a head has the head's step and decay."""
    x, dt, B = tensors["x"], tensors["dt"], tensors["B"]
    heads, headdim, dstate = x.shape[2], x.shape[3], B.shape[3]

    def per_channel(weight):
        return weight.reshape(heads, -1).expand(heads, headdim).reshape(-1)

    return {
        "u": x.flatten(2), "delta": dt[..., None].expand(x.shape).flatten(2),
        "A": per_channel(tensors["A"])[:, None].expand(-1, dstate), "B": B, "C": tensors["C"],
        "D": per_channel(tensors["D"]), "z": tensors["z"].flatten(2), "delta_bias": per_channel(tensors["dt_bias"]),
        "initial_state": tensors["initial_states"].flatten(1, 2),
    }  # fmt: skip


@pytest.mark.parametrize("backend", ["reference", pytest.param("cpp", marks=cpp_only)])
@pytest.mark.parametrize("cu_seqlens", [None, PACKED], ids=["plain", "packed"])
def test_ssd_is_selective_scan_with_expanded_arguments(backend, cu_seqlens):
    packed = cu_seqlens is not None
    tensors = make(batch=1 if packed else 2, seqlen=150, groups=2, gate=True, dtype=torch.float64, skip="HP",
                   rows=len(PACKED) - 1 if packed else None)  # fmt: skip
    values = {name: value.requires_grad_() for name, value in tensors.items()}
    with trifuse.backend(backend):
        ours = trifuse.ssd(**values, dt_softplus=True, cu_seqlens=cu_seqlens, return_final_states=True)
        out, final = trifuse.selective_scan(
            **as_scan(values), delta_softplus=True, return_last_state=True, cu_seqlens=cu_seqlens, layout="bld"
        )
    theirs = out.unflatten(2, (4, 8)), final.unflatten(1, (4, 8))
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)
    grads = [torch.autograd.grad([one.square().sum() for one in two], list(values.values())) for two in (ours, theirs)]
    torch.testing.assert_close(*grads, rtol=1e-10, atol=1e-10)


# ---- every kernel against the reference


@kernels
@pytest.mark.parametrize("seqlen", [0, 1, 3, 16, 63, 64, 65, 129, 1000])
def test_lengths(backend, device, seqlen):
    check(backend, make(seqlen=seqlen, batch=1 if seqlen == 1000 else 2, heads=3), device=device, dt_softplus=True)


@kernels
@pytest.mark.parametrize("heads, headdim, dstate", [(1, 1, 1), (3, 5, 7), (2, 64, 128), (1, 128, 16), (5, 20, 33)])
@pytest.mark.parametrize("initial", [False, True])
def test_sizes(request, backend, device, heads, headdim, dstate, initial):
    if (backend, headdim, initial) == ("cpp", 128, False):
        reason = "cpp: dA of one head, a single number, is 25 % past the tolerance (4.6e-5, allowed 3.7e-5)"
        request.applymarker(pytest.mark.xfail(reason=reason))
    tensors = make(heads=heads, headdim=headdim, dstate=dstate, seqlen=70, initial=initial, batch=1)
    check(backend, tensors, device=device, dt_softplus=True, chunk_size=32)


@kernels
@pytest.mark.parametrize("groups", [1, 2, 3, 6])
def test_heads_read_their_own_group(backend, device, groups):
    check(backend, make(heads=6, groups=groups, seqlen=40), device=device, dt_softplus=True, chunk_size=16)


@kernels
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("wide_dt", [False, True])
def test_half_precision(backend, device, dtype, wide_dt):
    tensors = make(seqlen=70, dtype=dtype, wide_dt=wide_dt, gate=True)
    check(backend, tensors, dtype, device, wide_dt, dt_softplus=True, chunk_size=32)


@kernels
@pytest.mark.parametrize("skip", ["", "H", "HP"])
@pytest.mark.parametrize("gate", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_options(backend, device, skip, gate, bias):
    check(backend, make(skip=skip, gate=gate, bias=bias), device=device, dt_softplus=True, chunk_size=16)


@kernels
@pytest.mark.parametrize("softplus", [False, True])
def test_step_limits(backend, device, softplus):
    check(backend, make(seqlen=70), device=device, dt_softplus=softplus, dt_limit=(0.3, 1.2), chunk_size=32)


@kernels
@pytest.mark.parametrize("chunk_size", [None, 16, 64])
def test_packed_sequences(backend, device, chunk_size):
    tensors = make(batch=1, seqlen=150, rows=len(PACKED) - 1, gate=True)
    check(backend, tensors, device=device, dt_softplus=True, cu_seqlens=PACKED, chunk_size=chunk_size)


@kernels
@pytest.mark.parametrize("initial", [False, True])
def test_the_state_restarts_where_seq_idx_changes(backend, device, initial):
    tensors = make(seqlen=150, initial=initial)
    check(backend, tensors, device=device, dt_softplus=True, seq_idx=runs_of(2, 150), chunk_size=32)


@kernels
def test_packed_sequences_with_seq_idx(backend, device):
    tensors = make(batch=1, seqlen=150, rows=len(PACKED) - 1)
    options = {"cu_seqlens": PACKED.int(), "seq_idx": runs_of(1, 150), "chunk_size": 32}
    check(backend, tensors, device=device, dt_softplus=True, **options)


@kernels
@pytest.mark.parametrize("final_grad", [False, True])
def test_gradients_with_and_without_those_of_the_final_states(backend, device, final_grad):
    check(backend, make(seqlen=70), device=device, dt_softplus=True, final_grad=final_grad, chunk_size=32)


@kernels
def test_strided_and_expanded_inputs(backend, device):
    tensors = make(seqlen=40, headdim=16, gate=True)
    tensors["x"] = tensors["x"].repeat_interleave(3, dim=3)[..., ::3]
    tensors["z"] = torch.cat([tensors["z"], tensors["z"]], dim=2)[:, :, :4]
    tensors["dt"] = tensors["dt"][..., :1].expand(-1, -1, 4)
    tensors["B"] = tensors["B"].transpose(1, 3).contiguous().transpose(1, 3)
    tensors["C"] = tensors["C"][:1].expand(2, -1, -1, -1)
    check(backend, tensors, device=device, dt_softplus=True, chunk_size=16)


@kernels
def test_empty_batch(backend, device):
    results = run(backend, make(batch=0), torch.float32, device=device, dt_softplus=True)
    assert results["out"].shape == (0, 37, 4, 8)
    assert results["final_states"].shape == (0, 4, 8, 16)
    for name in ("dA", "dD", "ddt_bias"):
        assert not results[name].any(), name


@kernels
@pytest.mark.parametrize("skip", ["H", "HP"])
def test_no_heads(backend, device, skip):
    tensors = make(heads=0, skip=skip, gate=True)
    for one in ("reference", backend):
        results = run(one, tensors, torch.float32, device=device)
        assert results["out"].shape == (2, 37, 0, 8) and results["dD"].shape == tensors["D"].shape
        assert not results["dB"].any() and not results["dC"].any()


@kernels
def test_no_packed_sequence(backend, device):
    tensors = make(batch=1, seqlen=0, initial=False)
    results = run(backend, tensors, torch.float32, device=device, cu_seqlens=torch.tensor([0]))
    assert results["out"].shape == (1, 0, 4, 8) and results["final_states"].shape == (0, 4, 8, 16)
    assert not results["dA"].any()


@kernels
def test_extreme_step_sizes(backend, device):
    tensors = make(seqlen=64)
    tensors["dt"] = (tensors["dt"] * 40).float().double()
    check(backend, tensors, device=device, dt_softplus=True)


@kernels
def test_long_slow_decays_stay_exact(backend, device):
    """Decays over a chunk are differences of long sums: their rounding must not grow with the sums."""
    tensors = make(batch=1, seqlen=600, heads=2, headdim=4, dstate=4)
    tensors["A"] = torch.tensor([-1e-3, -3.0], dtype=torch.float64).float().double()
    check(backend, tensors, device=device, dt_softplus=True)


@kernels
def test_growing_states_stay_right(backend, device):
    tensors = make(seqlen=40)
    tensors["A"] = tensors["A"].abs() * 0.1
    check(backend, tensors, device=device, dt_softplus=True, chunk_size=16)


@kernels
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["x", "B", "C", "dt"])
def test_nan_stays_in_its_sequence(backend, device, name, bad):
    """Sequence 1 is positions 20 to 44 of 60, its neighbours share chunks with it."""
    cu_seqlens = torch.tensor([0, 20, 45, 60])
    tensors = make(batch=1, seqlen=60, rows=3)
    options = {"device": device, "cu_seqlens": cu_seqlens, "dt_softplus": True, "chunk_size": 32}
    clean = run(backend, tensors, torch.float32, **options)
    spoiled = dict(tensors, **{name: tensors[name].clone()})
    spoiled[name][0, 30] = bad
    found = run(backend, spoiled, torch.float32, **options)
    others = torch.ones(60, dtype=torch.bool)
    others[20:45] = False
    for one in ("out", "dx", "ddt", "dB", "dC"):
        assert torch.equal(found[one][:, others], clean[one][:, others]), one
    for one in ("final_states", "dinitial_states"):
        assert torch.equal(found[one][[0, 2]], clean[one][[0, 2]]), one
    assert not found["out"][0, 30].isfinite().all()
    assert torch.equal(found["out"][:, :30], clean["out"][:, :30]), "the past has changed"


@kernels
def test_chunk_size_changes_rounding_only(backend, device):
    tensors = make(seqlen=200, gate=True)
    runs = [run(backend, tensors, torch.float32, device=device, dt_softplus=True, chunk_size=size)
            for size in (None, 1, 16, 50, 256, 10**6)]  # fmt: skip
    for one in runs[1:]:
        for name, value in runs[0].items():
            largest = value.abs().max().item()
            torch.testing.assert_close(one[name], value, rtol=1e-5, atol=2e-6 * largest, msg=name)


@kernels
def test_pieces_give_what_the_whole_gives(backend, device):
    tensors = make(seqlen=300)
    whole = run(backend, tensors, torch.float32, grads=False, device=device, dt_softplus=True)
    state, outs, at = tensors["initial_states"], [], 0
    for size in (1, 2, 128, 161, 8):
        piece = {k: v[:, at : at + size] if k in ("x", "dt", "B", "C") else v for k, v in tensors.items()}
        part = run(backend, dict(piece, initial_states=state), torch.float32, grads=False, device=device,
                   dt_softplus=True)  # fmt: skip
        outs.append(part["out"])
        state, at = part["final_states"].double(), at + size
    torch.testing.assert_close(torch.cat(outs, 1), whole["out"], rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(state.float(), whole["final_states"], rtol=2e-5, atol=2e-5)


@kernels
def test_a_decode_step_continues_the_sequence(backend, device):
    tensors = {k: None if v is None else v.float().to(device) for k, v in make(seqlen=6, groups=2, gate=True).items()}
    heads, headdim, dstate = 4, 8, 16
    whole, final = trifuse.ssd(**tensors, dt_softplus=True, return_final_states=True)
    state = tensors["initial_states"].clone()
    for t in range(6):
        token = trifuse.selective_state_update(
            state, tensors["x"][:, t], tensors["dt"][:, t, :, None].expand(2, heads, headdim),
            tensors["A"][:, None, None].expand(heads, headdim, dstate), tensors["B"][:, t], tensors["C"][:, t],
            tensors["D"][:, None].expand(heads, headdim), tensors["z"][:, t],
            tensors["dt_bias"][:, None].expand(heads, headdim), True,
        )  # fmt: skip
        torch.testing.assert_close(token, whole[:, t], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(state, final, rtol=1e-5, atol=1e-5)


@kernels
@pytest.mark.parametrize("groups", [1, 2])
def test_many_heads_of_few_chunks(backend, device, groups):
    tensors = make(batch=1, seqlen=40, heads=26, groups=groups)
    check(backend, tensors, device=device, dt_softplus=True)


@kernels
def test_deterministic_gradients_are_bitwise_repeatable(backend, device):
    tensors = make(seqlen=150, heads=6)
    first, second = (
        run(backend, tensors, torch.float32, device=device, dt_softplus=True, deterministic=True) for _ in range(2)
    )
    for name in first:
        assert torch.equal(first[name], second[name]), name


@st.composite
def cases(draw):
    """Any call: shapes, dtype, options."""
    seqlen = draw(st.integers(0, 70))
    batch, options, rows = draw(st.integers(1, 3)), {}, None
    if draw(st.booleans()):
        cuts = sorted(draw(st.lists(st.integers(0, seqlen), max_size=4)))
        batch, rows = 1, len(cuts) + 1
        options["cu_seqlens"] = torch.tensor([0, *cuts, seqlen])
    if draw(st.booleans()):
        options["seq_idx"] = runs_of(batch, seqlen, draw(st.integers(0, 99)))
    if draw(st.booleans()):
        options["dt_limit"] = (0.1, draw(st.sampled_from([0.9, math.inf])))
    groups, dtype = (
        draw(st.sampled_from([1, 2])),
        draw(st.sampled_from([torch.float32, torch.float32, torch.bfloat16, torch.float16])),
    )
    wide_dt = draw(st.booleans())
    tensors = make(
        batch=batch, seqlen=seqlen, heads=groups * draw(st.integers(1, 3)), headdim=draw(st.integers(1, 20)),
        groups=groups, dstate=draw(st.integers(1, 20)), dtype=dtype, seed=draw(st.integers(0, 999)),
        skip=draw(st.sampled_from(["", "H", "HP"])), gate=draw(st.booleans()), bias=draw(st.booleans()),
        initial=draw(st.booleans()), rows=rows, wide_dt=wide_dt,
    )  # fmt: skip
    options |= {
        "dt_softplus": True, "chunk_size": draw(st.sampled_from([None, 16, 32])), "final_grad": draw(st.booleans()),
    }  # fmt: skip
    return tensors, dtype, wide_dt, options


@kernels
@given(case=cases())
@settings(max_examples=25, deadline=None, derandomize=True,
          suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])  # fmt: skip
def test_any_call_keeps_the_tolerance(backend, device, case):
    tensors, dtype, wide_dt, options = case
    check(backend, tensors, dtype, device, wide_dt, **options)


# ---- what only the CPU kernels do


@cpp_only
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("headdim, dstate", [(8, 16), (21, 13)])
def test_every_instruction_set(isa, dtype, headdim, dstate):
    tensors = make(seqlen=90, headdim=headdim, dstate=dstate, groups=2, dtype=dtype, gate=True)
    check("cpp", tensors, dtype, dt_softplus=True, chunk_size=64)


@cpp_only
def test_every_instruction_set_in_double(isa):
    """Of the reference in its own precision, only the order of sums differs."""
    tensors = make(seqlen=150, headdim=21, dstate=13, dtype=torch.float64, gate=True, groups=2, skip="HP")
    exact = run("reference", tensors, torch.float64, dt_softplus=True)
    found = run("cpp", tensors, torch.float64, dt_softplus=True)
    for name in exact:
        assert error(found[name], exact[name]) <= 1e-12 * exact[name].abs().max().item(), name


@cpp_only
def test_cpp_gradients_pass_gradcheck():
    tensors = make(batch=1, seqlen=35, heads=2, headdim=3, dstate=2, gate=True, dtype=torch.float64)
    names, values = list(tensors), [value.requires_grad_() for value in tensors.values()]

    def function(*args):
        given = dict(zip(names, args, strict=True))
        return trifuse.ssd(**given, chunk_size=16, dt_softplus=True, return_final_states=True)

    with trifuse.backend("cpp"):
        assert torch.autograd.gradcheck(function, values, fast_mode=True)


@cpp_only
@pytest.mark.parametrize("shape", [(2, 300, 6, 2), (1, 150, 24, 1)], ids=["chunks", "heads"])
def test_results_depend_on_no_number_of_threads(threads, shape):
    batch, seqlen, heads, groups = shape
    tensors = make(batch, seqlen, heads, 32, groups, gate=True)  # large enough to be shared out
    results = []
    for count in (1, 2, 5):
        threads(count)
        results.append(run("cpp", tensors, torch.float32, dt_softplus=True))
    for other in results[1:]:
        for name, value in results[0].items():
            assert torch.equal(other[name], value), name


@cpp_only
def test_states_are_saved_only_where_a_sequence_is_longer_than_a_chunk():
    saved = []

    def pack(x):
        saved.append(tuple(x.shape))
        return x

    chunk = trifuse.registration.ssd.CHUNK_SIZE["cpp"]
    for seqlen, chunks in ((chunk, 0), (chunk + 1, 2), (4 * chunk, 4)):
        saved.clear()
        tensors = make(seqlen=seqlen, skip="", initial=False, bias=False)
        values = {name: value.float().requires_grad_() for name, value in tensors.items() if value is not None}
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x), trifuse.backend("cpp"):
            trifuse.ssd(**values, dt_softplus=True)
        assert saved[-1] == (2, chunks, 4, 8, 16)


@cpp_only
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the peak is read from /proc")
def test_short_sequences_with_large_states_build_no_states():
    """B 512, L 3, H 8, P 64, N 1024: the states would be 1 GiB; what is needed is the inputs' order of size."""
    program = textwrap.dedent("""
        import re, torch, trifuse

        def status(name):
            return int(re.search(name + r":\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024

        torch.set_num_threads(2)
        def arguments(batch):
            shapes = {"x": (batch, 3, 8, 64), "dt": (batch, 3, 8), "A": (8,), "B": (batch, 3, 1, 1024),
                      "C": (batch, 3, 1, 1024), "D": (8,), "dt_bias": (8,)}
            return {name: torch.randn(shape).requires_grad_() for name, shape in shapes.items()}
        def both(values):
            out = trifuse.ssd(**values, dt_softplus=True)
            return torch.autograd.grad(out.square().sum(), list(values.values()))
        with trifuse.backend("cpp"):
            both(arguments(2))
            values = arguments(512)
            open("/proc/self/clear_refs", "w").write("5")
            before = status("VmRSS")
            grads = both(values)
        print(status("VmHWM") - before)
    """)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 100


@cpp_only
def test_a_hundred_thousand_tokens():
    """The last of them, in float32 and in float64, and where the state has come by then."""
    tensors = make(batch=1, seqlen=100_000, heads=4, headdim=4, dstate=4)
    tensors["A"] = tensors["A"] * 1e-2
    narrow, wide = (run("cpp", tensors, dtype, dt_softplus=True) for dtype in (torch.float32, torch.float64))
    for name in wide:
        largest = wide[name].abs().max().item()
        assert error(narrow[name], wide[name]) <= 1e-5 * largest, name
    assert wide["out"][0, -1].abs().max() > 0
    with trifuse.backend("reference"):
        tail = {k: v[:, -50:] if k in ("x", "dt", "B", "C") else v for k, v in tensors.items() if v is not None}
        head = {k: v[:, :-50] if k in ("x", "dt", "B", "C") else v for k, v in tensors.items() if v is not None}
        tail["initial_states"] = run("cpp", head, torch.float64, grads=False, dt_softplus=True)["final_states"]
        exact = trifuse.ssd(**tail, dt_softplus=True)
    torch.testing.assert_close(wide["out"][:, -50:], exact, rtol=1e-10, atol=1e-10)


@cpp_only
def test_offsets_are_wider_than_32_bits():
    """Strides that lead beyond 2^31 elements, over memory that is never touched between the elements."""
    import mmap

    try:
        mapping = mmap.mmap(-1, 2**36, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000)
    except OSError as failure:
        pytest.skip(f"this machine does not reserve 64 GiB of address space: {failure}")
    reserved = torch.frombuffer(mapping, dtype=torch.float32)
    near = {k: v.float() for k, v in make(seqlen=3, heads=2, headdim=3, dstate=2).items() if v is not None}

    def results(values):
        values = {name: value.detach().requires_grad_() for name, value in values.items()}
        out, final = trifuse.ssd(**values, dt_softplus=True, return_final_states=True)
        return out, final, *torch.autograd.grad(out.square().sum() + final.sum(), list(values.values()))

    expected = results(near)
    for far in range(4):
        distant = dict(near)
        for start, name in enumerate(("x", "dt", "B", "C")):
            strides = [4000, 1000, 100, 10][: near[name].dim()]
            if far < len(strides):
                strides[far] = 2**31 + 64
            distant[name] = reserved.as_strided(near[name].shape, strides, start).copy_(near[name])
        assert all(torch.equal(one, other) for one, other in zip(results(distant), expected, strict=True)), far
