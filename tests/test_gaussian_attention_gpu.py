"""What only a GPU shows of gaussian_attention: tiles of their real sizes, bfloat16, many blocks, loads that run ahead.
The tests of test_gaussian_attention.py run there too."""

import functools

import gaussian_attention_cases as cases
import pytest
import torch
from gaussian_attention_cases import KINDS, make, masks, run

import trifuse

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poisoned_memory")]
check = functools.partial(cases.check, "triton", device="cuda")
kinds = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
halves = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
PACKED = torch.tensor([0, 5, 5, 133, 300, 301, 700])


@dtypes
@kinds
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("causal", [False, True])
def test_sizes_of_models(causal, dim, kind, dtype):
    check(make(batch=1, heads=2, queries=513, dim=dim, kind=kind, dtype=dtype, sigma=20.0), is_causal=causal)


@dtypes
@kinds
@pytest.mark.parametrize("packed", [False, True])
def test_all_options_at_once(packed, kind, dtype):
    tensors = make(batch=1, heads=4, kv_heads=2, queries=700, dim=50, value_dim=70, kind=kind, dtype=dtype)
    offsets = {"cu_seqlens_q": PACKED} if packed else {}
    check(tensors, enable_gqa=True, is_causal=True, **offsets, **masks(tensors, boolean=packed))


@halves
@pytest.mark.parametrize("kind", ["g", "gcs"])
def test_unnormalized(kind, dtype):
    check(make(batch=1, queries=300, dim=64, kind=kind, dtype=dtype), normalized=False)


@dtypes
@pytest.mark.parametrize("origin", [0.5, 5.0, 100.0, 1000.0])
@pytest.mark.parametrize("dim", [64, 128])
def test_far_from_the_origin(dim, origin, dtype):
    """At 1000 half precision moves without rounding; at 5 it takes the launch with low halves."""
    check(make(batch=1, queries=300, dim=dim, kind="g", dtype=dtype, origin=origin))


@dtypes
def test_local_windows_in_long_sequences(dtype):
    check(make(batch=1, heads=1, queries=4096, dim=64, kind="s", dtype=dtype, sigma=1.0))


@dtypes
@pytest.mark.parametrize("heads, kv_heads", [(2, 2), (16, 1)])
def test_gradients_repeat_bit_for_bit(heads, kv_heads, dtype):
    tensors = make(heads=heads, kv_heads=kv_heads, queries=1000, dim=64, dtype=dtype)
    first, second = (run("triton", tensors, device="cuda", enable_gqa=True) for _ in range(2))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def test_no_matrix_of_all_pairs():
    q, k, v = (torch.randn(1, 1, 16384, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    with trifuse.backend("triton"):
        trifuse.gaussian_attention(q, k, v, gamma=0.01, sigma=50.0).sum().backward()
    assert torch.cuda.max_memory_allocated() - before < 100e6


@halves
def test_more_than_two_to_the_31_elements(dtype):
    if torch.cuda.get_device_properties(0).total_memory < 16 * 2**30:
        pytest.skip("needs a GPU with 16 GiB of memory")
    rows = 2**25 // 8 + 3
    k = torch.zeros(1, 1, 8 * rows, 64, device="cuda", dtype=dtype)[:, :, ::8].expand(-1, 2, -1, -1)
    assert (rows - 1) * k.stride(2) > 2**31
    k[0, 0, -40:].normal_()
    q = torch.randn(1, 2, 40, 64, device="cuda", dtype=dtype)
    center = torch.arange(rows - 40.0, rows, device="cuda").expand(1, 2, -1)
    with trifuse.backend("triton"):
        found = trifuse.gaussian_attention(q, k, k, sigma=0.5, center=center)
    with trifuse.backend("reference"):
        expected = trifuse.gaussian_attention(q, k[:, :, -80:], k[:, :, -80:], sigma=0.5, center=center - (rows - 80))
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)
