"""What only a GPU shows of causal_conv1d: sizes that fill it. The tests of test_causal_conv1d.py run there too."""

import functools

import conv_cases as cases
import pytest
import torch
from conv_cases import make, recurring_ids, run

import trifuse

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poisoned_memory")]
BACKENDS = ["cuda", "triton"]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
PACKED = torch.tensor([0, 5, 5, 18, 51, 64, 65, 700, 1000, 1000])
check = functools.partial(cases.check, device="cuda")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", ["bdl", "bld"])
@pytest.mark.parametrize("cu_seqlens", [None, PACKED])
@pytest.mark.parametrize("with_ids", [False, True])
def test_all_options_at_once(with_ids, cu_seqlens, layout, dtype, backend):
    tensors = make(seqlen=1000, dim=700, layout=layout, dtype=dtype, cu_seqlens=cu_seqlens)
    ids = recurring_ids(1 if cu_seqlens is not None else 2, 1000, run=90) if with_ids else None
    check(backend, tensors, dtype, layout=layout, cu_seqlens=cu_seqlens, seq_idx=ids, activation="silu")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", ["bdl", "bld"])
def test_gradients_repeat_bit_for_bit(layout, backend):
    tensors = make(dim=700, seqlen=1000, batch=4, dtype=torch.bfloat16, layout=layout)
    options = {"device": "cuda", "layout": layout, "activation": "silu"}
    first, second = (run(backend, tensors, torch.bfloat16, **options) for _ in range(2))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", ["bdl", "bld"])
def test_more_than_two_to_the_31_elements(layout, backend):
    dim, seqlen = 4096, 2**19 + 40
    if torch.cuda.get_device_properties(0).total_memory < 24 * 2**30:
        pytest.skip("needs a GPU with 24 GiB of memory")
    x = torch.zeros((1, dim, seqlen) if layout == "bdl" else (1, seqlen, dim), dtype=torch.bfloat16, device="cuda")
    assert x.numel() > 2**31
    tail = x[:, -3:, -40:] if layout == "bdl" else x[:, -40:, -3:]
    tail.normal_()
    weight = torch.randn(dim, 4, device="cuda")
    with trifuse.backend(backend):
        y = trifuse.causal_conv1d(x, weight, activation="silu", layout=layout)
    y = y[:, -3:, -40:] if layout == "bdl" else y[:, -40:, -3:].transpose(1, 2)
    alone = tail if layout == "bdl" else tail.transpose(1, 2)
    with trifuse.backend("reference"):
        expected = trifuse.causal_conv1d(alone, weight[-3:], activation="silu")
    torch.testing.assert_close(y, expected, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("state_dtype", DTYPES)
@pytest.mark.parametrize("seqlen", [0, 3, 11])
def test_update(seqlen, state_dtype, dtype, backend):
    update = functools.partial(cases.run_update, backend, device="cuda")
    tensors = cases.make_update(dim=300, seqlen=seqlen, size=7, dtype=dtype, state_dtype=state_dtype, rows=5)
    rows = torch.tensor([4, -1, 0])
    counts = torch.tensor([3, 0, 2**33 + 1])
    cases.check_update(update, tensors, conv_state_indices=rows)
    cases.check_update(update, tensors, conv_state_indices=rows, cache_seqlens=counts, activation="silu")


@pytest.mark.parametrize("backend", BACKENDS)
def test_explain_names_the_kernel_and_float64_is_refused(backend):
    x, weight = torch.zeros(1, 4, 9, device="cuda"), torch.zeros(4, 4, device="cuda")
    with trifuse.backend(backend):
        assert trifuse.explain("causal_conv1d", x, weight).chosen == backend
        with pytest.raises(trifuse.BackendUnavailable, match="it computes in float32, and the inputs are float64"):
            trifuse.causal_conv1d(x.double(), weight.double())
