"""gaussian_attention where arithmetic and memory are strained: far from the origin, windows whose tiles are mostly
skipped and keys that must not be, long sequences."""

import time

import pytest
import torch
from backends_here import cpp_only, kernels_of
from gaussian_attention_cases import check, make, run
from tolerance import error

import trifuse
from trifuse.report.memory import peak_extra

kernels = kernels_of("triton")
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])


@pytest.fixture(autouse=True)
def nan_in_fresh_memory(poisoned_memory):
    """Every test runs on poisoned allocations."""


# ---- distances


@kernels
@dtypes
@pytest.mark.parametrize("kind", ["g", "gcs"])
def test_a_thousand_away_from_the_origin(backend, device, dtype, kind):
    """Half precision has steps of 1 and of 4 there: the cloud is wider, so that it keeps a shape."""
    spread = {torch.float32: 1.0, torch.float16: 2.0, torch.bfloat16: 8.0}[dtype]
    check(backend, make(queries=130, dim=16, kind=kind, dtype=dtype, origin=1000.0, spread=spread), device)


@kernels
def test_moving_everything_changes_nothing(backend, device):
    tensors = make(queries=130, dim=16, kind="g")
    near = {name: (tensors[name] * 64).round() / 64 for name in "qk"}  # so that it can be moved without rounding
    moved = {name: value + 1000 for name, value in near.items()}
    here, there = (run(backend, tensors | place, device=device) for place in (near, moved))
    for name, value in here.items():
        torch.testing.assert_close(there[name], value, rtol=1e-4, atol=1e-5, msg=name)


@kernels
def test_packed_clouds_far_from_each_other(backend, device):
    """Each sequence is centred by its own mean: a mean of all would leave each 1000 away."""
    offsets = torch.tensor([0, 40, 80, 130])
    tensors = make(queries=130, dim=16, kind="g", cu_seqlens_q=offsets)
    for i, place in enumerate((1000.0, -1000.0, 0.0)):
        rows = slice(*offsets[i : i + 2].tolist())
        for name in "qk":
            tensors[name][:, :, rows] += place
    check(backend, tensors, device, cu_seqlens_q=offsets)


@kernels
@pytest.mark.parametrize("gamma", [1e-6, 100.0])
def test_kernels_that_are_flat_or_sharp(backend, device, gamma):
    tensors = make(queries=130, dim=16, kind="g")
    tensors["gamma"] = torch.full((2,), gamma)
    tensors["q"] = tensors["k"] + 1e-3 * tensors["q"]  # a query has one near key
    check(backend, tensors, device)


# ---- windows


def banded(q, k, v, sigma, band=45):
    """A window of width `sigma` in float64, of the keys within `band` of a query only: beyond, it is exp(-1000)."""
    length = k.shape[2]
    near = torch.arange(length)[:, None] + torch.arange(-band, band + 1)
    inside = (near >= 0) & (near < length)
    near = near.clamp(0, length - 1)
    logits = (q[:, :, :, None] * k[:, :, near]).sum(-1) / q.shape[3] ** 0.5
    distance = torch.arange(-band, band + 1, device=q.device)
    logits = logits - distance**2 / (2 * sigma[..., None] ** 2)
    weights = logits.masked_fill(~inside, -torch.inf).softmax(-1)
    return (weights[..., None] * v[:, :, near]).sum(3)


@kernels
def test_a_narrow_window_in_a_long_sequence(backend, device):
    tensors = make(batch=1, heads=1, queries=4096, dim=16, kind="s")
    tensors["sigma"] = torch.ones(1, 1, 4096)
    args = {name: tensor.double().requires_grad_() for name, tensor in tensors.items()}
    dout = torch.randn(1, 1, 4096, 16, generator=torch.Generator().manual_seed(1))
    exact = banded(**args)
    wanted = torch.autograd.grad(exact, args.values(), dout.double())
    args = {name: tensor.to(device).requires_grad_() for name, tensor in tensors.items()}
    with trifuse.backend(backend):
        out = trifuse.gaussian_attention(**args)
    found = torch.autograd.grad(out, args.values(), dout.to(device))
    assert error(out.detach().cpu(), exact) < 1e-5
    for name, got, right in zip(args, found, wanted, strict=True):
        assert error(got.cpu(), right) < 1e-5, name


@pytest.mark.parametrize("sigma", [1e-38, 1e-12, torch.inf])
@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_the_narrowest_window_is_its_key_and_the_widest_none(backend, sigma):
    tensors = make(queries=9, kind="")
    with trifuse.backend(backend):
        out, lse = trifuse.gaussian_attention(**tensors, sigma=sigma, return_lse=True)
    q, k, v = (tensors[name] for name in "qkv")
    logits = q @ k.mT / q.shape[3] ** 0.5
    if sigma < 1:
        torch.testing.assert_close(out, v)
        torch.testing.assert_close(lse, logits.diagonal(dim1=2, dim2=3))
    else:
        torch.testing.assert_close(out, logits.softmax(-1) @ v)
        torch.testing.assert_close(lse, logits.logsumexp(-1))


@kernels
@dtypes
@pytest.mark.parametrize("causal", [False, True])
def test_narrow_windows_of_many_widths(backend, device, dtype, causal):
    tensors = make(batch=1, heads=2, queries=600, dim=8, kind="cs", dtype=dtype)
    tensors["sigma"] = torch.logspace(-2, 2, 600).expand(1, 2, 600).clone()
    check(backend, tensors, device, is_causal=causal)


@kernels
@pytest.mark.parametrize("kind", ["s", "gs"])
def test_a_far_key_that_outweighs_its_window_is_seen(backend, device, kind):
    """The window takes 500 off a key 500 away (sigma 16): its similarity exceeds that of the near keys by more."""
    tensors = make(batch=1, heads=2, queries=700, dim=8, kind=kind)
    tensors["sigma"] = torch.full((1, 2, 700), 16.0)
    if kind == "s":
        tensors["q"][:, :, 100] = 0.0
        tensors["q"][:, :, 100, 0] = 80.0
        tensors["k"][:, :, 600] = 0.0
        tensors["k"][:, :, 600, 0] = 80.0
    else:
        tensors["gamma"] = torch.ones(2)
        tensors["q"][:, :, 100] = tensors["k"][:, :, 600] = 40.0
    check(backend, tensors, device)
    exact = run("reference", tensors, exact=True, grads=False)
    torch.testing.assert_close(exact["out"][:, :, 100], tensors["v"][:, :, 600].double())  # the case is what it says


@kernels
@pytest.mark.parametrize("how", ["center", "attn_mask", "float mask", "low mask", "padding", "causal"])
def test_where_no_near_key_takes_part_the_nearest_that_does_is_seen(backend, device, how):
    tensors = make(batch=1, heads=2, queries=400, dim=8, kind="cs", sigma=1.0)
    near = (torch.arange(400)[:, None] - torch.arange(400)).abs() < 150
    tensors["center"] = torch.arange(400.0).expand(1, 2, 400).clone()
    options = {}
    if how == "center":  # outside of the sequence
        tensors["center"] = torch.cat([torch.full((1, 2, 200), -300.0), torch.full((1, 2, 200), 900.0)], 2)
    elif how == "attn_mask":
        options["attn_mask"] = ~near
    elif how == "float mask":
        options["attn_mask"] = torch.zeros(400, 400).masked_fill(near, -torch.inf)
    elif how == "low mask":
        options["attn_mask"] = torch.zeros(400, 400).masked_fill(near, -1e5)
    elif how == "padding":
        options["key_padding_mask"] = torch.arange(400)[None] < 300
    else:
        tensors["center"] += 200.0
        options["is_causal"] = True
    check(backend, tensors, device, **options)


@kernels
def test_a_mask_that_lifts_a_far_key_is_seen(backend, device):
    tensors = make(batch=1, heads=2, queries=400, dim=8, kind="cs", sigma=1.0)
    mask = torch.zeros(400, 400)
    mask[:, 7] = 1e6
    check(backend, tensors, device, attn_mask=mask)


@cpp_only
@pytest.mark.parametrize("kind", ["s", "gs"])
@pytest.mark.parametrize("backward", [False, True])
def test_time_with_a_narrow_window_is_linear_in_the_length(threads, kind, backward):
    """8 times the length: 8 times the processor's time, and 64 times if every tile were computed. The best of
    interleaved runs."""
    threads(1)
    torch.use_deterministic_algorithms(False)  # not the time of poisoning memory

    def measured(length):
        tensors = make(batch=1, heads=1, queries=length, dim=32, kind=kind)
        tensors["sigma"] = torch.ones(1)
        args = {name: tensor.requires_grad_(backward) for name, tensor in tensors.items()}

        def call():
            out = trifuse.gaussian_attention(**args)
            if backward:
                torch.autograd.grad(out, args.values(), tensors["v"].detach())

        return call

    calls, best = [measured(2048), measured(16384)], [float("inf")] * 2
    with trifuse.backend("cpp"):
        for _ in range(5):
            for i, call in enumerate(calls):
                start = time.process_time()
                call()
                best[i] = min(best[i], time.process_time() - start)
    assert best[1] < 16 * best[0]


# ---- many heads and long sequences


@cpp_only
def test_many_heads():
    """Few of them are cut finer than this."""
    tensors = make(batch=2, heads=8, queries=520, dim=8, dtype=torch.float64, sigma=20.0)
    found, exact = (run(backend, tensors, is_causal=True) for backend in ("cpp", "reference"))
    for name, value in found.items():
        assert error(value, exact[name]) <= 1e-12 * exact[name].abs().max().item(), name


@kernels
def test_half_precision_of_many_heads_is_that_of_single_precision(backend, device):
    """Sums of gradients in half precision are kept in float32 for some heads at a time."""
    half = make(batch=32, heads=32, queries=64, dim=64, kind="g", dtype=torch.bfloat16)
    single = {name: tensor.float() for name, tensor in half.items()}
    found, wanted = (run(backend, one, device=device, is_causal=True) for one in (half, single))
    for name, value in found.items():
        largest = wanted[name].abs().max().item()
        assert error(value, wanted[name].to(value.dtype).double()) <= 2**-7 * largest, name


@cpp_only
@pytest.mark.parametrize("options", [{"gamma": 0.01}, {"sigma": 300.0}], ids=["distance", "window"])
def test_memory_at_16384_positions(options):
    """Outputs and gradients are 20 MB of it. One (L, L) matrix would be 1 GB."""
    q, k, v = (torch.randn(1, 1, 16384, 64, requires_grad=True) for _ in range(3))
    options = {name: torch.tensor(value, requires_grad=True) for name, value in options.items()}

    def call():
        with trifuse.backend("cpp"):
            out = trifuse.gaussian_attention(q, k, v, is_causal=True, **options)
        torch.autograd.grad(out, [q, k, v, *options.values()], v.detach())

    call()  # what is allocated once, as the buffers of threads
    extra, how = peak_extra(call, "cpu")
    assert extra is not None, how
    assert extra < 100 * 2**20, f"{extra / 2**20:.0f} MB ({how})"
