"""The Triton kernels, run by Triton's interpreter on CPU tensors, against the float64 reference.

The interpreter must be chosen before triton is first imported, so these tests have a process of
their own: ``TRITON_INTERPRET=1 pytest tests/test_triton_interpreter.py``. It computes bfloat16
wrongly and takes about a millisecond per scanned element: float32 and float16 only, tiny shapes, and
tiles of 16 steps. What it cannot show (races, layouts) is for the tests on a GPU.
"""

import functools
import os

import pytest
import scan_cases
import torch
from scan_cases import run
from tolerance import error

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("runs only with TRITON_INTERPRET=1 in the environment of its own process", allow_module_level=True)
pytest.importorskip("triton", reason="the package triton is not installed")

import trifuse
from trifuse.registration.selective_scan import CHUNK_SIZE


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setitem(CHUNK_SIZE, "triton", 16)


pytestmark = pytest.mark.usefixtures("poisoned_memory")
make = functools.partial(scan_cases.make, batch=1, dim=2, seqlen=21, dstate=2)
check = functools.partial(scan_cases.check, "triton")
PACKED = torch.tensor([0, 5, 5, 18, 21])


@pytest.mark.parametrize("layout", ["bdl", "bld"])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("reverse", [False, True])
def test_all_options_at_once(reverse, packed, layout):
    cu_seqlens = PACKED if packed else None
    tensors = make(layout=layout, cu_seqlens=cu_seqlens)
    check(tensors, cu_seqlens=cu_seqlens, reverse=reverse, layout=layout, delta_softplus=True, deterministic=False)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_bare_call_needs_no_optional_argument(reverse, packed):
    cu_seqlens = PACKED if packed else None
    tensors = make(skip=False, gate=False, bias=False, initial=False, cu_seqlens=cu_seqlens)
    tensors["delta"] = tensors["delta"].abs()
    check(tensors, cu_seqlens=cu_seqlens, reverse=reverse, last_grad=False)


@pytest.mark.parametrize("seqlen", [0, 1, 15, 16, 17, 33])
def test_lengths_around_a_chunk(seqlen):
    check(make(seqlen=seqlen, dim=1), delta_softplus=True)


def test_length_1000():
    check(make(seqlen=1000, dim=1, dstate=1), delta_softplus=True)


def test_real_chunk_size(monkeypatch):
    monkeypatch.undo()
    assert CHUNK_SIZE["triton"] == 128
    check(make(seqlen=130, dim=1, dstate=1), delta_softplus=True, reverse=True)


@pytest.mark.parametrize("dstate", [1, 5, 16])
def test_any_state_size(dstate):
    check(make(dstate=dstate, dim=1, seqlen=17), delta_softplus=True)


@pytest.mark.parametrize("constant", ["B", "C", "BC"])
@pytest.mark.parametrize("reverse", [False, True])
def test_constant_coefficients(constant, reverse):
    check(make(constant=constant, batch=2, seqlen=17), delta_softplus=True, reverse=reverse)


@pytest.mark.parametrize("groups", [(2, 1), (2, 3), (6, 1)])
@pytest.mark.parametrize("deterministic", [False, True])
def test_groups_of_B_and_C_may_differ(groups, deterministic, monkeypatch):
    from trifuse.triton_kernels import selective_scan as kernels

    monkeypatch.setattr(kernels, "MAX_SLABS", 2)
    check(make(groups=groups, dim=6, seqlen=17, dstate=1), deterministic=deterministic, delta_softplus=True)


def test_channels_that_do_not_fill_a_block():
    check(make(dim=3, batch=2, seqlen=17, dstate=1), delta_softplus=True)


def test_float16():
    check(make(dtype=torch.float16, seqlen=19), dtype=torch.float16, delta_softplus=True)


def test_deterministic_gradients_are_repeatable_and_equal_the_others():
    tensors = make(dim=5, batch=2, seqlen=18, dstate=1)
    options = {"deterministic": True, "delta_softplus": True}
    check(tensors, **options)
    first, second = (run("triton", tensors, torch.float32, **options) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_zero_length_sequences_keep_their_state():
    cu_seqlens = torch.tensor([0, 0, 3, 3])
    check(make(seqlen=3, cu_seqlens=cu_seqlens), cu_seqlens=cu_seqlens)


def test_gradient_of_last_state_alone():
    tensors = make(seqlen=17)
    args = {name: tensor.requires_grad_() for name, tensor in tensors.items() if name not in ("D", "z")}
    grads = {}
    for backend, dtype in (("reference", torch.float64), ("triton", torch.float32)):
        cast = {name: tensor.detach().to(dtype).requires_grad_() for name, tensor in args.items()}
        with trifuse.backend(backend):
            _, last = trifuse.selective_scan(**cast, return_last_state=True, delta_softplus=True)
        last.sum().backward()  # an expanded gradient
        grads[backend] = {name: tensor.grad for name, tensor in cast.items() if name != "C"}
    for name, exact in grads["reference"].items():
        torch.testing.assert_close(grads["triton"][name].double(), exact, rtol=1e-5, atol=1e-6)


def test_strided_and_expanded_inputs_equal_contiguous_ones():
    g = torch.Generator().manual_seed(1)
    dim, seqlen, dstate = 2, 18, 2
    wide = torch.randn(2, 2 * dim, 2 * seqlen, generator=g)
    u, z = wide[:, ::2, ::2], wide[:, 1::2, 1::2]
    delta = torch.rand(2, 1, 1, generator=g).expand(2, dim, seqlen)
    B = torch.randn(1, 1, seqlen, dstate, generator=g).transpose(2, 3).expand(2, 1, dstate, seqlen)
    C = torch.randn(2, 1, dstate, 2 * seqlen, generator=g)[..., ::2]
    A = -torch.rand(dstate, dim, generator=g).t()
    results = []
    for make_contiguous in (False, True):
        args = [(x.contiguous() if make_contiguous else x).detach().requires_grad_() for x in (u, delta, A, B, C)]
        with trifuse.backend("triton"):
            out = trifuse.selective_scan(*args, z=z.contiguous() if make_contiguous else z, deterministic=True)
        dout = torch.ones(()).expand_as(out)
        results.append([out, *torch.autograd.grad(out, args, dout)])
    for strided, contiguous in zip(*results, strict=True):
        assert torch.equal(strided, contiguous)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_stays_in_its_channel_and_batch_item(bad):
    tensors = make(batch=2, dim=3, seqlen=18, dstate=1)
    clean = run("triton", tensors, torch.float32, grads=False, delta_softplus=True)
    tensors["u"][1, 1, 4] = bad
    tensors["initial_state"][0, 2, 0] = bad
    dirty = run("triton", tensors, torch.float32, grads=False, delta_softplus=True)
    touched = torch.zeros(2, 3, dtype=torch.bool)
    touched[1, 1] = touched[0, 2] = True
    assert torch.equal(dirty["out"][~touched], clean["out"][~touched])
    assert torch.equal(dirty["last_state"][~touched], clean["last_state"][~touched])
    assert not dirty["last_state"][touched].isfinite().any()
    assert torch.equal(dirty["out"][1, 1, :4], clean["out"][1, 1, :4])


@pytest.mark.parametrize("reverse", [False, True])
def test_nan_stays_in_its_packed_sequence(reverse):
    cu_seqlens = torch.tensor([0, 7, 12, 20])
    tensors = make(dim=1, seqlen=20, dstate=1, cu_seqlens=cu_seqlens)
    options = {"cu_seqlens": cu_seqlens, "reverse": reverse, "delta_softplus": True}
    clean = run("triton", tensors, torch.float32, **options)
    tensors["u"][0, 0, 9] = float("nan")
    dirty = run("triton", tensors, torch.float32, **options)
    for name in ("out", "du", "ddelta", "dz"):
        for part in (slice(0, 7), slice(12, 20)):
            assert torch.equal(dirty[name][..., part], clean[name][..., part]), name
    assert torch.equal(dirty["last_state"][::2], clean["last_state"][::2])
    assert torch.equal(dirty["dinitial_state"][::2], clean["dinitial_state"][::2])


def test_steps_that_do_not_exist_leave_an_infinite_decay_alone():
    tensors = make(dim=2, seqlen=3, dstate=1)
    tensors["A"][0] = -float("inf")
    exact = run("reference", tensors, torch.float64, grads=False, delta_softplus=True)
    result = run("triton", tensors, torch.float32, grads=False, delta_softplus=True)
    assert all(error(value, exact[name]) < 1e-5 for name, value in result.items())


def test_softplus_is_accurate_where_it_is_tiny_and_where_it_is_linear():
    x = torch.tensor([-80.0, -30.0, -16.0, -7.0, -1.0, 0.0, 1.0, 7.0, 19.0, 21.0, 60.0])
    u, zero, one = torch.eye(x.numel())[:, None], torch.zeros(1, 1), torch.ones(1, 1)
    with trifuse.backend("triton"):  # with A = 0 and B = C = 1, out sums softplus(delta) u
        out = trifuse.selective_scan(u, x.expand(x.numel(), 1, -1), zero, one, one, delta_softplus=True)
    exact = torch.nn.functional.softplus(x.double())
    torch.testing.assert_close(out[:, 0, -1].double(), exact, rtol=1e-6, atol=0)


def make_update(batch=3, heads=2, headdim=3, dstate=5, groups=(1, 2), rows=None, seed=0):
    g = torch.Generator().manual_seed(seed)

    def rand(*shape):
        return torch.randn(shape, generator=g, dtype=torch.float64).float().double()

    return {
        "state": rand(rows or batch, heads, headdim, dstate),
        "x": rand(batch, heads, headdim),
        "dt": rand(batch, heads, headdim),
        "A": -rand(heads, headdim, dstate).abs(),
        "B": rand(batch, groups[0], dstate),
        "C": rand(batch, groups[1], dstate),
        "D": rand(heads, headdim),
        "z": rand(batch, heads, headdim),
        "dt_bias": rand(heads, headdim),
    }


def update(backend, tensors, dtype, **options):
    args = {name: tensor.to(dtype).clone() for name, tensor in tensors.items()}
    with trifuse.backend(backend):
        out = trifuse.selective_state_update(**args, **options)
    return out, args["state"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("softplus", [False, True])
def test_state_update(dtype, softplus):
    tensors = make_update()
    if dtype == torch.float16:
        tensors = {name: tensor.half().double() for name, tensor in tensors.items()}
    exact = update("reference", tensors, torch.float64, dt_softplus=softplus)
    eager = update("reference", tensors, dtype, dt_softplus=softplus)
    for value, near, ref in zip(update("triton", tensors, dtype, dt_softplus=softplus), eager, exact, strict=True):
        assert value.dtype == dtype
        error, allowed = (value - ref).abs().max(), 2 * (near - ref).abs().max()
        assert error <= allowed + 4 * torch.finfo(dtype).eps * ref.abs().max()


@pytest.mark.parametrize("dstate", [1, 16, 20])
def test_state_update_without_heads_or_options(dstate):
    tensors = make_update(heads=1, headdim=40, dstate=dstate, groups=(1, 1))
    flat = {name: tensors[name].squeeze(0 if name == "A" else 1) for name in ("state", "x", "dt", "A", "B", "C")}
    flat["dt"] = flat["dt"].abs()
    for value, ref in zip(update("triton", flat, torch.float32), update("reference", flat, torch.float64), strict=True):
        torch.testing.assert_close(value.double(), ref, rtol=1e-5, atol=1e-5)


def test_state_update_picks_rows_and_skips_padding():
    tensors = make_update(rows=6)
    indices = torch.tensor([4, -1, 2], dtype=torch.int32)
    out, state = update("triton", tensors, torch.float32, state_batch_indices=indices)
    ref_out, ref_state = update("reference", tensors, torch.float64, state_batch_indices=indices)
    torch.testing.assert_close(out.double(), ref_out, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(state.double(), ref_state, rtol=1e-5, atol=1e-5)
    assert (out[1] == 0).all()
    untouched = [0, 1, 3, 5]
    assert torch.equal(state[untouched].double(), tensors["state"][untouched])


def test_state_update_takes_any_strides_and_another_state_dtype():
    tensors = make_update(headdim=4)
    state = tensors["state"].half().double()
    exact = update("reference", tensors | {"state": state}, torch.float64)
    cast = {name: tensor.float() for name, tensor in tensors.items()}
    cast["state"] = state.half().transpose(1, 3).contiguous().transpose(1, 3)
    cast["dt"] = tensors["dt"][..., :1].float().expand(-1, -1, 4)
    exact = update("reference", tensors | {"state": state, "dt": cast["dt"].double()}, torch.float64)
    cast["x"] = cast["x"].transpose(0, 2).contiguous().transpose(0, 2)
    with trifuse.backend("triton"):
        out = trifuse.selective_state_update(**cast)
    torch.testing.assert_close(out.double(), exact[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(cast["state"].double(), exact[1], rtol=1e-3, atol=1e-3)
