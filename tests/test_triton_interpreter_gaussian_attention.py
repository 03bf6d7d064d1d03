"""gaussian_attention's Triton kernels in Triton's interpreter, see test_triton_interpreter.py. The process must be its
own: ``TRITON_INTERPRET=1 pytest tests/test_triton_interpreter_gaussian_attention.py``."""

import functools
import mmap
import os

import gaussian_attention_cases as cases
import pytest
import torch
from gaussian_attention_cases import KINDS, make, masks, run
from tolerance import compare

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("runs only with TRITON_INTERPRET=1 in the environment of its own process", allow_module_level=True)
pytest.importorskip("triton", reason="the package triton is not installed")

import trifuse
from trifuse.triton_kernels import gaussian_attention as kernels

pytestmark = pytest.mark.usefixtures("poisoned_memory")
check = functools.partial(cases.check, "triton")
kinds = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
PACKED_Q = torch.tensor([0, 3, 3, 21, 37])
PACKED_K = torch.tensor([0, 7, 9, 9, 40])


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Blocks that short sequences fill several of; products in one and in several chunks."""
    fwd, queries, keys = (
        tuple((block_m, block_n, 4, 1, chunk) for chunk in (0, 0, 16, 16))
        for block_m, block_n in ((32, 16), (32, 16), (16, 32))
    )
    tiles = {(name, size): tile for name, tile in (("fwd", fwd), ("queries", queries), ("keys", keys))
             for size in (64, 128)}  # fmt: skip
    monkeypatch.setattr(kernels, "TILES", tiles)


@kinds
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_all_options_at_once(kind, packed, causal):
    tensors = make(batch=1, heads=4, kv_heads=2, keys=40, dim=20, value_dim=5, kind=kind)
    offsets = {"cu_seqlens_q": PACKED_Q, "cu_seqlens_k": PACKED_K} if packed else {}
    given = masks(tensors, boolean=packed) if not causal else {"key_padding_mask": masks(tensors)["key_padding_mask"]}
    check(tensors, enable_gqa=True, is_causal=causal, **offsets, **given)


@kinds
@pytest.mark.parametrize("causal", [False, True])
def test_float16(kind, causal):
    check(make(batch=1, dim=20, kind=kind, dtype=torch.float16), is_causal=causal)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("kind", ["g", "gcs"])
def test_unnormalized(kind, dtype):
    check(make(batch=1, kind=kind, dtype=dtype), normalized=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("gamma", [4.0, 3000.0])
def test_gradients_of_lse_where_unnormalized_sums_are_next_to_nothing(gamma, dtype):
    """lse is -50 or -10000 there, and what it was rounded by is a part of every weight."""
    tensors = make(batch=1, queries=30, kind="g", dtype=dtype)
    tensors["gamma"] = torch.tensor([gamma, gamma / 4])
    check(tensors, normalized=False)


@pytest.mark.parametrize("spread, origin", [(1.0, 1000.0), (1.0, 6.0), (0.2, 1.0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_far_from_the_origin(dtype, spread, origin):
    """1000 away float16 moves without rounding; nearer by, what rounding takes from it counts too."""
    check(make(batch=1, kind="g", dtype=dtype, origin=origin, spread=spread))


def test_low_halves_are_read_only_where_there_are_some(monkeypatch):
    """Moving rounds in one head, in the other nothing: each is served by one of the launches."""
    tensors = make(batch=1, kind="g", dtype=torch.float16)
    for name in "qk":
        tensors[name][:, 1] += 5
    tensors["q"][:, 1, 3] = 1e-3
    seen = []
    real = kernels.common.launch

    def launch(kernel, grid, *args, **meta):
        real(kernel, grid, *args, **meta)
        if "LOW" in meta:
            seen.append(args[3][2].tolist() if meta["LOW"] else None)

    with monkeypatch.context() as patch:
        patch.setattr(kernels.common, "launch", launch)
        run("triton", tensors, grads=False)
    assert seen == [None, [0, 1]]
    check(tensors)


@pytest.mark.parametrize("queries, keys", [(0, 5), (5, 0), (1, 1), (16, 32), (17, 33), (33, 17)])
def test_lengths_around_a_block(queries, keys):
    check(make(batch=1, queries=queries, keys=keys), is_causal=True)


@pytest.mark.parametrize("dim, value_dim", [(1, 1), (16, 33), (65, 3)])
def test_heads_that_do_not_fill_a_tile(dim, value_dim):
    check(make(batch=1, queries=18, dim=dim, value_dim=value_dim))


def test_heads_too_large_are_refused():
    tensors = make(batch=1, queries=2, dim=129)
    with trifuse.backend("triton"), pytest.raises(trifuse.BackendUnavailable, match="up to 128 numbers"):
        trifuse.gaussian_attention(**tensors)


@pytest.mark.parametrize("programs", [1, 1000])
def test_heads_of_queries_in_slabs(monkeypatch, programs):
    monkeypatch.setattr(kernels, "PROGRAMS", programs)
    check(make(batch=1, heads=6, kv_heads=2, queries=20), enable_gqa=True)


def test_boolean_and_added_masks():
    for kind in ("g", "cs"):
        for boolean in (True, False):
            tensors = make(batch=1, kind=kind)
            check(tensors, **masks(tensors, boolean=boolean))


def test_without_a_gradient_of_lse():
    for dtype in (torch.float32, torch.float16):
        check(make(batch=1, dtype=dtype), lse_grad=False)


@pytest.mark.parametrize("padded", [False, True])
def test_tiles_that_cannot_matter_are_passed_over(monkeypatch, padded):
    """NaN where a window's weights vanish is not read: neither forward nor backward. Within reach it would be."""
    tensors = make(batch=1, heads=1, queries=200, kind="s")
    tensors["sigma"][:] = 0.5
    given = {"key_padding_mask": torch.arange(200)[None] % 3 == 0} if padded else {}
    clean = run("triton", tensors, lse_grad=False, **given)
    far = slice(110, 140)
    dirty_tensors = {name: one.clone() for name, one in tensors.items()}
    dirty_tensors["v"][:, :, far] = torch.nan
    dirty = run("triton", dirty_tensors, lse_grad=False, **given)
    for name in ("out", "dq", "dsigma"):
        assert torch.equal(dirty[name][:, :, :64], clean[name][:, :, :64]), name
        assert torch.equal(dirty[name][:, :, 190:], clean[name][:, :, 190:]), name
        assert dirty[name][:, :, far].isnan().any()
    for name in ("dk", "dv"):
        assert torch.equal(dirty[name][:, :, :32], clean[name][:, :, :32]), name


def test_a_window_around_padding_reaches_the_nearest_key():
    """All keys near the centers are padding: what counts lies 100 keys away."""
    tensors = make(batch=1, queries=20, keys=150, kind="cs", sigma=0.7)
    tensors["center"] *= 0.2
    check(tensors, key_padding_mask=torch.arange(150)[None] < 120)


def test_centers_far_outside_and_tiny_widths():
    tensors = make(batch=1, kind="cs")
    tensors["center"][:, :, ::2] = 900.0
    tensors["center"][:, :, 1::4] = -40.0
    check(tensors)


def test_nan_in_padding_is_not_read():
    tensors = make(batch=1, kind="gcs")
    padding = torch.zeros(1, 37, dtype=torch.bool)
    padding[:, 30:] = True
    clean = run("triton", tensors, key_padding_mask=padding)
    for name in "kv":
        tensors[name][:, :, 30:] = torch.nan
    dirty = run("triton", tensors, key_padding_mask=padding)
    for name, value in clean.items():
        assert torch.equal(dirty[name], value), name


def test_nan_stays_in_its_sequence():
    tensors = make(batch=1, kind="gs")
    clean = run("triton", tensors, cu_seqlens_q=PACKED_Q)
    tensors["k"][:, :, 5] = torch.nan
    dirty = run("triton", tensors, cu_seqlens_q=PACKED_Q)
    assert dirty["out"][:, :, 3:21].isnan().all()
    for name in ("out", "lse", "dq", "dk", "dv", "dsigma"):
        for part in (slice(0, 3), slice(21, 37)):
            assert torch.equal(dirty[name][:, :, part], clean[name][:, :, part]), name


def test_results_repeat_bit_for_bit():
    tensors = make(batch=1, heads=2, kv_heads=1, dtype=torch.float16)
    first, second = (run("triton", tensors, enable_gqa=True) for _ in range(2))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def test_small_gradients_of_float16_do_not_vanish():
    """Gradients of logits below what float16 holds reach q and k, where their sums can be held."""
    tensors = make(batch=1, kind="s", dtype=torch.float16, queries=64)
    args = {name: one.clone().requires_grad_() for name, one in tensors.items()}
    exact = {name: one.double().requires_grad_() for name, one in tensors.items()}
    dout = 2.0**-17 * torch.randn(1, 2, 64, 8, generator=torch.Generator().manual_seed(3)).half()
    with trifuse.backend("triton"):
        found = torch.autograd.grad(trifuse.gaussian_attention(**args), list(args.values()), dout)
    with trifuse.backend("reference"):
        expected = torch.autograd.grad(trifuse.gaussian_attention(**exact), list(exact.values()), dout.double())
    for name, one, other in zip(args, found, expected, strict=True):
        least = {"dsigma": 1e-4}.get("d" + name, 0.02)
        assert (one.double() - other).abs().max() <= least * other.abs().max() + 2.0**-24, name


def test_strided_and_expanded_inputs_equal_contiguous_ones():
    g = torch.Generator().manual_seed(1)
    wide = torch.randn(20, 1, 4, 16, generator=g).permute(1, 2, 0, 3)
    q, v = wide[:, ::2, :, ::2], wide[:, 1::2, :, 1::2]
    k = torch.randn(1, 1, 20, 8, generator=g).expand(-1, 2, -1, -1)
    mask = torch.rand(20, 1, 40, generator=g).permute(1, 2, 0)[:, ::2] > 0.2
    results = []
    for contiguous in (False, True):
        args = [(one.contiguous() if contiguous else one).detach().requires_grad_() for one in (q, k, v)]
        with trifuse.backend("triton"):
            out = trifuse.gaussian_attention(
                *args, gamma=0.1, sigma=torch.tensor([2.0, 5.0]), attn_mask=mask.contiguous() if contiguous else mask
            )
        results.append([out, *torch.autograd.grad(out, args, torch.ones(()).expand_as(out))])
    for strided, contiguous in zip(*results, strict=True):
        assert torch.equal(strided, contiguous)


@pytest.fixture(scope="module")
def reserved():
    """2^37 bytes of address space, of which only the pages that are written come to exist; see test_offsets.py."""
    try:
        mapping = mmap.mmap(-1, 2**37, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000)  # MAP_NORESERVE
    except OSError as error:
        pytest.skip(f"this machine does not reserve 128 GiB of address space: {error}")
    return torch.frombuffer(mapping, dtype=torch.float32)


@pytest.mark.parametrize("kind", ["g", "cs"])
@pytest.mark.parametrize("far", [0, 1, 2, 3])
def test_inputs_are_read_beyond_two_to_the_31(reserved, far, kind):
    tensors = make(batch=3, heads=3, queries=3, dim=3, kind=kind)
    near = run("triton", tensors)
    for start, (name, value) in enumerate(tensors.items()):
        strides = [5000, 700, 100, 10]
        if value.dim() == 1 or (value.dim() == 3 and far == 3):
            continue
        strides[far] = 2**31 + 64
        tensors[name] = reserved.as_strided(value.shape, strides[: value.dim()], start).copy_(value)
    distant = run("triton", tensors)
    for name, value in near.items():
        assert torch.equal(value, distant[name]), name


def test_masks_are_read_beyond_two_to_the_31(reserved):
    tensors = make(batch=2, heads=2, queries=3, kind="g")
    given = masks(tensors, boolean=False)
    del given["key_padding_mask"]
    near = run("triton", tensors, **given)
    for far in range(4):
        strides = [5000, 700, 100, 10]
        strides[far] = 2**31 + 64
        mask = reserved.as_strided((2, 2, 3, 3), strides).copy_(given["attn_mask"])
        distant = run("triton", tensors, attn_mask=mask)
        for name, value in near.items():
            assert torch.equal(value, distant[name]), name


def test_gradients_are_float32_where_they_say_so():
    """In half precision too: those of gamma, center and sigma are held to the rule of float32, with the error of the
    rounded output left in, they would miss it a hundredfold."""
    tensors = make(batch=1, queries=64, dtype=torch.float16)
    exact, kernel = run("reference", tensors, exact=True), run("triton", tensors)
    names = ("lse", "dgamma", "dcenter", "dsigma")
    eager = cases.eager_errors(tensors)
    assert all(kernel[name].dtype == torch.float32 for name in names)
    compare({name: kernel[name] for name in names}, exact, eager)
